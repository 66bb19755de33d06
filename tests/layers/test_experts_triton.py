"""The Triton kernels of the experts against the plain loop: on a GPU, or on a CPU through Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so that without a GPU the tests of this file run in a process
of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import seeded

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value
here = pytest.mark.skipif(not HERE, reason="runs in a process with Triton's interpreter")

if HERE:
    from omni.layers.experts_backends import EXPERTS, choose_experts, sort_pairs
    from omni.layers.experts_triton import most_tiles, sorted_experts


@pytest.mark.skipif(HERE, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("pairs", [64, 65536], ids=["small tiles", "large tiles"])
def test_kernels_compile_for_a_gpu_that_is_not_there(
    pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation 9, bfloat16: no error of types or shapes that the interpreter lets pass, and shared memory fits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from omni.layers import experts_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("x", "gate_up", "down", "weights", "out", "projected"), "*bf16")
    types |= {"ids": "*i64", "order": "*i64", "ends": "*i32"} | dict.fromkeys(("k", "D", "I", "E", "stride_e"), "i32")
    tiles = kernels._tile_sizes(pairs, 128, torch.bfloat16)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    for name, constants, hidden in (
        ("_gather_gate_up", {"ROWS": 8, "COLUMNS": 512}, "*fp32"),
        ("_gather_down", {"K": 8, "ROWS": 4, "COLUMNS": 1024}, "*fp32"),
        ("_sorted_gate_up", {**tiles, "KEEP": True}, "*bf16"),
        ("_sorted_down", tiles, "*bf16"),
    ):
        kernel = getattr(kernels, name)
        arguments = {a: {**types, "hidden": hidden}.get(a, "constexpr") for a in kernel.arg_names}
        values = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
        built = compile(ASTSource(kernel, arguments, values), target=GPUTarget("cuda", 90, 32), options=options)
        assert built.metadata.shared < 99 * 1024  # the least of the GPUs of generations 8 and 9


def case(
    tokens: int, dtype: torch.dtype, dim: int = 24, hidden: int = 12, experts: int = 6, k: int = 3
) -> list[torch.Tensor]:
    """x, ids (repeated in a row, the last expert never chosen), weights (one of them zero), gate_up, down."""
    generator = seeded(tokens)
    x = torch.randn(tokens, dim, generator=generator)
    ids = torch.randint(0, experts - 1, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    weights[:1, 0] = 0
    gate_up = torch.randn(experts, 2 * hidden, dim, generator=generator) * dim**-0.5
    down = torch.randn(experts, dim, hidden, generator=generator) * hidden**-0.5
    return [ids.to(DEVICE) if t is ids else t.to(DEVICE, dtype) for t in (x, ids, weights, gate_up, down)]


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, atol=TOLERANCE[expected.dtype] * scale, rtol=0)


@here
@pytest.mark.parametrize("backend", ["triton_gather", "triton_sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 3])
def test_kernels_equal_the_loop(backend: str, dtype: torch.dtype, tokens: int) -> None:
    inputs = case(tokens, dtype)
    assert_near(EXPERTS[backend](*inputs), EXPERTS["loop"](*inputs))


@here
@pytest.mark.parametrize("backend", ["triton_gather", "triton_sorted"])
def test_widths_that_are_no_multiple_of_anything(backend: str) -> None:
    inputs = case(3, torch.float32, dim=37, hidden=11, experts=5, k=1)
    assert_near(EXPERTS[backend](*inputs), EXPERTS["loop"](*inputs))


@here
@pytest.mark.parametrize("tokens", [60, 110, 650], ids=["several tiles an expert", "middle tiles", "large tiles"])
def test_sorted_tiles_of_every_size(tokens: int) -> None:
    inputs = case(tokens, torch.float16, dim=24, hidden=16)
    inputs[1][: tokens // 2] = 2  # one expert has most of the pairs
    assert_near(EXPERTS["triton_sorted"](*inputs), EXPERTS["loop"](*inputs))


@here
@pytest.mark.parametrize("backend", ["triton_gather", "triton_sorted"])
def test_gradients_equal_those_of_the_loop(backend: str) -> None:
    x, ids, weights, gate_up, down = case(4, torch.float32, dim=16, hidden=8)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    expected, got = (
        torch.autograd.grad(EXPERTS[name](x, ids, weights, gate_up, down).sum(), leaves) for name in ("loop", backend)
    )
    for a, b in zip(got, expected):
        assert b.abs().sum() > 0
        assert_near(a, b)


@here
def test_kept_projections_are_those_of_the_sorted_pairs() -> None:
    x, ids, weights, gate_up, down = case(4, torch.float32)
    order, ends = sort_pairs(ids, 6)
    _, projected = sorted_experts(x, order, ends, weights, gate_up, down, keep=True)
    expected = torch.stack([gate_up[ids.flatten()[pair]] @ x[pair // 3] for pair in order.tolist()])
    assert projected is not None
    assert_near(projected, expected)


@here
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [16, 16, 16, 16], [17, 0, 0, 1], [0, 0, 0, 64], [15, 17, 16, 33]])
def test_the_grid_holds_every_tile(counts: list[int]) -> None:
    assert sum(-(-c // 16) for c in counts) <= most_tiles(sum(counts), 4, 16)


@here
def test_types_that_the_kernels_do_not_take() -> None:
    x, ids, weights, gate_up, down = case(2, torch.float32)
    with pytest.raises(ValueError, match=r"one kind, got torch.float32, torch.bfloat16"):
        EXPERTS["triton_gather"](x, ids, weights, gate_up.bfloat16(), down)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_chosen_backend_can_be_captured(tokens: int) -> None:
    """A CUDA graph replays with other ids and other inputs: nothing of the values went into it."""
    inputs = case(tokens, torch.bfloat16, dim=64, hidden=32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        EXPERTS[choose_experts(*inputs)](*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = EXPERTS[choose_experts(*inputs)](*inputs)
    for held, other in zip(inputs, case(tokens, torch.bfloat16, dim=64, hidden=32)):
        held.copy_(other.flip(0))
    graph.replay()
    assert_near(out, EXPERTS["loop"](*inputs))
