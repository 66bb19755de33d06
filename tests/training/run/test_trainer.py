"""The loop: exact means, exact resume after kill -9, skipped steps, frozen parameters, checkpoints and the log."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import fixed, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from omni import OmniModel
from omni.training.objectives.losses import Loss, cross_entropy, router_balance
from omni.training.run import checkpoints
from omni.training.run.activations import checkpoint_activations
from omni.training.run.checkpoints import Checkpoints
from omni.training.run.contracts import Ranks
from omni.training.run.optimiser import lr_factor, trainable
from omni.training.run.train_config import EvalTable, LogTable, OptimiserTable, RunTable, SaveTable, TrainConfig
from omni.training.run.train_log import read_log
from omni.training.run.trainer import Trainer

ROOT = Path(__file__).parents[3]
WIDTH = 6


class Stream:
    """Batch i is a function of i: x [rows, WIDTH], rows between 2 and 4."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.place += 1
            generator = torch.Generator().manual_seed(self.place)
            yield torch.randn(2 + self.place % 3, WIDTH, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Given(Stream):
    """The batches of a list, again and again."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.place += 1
            yield self.batches[(self.place - 1) % len(self.batches)]


class Noisy:
    """Two losses with different counts over x [rows, WIDTH], noise from every generator that a run may use."""

    weights: Mapping[str, float] = {"square": 1.0, "absolute": 0.5}

    def __init__(self, noise: float = 1.0, pause: float = 0.0) -> None:
        self.noise, self.pause = noise, pause

    def counts(self, batch: Tensor) -> dict[str, float]:
        return {"square": len(batch), "absolute": batch.numel()}

    def losses(self, model: nn.Module, batch: Tensor) -> dict[str, Loss]:
        time.sleep(self.pause)
        noise = torch.randn(WIDTH) + random.random() + float(np.random.rand())
        y = model(batch + self.noise * noise)
        square, absolute = y.square().sum(), y.abs().sum()
        rows, values = torch.tensor(float(len(batch))), torch.tensor(float(batch.numel()))
        return {"square": Loss(square, rows), "absolute": Loss(absolute, values), "largest": Loss(absolute * 0, rows)}


class TextLoss:
    """The Thinker's next-token loss on ids [B, T], and router balancing."""

    weights: Mapping[str, float] = {"text": 1.0, "router": 0.01}

    def counts(self, batch: Tensor) -> dict[str, float]:
        return {"text": batch[:, 1:].numel(), "router": batch.numel()}

    def losses(self, model: nn.Module, batch: Tensor) -> dict[str, Loss]:
        thinker = model.thinker
        positions = torch.arange(batch.shape[1], dtype=torch.float32).expand(3, len(batch), -1)
        out = thinker(thinker.embed_tokens(batch), positions, with_router_logits=True)  # type: ignore[operator, union-attr]
        text = cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        return {"text": text, "router": router_balance(out.router_logits, k=2)}


def toy() -> nn.Module:
    with fixed(3):
        return nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)
        )


def tiny(dtype: torch.dtype = torch.float32) -> OmniModel:
    return tiny_model("thinker", widened=1).to(dtype)


def config(steps: int, folder: Path | None = None, every: int = 0, **run: Any) -> TrainConfig:
    keys = {"precision": "fp32", **run}
    return TrainConfig(
        RunTable("toy", steps=steps, **keys),
        optimiser=OptimiserTable(lr=0.01, warmup_steps=2),
        log=LogTable(None if folder is None else str(folder), progress=False),
        save=SaveTable(None if folder is None else str(folder), every=every, keep=2),
    )


def run_toy(folder: Path, steps: int = 24, pause: float = 0.0) -> Trainer:
    """Start or continue the run of the kill test to its end."""
    model = toy()
    trainer = Trainer(model, Noisy(pause=pause), Stream(), config(steps, folder, 4, accumulate=2, ema_decay=0.9))
    trainer.resume()
    trainer.train()
    return trainer


