"""Which 8 ms of sound are louder than the noise. Finds where speech begins and ends between a detector's frames.

Detectors go on for 50 to 150 ms after speech has ended and notice a weak beginning late; levels are exact, but do not
know speech from other sounds. So levels decide only close to what a detector calls speech. They are compared in four
bands of frequency: a hiss of speech is lost in the hum of a room, but not in the room's own hiss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.layers.state import State

PARTS = 4  # of a frame
PART = 128  # samples at 16 kHz: 8 ms
KEPT_PARTS = 20  # the newest frame and 128 ms before it
_BANDS = (8, 8, 16, 32)  # lines of 125 Hz: to 1, 2, 4 and 8 kHz
_POWER_FLOOR = 1e-10  # silence: -100 dB
_NOISE_FRAMES = 64  # two seconds without speech
_CLEARLY_DB = 6.0  # above the noise: enough by itself
_STEADILY_DB = 2.0  # above the noise for 32 ms, at least
_STEADILY = 3.0  # and so many times what the noise varies by
_BARELY_DB = 1.5  # above the noise in the part itself, at least, where it is so steadily
_BELOW_PEAK_DB = 32.0  # quieter than the loudest part by more than this is no speech, but the room


@dataclass
class Loudness(State):
    """powers [<= 20, bands]: of the last parts of 8 ms; noise [<= 64, bands]: of frames without speech, in dB."""

    powers: Tensor = field(default_factory=lambda: torch.zeros(0, len(_BANDS)))
    noise: Tensor = field(default_factory=lambda: torch.zeros(0, len(_BANDS)))

    def clone(self) -> Loudness:
        """An independent copy. Tensors are replaced, never changed, so both may hold them."""
        return copy.copy(self)

    def add(self, frame: Tensor) -> None:
        """The next frame [512] at 16 kHz."""
        self.powers = torch.cat((self.powers, band_powers(frame)))[-KEPT_PARTS:]

    def add_noise(self) -> None:
        """The newest frame held no speech."""
        self.noise = torch.cat((self.noise, decibels(self.powers[-PARTS:].mean(0))[None]))[-_NOISE_FRAMES:]

    @property
    def newest(self) -> float:
        """Level of the loudest part of the newest frame in dB."""
        return float(decibels(self.powers[-PARTS:].sum(1).max()))

    def loud(self, peak: float) -> list[bool]:
        """Of the kept parts, the newest last: are they speech with that peak level, and louder than the noise?"""
        levels = decibels(self.powers)
        heard: Tensor = decibels(self.powers.sum(1)) >= peak - _BELOW_PEAK_DB
        if len(self.noise):
            noise = self.noise.quantile(torch.tensor([0.5, 0.1]), 0)
            varies = noise[0] - noise[1]
            # The 32 ms around a part: two before it and one behind, as far as they are there.
            means = self.powers.unfold(0, PARTS, 1).mean(2)
            around = torch.cat((means[:1], means[:1], means, means[-1:]))
            steady = decibels(around) - noise[0] >= (_STEADILY * varies).clamp(min=_STEADILY_DB)
            barely = levels - noise[0] >= (2 * varies).clamp(min=_BARELY_DB)
            heard &= ((levels - noise[0] >= _CLEARLY_DB) | (steady & barely)).any(1)
        return heard.tolist()


def band_powers(frame: Tensor) -> Tensor:
    """Powers [4, bands] of a frame's four parts of 8 ms; their sum over the bands is the mean square of the part."""
    lines = torch.fft.rfft(frame.view(PARTS, PART)).abs().square()[:, 1:] * (2 / PART**2)
    return torch.stack([band.sum(1) for band in lines.split(_BANDS, 1)], 1)


def decibels(powers: Tensor) -> Tensor:
    """Powers in dB of full scale, silence at -100."""
    return 10 * (powers + _POWER_FLOOR).log10()
