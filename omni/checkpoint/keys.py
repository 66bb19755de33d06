"""How tensors are named: a family's table, between this library's modules and the Hub's files, in both directions.

Shapes: E experts, I expert width, D model width. A file holds three matrices an expert, the model two stacked
parameters a layer: gate_up_proj [E, 2I, D] (gate rows first) and down_proj [E, D, I].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from omni.config.family import Family, KeyNames

Piece = Literal["whole", "gate", "up", "down"]
_EXPERT_KEY = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Slot:
    """Where a file's tensor belongs: all of the parameter `name`, or one expert's piece of a stacked parameter."""

    name: str
    expert: int = 0
    piece: Piece = "whole"

    def of(self, stacked: Tensor) -> Tensor:
        """The view of the parameter that this slot covers; IndexError if there is no such expert."""
        if self.piece == "whole":
            return stacked
        matrix = stacked[self.expert]
        if self.piece == "down":
            return matrix
        half = matrix.shape[0] // 2
        return matrix[:half] if self.piece == "gate" else matrix[half:]


class KeyTable(KeyNames):
    """The names of one family's weights, and the way from either side to the other."""

    @classmethod
    def of(cls, family: Family) -> KeyTable:
        """The table of a family."""
        return cls(**vars(family.keys))

    def from_hub(self, key: str) -> str | None:
        """Our name of a file's key (an expert's matrix keeps its index), None for a key of no known prefix."""
        match = max(
            (pair for pair in (*self.renames, *self.also_read) if key.startswith(pair[1])),
            key=lambda pair: len(pair[1]),
            default=None,
        )
        return match[0] + key[len(match[1]) :] if match else None

    def for_files(self, keys: Iterable[str]) -> KeyTable:
        """The table for the keys of a folder. A Thinker that was saved alone, by its own class as the usual trainers
        do, has no `thinker.` in front of any of them."""
        keys = list(keys)
        if any(self.from_hub(key) is not None for key in keys):
            return self
        shorter = {
            name: tuple((own, hub.removeprefix("thinker.")) for own, hub in pairs if hub.startswith("thinker."))
            for name, pairs in (("renames", self.renames), ("also_read", self.also_read))
        }
        alone = KeyTable(**{**vars(self), **shorter})
        return alone if any(alone.from_hub(key) is not None for key in keys) else self

    def to_hub(self, name: str) -> str:
        """The file's key for one of our names; a name without a rename (a swapped-in module) stays as it is."""
        match = max(
            (pair for pair in self.renames if name.startswith(pair[0])), key=lambda pair: len(pair[0]), default=None
        )
        return match[1] + name[len(match[0]) :] if match else name

    def slot(self, key: str) -> Slot | None:
        """The place in the model for a file's key, None for a key of no known prefix."""
        name = self.from_hub(key)
        if name is None:
            return None
        expert = _EXPERT_KEY.fullmatch(name)
        if expert is None:
            return Slot(name)
        piece: Piece = expert[3]  # type: ignore[assignment]
        stacked = "down_proj" if piece == "down" else "gate_up_proj"
        return Slot(f"{expert[1]}.{stacked}", int(expert[2]), piece)

    def separate(self, name: str, experts: int) -> Iterator[tuple[str, Slot]]:
        """The per-expert keys and slots of a stacked parameter, expert by expert."""
        module, stacked = name.rsplit(".", 1)
        pieces: tuple[Piece, ...] = ("down",) if stacked == "down_proj" else ("gate", "up")
        for expert in range(experts):
            for piece in pieces:
                yield self.to_hub(f"{module}.{expert}.{piece}_proj.weight"), Slot(name, expert, piece)

    def is_derived(self, key: str) -> bool:
        """Whether a key names a table that the model computes for itself."""
        return key.endswith(self.derived)


def is_stacked(name: str) -> bool:
    """Whether one of our names is a parameter that stacks experts."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
