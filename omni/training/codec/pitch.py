"""The pitch of recorded speech: what a source and a filter (`omni.code2wav.source_filter`) learn from.

Normalised cross-correlation of the sound with itself a period later, at every moment; of all ways through the moments
the one of most correlation and least change is taken. Source: Talkin, 1995.
Shapes: B rows, n samples, M moments, L lags, G candidates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchaudio.functional import resample

LOWEST_HZ, HIGHEST_HZ = 60.0, 480.0
_RATE_HZ = 8000  # enough for harmonics that tell the pitch
_WINDOW = 240  # samples at that rate, 30 ms: two periods of a deep voice
_NEAR = 160  # samples, 20 ms: of a short window the pitch is that of the moment
_AROUND = 4  # lags beside the one that is about right
_APART_S = 0.01
_AN_OCTAVE = 36  # candidates
_CHANGE = 1.5  # what a change of an octave within 10 ms costs, in correlation
_SHORT = 0.02  # an octave up is worth so much: of equal periods the shortest
_VOICED = 0.5  # the least correlation
_QUIET = 1e-5  # of a window's mean square: -50 dB, where nothing is voiced


class Pitch(NamedTuple):
    """hz fp32 [B, M], also where nothing is voiced; voiced bool [B, M]."""

    hz: Tensor
    voiced: Tensor


@torch.no_grad()
def track_pitch(wave: Tensor, sample_rate: int, period: int) -> Pitch:
    """wave [B, n], n a multiple of `period` -> pitch at the end of each `period` samples, M = n / period of them.

    Raises ValueError for a wave that is not [B, n] of whole periods.
    """
    if wave.dim() != 2 or wave.shape[1] == 0 or wave.shape[1] % period:
        raise ValueError(f"a wave must be [rows, n], n a multiple of {period} samples; got {list(wave.shape)}")
    low = resample(wave.float(), sample_rate, _RATE_HZ)
    longest, size = math.ceil(_RATE_HZ / LOWEST_HZ) + 2, 512
    ends = (torch.arange(1, wave.shape[1] // period + 1, device=wave.device) * period * _RATE_HZ) // sample_rate
    apart = max(1, round(_APART_S * sample_rate / period))  # the way is found through so few of them
    ends, every = ends[(apart - 1) // 2 :: apart], ends
    half = (_WINDOW + longest) // 2
    seen = F.pad(low, (half, half + _RATE_HZ // 100)).unfold(1, _WINDOW + longest, 1)[:, ends]
    seen = seen - seen.mean(2, keepdim=True)
    early = torch.fft.rfft(seen[..., :_WINDOW], size).conj()
    products = torch.fft.irfft(torch.fft.rfft(seen, size) * early, size)[..., :longest]
    sums = F.pad(seen.square().cumsum(2), (1, 0))
    energy = sums[..., _WINDOW:][..., :longest] - sums[..., :longest]
    likeness = products / ((energy * energy[..., :1]).sqrt() + _QUIET * _WINDOW)

    lags = _candidates(wave.device)
    below = lags.floor().long()
    found = torch.lerp(likeness[..., below], likeness[..., below + 1], lags - below)
    chosen = _best_way(found - _SHORT * (lags / lags[0]).log2(), apart * period / sample_rate)
    near = chosen.repeat_interleave(apart, dim=1)
    near = F.pad(near, (0, max(0, len(every) - near.shape[1])), "replicate")[:, : len(every)]
    return _refined(F.pad(low, (_RATE_HZ, _RATE_HZ)), every + _RATE_HZ, lags[near].round().long())


def _refined(low: Tensor, moments: Tensor, lags: Tensor) -> Pitch:
    """Pitch by windows that lie around each moment: low [B, n], moments [M], lags that are about right [B, M]."""
    starts = moments - (_NEAR + lags) // 2
    window = torch.arange(_NEAR, device=low.device)

    def cut(from_: Tensor) -> Tensor:
        seen = low.gather(1, (from_[..., None] + window).flatten(1)).view(*lags.shape, _NEAR)
        return seen - seen.mean(2, keepdim=True)

    early = cut(starts)
    tops = []
    for step in range(-_AROUND, _AROUND + 1):
        late = cut(starts + lags + step)
        energy = early.square().sum(2) * late.square().sum(2)
        tops.append((early * late).sum(2) / (energy.sqrt() + _QUIET * _NEAR))
    likeness = torch.stack(tops, dim=2)  # [B, M, 2 * _AROUND + 1]
    top = likeness[..., 1:-1].argmax(2) + 1
    left, middle, right = (likeness.gather(2, (top + step)[..., None])[..., 0] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = torch.where(bend < -1e-6, 0.5 * (left - right) / bend, 0.0).clamp(-1, 1)  # the top of a parabola
    return Pitch(_RATE_HZ / (lags + top - _AROUND + shift), middle > _VOICED)


def _best_way(scores: Tensor, seconds: float) -> Tensor:
    """Which candidate at each moment: scores [B, M, G] -> int64 [B, M] (Viterbi, 1967)."""
    octaves = torch.arange(scores.shape[2], device=scores.device) / _AN_OCTAVE
    cost = _CHANGE * (octaves[:, None] - octaves).abs() * min(1.0, 0.01 / seconds)
    best, origins = scores[:, 0], []
    for moment in scores[:, 1:].unbind(1):
        before, origin = (best[:, None] - cost).max(2)
        best = before + moment
        origins.append(origin)
    way = [best.argmax(1)]
    for origin in reversed(origins):
        way.append(origin.gather(1, way[-1][:, None])[:, 0])
    return torch.stack(way[::-1], dim=1)


@lru_cache(maxsize=8)
def _candidates(device: torch.device) -> Tensor:
    """Periods in samples at the low rate [G], from the shortest on."""
    octaves = math.log2(HIGHEST_HZ / LOWEST_HZ)
    steps = torch.arange(0, octaves, 1 / _AN_OCTAVE, dtype=torch.float64)
    return (_RATE_HZ / HIGHEST_HZ * 2**steps).float().to(device)
