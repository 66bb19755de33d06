"""Every way of computing attention, behind one function and one table for each kind of call.

Three kinds: `attention` of queries and keys (ATTENTION), `cached_attention` of new queries to a key-value cache
(CACHED), and `packed_attention` inside the blocks of a packed row (PACKED). Each kind has the entries "plain" (written
out, the oracle of the others) and "sdpa" (torch's fused kernels, the default); "flash", "flex" and "varlen" are CUDA
kernels, and what they do not take (other devices and dtypes, masks) is left to "sdpa". `use_attention` forces one.

Shapes: q [B, H, T, D]; k, v [B, Hkv, S, D] with H a multiple of Hkv; `mask` bool, broadcastable to [B, H, T, S], True
where a query may look; `causal` lets query i of T see the keys up to S - T + i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.layers import flash_attention, flex_attention
from omni.layers.packing import PackedBlocks

QUERIES_AT_ONCE = 128  # against a mask: it never holds more than this times S (64 to 256 are equally fast on a CPU)
_FOLDED_QUERIES = 8  # on a CPU, grouped queries are folded up to here: measured 1.3 to 13 times faster at T = 1


# ---- queries and keys ----


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention written out, fp32 softmax: the oracle of every other entry."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        T, S = q.shape[-2], k.shape[-2]
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's fused kernels. A causal call that they have no kernel for runs in blocks of queries."""
    T, S = q.shape[2], k.shape[2]
    if not causal or T == 1 <= S:
        return _fused(q, k, v, mask)
    if T == S and mask is None:
        return _kernel(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    last = torch.arange(S - T, S, device=q.device)[None]
    return _in_blocks(q, k, v, last, None if mask is None else mask.expand(*mask.shape[:-2], T, S))


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, last: Tensor, mask: Tensor | None = None) -> Tensor:
    """Query t of a row sees the keys up to `last` int64 [B or 1, T], which rises along T, and only those of `mask`.

    No query sees more than S - T + t, so that a block of queries takes its own part of the keys.
    """
    T, S = q.shape[2], k.shape[2]
    if T == 1 and mask is None:
        return _fused(q, k, v, torch.arange(S, device=q.device) <= last[:, None, :, None])
    parts = []
    for start in range(0, T, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, T)
        seen = S - T + end
        visible = torch.arange(seen, device=q.device) <= last[:, None, start:end, None]  # [B, 1, block, seen]
        if mask is not None:
            visible = visible & mask[..., start:end, :seen]
        parts.append(_fused(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], visible))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One call of torch's kernels.

    Queries that share a key head are folded into one head of more queries where that reads keys once instead of once a
    query head (few queries on a CPU), and where no fused kernel takes both a mask and grouped queries (CUDA).
    """
    T, kv_heads, groups = q.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    if groups == 1 or (T > _FOLDED_QUERIES and (mask is None or q.device.type == "cpu")):
        return _kernel(q, k, v, attn_mask=mask, enable_gqa=bool(groups > 1))
    folded = q.reshape(q.shape[0], kv_heads, groups * T, q.shape[3])  # a view at T = 1
    if mask is not None and not (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1):
        mask = _fold_mask(mask, kv_heads, groups, T)
    return _kernel(folded, k, v, attn_mask=mask).reshape(q.shape)


def _kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's kernel; in fp32 where a CPU is to take gradients: in half precision its backward pass is 4 to 5 times
    slower (24 clips of 39 tokens: 25 ms, in fp32 5 ms; torch 2.13 on AVX-512 with AMX)."""
    if not _widened(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, **options).to(q.dtype)


