"""Losses of codec training: how far two waveforms are apart, and what discriminators make of them.

Every function returns a `Loss` whose items are rows: total / count is the mean over rows, each row a mean over its
values. Levels are relative to full scale: a sine of amplitude 1 has magnitude 1 in every spectrum, whatever the window,
so that one floor (-100 dB unless told) serves all scales; it keeps values and gradients finite at digital silence. A
higher one spends less of the gradient on what is hardly heard.
Shapes: B rows, n samples, F frequencies, M mel bins, S spectrum frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.encoders.mel import mel_filter_bank
from omni.training.objectives.losses import Loss

MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))  # window, mel bins
STFT_WINDOWS = (512, 1024, 2048)
ADVERSARIAL = ("least_squares", "hinge")
_FLOOR = 1e-5  # magnitude; -100 dB
_HARMONIC_WINDOW, _HARMONIC_TOP_HZ = 2048, 4000  # resolves the harmonics of any voice, where they are heard
_QUIET = 1e-3  # magnitude; spectral convergence does not grow further as the reference falls below -60 dB


def magnitude_spectrum(wave: Tensor, window: int, floor: float = _FLOOR) -> Tensor:
    """Magnitudes [B, F = window / 2 + 1, S] of wave [B, n >= 1]: Hann window, hop of a quarter, silence around.

    Computed in fp32 at least, also under autocast.
    """
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
        weights = torch.hann_window(window, dtype=wave.dtype, device=wave.device)
        padded = F.pad(wave, (window // 2, window - window // 2))
        spectrum = torch.stft(padded, window, window // 4, window=weights, center=False, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1) * (2 / weights.sum()) ** 2
        return (power + floor**2).sqrt()  # the root alone has no gradient at zero


def multi_scale_mel_loss(
    wave: Tensor,
    reference: Tensor,
    sample_rate: int,
    scales: Sequence[tuple[int, int]] = MEL_SCALES,
    floor: float = _FLOOR,
) -> Loss:
    """Mean absolute difference of log10 mel magnitudes above `floor`, averaged over scales of (window, mel bins).

    wave, reference [B, n]. Source: Kong et al., 2020 (one scale); Kumar et al., 2023 (the scales). Raises ValueError
    for waves of different shapes.
    """
    _check(wave, reference)
    rows = torch.zeros(len(wave), device=wave.device)
    for window, num_mels in scales:
        filters = _mel_means(num_mels, window, sample_rate)
        levels = [
            (filters.to(spectrum) @ spectrum).log10()
            for spectrum in (magnitude_spectrum(wave, window, floor), magnitude_spectrum(reference, window, floor))
        ]
        rows = rows + (levels[0] - levels[1]).abs().mean((1, 2)) / len(scales)
    return _over_rows(rows)


def multi_scale_stft_loss(
    wave: Tensor, reference: Tensor, windows: Sequence[int] = STFT_WINDOWS, floor: float = _FLOOR
) -> Loss:
    """Spectral convergence |S_ref - S| / |S_ref| plus mean absolute difference of ln S, averaged over windows.

    wave, reference [B, n]; S are magnitudes, |.| is the Frobenius norm over a row's spectrum. Source: Yamamoto et al.,
    2020, equations 4 to 6. Raises ValueError for waves of different shapes.
    """
    _check(wave, reference)
    rows = torch.zeros(len(wave), device=wave.device)
    for window in windows:
        ours, theirs = magnitude_spectrum(wave, window, floor), magnitude_spectrum(reference, window, floor)
        values = ours[0].numel()
        distance = ((theirs - ours).square().sum((1, 2)) + values * floor**2).sqrt() - values**0.5 * floor
        loudness = (theirs.square().sum((1, 2)) + values * _QUIET**2).sqrt()
        rows = rows + (distance / loudness + (theirs.log() - ours.log()).abs().mean((1, 2))) / len(windows)
    return _over_rows(rows)


def harmonic_loss(
    wave: Tensor,
    reference: Tensor,
    sample_rate: int,
    window: int = _HARMONIC_WINDOW,
    top_hz: float = _HARMONIC_TOP_HZ,
    floor: float = _FLOOR,
) -> Loss:
    """Mean absolute difference of ln S up to `top_hz`, each place weighted by how far the reference lies above `floor`.

    wave, reference [B, n]; S are magnitudes of a window long enough to tell harmonics apart. Most places of a spectrum
    lie between harmonics or hold noise that nothing can predict, and in the other losses count as much as a harmonic: a
    decoder learns from them what colour a sound has long before it learns its pitch. Raises ValueError for waves of
    different shapes.
    """
    _check(wave, reference)
    count = max(1, int(top_hz / sample_rate * window))
    ours, theirs = (magnitude_spectrum(one, window, floor)[:, :count].log() for one in (wave, reference))
    weights = theirs - math.log(floor)
    return _over_rows(((ours - theirs).abs() * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6))


def feature_matching_loss(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Loss:
    """Mean absolute difference of discriminator features, averaged over layers, then over discriminators.

    fake, real: for each discriminator its features [B, ...]; the real ones are constants. Source: Kumar et al., 2019.
    """
    _check_count(fake, real)
    rows = torch.zeros(len(fake[0][0]), device=fake[0][0].device)
    for ours, theirs in zip(fake, real):
        for mine, other in zip(ours, theirs, strict=True):
            rows = rows + (mine - other.detach()).abs().flatten(1).mean(1) / (len(ours) * len(fake))
    return _over_rows(rows)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str = "least_squares") -> Loss:
    """What discriminators minimise, averaged over them; logits [B, ...] of real waves and of detached fake ones.

    "least_squares": (1 - real)^2 + fake^2 (Mao et al., 2017); "hinge": relu(1 - real) + relu(1 + fake).
    """
    _check_count(fake, real)
    _check_kind(kind)
    rows = torch.zeros(len(real[0]), device=real[0].device)
    for true, false in zip(real, fake):
        if kind == "hinge":
            errors = (F.relu(1 - true), F.relu(1 + false))
        else:
            errors = ((1 - true).square(), false.square())
        rows = rows + sum(error.flatten(1).mean(1) for error in errors) / len(real)
    return _over_rows(rows)


def generator_loss(fake: Sequence[Tensor], kind: str = "least_squares") -> Loss:
    """What the codec minimises so that its waves pass for real: (1 - fake)^2, or -fake for "hinge"; averaged."""
    _check_count(fake, fake)
    _check_kind(kind)
    rows = torch.zeros(len(fake[0]), device=fake[0].device)
    for false in fake:
        rows = rows + (-false if kind == "hinge" else (1 - false).square()).flatten(1).mean(1) / len(fake)
    return _over_rows(rows)


@functools.lru_cache(maxsize=32)
def _mel_means(num_mels: int, window: int, sample_rate: int) -> Tensor:
    """Mel filters that average: each row of [M, F] adds up to 1. Filters between two frequencies of a short window
    hold none and are left out."""
    filters = mel_filter_bank(num_mels, window, sample_rate).double()
    sums = filters.sum(1, keepdim=True)
    held = sums[:, 0] > 0
    return filters[held] / sums[held]


def _over_rows(rows: Tensor) -> Loss:
    return Loss(rows.sum(), torch.tensor(float(len(rows)), device=rows.device))


def _check(wave: Tensor, reference: Tensor) -> None:
    if wave.dim() != 2 or wave.shape != reference.shape or wave.shape[1] == 0:
        raise ValueError(
            f"waves must both be [rows, n >= 1], got {list(wave.shape)} and {list(reference.shape)}; cut the longer one"
        )


def _check_count(fake: Sequence[object], real: Sequence[object]) -> None:
    if not fake or len(fake) != len(real):
        raise ValueError(f"got {len(fake)} outputs for fake and {len(real)} for real waves; give one a discriminator")


def _check_kind(kind: str) -> None:
    if kind not in ADVERSARIAL:
        raise ValueError(f"adversarial loss {kind!r} is not one of {', '.join(map(repr, ADVERSARIAL))}")
