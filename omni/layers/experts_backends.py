"""Every way of computing the experts behind one function and one table.

Shapes: N tokens, D model width, E experts, k experts a token, I expert width, S = N * k (token, expert) pairs;
x [N, D], ids int64 [N, k], weights [N, k], gate_up [E, 2I, D] (gate first), down [E, D, I] -> [N, D].

A kernel also takes whether a gradient will be asked for, and returns, beside its output, the gate and up projections
[S, 2I] of the sorted pairs if it keeps them. Backward passes are shared: they need no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], "tuple[Tensor, Tensor | None]"]
Gradients = Callable[[Tensor, "_Saved"], "tuple[Tensor | None, ...]"]
Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

HAS_TRITON = find_spec("triton") is not None
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where the backends cross, measured by `python benchmarks/experts.py` (torch 2.13, AVX-512 CPU, one thread).
FEW_PAIRS = {torch.float32: 16, torch.float64: 16}  # (token, expert) pairs up to which one product a pair is faster
FEW_PAIRS_REDUCED = 8  # the same in bfloat16 and float16, whose vector products are slower
GATHER_BYTES = 4 << 20  # reduced types: copying this much of the weights for one batched product still pays
BLOCKED_PAIRS = 128  # mean pairs an expert: what passes over all of them hand on leaves the cache (training: twice)
AUTOGRAD_PAIRS = 512  # training: up to here autograd's own pass through the grouped products is faster
INDEXED_PAIRS = 128  # compiled on a CPU: `indexed` reads weights pair by pair, `grouped` expert by expert
COMPILED_BYTES = 1 << 20  # of one 16-bit expert: compiled, `few` is faster than `indexed` (full width: 1.3 times)
# CUDA: prepared from bytes and tile sizes, not measured.
GATHER_PAIRS_CUDA = 32  # up to here each pair reads its own weights, then all are sorted
SORTED_PAIRS_CUDA = 4096  # above, torch's grouped product (where it has a kernel) is bound by arithmetic


def loop_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other, only those that were chosen: the oracle of every other entry."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out = out.index_add(0, token, y * weights[token, choice, None])
    return out


def indexed_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each pair indexes its own weights: shapes depend on no value and nothing syncs with the host.

    Written for torch.compile, which fuses index, product and sum into one loop that reads the chosen weights once and
    never stores them. Outside of it, the products are materialised: S * 3 * I * D numbers.
    """
    gate, up = (gate_up[ids] * x[:, None, None]).sum(-1).chunk(2, dim=-1)  # [N, k, I] each
    hidden = F.silu(gate) * up * weights[..., None]
    return (down[ids] * hidden[:, :, None]).sum(-1).sum(1)


def sort_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """ids [N, k] -> order [S], the pairs sorted by expert, and ends int32 [E], where each expert's pairs end in it.

    Searching the sorted ids counts without the host sync of `torch.bincount`.
    """
    ordered, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return order, ends


