"""Whose turn is it? A state machine: samples in, decisions out, without sockets, threads or a clock of its own.

Time is the input's: a microphone delivers 16,000 samples a second, and that is the clock. Every decision depends on
the samples and on where in their stream the replies' calls came, never on how the samples were cut into pieces.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from omni.processing.audio_file import read_piece
from omni.session.listening import PER_MS, Listening, TurnState, resume
from omni.session.options import whole_rate
from omni.session.playback import Playback
from omni.session.turn_events import EndJudge, TurnConfig, TurnEvent, check_ms
from omni.session.voice_activity import FRAME, VoiceDetector, default_detector


class TurnTaking:
    """One listener. `push` the microphone's samples, tell it about replies, act on its events in their order.

    A call that raises changes nothing. Not for several threads at once.
    """

    def __init__(
        self, config: TurnConfig | None = None, detector: VoiceDetector | None = None, judge: EndJudge | None = None
    ) -> None:
        """detector: None is Silero's network where the package is installed, else levels alone. judge: of the end of a
        turn; None: `silence_duration_ms`. Raises TypeError."""
        if config is not None and not isinstance(config, TurnConfig):
            raise TypeError(f"config must be a TurnConfig or None, got {type(config).__name__}")
        if detector is not None and not (hasattr(detector, "init_state") and hasattr(detector, "step")):
            raise TypeError(f"a detector needs init_state() and step(frame, state), {detector!r} has not")
        if judge is not None and not callable(judge):
            raise TypeError(f"a judge is called with a TurnContext, {judge!r} cannot be called")
        self.config = config or TurnConfig()
        self.detector = detector or default_detector()
        self.judge = judge
        self.state = TurnState(self.detector.init_state())

    def clone(self) -> TurnTaking:
        """A listener that continues independently from here; detector and judge are shared."""
        new = copy.copy(self)
        new.state = self.state.clone()
        return new

    @property
    def position_ms(self) -> int:
        """The sound that was pushed so far."""
        return self.state.stream.length // PER_MS

    @property
    def speaking(self) -> bool:
        """Is a turn of the user's open?"""
        return self.state.run is not None and self.state.run.opened

    @property
    def played_ms(self) -> int:
        """How much of the reply was played by now, 0 without one; also of one that was interrupted."""
        playback = self.state.playback
        return 0 if playback is None else playback.played(self.state.stream.length)[1] // PER_MS

    def push(self, samples: Any, sample_rate: int = 16000) -> list[TurnEvent]:
        """The next samples of the microphone, as `OmniSession.push_audio` takes them -> what was decided.

        Raises TypeError or ValueError for samples and rates that cannot be read, and what the judge raises.
        """
        wave, rate_hz = read_piece(samples), whole_rate(sample_rate)
        state = self.state.clone()
        new = torch.cat((state.rest, state.stream.push(wave, rate_hz)))
        whole = len(new) // FRAME * FRAME
        state.rest = new[whole:].clone()
        events: list[TurnEvent] = []
        for frame in new[:whole].view(-1, FRAME):
            events += Listening(self.config, self.detector, self.judge, state).hear(frame.clone())
        self.state = state
        return events

    def audio(self, start_ms: int, end_ms: int | None = None) -> Tensor:
        """The input at 16 kHz between two positions of events, float32 [n]; None: up to the newest decision.

        Raises ValueError for sound that is not there: still to come, or longer ago than `keep_audio_ms`.
        """
        state = self.state
        oldest, newest = state.oldest // PER_MS, state.position // PER_MS
        start, end = check_ms("start_ms", start_ms), newest if end_ms is None else check_ms("end_ms", end_ms)
        if not oldest <= start <= end <= newest:
            raise ValueError(
                f"the sound from {start} to {end} ms is not kept, only {oldest} to {newest}; "
                "ask sooner (push shorter pieces) or raise keep_audio_ms"
            )
        return state.sound(start * PER_MS, end * PER_MS).clone()

    def reply_started(self) -> int:
        """A reply begins; returns its number, from 0. Sound of earlier ones that is still to be played comes first.

        An interrupted reply can then no longer be resumed. Raises ValueError while another reply is being sent.
        """
        state = self.state
        playback, now = state.playback, state.stream.length
        if playback is not None and playback.open and not playback.paused:
            raise ValueError("another reply is being sent; call reply_ended() or reply_cancelled() first")
        number = state.replies
        if playback is None or playback.paused or playback.over(now):
            state.playback = Playback(((number, 0),), now, now)
        else:
            playback.follow(number)
        state.replies, state.quiet_since = number + 1, None
        return number

    def reply_sent(self, samples: Any, sample_rate: int) -> None:
        """Sound of the reply was handed to its player, which plays it after what it has. Ignored once interrupted.

        Raises as `push` does, and ValueError without a reply.
        """
        wave, rate_hz = read_piece(samples), whole_rate(sample_rate)
        playback = self._reply(sending=True).clone()
        playback.send(wave, rate_hz, self.state.stream.length)
        self.state.playback = playback

    def reply_played(self, played_ms: int) -> None:
        """The player reports how much of the newest reply it has played. Without reports it is taken to play at once.

        Raises TypeError or ValueError for what is no time, ValueError without a reply.
        """
        self._reply().report(check_ms("played_ms", played_ms) * PER_MS, self.state.stream.length)

    def reply_ended(self) -> None:
        """All of the reply has been sent (it may still be playing). Raises ValueError without a reply."""
        self._reply(sending=True).open = False

    def reply_cancelled(self) -> None:
        """The reply is dropped and its player stops; nothing to do where there is none."""
        self.state.playback = None

    def heard(self, text: str) -> list[TurnEvent]:
        """What a transcriber understood of the turn that is open, or that interrupted the reply just now.

        Nothing but white space: the turn was none, and the reply it stopped is resumed. Words: a turn that is open is
        one, however short. Raises TypeError.
        """
        if not isinstance(text, str):
            raise TypeError(f"a transcript must be a text, got {type(text).__name__} {text!r}")
        state = self.state
        if state.run is not None and state.run.opened:
            state.run.said = bool(text.strip())
        elif state.playback is not None and state.playback.paused and not text.strip():
            return [resume(state, "nothing_said")]
        return []

    def _reply(self, *, sending: bool = False) -> Playback:
        playback = self.state.playback
        if playback is None or (sending and not playback.open):
            raise ValueError("there is no reply; call reply_started() first")
        return playback
