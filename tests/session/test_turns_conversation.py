"""docs/turns.md's example with a real session of an engine: omni-nano is talked to over a loudspeaker that its
microphone hears, is hummed at, stopped by mistake, and interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from turn_sounds import recording

from omni import AudioChunk, OmniEngine, OmniModel, TurnEnd
from omni.generation.events import Event
from omni.session.engine import EngineSession
from omni.session.turn_events import Backchannel, ResumeReply, SpeechStopped, TurnEvent

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "turns.md").read_text()
STEP_MS = 100
AHEAD_MS = 400  # how much sound waits in the player
ECHO_DELAY, ECHO_GAIN = 1920, 0.1  # samples at 16 kHz; -20 dB


class Room:
    """A person, a player and a microphone, in steps of 100 ms; `names` is what the page's example defines."""

    def __init__(self, session: EngineSession) -> None:
        self.session, self.events, self.ends = session, list[TurnEvent](), list[TurnEnd]()
        code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
        assert code is not None
        self.names: dict[str, Any] = {
            "session": session,
            "player": self,
            "answer": self.answer,
            "play_again": self.play_again,
        }
        exec(code[1], self.names)
        self.turns = self.names["turns"]
        push = self.turns.push
        self.turns.push = lambda samples, rate_hz: self._noted(push(samples, rate_hz))
        self.noise = torch.Generator().manual_seed(0)
        self.reply: Iterator[Event] = iter(())
        self.sound, self.waiting, self.played, self.stopped = torch.zeros(0), torch.zeros(0), 0, False
        self.says, self.echo = torch.zeros(0), torch.zeros(ECHO_DELAY)

    def _noted(self, events: list[TurnEvent]) -> list[TurnEvent]:
        self.events += events
        return events

    # what the page asks for

    def stop(self) -> None:
        """The player falls silent."""
        self.stopped, self.waiting = True, torch.zeros(0)

    def answer(self) -> None:
        self.stopped, self.sound = False, torch.zeros(0)
        self.turns.reply_started()
        self.reply = self.session.respond(seed=0)

    def play_again(self, from_ms: int) -> None:
        self.stopped = False
        self._send(self.sound[from_ms * 24 :])

    def _send(self, samples: Tensor) -> None:
        self.turns.reply_sent(samples, 24000)
        if not self.stopped:
            self.waiting = torch.cat((self.waiting, samples))

    # the clock

    def step(self) -> None:
        """100 ms: the reply goes on, the player plays, the microphone hears all of it."""
        while len(self.waiting) < AHEAD_MS * 24 and (event := next(self.reply, None)) is not None:
            if isinstance(event, AudioChunk):
                self.sound = torch.cat((self.sound, event.samples))
                self._send(event.samples)
            elif isinstance(event, TurnEnd):
                self.ends.append(event)
                if event.reason != "interrupted":
                    self.turns.reply_ended()
        heard, self.waiting = self.waiting[:2400], self.waiting[2400:]
        self.played += len(heard)
        heard = torch.cat((heard, torch.zeros(2400 - len(heard))))
        near = torch.nn.functional.interpolate(heard[None, None], 1600, mode="linear")[0, 0]
        self.echo = torch.cat((self.echo, near))
        says, self.says = self.says[:1600], self.says[1600:]
        microphone = self.echo[:1600] * ECHO_GAIN + torch.randn(1600, generator=self.noise) * 1e-3
        microphone[: len(says)] += says
        self.echo = self.echo[1600:]
        self.names["listen"](microphone, 16000)

    def run(self, seconds: float) -> None:
        for _ in range(round(1000 * seconds / STEP_MS)):
            self.step()

    def until(self, kind: type, limit_s: float = 12.0) -> Any:
        """The next event of a kind."""
        seen = len(self.events)
        for _ in range(round(1000 * limit_s / STEP_MS)):
            self.step()
            for event in self.events[seen:]:
                if isinstance(event, kind):
                    return event
        raise AssertionError(f"no {kind.__name__} within {limit_s} s, only {self.events[seen:]}")

    def until_played(self, ms: int) -> None:
        """Wait for so much of the sound of the newest reply."""
        begin = self.played
        while self.played - begin < ms * 24:
            self.step()


@pytest.mark.slow
def test_three_turns_with_a_hum_a_false_interruption_and_a_barge_in() -> None:
    model = OmniModel.from_pretrained("omni-nano", dtype="float32")
    request, question = recording("request.wav"), recording("question.wav")
    with OmniEngine(model, max_sessions=2) as engine:
        session = engine.session()
        room = Room(session)
        room.run(1.0)

        room.says = request  # the first turn: all of its reply is played
        assert room.until(SpeechStopped).is_turn
        room.run(4.0)
        assert [end.reason for end in room.ends] == ["stop"] and room.played == len(room.sound)
        assert room.ends[0].text.startswith("the old")

        room.says = request  # the second: somebody hums during its reply, which goes on
        assert room.until(SpeechStopped).is_turn
        room.until_played(500)
        room.says = request[8000:13000]
        seen = len(room.events)
        room.until(Backchannel)
        assert kinds(room.events[seen:]) == ["Backchannel"]
        room.run(3.0)
        assert [end.reason for end in room.ends] == ["stop"] * 2 and not len(room.waiting)

        room.says = request  # the third: a few words stop its reply, which is resumed where it stopped
        assert room.until(SpeechStopped).is_turn
        room.until_played(300)
        room.says = request[8000:19000]
        seen = len(room.events)
        resumed = room.until(ResumeReply)
        assert kinds(room.events[seen:]) == ["SpeechStarted", "Interrupt", "SpeechStopped", "ResumeReply"]
        assert 300 <= resumed.from_ms <= 1500 and len(room.waiting)
        assert [item.role for item in session.items] == ["user", "assistant"] * 3  # nothing of those words stays

        room.says = question  # and now it is interrupted: the session keeps what was heard, and answers
        seen = len(room.events)
        assert room.until(SpeechStopped).is_turn
        assert kinds(room.events[seen:]) == ["SpeechStarted", "Interrupt", "SpeechStopped"]
        third = session.items[5]
        assert third.status == "incomplete" and third.text and room.ends[2].text.startswith(third.text)
        assert third.text != room.ends[2].text
        room.run(6.0)
        assert [item.role for item in session.items] == ["user", "assistant"] * 4
        assert session.items[7].text == room.ends[3].text and not session.responding


def kinds(events: list[TurnEvent]) -> list[str]:
    return [type(event).__name__ for event in events]
