"""What one frame of sound changes: runs of speech become turns, turns stop replies, silence ends them.

A frame of 32 ms is speech if a detector says so, if some of it is louder than the noise (`loudness`), and if the sound
sent meanwhile does not explain it (`echo_guard`).
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni.session.echo_guard import HOP, EchoState
from omni.session.loudness import PART, PARTS, Loudness
from omni.session.playback import Playback
from omni.session.sample_stream import SampleStream
from omni.session.turn_events import (
    Backchannel,
    EndJudge,
    IdleTimeout,
    Interrupt,
    ResumeReply,
    SpeechStarted,
    SpeechStopped,
    TurnConfig,
    TurnContext,
    TurnEvent,
    longest_silence,
)
from omni.session.voice_activity import FRAME, FRAME_MS, VoiceDetector

PER_MS = 16  # samples at 16 kHz
_HYSTERESIS = 0.15  # of the threshold, below which speech has ended
_GAP_MS = 256  # silence that ends a run of speech which is no turn yet; between words there is less
_LEAST_BACKCHANNEL_MS = 128
_FIRST_JUDGED_MS = 192  # silence: shorter than most pauses, longer than the closure of a plosive
_JUDGED_MS = 8000  # of the turn's end
_EDGE = 2 * PART  # 16 ms at the beginning that are too weak to be measured
_PAUSE_PARTS = 8  # 64 ms: a longer quiet stretch separates an earlier sound from the beginning


@dataclass
class Run:
    """Frames of speech with short gaps. Positions are samples at 16 kHz of the input.

    start, end: of the speech; peak: its level in dB; over: it began while a reply sounded; spoken_ms: without the gaps;
    over_ms: the same since a reply began; opened: it is a turn; interrupted: it stopped a reply; said: what the caller
    knows of its words (None: nothing); judged_at_ms: the silence at which the judge is asked next; wait_ms: the silence
    that ends it.
    """

    start: int
    end: int
    peak: float
    over: bool
    spoken_ms: int = 0
    over_ms: int = 0
    opened: bool = False
    interrupted: bool = False
    said: bool | None = None
    judged_at_ms: int = _FIRST_JUDGED_MS
    wait_ms: float = 0.0


@dataclass
class TurnState:
    """All that changes. position: samples of whole frames; rest: samples behind them; turn_end: of the last turn;
    quiet_since: the last reply's end, until somebody speaks; replies: begun so far; frames: the last ones."""

    detector: Any
    stream: SampleStream = field(default_factory=SampleStream)
    echo: EchoState = field(default_factory=EchoState)
    playback: Playback | None = None
    run: Run | None = None
    position: int = 0
    rest: Tensor = field(default_factory=lambda: torch.zeros(0))
    loudness: Loudness = field(default_factory=Loudness)
    turn_end: int = 0
    quiet_since: int | None = None
    replies: int = 0
    frames: deque[Tensor] = field(default_factory=deque)

    def clone(self) -> TurnState:
        """An independent copy."""
        new = copy.copy(self)
        new.detector, new.stream, new.echo = self.detector.clone(), self.stream.clone(), self.echo.clone()
        new.loudness = self.loudness.clone()
        new.playback = None if self.playback is None else self.playback.clone()
        new.run = None if self.run is None else copy.copy(self.run)
        new.frames = self.frames.copy()
        return new

    @property
    def oldest(self) -> int:
        """The first sample that is kept."""
        return self.position - len(self.frames) * FRAME

    def sound(self, start: int, end: int) -> Tensor:
        """The kept samples of a range [n], as far as they are kept."""
        first = max(start - self.oldest, 0)
        frames = [
            self.frames[i] for i in range(first // FRAME, min(-(-(end - self.oldest) // FRAME), len(self.frames)))
        ]
        skipped = first // FRAME * FRAME
        return torch.cat((self.rest[:0], *frames))[first - skipped : end - self.oldest - skipped]


def resume(state: TurnState, reason: str) -> ResumeReply:
    """The interrupted reply goes on from where it stopped."""
    assert state.playback is not None and state.playback.paused
    number, samples = state.playback.played(state.position)
    state.playback = state.playback.resumed(state.stream.length)
    return ResumeReply(state.position // PER_MS, number, samples // PER_MS, reason)


class Listening:
    """What one frame changes in a state."""

    def __init__(self, config: TurnConfig, detector: VoiceDetector, judge: EndJudge | None, state: TurnState) -> None:
        self.config, self.detector, self.judge, self.state = config, detector, judge, state
        self.events: list[TurnEvent] = []

    def hear(self, frame: Tensor) -> list[TurnEvent]:
        """The next frame [512] at 16 kHz -> decisions."""
        state = self.state
        state.position += FRAME
        state.frames.append(frame)
        while len(state.frames) > max(1, self.config.keep_audio_ms // FRAME_MS):
            state.frames.popleft()
        explained = self._explained(frame)
        end = self._speech_end(frame, explained)
        if end is not None:
            self._take(end)
        if state.run is not None:
            self._decide(state.run)
        self._watch_reply()
        return self.events

    def _explained(self, frame: Tensor) -> bool:
        """Is the frame's sound the reply's own?"""
        state, steps = self.state, FRAME // HOP
        if not self.config.echo_guard:
            return False
        playback = state.playback
        sent = state.echo.far.new_zeros(steps, state.echo.far.shape[1])
        if playback is not None:
            sent = playback.powers_at(state.position, steps)
        return not state.echo.step(frame, sent)

    def _speech_end(self, frame: Tensor, explained: bool) -> int | None:
        """Where the speech in a frame ends, or None for a frame without speech."""
        state, run = self.state, self.state.run
        probability = float(self.detector.step(frame, state.detector))
        state.loudness.add(frame)
        low = max(self.config.threshold - _HYSTERESIS, 0.01)
        if probability < low:
            state.loudness.add_noise()
        going_on = run is not None and state.position - run.end <= 2 * FRAME
        if explained or probability < (low if going_on else self.config.threshold):
            return None
        peak = state.loudness.newest if run is None else max(run.peak, state.loudness.newest)
        loud = state.loudness.loud(peak)[-PARTS:]
        return state.position - loud[::-1].index(True) * PART if True in loud else None

    def _take(self, end: int) -> None:
        """Add a frame of speech to the run, or begin one."""
        state = self.state
        playback = self._replying()
        if state.run is None:
            over = playback is not None and playback.sounding(state.position)
            state.run = Run(self._beginning(), end, -100.0, over)
        run = state.run
        run.end, run.peak = end, max(run.peak, state.loudness.newest)
        run.spoken_ms += FRAME_MS
        run.over_ms = 0 if playback is None else run.over_ms + FRAME_MS
        run.judged_at_ms, run.wait_ms = _FIRST_JUDGED_MS, 0.0

    def _replying(self) -> Playback | None:
        """The reply that is being sent or played."""
        playback = self.state.playback
        return None if playback is None or playback.paused or playback.over(self.state.position) else playback

    def _beginning(self) -> int:
        """Where the speech of the newest frame begins, at most 128 ms before the frame."""
        state = self.state
        back, quiet = 0, 0  # parts between the newest and the first, and since the last loud one
        for place, loud in enumerate(reversed(state.loudness.loud(state.loudness.newest)), 1):
            back, quiet = (place, 0) if loud else (back, quiet + 1)
            if place > PARTS and quiet > _PAUSE_PARTS:
                break
        return max(state.position - back * PART - _EDGE, state.turn_end)

    def _decide(self, run: Run) -> None:
        """Begin, interrupt, end."""
        state, config = self.state, self.config
        silence_ms = (state.position - run.end) // PER_MS
        playback = self._replying()
        sounding = playback is not None and playback.sounding(state.position)
        needed_ms = config.interrupt_after_ms if sounding else config.min_speech_ms
        if not run.opened and run.spoken_ms >= needed_ms:
            self._open(run)
        if playback is not None and config.interrupt and run.opened and run.over_ms >= needed_ms:
            number, samples = playback.pause(state.position)
            run.interrupted = True
            self.events.append(Interrupt(self._at_ms, number, samples // PER_MS))
        if not run.opened:
            if silence_ms >= min(_GAP_MS, config.silence_duration_ms):
                self._drop(run)
        elif silence_ms >= self._wait_ms(run, silence_ms):
            self._close(run, "silence" if self.judge is None else "judge")
        elif state.position - run.start >= config.max_turn_ms * PER_MS:
            self._close(run, "max_length")

    @property
    def _at_ms(self) -> int:
        return self.state.position // PER_MS

    def _open(self, run: Run) -> None:
        run.opened, self.state.quiet_since = True, None
        start = max(run.start - self.config.prefix_padding_ms * PER_MS, self.state.turn_end, 0)
        self.events.append(SpeechStarted(self._at_ms, start // PER_MS, run.start // PER_MS))

    def _drop(self, run: Run) -> None:
        """A run that was too short for a turn."""
        if run.over and run.spoken_ms >= _LEAST_BACKCHANNEL_MS:
            self.events.append(Backchannel(self._at_ms, run.start // PER_MS, run.end // PER_MS))
        self.state.run = None

    def _close(self, run: Run, reason: str) -> None:
        state = self.state
        short = run.over and run.interrupted and run.spoken_ms <= self.config.backchannel_ms
        is_turn = run.said if run.said is not None else not short
        self.events.append(SpeechStopped(self._at_ms, self._at_ms, run.end // PER_MS, reason, is_turn))
        state.run, state.turn_end = None, state.position
        if not is_turn and state.playback is not None and state.playback.paused:
            self.events.append(resume(state, "backchannel" if run.said is None else "nothing_said"))

    def _wait_ms(self, run: Run, silence_ms: int) -> float:
        """The silence that ends the turn."""
        if self.judge is None:
            return self.config.silence_duration_ms
        if silence_ms < run.judged_at_ms:
            return run.wait_ms or float("inf")
        samples = self.state.sound(max(run.start, self.state.position - _JUDGED_MS * PER_MS), self.state.position)
        context = TurnContext(samples, run.start // PER_MS, self._at_ms, silence_ms)
        run.wait_ms = longest_silence(self.judge(context), self.config.eagerness, _FIRST_JUDGED_MS)
        run.judged_at_ms *= 2
        return run.wait_ms

    def _watch_reply(self) -> None:
        """Forget a reply that has been played; report a long silence after it."""
        state, limit = self.state, self.config.idle_timeout_ms
        if state.playback is not None and state.playback.over(state.position):
            state.quiet_since = state.playback.begins + state.playback.sent
            state.playback = None
        if limit is None or state.quiet_since is None or state.run is not None:
            return
        if state.position - state.quiet_since >= limit * PER_MS:
            self.events.append(IdleTimeout(self._at_ms, state.quiet_since // PER_MS))
            state.quiet_since = None
