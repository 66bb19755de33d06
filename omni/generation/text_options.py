"""What a turn asks of its text beside sampling: stop strings, a least length, a function of the logits, likelihoods.

Shapes: V vocabulary, n ids of prompt and reply so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from omni.generation.events import TokenLogprob

LogitsProcessor = Callable[[Tensor, Tensor], Tensor | None]
Stop = Union[str, Sequence[str], Sequence[Union[str, Sequence[str], None]], None]


@dataclass(frozen=True)
class TextOptions:
    """Of one turn.

    stop: strings that end the answer. logprobs: how many of the likeliest tokens to report with each token (None:
    report nothing). min_new_tokens: ids that come before one that ends the reply. logits_processor: changes the logits
    of each token.
    """

    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    min_new_tokens: int = 0
    logits_processor: LogitsProcessor | None = None

    def shapes(self, reply: Sequence[int]) -> bool:
        """Whether the logits of the token after a reply so far are changed."""
        return self.logits_processor is not None or len(reply) < self.min_new_tokens

    def shape(self, logits: Tensor, prompt: Sequence[int], reply: Sequence[int], stop_ids: frozenset[int]) -> Tensor:
        """The logits fp32 [V] to draw from, in place of the model's own [V].

        What `logits_processor` raises goes on; ValueError or TypeError for what cannot be drawn from.
        """
        shaped = logits.float()
        if self.logits_processor is not None:
            ids = torch.tensor([*prompt, *reply], dtype=torch.int64, device=logits.device)
            given = shaped.clone()
            returned = self.logits_processor(ids, given)
            shaped = _checked(given if returned is None else returned, logits)
        if len(reply) < self.min_new_tokens:
            shaped = shaped.index_fill(-1, torch.tensor(sorted(stop_ids), device=shaped.device), -math.inf)
        if bool((shaped == -math.inf).all()):
            raise ValueError(
                f"nothing to draw is left of {len(shaped)} logits after {len(reply)} ids of the reply: "
                "logits_processor, and min_new_tokens where it is set, have ruled out every token; leave one"
            )
        return shaped


def _checked(returned: Any, logits: Tensor) -> Tensor:
    """What a caller's function made of logits [V], in fp32 and without numbers that cannot be subtracted."""
    if not isinstance(returned, Tensor):
        raise TypeError(f"logits_processor must return a tensor or None, got {type(returned).__name__}")
    if returned.shape != logits.shape:
        raise ValueError(
            f"logits_processor returned {list(returned.shape)} for logits of {list(logits.shape)}; return one value "
            "for each id of the vocabulary"
        )
    shaped = returned.to(logits.device, torch.float32)
    if bool(shaped.isnan().any()):
        raise ValueError("logits_processor returned NaN; use -inf for what must not be drawn")
    return shaped.clamp(max=torch.finfo(logits.dtype).max)  # +inf: surely this one


def token_logprob(log_probs: Tensor, token: int, top: int) -> TokenLogprob:
    """A drawn token and the `top` likeliest ones, by log-probabilities [V]."""
    values, ids = log_probs.topk(top)
    return TokenLogprob(token, float(log_probs[token]), tuple(zip(ids.tolist(), values.tolist())))


def read_stops(value: Stop, rows: int, per_row: Callable[[Any, str], list[Any]]) -> list[tuple[str, ...]]:
    """The stop strings of each row: one string or a list of strings is for all of them."""
    listed = isinstance(value, (list, tuple))
    if listed and any(item is None or isinstance(item, (list, tuple)) for item in value):  # type: ignore[union-attr]
        return [_stops_of(own) for own in per_row(value, "stop")]
    return [_stops_of(value)] * rows


def _stops_of(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"stop must be a string or a list of strings, got {value!r}")
    if "" in stops:
        raise ValueError("stop holds an empty string, which every text begins with; leave it out")
    return tuple(stops)
