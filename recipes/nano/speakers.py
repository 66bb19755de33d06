"""Many speakers out of few voices: styles mixed, pitch and the length of the vocal tract changed.

A speaker is an engine's voice with a size: played faster, pitch and formants rise together as of a smaller person, and
its formants alone are moved after that. The engine speaks so much slower that the tempo stays. What it says once is
what it says each time. Sounds are float32 [n] in -1 .. 1 at 16 kHz.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from engines import ACCENTS, FESTIVAL, FLITE, STYLES, VARIANTS, Manner, Spoken
from voices import to_rate

RATE_HZ = 16_000
SHARES = {"kokoro": 0.35, "heart": 0.25, "flite": 0.15, "espeak": 0.1, "festival": 0.15}  # of the speakers
COUNT = 400
_SIZE = {"kokoro": 0.07}  # standard deviation of the logarithm; other engines have fewer voices of their own
_USUAL_SIZE = 0.11
_LEAST, _MOST = 0.76, 1.3
_WINDOW, _HOP = 512, 128
_ENVELOPE = 26  # cepstral coefficients: coarse enough to leave the harmonics of a high voice out
_QUIET = 0.012  # of the highest peak
_EDGE_S = 0.03


@dataclass(frozen=True)
class Speaker:
    """engine and its manner; size: factor of pitch and formants; tract: factor of the formants alone."""

    engine: str
    manner: Manner
    size: float = 1.0
    tract: float = 1.0


def draw_speaker(rng: random.Random, engine: str) -> Speaker:
    """Anyone whom an engine can play."""
    size = min(max(rng.lognormvariate(0, _SIZE.get(engine, _USUAL_SIZE)), _LEAST), _MOST)
    tract = rng.uniform(0.88, 1.14) if rng.random() < 0.6 else 1.0
    manner = Manner(speed=rng.uniform(0.9, 1.15), pitch=rng.uniform(0.6, 1.6))
    if engine == "kokoro":
        manner = replace(manner, timbre=_shares(rng), melody=_shares(rng))
    elif engine == "flite":
        manner = replace(manner, voice=rng.choice(FLITE))
    elif engine == "festival":
        manner = replace(manner, voice=rng.choice(FESTIVAL))
    elif engine == "espeak":
        manner = replace(manner, voice=f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS)}")
    return Speaker(engine, manner, size, tract)


def _shares(rng: random.Random) -> tuple[float, ...]:
    """Shares of the styles: mostly of one or two, and up to a quarter beyond them, away from the mean."""
    drawn = [rng.gammavariate(0.45, 1) + 1e-6 for _ in range(STYLES)]
    beyond = rng.uniform(0.9, 1.25)
    return tuple(beyond * part / sum(drawn) + (1 - beyond) / STYLES for part in drawn)


def all_speakers(count: int = COUNT) -> list[Speaker]:
    """The speakers of the training data, always the same ones, engines in the order of `SHARES`."""
    return [
        draw_speaker(random.Random(f"{engine} {number}"), engine)
        for engine, share in SHARES.items()
        for number in range(round(share * count))
    ]


def say(
    engines: Mapping[str, Callable[[str, Manner], Spoken]], text: str, speaker: Speaker, tempo: float = 1.0
) -> Spoken:
    """What a speaker makes of a text at a tempo, at 16 kHz, without the silence around it, its highest peak at 0.6;
    empty where the engine says nothing."""
    manner = replace(speaker.manner, speed=speaker.manner.speed * tempo / speaker.size)
    samples, rate_hz, phones = Spoken(*engines[speaker.engine](text, manner))
    samples = to_rate(np.ascontiguousarray(samples, dtype=np.float32), round(rate_hz * speaker.size), RATE_HZ)
    samples = move_formants(samples, speaker.tract)
    start, end = heard_between(samples)
    moved = tuple((name, second / speaker.size - start / RATE_HZ) for name, second in phones)
    samples = samples[start:end]
    highest = float(np.abs(samples).max(initial=0.0))
    if highest <= 1e-4:
        return Spoken(samples[:0], RATE_HZ)
    return Spoken(samples * (0.6 / highest), RATE_HZ, moved)


def heard_between(samples: np.ndarray, rate_hz: int = RATE_HZ) -> tuple[int, int]:
    """From where to where something is heard, and a moment around."""
    loud = np.flatnonzero(np.abs(samples) > _QUIET * np.abs(samples).max(initial=0.0))
    edge = int(_EDGE_S * rate_hz)
    return (max(0, int(loud[0]) - edge), int(loud[-1]) + edge) if len(loud) else (0, 0)


def move_formants(samples: np.ndarray, factor: float) -> np.ndarray:
    """Samples [n] whose spectral envelope is stretched by a factor along the frequencies; the pitch stays.

    The envelope is the smooth part of each spectrum's cepstrum (Oppenheim and Schafer, 1975).
    """
    if factor == 1 or len(samples) < _WINDOW:
        return samples
    count = (len(samples) + _WINDOW) // _HOP + 1
    padded = np.pad(samples, (_WINDOW, count * _HOP - len(samples)))
    window = np.sin(np.pi * (np.arange(_WINDOW) + 0.5) / _WINDOW).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP] * window
    spectra = np.fft.rfft(frames, axis=1)
    cepstra = np.fft.irfft(np.log(np.abs(spectra) + 1e-5), axis=1)
    cepstra[:, _ENVELOPE : 1 - _ENVELOPE] = 0
    envelopes = np.fft.rfft(cepstra, axis=1).real
    places = np.arange(envelopes.shape[1]) / factor
    left = np.minimum(places.astype(int), envelopes.shape[1] - 2)
    part = np.minimum(places - left, 1.0)
    moved = envelopes[:, left] * (1 - part) + envelopes[:, left + 1] * part
    changed = np.fft.irfft(spectra * np.exp(np.clip(moved - envelopes, -4, 4)), axis=1) * window
    out = np.zeros(len(padded))
    for number, frame in enumerate(changed):
        out[number * _HOP : number * _HOP + _WINDOW] += frame
    out *= 2 * _HOP / _WINDOW  # the squared windows of four neighbours add up to two
    return out[_WINDOW : _WINDOW + len(samples)].astype(np.float32)
