"""What of a reply was heard: its ids by the time at which their sound ends."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from numbers import Real

from omni.code2wav.contract import CodecDecoder
from omni.generation.turn import SPEECH_OFF, SPEECH_OVER, Turn


@dataclass(frozen=True)
class ReplyTimes:
    """A finished reply: its ids, and when each has been heard, in milliseconds (None: it was silent)."""

    token_ids: tuple[int, ...]
    ends_ms: tuple[float, ...] | None

    def heard(self, played_ms: float | None) -> list[int]:
        """The ids that were heard once so much was played (None: all)."""
        check_played(played_ms)
        if played_ms is None or self.ends_ms is None:
            return list(self.token_ids)
        return list(self.token_ids[: bisect_right(self.ends_ms, float(played_ms) + 1e-6)])


def check_played(played_ms: float | None) -> None:
    """Raise ValueError unless it is a number of milliseconds or None."""
    number = isinstance(played_ms, Real) and not isinstance(played_ms, bool)
    if played_ms is not None and not (number and 0 <= played_ms < math.inf):
        raise ValueError(f"played_ms must be a number of milliseconds, 0 or more, got {played_ms!r}")


def reply_times(turn: Turn, codec: CodecDecoder | None) -> ReplyTimes:
    """The times of a reply that is over."""
    spoken = tuple(token for token in turn.text.kept if token not in turn.request.stop_ids)
    if turn.speech.state == SPEECH_OFF or codec is None or not turn.speech.codes:
        return ReplyTimes(spoken, None)
    total_ms, tokens = 1000 * len(turn.speech.codes) / codec.frame_rate, turn.given + len(spoken)
    return ReplyTimes(spoken, tuple(total_ms * (turn.given + i + 1) / tokens for i in range(len(spoken))))


def heard_ids(turn: Turn, codec: CodecDecoder | None, played_ms: float | None) -> list[int]:
    """The ids of a reply that count as heard, as `OmniSession.interrupt` says. Raises ValueError."""
    check_played(played_ms)
    text, speech, stop_ids = turn.text, turn.speech, turn.request.stop_ids
    if speech.state == SPEECH_OFF or codec is None or (speech.state == SPEECH_OVER and not speech.codes):  # silent
        return [token for token in text.kept[: turn.delivered_ids] if token not in stop_ids]
    frames = turn.delivered_frames
    if played_ms is not None:  # a multiple of a frame's length is that many frames, whatever the rounding
        frames = min(frames, math.floor(float(played_ms) * codec.frame_rate / 1000 + 1e-6))
    spoken = [token for token in text.kept if token not in stop_ids]
    heard = (turn.given + len(spoken)) * frames // max(len(speech.codes), 1)
    return spoken[: max(0, heard - turn.given)]
