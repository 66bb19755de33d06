"""What turn taking is told, what it decides, and who may judge the end of a turn.

All times are whole milliseconds of the input: of all samples pushed so far, whatever their rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

from torch import Tensor

MAX_WAIT_MS = {"low": 8000, "medium": 4000, "high": 2000, "auto": 4000}  # eagerness -> longest silence in a turn
_LONGEST_MS = 3_600_000
_NO_LESS_MS = {
    "prefix_padding_ms": 0,
    "silence_duration_ms": 32,
    "min_speech_ms": 32,
    "interrupt_after_ms": 32,
    "backchannel_ms": 0,
    "max_turn_ms": 1000,
    "keep_audio_ms": 1000,
    "idle_timeout_ms": 1,
}


@dataclass(frozen=True)
class TurnConfig:
    """When a turn begins and ends, and what stops a reply.

    threshold: probability from which a frame is speech; 0.15 less keeps it up. prefix_padding_ms: sound before the
    first speech that belongs to the turn. silence_duration_ms: silence that ends a turn where no judge decides.
    eagerness: with a judge, how long a turn may be silent at most: high 2 s, medium and auto 4 s, low 8 s.
    min_speech_ms: speech that begins a turn; a click is shorter. interrupt: may speech stop a reply?
    interrupt_after_ms: speech that begins a turn while a reply sounds; a shorter "mhm" leaves the reply alone.
    backchannel_ms: a turn that interrupted a reply with no more speech than this was none: the reply goes on.
    max_turn_ms: a longer turn is ended. idle_timeout_ms: silence after a reply that is reported, None: never.
    keep_audio_ms: how far back `TurnTaking.audio` reaches (64 kB a second). echo_guard: compare with the sent sound.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    eagerness: str = "auto"
    min_speech_ms: int = 64
    interrupt: bool = True
    interrupt_after_ms: int = 600
    backchannel_ms: int = 800
    max_turn_ms: int = 60_000
    idle_timeout_ms: int | None = None
    keep_audio_ms: int = 10_000
    echo_guard: bool = True

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what cannot be used, with what can."""
        number = isinstance(self.threshold, Real) and not isinstance(self.threshold, bool)
        if not number:
            raise TypeError(f"threshold must be a number between 0 and 1, got {self.threshold!r}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold!r}; 0.5 is usual")
        if self.eagerness not in MAX_WAIT_MS:
            raise ValueError(f"eagerness must be one of {', '.join(MAX_WAIT_MS)}, got {self.eagerness!r}")
        for name in ("interrupt", "echo_guard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, least in _NO_LESS_MS.items():
            if (value := getattr(self, name)) is not None or name != "idle_timeout_ms":
                check_ms(name, value, least)


def check_ms(name: str, value: object, least: int = 0) -> int:
    """A whole number of milliseconds, at most an hour. Raises TypeError or ValueError."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of milliseconds, got {value!r}")
    if not least <= int(value) <= _LONGEST_MS:
        raise ValueError(f"{name} must lie in {least}..{_LONGEST_MS} ms, got {value}")
    return int(value)


@dataclass(frozen=True)
class TurnEvent:
    """A decision. at_ms: the position in the input at which it was made, the end of the frame that settled it."""

    at_ms: int


@dataclass(frozen=True)
class SpeechStarted(TurnEvent):
    """A turn began. start_ms: where its sound begins, prefix padding included; speech_ms: where the speech does."""

    start_ms: int
    speech_ms: int


@dataclass(frozen=True)
class SpeechStopped(TurnEvent):
    """A turn ended. end_ms: where its sound ends, silence included; speech_end_ms: where the speech does.

    reason: silence, judge or max_length. is_turn: False where nothing was said; the sound is then to be discarded.
    """

    end_ms: int
    speech_end_ms: int
    reason: str
    is_turn: bool = True


@dataclass(frozen=True)
class Interrupt(TurnEvent):
    """The user speaks: the reply stops here. reply: the number of the reply that was being played (`reply_started`
    gave it; nothing was heard of later ones); played_ms: how much of it was played, for `interrupt(played_ms)`."""

    reply: int
    played_ms: int


@dataclass(frozen=True)
class ResumeReply(TurnEvent):
    """The interruption was none: send the reply's sound again from from_ms. reason: backchannel or nothing_said."""

    reply: int
    from_ms: int
    reason: str


@dataclass(frozen=True)
class Backchannel(TurnEvent):
    """A short sound of the user's ("mhm") while the reply was playing, which went on."""

    start_ms: int
    end_ms: int


@dataclass(frozen=True)
class IdleTimeout(TurnEvent):
    """Nobody has said anything since the reply ended at since_ms."""

    since_ms: int


@dataclass(frozen=True)
class TurnContext:
    """What a judge of the end of a turn sees. samples [n]: the turn at 16 kHz from its start (the last 8 s of a longer
    one) with the silence at its end."""

    samples: Tensor
    start_ms: int
    at_ms: int
    silence_ms: int


class EndJudge(Protocol):
    """Has the user finished? Asked after 192 ms of silence and whenever the silence has doubled."""

    def __call__(self, context: TurnContext) -> float:
        """The probability, 0 .. 1, that the turn is over."""


def longest_silence(probability: object, eagerness: str, least_ms: int) -> float:
    """The silence in ms that ends a turn which is over with that probability: from the longest at 0 to the least at 1,
    by the square of the doubt. Raises TypeError or ValueError for what is no probability."""
    if not isinstance(probability, Real) or isinstance(probability, bool):
        raise TypeError(f"a judge of turns must give a number between 0 and 1, got {probability!r}")
    if not 0 <= float(probability) <= 1:  # NaN neither
        raise ValueError(f"a judge of turns must give a probability in 0..1, got {probability!r}")
    return least_ms + (MAX_WAIT_MS[eagerness] - least_ms) * (1 - float(probability)) ** 2
