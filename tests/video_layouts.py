"""Random videos with sound, and rules that lay them out."""

from __future__ import annotations

import random

from omni.config.positions import PositionRule
from omni.rope.positions import Audio, AudioVideo, Video

FAMILIES = (PositionRule(13.0), PositionRule(25.0, whole=True, chunk_s=2.0, joint_marks=True))


def random_rule(rng: random.Random) -> PositionRule:
    """A family's rule, or one that no family has."""
    if rng.random() < 0.3:
        return rng.choice(FAMILIES)
    rate = rng.choice((2.0, 12.5, 13.0, 25.0, 1 / 3, rng.uniform(0.1, 60)))
    chunk_s = rng.choice((None, 2.0, 0.5, 0.01, rng.uniform(0.05, 4)))
    return PositionRule(rate, rng.random() < 0.5, chunk_s, rng.random() < 0.5)


def random_layout(rng: random.Random) -> AudioVideo:
    """A video with odd gaps between its grid steps, and a sound that ends before it, after it or never begins."""
    step, times = rng.choice((0.04, 0.1, 1 / 3, 0.5, 1.0, 2.0)), [rng.choice((0.0, 0.0, rng.uniform(0, 5)))]
    for _ in range(rng.randint(0, 9)):
        times.append(times[-1] + step + rng.choice((0.0, 0.0, 0.0, 1.7, 5.3, rng.random())))
    video = Video(tuple(times), rng.randint(1, 4), rng.randint(1, 4))
    return AudioVideo(video, Audio(rng.choice((0, rng.randint(0, 5), rng.randint(0, 150)))))
