"""The linear key-value cache: preallocated, one length per row, so that rows of a batch may be out of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omni.layers.attention_backends import attention, cached_attention
from omni.layers.state import State

Pass = Literal["first", "prefill", "decode"]


@dataclass(eq=False)
class LayerCache:
    """What one layer's attention reads and writes in one pass over T new tokens. Tensors only, but for `kind`.

    No tuple: hooks that move a module's arguments rebuild tuples with copies, and the cache must stay the caller's. It
    may lie on another device than the layer; then the new tokens travel, and not the cache.

    keys, values [B, Hkv, S, hd]: views of the cache as far as any row may look; slots int64 [B, T]: where the new
    tokens of each row lie; kind: "first" where nothing was in the cache before, so that the new tokens see each other
    alone, else "prefill" of any number of tokens, or "decode" of one token a row, which looks at what is `visible`,
    bool [B, 1, 1, S] (None: at all S).
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    kind: Pass
    visible: Tensor | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the new tokens, q [B, H, T, hd] and k, v [B, Hkv, T, hd] -> [B, H, T, hd], over what the
        cache holds of their row and themselves; keeps k and v."""
        layer, home = q.device, self.keys.device
        if layer != home:
            return self.attention(q.to(home), k.to(home), v.to(home)).to(layer)
        self.write(k, v)
        if self.kind == "first":
            return attention(q, k, v, causal=True)
        if self.kind == "decode":
            return attention(q, self.keys, self.values, self.visible)
        return cached_attention(q, self.keys, self.values, self.slots)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store the new keys and values [B, Hkv, T, hd], without their gradients."""
        index = self.slots[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.detach().to(self.keys.dtype))  # autocast may give another dtype
        self.values.scatter_(2, index, v.detach().to(self.values.dtype))


@dataclass
class KVCache(State):
    """Keys and values of all layers. A row's tokens lie in slots 0 .. length - 1; what lies beyond is never attended.

    keys, values [L, B, Hkv, S, hd]; length int64 [B] on the device, `lengths` the same on the host, so that no step
    needs to read the device back. All three tensors are updated in place; only `reserve` replaces keys and values.
    """

    row_dims: ClassVar[dict[str, int]] = {"keys": 1, "values": 1}

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

    def prefill(self, tokens: int) -> list[LayerCache]:
        """Every layer's view for reading the next `tokens` tokens of each row, for which there must be room."""
        slots = self.length[:, None] + torch.arange(tokens, device=self.length.device)
        return self.views(self.longest + tokens, slots, "prefill" if self.longest else "first")

    def decode(self, span: int | None = None) -> list[LayerCache]:
        """Every layer's view for one further token of each row, for which there must be room.

        span: slots that a step of fixed shape looks at under a mask (None: exactly those filled, and a mask only where
        rows are out of step).
        """
        slots = self.length[:, None]
        if span is not None:
            return self.views(span, slots, "decode", self._visible(span))
        if self.longest == 0:
            return self.views(1, slots, "first")
        even = min(self.lengths) == self.longest
        return self.views(self.longest + 1, slots, "decode", None if even else self._visible(self.longest + 1))

    def _visible(self, span: int) -> Tensor:
        """bool [B, 1, 1, span]: what the next token of each row may look at."""
        return (torch.arange(span, device=self.length.device) <= self.length[:, None])[:, None, None]

    def views(self, span: int, slots: Tensor, kind: Pass, visible: Tensor | None = None) -> list[LayerCache]:
        """Every layer's view of the first `span` slots; the other arguments are the fields of `LayerCache`."""
        keys, values = self.keys[:, :, :, :span], self.values[:, :, :, :span]
        return [LayerCache(keys[i], values[i], slots, kind, visible) for i in range(len(keys))]

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens just written, `counts[row]` of each row (what was written beyond was padding)."""
        self.count(counts)
        self.length += torch.tensor(counts, device=self.length.device)

    def count(self, counts: Sequence[int]) -> None:
        """The host's half of `advance`, where a step has already counted on the device; further rows stand still."""
        for row, count in enumerate(counts):
            self.lengths[row] += count

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of one row from `length` on. Raises ValueError for more tokens than the row holds."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(
                f"row {row} of the cache holds {self.lengths[row]} tokens and cannot be cut to {length}; "
                f"pass a length from 0 to {self.lengths[row]}"
            )
        self.grow(row, length)

    def grow(self, row: int, length: int) -> None:
        """Count tokens of one row that were put in place from outside. Raises ValueError beyond the capacity."""
        if length > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens a row cannot hold {length}; reserve room first")
        self.lengths[row] = length
        self.length[row] = length

    def adopt(self, row: int, view: KVCache) -> None:
        """Take over the length that a view of one row has reached."""
        self.lengths[row] = view.lengths[0]
