"""What of speech tells where its words are: how loud and how bright it is, and which kind of sound that probably is."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from omni.generation.spoken_words import ANY, FRICATIVE, SILENCE, SONORANT, STOP, VOWEL

HOP_MS = 10.0
_QUIETEST_DB = -90.0
_LOUDEST_DB = -35.0  # of full scale: speech is at least so loud
_FORGETS_DB = 0.02  # in a hop: the loudest so far is forgotten slowly
_LOWEST_HZ = 50.0
_BRIGHTEST = 12.2  # log2 Hz, of an s: voices that are recorded up to higher frequencies are no brighter
_WEIGHT = 0.22  # of a hop's marks: hops are not independent of each other
_NEVER = 1e-6

# kind -> how often so, decibels below the loudest so far and their deviation, brightness in log2 Hz and its deviation:
# from the running speech of flite's voices kal16, rms and awb, whose sounds are known (185 sentences).
_KINDS = {
    VOWEL: ((1.0, -4.0, 4.5, 9.0, 0.55),),
    SONORANT: ((0.8, -6.0, 5.0, 8.5, 0.5), (0.2, -15.0, 7.0, 8.3, 0.8)),
    FRICATIVE: ((0.7, -15.0, 6.5, 11.7, 0.6), (0.3, -20.0, 9.0, 10.0, 1.2)),
    STOP: ((0.6, -32.0, 9.0, 9.2, 1.2), (0.4, -18.0, 8.0, 10.8, 1.3)),
    SILENCE: ((1.0, -48.0, 11.0, 10.2, 1.2),),
}


class SpeechMarks:
    """The marks of sound that comes in pieces of any size.

    waiting: of each hop that has not been taken yet, how well each kind of sound fits it [6], the best one 1.
    """

    def __init__(self) -> None:
        self.waiting: deque[list[float]] = deque()
        self._rest = np.zeros(0)
        self._before = 0.0  # the last sample of the hop before
        self._loudest = _LOUDEST_DB

    def hear(self, samples: NDArray[np.float32], sample_rate: int) -> None:
        """More samples [n] in -1 .. 1."""
        size = max(1, round(sample_rate * HOP_MS / 1000))
        wave = np.concatenate((self._rest, np.nan_to_num(samples.astype(np.float64))))
        hops = len(wave) // size
        wave, self._rest = wave[: hops * size], wave[hops * size :]
        if not hops:
            return
        steps = np.diff(wave, prepend=self._before).reshape(hops, size)
        self._before = wave[-1]
        power = (wave.reshape(hops, size) ** 2).mean(1) + 10 ** (_QUIETEST_DB / 10)
        # A sine of frequency f has steps of 2 sin(pi f / rate) times its own size.
        angle = np.arcsin(np.minimum(1.0, np.sqrt((steps**2).mean(1) / power) / 2))
        brightness = np.minimum(np.log2(sample_rate / math.pi * angle + _LOWEST_HZ), _BRIGHTEST)
        level = 10 * np.log10(power)
        for i in range(hops):
            self._loudest = max(level[i], self._loudest - _FORGETS_DB)
            level[i] -= self._loudest
        self.waiting.extend(_likely(level, brightness).tolist())


def _likely(level: NDArray[np.float64], brightness: NDArray[np.float64]) -> NDArray[np.float64]:
    """How well each kind fits: level and brightness [T] -> [T, 6]."""
    fits = np.zeros((len(level), 6))
    for kind, parts in _KINDS.items():
        for share, loud, loud_deviation, bright, bright_deviation in parts:
            away = ((level - loud) / loud_deviation) ** 2 + ((brightness - bright) / bright_deviation) ** 2
            fits[:, kind] += share / (loud_deviation * bright_deviation) * np.exp(-away / 2)
    fits[:, ANY] = fits[:, [VOWEL, SONORANT, FRICATIVE, STOP]].mean(1)
    fits = (fits + _NEVER) ** _WEIGHT
    return fits / fits.max(1, keepdims=True)
