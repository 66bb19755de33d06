"""The log-mel front end of the audio encoder: 16 kHz samples in, 128 values every 10 ms out.

Framing, power spectrum, mel filters and compression are separate functions: only the last one looks at the whole clip,
so that a streaming caller can run the first three as samples arrive and choose another reference level.
Source: Whisper (Radford et al., 2022), section 2.2; the released `preprocessor_config.json`.
Shapes: n samples, F frames, M mel bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

POWER_FLOOR = 1e-10  # silence, before the logarithm
DYNAMIC_RANGE = 8.0  # log10 units kept below the reference level: 80 dB
_FRAMES_AT_ONCE = 4096  # bounds the memory that a long clip needs

# Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 steps for each factor of 6.4.
_LINEAR_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: float) -> float:
    """A frequency in Hz on Slaney's mel scale."""
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def mel_to_hz(mels: Tensor) -> Tensor:
    """Points on Slaney's mel scale in Hz."""
    return torch.where(
        mels < _BREAK_MEL,
        mels * _LINEAR_HZ_PER_MEL,
        _BREAK_HZ * torch.exp((mels - _BREAK_MEL) * _LOG_STEP),
    )


def mel_filter_bank(num_mels: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters from 0 Hz to half the sample rate, each of area one over Hz: fp32 [M, n_fft / 2 + 1]."""
    bins_hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    corners_hz = mel_to_hz(torch.linspace(0, hz_to_mel(sample_rate / 2), num_mels + 2, dtype=torch.float64))
    left, peak, right = corners_hz[:-2, None], corners_hz[1:-1, None], corners_hz[2:, None]
    triangles = torch.minimum((bins_hz - left) / (peak - left), (right - bins_hz) / (right - peak)).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def frame_signal(samples: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Overlapping frames [F, n_fft] of samples [n]: frame i starts at sample i * hop_length. A view, no copy."""
    return samples.unfold(0, n_fft, hop_length)


def power_spectrum(frames: Tensor, window: Tensor) -> Tensor:
    """Squared magnitudes [F, n_fft / 2 + 1] of windowed frames [F, n_fft]."""
    return torch.fft.rfft(frames * window).abs().square()


def log_power(mel_power: Tensor) -> Tensor:
    """log10 of mel powers, with silence at -10."""
    return mel_power.clamp(min=POWER_FLOOR).log10()


def compress(log_mel: Tensor, level: Tensor) -> Tensor:
    """Cut what lies 80 dB below `level` (the loudest value, log10) and scale to about -1 .. 1."""
    return (torch.maximum(log_mel, level - DYNAMIC_RANGE) + 4.0) / 4.0


class LogMel:
    """Log-mel features of one clip at a time; equals the reference's feature extractor on that clip alone.

    Frames are centred (the clip is mirrored at its ends); n samples give n // hop_length frames.
    """

    def __init__(self, sample_rate: int = 16000, n_fft: int = 400, hop_length: int = 160, num_mels: int = 128) -> None:
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.num_mels = num_mels
        self.window = torch.hann_window(n_fft)
        self.filters = mel_filter_bank(num_mels, n_fft, sample_rate)

    def num_frames(self, samples: int) -> int:
        """Feature frames of a clip of that many samples."""
        return samples // self.hop_length

    def __call__(self, samples: Tensor) -> Tensor:
        """Floating samples [n] in -1 .. 1 at `sample_rate` -> fp32 [num_mels, n // hop_length], on the same device.

        Raises TypeError for integer samples, ValueError for a clip that is not one-dimensional, is shorter than one
        hop, or holds NaN, infinite or absurdly large values.
        """
        samples = self._check(samples)
        edge = self.n_fft // 2
        # Mirroring needs more samples than it adds. A shorter clip is continued with silence, as beside a longer one.
        mirrored = F.pad(samples, (0, max(0, edge + 1 - samples.numel())))
        mirrored = F.pad(mirrored[None], (edge, edge), mode="reflect")[0]
        frames = frame_signal(mirrored, self.n_fft, self.hop_length)[: self.num_frames(samples.numel())]
        log_mel = torch.cat([self.log_mel(part) for part in frames.split(_FRAMES_AT_ONCE)], dim=1)
        level = log_mel.max()
        if not torch.isfinite(level):
            raise ValueError(f"audio samples reach {samples.abs().max():g}; scale them to -1 .. 1")
        return compress(log_mel, level)

    def log_mel(self, frames: Tensor) -> Tensor:
        """log10 mel powers [num_mels, F] of frames [F, n_fft], before any reference level."""
        window, filters = self.window.to(frames.device), self.filters.to(frames.device)
        return log_power(filters @ power_spectrum(frames, window).T.contiguous())

    def _check(self, samples: Tensor) -> Tensor:
        """The samples in fp32, after checking them."""
        if not torch.is_floating_point(samples):
            raise TypeError(
                f"audio samples must be floating point in -1 .. 1, got {samples.dtype}; divide by full scale"
            )
        if samples.dim() != 1:
            raise ValueError(f"audio must be one channel of samples [n], got shape {list(samples.shape)}; mix it down")
        if samples.numel() < self.hop_length:
            raise ValueError(
                f"audio of {samples.numel()} samples is too short; at {self.sample_rate} Hz one feature frame needs "
                f"{self.hop_length} samples ({1000 * self.hop_length / self.sample_rate:g} ms)"
            )
        samples = samples.float()
        if not torch.isfinite(samples).all():
            bad = int((~torch.isfinite(samples)).nonzero()[0])
            raise ValueError(f"audio sample {bad} is {samples[bad].item()}; NaN and infinite samples cannot be encoded")
        return samples
