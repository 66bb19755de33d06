"""What lies between a speaker and a microphone: rooms, noise, telephones, overload, levels, and silence around speech.

An encoder that has heard clean speech alone takes hiss for words. Everything is drawn from the generator that is given,
so that a seed means one sound. Sources: noise and rooms, Ko et al., 2017, "A study on data augmentation of reverberant
speech for robust speech recognition"; the room is a decaying noise behind the direct sound (Moorer, 1979).
Shapes: n samples, float32 in -1 .. 1, of one channel.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.training.data.mixture import Draw
from omni.training.data.recordings import open_sounds, sounds_of
from omni.training.data.sound import read_speech

_KEPT_NOISES = 256  # in memory, of those that were used last
_FALL = 6.9  # nepers: 60 dB
_TELEPHONE_HZ = 300.0, 3400.0
_EQUALISER_DB = -9.0, 6.0
_SHARES = ("noise", "room", "telephone", "overload", "equaliser")
_SPANS = {"noise_db": (-20.0, 100.0), "room_s": (0.01, 3.0), "gain_db": (-90.0, 0.0), "silence_s": (0.0, 60.0)}

Noise = Callable[[random.Random, int, int], Tensor]


@dataclass(frozen=True)
class Surroundings:
    """What may happen to a recording on its way, each with a probability of its own.

    noise: of a noise out of `noises` (see `recorded_noise`), between `noise_db` of the speech's level above it; white
    noise where there are none. room: of an echo that falls by 60 dB in `room_s` seconds. telephone: of a band of 300 to
    3400 Hz. overload: of a level at which peaks are cut off. equaliser: of a random curve of -9 .. 6 dB. gain_db: the
    level of the highest peak at last, relative to full scale. silence_s: seconds before and behind. Spans are (least,
    most). Raises ValueError for a probability outside 0 .. 1 or a span that is none.
    """

    noise: float = 0.0
    noises: Noise | None = None
    noise_db: tuple[float, float] = (3.0, 40.0)
    room: float = 0.0
    room_s: tuple[float, float] = (0.1, 0.7)
    telephone: float = 0.0
    overload: float = 0.0
    equaliser: float = 0.0
    gain_db: tuple[float, float] | None = None
    silence_s: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in _SHARES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a probability and must lie in 0..1, got {value}")
        for name, (low, high) in _SPANS.items():
            span = getattr(self, name)
            if span is not None and not (len(span) == 2 and low <= span[0] <= span[1] <= high):
                raise ValueError(f"{name} must be (least, most) inside {low:g}..{high:g}, got {list(span)}")

    def __call__(self, samples: Tensor, rate_hz: int, rng: random.Random) -> Tensor:
        """Samples [n] as they arrive: as many, and the silence that was added. Nothing is done to no samples."""
        if not len(samples):
            return samples
        if self.silence_s is not None:
            before, behind = (int(rng.uniform(*self.silence_s) * rate_hz) for _ in range(2))
            samples = torch.nn.functional.pad(samples, (before, behind))
        if rng.random() < self.room:
            samples = in_room(samples, rate_hz, rng.uniform(*self.room_s), _generator(rng))
        if rng.random() < self.equaliser:
            samples = equalised(samples, rng)
        if rng.random() < self.noise:
            noise = (self.noises or white_noise)(rng, len(samples), rate_hz)
            samples = with_noise(samples, noise, rng.uniform(*self.noise_db))
        if rng.random() < self.telephone:
            samples = in_band(samples, rate_hz, *_TELEPHONE_HZ)
        if rng.random() < self.overload:
            highest = float(samples.abs().max()) * rng.uniform(0.15, 0.6)
            samples = samples.clamp(-highest, highest)
        if self.gain_db is not None:
            level = 10 ** (rng.uniform(*self.gain_db) / 20)
            samples = samples * (level / samples.abs().max().clamp(min=1e-6))
        return samples


def in_room(samples: Tensor, rate_hz: int, decay_s: float, generator: torch.Generator) -> Tensor:
    """Samples [n] with a room's echo, which falls by 60 dB in `decay_s`; what it adds behind the end is left off."""
    size = max(1, int(decay_s * rate_hz))
    falling = torch.exp(-_FALL * torch.arange(size) / size)
    echo = torch.randn(size, generator=generator) * falling
    echo *= float(torch.empty(()).uniform_(0.2, 1.0, generator=generator)) / echo.norm()
    echo[0] = 1.0
    length = 1 << (len(samples) + size - 1).bit_length()  # of a transform that is fast
    return torch.fft.irfft(torch.fft.rfft(samples, length) * torch.fft.rfft(echo, length), length)[: len(samples)]


