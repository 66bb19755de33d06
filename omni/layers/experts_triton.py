"""Triton kernels for the experts on a GPU: a pair that reads its weights in place, and products over sorted pairs.

Shapes as in `omni/layers/experts_backends.py`. Sums are kept in fp32 whatever the type; fp32 products are not rounded
to tf32. Grids depend on shapes alone and nothing reads a value on the host, so a CUDA graph can hold all of it.

A speech frame or a few tokens (S = N * k pairs, most with an expert of their own) move weights and compute little:
`gather_experts` gives each program some rows of one expert's matrices. With more pairs, `sorted_experts` gives each
program one tile of rows of one expert, and finds which one by itself from where the experts' pairs end.

With TRITON_INTERPRET=1 the kernels run on a CPU.
"""
# ruff: noqa: E741 - I is the expert width, as in the legend
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _gather_gate_up(
    x, ids, gate_up, hidden, k, D, I, stride_e, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """hidden[pair, rows] = silu(gate) * up of one pair, ROWS of them a program, reading D in steps of COLUMNS."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(ids + pair).to(tl.int64)
    token = (pair // k).to(tl.int64)
    gate_rows = gate_up + expert * stride_e + rows[:, None].to(tl.int64) * D
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < I) & (columns[None, :] < D)
        value = tl.load(x + token * D + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(gate_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32) * value
        up += tl.load(gate_rows + I * D + columns[None, :], mask=inside, other=0.0).to(tl.float32) * value
    gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    tl.store(hidden + pair * I + rows, gate_sum * tl.sigmoid(gate_sum) * up_sum, mask=rows < I)


@triton.jit
def _gather_down(
    hidden, ids, weights, down, out, D, I, stride_e, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[token, rows] = sum over the token's K experts of weight * down @ hidden, ROWS outputs a program.

    The experts are unrolled, so that the loads of several are under way together.
    """
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        expert = tl.load(ids + pair).to(tl.int64)
        weight = tl.load(weights + pair).to(tl.float32)
        matrix = down + expert * stride_e + rows[:, None].to(tl.int64) * I
        for start in range(0, I, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows[:, None] < D) & (columns[None, :] < I)
            value = tl.load(hidden + pair * I + columns, mask=columns < I, other=0.0)[None, :]
            total += tl.load(matrix + columns[None, :], mask=inside, other=0.0).to(tl.float32) * (value * weight)
    result = tl.sum(total, axis=1)
    tl.store(out + token.to(tl.int64) * D + rows, result.to(out.dtype.element_ty), mask=rows < D)


def gather_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two kernels, one program for a few rows of one pair's weights: for few pairs. -> [N, D] in x's type."""
    (N, k), (D, I) = ids.shape, down.shape[1:]
    x, ids, weights, gate_up, down = _checked(x, ids, weights, gate_up, down)
    hidden = torch.empty(N * k, I, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    rows, columns = 8, _block(D, 512)
    _gather_gate_up[(N * k, triton.cdiv(I, rows))](
        x, ids, gate_up, hidden, k, D, I, 2 * I * D, ROWS=rows, COLUMNS=columns, num_warps=4
    )
    rows, columns = 4, _block(I, 1024)
    _gather_down[(N, triton.cdiv(D, rows))](
        hidden, ids, weights, down, out, D, I, D * I, K=k, ROWS=rows, COLUMNS=columns, num_warps=4
    )
    return out


@triton.jit
def _tile(ends, tile, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which expert a tile of BLOCK_M sorted pairs belongs to (E if to none), its first pair, and the expert's end.

    An expert with c pairs owns ceil(c / BLOCK_M) tiles; all experts' tiles follow one another.
    """
    experts = tl.arange(0, BLOCK_E)
    end = tl.load(ends + experts, mask=experts < E, other=0)
    start = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    count = tl.where(experts < E, end - start, 0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((tiles_end <= tile) & (experts < E)).to(tl.int32), axis=0)
    own = experts == expert
    first = tl.sum(tl.where(own, start + (tile - (tiles_end - tiles)) * BLOCK_M, 0), axis=0)
    return expert, first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def _sorted_gate_up(
    x, order, ends, gate_up, hidden, projected, k, D, I, E, stride_e,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KEEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden[place] = silu(gate) * up, BLOCK_M sorted pairs of one expert and BLOCK_N of I; KEEP also stores both."""
    expert, first, end = _tile(ends, tl.program_id(0), E, BLOCK_E, BLOCK_M)
    if expert < E:
        places = first + tl.arange(0, BLOCK_M)
        here = places < end
        token = (tl.load(order + places, mask=here, other=0) // k).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = gate_up + expert.to(tl.int64) * stride_e + columns[None, :].to(tl.int64) * D
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, D, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            rows = tl.load(
                x + token[:, None] * D + inner[None, :], mask=here[:, None] & (inner[None, :] < D), other=0.0
            )
            inside = (inner[:, None] < D) & (columns[None, :] < I)
            gate_weight = tl.load(matrix + inner[:, None], mask=inside, other=0.0)
            up_weight = tl.load(matrix + I * D + inner[:, None], mask=inside, other=0.0)
            if UPCAST:
                rows, gate_weight, up_weight = (
                    rows.to(tl.float32), gate_weight.to(tl.float32), up_weight.to(tl.float32),
                )  # fmt: skip
            gate = tl.dot(rows, gate_weight, gate, input_precision="ieee")
            up = tl.dot(rows, up_weight, up, input_precision="ieee")
        inside = here[:, None] & (columns[None, :] < I)
        place = places[:, None].to(tl.int64)
        if KEEP:
            to = projected + place * (2 * I) + columns[None, :]
            tl.store(to, gate.to(projected.dtype.element_ty), mask=inside)
            tl.store(to + I, up.to(projected.dtype.element_ty), mask=inside)
        value = gate * tl.sigmoid(gate) * up
        tl.store(hidden + place * I + columns[None, :], value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _sorted_down(
    hidden, order, ends, weights, down, out, D, I, E, stride_e,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pair] = weight * down @ hidden[place] in fp32: sorted places back to pairs, BLOCK_N of D a program."""
    expert, first, end = _tile(ends, tl.program_id(0), E, BLOCK_E, BLOCK_M)
    if expert < E:
        places = first + tl.arange(0, BLOCK_M)
        here = places < end
        pair = tl.load(order + places, mask=here, other=0)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = down + expert.to(tl.int64) * stride_e + columns[None, :].to(tl.int64) * I
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, I, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            rows = tl.load(
                hidden + places[:, None].to(tl.int64) * I + inner[None, :],
                mask=here[:, None] & (inner[None, :] < I),
                other=0.0,
            )
            inside = (inner[:, None] < I) & (columns[None, :] < D)
            weight_tile = tl.load(matrix + inner[:, None], mask=inside, other=0.0)
            if UPCAST:
                rows, weight_tile = rows.to(tl.float32), weight_tile.to(tl.float32)
            total = tl.dot(rows, weight_tile, total, input_precision="ieee")
        weight = tl.load(weights + pair, mask=here, other=0.0).to(tl.float32)
        to = out + pair[:, None].to(tl.int64) * D + columns[None, :]
        tl.store(to, (total * weight[:, None]).to(out.dtype.element_ty), mask=here[:, None] & (columns[None, :] < D))


def sorted_experts(
    x: Tensor, order: Tensor, ends: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Two kernels over the pairs sorted by expert (`sort_pairs`) -> out [N, D], projections [S, 2I] if `keep`."""
    (N, k), (E, D, I) = weights.shape, down.shape
    x, order, weights, gate_up, down = _checked(x, order, weights, gate_up, down)
    pairs = N * k
    hidden = torch.empty(pairs, I, dtype=x.dtype, device=x.device)
    projected = torch.empty(pairs, 2 * I, dtype=x.dtype, device=x.device) if keep else None
    out = torch.empty(pairs, D, dtype=x.dtype, device=x.device)
    if pairs > 0:
        sizes: dict[str, Any] = _tile_sizes(pairs, E, x.dtype)
        tiles = most_tiles(pairs, E, sizes["BLOCK_M"])
        _sorted_gate_up[(tiles, triton.cdiv(I, sizes["BLOCK_N"]))](
            x, order, ends, gate_up, hidden, hidden if projected is None else projected,
            k, D, I, E, 2 * I * D, KEEP=keep, **sizes,
        )  # fmt: skip
        _sorted_down[(tiles, triton.cdiv(D, sizes["BLOCK_N"]))](
            hidden, order, ends, weights, down, out, D, I, E, D * I, **sizes
        )
    return out.view(N, k, D).sum(1), projected


def most_tiles(pairs: int, experts: int, block: int) -> int:
    """Tiles of `block` rows that `pairs` sorted pairs need at most, however they fall on the experts.

    c pairs need at most (c - 1) // block + 1 tiles, so h chosen experts at most (pairs - h) // block + h.
    """
    chosen = min(pairs, experts)
    return (pairs - chosen) // block + chosen


def _tile_sizes(pairs: int, experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles by the mean number of pairs an expert: few rows move weights, many rows compute. < 100 KB shared memory."""
    mean = pairs / experts
    m, n, k, warps, stages = (64, 64, 64, 4, 3)
    if mean <= 16:
        m, stages = 16, 4
    elif mean > 96:
        m, n, k, warps, stages = (128, 128, 32, 8, 4)
    if dtype == torch.float32:
        m, n, k = min(m, 64), 32, 32
    return {
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,  # the interpreter multiplies bfloat16 as integers
        "num_warps": warps,
        "num_stages": stages,
    }


def _block(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(size))


def _checked(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of one supported type on one GPU. Raises ValueError otherwise."""
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"Triton experts need a GPU, the input is on {x.device}; use the backend 'grouped'")
    if x.dtype not in TYPES or not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            "Triton experts take float32, bfloat16 or float16 of one kind, "
            f"got {x.dtype}, {gate_up.dtype}, {down.dtype}"
        )
    return tuple(t.contiguous() for t in (x, index, weights, gate_up, down))
