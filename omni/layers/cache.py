"""The linear key-value cache: preallocated, one length per row, so that rows of a batch may be out of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.layers.state import State


@dataclass
class KVCache(State):
    """Keys and values of all layers. A row's tokens lie in slots 0 .. length - 1; what lies beyond is never attended.

    keys, values [L, B, Hkv, S, D]; length int64 [B] on the device, `lengths` the same on the host, so that no step
    needs to read the device back.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def create(
        cls, layers: int, batch: int, kv_heads: int, capacity: int, dim: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache with room for `capacity` tokens a row."""
        shape = (layers, batch, kv_heads, capacity, dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=device), [0] * batch)

    @property
    def capacity(self) -> int:
        """Tokens a row that fit without growing."""
        return self.keys.shape[3]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in the longest row; grows by at least half, so that appending stays cheap."""
        needed = self.longest + tokens
        if needed <= self.capacity:
            return
        grown = max(needed, self.capacity + self.capacity // 2)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((*old.shape[:3], grown, old.shape[4]))
            new[..., : old.shape[3], :] = old
            setattr(self, name, new)

    def slots(self, tokens: int) -> Tensor:
        """int64 [B, T]: where the next `tokens` tokens of each row will lie."""
        return self.length[:, None] + torch.arange(tokens, device=self.length.device)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, T, D] of one layer; returns its keys and values as far as any row may look."""
        index = slots[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, index, k.to(self.keys.dtype))  # autocast may give another dtype
        self.values[layer].scatter_(2, index, v.to(self.values.dtype))
        used = self.longest + slots.shape[1]
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens just written, `counts[row]` of each row (what was written beyond was padding)."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]
        self.length = self.length + torch.tensor(counts, device=self.length.device)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of one row from `length` on."""
        assert 0 <= length <= self.lengths[row], "a cache cannot be truncated to more than it holds"
        self.grow(row, length)

    def grow(self, row: int, length: int) -> None:
        """Count tokens of one row that were put in place from outside."""
        assert length <= self.capacity
        self.lengths[row] = length
        self.length = self.length.clone()
        self.length[row] = length

    def row(self, row: int) -> KVCache:
        """One row as a cache of its own that shares this one's memory; room must have been reserved."""
        part = slice(row, row + 1)
        return KVCache(self.keys[:, part], self.values[:, part], self.length[part], [self.lengths[row]])

    def adopt(self, row: int, view: KVCache) -> None:
        """Take over the length that a view made by `row` has reached."""
        self.grow(row, view.lengths[0])
