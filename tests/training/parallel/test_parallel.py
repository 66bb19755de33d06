"""Many processes compute what one does: sharded, expert, tensor and sequence parallelism, and their checkpoints."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_worker as worker
import pytest
import torch

from omni import OmniModel
from omni.training.parallel.parallelise import ParallelConfig, clip_grad_norm, full_weight, make_mesh, sum_gradients
from omni.training.parallel.processes import batch_share, init_from_env, is_main, shut_down, sum_over_ranks
from omni.training.run.distributed_checkpoint import load_distributed, save_distributed

PRELOADED = ["torch.distributed." + name for name in ("fsdp", "tensor.parallel", "checkpoint.state_dict")]
TIMEOUT_S = 240  # a process that waits for another one in vain fails the test, a busy machine does not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process alone gets from all rows, in files."""
    folder = tmp_path_factory.mktemp("parallel")
    worker.reference(folder, 2, [1])
    worker.reference(folder, worker.ROWS, [1, worker.STEPS, worker.STEPS + 1])
    return folder


def run(scenario: Callable[[Path], None], processes: int, folder: Path) -> None:
    """Start the processes from one that has imported everything; all must end well within the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_worker", *PRELOADED])
    started = [
        context.Process(target=worker.start, args=(scenario, rank, processes, folder)) for rank in range(processes)
    ]
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in started:
            process.start()
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if any(process.exitcode for process in started):
                break
            time.sleep(0.05)
        assert [process.exitcode for process in started] == [0] * processes
    finally:
        for process in started:
            if process.is_alive():
                process.kill()


def test_sharded_steps_equal_one_process_and_resume(folder: Path) -> None:
    run(worker.two_processes, 2, folder)
    model = worker.small_model()
    optimiser = worker.optimiser_of(model)
    assert load_distributed(folder / "checkpoint", model, optimiser)["step"] == worker.STEPS
    worker.check_equal(model, folder, f"{worker.ROWS}_rows_{worker.STEPS}_steps")
    exported = OmniModel.from_pretrained(folder / "exported", device="cpu")
    with torch.no_grad():
        expected = model(worker.inputs_of(1)).logits
        torch.testing.assert_close(exported(worker.inputs_of(1)).logits, expected, rtol=0, atol=1e-12)
    worker.train(model, optimiser, range(worker.ROWS))
    worker.check_equal(model, folder, f"{worker.ROWS}_rows_{worker.STEPS + 1}_steps")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []  # nothing half-written


@pytest.mark.slow  # whole runs with split experts and split heads are in test_distributed_run
def test_split_layers_equal_one_process(folder: Path) -> None:
    run(worker.split_layers, 2, folder)


@pytest.mark.slow  # four processes
def test_two_kinds_at_once_equal_one_process(folder: Path) -> None:
    run(worker.four_processes, 4, folder)


@pytest.mark.slow  # three starts of torch; a signal to one process is in test_run_checks
def test_torchrun_starts_and_ends_the_group(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += [worker.__file__, str(tmp_path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, timeout=TIMEOUT_S, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["cpu 2 3 True", "cpu 2 3 False"]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    init_from_env()
    assert not torch.distributed.is_initialized()
    assert is_main() and batch_share() == (0, 1)
    count, layer = torch.tensor(3.0), torch.nn.Linear(2, 2)
    assert sum_over_ranks(count).item() == 3
    assert full_weight(layer.weight) is layer.weight
    layer(torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    sum_gradients(layer)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), before) if p.grad is not None)
    shut_down()


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    ours = [torch.nn.Parameter(torch.randn(3, n, dtype=torch.float64)) for n in (1, 4)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, theirs):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_grad_norm(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    torch.testing.assert_close([p.grad for p in ours], [q.grad for q in theirs])


def test_a_norm_that_is_not_finite_leaves_gradients_alone() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([float("inf"), 1.0])
    assert not clip_grad_norm([p], 1.0).isfinite()
    assert p.grad[1] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert": 0}, "expert must be"),
        ({"data": -1}, "data must be"),
        ({"sequence": True}, "set tensor"),
        ({"expert": 2, "tensor": 2}, "shard=False"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**values)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun"):
        make_mesh(ParallelConfig(), "cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        init_from_env()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_distributed(tmp_path, torch.nn.Linear(2, 2))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_distributed(tmp_path / "saved", torch.nn.Linear(2, 2), extra={"step": 1})
    with pytest.raises(ValueError, match="does not fit"):
        load_distributed(tmp_path / "saved", torch.nn.Linear(3, 2))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="without an optimiser"):
        load_distributed(tmp_path / "saved", model, torch.optim.AdamW(model.parameters()))
