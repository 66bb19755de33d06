"""How a run goes on, or ends, when something of it fails: nothing that was learnt is lost, and it says where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Noisy, Stream, config, same, toy
from torch import nn

from omni.training.run.checkpoints import Checkpoints
from omni.training.run.contracts import Ranks
from omni.training.run.train_config import EvalTable
from omni.training.run.train_log import read_log
from omni.training.run.trainer import Trainer


class Breaking(Stream):
    """The stream, whose batch number `at` cannot be read."""

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__()
        self.at, self.error = at, error

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            if self.place == self.at:
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [ValueError("rows are bad"), OSError("no space left"), KeyError("codec")])
@pytest.mark.parametrize("at", [7, 8])  # the first and the second micro-batch of step 4
def test_data_that_fails_ends_the_run_after_a_checkpoint(tmp_path: Path, at: int, error: Exception) -> None:
    """Of the last whole step, from where the run goes on as if nothing had been."""
    table = config(6, tmp_path / "broken", accumulate=2, ema_decay=0.9)
    with pytest.raises(type(error), match=error.args[0]):
        Trainer(toy(), Noisy(), Breaking(at, error), table).train()
    assert Checkpoints(tmp_path / "broken").steps() == [3]
    resumed = Trainer(toy(), Noisy(), Stream(), table)
    assert resumed.resume() == 3
    resumed.train()
    straight = Trainer(toy(), Noisy(), Stream(), config(6, tmp_path / "whole", accumulate=2, ema_decay=0.9))
    straight.train()
    a, b = resumed.state(), straight.state()
    a["config"] = b["config"]
    assert same(a, b)


def test_data_that_fails_at_once_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows are bad"):
        Trainer(toy(), Noisy(), Breaking(1, ValueError("rows are bad")), config(6, tmp_path)).train()
    assert Checkpoints(tmp_path).steps() == []


def test_processes_end_together_when_the_data_of_one_fails(tmp_path: Path) -> None:
    """The others save with it, and say whose message to read."""
    calls: list[int] = []

    def total(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.numel())
        return tensor + 1 if tensor.numel() == 1 and calls.count(1) == 3 else tensor  # another one fails at step 3

    with pytest.raises(ValueError, match="data of another process"):
        Trainer(toy(), Noisy(), Stream(), config(6, tmp_path), ranks=Ranks(sum_over_ranks=total)).train()
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_steps_checkpoint_is_written_before_its_evaluation(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        seen.append(Checkpoints(tmp_path).steps())
        return {"score": 1.0}

    table = replace(config(3, tmp_path, every=1), eval=EvalTable(every=1))
    Trainer(toy(), Noisy(), Stream(), table, evaluate).train()
    assert [steps[-1] for steps in seen] == [1, 2, 3]


@pytest.mark.parametrize("every", [0, 1, 5])
def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path, every: int) -> None:
    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        if step == 4:
            raise RuntimeError("the scorer broke")
        return {}

    table = replace(config(6, tmp_path, every=every), eval=EvalTable(every=2))
    with pytest.raises(RuntimeError, match="the scorer broke"):
        Trainer(toy(), Noisy(), Stream(), table, evaluate).train()
    assert Checkpoints(tmp_path).steps()[-1] == 4
    resumed = Trainer(toy(), Noisy(), Stream(), table)
    resumed.resume()
    resumed.train()
    straight = Trainer(toy(), Noisy(), Stream(), config(6, tmp_path / "whole"))
    straight.train()
    assert same(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path: Path) -> None:
    """The curve of a run that ended in an evaluation, and was taken up again, is the whole curve."""
    ended = [4]

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        if step in ended:
            raise KeyboardInterrupt
        return {"score": float(step)}

    table = replace(config(6, tmp_path, every=2), eval=EvalTable(every=2))
    with pytest.raises(KeyboardInterrupt):
        Trainer(toy(), Noisy(), Stream(), table, evaluate).train()
    ended.clear()
    for _ in range(2):  # the second time nothing is missing
        resumed = Trainer(toy(), Noisy(), Stream(), table, evaluate)
        resumed.resume()
        resumed.train()
        assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_an_evaluation_is_rehearsed_without_a_trace(tmp_path: Path) -> None:
    class Scored:
        rehearsed = 0

        def rehearse(self, model: nn.Module) -> None:
            assert not model.training and not torch.is_grad_enabled()
            torch.rand(3)
            self.rehearsed += 1

        def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
            return {"score": 1.0}

    results = []
    for every in (0, 2, 9):  # the last is never reached
        table = replace(config(4, tmp_path / str(every)), eval=EvalTable(every=every))
        scored = Scored()
        trainer = Trainer(toy(), Noisy(), Stream(), table, scored)
        trainer.train()
        results.append((scored.rehearsed, dict(trainer.model.state_dict())))
    assert [rehearsed for rehearsed, _ in results] == [0, 1, 0]
    assert same(results[0][1], results[1][1])
    assert [line["step"] for line in read_log(tmp_path / "2") if "eval" in line] == [2, 4]


def test_a_checkpoint_of_several_processes_says_why_one_cannot_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    (folder / "state.json").write_text('{"step": 4, "state": {"ranks": [{}, {}]}}')
    with pytest.raises(ValueError, match=r"written by 2 processes.*one process cannot go on from; start as many"):
        Trainer(toy(), Noisy(), Stream(), config(6, tmp_path)).resume()


def test_where_there_is_no_terminal_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from omni.training.run.progress import Lines

    moments = iter([0.0, 1.0, 20.0, 31.0, 40.0, 62.0, 63.0])
    lines = Lines(106, 100, every_s=30, clock=lambda: next(moments))
    for step in range(6):
        lines.set_postfix(loss=f"{step}.5", tokens_s="70")
        lines.update()
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["step 101/106", "step 103/106", "step 105/106", "step 106/106"]
    assert said[0] == "step 101/106: loss 0.5, tokens_s 70, 00:05 left" and "left" not in said[-1]


@pytest.mark.parametrize(("progress", "every_s", "lines"), [(True, 60.0, 2), (True, 0.0, 0), (False, 60.0, 0)])
def test_the_interval_is_a_setting(
    capsys: pytest.CaptureFixture[str], progress: bool, every_s: float, lines: int
) -> None:
    """The first step and the last are always told."""
    table = config(3)
    table = replace(table, log=replace(table.log, progress=progress, **{"print_every_s": every_s}))
    Trainer(toy(), Noisy(), Stream(), table).train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == lines and all("loss " in line for line in said)


def test_the_end_is_told_by_the_signal_that_asked_for_it(tmp_path: Path, capfd: Any) -> None:
    import os
    import signal

    class Interrupted(Noisy):
        def losses(self, model: nn.Module, batch: torch.Tensor) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().losses(model, batch)

    result = Trainer(toy(), Interrupted(), Stream(), config(9, tmp_path)).train()
    assert (result.step, result.stopped, result.signal) == (1, True, signal.SIGINT)
    assert "SIGINT: ending after this step" in capfd.readouterr().err
