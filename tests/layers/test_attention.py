"""Attention: every entry of the three tables against the plain one, memory bounds, and what foreign kernels are given.

CUDA kernels cannot run on a CPU: a stand-in for flash-attn, written with the plain attention, takes the documented
arguments and layouts, so that what the library passes and makes of the result is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omni.layers import attention_backends, flash_attention, flex_attention
from omni.layers.attention_backends import (
    ATTENTION,
    CACHED,
    PACKED,
    attention,
    cached_attention,
    packed_attention,
    plain_attention,
    use_attention,
)
from omni.layers.packing import BlockPasses, PackedBlocks


def random_qkv(T: int, S: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, grad: bool = True) -> list[Tensor]:
    shapes = ((2, heads, T, dim), (2, kv_heads, S, dim), (2, kv_heads, S, dim))
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def assert_same(a: Any, b: Any, inputs: list[Tensor]) -> None:
    """Equal values and equal gradients."""
    for x, y in zip(
        (a, *torch.autograd.grad(a.square().sum(), inputs)), (b, *torch.autograd.grad(b.square().sum(), inputs))
    ):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


# ---- queries and keys ----


@pytest.mark.parametrize("backend", sorted(set(ATTENTION) - {"plain"}))
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (5, 9), (9, 9), (40, 40), (33, 70)])
@pytest.mark.parametrize("masked", [None, "row", "head", "all"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_entry_equals_the_plain_one(
    backend: str, T: int, S: int, masked: str | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "QUERIES_AT_ONCE", 16)  # several blocks, the last one shorter
    q, k, v = random_qkv(T, S)
    mask = None
    if masked is not None:
        mask = torch.rand({"row": (2, 1, 1, S), "head": (4, T, S), "all": (2, 1, T, S)}[masked]) > 0.3
        mask[..., 0] = True
    out = [attention(q, k, v, mask, causal=causal, backend=name) for name in ("plain", backend)]
    assert_same(*out, [q, k, v])


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
def test_heads_that_share_no_keys_or_all(heads: tuple[int, int]) -> None:
    q, k, v = random_qkv(3, 11, *heads)
    for causal in (False, True):
        assert_same(attention(q, k, v, causal=causal), attention(q, k, v, causal=causal, backend="plain"), [q, k, v])


def test_unknown_backends_are_named() -> None:
    x = torch.zeros(1, 1, 1, 2)
    for call in (
        lambda: attention(x, x, x, backend="flashy"),
        lambda: cached_attention(x, x, x, torch.zeros(1, 1, dtype=torch.int64), backend="flashy"),
        lambda: packed_attention(x[0], x[0], x[0], [1], backend="flashy"),
        lambda: use_attention("flashy").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"'flashy' is not one of .*'sdpa'"):
            call()


def test_a_forced_backend_holds_for_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for table, name in ((ATTENTION, "plain"), (CACHED, "plain"), (PACKED, "plain"), (PACKED, "varlen")):
        monkeypatch.setitem(table, name, lambda *x, name=name, entry=table[name]: calls.append(name) or entry(*x))
    q, k, v = random_qkv(2, 2, grad=False)
    with use_attention("plain"):
        with use_attention("varlen"):  # for packed rows only; the rest is as usual
            attention(q, k, v)
            packed_attention(q[0], q[0], q[0], [4])
        attention(q, k, v)
        cached_attention(q, k, v, torch.tensor([[0, 1], [0, 1]]))
        packed_attention(q[0], q[0], q[0], [4])
        with pytest.raises(KeyError), use_attention("sdpa"):
            raise KeyError
        attention(q, k, v)
    attention(q, k, v)
    assert calls == ["varlen", "plain", "plain", "plain", "plain"]


def test_lengths_that_do_not_fit_are_named() -> None:
    q, k, v = random_qkv(5, 3, grad=False)
    for backend in ATTENTION:
        with pytest.raises(ValueError, match="5 causal queries are more than the 3 keys"):
            attention(q, k, v, causal=True, backend=backend)
    rows = torch.randn(7, 2, 8)
    for blocks in ([3, 3], PackedBlocks([3, 3], rows.device)):
        with pytest.raises(ValueError, match="2 blocks of 6 tokens do not fit a packed row of 7"):
            packed_attention(rows, rows, rows, blocks)


# ---- a cache ----


@pytest.mark.parametrize("backend", sorted(set(CACHED) - {"plain"}))
@pytest.mark.parametrize(("T", "first"), [(1, [0, 3]), (1, [30, 7]), (5, [0, 20]), (21, [9, 9]), (30, [1, 0])])
def test_cached_attention_equals_the_plain_one(
    backend: str, T: int, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "QUERIES_AT_ONCE", 8)
    slots = torch.tensor(first)[:, None] + torch.arange(T)
    q, keys, values = random_qkv(T, 31)
    mask = torch.arange(31) <= slots[:, None, :, None]
    out = cached_attention(q, keys, values, slots, backend=backend)
    assert_same(out, plain_attention(q, keys, values, mask), [q, keys, values])
    assert torch.equal(
        cached_attention(q, keys, values, slots, backend="plain"), plain_attention(q, keys, values, mask)
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_keys_behind_a_slot_are_never_seen(T: int, past: int, room: int, groups: int) -> None:
    q, keys, values = random_qkv(T, past + T + room, 4, 4 // groups, grad=False)
    slots = (past + torch.arange(T)).expand(2, -1)
    before = cached_attention(q, keys, values, slots)
    for t in {0, T // 2, T - 1}:
        hidden = keys.clone()
        hidden[:, :, past + t + 1 :] = 1e4
        torch.testing.assert_close(cached_attention(q, hidden, values, slots)[:, :, : t + 1], before[:, :, : t + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 7, 16, 33, 300])
def test_prefill_of_one_token_has_the_bits_of_decode(keys: int, dtype: torch.dtype) -> None:
    """The caller decides the kernel, not the number of tokens; on a CPU it makes no difference."""
    q, k, v = (x.to(dtype) for x in random_qkv(1, keys, 8, 2, 16, grad=False))
    assert torch.equal(cached_attention(q, k, v, torch.full((2, 1), keys - 1)), attention(q, k, v))


class LargestTensor(TorchDispatchMode):
    """The most values that any result of an operation holds, views and expanded tensors by what they store."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.values = max(self.values, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("kind", ["cached", "causal"])
