"""Snake (Ziyin et al., 2020) with a magnitude of its own (BigVGAN, Lee et al., 2023): the activation of both vocoders.

Shapes: B rows, C channels, T steps in time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SnakeBeta(nn.Module):
    """x + sin^2(a x) / b on [B, C, T], with a and b per channel, kept as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def initialise(self, std: float) -> None:
        """a = b = 1."""
        nn.init.zeros_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        a, scale = self.alpha.exp()[:, None], (self.beta.exp() + 1e-9).reciprocal()[:, None]
        sine = (x * a).sin_()
        return torch.addcmul(x, sine, sine * scale)
