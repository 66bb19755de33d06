"""State: everything that changes between calls, as a dataclass of tensors that the caller holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")


@dataclasses.dataclass
class State:
    """Base of all states. A clone continues independently; moving casts floating tensors only.

    `row_dims` names the dimension of the batch's rows in each tensor field where that is not the first.
    """

    row_dims: ClassVar[dict[str, int]] = {}

    def clone(self: S) -> S:
        """An independent copy."""
        return self._map(Tensor.clone)

    def note(self: S) -> S:
        """A copy to go back to while this one goes on; what a state only appends to may be shared."""
        return self.clone()

    def to(
        self: S,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool | None = None,
    ) -> S:
        """A copy on another device or with floating tensors in another dtype; itself where nothing would change.

        Hooks that bring a module's arguments to its device (accelerate's) pass `non_blocking`. What they moved would be
        a copy, and what the module then writes into it would be lost to the caller: a state stays as it is.
        """
        changed: list[bool] = []

        def move(t: Tensor) -> Tensor:
            moved = t.to(device=device, dtype=dtype if t.is_floating_point() else None)
            changed.append(moved is not t)
            return moved

        new = self if non_blocking is not None else self._map(move)
        return new if any(changed) else self

    def rows(self: S, start: int, stop: int) -> S:
        """Rows start .. stop - 1 as a state of their own that shares this one's memory (but not its host lists)."""
        new = copy.copy(self)
        for f in dataclasses.fields(self):
            setattr(new, f.name, _rows(getattr(self, f.name), self.row_dims.get(f.name, 0), start, stop))
        return new

    def _map(self: S, change: Callable[[Tensor], Tensor]) -> S:
        new = copy.copy(self)
        for f in dataclasses.fields(self):
            setattr(new, f.name, _apply(getattr(self, f.name), change))
        return new


def _apply(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, State):
        return value._map(change)
    if isinstance(value, list):
        return [_apply(item, change) for item in value]  # a new list, so that clones do not share it
    return value


def _rows(value: Any, dim: int, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value.narrow(dim, start, stop - start)
    if isinstance(value, State):
        return value.rows(start, stop)
    if isinstance(value, list) and value and isinstance(value[0], (Tensor, State)):  # one item a layer
        return [_rows(item, dim, start, stop) for item in value]
    return value[start:stop] if isinstance(value, list) else value  # other lists: one item a row


def join_rows(states: Sequence[S]) -> S:
    """One state whose rows are those of all the states, which must agree in everything that is not a tensor.

    Raises ValueError where they do not.
    """
    first = states[0]
    new = copy.copy(first)
    for f in dataclasses.fields(first):
        values = [getattr(state, f.name) for state in states]
        setattr(new, f.name, _join(values, first.row_dims.get(f.name, 0)))
    return new


def _join(values: list[Any], dim: int) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values, dim)
    if isinstance(values[0], State):
        return join_rows(values)
    if isinstance(values[0], list):
        if values[0] and not isinstance(values[0][0], (Tensor, State)):  # one item a row
            return [item for value in values for item in value]
        return [_join(list(items), dim) for items in zip(*values)]  # one item a layer
    for value in values:
        if value != values[0]:
            raise ValueError(
                f"states that are not at the same point cannot be joined: one has {value!r} where another has "
                f"{values[0]!r}; join those that have taken the same steps"
            )
    return values[0]


def split_rows(state: S, rows: int) -> list[S]:
    """The reverse of `join_rows` for `rows` states of one row each."""
    parts = [copy.copy(state) for _ in range(rows)]
    for f in dataclasses.fields(state):
        pieces = _split(getattr(state, f.name), state.row_dims.get(f.name, 0), rows)
        for part, piece in zip(parts, pieces):
            setattr(part, f.name, piece)
    return parts


def _split(value: Any, dim: int, rows: int) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.split(1, dim))
    if isinstance(value, State):
        return split_rows(value, rows)
    if isinstance(value, list) and value and not isinstance(value[0], (Tensor, State)):
        return [[item] for item in value]
    if isinstance(value, list):
        columns = [_split(item, dim, rows) for item in value]
        return [[column[row] for column in columns] for row in range(rows)]
    return [value] * rows
