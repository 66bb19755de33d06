"""The mel that a flow-matching voice decoder is trained on: log amplitudes, as its vocoder reads them.

Hann windows of `n_fft` samples, one every `hop_length`, mirrored by (n_fft - hop_length) / 2 samples at either end, so
that a frame is the middle of its window and n samples give n // hop_length frames; amplitudes (not powers) through
Slaney filters from 0 Hz to half the rate, then the natural logarithm. Source: the front end of BigVGAN (Lee et al.,
2023). The front end of the released Token2Wav is not published: compare with a voice's own `ref_mel` before training it
further.

Shapes: n samples, N frames, M mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.encoders.mel import frame_signal, mel_filter_bank, power_spectrum

AMPLITUDE_FLOOR = 1e-5  # silence, before the logarithm (BigVGAN)
_POWER_FLOOR = 1e-9  # under the square root


class VoiceMel:
    """Samples fp32 [n] at `sample_rate` Hz -> fp32 [N, M]. Raises ValueError for a hop above the window."""

    def __init__(self, mel_dim: int, hop_length: int, sample_rate: int, n_fft: int = 1024) -> None:
        if not 1 <= hop_length <= n_fft or (n_fft - hop_length) % 2:
            raise ValueError(f"a hop of {hop_length} must lie in 1..{n_fft}, the window, and differ by an even number")
        self.mel_dim, self.hop_length, self.sample_rate, self.n_fft = mel_dim, hop_length, sample_rate, n_fft
        self.window = torch.hann_window(n_fft)
        self.filters = mel_filter_bank(mel_dim, n_fft, sample_rate)

    def __call__(self, samples: Tensor) -> Tensor:
        """Raises ValueError for a recording without a whole frame."""
        count = samples.numel() // self.hop_length
        if count < 1:
            raise ValueError(
                f"a recording of {samples.numel()} samples is too short; one frame needs {self.hop_length}"
            )
        edge = (self.n_fft - self.hop_length) // 2
        samples = samples.float()[: count * self.hop_length]
        if edge:
            samples = F.pad(samples, (0, max(0, edge + 1 - samples.numel())))  # mirroring needs more than it adds
            samples = F.pad(samples[None], (edge, edge), mode="reflect")[0]
        frames = frame_signal(samples, self.n_fft, self.hop_length)[:count]
        amplitudes = (power_spectrum(frames, self.window) + _POWER_FLOOR).sqrt()
        return (amplitudes @ self.filters.T).clamp(min=AMPLITUDE_FLOOR).log()
