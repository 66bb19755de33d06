"""Sampling with one setting and one random stream a row.

Random numbers are a pure function of (seed, stream, step, index): a row draws the same whatever shares its batch, on
any device, and text, codebook 0 and residual codes never disturb one another. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from omni.config.keywords import nearest
from omni.layers.splitmix import GOLDEN, mix, shift_right, signed
from omni.layers.state import State

TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM, SOUND_STREAM = 1, 2, 3, 4

_TIES = 32  # tokens as likely as the k-th that top-k keeps at most


@dataclass(frozen=True)
class SamplingConfig:
    """How one token is drawn. The defaults are neutral: the model's own distribution.

    temperature: 0 is greedy (the likeliest token; the other fields but the penalty have no effect then). top_k: keep
    the k likeliest (0: all). top_p: keep the smallest set whose probability reaches p (1: all). repetition_penalty:
    divides the positive and multiplies the negative logits of tokens seen before (1: off) (Keskar et al., 2019).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"SamplingConfig.{f.name} must be a number, got {value!r}")
        checks = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "must be 0 (greedy) or more"),
            ("top_k", self.top_k >= 0 and self.top_k % 1 == 0, "must be a whole number, 0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be positive (1 is off)"),
        )
        for name, ok, rule in checks:
            if not ok:
                raise ValueError(f"SamplingConfig.{name} = {getattr(self, name)!r} {rule}")

    @classmethod
    def of(cls, value: SamplingConfig | Mapping[str, Any]) -> SamplingConfig:
        """Accept a config or a mapping of its fields. Raises TypeError or ValueError."""
        if isinstance(value, SamplingConfig):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"sampling must be a SamplingConfig or a dict of its fields, got {type(value).__name__}")
        names = [f.name for f in fields(cls)]
        for key in value:
            if key not in names:
                raise ValueError(f"SamplingConfig has no field {key!r}; {nearest(key, names, f'it has {names}')}")
        return cls(**value)


def gumbel_noise(seeds: Tensor, stream: int, steps: Tensor, tokens: int | Tensor) -> Tensor:
    """Standard Gumbel noise fp32 [B, n] for int64 seeds [B] and steps [B] of one stream.

    tokens: the first n of the vocabulary, or their ids int64 [B, n]; a token's noise does not depend on the others.
    """
    return _noise(_stream_keys(seeds, stream), steps, tokens)


def stream_seed(seed: int, stream: int) -> int:
    """A seed that gives one stream of a turn random numbers of its own, where they are not drawn by this module."""
    return int(_stream_keys(torch.tensor([signed(seed)]), stream))


def _stream_keys(seeds: Tensor, stream: int) -> Tensor:
    return mix(seeds + signed(GOLDEN * stream))


def _noise(keys: Tensor, steps: Tensor, tokens: int | Tensor) -> Tensor:
    if isinstance(tokens, int):
        tokens = torch.arange(tokens, device=keys.device)
    key = mix(keys + steps * GOLDEN)
    bits = shift_right(mix(key[:, None] + (tokens + 1) * GOLDEN), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52  # 52 bits: exact in float64 with the half that follows
    return -(-uniform.log()).log().float()


@dataclass
class RowSampling(State):
    """The settings of a batch as tensors, and the draw. One instance a stream and turn.

    Tensors [B] or [B, 1], one entry a row; what `kind` returns is known to the host and decides which code runs.
    """

    keys: Tensor  # of the random stream
    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    penalty: Tensor
    any_random: bool
    any_filter: bool
    any_penalty: bool
    candidates: int  # tokens a row that can be drawn at most, some more for ties; 0: all

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], seeds: Tensor, stream: int) -> RowSampling:
        """One setting a row, seeds int64 [B]."""

        def column(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), device=seeds.device)[:, None]

        random = [c for c in configs if c.temperature > 0]
        return cls(
            keys=_stream_keys(seeds, stream),
            greedy=torch.tensor([c.temperature == 0 for c in configs], device=seeds.device),
            temperature=column(max(float(c.temperature), 1e-30) if c.temperature else 1.0 for c in configs),
            top_k=column(min(int(c.top_k), 2**31) for c in configs),
            top_p=column(float(c.top_p) for c in configs),
            penalty=column(float(c.repetition_penalty) for c in configs),
            any_random=bool(random),
            any_filter=any(c.top_k > 0 or c.top_p < 1 for c in random),
            any_penalty=any(c.repetition_penalty != 1 for c in configs),
            candidates=max(c.top_k for c in random) + _TIES if random and all(c.top_k > 0 for c in random) else 0,
        )

    @property
    def kind(self) -> tuple[bool, bool, bool, int]:
        """All that is not a tensor: batches of one kind run the same code."""
        return self.any_random, self.any_filter, self.any_penalty, self.candidates

    def copy_from(self, other: RowSampling) -> None:
        """Take over the values of another batch of the same kind, in place."""
        assert self.kind == other.kind
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                value.copy_(getattr(other, f.name))

    def draw(self, logits: Tensor, steps: Tensor, seen: Tensor | None = None, banned: Tensor | None = None) -> Tensor:
        """One token a row, int64 [B].

        logits [B, V]; steps int64 [B], the place of the draw in its stream; seen bool [B, V], tokens under the
        repetition penalty; banned bool [V], never drawn.
        """
        scores = logits.float()
        if self.any_penalty and seen is not None:
            punished = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
            scores = torch.where(seen, punished, scores)
        if banned is not None:
            scores = scores.masked_fill(banned, -math.inf)
        if not self.any_random:
            return scores.argmax(-1)
        drawn = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if not self.any_filter:
            choice = (drawn + _noise(self.keys, steps, drawn.shape[-1])).argmax(-1)
        else:
            if 0 < self.candidates < drawn.shape[-1]:
                drawn, tokens = drawn.topk(self.candidates)
            else:
                drawn, tokens = drawn.sort(-1, descending=True)
            kept = _keep_likely(drawn, self.top_k, self.top_p)
            noise = _noise(self.keys, steps, tokens)
            choice = tokens.gather(-1, (kept + noise).argmax(-1, keepdim=True))[:, 0]
        return torch.where(self.greedy, scores.argmax(-1), choice)


def _keep_likely(ordered: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what top-k, then top-p of the rest, leave out of descending scores; the likeliest always stays."""
    last = torch.where(top_k > 0, top_k, ordered.shape[-1]).clamp(max=ordered.shape[-1]) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last), -math.inf)  # ties with the k-th stay
    probabilities = ordered.double().softmax(-1)  # in float64 the sum does not depend on how many were left out
    outside = (probabilities.cumsum(-1) - probabilities >= top_p) & (top_p < 1)
    outside[..., 0] = False
    return ordered.masked_fill(outside, -math.inf)
