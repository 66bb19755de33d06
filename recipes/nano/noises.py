"""What is heard where nobody speaks: hiss, hum, music, knocks, other people, silence.

Sounds are float32 [n] at 16 kHz with a standard deviation of 1, but for silence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from speakers import RATE_HZ

_SCALE = (0, 2, 4, 5, 7, 9, 11, 12)  # semitones of a major scale
KINDS = ("hiss", "hiss", "hum", "music", "music", "knocks")


def hiss(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls or rises with the frequency: of a fan, of rain, of an amplifier."""
    length = 1 << (max(count, 2) - 1).bit_length()
    hz = np.arange(length // 2 + 1) / length * RATE_HZ
    slope = rng.choice((0.0, 0.0, -0.5, -1.0, 0.4))
    spectrum = rng.standard_normal((2, len(hz))) * (np.maximum(hz, 30) / 1000) ** slope
    return _normal(np.fft.irfft(spectrum[0] + 1j * spectrum[1], length)[:count])


def hum(count: int, rng: np.random.Generator) -> np.ndarray:
    """Mains, with overtones and a little hiss."""
    seconds = np.arange(count) / RATE_HZ
    base, fall = rng.choice((50, 60)) * rng.uniform(0.99, 1.01), rng.uniform(0.3, 1.5)
    tones = [np.sin(2 * np.pi * base * k * seconds + rng.uniform(0, 6.3)) / k**fall for k in range(1, 12)]
    return _normal(_normal(np.sum(tones, axis=0)) + rng.uniform(0.02, 0.3) * hiss(count, rng))


def music(count: int, rng: np.random.Generator) -> np.ndarray:
    """Chords and tunes of plucked or held tones."""
    out = np.zeros(count)
    beat, root, fall = int(RATE_HZ * rng.uniform(0.12, 0.6)), 110 * 2 ** rng.uniform(0, 2), rng.uniform(0.7, 8)
    overtones, slope = rng.integers(2, 9), rng.uniform(0.8, 2)
    for start in range(0, count, beat):
        seconds = np.arange(min(beat * rng.integers(1, 5), count - start)) / RATE_HZ
        envelope = np.exp(-seconds * fall) * np.minimum(1, seconds / 0.008)
        for _ in range(rng.integers(1, 4)):
            hz = root * 2 ** (rng.choice(_SCALE) / 12) * rng.choice((0.5, 1, 1, 2))
            tones = [np.sin(2 * np.pi * hz * k * seconds) / k**slope for k in range(1, overtones) if hz * k < 7600]
            if tones:
                out[start : start + len(seconds)] += envelope * np.sum(tones, axis=0)
    return _normal(out)


def knocks(count: int, rng: np.random.Generator) -> np.ndarray:
    """Steps, keys, a door: short bursts above a little hiss."""
    out = 0.03 * hiss(count, rng)
    for _ in range(rng.integers(1, 3 + 4 * count // RATE_HZ)):
        size = int(rng.uniform(0.01, 0.3) * RATE_HZ)
        burst = hiss(size, rng) * np.exp(-np.arange(size) / size * rng.uniform(2, 8)) * rng.uniform(0.2, 1)
        start = rng.integers(0, max(1, count - size))
        out[start : start + size] += burst[: count - start]
    return _normal(out)


def babble(count: int, rng: np.random.Generator, voices: Callable[[], np.ndarray]) -> np.ndarray:
    """Several people who speak at once; voices: some of what one of them says."""
    out = np.zeros(count)
    for _ in range(rng.integers(3, 8)):
        start = -int(rng.integers(0, RATE_HZ))
        while start < count:
            said = _normal(voices()) * rng.uniform(0.4, 1)
            first, last = max(start, 0), min(start + len(said), count)
            if first < last:
                out[first:last] += said[first - start : last - start]
            start += len(said) + int(rng.uniform(0, 0.5) * RATE_HZ)
    return _normal(out)


def make(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """A sound of one of `KINDS`, or "silence"."""
    if kind == "silence":
        return np.zeros(count, np.float32)
    makers = {"hiss": hiss, "hum": hum, "music": music, "knocks": knocks}
    return makers[kind](count, rng)


def _normal(samples: np.ndarray) -> np.ndarray:
    return (samples / max(float(samples.std()), 1e-6)).astype(np.float32)
