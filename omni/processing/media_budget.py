"""What reading one medium may cost, counted while it is decoded: a file of some kB can unpack to many GB."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any


def as_number(value: Any) -> float:
    """A real number as a float, infinity where it is too large for one; NaN for anything else, and for truth values."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


class RefusedError(ValueError):
    """A medium is refused for what decoding found in it; told apart from what decoders raise."""


@dataclass(frozen=True)
class MediaBudget:
    """Limits of one medium; beyond one of them reading ends with a ValueError that names it.

    Args:
        seconds: of sound that is kept (None: 5400, what the released models' positions hold).
        samples: of sound that is decoded, all channels counted.
        pixels: of one picture or frame as it is stored (None: 100 million).
        film_pixels: pixels x frames of a film that are decoded; seeking decodes few frames of a long film.
        kept_bytes: of samples, or of frames at the size that the model sees.
    """

    seconds: float | None = None
    samples: float = 2**32
    pixels: int | None = None
    film_pixels: float = 4e12
    kept_bytes: float = 2**32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not as_number(value) > 0:
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")

    def check(self, limit: str, amount: float, name: str, what: str, remedy: str = "give a part of it") -> None:
        """Raise RefusedError where `amount` exceeds the limit of that name. `what` words it, `name` is the medium."""
        most = getattr(self, limit)
        if most is not None and amount > most:
            raise RefusedError(f"{name} {what} than the limit of {most:,.0f}; {remedy}, or MediaBudget({limit}=…)")


DEFAULT_BUDGET = MediaBudget()
