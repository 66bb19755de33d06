"""Rotary embeddings over one axis (text, codes) and over two axes (image patches).

Tables and the rotation itself are fp32 whatever the model's dtype. Shapes: B rows, T tokens, H heads, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """fp32 [dim / 2]: theta^(-2i / dim), constant per (dim, theta, device)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


class Rotary:
    """1-D rotary embedding (Su et al., 2021): positions [B, T] -> (cos, sin), each fp32 [B, T, D]."""

    def __init__(self, dim: int, theta: float) -> None:
        self.dim = dim
        self.theta = theta

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * inverse_frequencies(self.dim, self.theta, positions.device)
        return double_angles(angles)


class AxialRotary:
    """2-D rotary embedding of image patches: (row, column) [N, 2] -> (cos, sin), each fp32 [N, D].

    The first quarter of the head rotates by the row, the second by the column; both repeat in the other half.
    """

    def __init__(self, dim: int, theta: float) -> None:
        self.dim = dim
        self.theta = theta

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * inverse_frequencies(self.dim // 2, self.theta, positions.device)
        return double_angles(angles.flatten(-2))


def double_angles(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Angles [..., D / 2] -> (cos, sin) [..., D], laid out for `apply_rotary`."""
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] by tables [B, T, D] (rotate-half layout); computed in fp32, returned in x's dtype."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)
