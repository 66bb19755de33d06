"""What a turn yields as it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token of a reply: its id and its log-probability; top: the (id, log-probability) of the likeliest ones.

    They are the model's own, before temperature, penalties, filters and anything else that shapes what is drawn.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """Text that has become complete, and the ids drawn since the last delta (row of the batch first).

    text never ends inside a character, nor in what may be the beginning of a stop string or of a tool call, and is ""
    for a reply without a processor and for all that belongs to a tool call. reasoning: it belongs to what a thinking
    reply thinks before its answer, which is never spoken. logprobs: one entry an id, if they were asked for. time_ms:
    where in the turn's sound the text is expected to begin, in milliseconds from its first sample, as estimated when it
    was sent; None where nothing of it is spoken.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    reasoning: bool = False
    logprobs: tuple[TokenLogprob, ...] | None = None
    time_ms: float | None = None


@dataclass(frozen=True)
class AudioChunk:
    """Sound of a row: samples float32 [n] on the CPU, starting `start_sample` samples after the turn's first one."""

    row: int
    samples: Tensor
    sample_rate: int
    start_sample: int

    @property
    def start_ms(self) -> float:
        """`start_sample` in milliseconds."""
        return 1000 * self.start_sample / self.sample_rate


@dataclass(frozen=True)
class ToolCall:
    """A function that a row's reply calls, complete; it comes behind the `TextDelta` of the id that completes it.

    id: `call_` and random digits, unique. name: as the model wrote it, which may be no tool that there is. arguments:
    their JSON text as the model wrote it; parsed: what it says.
    """

    row: int
    id: str
    name: str
    arguments: str
    parsed: dict[str, Any]


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a row.

    reason: `stop`, `max_new_tokens`, `max_frames` (its speech was cut) or `interrupted`; `silence` or `code_loop` where
    runaway speech was ended; `error` where a row was ended by a malformed tool call or by the caller's function of the
    logits. What a part raises leaves the iterator. text: the whole answer. usage: prompt_tokens, reply_tokens, frames.
    timing: seconds, see `docs/streaming.md`. error: what was wrong, for the reason `error`.
    """

    row: int
    reason: str
    text: str
    usage: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    error: str | None = None


Event = Union[TextDelta, AudioChunk, ToolCall, TurnEnd]
