"""The spectral envelope of recorded speech: what a source and a filter are told beside the pitch.

A window of three periods holds the same power wherever it begins; averaged over two thirds of the pitch, and with what
repeats from harmonic to harmonic taken out of its cepstrum, the spectrum is that of the filter alone.
Source: Morise, 2015 (CheapTrick).
Shapes: B rows, n samples, M moments, C bands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.training.codec.pitch import Pitch

_UNVOICED_HZ = 500.0  # windows of 6 ms where there is no pitch
_SHARPER = -0.15  # of the cepstrum's weights: gives back what averaging has taken
_QUIETEST = 1e-10  # power
_AT_ONCE = 4096  # moments; bounds memory


@torch.no_grad()
def spectral_envelope(wave: Tensor, pitch: Pitch, sample_rate: int, period: int, bands: Tensor) -> Tensor:
    """wave [B, M * period] and its pitch at the end of each period -> natural logarithms of magnitudes [B, M, C].

    bands [C, bins]: how much each frequency takes of the bands around it, see `SourceFilter.tables`; what a band
    gets is the mean of these frequencies. White noise of mean power 1 gives about 0.
    """
    n_fft = 2 * (bands.shape[1] - 1)
    lowest = 3 * sample_rate / (n_fft - 3)  # its window is as long as the spectrum
    hz = torch.where(pitch.voiced, pitch.hz, _UNVOICED_HZ).clamp(min=lowest).flatten()
    half = n_fft // 2
    windows = F.pad(wave.float(), (half, half)).unfold(1, n_fft, period)[:, 1:].flatten(0, 1)
    means = (bands / bands.sum(1, keepdim=True)).t()
    found = [_smooth(part, own, sample_rate) @ means for part, own in zip(windows.split(_AT_ONCE), hz.split(_AT_ONCE))]
    return torch.cat(found).view(*pitch.hz.shape, -1)


def _smooth(windows: Tensor, hz: Tensor, sample_rate: int) -> Tensor:
    """Samples around moments [N, n_fft], pitch [N] -> envelopes [N, n_fft / 2 + 1]."""
    n_fft = windows.shape[1]
    hz = hz[:, None]
    away = (torch.arange(n_fft, device=windows.device) - n_fft // 2) / sample_rate * hz  # in periods
    weights = torch.where(away.abs() < 1.5, 0.5 + 0.5 * torch.cos(2 * math.pi * away / 3), 0.0)
    seen = windows * weights
    seen = seen - weights * seen.sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    power = torch.fft.rfft(seen / weights.square().sum(1, keepdim=True).sqrt()).abs().square()

    width = hz * n_fft / sample_rate  # of the pitch, in bins
    mirrored = torch.cat((power[:, 1:].flip(1), power, power[:, 1:-1].flip(1)), dim=1)
    sums = F.pad(mirrored.cumsum(1, dtype=torch.float64), (1, 0))
    bins = torch.arange(power.shape[1], device=windows.device) + power.shape[1] - 1
    upper, lower = (_between(sums, bins + 0.5 + way * width / 3) for way in (1, -1))
    smooth = ((upper - lower) / (2 * width / 3)).float().clamp(min=_QUIETEST)

    cepstrum = torch.fft.irfft(smooth.log(), n_fft)
    periods = torch.arange(n_fft, device=windows.device)
    periods = torch.minimum(periods, n_fft - periods) / sample_rate * hz
    lifter = torch.sinc(periods) * (1 - 2 * _SHARPER + 2 * _SHARPER * torch.cos(2 * math.pi * periods))
    return 0.5 * torch.fft.rfft(cepstrum * lifter).real


def _between(sums: Tensor, places: Tensor) -> Tensor:
    """Sums at places between bins, which the spectrum fills evenly."""
    below = places.floor().clamp(0, sums.shape[1] - 2)
    first = below.long()
    start, end = sums.gather(1, first), sums.gather(1, first + 1)
    return start + (end - start) * (places - below)
