"""State: everything that changes between calls, as a dataclass of tensors that the caller holds."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")


@dataclasses.dataclass
class State:
    """Base of all states. A clone continues independently; moving casts floating tensors only."""

    def clone(self: S) -> S:
        """An independent copy."""
        return self._map(Tensor.clone)

    def to(self: S, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
        """A copy on another device or with floating tensors in another dtype."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def _map(self: S, change: Any) -> S:
        new = copy.copy(self)
        for f in dataclasses.fields(self):
            setattr(new, f.name, _apply(getattr(self, f.name), change))
        return new


def _apply(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, State):
        return value._map(change)
    if isinstance(value, list):
        return [_apply(item, change) for item in value]
    return value
