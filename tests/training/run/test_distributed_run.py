"""A run on two processes equals that of one: batches of unlike media, frozen parts, kill and resume, export."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed_run_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni import OmniModel
from omni.training.run.contracts import Ranks
from omni.training.run.distributed_run import DistributedStore, spread, store_of
from omni.training.run.train_config import EvalTable, ParallelTable, SaveTable
from omni.training.run.train_log import read_log

PRELOADED = ["torch.distributed." + name for name in ("fsdp", "tensor.parallel", "checkpoint.state_dict")]
PRELOADED += ["torch._dynamo", "accelerate"]  # what the first step of an optimiser imports, and a loaded model
TIMEOUT_S = 240  # processes that wait for each other in vain fail the test, a busy machine does not


def run(scenario: Callable[[Path], None], folder: Path, processes: int = 2) -> list[int | None]:
    """Start the processes and wait until all have ended, well within the time -> their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_run_worker", *PRELOADED])
    started = [
        context.Process(target=worker.start, args=(scenario, rank, processes, folder)) for rank in range(processes)
    ]
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in started:
            process.start()
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0, -signal.SIGKILL) for process in started):
                break  # one has failed, the others wait for it
            time.sleep(0.05)
        return [process.exitcode for process in started]
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run by one process and by two, and the long run by two."""
    folder = tmp_path_factory.mktemp("runs")
    worker.write_manifest(folder)
    for name in worker.RUNS:
        worker.run_mixed(name, folder / "one" / name, 1)
    assert run(worker.together, folder) == [0, 0]
    return folder


def curve(folder: Path) -> list[dict[str, Any]]:
    """What a log says about steps and evaluations, but for the time they took."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in read_log(folder)]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", worker.RUNS)
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    one, two = curve(folder / "one" / name), curve(folder / "two" / name)
    assert [line["step"] for line in two] == [step for i in range(worker.STEPS) for step in (i + 1, i + 1)]
    for mine, theirs in zip(two, one):
        assert mine.pop("losses", {}) == pytest.approx(theirs.pop("losses", {}), rel=1e-6)
        assert mine.pop("eval", {}) == pytest.approx(theirs.pop("eval", {}), rel=1e-6)
        assert mine == pytest.approx(theirs, rel=1e-6)
    ours, expected = weights(folder / "two" / name / "exported"), weights(folder / "one" / name / "exported")
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_what_a_run_trains_moves_and_nothing_else(folder: Path) -> None:
    """So that equal runs are not equal by standing still."""
    runs = {name: weights(folder / "two" / name / "exported") for name in worker.RUNS}

    def differ(a: str, b: str, prefix: str) -> bool:
        names = [name for name in runs[a] if name.startswith(prefix)]
        assert names
        return any(not torch.equal(runs[a][name], runs[b][name]) for name in names)

    assert differ("talker_alone", "encoders_alone", "talker.")
    assert differ("talker_alone", "encoders_alone", "thinker.audio_tower.")
    assert differ("talker_alone", "encoders_alone", "thinker.visual.")
    assert not differ("talker_alone", "encoders_alone", "thinker.model.")
    assert not differ("talker_alone", "without_encoders", "thinker.audio_tower.")
    assert not differ("talker_alone", "without_encoders", "thinker.visual.")
    assert differ("talker_alone", "without_encoders", "thinker.model.")


def test_an_export_of_two_processes_is_a_model(folder: Path) -> None:
    model = OmniModel.from_pretrained(folder / "whole" / "exported", device="cpu")
    inputs = model.processor([{"role": "user", "content": "Question 3?"}])
    assert model(inputs).logits.isfinite().all()


@pytest.mark.slow  # of one process: test_trainer; of two that resume: test_parallel
def test_a_killed_run_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    """Both processes end by kill -9 in the middle of a save; the resumed run equals the whole one bit for bit."""
    assert run(worker.killed, folder) == [-signal.SIGKILL] * 2
    store = DistributedStore(folder / "broken" / "checkpoints")
    assert store.steps() == [1] and [line["step"] for line in curve(folder / "broken")] == [1, 2]
    assert any(path.name.startswith(".step_") for path in store.folder.iterdir())  # the save that was cut short
    assert run(worker.resumed, folder) == [0, 0]
    assert not any(path.name.startswith(".") for path in store.folder.iterdir())
    assert curve(folder / "broken") == curve(folder / "whole")
    whole, broken = (weights(folder / name / "exported") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


def test_spread_models_answer_between_steps(tmp_path: Path) -> None:
    """A metric that generates, on layers that FSDP shards and on experts that two processes share in bfloat16; one
    process that takes such a run up is told why it cannot."""
    worker.write_manifest(tmp_path)
    assert run(worker.answering, tmp_path) == [0, 0]
    for name in ("spread", "half"):
        lines = read_log(tmp_path / name)
        assert [line["step"] for line in lines] == [1, 1, 2, 2]
        assert all(0 < line["loss"] < 20 for line in lines[::2])
        assert all("accuracy" in line["eval"] for line in lines[1::2])
    config = worker.mixed_config("all", tmp_path, 1)
    config = replace(config, save=SaveTable(str(tmp_path / "spread" / "checkpoints")), eval=EvalTable())
    with pytest.raises(ValueError, match="written by 2 processes"):
        worker.build_run(config).train()


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """A file that is cut short, then one that is missing; what is left is read by one process as well."""
    store = DistributedStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, {"steps_done": step, "parameters": {"w": torch.full((5,), float(step))}, "also": {}})
    parts = sorted(store.path(3).glob("*.distcp"))
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    (store.path(2) / "state.json").unlink()
    live = torch.zeros(5)
    with pytest.warns(UserWarning, match="passed over"):
        found = store.latest({"parameters": {"w": live}})
    assert found is not None and found[0] == 1
    assert found[1]["steps_done"] == 1 and torch.equal(live, torch.ones(5))
    assert found[1]["parameters"]["w"] is live


def test_a_checkpoint_of_one_process_is_refused(tmp_path: Path) -> None:
    store = DistributedStore(tmp_path)
    super(DistributedStore, store).save(1, {"parameters": {"w": torch.ones(2)}})
    with pytest.raises(ValueError, match="written by one process"):
        store.latest({"parameters": {"w": torch.zeros(2)}})


def test_one_process_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: OmniModel) -> None:
    monkeypatch.delenv("RANK", raising=False)
    config = worker.mixed_config("all", tmp_path, 1)
    parameters = [id(p) for p in model.parameters()]
    assert spread(model, config) == (Ranks(), (0, 1)) and store_of(config) is None
    assert [id(p) for p in model.parameters()] == parameters
    with pytest.raises(ValueError, match=r"parallel\.expert = 2 needs several processes"):
        spread(model, replace(config, parallel=ParallelTable(expert=2)))
