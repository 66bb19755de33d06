"""Exponential moving average of parameters (Polyak and Juditsky, 1992; in this form as in most speech models)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """A slow copy of parameters: after each step, average = decay * average + (1 - decay) * parameter.

    The average is fp32 at least, where 16 bits would round its small moves away, and is placed (and, for a DTensor,
    sharded) as its parameter. With `warm_up`, the first updates use min(decay, (1 + n) / (10 + n)) after n updates, so
    that the random start is soon forgotten.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float = 0.999, *, warm_up: bool = True
    ) -> None:
        """named_parameters: of a module; those that take no gradient are left out.

        Raises ValueError for a decay outside 0 .. 1 (1 excluded).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay!r} must lie in 0 .. 1 (1 excluded); 0.999 is usual")
        self.decay, self.warm_up, self.updates = decay, warm_up, 0
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.averages = {name: _wide(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; call it after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        self.updates += 1
        for name, parameter in self.parameters.items():
            average = self.averages[name]
            average.lerp_(parameter.to(average.dtype), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the averages; afterwards, also after an error, what they held before."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the averages by parameter name (not copied)."""
        return {"updates": self.updates, "averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. ValueError, with nothing changed, if it is of other parameters."""
        averages = state["averages"]
        wrong = sorted(set(averages) ^ set(self.averages))
        wrong += [
            name for name in self.averages if name not in wrong and averages[name].shape != self.averages[name].shape
        ]
        if wrong:
            raise ValueError(
                f"these averages are of other parameters: {len(wrong)} differ, the first is {wrong[0]!r}; train the "
                "same parts as the run that is resumed"
            )
        self.updates = int(state["updates"])
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _wide(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def forget_copies(model: nn.Module) -> None:
    """Drop what was made of the weights that have just changed: autocast's casts and gathered shards."""
    torch.clear_autocast_cache()
    for module in model.modules():
        reshard = getattr(module, "reshard", None)  # of FSDP
        if callable(reshard):
            reshard()
