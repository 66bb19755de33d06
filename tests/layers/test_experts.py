"""Experts backends: all equal the plain loop, forward and backward; the choice among them; torch.compile."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from omni.layers import experts_backends
from omni.layers.experts_backends import EXPERTS, choose_experts, grouped_product, sort_pairs
from omni.layers.moe import Experts, set_experts_backend

PORTABLE = sorted(name for name in EXPERTS if name != "loop" and not name.startswith("triton"))
# Of the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 6e-3}


def case(
    tokens: int, dtype: torch.dtype = torch.float32, dim: int = 16, hidden: int = 8, experts: int = 6, k: int = 3
) -> tuple[Tensor, ...]:
    """x, ids (repeated in a row, the last expert never chosen), weights (one of them zero), gate_up, down."""
    weights = torch.rand(tokens, k)
    weights[:1, 0] = 0
    gate_up = torch.randn(experts, 2 * hidden, dim) * dim**-0.5
    down = torch.randn(experts, dim, hidden) * hidden**-0.5
    ids = torch.randint(0, experts - 1, (tokens, k))
    return tuple(t if t is ids else t.to(dtype) for t in (torch.randn(tokens, dim), ids, weights, gate_up, down))


def assert_near(got: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    scale = max(scale, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[expected.dtype] * max(scale, 1e-3), rtol=0)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("tokens", [0, 1, 40, 200])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str))
@pytest.mark.parametrize("widths", [(16, 8), (13, 7), (16, 7)], ids=str)
def test_every_backend_equals_the_loop(backend: str, tokens: int, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    inputs = case(tokens, dtype, *widths)
    expected = EXPERTS["loop"](*inputs)
    assert_near(EXPERTS[backend](*inputs), expected)
    leaves = [inputs[i].requires_grad_() for i in (0, 2, 3, 4)]
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(EXPERTS[backend](*inputs), leaves, grad)
    wanted = [torch.zeros_like(leaf) for leaf in leaves]
    if tokens > 0:  # with nothing to do, the loop's output has no history
        wanted = list(torch.autograd.grad(EXPERTS["loop"](*inputs), leaves, grad))
        assert all(w.abs().sum() > 0 for w in wanted)
    # All are sums of products of one size, which in the smaller ones cancel, but not their roundings. The gradient of a
    # weight is rounded for each pair of its expert, in the weights' type; that wanders like the root of their number.
    largest = max(float(w.abs().max()) for w in wanted if w.numel())
    wandering = max(1.0, (inputs[1].numel() / 5) ** 0.5 / 4)
    for a, b in zip(got, wanted):
        assert_near(a, b, largest * wandering)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_tokens_read_large_weights_in_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of `few`: over copied weights, where they are small, and over views of them."""
    inputs = case(2, dtype)
    expected = EXPERTS["loop"](*inputs)
    assert_near(EXPERTS["few"](*inputs), expected)
    monkeypatch.setattr(experts_backends, "GATHER_BYTES", 0)
    monkeypatch.setattr(torch, "bmm", None)
    assert_near(EXPERTS["few"](*inputs), expected)


@pytest.mark.parametrize("backend", ["few", "grouped", "blocked"])
def test_only_the_gradients_asked_for(backend: str) -> None:
    """Frozen experts: the gradient passes through to the input; and the other way round."""
    for wanted in (0, 2, 3, 4):
        inputs = case(5)
        leaf = inputs[wanted].requires_grad_()
        got, expected = (torch.autograd.grad(EXPERTS[name](*inputs).sum(), leaf)[0] for name in (backend, "loop"))
        assert_near(got, expected)


def test_backward_takes_an_expanded_gradient() -> None:
    """torch's grouped product refuses operands with stride 0, which `sum` sends."""
    inputs = case(7)
    inputs[3].requires_grad_()
    EXPERTS["grouped"](*inputs).sum().backward()
    assert inputs[3].grad is not None and inputs[3].grad[5].count_nonzero() == 0  # never chosen


def test_backward_against_finite_differences() -> None:
    x, ids, weights, gate_up, down = case(3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: EXPERTS["grouped"](x, ids, w, g, d), leaves)


def test_pairs_are_counted_without_bincount() -> None:
    ids = torch.tensor([[4, 1], [1, 0], [4, 4]])
    order, ends = sort_pairs(ids, 6)
    assert ids.flatten()[order].tolist() == [0, 1, 1, 4, 4, 4]
    assert order.tolist() == [3, 1, 2, 0, 4, 5]  # stable
    assert ends.tolist() == [1, 3, 3, 3, 6, 6] and ends.dtype == torch.int32


@pytest.mark.parametrize("name", ["rows", "weights"])
@pytest.mark.parametrize("width", [8, 7])
def test_the_operator_of_compiled_programs_knows_its_shape(name: str, width: int) -> None:
    a, ends = torch.randn(9, width), torch.tensor([4, 4, 9], dtype=torch.int32)
    operands = (a, torch.randn(3, width, 8)) if name == "rows" else (a.t(), torch.randn(9, 8))
    torch.library.opcheck(torch.ops.omni.grouped_product.default, (*operands, ends), test_utils="test_faketensor")
    whole = grouped_product(*operands, ends)
    first = operands[0][:4] @ operands[1][0] if name == "rows" else operands[0][:, :4] @ operands[1][:4]
    torch.testing.assert_close(whole[:4] if name == "rows" else whole[0], first)