def test_no_mask_of_all_queries_and_keys_is_built(kind: str) -> None:
    T, S = 2048, 8192
    q, k, v = random_qkv(T, S, 2, 1, 4, grad=False)
    q, k, v = q[:1].clone(), k[:1].clone(), v[:1].clone()
    with LargestTensor() as largest:
        if kind == "cached":
            out = cached_attention(q, k, v, torch.arange(S - T, S)[None])
        else:
            out = attention(q, k, v, causal=True)
    assert largest.values <= attention_backends.QUERIES_AT_ONCE * S  # 1/16 of a whole mask
    rows = torch.tensor([0, 127, 128, 1000, 2047])
    mask = torch.arange(S) <= (S - T + rows)[:, None]
    torch.testing.assert_close(out[:, :, rows], plain_attention(q[:, :, rows], k, v, mask), atol=1e-5, rtol=0)


def test_one_new_token_compiles_without_a_graph_break() -> None:
    """The graph does not depend on the slots' values: one graph serves every step."""
    seen = []
    step = torch.compile(
        cached_attention, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph.forward, dynamic=False
    )
    q, keys, values = random_qkv(1, 12, grad=False)
    for slots in (torch.tensor([[0], [11]]), torch.tensor([[5], [2]])):
        expected = cached_attention(q, keys, values, slots, backend="plain")
        torch.testing.assert_close(step(q, keys, values, slots), expected, atol=1e-6, rtol=0)
    assert len(seen) == 1


# ---- packed rows ----


@pytest.mark.parametrize("backend", sorted(PACKED))
@pytest.mark.parametrize("lengths", [[3, 5, 3, 1, 0, 5], [4, 4, 4], [7], [6, 6, 2, 2, 6], [0]])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_equals_each_block_alone(backend: str, lengths: list[int], causal: bool) -> None:
    q, k, v = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    alone = [
        plain_attention(*(x.transpose(0, 1)[None] for x in block), causal=causal)[0].transpose(0, 1)
        for block in zip(*(x.split(lengths) for x in (q, k, v)))
    ]
    out = packed_attention(q, k, v, PackedBlocks(lengths, q.device, causal=causal), backend=backend)
    if sum(lengths):
        assert_same(out, torch.cat(alone), [q, k, v])
    if not causal:
        assert torch.equal(packed_attention(q, k, v, lengths, backend=backend), out)


