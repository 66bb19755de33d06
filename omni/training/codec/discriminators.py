"""Discriminators that tell recorded waveforms from decoded ones, for adversarial codec training.

Views of a waveform: folded at several periods (pitch), averaged to several rates (shape over time), as complex spectra
at several resolutions (texture), and as the levels of such spectra, in which what is quiet counts as much as what is
loud. Each view is judged at every place, not once a clip.
Weights start as PyTorch's convolutions do, under weight normalisation (Salimans and Kingma, 2016).
Sources: multi-period, Kong et al., 2020; multi-scale, Kumar et al., 2019; spectra, Defossez et al., 2022; magnitudes
of spectra, Jang et al., 2021.
Shapes: B rows, n samples, F frequencies, S spectrum frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
SCALES = (1, 2, 4)
WINDOWS = (512, 1024, 2048)
_SLOPE = 0.1  # of the leaky rectifier below zero
_QUIET, _MIDDLE = 1e-4, -2.5  # magnitude of -80 dB; log10 of a magnitude in the middle of speech


class Judgement(NamedTuple):
    """logits [B, places], high where the wave looks recorded; features of each hidden layer [B, ...]."""

    logits: Tensor
    features: list[Tensor]


class _ConvDiscriminator(nn.Module):
    """Convolutions with leaky rectifiers, and a last one to logits."""

    def __init__(self, layers: Iterable[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([weight_norm(layer) for layer in layers])
        self.last = weight_norm(last)

    def judge(self, x: Tensor) -> Judgement:
        """A view of the wave [B, C, ...] -> its judgement."""
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return Judgement(self.last(x).flatten(1), features)


class PeriodDiscriminator(_ConvDiscriminator):
    """Looks at every `period`-th sample: the wave folded to [B, 1, ceil(n / period), period]."""

    def __init__(self, period: int, width: int = 32) -> None:
        channels = (1, width, 4 * width, 16 * width, 32 * width)
        super().__init__(
            [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in itertools.pairwise(channels)]
            + [nn.Conv2d(channels[-1], channels[-1], (5, 1), 1, (2, 0))],
            nn.Conv2d(channels[-1], 1, (3, 1), 1, (1, 0)),
        )
        self.period = period

    def forward(self, wave: Tensor) -> Judgement:
        return self.judge(F.pad(wave, (0, -wave.shape[1] % self.period)).unflatten(1, (-1, self.period))[:, None])


class ScaleDiscriminator(_ConvDiscriminator):
    """Looks at the wave averaged over `scale` samples."""

    def __init__(self, scale: int, width: int = 16) -> None:
        groups = min(4, width)
        super().__init__(
            [nn.Conv1d(1, width, 15, padding=7)]
            + [
                nn.Conv1d(width * a, width * b, 41, 4, padding=20, groups=groups * a)
                for a, b in ((1, 4), (4, 16), (16, 64))
            ]
            + [nn.Conv1d(64 * width, 64 * width, 5, padding=2)],
            nn.Conv1d(64 * width, 1, 3, padding=1),
        )
        self.scale = scale

    def forward(self, wave: Tensor) -> Judgement:
        return self.judge(F.avg_pool1d(F.pad(wave, (0, -wave.shape[1] % self.scale))[:, None], self.scale))


class SpectrumDiscriminator(_ConvDiscriminator):
    """Looks at the complex spectrum [B, 2, S, F] of Hann windows with a hop of a quarter."""

    inputs = 2

    def __init__(self, window: int, width: int = 32) -> None:
        dilated = [
            nn.Conv2d(width, width, (3, 9), (1, 2), (dilation, 4), dilation=(dilation, 1)) for dilation in (1, 2, 4)
        ]
        super().__init__(
            [nn.Conv2d(self.inputs, width, (3, 9), 1, (1, 4)), *dilated, nn.Conv2d(width, width, 3, 1, 1)],
            nn.Conv2d(width, 1, 3, 1, 1),
        )
        self.window = window

    def forward(self, wave: Tensor) -> Judgement:
        with torch.autocast(wave.device.type, enabled=False):  # no spectra of narrow types
            wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
            weights = torch.hann_window(self.window, dtype=wave.dtype, device=wave.device)
            padded = F.pad(wave, (self.window // 2, self.window - self.window // 2))
            spectrum = torch.stft(
                padded, self.window, self.window // 4, window=weights, center=False, return_complex=True
            )
            x = self.view(torch.view_as_real(spectrum), weights).permute(0, 3, 2, 1)
        return self.judge(x)

    def view(self, spectrum: Tensor, weights: Tensor) -> Tensor:
        """What is judged [B, F, S, C] of a spectrum's real and imaginary parts [B, F, S, 2]."""
        return spectrum / weights.norm()


class LevelDiscriminator(SpectrumDiscriminator):
    """Looks at the levels of the spectrum [B, 1, S, F]: log10 of the magnitudes above -80 dB, moved to about -1 .. 2.

    It tells decoded speech from recorded after some hundred steps on a few rows, which the others take many times as
    long for: to them a spectrum is its few loudest places.
    """

    inputs = 1

    def view(self, spectrum: Tensor, weights: Tensor) -> Tensor:
        power = (spectrum * (2 / weights.sum())).square().sum(-1, keepdim=True)
        return 0.5 * (power + _QUIET**2).log10() - _MIDDLE


class Discriminators(nn.Module):
    """Discriminators side by side; without arguments those of the papers. `width` scales all of them.

    periods, scales: a `PeriodDiscriminator` and a `ScaleDiscriminator` for each; windows, levels: a
    `SpectrumDiscriminator` and a `LevelDiscriminator` for each window of so many samples.
    """

    def __init__(
        self,
        width: int = 32,
        periods: Iterable[int] = PERIODS,
        scales: Iterable[int] = SCALES,
        windows: Iterable[int] = WINDOWS,
        levels: Iterable[int] = (),
    ) -> None:
        """Raises ValueError for a width below 4 or not a multiple of 4, and for no discriminator at all."""
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"discriminators of width {width} cannot be built; width must be a multiple of 4")
        half = max(4, width // 2)
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(period, width) for period in periods]
            + [ScaleDiscriminator(scale, half) for scale in scales]
            + [SpectrumDiscriminator(window, width) for window in windows]
            + [LevelDiscriminator(window, width) for window in levels]
        )
        if not self.parts:
            raise ValueError("no discriminator is left; give at least one period, scale, window or level")

    def forward(self, wave: Tensor) -> list[Judgement]:
        """wave [B, n >= 1] -> the judgement of each. Raises ValueError for another shape."""
        if wave.dim() != 2 or wave.shape[1] == 0:
            raise ValueError(f"a wave must be [rows, n >= 1], got {list(wave.shape)}")
        return [part(wave) for part in self.parts]
