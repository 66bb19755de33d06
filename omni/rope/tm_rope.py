"""TM-RoPE: time-aligned multimodal rotary embedding over time, height and width (Qwen2.5-Omni and Qwen3-Omni, 2.2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from omni.config.decoder import LanguageConfig
from omni.rope.rotary import double_angles, inverse_frequencies


class TMRope:
    """positions fp32 [3, B, T] (time, height, width) -> (cos, sin), each fp32 [B, T, D].

    Interleaved, rotary pair i turns with axis i mod 3 while that axis has pairs left in `sections`, else with time
    (Qwen3: 24/20/20 of 64 pairs, THWTHW...TTTT); else the axes follow each other in blocks (Qwen2.5: 16 T, 24 H, 24 W).
    With three equal rows it is ordinary 1-D rotary embedding.
    """

    def __init__(self, dim: int, theta: float, sections: tuple[int, ...], interleaved: bool = True) -> None:
        self.dim = dim
        self.theta = theta
        self.axis = tuple(
            i % 3 if i % 3 and i < 3 * sections[i % 3] else 0  # time takes whatever height and width leave
            for i in range(dim // 2)
        )
        if not interleaved:
            self.axis = tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))

    @classmethod
    def of(cls, config: LanguageConfig) -> TMRope:
        """The rotary embedding of a decoder's config."""
        return cls(config.head_size, config.theta, config.mrope_section, config.mrope_interleaved)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = axis_frequencies(self.dim, self.theta, self.axis, positions.device)  # [3, D / 2]
        return double_angles((positions[..., None].float() * frequencies[:, None, None]).sum(0))


@lru_cache(maxsize=64)
def axis_frequencies(dim: int, theta: float, axis: tuple[int, ...], device: torch.device) -> Tensor:
    """fp32 [3, dim / 2]: the inverse frequency of each rotary pair in the row of its axis, zero in the others."""
    frequencies = inverse_frequencies(dim, theta, device)
    return torch.nn.functional.one_hot(torch.tensor(axis, device=device), 3).T * frequencies
