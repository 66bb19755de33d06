"""What the trainer asks of objectives, data, checkpoint stores and other processes, and what it answers.

No shapes of its own: batches and losses are the objective's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni.training.objectives.losses import Loss


class Objective(Protocol):
    """How a batch becomes losses. `prepare(model, batch) -> batch` may be there too: it runs first, without gradient,
    for what has to be known before the counts are (samples of the model, a teacher's probabilities)."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss in the sum that is minimised."""

    def counts(self, batch: Any) -> Mapping[str, float]:
        """How many items each loss of `weights` will be summed over, known from the batch alone."""

    def losses(self, model: nn.Module, batch: Any) -> Mapping[str, Loss]:
        """Every loss of `weights`; others are only reported. The names are the same for every batch."""


class Data(Protocol):
    """Batches without end, at a place that can be saved: the one after the last batch that was taken."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateful(Protocol):
    """Anything else that a run must remember: nests of tensors, numbers and text."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Store(Protocol):
    """Where checkpoints go. `collective`: every process takes part in a save, not the main one alone; `latest` may
    fill the tensors of `current`, the state as it is now, in place."""

    collective: bool

    def steps(self) -> list[int]: ...
    def save(self, step: int, state: Mapping[str, Any]) -> Any: ...
    def latest(self, current: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None: ...
    def clean(self) -> None: ...


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass(frozen=True)
class Ranks:
    """What several processes need of each other; the defaults are those of one process.

    rank: this process among all; share: which part of the data it reads (processes of one share draw the same random
    numbers). sum_over_ranks: a tensor summed over the shares; gather: one object of every process, in order of rank;
    sum_gradients: gradients summed in place over the shares, called after a step's last backward pass; clip_grad_norm:
    scale gradients to a largest norm and return the norm, both over all shards.
    """

    rank: int = 0
    share: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    sum_gradients: Callable[[nn.Module], None] = lambda model: None
    clip_grad_norm: Callable[[Sequence[nn.Parameter], float], Tensor] = _clip


@dataclass(frozen=True)
class StepResult:
    """One step. losses: means by name; lr before the factors of groups, 0 where the step was skipped; grad_norm before
    clipping; tokens of all processes; skipped: the loss or the gradient was not finite and nothing was changed; stop:
    a process was asked to end."""

    step: int
    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: bool = False
    stop: bool = False


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: after which step, whether a signal ended it early, steps skipped, the last step, and the number
    of the signal (0: none, or one that another process received)."""

    step: int
    stopped: bool
    skipped: int
    last: StepResult | None
    signal: int = 0
