"""Snake activation without aliasing: at twice the rate, between two low-pass filters.

Sources: BigVGAN (Lee et al., 2023); the filters are those of Karras et al., 2021.
Shapes: B rows, C channels, T steps in time.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.snake import SnakeBeta

RATIO = 2
TAPS = 12
# Steps to either side that the filtered activation reads: downsampling reads TAPS / 2 steps of the doubled rate ahead
# of an output, and the last of these was upsampled from (TAPS - RATIO) / 2 more.
REACH = (TAPS // 2 + (TAPS - RATIO) // 2) // RATIO


@lru_cache(maxsize=16)
def low_pass(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, 1, TAPS]: a sinc that passes the lower half of the doubled rate, under a Kaiser window; sums to one."""
    with torch.inference_mode(False):  # the filter outlives this call, which may be under inference mode
        width = 4 * 0.6 / RATIO  # of the transition band
        attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * width + 7.95  # dB; Kaiser's rule for the length
        assert attenuation > 50  # 51 dB: the third of his rules for the shape
        beta = 0.1102 * (attenuation - 8.7)
        window = torch.kaiser_window(TAPS, periodic=False, beta=beta, dtype=torch.float32)
        times = torch.arange(TAPS, dtype=torch.float32) - (TAPS - 1) / 2
        taps = torch.sinc(times / RATIO) * window
        return (taps / taps.sum()).to(device, dtype).view(1, 1, TAPS)


def upsample(x: Tensor) -> Tensor:
    """[B, C, T] -> [B, C, 2T]; the signal is held at its ends."""
    border = TAPS // RATIO - 1
    held = F.pad(x, (border, border), mode="replicate").flatten(0, 1)[:, None]
    y = F.conv_transpose1d(held, RATIO * low_pass(x.device, x.dtype), stride=RATIO)[:, 0]
    cut = border * RATIO + (TAPS - RATIO) // 2
    return y[:, cut : y.shape[1] - cut].unflatten(0, x.shape[:2])


def downsample(x: Tensor) -> Tensor:
    """[B, C, 2T] -> [B, C, T]; the signal is held at its ends."""
    held = F.pad(x, (TAPS // 2 - 1, TAPS // 2), mode="replicate").flatten(0, 1)[:, None]
    return F.conv1d(held, low_pass(x.device, x.dtype), stride=RATIO)[:, 0].unflatten(0, x.shape[:2])


class FilteredSnake(nn.Module):
    """SnakeBeta at the double rate, so that the harmonics that it makes do not fold back: [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        return downsample(self.act(upsample(x)))
