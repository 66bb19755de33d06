"""Codec losses: zero for equal waves, finite at silence, gradients as finite differences say."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_codec_training import RATE, mean, noise, sounds

from omni.training.codec.codec_losses import (
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    harmonic_loss,
    magnitude_spectrum,
    multi_scale_mel_loss,
    multi_scale_stft_loss,
)


def test_losses_of_equal_waves_are_zero_and_grow_with_distance() -> None:
    wave = sounds()
    for loss in (
        lambda a, b: multi_scale_mel_loss(a, b, RATE), multi_scale_stft_loss, lambda a, b: harmonic_loss(a, b, RATE),
    ):  # fmt: skip
        assert mean(loss(wave, wave)) == 0
        near, far = mean(loss(wave, wave + noise(*wave.shape) * 0.01)), mean(loss(wave, wave + noise(*wave.shape)))
        assert 0 < near < far
        halves = [loss(rows, noise(*rows.shape)) for rows in (wave[:1], wave[1:])]
        whole = loss(wave, torch.cat([noise(*wave[:1].shape), noise(*wave[1:].shape)]))
        torch.testing.assert_close(sum(h.total for h in halves) / sum(h[1] for h in halves), mean(whole))
    with pytest.raises(ValueError, match="cut the longer one"):
        multi_scale_stft_loss(wave, wave[:, 1:])


def test_levels_are_relative_to_full_scale() -> None:
    tone = torch.sin(2 * math.pi * 1500 * torch.arange(RATE) / RATE)[None]
    for window in (256, 1024, 2048):  # 1500 Hz is a frequency of all
        assert math.isclose(float(magnitude_spectrum(tone, window)[0, :, 20].max()), 1, rel_tol=1e-4)
    quieter = multi_scale_mel_loss(tone, 0.1 * tone, RATE, [(1024, 1)])
    assert 0.9 < float(mean(quieter)) <= 1  # a factor of ten is one


def test_losses_have_finite_gradients_at_silence() -> None:
    silence = torch.zeros(1, 600)
    for reference in (silence, noise(1, 600)):
        wave = torch.zeros(1, 600, requires_grad=True)
        loss = mean(multi_scale_mel_loss(wave, reference, RATE)) + mean(multi_scale_stft_loss(wave, reference))
        loss = loss + mean(harmonic_loss(wave, reference, RATE))
        loss.backward()
        assert torch.isfinite(loss) and wave.grad is not None and torch.isfinite(wave.grad).all()


def test_gradients_of_losses_equal_finite_differences() -> None:
    wave = noise(2, 40, dtype=torch.float64).requires_grad_()
    reference = noise(2, 40, seed=1, dtype=torch.float64)
    maps = [noise(2, 3, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in (2, 3)]
    others = [noise(2, 3, 4, seed=seed, dtype=torch.float64) for seed in (4, 5)]
    check = torch.autograd.gradcheck
    assert check(lambda x: mean(multi_scale_mel_loss(x, reference, RATE, [(16, 4), (32, 8)])), (wave,))
    assert check(lambda x: mean(multi_scale_stft_loss(x, reference, [16, 32])), (wave,))
    assert check(lambda x: mean(harmonic_loss(x, reference, RATE, window=32)), (wave,))
    assert check(lambda a, b: mean(feature_matching_loss([[a], [b]], [[others[0]], [others[1]]])), tuple(maps))
    for kind in ("least_squares", "hinge"):
        assert check(lambda a, b, kind=kind: mean(discriminator_loss([a], [b], kind)), tuple(maps))
        assert check(lambda a, b, kind=kind: mean(generator_loss([a, b], kind)), tuple(maps))


def test_adversarial_losses_at_their_known_points() -> None:
    one, zero = torch.ones(2, 5), torch.zeros(2, 5)
    assert mean(discriminator_loss([one], [zero])) == 0 and mean(generator_loss([one])) == 0
    assert mean(discriminator_loss([zero], [one])) == 2 and mean(generator_loss([zero])) == 1
    assert mean(discriminator_loss([one], [-one], "hinge")) == 0 and mean(generator_loss([one, -one], "hinge")) == 0
    with pytest.raises(ValueError, match="'wgan' is not one of"):
        generator_loss([one], "wgan")
    with pytest.raises(ValueError, match="give one a discriminator"):
        discriminator_loss([one], [])


def test_what_lies_below_the_floor_does_not_count() -> None:
    """Two hisses 90 dB below full scale differ under the usual floor, and hardly under one of -60 dB."""
    quiet, other = (10 ** (-90 / 20) * torch.randn(1, 4800) for _ in range(2))
    for loss in (partial(multi_scale_mel_loss, sample_rate=24000), multi_scale_stft_loss):
        usual, raised = float(loss(quiet, other)[0]), float(loss(quiet, other, floor=1e-3)[0])
        assert raised < 0.01 * usual, (usual, raised)
        loud = 0.1 * torch.randn(1, 4800)
        assert float(loss(loud, 0.1 * torch.randn(1, 4800), floor=1e-3)[0]) > 10 * raised


def test_harmonics_count_where_they_are_loud() -> None:
    """A voice at another pitch is far; what changes between its harmonics, above them or in silence hardly counts."""
    seconds = torch.arange(RATE // 2) / RATE

    def voice(pitch: float) -> torch.Tensor:
        return sum(0.2 / n * torch.sin(2 * math.pi * pitch * n * seconds) for n in range(1, 16))[None]

    reference = voice(200.0)
    other = float(mean(harmonic_loss(voice(212.5), reference, RATE)))
    high = reference + 0.02 * torch.sin(2 * math.pi * 9000 * seconds)
    faint = reference + 3e-4 * noise(1, len(seconds))
    assert other > 0.5 and float(mean(harmonic_loss(high, reference, RATE))) < 0.02 * other
    assert float(mean(harmonic_loss(faint, reference, RATE))) < 0.3 * float(
        mean(multi_scale_stft_loss(faint, reference))
    )
    silence = torch.zeros_like(reference)
    assert mean(harmonic_loss(reference, silence, RATE)) == 0
    with pytest.raises(ValueError, match="cut the longer one"):
        harmonic_loss(reference, reference[:, 1:], RATE)
