"""Discriminators that learn beside the codec, one step for one of its own.

Shapes: B rows, n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni.training.codec.codec_losses import discriminator_loss, feature_matching_loss, generator_loss
from omni.training.codec.discriminators import Discriminators
from omni.training.objectives.losses import Loss
from omni.training.parallel.processes import process_count

_BETAS = (0.8, 0.99)  # of AdamW (Kong et al., 2020)


class Adversary:
    """Discriminators with their own optimiser. Parameters learn in `collect` and `update` alone."""

    def __init__(self, judges: Discriminators, lr: float = 1e-4, kind: str = "least_squares") -> None:
        """judges: equal on all processes; kind: see `discriminator_loss`. Raises ValueError for a rate not above 0."""
        if not lr > 0:
            raise ValueError(f"a learning rate of {lr} for the discriminators moves nothing; it must be above 0")
        self.judges, self.kind = judges.requires_grad_(False), kind
        self.optimizer = torch.optim.AdamW(judges.parameters(), lr=lr, betas=_BETAS)
        for p in judges.parameters():  # made now, so that a checkpoint always holds all of it
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros(()), **moments}
        self._rows = torch.zeros(())

    def to(self, device: torch.device) -> None:
        """Move weights and moments."""
        self.judges.to(device)
        for p in self.judges.parameters():
            state = self.optimizer.state[p]
            state |= {key: value.to(device) for key, value in state.items() if key != "step"}  # which stays on the CPU

    def collect(self, wave: Tensor, recorded: Tensor) -> None:
        """Add the gradient of the discriminators' loss on decoded and recorded waves [B, n]."""
        self.judges.requires_grad_(True)
        with torch.enable_grad():
            real, fake = self.judges(recorded), self.judges(wave.detach())
            loss = discriminator_loss([j.logits for j in real], [j.logits for j in fake], self.kind)
            loss.total.backward()
        self.judges.requires_grad_(False)
        self._rows = self._rows.to(loss[1]) + loss[1]

    def update(self) -> None:
        """Move the discriminators by the mean gradient of what was collected, on all processes; then start anew.

        Where a gradient is not finite nothing is moved.
        """
        parameters = list(self.judges.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(grad.flatten() for grad in grads), self._rows.to(grads[0]).view(1)])
        if process_count() > 1:
            dist.all_reduce(flat)
        if flat.isfinite().all() and flat[-1] > 0:
            mean = flat[:-1] / flat[-1]
            for p, grad in zip(parameters, mean.split([p.numel() for p in parameters])):
                p.grad = grad.view_as(p)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._rows = torch.zeros(())

    def losses(self, wave: Tensor, recorded: Tensor) -> dict[str, Loss]:
        """ "adversarial" and "feature" of decoded waves [B, n] with gradients, "discriminator" for the log."""
        fake = self.judges(wave)
        with torch.no_grad():
            real = self.judges(recorded)
        own = discriminator_loss([j.logits for j in real], [j.logits.detach() for j in fake], self.kind)
        return {
            "adversarial": generator_loss([j.logits for j in fake], self.kind),
            "feature": feature_matching_loss([j.features for j in fake], [j.features for j in real]),
            "discriminator": own,
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimiser's moments by the weights' names."""
        moments = {name: self.optimizer.state[p] for name, p in self.judges.named_parameters()}
        return {"weights": self.judges.state_dict(), "optimizer": moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError for other discriminators."""
        try:
            self.judges.load_state_dict(state["weights"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint is of other discriminators: {error}; build them as in that run"
            ) from error
        for name, p in self.judges.named_parameters():
            for key, moment in self.optimizer.state[p].items():
                moment.copy_(state["optimizer"][name][key])
