"""Blocks of one packed row: where they lie, which of them run together, and how their order is restored.

A block is what attends to itself alone: an audio window, the patches of one video frame pair, one conversation of a
training batch. Shapes: N rows of all blocks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


class PackedBlocks:
    """Lengths of consecutive blocks with sum N, worked out once for all layers.

    `causal`: a row sees those of its block up to itself, not all. `runs` are (first row, length, blocks) of neighbours
    with equal length, empty ones left out.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, *, causal: bool = False) -> None:
        self.lengths = list(lengths)
        self.device = device
        self.causal = causal
        self.total = sum(self.lengths)
        self.longest = max(self.lengths, default=0)
        self.runs: list[tuple[int, int, int]] = []
        start = 0
        for length, equal in groupby(self.lengths):
            count = len(list(equal))
            if length:
                self.runs.append((start, length, count))
            start += length * count

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [blocks + 1] on the device: where each block begins, and N."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)


class BlockPasses:
    """Which blocks go through a network together.

    Blocks of equal length are side by side, so that one call attends in all of them, and a pass has at most `limit`
    rows (None: all in one), but at least one block: memory then does not grow with the length of the input.
    Iterating gives the numbers of each pass's blocks.
    """

    def __init__(self, lengths: Sequence[int], limit: int | None) -> None:
        self.lengths = list(lengths)
        self.starts = [0, *accumulate(self.lengths)]
        self.order = sorted(range(len(self.lengths)), key=lambda block: -self.lengths[block])  # stable
        self.passes: list[list[int]] = []
        room = -1
        for block in self.order:
            room -= self.lengths[block]
            if not self.passes or (limit is not None and room < 0):
                self.passes.append([])
                room = (limit or 0) - self.lengths[block]
            self.passes[-1].append(block)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.passes)

    def runs(self, x: Tensor, blocks: list[int]) -> list[Tensor]:
        """The rows of some blocks of x [N, …] in their order: a view for each run of neighbours.

        Where gradients are taken, one for each block: backwards, the parts of a split are joined, slices would each be
        padded to N rows and added up.
        """
        if x.requires_grad:
            parts = x.split(self.lengths)
            return [parts[block] for block in blocks]
        bounds: list[list[int]] = []
        for block in blocks:
            if bounds and bounds[-1][1] == self.starts[block]:
                bounds[-1][1] = self.starts[block + 1]
            else:
                bounds.append([self.starts[block], self.starts[block + 1]])
        return [x[start:end] for start, end in bounds]

    def join(self, parts: Sequence[Tensor], merged: int = 1) -> Tensor:
        """What the passes gave, in the order of the blocks: [N / merged, …], `merged` rows having become one."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.order == list(range(len(self.order))):
            return joined
        rows = dict(zip(self.order, joined.split([self.lengths[block] // merged for block in self.order])))
        return torch.cat([rows[block] for block in range(len(self.order))])