def kill_in_save(folder: Path, save: int) -> None:
    """The same run, killed in the middle of its `save`-th checkpoint's tensors."""
    whole, count = checkpoints.save_file, itertools.count(1)

    def cut_short(tensors: dict[str, Tensor], path: Path) -> None:
        whole(tensors, path)
        if next(count) == save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = cut_short  # type: ignore[assignment]
    run_toy(folder)


def killed_twice(folder: Path) -> None:
    """The run in two processes, one after the other: killed in the middle of a save, and at any moment from outside.

    Each is a fork of this one, which has imported everything and computed nothing.
    """
    import torch._dynamo  # what the first step of an optimiser imports

    torch.set_num_threads(1)
    first = os.fork()
    if not first:
        kill_in_save(folder, save=2)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == -signal.SIGKILL
    assert Checkpoints(folder).steps() == [4] and len(read_log(folder)) == 8
    second = os.fork()
    if not second:
        run_toy(folder, pause=0.05)
    while len(read_log(folder)) < 14:
        time.sleep(0.005)
    os.kill(second, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == -signal.SIGKILL


def same(a: Any, b: Any) -> bool:
    """Equality of nests with tensors, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    return bool(a == b)


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["losses"], line["lr"], line["grad_norm"]) for line in read_log(folder)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_run_killed_twice_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """kill -9 in the middle of a save, then at some moment of the resumed run; then to the end."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests')]}\n"
    code += "from pathlib import Path\nimport test_trainer\n"
    code += f"test_trainer.killed_twice(Path({str(broken)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=240)
    assert len(read_log(broken)) >= 14 and Checkpoints(broken).steps()[-1] >= 8
    resumed = run_toy(broken)
    straight = run_toy(whole)
    assert curve(broken) == curve(whole) and [point[0] for point in curve(whole)] == list(range(1, 25))
    a, b = resumed.state(), straight.state()
    a["config"] = b["config"]
    assert same(a, b)
    assert not list(broken.glob(".*")), "what killed saves left is gone"


def test_resuming_says_what_changed_and_refuses_another_model(tmp_path: Path) -> None:
    run_toy(tmp_path, steps=4)
    other = replace(config(6, tmp_path, 4, ema_decay=0.9), optimiser=OptimiserTable(lr=0.5))
    with pytest.warns(UserWarning, match=r"optimiser.lr 0.01 -> 0.5"):
        Trainer(toy(), Noisy(), Stream(), other).resume()
    with pytest.raises(ValueError, match="checkpoint is of other parameters"):
        Trainer(toy()[:1], Noisy(), Stream(), other).resume()
    ranks = Ranks(gather=lambda value: [value, value])
    with pytest.raises(ValueError, match="checkpoint is of 1 processes, this run has 2"):
        Trainer(toy(), Noisy(), Stream(), other, ranks=ranks).resume()
    with pytest.raises(ValueError, match="holds checkpoints of a run; resume it"):
        Trainer(toy(), Noisy(), Stream(), other).train()


def gradients(
    batches: list[Tensor], accumulate: int, model: nn.Module, objective: Any, **run: Any
) -> dict[str, Tensor]:
    """Gradients of one step, seen by the clipping hook; with a norm that is not finite the step changes nothing."""
    kept: dict[str, Tensor] = {}

    def keep(parameters: Any, limit: float) -> Tensor:
        kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return torch.tensor(torch.nan)

    ranks = Ranks(clip_grad_norm=keep)
    trainer = Trainer(model, objective, Given(batches), config(1, accumulate=accumulate, **run), ranks=ranks)
    trainer.step()
    return kept


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_of_any_cut_give_the_gradients_of_one_batch() -> None:
    """Rows of one batch, cut evenly and unevenly: means are over all items, not of means."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, WIDTH, generator=generator, dtype=torch.float64)
    model = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    y = model(x)
    (y.square().sum() / 6 + 0.5 * y.abs().mean()).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for cut in ([6], [3, 3], [1, 5], [1, 2, 3]):
        assert_close(gradients(list(x.split(cut)), len(cut), model, Noisy(noise=0)), whole, 1e-12)


def test_the_thinker_accumulates_and_checkpoints_to_equal_gradients() -> None:
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    model = tiny(torch.float64)
    trainable(model, ["thinker.*"])

    class Text(TextLoss):
        weights: Mapping[str, float] = {"text": 1.0}  # balance is not a sum over tokens: it is of each micro-batch

    whole = gradients([ids], 1, model, Text())
    assert_close(gradients([ids[:1], ids[1:]], 2, model, Text()), whole, 1e-6)
    balanced = gradients([ids], 1, model, TextLoss())
    with checkpoint_activations(model):
        assert_close(gradients([ids], 1, model, TextLoss()), balanced, 1e-12)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_checkpointed_layers_run_twice_and_leave_lists_as_they_were() -> None:
    model = tiny()
    runs: list[int] = []
    model.thinker.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    embeds = model.thinker.embed_tokens(torch.tensor([[1, 2, 3]]))
    positions = torch.arange(3.0).expand(3, 1, -1)
    with checkpoint_activations(model):
        out = model.thinker(embeds, positions, with_router_logits=True)
        assert len(out.router_logits) == len(model.thinker.layers)  # all sparse
        (out.logits.sum() + sum(r.square().sum() for r in out.router_logits)).backward()
        assert len(runs) == 2 and len(out.router_logits) == len(model.thinker.layers)
        with torch.no_grad():
            model.thinker(embeds, positions)
    assert len(runs) == 3


def test_a_bf16_run_learns_and_leaves_frozen_parameters_bit_equal(tmp_path: Path) -> None:
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    model = tiny()
    names = trainable(model, ["thinker.*", "!thinker.embed_tokens.*", "!thinker.layers.0.*"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = config(12, tmp_path, precision="bf16", activation_checkpointing=True, clip=0.0)
    trainer = Trainer(model, TextLoss(), Given([ids]), table, tokens_of=Tensor.numel)
    result = trainer.train()
    assert (result.step, result.stopped, result.skipped) == (12, False, 0) and not model.training
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    lines = read_log(tmp_path)
    assert lines[-1]["losses"]["text"] < lines[0]["losses"]["text"] - 0.5
    assert lines[0]["tokens"] == 18 and lines[0]["tokens_per_s"] > 0
    expected = [0.01 * lr_factor(i, steps=12, warmup_steps=2) for i in range(12)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path: Path) -> None:
    good, bad = torch.ones(2, WIDTH), torch.full((2, WIDTH), torch.nan)
    model = nn.Linear(WIDTH, WIDTH)
    trainer = Trainer(model, Noisy(noise=0), Given([good, bad, good]), config(3, ema_decay=0.5))
    first = trainer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value.clone() for name, value in trainer.optimizer.state[model.weight].items()}
    second = trainer.step()
    assert not first.skipped and second.skipped and trainer.steps_skipped == 1
    assert same(before, dict(model.state_dict())) and same(moments, trainer.optimizer.state[model.weight])
    assert not trainer.step().skipped and not same(before, dict(model.state_dict()))
    endless = Trainer(model, Noisy(noise=0), Given([bad]), config(50, tmp_path, skip_limit=3))
    with pytest.raises(ValueError, match=r"4 steps in a row had no finite loss .* step 4 .*lower optimiser.lr"):
        endless.train()
    assert [line["skipped"] for line in read_log(tmp_path)] == [True] * 4 and read_log(tmp_path)[0]["loss"] == "nan"


def test_gradients_are_clipped_by_their_norm() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    seen: list[float] = []

    def clip(parameters: Any, limit: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        return norm

    batches = Given([100 * torch.ones(2, WIDTH)])
    for limit, ranks in ((0.5, Ranks(clip_grad_norm=clip)), (0.0, Ranks(clip_grad_norm=clip))):
        result = Trainer(model, Noisy(noise=0), batches, config(1, clip=limit), ranks=ranks).step()
        assert result.grad_norm > 10
    assert seen == [pytest.approx(0.5, rel=1e-4), pytest.approx(result.grad_norm)]


def test_two_processes_count_and_stop_together() -> None:
    """A sum over two ranks with the same data is one rank's step; the other rank's signal is heard."""

    def double(model: nn.Module) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(2)

    x = torch.ones(2, WIDTH)
    ranks = Ranks(sum_over_ranks=lambda tensor: 2 * tensor, sum_gradients=double)
    alone, model = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    model.load_state_dict(alone.state_dict())
    single = Trainer(alone, Noisy(noise=0), Given([x]), config(1)).step()
    both = Trainer(model, Noisy(noise=0), Given([x]), config(1), ranks=ranks).step(stop=lambda: True)
    assert both.loss == pytest.approx(single.loss) and both.grad_norm == pytest.approx(single.grad_norm)
    torch.testing.assert_close(model.weight, alone.weight)
    assert both.stop and not single.stop


def test_objectives_that_break_their_contract_are_named() -> None:
    class Miscounted(Noisy):
        def counts(self, batch: Tensor) -> dict[str, float]:
            return {"square": 7, "absolute": batch.numel()}

    class Unweighted(Noisy):
        weights: Mapping[str, float] = {"square": 1.0, "cube": 1.0}

    model = nn.Linear(WIDTH, WIDTH)
    data = Given([torch.ones(2, WIDTH)])
    with pytest.raises(ValueError, match=r"'square' summed over 2 items, but .* said 7"):
        Trainer(model, Miscounted(), data, config(1)).step()
    with pytest.raises(ValueError, match=r"weights for \['cube'\]"):
        Trainer(model, Unweighted(), data, config(1)).step()
    lonely = nn.ModuleDict({"used": nn.Linear(WIDTH, WIDTH).requires_grad_(False), "other": nn.Linear(2, 2)})

    class Frozen(Noisy):
        def losses(self, model: nn.Module, batch: Tensor) -> dict[str, Loss]:
            return super().losses(model["used"], batch)  # type: ignore[index]

    with pytest.raises(ValueError, match="no loss depends on a trainable parameter"):
        Trainer(lonely, Frozen(), data, config(1)).step()


def test_prepare_runs_before_the_counts_and_without_gradient() -> None:
    class Longer(Noisy):
        def prepare(self, model: nn.Module, batch: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return torch.cat((batch, model(batch)))

    x = torch.ones(2, WIDTH)
    model = nn.Linear(WIDTH, WIDTH)
    expected = F.linear(torch.cat((x, model(x))), model.weight, model.bias).square().sum() / 4
    result = Trainer(model, Longer(noise=0), Given([x]), config(1)).step()
    assert result.losses["square"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_evaluation_sees_the_averages_and_disturbs_nothing(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()
        seen.append(model[0].weight.detach().clone())  # type: ignore[index]
        return {"score": step / 10}

    results = []
    for every in (0, 2):
        table = replace(config(5, tmp_path / str(every), ema_decay=0.9), eval=EvalTable(every=every))
        trainer = Trainer(toy(), Noisy(), Stream(), table, evaluate)
        trainer.train()
        results.append(trainer)
    assert same(dict(results[0].model.state_dict()), dict(results[1].model.state_dict()))
    assert len(seen) == 2 and not torch.equal(seen[1], results[1].model.state_dict()["0.weight"])
    scores = [line for line in read_log(tmp_path / "2") if "eval" in line]
    assert scores == [{"step": 2, "eval": {"score": 0.2}}, {"step": 4, "eval": {"score": 0.4}}]


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    class Interrupted(Noisy):
        def losses(self, model: nn.Module, batch: Tensor) -> dict[str, Loss]:
            if len(read_log(tmp_path)) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(model, batch)

    before = signal.getsignal(signal.SIGTERM)
    result = Trainer(toy(), Interrupted(), Stream(), config(9, tmp_path)).train()
    assert (result.step, result.stopped) == (3, True) and Checkpoints(tmp_path).steps() == [3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_data_that_ends_is_an_error() -> None:
    class Short(Given):
        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

    trainer = Trainer(toy(), Noisy(), Short([torch.ones(2, WIDTH)]), config(3))
    trainer.step()
    with pytest.raises(ValueError, match="batches must never end"):
        trainer.step()