@pytest.mark.parametrize("backend", ["indexed", "grouped"])
def test_static_backends_have_no_shape_that_depends_on_a_value(backend: str) -> None:
    """They run on tensors without values: nothing is read back, so that a CUDA graph can hold them."""
    inputs = [t.to("meta") for t in case(4, torch.bfloat16)]
    assert EXPERTS[backend](*inputs).shape == (4, 16)


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_the_choice_compiles_into_one_graph(tokens: int, train: bool) -> None:
    torch._dynamo.reset()
    x, ids, weights, *_ = case(tokens)
    experts = Experts(6, 16, 8)
    experts.initialise(0.3)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        out, expected = compiled(x, ids, weights), experts(x, ids, weights, backend="loop")
        assert_near(out.detach(), expected.detach())
        if train:
            parameters = list(experts.parameters())
            got, wanted = (torch.autograd.grad(y.square().sum(), parameters) for y in (out, expected))
            for a, b in zip(got, wanted):
                assert_near(a, b)


def test_choice_on_a_cpu() -> None:
    def chosen(tokens: int, dtype: torch.dtype = torch.float32, **sizes: int) -> str:
        return choose_experts(*case(tokens, dtype, **sizes))

    assert [chosen(n, k=4) for n in (1, 4, 5, 300)] == ["few", "few", "grouped", "blocked"]  # 16 pairs in float32
    assert chosen(4, torch.bfloat16, k=4) == "few"  # small enough to copy
    inputs = case(4)
    inputs[4].requires_grad_()
    assert choose_experts(*inputs) == "grouped"
    with torch.no_grad():
        assert choose_experts(*inputs) == "few"


@pytest.mark.parametrize(
    ("pairs", "dtype", "gradient", "static", "major", "expected"),
    [
        (8, torch.bfloat16, False, True, 9, "triton_gather"),
        (64, torch.bfloat16, False, True, 9, "triton_sorted"),
        (8192, torch.bfloat16, False, True, 9, "grouped"),
        (8192, torch.bfloat16, False, True, 8, "triton_sorted"),
        (8192, torch.float32, False, False, 9, "triton_sorted"),
        (8, torch.bfloat16, True, False, 9, "grouped"),
        (8, torch.float32, True, False, 9, "triton_sorted"),
        (8, torch.float64, False, True, 9, "indexed"),
        (8, torch.float64, False, False, 9, "grouped"),
    ],
)
def test_choice_on_cuda(
    pairs: int,
    dtype: torch.dtype,
    gradient: bool,
    static: bool,
    major: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's grouped product syncs with the host but for bfloat16 on devices of generation 9 and 10."""
    properties = type("Properties", (), {"major": major})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(experts_backends, "HAS_TRITON", True)
    assert experts_backends._choose_on_cuda(torch.zeros(1, 1, dtype=dtype), pairs, gradient, static) == expected


def test_a_backend_for_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("loop", "indexed"):
        monkeypatch.setitem(EXPERTS, name, lambda *inputs, name=name: calls.append(name) or inputs[0])
    model = nn.ModuleList([Experts(6, 16, 8), nn.Linear(2, 2), Experts(6, 16, 8)])
    x, ids, weights, *_ = case(40)
    set_experts_backend(model, "loop")
    model[0](x, ids, weights)
    model[2](x, ids, weights, backend="indexed")  # the argument wins
    set_experts_backend(model, None)
    assert calls == ["loop", "indexed"] and model[0].backend is None
    with pytest.raises(ValueError, match=r"'quick' is not one of .*grouped"):
        set_experts_backend(model, "quick")


def test_every_backend_has_the_same_signature() -> None:
    for backend in EXPERTS.values():
        assert list(inspect.signature(backend).parameters) == ["x", "ids", "weights", "gate_up", "down"]


@pytest.mark.parametrize("tokens", [1, 6, 3000])
def test_autocast_reaches_the_experts(tokens: int) -> None:
    """bfloat16 in the products whatever backend the number of tokens leads to, float32 gradients for the weights."""
    experts = Experts(4, 16, 8)
    experts.initialise(0.3)
    x = torch.randn(tokens, 16)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and experts.down_proj.grad is not None
    assert experts.down_proj.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), experts(x, ids, weights, backend="loop"), atol=0.1, rtol=0.05)


@torch.no_grad()
def test_compiled_large_16_bit_experts_are_one_opaque_call() -> None:
    experts = Experts(4, 512, 512).to(torch.bfloat16)
    experts.initialise(0.05)
    x, ids = torch.randn(1, 512, dtype=torch.bfloat16), torch.tensor([[2, 0]])
    weights = torch.tensor([[0.7, 0.3]], dtype=torch.bfloat16)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(experts, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights, backend="few"))
    assert len(graphs) == 1 and "few_experts" in graphs[0]