def _widened(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `_kernel` computes in fp32 what it gets in less."""
    narrow = q.device.type == "cpu" and (q.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"))
    return narrow and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))


def _fold_mask(mask: Tensor, kv_heads: int, groups: int, queries: int) -> Tensor:
    """A mask of q [B, H, T, D] for the folded queries [B, Hkv, groups * T, D]."""
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, groups))
    return mask.expand(-1, -1, groups, queries, -1).flatten(2, 3)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if mask is None and flash_attention.fits(q, k, v):
        return flash_attention.dense(q, k, v, causal=causal)
    return sdpa_attention(q, k, v, mask, causal)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if q.is_cuda:
        return flex_attention.dense(q, k, v, mask, causal=causal)
    return sdpa_attention(q, k, v, mask, causal)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "plain": plain_attention,
    "sdpa": sdpa_attention,
    "flash": _flash_attention,
    "flex": _flex_attention,
}


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, backend: str | None = None
) -> Tensor:
    """Scaled dot-product attention -> [B, H, T, D].

    Raises ValueError for an unknown backend, and for causal queries that are more than the keys.
    """
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} causal queries are more than the {k.shape[2]} keys, whose last they are; "
            "pass the keys of all queries, or causal=False"
        )
    return ATTENTION[_choice(ATTENTION, backend)](q, k, v, mask, causal)


# ---- new queries and a cache ----


def plain_cached(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Against one mask of all queries and keys."""
    visible = torch.arange(keys.shape[2], device=q.device) <= slots[:, None, :, None]
    return plain_attention(q, keys, values, visible)


def _flash_cached(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    if flash_attention.fits(q, keys, values) and not backward:
        return flash_attention.cached(q, keys, values, slots)
    return _in_blocks(q, keys, values, slots)


def _flex_cached(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    return (flex_attention.cached if q.is_cuda else _in_blocks)(q, keys, values, slots)


CACHED: dict[str, Callable[..., Tensor]] = {
    "plain": plain_cached,
    "sdpa": _in_blocks,
    "flash": _flash_cached,
    "flex": _flex_cached,
}


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention of new queries to a cache: query t of row b sees the keys 0 .. slots[b, t] -> [B, H, T, D].

    slots int64 [B, T], below S, rising by one along T. Queries run in blocks, so that no mask holds more than
    `QUERIES_AT_ONCE` x S values; nothing depends on the values of `slots` on the host.
    Raises ValueError for an unknown backend.
    """
    return CACHED[_choice(CACHED, backend)](q, keys, values, slots)


# ---- blocks of a packed row ----


def _each_run(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Neighbouring blocks of equal length share one call: neither padding nor an N x N mask, nor copies."""

    def packed(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Tensor:
        dtype, parts = q.dtype, []
        if _widened(q, k, v):  # once, not for each length
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        sizes = [length * count for _, length, count in blocks.runs]
        # Not slices: backwards, each would be padded to N rows and added up.
        for (_, length, count), *rows in zip(blocks.runs, *(x.split(sizes) for x in (q, k, v))):
            run = [x.unflatten(0, (count, length)).transpose(1, 2) for x in rows]  # [count, H, length, D]
            parts.append(attend(*run, causal=blocks.causal).transpose(1, 2).flatten(0, 1))
        if not parts:
            return torch.empty_like(q)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    return packed


@cache
def _has_varlen() -> bool:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


def _varlen_packed(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Tensor:
    """torch's own kernel for blocks of any length."""
    if not (flash_attention.fits(q, k, v) and _has_varlen()):
        return PACKED["sdpa"](q, k, v, blocks)
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = blocks.offsets, blocks.longest
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # torch 2.11 takes equal heads only
    window = (-1, 0 if blocks.causal else -1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window)
    assert isinstance(out, Tensor)  # a pair only where log-sums are asked for
    return out


def _flash_packed(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Tensor:
    return (flash_attention.packed if flash_attention.fits(q, k, v) else PACKED["sdpa"])(q, k, v, blocks)


PACKED: dict[str, Callable[..., Tensor]] = {
    "plain": _each_run(plain_attention),
    "sdpa": _each_run(sdpa_attention),
    "varlen": _varlen_packed,
    "flash": _flash_packed,
}


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks | Sequence[int], *, backend: str | None = None
) -> Tensor:
    """Attention inside consecutive blocks of one packed row: q [N, H, D], k and v [N, Hkv, D] -> [N, H, D].

    `blocks` are the blocks, or the lengths of blocks that see all of themselves, with sum N. By default blocks of equal
    length share a fused call, and blocks of several lengths go through torch's varlen kernel where it runs: one launch
    instead of one a length.
    Raises ValueError for an unknown backend, and for blocks whose lengths do not add up to N.
    """
    if not isinstance(blocks, PackedBlocks):
        blocks = PackedBlocks(blocks, q.device)
    if blocks.total != q.shape[0]:
        raise ValueError(
            f"{len(blocks.lengths)} blocks of {blocks.total} tokens do not fit a packed row of {q.shape[0]}; "
            "their lengths must add up to it"
        )
    usual = "varlen" if len(blocks.runs) > 1 else "sdpa"
    return PACKED[_choice(PACKED, backend, usual)](q, k, v, blocks)


# ---- the choice ----

_forced: str | None = None


def _choice(table: Mapping[str, Callable[..., Tensor]], backend: str | None, usual: str = "sdpa") -> str:
    """The entry that was asked for, or the one that `use_attention` forces on every table that has it, or the usual."""
    if backend is None:
        return usual if _forced is None or _forced not in table else _forced
    if backend not in table:
        raise ValueError(f"attention backend {backend!r} is not one of {sorted(table)}")
    return backend


@contextmanager
def use_attention(backend: str | None) -> Iterator[None]:
    """Within the block, all attention of the process goes through one backend, wherever it can compute the call.

    `with use_attention("flash"): …`; None is the default choice. Raises ValueError for a name in no table.
    """
    global _forced
    known = {*ATTENTION, *CACHED, *PACKED}
    if backend is not None and backend not in known:
        raise ValueError(f"attention backend {backend!r} is not one of {sorted(known)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
