"""Sampling with one setting and one random stream a row.

Random numbers are a pure function of (seed, stream, step, index): a row draws the same whatever shares its batch, on
any device, and text, codebook 0 and residual codes never disturb one another. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM = 1, 2, 3

_GOLDEN = 0x9E3779B97F4A7C15  # the constants of splitmix64 (Steele, Lea and Flood, 2014)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


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
            ("top_k", self.top_k >= 0 and int(self.top_k) == self.top_k, "must be a whole number, 0 (off) or more"),
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
                near = difflib.get_close_matches(key, names, n=1)
                raise ValueError(
                    f"SamplingConfig has no field {key!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"it has {names}")
                )
        return cls(**value)


def _signed(value: int) -> int:
    """The int64 with the same bits as a 64-bit unsigned value."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of int64 whose output bits look independent."""
    for bits, factor in _MIX:
        x = (x ^ _shift_right(x, bits)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def gumbel_noise(seeds: Tensor, stream: int, steps: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise fp32 [B, size] for int64 seeds [B] and steps [B] of one stream."""
    key = _mix(_mix(seeds + _signed(_GOLDEN * stream)) + steps * _signed(_GOLDEN))
    index = torch.arange(1, size + 1, device=seeds.device) * _signed(_GOLDEN)
    bits = _shift_right(_mix(key[:, None] + index), 12)  # 52 bits: exact in float64 with the half that follows
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log().float()


class RowSampling:
    """The settings of a batch as tensors, and the draw. One instance a stream and turn."""

    def __init__(self, configs: Sequence[SamplingConfig], seeds: Tensor, stream: int) -> None:
        device = seeds.device
        self.seeds = seeds
        self.stream = stream
        self.any_random = any(c.temperature > 0 for c in configs)
        self.any_filter = any(c.temperature > 0 and (c.top_k > 0 or c.top_p < 1) for c in configs)
        self.any_penalty = any(c.repetition_penalty != 1 for c in configs)
        self.greedy = torch.tensor([c.temperature == 0 for c in configs], device=device)
        self.temperature = torch.tensor([float(c.temperature) or 1.0 for c in configs], device=device)[:, None]
        self.top_k = torch.tensor([min(int(c.top_k), 2**31) for c in configs], device=device)[:, None]
        self.top_p = torch.tensor([float(c.top_p) for c in configs], device=device)[:, None]
        self.penalty = torch.tensor([float(c.repetition_penalty) for c in configs], device=device)[:, None]

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
        drawn = (scores - scores.amax(-1, keepdim=True)) / self.temperature.clamp(min=1e-30)
        if self.any_filter:
            drawn = _keep_likely(drawn, self.top_k, self.top_p)
        drawn = drawn + gumbel_noise(self.seeds, self.stream, steps, logits.shape[-1])
        return torch.where(self.greedy, scores.argmax(-1), drawn.argmax(-1))


def _keep_likely(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what top-k, then top-p of the rest, leave out; the likeliest token always stays."""
    vocabulary = scores.shape[-1]
    ordered, order = scores.sort(-1, descending=True)
    last = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last), -math.inf)  # ties with the k-th stay
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside &= top_p < 1
    outside[..., 0] = False
    return scores.new_full(scores.shape, -math.inf).scatter(-1, order, ordered.masked_fill(outside, -math.inf))
