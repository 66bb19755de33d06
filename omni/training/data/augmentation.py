"""What is drawn so that an audio encoder hears alike: another speed, masked bands and moments, chunk and window.

Shapes: n samples; M mel bins, F frames.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omni.encoders.contract import chosen_cuts
from omni.training.data.mixture import random_number

_HIGHEST_MASK = 27 / 128  # of the mel bins, at most (SpecAugment's F = 27; it has 80 bins, this is gentler)
_LONGEST_MASK = 0.05  # of the frames, at most
_LEAST_SPEED, _MOST_SPEED = 0.5, 2.0


@dataclass(frozen=True)
class SpeechAugmentation:
    """What may happen to a recording, the same each time for one number.

    speeds: factors one of which it is played at, pitch and formants with it (Ko et al., 2015, "Audio augmentation for
    speech recognition"). frequency_masks, time_masks: bands of up to 27 of 128 mel bins, and moments of up to a
    twentieth of the frames, that are set to the clip's mean (Park et al., 2019, "SpecAugment"). Raises ValueError for
    no speed, one outside 0.5 .. 2, or a negative number of masks.
    """

    speeds: Sequence[float] = (1.0,)
    frequency_masks: int = 0
    time_masks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.speeds or not all(_LEAST_SPEED <= speed <= _MOST_SPEED for speed in self.speeds):
            raise ValueError(f"speeds {list(self.speeds)} must be factors of {_LEAST_SPEED} .. {_MOST_SPEED}")
        for name in ("frequency_masks", "time_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)}")

    def sound(self, samples: Tensor, rate_hz: int, number: int) -> Tensor:
        """Samples fp32 [n] at the speed of `number`: [n / speed] at the same rate."""
        speed = self._random(number, 0).choice(list(self.speeds))
        if speed == 1:
            return samples
        from torchaudio.functional import resample

        step = rate_hz // 20  # speeds count in twentieths: filters of other ratios would be very long
        return resample(samples, max(1, round(20 * speed)) * step, 20 * step)

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


@dataclass(frozen=True)
class HearingDraws:
    """In which chunks and attention windows an audio encoder hears, the same each time for one number.

    chunks_s: seconds of chunks of which one is drawn (none: the checkpoint's, and nothing is drawn). windows_s: the
    least and the most seconds of the window, which is a whole number of the drawn chunk, any such number as likely as
    another (None: the checkpoint's window). Number 0, of what is held out, is the first chunk with its longest window.
    Raises ValueError for windows without chunks, and where no number of a chunk lies between least and most.
    """

    chunks_s: Sequence[float] = ()
    windows_s: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.windows_s is not None and not self.chunks_s:
            raise ValueError(
                f"windows of {list(self.windows_s)} s are whole numbers of a chunk; name the chunks too, for example "
                "data.audio_chunks_s = [1.0]"
            )
        for chunk_s in self.chunks_s if self.windows_s is not None else ():
            least, most = self._counts(chunk_s)
            if least > most:
                raise ValueError(
                    f"no window of {list(self.windows_s or ())} s, least and most, is a whole number of chunks of "
                    f"{chunk_s:g} s; widen data.audio_windows_s"
                )

    def of(self, number: int) -> dict[str, Any]:
        """`audio_chunk_s` and `audio_window_s` of a number, as far as they are drawn."""
        if not self.chunks_s:
            return {}
        rng = random.Random(random_number(self.seed, number, 2))  # 0 and 1 are the augmentation's
        chunk_s = rng.choice(list(self.chunks_s)) if number else self.chunks_s[0]
        if self.windows_s is None:
            return {"audio_chunk_s": chunk_s}
        least, most = self._counts(chunk_s)
        return {"audio_chunk_s": chunk_s, "audio_window_s": (rng.randint(least, most) if number else most) * chunk_s}

    def check(self, encoder: Any) -> None:
        """Raise ValueError for a chunk or a window that the encoder cannot have."""
        for chunk_s in self.chunks_s:
            window_s = None if self.windows_s is None else self._counts(chunk_s)[1] * chunk_s
            chosen_cuts(encoder, chunk_s, window_s)

    def fewest_tokens(self, encoder: Any, frames: int) -> int:
        """Tokens of a clip of so many mel frames, in the chunk that gives the fewest."""
        chunks = [chosen_cuts(encoder, chunk_s, None) for chunk_s in self.chunks_s] or [{}]
        return min(encoder.num_tokens(frames, **chunk) for chunk in chunks)

    def _counts(self, chunk_s: float) -> tuple[int, int]:
        """The fewest and the most chunks of a window."""
        assert self.windows_s is not None
        least, most = (seconds / chunk_s for seconds in self.windows_s)
        return max(1, math.ceil(least - 1e-6)), math.floor(most + 1e-6)


AS_RELEASED = HearingDraws()
