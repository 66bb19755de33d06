"""What a turn yields as it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from torch import Tensor


@dataclass(frozen=True)
class TextDelta:
    """Text that has become complete, and the ids drawn since the last delta (row of the batch first).

    text never ends inside a character, and is "" for a reply without a processor. reasoning: it belongs to what a
    thinking reply thinks before its answer, which is never spoken.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    reasoning: bool = False


@dataclass(frozen=True)
class AudioChunk:
    """Sound of a row: samples float32 [n] on the CPU, starting `start_sample` samples after the turn's first one."""

    row: int
    samples: Tensor
    sample_rate: int
    start_sample: int


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a row.

    reason: `stop`, `max_new_tokens`, `max_frames` (its speech was cut) or `interrupted`; `silence` or `code_loop` where
    runaway speech was ended. What a part raises leaves the iterator. text: the whole answer. usage: prompt_tokens,
    reply_tokens, frames.
    timing: seconds, see `docs/streaming.md`.
    """

    row: int
    reason: str
    text: str
    usage: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)


Event = Union[TextDelta, AudioChunk, TurnEnd]
