"""What of the sound at the microphone is only the reply, heard again? Band by band, at an unknown delay and gain.

The loudspeaker's sound reaches the microphone later, weaker and coloured by speaker and room. Levels in bands of
frequency survive that: the microphone's levels follow those of the sent sound at one delay, a constant apart in each
band. What exceeds them is somebody else, and so is sound that does not follow at all (headphones). Nothing is
subtracted, unlike in an echo canceller: sound is only judged, so a delay that wanders by some milliseconds does no
harm.

Steps are compared only while sent sound can be heard, so what was learnt in one reply serves the next.
Shapes: B bands, T steps of 16 ms, D delays.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.encoders.mel import mel_filter_bank
from omni.layers.state import State
from omni.session.voice_activity import SAMPLE_RATE_HZ

HOP = 256  # samples at 16 kHz
BANDS = 16
_WINDOW = 512
_HISTORY = 192  # steps compared: 3 s
_DELAYS = 65  # steps, from none: 1 s of network, buffers and loudspeaker
_DELAY_EVERY = 8  # steps between two estimates of the delay
_FADE = 0.6  # of a band's power from step to step in a room: 60 dB in 0.43 s
_LEAST_STEPS = 40  # of sent sound before anybody else can be told apart from it
_ACTIVE_DB = 15.0  # below its loudest step a band of the sent sound tells nothing of its echo
_GAIN_QUANTILE = 0.4  # of the differences of levels: others who speak only raise them
_NOISE_DB = 4.0  # from the quietest step to the noise's mean
_MARGIN_DB = 6.0  # by which an echo spreads around what is expected
_MOST_DB = 15.0  # what one band can say
_SMOOTHING = 0.4  # share of the newest step
_SPREAD_DB = 4.5  # echoes differ from the sent sound by a constant within 3 dB, other sound by 5 dB and more
_FLOOR = 1e-9  # power of a band; silence
UNEXPLAINED_DB = 0.2  # mean over the bands, from which somebody else is speaking


def _nothing() -> Tensor:
    return torch.zeros(0, BANDS)


@dataclass
class EchoState(State):
    """near [T, B], far [T + D - 1, B]: levels in dB of the microphone and of the sent sound, the latter with the room's
    fade and with the steps before the first of `near`; tail [256]: the newest samples; fade [B]: powers; silent: steps
    since sent sound; steps: compared so far; delay: in steps; excess: what the echo leaves unexplained, in dB."""

    near: Tensor = field(default_factory=_nothing)
    far: Tensor = field(default_factory=lambda: torch.full((_DELAYS - 1, BANDS), 10 * math.log10(_FLOOR)))
    tail: Tensor = field(default_factory=lambda: torch.zeros(_WINDOW - HOP))
    fade: Tensor = field(default_factory=lambda: torch.zeros(BANDS))
    silent: int = _DELAYS
    steps: int = 0
    delay: int = 0
    excess: float = 0.0

    def clone(self) -> EchoState:
        """An independent copy. Tensors are replaced, never changed, so both may hold them."""
        return copy.copy(self)

    def step(self, samples: Tensor, sent: Tensor) -> bool:
        """The next samples at the microphone [256 n] with the powers of the sound sent meanwhile [n, B] -> may they be
        somebody's speech? False where the sent sound explains them, and while too little was sent to tell."""
        near = band_powers(torch.cat((self.tail, samples)))
        self.tail = samples[-(_WINDOW - HOP) :].clone()
        for powers, played in zip(near, sent):
            self.silent = 0 if bool((played > _FLOOR).any()) else self.silent + 1
            if self.silent < _DELAYS:
                self._compare(powers, played)
        return self.silent >= _DELAYS or self.excess >= UNEXPLAINED_DB

    def _compare(self, near: Tensor, sent: Tensor) -> None:
        self.fade = torch.maximum(sent, self.fade * _FADE)
        self.near = torch.cat((self.near, decibels(near)[None]))[-_HISTORY:]
        self.far = torch.cat((self.far, decibels(self.fade)[None]))[-(_HISTORY + _DELAYS - 1) :]
        if self.steps % _DELAY_EVERY == 0:
            self.delay = best_delay(self.near, self.far)
        self.steps += 1
        newest = 0.0 if len(self.near) < _LEAST_STEPS else self._unexplained()
        self.excess += _SMOOTHING * (newest - self.excess)

    def _unexplained(self) -> float:
        """How far the newest step exceeds noise and echo, a mean over the bands in dB."""
        far = self.far[_DELAYS - 1 - self.delay :][: len(self.near)]
        active = (far > far.amax(0) - _ACTIVE_DB) & (far > far.max() - 3 * _ACTIVE_DB)
        apart = torch.where(active, self.near - far, torch.nan)
        gain = apart.nanquantile(_GAIN_QUANTILE, 0).nan_to_num(-100)
        if float((apart - gain).abs().nanmedian()) > _SPREAD_DB:
            return _MOST_DB
        noise = self.near.amin(0) + _NOISE_DB
        expected = decibels(powers_of(far[-1] + gain) + powers_of(noise))
        return float((self.near[-1] - expected - _MARGIN_DB).clamp(0, _MOST_DB).mean())


def best_delay(near: Tensor, far: Tensor) -> int:
    """The delay in steps at which levels near [T, B] follow far [T + D - 1, B] best, by correlation over all bands."""
    delayed = far.unfold(0, len(near), 1).transpose(1, 2)  # [D, T, B], the longest delay first
    delayed = delayed - delayed.mean(1, keepdim=True)
    near = near - near.mean(0)
    alike = (delayed * near).sum((1, 2)) / delayed.square().sum((1, 2)).sqrt().clamp(min=1e-6)
    return len(alike) - 1 - int(alike.argmax())


def band_powers(samples: Tensor) -> Tensor:
    """Samples [256 (T + 1)] at 16 kHz -> powers [T, B] in windows of 32 ms every 16 ms."""
    window, filters = _analysis()
    return torch.fft.rfft(samples.unfold(0, _WINDOW, HOP) * window).abs().square() @ filters


def decibels(powers: Tensor) -> Tensor:
    """Powers in dB, silence at -90."""
    return 10 * (powers + _FLOOR).log10()


def powers_of(levels_db: Tensor) -> Tensor:
    """The reverse of `decibels`."""
    return 10 ** (levels_db / 10)


@functools.lru_cache(maxsize=1)
def _analysis() -> tuple[Tensor, Tensor]:
    """Window [512], of power one, and filters [257, B] on the mel scale."""
    window = torch.hann_window(_WINDOW)
    filters = mel_filter_bank(BANDS, _WINDOW, SAMPLE_RATE_HZ) * (SAMPLE_RATE_HZ / _WINDOW)  # means over bins
    return window / window.square().sum().sqrt(), filters.T.contiguous()
