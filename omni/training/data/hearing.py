"""In which chunks and attention windows an audio encoder hears what it learns from.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni.encoders.contract import chosen_cuts
from omni.training.data.mixture import random_number


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
        rng = random.Random(random_number(self.seed, number, 3))  # 0 to 2 are SpeechAugmentation's
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