def invert(order: Tensor) -> Tensor:
    """The inverse permutation: where each pair went."""
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def _each_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` for types and widths that torch's kernel does not take: one product a group."""
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans_of(ends)])
    return torch.cat([a[start:end] @ b[expert] for expert, (start, end) in enumerate(spans_of(ends))])


def _eager_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    aligned = all(max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in (a, b))
    return F.grouped_mm(a, b, offs=ends) if aligned and a.dtype in GROUPED_DTYPES else _each_product(a, b, ends)


_opaque_product = torch.library.custom_op(
    "omni::grouped_product", _eager_product, mutates_args=(), schema="(Tensor a, Tensor b, Tensor ends) -> Tensor"
)


@_opaque_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(*((ends.shape[0], a.shape[0]) if b.dim() == 2 else a.shape[:1]), b.shape[-1])


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Products of consecutive groups: a [S, K], b [E, K, M] -> [S, M]; or a [M, S], b [S, K] -> [E, M, K].

    `ends` int32 [E]: where each group ends along S. torch's kernel takes neither float64 nor rows that are not a
    multiple of 16 bytes, and torch.compile takes it in bfloat16 only: compiled programs call it as one opaque operator.
    """
    return (_opaque_product if torch.compiler.is_compiling() else _eager_product)(a, b, ends)


def grouped_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """All experts in two grouped matrix products over the pairs sorted by expert."""
    order, ends = sort_pairs(ids, gate_up.shape[0])
    projected = grouped_product(x.index_select(0, order // ids.shape[1]), gate_up.transpose(1, 2), ends)
    gate, up = projected.chunk(2, dim=-1)
    y = grouped_product(F.silu(gate).mul_(up), down.transpose(1, 2), ends)
    y = y.index_select(0, invert(order)).view(*ids.shape, x.shape[1])
    return y.mul_(weights[..., None]).sum(1), projected if keep else None


def _weighted_hidden(projected: Tensor, weights: Tensor) -> Tensor:
    """Gate and up projections [S, 2I], weights [N, k] -> silu(gate) * up * weight [S, I]."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weights.reshape(-1, 1))


def few_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Pair by pair without sorting, on a CPU: vector products with views of the weights, which are read in place.

    In reduced precision one batched product over copied weights is faster while the copy is small, and a matrix product
    of one row faster than a vector product.
    """
    (N, k), (D, width) = ids.shape, down.shape[1:]
    reduced = x.dtype in (torch.bfloat16, torch.float16)
    if reduced and N * k * 3 * width * D * x.element_size() <= GATHER_BYTES:
        rows = x.repeat_interleave(k, dim=0)
        projected = torch.bmm(gate_up.index_select(0, ids.flatten()), rows[..., None])[..., 0]
        hidden = _weighted_hidden(projected, weights)
        y = torch.bmm(down.index_select(0, ids.flatten()), hidden[..., None])
        return y.view(N, k, D).sum(1), None
    projected = x.new_empty(N * k, 2 * width)
    chosen = ids.flatten().tolist()
    if reduced:
        tokens = [row for row in x[:, None].unbind(0) for _ in range(k)]  # [1, D] each
        for expert, row, to in zip(chosen, tokens, projected[:, None].unbind(0)):
            torch.mm(row, gate_up[expert].t(), out=to)
        hidden, y = _weighted_hidden(projected, weights), x.new_empty(N * k, D)
        for expert, row, to in zip(chosen, hidden[:, None].unbind(0), y[:, None].unbind(0)):
            torch.mm(row, down[expert].t(), out=to)
        return y.view(N, k, D).sum(1), None
    vectors = [row for row in x.unbind(0) for _ in range(k)]  # [D] each
    for expert, vector, to in zip(chosen, vectors, projected.unbind(0)):
        torch.mv(gate_up[expert], vector, out=to)
    hidden, out = _weighted_hidden(projected, weights), torch.zeros_like(x)
    sums = [row for row in out.unbind(0) for _ in range(k)]
    for expert, vector, to in zip(chosen, hidden.unbind(0), sums):
        to.addmv_(down[expert], vector)
    return out, None


_opaque_few = torch.library.custom_op(
    "omni::few_experts",
    lambda x, ids, weights, gate_up, down: few_kernel(x, ids, weights, gate_up, down, False)[0],
    mutates_args=(),
    schema="(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down) -> Tensor",
)


@_opaque_few.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


def few_or_opaque(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`few_kernel`, which compiled programs call as one opaque operator: it reads ids on the host."""
    if torch.compiler.is_compiling():
        return _opaque_few(x, ids, weights, gate_up, down), None
    return few_kernel(x, ids, weights, gate_up, down, keep)


def spans_of(ends: Tensor) -> list[tuple[int, int]]:
    """The sorted pairs of each expert as (start, end); the host waits for the values."""
    stops = ends.tolist()
    return list(zip([0, *stops], stops))


def blocked_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Expert after expert over the sorted pairs, on a CPU: what one expert computes stays in the cache."""
    order, ends = sort_pairs(ids, gate_up.shape[0])
    tokens, pair_weights = order // ids.shape[1], weights.reshape(-1)[order, None]
    out = torch.zeros_like(x)
    projected = x.new_empty(ids.numel(), gate_up.shape[1]) if keep else None
    for expert, (start, end) in enumerate(spans_of(ends)):
        if start == end:
            continue
        token = tokens[start:end]
        to = None if projected is None else projected[start:end]
        gate, up = torch.mm(x.index_select(0, token), gate_up[expert].t(), out=to).chunk(2, dim=-1)
        y = torch.mm(F.silu(gate).mul_(up), down[expert].t())
        out.index_add_(0, token, y.mul_(pair_weights[start:end]))
    return out, projected


def gather_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Few pairs on CUDA, two Triton kernels: gate + up + SiLU, down + weighted sum."""
    from omni.layers.experts_triton import gather_experts

    return gather_experts(x, ids, weights, gate_up, down), None


def sorted_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Any number of pairs on CUDA: the two products over sorted pairs as Triton kernels on tensor cores."""
    from omni.layers.experts_triton import sorted_experts

    order, ends = sort_pairs(ids, gate_up.shape[0])
    return sorted_experts(x, order, ends, weights, gate_up, down, keep=keep)


class _Saved(NamedTuple):
    """What a backward pass starts from: the inputs, the kept projections or None, and which gradients are wanted."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    projected: Tensor | None
    need_x: bool
    need_gate_up: bool
    need_down: bool


def _inner_gradients(grad_hidden: Tensor, projected: Tensor, pair_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted pairs, from the gradient of silu(gate) * up before its weight [S, I].

    Returns the weighted hidden values [S, I], the gradients of the weights [S] and of gate and up [S, 2I].
    """
    gate, up = projected.chunk(2, dim=-1)
    activated = F.silu(gate)
    hidden = activated * up
    grad_weights = (grad_hidden * hidden).sum(-1)
    grad_hidden = grad_hidden * pair_weights
    grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
    return hidden * pair_weights, grad_weights, torch.cat((grad_gate, grad_hidden * activated), dim=-1)


def grouped_gradients(grad: Tensor, saved: _Saved) -> tuple[Tensor | None, ...]:
    """grad [N, D] -> gradients of x, weights, gate_up and down, by grouped products."""
    x, ids, weights, gate_up, down, projected = saved[:6]
    order, ends = sort_pairs(ids, gate_up.shape[0])
    token = order // ids.shape[1]
    if projected is None:
        projected = grouped_product(x.index_select(0, token), gate_up.transpose(1, 2), ends)
    grad_pairs = grad.index_select(0, token)  # contiguous whatever `grad` was: the products refuse stride 0
    grad_hidden = grouped_product(grad_pairs, down, ends)
    hidden, dots, grad_projected = _inner_gradients(grad_hidden, projected, weights.reshape(-1)[order, None])
    grad_x = grad_gate_up = grad_down = None
    if saved.need_down:
        grad_down = grouped_product(grad_pairs.t(), hidden, ends)
    if saved.need_gate_up:
        grad_gate_up = grouped_product(grad_projected.t(), x.index_select(0, token), ends)
    if saved.need_x:
        grad_rows = grouped_product(grad_projected, gate_up, ends)
        grad_x = grad_rows.index_select(0, invert(order)).view(*ids.shape, x.shape[1]).sum(1)
    return grad_x, torch.empty_like(dots).scatter_(0, order, dots).view(ids.shape), grad_gate_up, grad_down


def blocked_gradients(grad: Tensor, saved: _Saved) -> tuple[Tensor | None, ...]:
    """As `grouped_gradients`, expert after expert."""
    x, ids, weights, gate_up, down, projected = saved[:6]
    assert projected is not None, "the blocked kernel keeps its projections"
    order, ends = sort_pairs(ids, gate_up.shape[0])
    tokens, pair_weights = order // ids.shape[1], weights.reshape(-1)[order, None]
    grad_x = torch.zeros_like(x) if saved.need_x else None
    grad_weights = torch.empty_like(weights).view(-1)
    grad_gate_up = torch.empty_like(gate_up) if saved.need_gate_up else None
    grad_down = torch.empty_like(down) if saved.need_down else None
    for expert, (start, end) in enumerate(spans_of(ends)):
        token, block = tokens[start:end], slice(start, end)
        grad_pairs = grad.index_select(0, token)
        grad_hidden = torch.mm(grad_pairs, down[expert])
        hidden, dots, grad_projected = _inner_gradients(grad_hidden, projected[block], pair_weights[block])
        grad_weights.scatter_(0, order[block], dots)
        if grad_down is not None:
            torch.mm(grad_pairs.t(), hidden, out=grad_down[expert])
        if grad_gate_up is not None:
            torch.mm(grad_projected.t(), x.index_select(0, token), out=grad_gate_up[expert])
        if grad_x is not None:
            grad_x.index_add_(0, token, torch.mm(grad_projected, gate_up[expert]))
    return grad_x, grad_weights.view(ids.shape), grad_gate_up, grad_down


class _Trainable(torch.autograd.Function):
    """A kernel forward, and gradients from its inputs and from what it kept."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, gradients: Gradients, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:  # fmt: skip
        out, projected = kernel(x, ids, weights, gate_up, down, True)
        ctx.save_for_backward(x, ids, weights, gate_up, down, projected)
        ctx.gradients = gradients
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, need_x, _, _, need_gate_up, need_down = ctx.needs_input_grad
        x, ids, weights, gate_up, down, projected = ctx.saved_tensors
        saved = _Saved(x, ids, weights, gate_up, down, projected, need_x, need_gate_up, need_down)
        grad_x, grad_weights, grad_gate_up, grad_down = ctx.gradients(grad, saved)
        return None, None, grad_x, None, grad_weights, grad_gate_up, grad_down


def trainable(kernel: Kernel, gradients: Gradients) -> Backend:
    """The kernel as a table entry: bare where no gradient is wanted, else with a backward pass."""

    def backend(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if wants_gradient(x, weights, gate_up, down):
            return _Trainable.apply(kernel, gradients, x, ids, weights, gate_up, down)
        return kernel(x, ids, weights, gate_up, down, False)[0]

    return backend


_grouped_with_own_gradients = trainable(grouped_kernel, grouped_gradients)


def grouped_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`grouped_kernel`; autograd differentiates it where pairs are few, which costs less Python and more memory."""
    aligned = all(w.shape[-1] * w.element_size() % 16 == 0 for w in (gate_up, down))
    if ids.numel() <= AUTOGRAD_PAIRS and aligned and x.dtype in GROUPED_DTYPES and not torch.compiler.is_compiling():
        return grouped_kernel(x, ids, weights, gate_up, down, False)[0]
    return _grouped_with_own_gradients(x, ids, weights, gate_up, down)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records now and any tensor asks for it."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


EXPERTS: dict[str, Backend] = {
    "loop": loop_experts,
    "few": trainable(few_or_opaque, grouped_gradients),
    "indexed": indexed_experts,
    "grouped": grouped_experts,
    "blocked": trainable(blocked_kernel, blocked_gradients),
    "triton_gather": trainable(gather_kernel, grouped_gradients),
    "triton_sorted": trainable(sorted_kernel, grouped_gradients),
}


def choose_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> str:
    """The backend for this input, by pairs, device, type, gradients, and whether the host may be asked for values.

    It may not while a CUDA graph is captured, and inside torch.compile in an opaque operator alone: `blocked` is never
    chosen there.
    """
    pairs, compiling = ids.numel(), torch.compiler.is_compiling()
    gradient = wants_gradient(x, weights, gate_up, down)
    if x.is_cuda:
        return _choose_on_cuda(x, pairs, gradient, compiling or torch.cuda.is_current_stream_capturing())
    if compiling and not gradient and pairs <= FEW_PAIRS_REDUCED and _large_and_reduced(x, down):
        return "few"
    if compiling:
        return "indexed" if pairs <= INDEXED_PAIRS and not gradient else "grouped"
    if not gradient and pairs <= _few_pairs(x, pairs, down):
        return "few"
    many = BLOCKED_PAIRS * (2 if gradient else 1) * gate_up.shape[0]
    return "blocked" if pairs >= many else "grouped"


def _large_and_reduced(x: Tensor, down: Tensor) -> bool:
    """Whether compiled loops over indexed weights lose against a library call for each: 16-bit and over a megabyte."""
    return x.dtype in (torch.bfloat16, torch.float16) and 3 * down[0].numel() * x.element_size() >= COMPILED_BYTES


def _few_pairs(x: Tensor, pairs: int, down: Tensor) -> int:
    """Pairs up to which `few` is faster than `grouped` on a CPU."""
    if x.dtype in FEW_PAIRS:
        return FEW_PAIRS[x.dtype]
    copied = pairs * 3 * down[0].numel() * x.element_size()
    return pairs if copied <= GATHER_BYTES else FEW_PAIRS_REDUCED


def _choose_on_cuda(x: Tensor, pairs: int, gradient: bool, static: bool) -> str:
    """`static`: values must not reach the host."""
    native = x.dtype == torch.bfloat16 and torch.cuda.get_device_properties(x.device).major in (9, 10)
    if HAS_TRITON and x.dtype in GROUPED_DTYPES:
        if pairs <= GATHER_PAIRS_CUDA and not gradient:
            return "triton_gather"
        return "grouped" if native and (gradient or pairs > SORTED_PAIRS_CUDA) else "triton_sorted"
    return "grouped" if native or not static else "indexed"
