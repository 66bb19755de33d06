"""The training loop: any objective on any part of a model, with exact means, exact resume and a log.

The loss of a step is sum over names of weight * (sum of totals) / (sum of counts), over all micro-batches of all
processes: how a batch is cut into micro-batches or spread over processes changes nothing but rounding. The balance
losses of routers are the exception: each is taken over the tokens of one micro-batch, and they are averaged by tokens.

No shapes of its own: batches and losses are the objective's.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omni.training.data.tally import add_counts
from omni.training.objectives.ema import EMA, forget_copies
from omni.training.run.activations import checkpoint_activations
from omni.training.run.checkpoints import Checkpoints, rng_state, seed_everything, set_rng_state
from omni.training.run.contracts import Data, Objective, Ranks, Stateful, StepResult, Store, TrainResult
from omni.training.run.optimiser import lr_factor, make_adamw, named_state, set_lr
from omni.training.run.progress import show_progress
from omni.training.run.signals import stop_signals
from omni.training.run.train_config import TrainConfig
from omni.training.run.train_log import TrainLog, read_log


@dataclass
class Trainer:
    """Minimises an objective over the parameters of `model` that require gradients.

    evaluate(model, step) -> numbers by name, called every `eval.every` steps without gradients, in eval mode, with the
    averaged parameters if there are any; it does not disturb the run's random numbers. Where it has a
    `rehearse(model)`, that is called before the first step: what an evaluation would fail of fails then. `also`: what
    else belongs into a checkpoint (further optimisers, adaptive rewards). tokens_of(batch): for the log. store:
    `Checkpoints` in `save.folder` if None. Raises ValueError if nothing is trainable.
    """

    model: nn.Module
    objective: Objective
    data: Data
    config: TrainConfig
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    store: Store | None = None
    also: Mapping[str, Stateful] = field(default_factory=dict)
    tokens_of: Callable[[Any], int] | None = None

    def __post_init__(self) -> None:
        run = self.config.train
        self.optimizer = make_adamw(self.model, self.config.optimiser)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = EMA(self.parameters.items(), run.ema_decay) if run.ema_decay else None
        if self.store is None and self.config.save.folder is not None:
            self.store = Checkpoints(self.config.save.folder, self.config.save.keep)
        self.device = next(iter(self.parameters.values())).device
        self._wide = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS has not
        self.steps_done = self.steps_skipped = 0
        self._skipped_in_row = 0
        self._resumed = False
        self._saved_at: int | None = None
        self._batches: Iterator[Any] | None = None
        self._before_step: dict[str, Any] | None = None  # data and random numbers, while a step reads its batches

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.ranks.rank == 0

    def train(self) -> TrainResult:
        """Run to `train.steps`; on SIGINT or SIGTERM finish the step, save and return.

        A new run seeds the global generators of Python, NumPy and PyTorch with `train.seed` plus the share. A step's
        checkpoint is written before its evaluation, and one of the last step before data or an evaluation ends the run
        by an error. Raises ValueError if `save.folder` holds another run, or after more than `train.skip_limit` skipped
        steps in a row.
        """
        run, save = self.config.train, self.config.save
        if run.threads:
            torch.set_num_threads(run.threads)
        if not self._resumed and self.steps_done == 0:
            if self.store is not None and self.store.steps():
                raise ValueError(f"{save.folder} holds checkpoints of a run; resume it, or save to another folder")
            seed_everything(run.seed + self.ranks.share)
        was_training, last = self.model.training, None
        with ExitStack() as stack:
            stack.callback(self.model.train, was_training)
            stop = stack.enter_context(stop_signals(say=self.is_main))
            log = self._open_log(stack)
            bar = stack.enter_context(self._progress())
            if run.activation_checkpointing:
                stack.enter_context(checkpoint_activations(self.model))
            self.model.train()
            self._rehearse()
            if self.evaluate is not None and self._evaluation_is_missing(log):
                self._evaluate(self.evaluate, log)
            while self.steps_done < run.steps and not (last is not None and last.stop):
                last = self.step(stop.is_set)
                self._report(last, log, bar)
                if self._skipped_in_row > run.skip_limit:
                    raise ValueError(
                        f"{self._skipped_in_row} steps in a row had no finite loss and gradient, the last was step "
                        f"{last.step} (loss {last.loss}, gradient norm {last.grad_norm}); lower optimiser.lr or "
                        "look at the data, or raise train.skip_limit"
                    )
                if (save.every and last.step % save.every == 0) or last.stop or last.step == run.steps:
                    self.save(log)
                if self.evaluate is not None and self.config.eval.every and last.step % self.config.eval.every == 0:
                    self._evaluate(self.evaluate, log)
            if self._saved_at != self.steps_done:
                self.save(log)
        stopped = self.steps_done < run.steps
        return TrainResult(self.steps_done, stopped, self.steps_skipped, last, stop.number if stopped else 0)

    def step(self, stop: Callable[[], bool] = lambda: False) -> StepResult:
        """One update from the next `train.accumulate` micro-batches. `stop` is asked at the end whether this process
        is to end; all processes learn of it. Raises ValueError for losses that do not keep the objective's contract."""
        start, run = time.perf_counter(), self.config.train
        batches = [self._prepared(batch) for batch in self._next_batches(run.accumulate)]
        names = sorted(self.objective.weights)
        local = [self.objective.counts(batch) for batch in batches]
        counts = self._over_ranks([sum(float(count.get(name, 0)) for count in local) for name in names])
        sums = self._backward(batches, dict(zip(names, counts)))
        self.ranks.sum_gradients(self.model)
        norm = self.ranks.clip_grad_norm(list(self.parameters.values()), run.clip or math.inf)
        reported = sorted(sums)
        tokens = float(sum(map(self.tokens_of or _tokens, batches)))
        tail = torch.tensor([tokens, float(stop())], dtype=self._wide, device=self.device)
        *pairs, (all_tokens, stopping) = _pairs(self._over_ranks(torch.cat([*(sums[name] for name in reported), tail])))
        means = {name: total / count if count else 0.0 for name, (total, count) in zip(reported, pairs)}
        self._check_counts(dict(zip(names, counts)), {name: count for name, (_, count) in zip(reported, pairs)})
        loss, grad_norm = sum(weight * means[name] for name, weight in self.objective.weights.items()), float(norm)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        lr = self._update() if finite else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._skipped_in_row = 0 if finite else self._skipped_in_row + 1
        self.steps_skipped += not finite
        seconds = time.perf_counter() - start
        return StepResult(
            self.steps_done, loss, means, lr, grad_norm, int(all_tokens), seconds, not finite, stopping > 0
        )

    def _next_batches(self, count: int) -> list[Any]:
        """A step's micro-batches. Where one cannot be read, on any process, all save what was before and end."""
        self._before_step = self._local_state() if self.store is not None else None
        failure: Exception | None = None
        batches: list[Any] = []
        try:
            if self._batches is None:
                self._batches = iter(self.data)
            batches = [next(self._batches) for _ in range(count)]
        except StopIteration:
            failure = ValueError("the training data ended; batches must never end (repeat the data)")
        except Exception as error:
            failure = error
        if any(self._over_ranks([float(failure is not None)])):
            if self.steps_done and self._saved_at != self.steps_done:
                self.save()
            raise failure or ValueError("the data of another process ended the run; its message says why")
        self._before_step = None
        return batches

    def _prepared(self, batch: Any) -> Any:
        prepare = getattr(self.objective, "prepare", None)
        if prepare is None:
            return batch
        with torch.no_grad(), self._autocast():
            return prepare(self.model, batch)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _over_ranks(self, values: Sequence[float] | Tensor) -> list[float]:
        """Numbers of this process summed over all shares, as float64 where the device has it."""
        return self.ranks.sum_over_ranks(torch.as_tensor(values, dtype=self._wide, device=self.device)).tolist()

    def _backward(self, batches: list[Any], counts: Mapping[str, float]) -> dict[str, Tensor]:
        """Gradients of the step's loss, whose counts over all batches are known -> (total, count) [2] of each loss."""
        weights = self.objective.weights
        sums: dict[str, Tensor] = {}
        for batch in batches:
            with self._autocast():
                losses = self.objective.losses(self.model, batch)
            missing = sorted(set(weights) - set(losses))
            if missing:
                raise ValueError(f"the objective has weights for {missing}, but its losses are {sorted(losses)}")
            terms = [
                losses[name].total * (weight / (counts[name] or 1.0)) for name, weight in weights.items() if weight
            ]
            value = torch.stack(terms).sum() if terms else torch.zeros(())
            if not value.requires_grad:
                raise ValueError(
                    "no loss depends on a trainable parameter; choose parameters that the objective uses with "
                    "train.parameters, and a [loss] weight above 0"
                )
            value.backward()
            for name, loss in losses.items():
                pair = torch.stack([value.detach().to(self.device, self._wide) for value in loss])
                sums[name] = sums[name] + pair if name in sums else pair
        return sums

    @staticmethod
    def _check_counts(expected: Mapping[str, float], summed: Mapping[str, float]) -> None:
        for name, count in expected.items():
            if not math.isclose(count, summed[name], rel_tol=1e-5, abs_tol=1e-6):
                raise ValueError(
                    f"loss {name!r} summed over {summed[name]:g} items, but the objective's counts() said {count:g}; "
                    "the two must agree"
                )

    def _update(self) -> float:
        """Move the parameters by their gradients; returns the learning rate."""
        table = self.config.optimiser
        factor = lr_factor(
            self.steps_done,
            steps=self.config.train.steps,
            warmup_steps=table.warmup_steps,
            schedule=table.schedule,
            min_lr_ratio=table.min_lr_ratio,
        )
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return table.lr * factor

    def _rehearse(self) -> None:
        """Try the evaluation before the first step, where this run comes to one."""
        rehearse, every = getattr(self.evaluate, "rehearse", None), self.config.eval.every
        if rehearse is not None and every and self.config.train.steps // every > self.steps_done // every:
            with self._evaluating():
                rehearse(self.model)

    def _evaluation_is_missing(self, log: TrainLog | None) -> bool:
        """Whether the run that is resumed ended between a checkpoint and its step's evaluation, as the log tells."""
        every = self.config.eval.every
        if not self._resumed or not every or not self.steps_done or self.steps_done % every:
            return False
        lines = read_log(self.config.log.folder or "") if log is not None else []
        told = any("eval" in line for line in lines if line["step"] == self.steps_done)
        return any(self.ranks.gather(log is not None and not told))

    def _evaluate(self, evaluate: Callable[[nn.Module, int], Mapping[str, float]], log: TrainLog | None) -> None:
        try:
            with self._evaluating():
                numbers = evaluate(self.model, self.steps_done)
        except Exception:
            if self._saved_at != self.steps_done and not (self.store is not None and self.store.collective):
                self.save(log)  # several processes may not have failed together
            raise
        if log is not None:
            log.write({"step": self.steps_done, "eval": {name: float(value) for name, value in numbers.items()}})

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model as it is evaluated; afterwards model and random numbers are as before."""
        generators = rng_state()
        self.model.eval()
        try:
            with torch.no_grad(), self.ema.applied() if self.ema is not None else nullcontext(), self._autocast():
                forget_copies(self.model)
                yield
        finally:
            forget_copies(self.model)
            self.model.train()
            set_rng_state(generators)

    def _open_log(self, stack: ExitStack) -> TrainLog | None:
        table = self.config.log
        if table.folder is None or not self.is_main:
            return None
        log = TrainLog(table.folder, self.steps_done, tensorboard=table.tensorboard)
        stack.callback(log.close)
        return log

    def _progress(self) -> Any:
        table = self.config.log
        show = self.is_main and table.progress
        return show_progress(self.config.train.steps, self.steps_done, show=show, every_s=table.print_every_s)

    def _report(self, result: StepResult, log: TrainLog | None, bar: Any) -> None:
        speed = result.tokens / max(result.seconds, 1e-9)
        parts = {name: f"{mean:.4g}" for name, mean in result.losses.items()} if len(result.losses) > 1 else {}
        bar.set_postfix(loss=f"{result.loss:.4g}", **parts, tokens_s=f"{speed:.0f}", refresh=False)
        bar.update()
        due = result.step % self.config.log.every == 0 or result.skipped or result.step == self.config.train.steps
        if log is None or not due:
            return
        log.write(
            {
                "step": result.step,
                "loss": result.loss,
                "losses": result.losses,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": result.tokens,
                "tokens_per_s": round(speed, 1),
                "seconds": round(result.seconds, 4),
                "skipped": result.skipped,
                **({"data": counts} if (counts := self._own_counts()) else {}),
            }
        )

    def data_counts(self) -> dict[str, Any]:
        """What of the data was not used so far, by reason, over all shares; empty where all was. All processes call it
        together."""
        shares = dict(self.ranks.gather((self.ranks.share, self._own_counts())))  # some processes may have one share
        return add_counts(list(shares.values()))

    def _own_counts(self) -> dict[str, Any]:
        counts = getattr(self.data, "counts", None)
        return {} if counts is None else counts()

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on: trained parameters, buffers, optimiser, averages, `also`, and of
        every process its place in the data and its random numbers. Tensors are the live ones, not copies."""
        everything = self.model.state_dict()
        buffers = everything.keys() - {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {
            "config": self.config.to_dict(),
            "steps_done": self.steps_done,
            "steps_skipped": self.steps_skipped,
            "skipped_in_row": self._skipped_in_row,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": {name: everything[name] for name in sorted(buffers) if isinstance(everything[name], Tensor)},
            "optimizer": named_state(self.optimizer),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "also": {name: part.state_dict() for name, part in self.also.items()},
            "ranks": self.ranks.gather(self._before_step or self._local_state()),
        }

    def _local_state(self) -> dict[str, Any]:
        """What of the state is this process's own."""
        return {"data": self.data.state_dict(), "rng": rng_state()}

    def save(self, log: TrainLog | None = None) -> None:
        """Write a checkpoint of this moment; nothing where there is no store."""
        if self.store is None:
            return
        if log is not None:
            log.sync()
        state = self.state()
        if self.is_main or self.store.collective:
            self.store.save(self.steps_done, state)
        self._saved_at = self.steps_done

    def resume(self) -> int:
        """Go on from the newest whole checkpoint; returns its step, 0 where there is none (the run is then a new one).

        What follows equals, bit for bit on a CPU, what would have followed without the break. Settings that differ
        from those of the checkpoint are named in a warning. Raises ValueError for a checkpoint of other parameters or
        of another number of processes.
        """
        self._resumed = False
        if self.store is None:
            raise ValueError("there is nothing to resume from; set save.folder")
        if self.is_main:
            self.store.clean()
        found = self.store.latest(self.state())
        if found is None:
            return 0
        step, state = found
        self._restore(state)
        self._resumed, self._saved_at = True, step
        return step

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        now = self.state()
        if len(state["ranks"]) != len(now["ranks"]):
            raise ValueError(
                f"the checkpoint is of {len(state['ranks'])} processes, this run has {len(now['ranks'])}; start as "
                "many, or begin a new run from its exported model"
            )
        for part in ("parameters", "buffers", "optimizer"):
            wrong = sorted(state[part].keys() ^ now[part].keys())
            if wrong:
                raise ValueError(
                    f"the checkpoint is of other {part}: {len(wrong)} differ, the first is {wrong[0]!r}; train the "
                    "same parameters of the same model as the run that is resumed"
                )
        changed = _differences(state["config"], now["config"])
        if changed:
            warnings.warn(f"resumed with other settings: {', '.join(changed)}", stacklevel=3)
        for part in ("parameters", "buffers"):
            for name, tensor in now[part].items():
                tensor.copy_(state[part][name])
        for name, tensors in now["optimizer"].items():
            for key, tensor in tensors.items():
                tensor.copy_(state["optimizer"][name][key])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        for name, other in self.also.items():
            if name in state["also"]:  # checkpoints of earlier versions lack some
                other.load_state_dict(state["also"][name])
        self.steps_done, self.steps_skipped = state["steps_done"], state["steps_skipped"]
        self._skipped_in_row = state["skipped_in_row"]
        local = state["ranks"][self.ranks.rank]
        self.data.load_state_dict(local["data"])
        self._batches = None
        set_rng_state(local["rng"])


def _tokens(batch: Any) -> int:
    """Tokens of a batch that knows them, or of a list of samples; 0 for batches of another kind."""
    return sum(map(_tokens, batch)) if isinstance(batch, list) else getattr(batch, "tokens", 0)


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2]))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that differ, as "table.key was -> is", but for what a run may write and show."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if where + key in ("log", "save", "eval"):
            continue
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} {a!r} -> {b!r}")
    return found
