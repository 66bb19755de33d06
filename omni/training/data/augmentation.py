"""Random changes to recordings that an audio encoder is to hear alike: speed, surroundings, masked bands and moments.

Shapes: n samples; M mel bins, F frames.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from omni.training.data.mixture import random_number
from omni.training.data.surroundings import Surroundings

_HIGHEST_MASK = 27 / 128  # of the mel bins, at most (SpecAugment's F = 27; it has 80 bins, this is gentler)
_LONGEST_MASK = 0.05  # of the frames, at most
_LEAST_SPEED, _MOST_SPEED = 0.5, 2.0


@dataclass(frozen=True)
class SpeechAugmentation:
    """What may happen to a recording, the same each time for one number.

    speeds: factors one of which it is played at, pitch and formants with it (Ko et al., 2015, "Audio augmentation for
    speech recognition"). surroundings: where it is heard, see there. frequency_masks, time_masks: bands of up to 27 of
    128 mel bins, and moments of up to a twentieth of the frames, that are set to the clip's mean (Park et al., 2019,
    "SpecAugment"). Raises ValueError for no speed, one outside 0.5 .. 2, or a negative number of masks.
    """

    speeds: Sequence[float] = (1.0,)
    frequency_masks: int = 0
    time_masks: int = 0
    surroundings: Surroundings = Surroundings()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.speeds or not all(_LEAST_SPEED <= speed <= _MOST_SPEED for speed in self.speeds):
            raise ValueError(f"speeds {list(self.speeds)} must be factors of {_LEAST_SPEED} .. {_MOST_SPEED}")
        for name in ("frequency_masks", "time_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)}")

    def sound(self, samples: Tensor, rate_hz: int, number: int) -> Tensor:
        """Samples fp32 [n] at the speed of `number`, [n / speed] at the same rate, and in its surroundings."""
        speed = self._random(number, 0).choice(list(self.speeds))
        if speed != 1:
            from torchaudio.functional import resample

            step = rate_hz // 20  # speeds count in twentieths: filters of other ratios would be very long
            samples = resample(samples, max(1, round(20 * speed)) * step, 20 * step)
        return self.surroundings(samples, rate_hz, self._random(number, 2))

    def features(self, mel: Tensor, number: int) -> Tensor:
        """Log-mel features [M, F] with the masks of `number`."""
        if not self.frequency_masks and not self.time_masks:
            return mel
        # Not torchaudio's masks: those draw from the global generator, here a number alone decides.
        rng, masked, mean = self._random(number, 1), mel.clone(), mel.mean()
        for axis, count, widest in (
            (0, self.frequency_masks, _HIGHEST_MASK),
            (1, self.time_masks, _LONGEST_MASK),
        ):
            size = mel.shape[axis]
            for _ in range(count):
                width = rng.randint(0, int(widest * size))
                masked.narrow(axis, rng.randint(0, size - width), width).copy_(mean)
        return masked

    def _random(self, number: int, purpose: int) -> random.Random:
        return random.Random(random_number(self.seed, number, purpose))


PLAIN = SpeechAugmentation()
