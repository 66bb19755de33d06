"""The log-mel front end: framing, filters, reference level and bad input (parity is tested elsewhere)."""

import math

import pytest
import torch
from torch import Tensor

from omni.encoders.mel import (
    LogMel,
    compress,
    frame_signal,
    hz_to_mel,
    log_power,
    mel_filter_bank,
    mel_to_hz,
    power_spectrum,
    running_level,
)


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel()


def assert_same_sound(a: Tensor, b: Tensor) -> None:
    """Equal amplitudes: the roundings of a spectrum are relative to its loudest part, so faint bands may differ more.

    Each of the 9 stages of a transform of 400 samples rounds to 6e-8, as do window, square, filters and logarithm.
    """
    a, b = (10 ** (2 * x.double()) for x in (a, b))
    torch.testing.assert_close(a, b, atol=15 * 6e-8 * float(b.max()), rtol=0)


@pytest.mark.parametrize("samples", [160, 161, 200, 201, 319, 320, 1000, 15999, 16000, 16001])
def test_a_frame_for_each_whole_hop(log_mel: LogMel, samples: int) -> None:
    features = log_mel(torch.randn(samples))
    assert features.shape == (128, samples // 160) and features.dtype == torch.float32
    assert features.shape[1] == log_mel.num_frames(samples)
    assert torch.isfinite(features).all()


def test_mel_scale_is_linear_below_1_khz_and_inverts() -> None:
    assert hz_to_mel(500) == pytest.approx(7.5) and hz_to_mel(1000) == pytest.approx(15)
    assert hz_to_mel(6400) == pytest.approx(15 + 27)
    hz = torch.tensor([0.0, 440.0, 1000.0, 3000.0, 8000.0], dtype=torch.float64)
    mels = torch.tensor([hz_to_mel(float(f)) for f in hz], dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(mels), hz)


def test_filters_have_area_one() -> None:
    filters = mel_filter_bank(num_mels=20, n_fft=2048, sample_rate=16000)
    area = filters.sum(1) * (8000 / 1024)  # Hz per bin
    torch.testing.assert_close(area, torch.ones(20), atol=0.02, rtol=0)


@pytest.mark.parametrize("hz", [200, 1000, 3500, 7000])
def test_a_sine_is_loudest_in_its_own_band(log_mel: LogMel, hz: int) -> None:
    features = log_mel(torch.sin(2 * math.pi * hz * torch.arange(8000) / 16000))
    loudest = features[:, 10:-10].mean(1).argmax()
    corners_hz = mel_to_hz(torch.linspace(0, hz_to_mel(8000), 130, dtype=torch.float64))
    assert corners_hz[loudest] - 40 <= hz <= corners_hz[loudest + 2] + 40  # one FFT bin of 40 Hz on either side


def test_range_is_80_db_below_the_loudest_value(log_mel: LogMel) -> None:
    samples = torch.cat((torch.randn(4000), torch.zeros(4000)))
    features = log_mel(samples)
    assert features.max() - features.min() == pytest.approx(8 / 4)
    assert log_mel(torch.zeros(1600)).unique().tolist() == pytest.approx([(-10 + 4) / 4])


def test_gain_only_shifts(log_mel: LogMel) -> None:
    """A gain of 16 passes through framing, spectrum and filters without a rounding of its own; then log10 has one."""
    samples = torch.randn(3200)
    shift = 2 * math.log10(16) / 4
    # Logarithms lie below 8, where a unit in the last place is 4.8e-7: those of both sides, and the sums, over 4.
    torch.testing.assert_close(log_mel(16 * samples), log_mel(samples) + shift, atol=4 * 4.8e-7 / 4, rtol=0)


def test_pieces_of_a_clip_give_the_inner_frames_of_the_whole(log_mel: LogMel) -> None:
    """Framing, spectrum and filters do not look at the clip; only the reference level does."""
    samples = torch.randn(3200)
    part = frame_signal(samples[800:2400], 400, 160)
    logs = log_mel.log_mel(part)
    assert torch.equal(logs, log_power(log_mel.filters @ power_spectrum(part, log_mel.window).T.contiguous()))
    whole = log_mel(samples)
    level = whole.max() * 4 - 4
    # Frame i of the clip is centred at 160 i, so the one that starts at sample 800 is centred at 1000: between two.
    aligned = log_mel.log_mel(frame_signal(samples[760:2400], 400, 160))
    assert_same_sound(compress(aligned, level), whole[:, 6 : 6 + aligned.shape[1]])


def test_long_clips_in_pieces(log_mel: LogMel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(16000)
    whole = log_mel(samples)
    monkeypatch.setattr("omni.encoders.mel._FRAMES_AT_ONCE", 7)
    assert_same_sound(log_mel(samples), whole)


def test_a_clip_too_short_to_mirror_goes_on_in_silence(log_mel: LogMel) -> None:
    samples = torch.randn(170)
    padded = torch.nn.functional.pad(samples, (0, 150))
    torch.testing.assert_close(log_mel(samples), log_mel(padded)[:, :1], atol=0.5, rtol=0)  # but for the level
    assert torch.isfinite(log_mel(samples)).all()


def test_double_precision_input(log_mel: LogMel) -> None:
    samples = torch.randn(1000)
    assert torch.equal(log_mel(samples.double()), log_mel(samples))


@pytest.mark.parametrize("samples", [160, 5000, 16000, 16159])
def test_both_levels_agree_within_one_chunk(log_mel: LogMel, samples: int) -> None:
    clip = torch.randn(samples) * torch.linspace(1e-6, 1, samples)
    assert torch.equal(log_mel(clip, "causal"), log_mel(clip))


def test_running_level() -> None:
    values = torch.tensor([[1.0, 5, 2, 3, 3, 0, 6], [0, 0, 0, 4, 0, 0, 0]])
    assert running_level(values, 2).tolist() == [5, 5, 5, 5, 5, 5, 6]
    assert running_level(values, 3).tolist() == [5, 5, 5, 5, 5, 5, 6]
    assert running_level(values.flip(1), 3).tolist() == [6, 6, 6, 6, 6, 6, 6]
    assert running_level(values, 1).tolist() == [1, 5, 5, 5, 5, 5, 6]
    assert running_level(values, 100).tolist() == [6] * 7


def test_no_frames(log_mel: LogMel) -> None:
    assert log_mel.log_mel(torch.zeros(0, 400)).shape == (128, 0)


def test_settings_that_cannot_be(log_mel: LogMel) -> None:
    with pytest.raises(ValueError, match="'loud' is not one of 'clip', 'causal'"):
        log_mel(torch.randn(400), "loud")
    with pytest.raises(ValueError, match="chunk of 0 frames"):
        LogMel(chunk_frames=0)
    wide = LogMel(n_fft=400, hop_length=200)
    assert wide(torch.randn(1000)).shape == (128, 5)
    with pytest.raises(ValueError, match="hop of 200 samples cannot be streamed; it must be below 200"):
        wide.init_state()


@pytest.mark.parametrize(
    ("samples", "error", "words"),
    [
        (torch.zeros(0), ValueError, "0 samples is too short"),
        (torch.zeros(159), ValueError, "needs 160 samples"),
        (torch.zeros(2, 400), ValueError, "one channel"),
        (torch.zeros(400, dtype=torch.int16), TypeError, "int16"),
        (torch.tensor([0.0] * 300 + [float("nan")] * 100), ValueError, "sample 300 is nan"),
        (torch.tensor([0.0] * 399 + [float("-inf")]), ValueError, "sample 399 is -inf"),
        (torch.full((400,), 1e25), ValueError, "reach 1e\\+25"),
    ],
)
def test_bad_input(log_mel: LogMel, samples: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        log_mel(samples)