@pytest.mark.parametrize("how", ["attention", "causal", "masked", "packed", "grouped"])
def test_gradients_on_a_cpu_are_taken_in_fp32(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision torch's backward pass is several times slower there; without gradients nothing changes."""
    kernel, seen = F.scaled_dot_product_attention, []

    def spy(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        out = kernel(q, *args, **options)
        assert out.dtype == q.dtype  # autocast has no say
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    heads = 4 if how == "grouped" else 2

    def run(dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, n, 12, 8).to(dtype).requires_grad_(grad) for n in (heads, 2, 2))
        if how == "packed":
            out = packed_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), [5, 7])
        else:
            mask = torch.ones(12, 12, dtype=torch.bool).tril() if how == "masked" else None
            out = attention(q, k, v, mask, causal=how == "causal")
        assert out.dtype == dtype
        if grad:
            out.float().square().sum().backward()
        return [out, *(x.grad for x in (q, k, v) if x.grad is not None)]

    for dtype in (torch.bfloat16, torch.float16):
        for got, expected in zip(run(dtype, grad=True), run(torch.float32, grad=True)):
            # inputs, the result and its gradient are rounded once each: 2^-8 of values up to 3, and sums of a few
            torch.testing.assert_close(got.float(), expected, atol=0.06, rtol=0.03)
        assert set(seen) == {torch.float32}
        seen.clear()
        run(dtype, grad=False)
        assert set(seen) == {dtype}
        seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        run(torch.float32, grad=True)
        assert set(seen) == {torch.float32}
        seen.clear()
        run(torch.float64, grad=True)
        assert set(seen) == {torch.float64}


def test_gradients_of_packed_blocks_are_joined_not_padded() -> None:
    """Those of each block alone; and none is padded to the whole row, which would take N rows for every length."""
    lengths = [3, 3, 1, 5, 2, 2, 4]
    passes, rows = BlockPasses(lengths, None), torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(sum(lengths), 2, 3, dtype=torch.float64)

    def attended(blocks: list[int], x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(1, (2, 3))
        return packed_attention(q, 2 * q, q.square(), [lengths[block] for block in blocks])

    (numbers,) = passes
    out = passes.join([attended(numbers, torch.cat(passes.runs(rows, numbers)))])
    (together,) = torch.autograd.grad(out, rows, wanted, retain_graph=True)
    alone = [attended([block], part) for block, part in enumerate(rows.split(lengths))]
    torch.testing.assert_close(together, torch.autograd.grad(torch.cat(alone), rows, wanted)[0])
    names, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [following for following, _ in node.next_functions]
    assert not any("Slice" in node.name() for node in names)


def test_neighbours_of_equal_length_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = PackedBlocks([4, 4, 0, 4, 2, 2, 3], torch.device("cpu"))
    assert blocks.runs == [(0, 4, 2), (8, 4, 1), (12, 2, 2), (16, 3, 1)] and blocks.longest == 4 and blocks.total == 19
    assert blocks.offsets.tolist() == [0, 4, 8, 8, 12, 14, 16, 19] and blocks.offsets.dtype == torch.int32


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9).map(lambda n: 4 * n), min_size=1, max_size=12), st.sampled_from([None, 1, 20, 50]))
def test_passes_cover_every_block_once_and_join_in_order(lengths: list[int], limit: int | None) -> None:
    passes = BlockPasses(lengths, limit)
    x = torch.arange(sum(lengths))
    assert sorted(block for numbers in passes for block in numbers) == list(range(len(lengths)))
    parts = []
    for numbers in passes:
        sizes = [lengths[block] for block in numbers]
        assert limit is None or len(numbers) == 1 or sum(sizes) <= limit
        assert sizes == sorted(sizes, reverse=True)  # equal ones are neighbours
        parts.append(torch.cat(passes.runs(x, numbers)))
        assert parts[-1].tolist() == [i for block in numbers for i in x.split(lengths)[block].tolist()]
    assert torch.equal(passes.join(parts), x)
    assert torch.equal(passes.join([part[::4] for part in parts], 4), x[::4])


# ---- foreign kernels ----