def with_noise(samples: Tensor, noise: Tensor, level_db: float) -> Tensor:
    """Samples [n] and a noise [n], which is `level_db` quieter than where the samples are not silent."""
    power = samples.square()
    heard = power > 1e-4 * power.max()
    speech = power[heard].mean().sqrt() if bool(heard.any()) else samples.new_tensor(1.0)
    return samples + noise * (speech * 10 ** (-level_db / 20) / noise.square().mean().sqrt().clamp(min=1e-6))


def in_band(samples: Tensor, rate_hz: int, low_hz: float, high_hz: float) -> Tensor:
    """Samples [n] between two frequencies, with slopes as of a telephone."""

    def gains(hz: Tensor) -> Tensor:
        return 1 / (1 + (low_hz / hz.clamp(min=1.0)) ** 8) / (1 + (hz / high_hz) ** 12)

    return _filtered(samples, lambda share: gains(share * rate_hz))


def equalised(samples: Tensor, rng: random.Random) -> Tensor:
    """Samples [n] through a curve that bends at five random frequencies."""
    places = [0.0, *sorted(rng.uniform(0.003, 0.5) for _ in range(5)), 0.5]
    heights = [rng.uniform(*_EQUALISER_DB) for _ in places]

    def gains(share: Tensor) -> Tensor:
        right = torch.bucketize(share, torch.tensor(places[1:-1])) + 1
        x, y = torch.tensor(places), torch.tensor(heights)
        part = (share - x[right - 1]) / (x[right] - x[right - 1])
        return 10 ** ((y[right - 1] + part * (y[right] - y[right - 1])) / 20)

    return _filtered(samples, gains)


def _filtered(samples: Tensor, gains: Callable[[Tensor], Tensor]) -> Tensor:
    """Samples [n] with `gains` of each frequency, which is given as a share of the sampling rate."""
    length = 1 << (max(len(samples), 2) - 1).bit_length()
    share = torch.arange(length // 2 + 1) / length
    return torch.fft.irfft(torch.fft.rfft(samples, length) * gains(share), length)[: len(samples)]


def white_noise(rng: random.Random, count: int, rate_hz: int) -> Tensor:
    """Hiss: `count` samples, all frequencies alike."""
    return torch.randn(count, generator=_generator(rng))


def recorded_noise(paths: Sequence[str]) -> Noise:
    """Noises out of manifests or folders of recordings: any of them, from any place on, repeated where it is short.

    Rows that are silent from end to end count as no noise. Raises what `open_sounds` raises.
    """
    manifests = [open_sounds(path) for path in paths]
    rows = [(manifest, index) for manifest in manifests for index in range(len(manifest))]

    @functools.lru_cache(_KEPT_NOISES)
    def read(number: int, rate_hz: int) -> Tensor:
        manifest, index = rows[number]
        sounds = sounds_of(Draw(manifest, index))
        if not sounds:
            raise ValueError(f"{manifest.name(index)} names no recording that could be a noise")
        return read_speech(sounds[0], rate_hz)

    def draw(rng: random.Random, count: int, rate_hz: int) -> Tensor:
        noise = read(rng.randrange(len(rows)), rate_hz)
        start = rng.randrange(len(noise))
        return noise.roll(-start).repeat(-(-count // len(noise)))[:count]

    return draw


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(63))
