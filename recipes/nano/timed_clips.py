"""Clips of which it is known when what is said, as they are heard: at another tempo, after a silence, in noise.

A row says `"phones": [[name, end_s], ...]` and `"subwords": [[id, end_s], ...]`, either or both. What moves the sound
moves these ends along.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omni.training.data.augmentation import SpeechAugmentation
from omni.training.data.sound import read_speech
from omni.training.data.surroundings import Surroundings, recorded_noise

RATE_HZ = 16_000
TOKEN_S = 0.08
_HELD_OUT = 100  # rows of each manifest, the last ones
_SPEEDS = (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)
_SILENCE_S = ((0.0, 0.5), (0.5, 4.0))  # before and behind: usually, and in one of sixteen clips
_LEAST_SHARE = 0.3  # of the surroundings' probabilities, at the beginning
_PLACES = Surroundings(
    noise=0.55, noise_db=(3.0, 40.0), room=0.3, telephone=0.12, overload=0.04, equaliser=0.4, gain_db=(-60.0, 0.0)
)

Ends = list[tuple[Any, float]]  # names or ids, each with the second in which it ends


class Heard(NamedTuple):
    """Samples fp32 [n] at 16 kHz; what is said in them."""

    samples: Tensor
    phones: Ends
    subwords: Ends
    text: str


class TimedClips:
    """The rows of manifests that say `what` ("phones" or "subwords"), but those that are kept: a hundred of each.

    A manifest is drawn from as often as the root of its rows. kept: the rows that are kept, clean.
    """

    def __init__(self, manifests: Sequence[Path], what: str, noises: Sequence[str] = (), *, kept: bool = False) -> None:
        self.rows: list[list[dict[str, Any]]] = []
        for manifest in manifests:
            lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
            told = [line | {"folder": str(manifest.parent)} for line in lines if what in line]
            held_out = min(_HELD_OUT, len(told) // 2)
            self.rows.append(told[len(told) - held_out :] if kept else told[: len(told) - held_out])
        self.weights = [len(rows) ** 0.5 for rows in self.rows]
        self.places = Surroundings() if kept else replace(_PLACES, noises=recorded_noise(noises) if noises else None)

    def draw(self, rng: random.Random, count: int, hardness: float = 1.0) -> list[Heard]:
        """So many clips, see `heard`."""
        drawn = rng.choices(self.rows, self.weights, k=count)
        return [self.heard(rng.choice(rows), rng, hardness) for rows in drawn]

    def all(self) -> list[Heard]:
        """Every row as it was recorded."""
        return [_clip(row, read(row), 1.0, 0.0) for rows in self.rows for row in rows]

    def heard(self, row: dict[str, Any], rng: random.Random, hardness: float = 1.0) -> Heard:
        """A row somewhere; hardness 0..1: how probable noise, rooms and the like are."""
        share = _LEAST_SHARE + (1 - _LEAST_SHARE) * min(hardness, 1.0)
        odds = {name: share * getattr(self.places, name) for name in ("noise", "room", "telephone", "overload")}
        speed = rng.choice(_SPEEDS)
        samples = SpeechAugmentation([speed]).sound(read(row), RATE_HZ, 0)
        before, behind = (rng.uniform(*_SILENCE_S[rng.random() < 1 / 16]) for _ in range(2))
        samples = F.pad(samples, (int(before * RATE_HZ), int(behind * RATE_HZ)))
        return _clip(row, replace(self.places, **odds)(samples, RATE_HZ, rng), speed, before)


def read(row: dict[str, Any]) -> Tensor:
    """The samples of a row."""
    return read_speech(f"{row['folder']}/{row['audio']}", RATE_HZ)


def _clip(row: dict[str, Any], samples: Tensor, speed: float, later_s: float) -> Heard:
    phones, subwords = ([(name, later_s + end / speed) for name, end in row.get(what, ())] for what in _KINDS)
    return Heard(samples, phones, subwords, row["text"])


_KINDS = ("phones", "subwords")


def token_starts(tokens: int, chunk_s: float, per_chunk: int) -> np.ndarray:
    """The second in which each token of a clip begins, [tokens]. per_chunk: tokens of a chunk of `chunk_s` seconds."""
    number = np.arange(tokens)
    return number // per_chunk * chunk_s + number % per_chunk * TOKEN_S


def said_at(moments: np.ndarray, ends: Ends, otherwise: Any) -> list[Any]:
    """What is said at each of these seconds; `otherwise` behind the last end."""
    names = [name for name, _ in ends] + [otherwise]
    return [names[place] for place in np.searchsorted([end for _, end in ends], moments, side="right")]


def tokens_at(starts: np.ndarray, ends: Ends, late_s: float = 0.04) -> list[int]:
    """Which token says each subword, so that CTC's greedy reading finds all: the one in which it has ended since
    `late_s`, or one beside. A subword that comes twice has a token between; what does not fit into the clip has none.

    starts: the second in which each token of the clip begins.
    """
    wanted = np.searchsorted(starts, [end + late_s for _, end in ends], side="right") - 1
    apart = [2 if label == before else 1 for (label, _), (before, _) in zip(ends[1:], ends)]
    latest, fits = len(starts) - 1, [max(0, int(token)) for token in wanted]
    for place in range(len(fits) - 1, -1, -1):  # all that come behind must fit too
        fits[place] = min(fits[place], latest)
        latest = fits[place] - (apart[place - 1] if place else 0)
    for place in range(1, len(fits)):
        fits[place] = max(fits[place], max(fits[place - 1], 0) + apart[place - 1])
    fits[:1] = [max(0, token) for token in fits[:1]]
    return [token for token in fits if token < len(starts)]


def labels_at(starts: np.ndarray, ends: Ends, blank: int) -> Tensor:
    """Labels of a clip's tokens, int64 [tokens]: its subwords where `tokens_at` has them, `blank` everywhere else."""
    labels = torch.full((len(starts),), blank)
    for token, (label, _) in zip(tokens_at(starts, ends), ends):
        labels[token] = label
    return labels