class FlashStandIn:
    """flash_attn's functions as its interface documents them: [B, T, H, D], causal aligned with the last keys."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert q.shape[-1] == k.shape[-1] and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return plain_attention(q, k, v, causal=causal).transpose(1, 2)

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        self.calls.append("dense")
        return self._attend(q, k, v, causal)

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, causal: bool = False
    ) -> Tensor:
        self.calls.append("cached")
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1] and causal
        rows = [
            self._attend(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], True)
            for b, n in enumerate(cache_seqlens.tolist())
        ]
        return torch.cat(rows)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),  # of torch's own kernel
    ) -> Tensor:
        self.calls.append("packed")
        assert cu_q.dtype == cu_k.dtype == torch.int32 and int(cu_q.diff().max()) == max_q == max_k
        assert window_size in ((-1, -1), (-1, 0))
        causal = causal or window_size == (-1, 0)
        bounds = list(zip(cu_q.tolist(), cu_q.tolist()[1:]))
        return torch.cat([self._attend(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0] for a, b in bounds])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashStandIn]:
    stand_in = FlashStandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(flash_attention, "fits", lambda *tensors: True)
    yield stand_in


def test_flash_gets_its_own_layout(flash: FlashStandIn) -> None:
    q, k, v = random_qkv(5, 9)
    with use_attention("flash"):
        for causal in (False, True):
            assert_same(attention(q, k, v, causal=causal), plain_attention(q, k, v, causal=causal), [q, k, v])
        slots = torch.tensor([[1], [4]]) + torch.arange(5)
        with torch.no_grad():
            out = cached_attention(q, k, v, slots)
            torch.testing.assert_close(out, cached_attention(q, k, v, slots, backend="plain"))
        rows = [x[0].transpose(0, 1)[:5] for x in (q, q, q)]
        expected = packed_attention(*rows, [3, 2], backend="plain")
        torch.testing.assert_close(packed_attention(*rows, [3, 2]), expected)
    assert flash.calls == ["dense", "dense", "cached", "packed"]


def test_flash_leaves_masks_and_gradients_of_a_cache_to_sdpa(flash: FlashStandIn) -> None:
    q, k, v = random_qkv(3, 5)
    mask = torch.rand(2, 1, 3, 5) > 0.2
    mask[..., 0] = True
    with use_attention("flash"):
        assert_same(attention(q, k, v, mask), plain_attention(q, k, v, mask), [q, k, v])
        slots = torch.tensor([[1, 2, 3], [0, 1, 2]])
        assert_same(cached_attention(q, k, v, slots), cached_attention(q, k, v, slots, backend="plain"), [q, k, v])
    assert flash.calls == []


def test_flash_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import then fails
    monkeypatch.setattr(flash_attention, "fits", lambda *tensors: True)
    with pytest.raises(ValueError, match="needs the package flash-attn"):
        attention(*random_qkv(2, 2), backend="flash")


def test_what_the_kernels_take() -> None:
    def fits(device: str, dtype: torch.dtype, dim: int, other: torch.dtype | None = None) -> bool:
        make = lambda dtype: SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=(1, 1, 1, dim))  # noqa: E731
        return flash_attention.fits(make(dtype), make(other or dtype))

    assert fits("cuda", torch.bfloat16, 128) and fits("cuda", torch.float16, 72)
    assert not fits("cpu", torch.bfloat16, 128) and not fits("cuda", torch.float32, 128)
    assert not fits("cuda", torch.bfloat16, 36) and not fits("cuda", torch.bfloat16, 264)
    assert not fits("cuda", torch.bfloat16, 128, other=torch.float32)


def test_varlen_gets_offsets_and_the_longest_block(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(flash_attention, "fits", lambda *tensors: True)
    monkeypatch.setattr(varlen, "varlen_attn", FlashStandIn().flash_attn_varlen_func)
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    for lengths in ([4, 3, 2], [9]):
        for causal in (False, True):
            blocks = PackedBlocks(lengths, q.device, causal=causal)
            expected = packed_attention(q, k, v, blocks, backend="plain")
            torch.testing.assert_close(packed_attention(q, k, v, blocks), expected)
            torch.testing.assert_close(
                packed_attention(q, k[:, :1], v[:, :1], blocks),
                packed_attention(q, k[:, :1], v[:, :1], blocks, backend="plain"),
            )


@pytest.mark.filterwarnings("ignore:.*flex_attention.*torch.compile")
@torch.no_grad()
def test_flex_without_compiling() -> None:
    """The masks that flex is given, through its own eager form (the compiled one needs CUDA to be of use)."""
    for T, S in ((140, 300),):
        q, k, v = random_qkv(T, S, dim=16, grad=False)
        mask = torch.rand(2, 1, T, S) > 0.3
        mask[..., 0] = True
        for given_mask in (None, mask):
            for causal in (False, True):
                out = flex_attention.dense(q, k, v, given_mask, causal=causal)
                torch.testing.assert_close(out, plain_attention(q, k, v, given_mask, causal), atol=1e-5, rtol=0)
        slots = torch.tensor([[0], [S - T]]) + torch.arange(T)
        expected = cached_attention(q, k, v, slots, backend="plain")
        torch.testing.assert_close(flex_attention.cached(q, k, v, slots), expected, atol=1e-5, rtol=0)


def test_blocks_that_flex_skips_hold_nothing_visible() -> None:
    """The block mask counts exactly the blocks of keys up to the last that any query of a block sees."""
    slots = torch.tensor([[0], [160]]) + torch.arange(140)
    mask = flex_attention._blocks_up_to(slots, 300, lambda b, h, i, j: j <= slots[b, i])
    visible = torch.arange(300) <= slots[..., None]  # [B, T, S]
    padded = torch.nn.functional.pad(visible, (0, 84, 0, 116)).unflatten(2, (3, 128)).unflatten(1, (2, 128))
    assert mask.kv_num_blocks[:, 0].tolist() == padded.any(4).any(2).sum(-1).tolist()
