"""Items by name, and what several files of items need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from omni import OmniModel

from .models import FAMILIES

ITEMS: dict[str, Callable[[], Any]] = {}


def item(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register an item."""

    def register(compute: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in ITEMS, name
        ITEMS[name] = compute
        return compute

    return register


def each_family(name: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Register an item for each family: `name.family`."""

    def register(compute: Callable[[str], Any]) -> Callable[[str], Any]:
        for family in FAMILIES:
            item(f"{name}.{family}")(lambda family=family: compute(family))  # type: ignore[misc]
        return compute

    return register


def complaint(call: Callable[[], Any]) -> str:
    """What a call raises; "" if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def cut(values: Tensor, pieces: Sequence[int], dim: int = -1) -> list[Tensor]:
    """A signal in pieces of the given sizes, over and over, until it ends."""
    out, start, number = [], 0, 0
    while start < values.shape[dim]:
        size = min(pieces[number % len(pieces)], values.shape[dim] - start)
        out.append(values.narrow(dim, start, size))
        start, number = start + size, number + 1
    return out


def by_key(model: OmniModel, values: dict[str, Any]) -> dict[str, Any]:
    """What belongs to parameters, by their names in the Hub's files."""
    return {model.key_table.to_hub(name): value for name, value in values.items()}
