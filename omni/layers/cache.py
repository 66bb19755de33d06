"""The linear key-value cache: preallocated, one length per row, so that rows of a batch may be out of step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.layers.state import State


@dataclass
class KVCache(State):
    """Keys and values of all layers. A row's tokens lie in slots 0 .. length - 1; what lies beyond is never attended.

    keys, values [L, B, Hkv, S, D]; length int64 [B]. `bound` is a host-side upper bound of the lengths, so that no
    step needs to read `length` back from the device.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    bound: int = 0

    @classmethod
    def create(
        cls, layers: int, batch: int, kv_heads: int, capacity: int, dim: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache with room for `capacity` tokens a row."""
        shape = (layers, batch, kv_heads, capacity, dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more a row; grows by at least half, so that appending stays linear in time."""
        needed = self.bound + tokens
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
        """Store k, v [B, Hkv, T, D] of one layer; returns all its keys and values up to the bound."""
        index = slots[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, index, k)
        self.values[layer].scatter_(2, index, v)
        used = self.bound + slots.shape[1]
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]

    def advance(self, tokens: int, lengths: Tensor | None = None) -> None:
        """Count the tokens just written: `tokens` in every row, or `lengths` [B] of them (the rest was padding)."""
        self.length = self.length + (tokens if lengths is None else lengths.to(self.length))
        self.bound += tokens
