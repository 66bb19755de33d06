"""What of a reply counts as heard: the words that were played to their end.

When a word ends is estimated from the text and the sound (`omni.generation.speech_times`), no model is asked. A word
counts with all its tokens or not at all: once it has probably ended, and a moment more, so that nothing is kept that
was not heard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real

from omni.code2wav.contract import CodecDecoder
from omni.generation.reply import ANSWER, MARKER
from omni.generation.turn import SPEECH_OFF, SPEECH_OVER, Turn
from omni.processing.text_stream import TextStream

_MOMENT_MS = 30.0  # that a word has to be over: about the error of its time


@dataclass(frozen=True)
class ReplyTimes:
    """When each token of a reply has been heard, so that the reply can be cut at any later time.

    token_ids: what counts of the reply, without the ids that end it. ends_ms: for each of them, how much of the turn's
    sound has to be played until it counts; never falling, 0 for all of a silent reply. Both are plain numbers.
    """

    token_ids: tuple[int, ...]
    ends_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))  # lists, where they were saved as JSON
        object.__setattr__(self, "ends_ms", tuple(self.ends_ms))
        if len(self.token_ids) != len(self.ends_ms):
            raise ValueError(f"{len(self.token_ids)} tokens need as many times, got {len(self.ends_ms)}")

    def heard(self, played_ms: float | None) -> list[int]:
        """The ids that count as heard once so much has been played (None: all of it). Raises ValueError."""
        played = check_played(played_ms)
        return [token for token, end in zip(self.token_ids, self.ends_ms) if end <= played]


def check_played(played_ms: float | None) -> float:
    """Milliseconds that were played; None is all that there are. Raises ValueError."""
    if played_ms is None:
        return math.inf
    if isinstance(played_ms, bool) or not isinstance(played_ms, Real) or not 0 <= played_ms < math.inf:
        raise ValueError(f"played_ms must be a number of milliseconds, 0 or more, got {played_ms!r}")
    return float(played_ms)


def heard_ids(turn: Turn, codec: CodecDecoder | None, played_ms: float | None) -> list[int]:
    """The ids of a reply that count as heard, while it is given or after.

    played_ms: how much of its sound was played (None, or more than was yielded: all that was yielded). Whatever was
    played of a silent reply, it counts as read as far as it was yielded. Raises ValueError.
    """
    played = check_played(played_ms)
    if _silent(turn, codec):
        stop_ids = turn.request.stop_ids
        return [token for token in turn.text.kept[: turn.delivered_ids] if token not in stop_ids]
    assert codec is not None
    hop, missing = int(codec.hop_length), int(codec.missing_samples)
    if not turn.sound.complete(turn.speech) or turn.delivered_frames < (turn.sound.samples + missing) // hop:
        yielded = max(0, turn.delivered_frames * hop - missing)
        played = min(played, 1000 * yielded / codec.sample_rate)
    return reply_times(turn, codec).heard(None if played == math.inf else played)


def reply_times(turn: Turn, codec: CodecDecoder | None) -> ReplyTimes:
    """When the tokens of a reply are heard, as far as its sound has come; what is not spoken yet never is (`inf`).

    Of a reply that has ended, all is heard at the end of its sound.
    """
    kept, stop_ids = turn.text.kept, turn.request.stop_ids
    ids = tuple(token for token in kept if token not in stop_ids)
    if _silent(turn, codec):
        return ReplyTimes(ids, (0.0,) * len(ids))
    assert codec is not None and turn.times is not None
    over, length = turn.sound.complete(turn.speech), 1000 * turn.sound.samples / codec.sample_rate
    words = turn.times.word_ends_ms(sound_over=over and turn.speech.reason == "stop")
    ends = _token_ends(_token_words(turn, ids), [end + _MOMENT_MS for end in words])
    return ReplyTimes(ids, tuple(min(end, length) for end in ends) if over else tuple(ends))


def _silent(turn: Turn, codec: CodecDecoder | None) -> bool:
    speech = turn.speech
    return speech.state == SPEECH_OFF or codec is None or (speech.state == SPEECH_OVER and not speech.codes)


def _token_words(turn: Turn, ids: Sequence[int]) -> list[tuple[int, int] | None]:
    """The first and the last word of each id; None for one that is not spoken or completes no character."""
    times, stream = turn.times, turn.text.stream
    assert times is not None and stream is not None
    told, calls = list(turn.text.kinds), turn.text.call_reader
    for first, stop in () if calls is None else calls.spans:  # calls of tools are not spoken
        told[first:stop] = [MARKER] * (stop - first)
    kinds = [kind for token, kind in zip(turn.text.kept, told) if token not in turn.request.stop_ids]
    stream, at, words = TextStream(stream.processor), times.given, list[tuple[int, int] | None]()
    for token, kind in zip_longest(ids, kinds[: len(ids)], fillvalue=ANSWER):  # what a stop string left is answer
        text = stream.push(int(token)) if kind == ANSWER else ""
        letters = [at + i for i, letter in enumerate(text) if not letter.isspace()]
        words.append((times.word_at(letters[0]), times.word_at(letters[-1])) if letters else None)
        at += len(text)
    return words


def _token_ends(words: Sequence[tuple[int, int] | None], ends: Sequence[float]) -> list[float]:
    """When each token has been heard, by when the words have.

    That is with the last word that it belongs to, and not before the next token if both share a word. What belongs to
    none goes with the token that follows, else with the last word.
    """
    out: list[float] = []
    following, shared = max(ends, default=math.inf), -1
    for token in reversed(words):
        if token is not None:
            own = ends[token[1]] if token[1] < len(ends) else math.inf
            following = max(own, following) if token[1] == shared else own
            shared = token[0]
        out.append(following)
    return out[::-1]
