"""What `OmniModel.generate` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from omni.generation.events import TokenLogprob


@dataclass
class OmniOutput:
    """A batch of replies: B prompts, or n answers to each of them one after the other.

    sequences int64 [B, T]: prompt (as given, padding included) and reply ids, the stop id kept, rows that ended early
    filled with it. replies: the reply ids of each row without filling, to the one that ends a stop string. text: the
    answers, cut at a stop string, without what the prompt held of them; None without a processor; reasoning: what a
    thinking reply thought before its answer, None for a row that did not. codes: int64 [K, n] a row; audio: float32
    [samples] a row, on the CPU; both None when no speech was asked for. reason: why each row ended (`stop`,
    `max_new_tokens`, or `max_frames` when its speech was cut). timing: seconds spent in each stage. logprobs: an entry
    for each id of `replies`, if they were asked for.
    """

    sequences: Tensor
    replies: list[list[int]]
    text: list[str] | None
    reasoning: list[str | None]
    codes: list[Tensor] | None
    audio: list[Tensor] | None
    sample_rate: int | None
    reason: list[str]
    timing: dict[str, float] = field(default_factory=dict)
    logprobs: list[list[TokenLogprob]] | None = None
