"""How random weights are drawn, so that no parameter is left to chance.

Rule: matrices, convolutions and embeddings are normal with the config's `initializer_range`; biases are zero; a module
that holds parameters of its own says in `initialise(std)` what they start from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class MetaBuild(TorchFunctionMode):
    """Inside it modules are built without memory and without drawing values; a checkpoint is to fill them.

    `torch.device("meta")` alone would run every initialisation, the first of which costs seconds of imports.
    """

    def __enter__(self) -> MetaBuild:
        self._device = torch.device("meta")
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._device.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def initialise(root: nn.Module, std_of: Callable[[str], float], only: Collection[str] | None = None) -> None:
    """Initialise every parameter of `root`, or just those named in `only` (full names within `root`).

    `std_of(module_name)` is the standard deviation for a module. Deterministic under `torch.manual_seed`.
    """
    for name, module in root.named_modules():
        own = {f"{name}.{key}" if name else key: p for key, p in module.named_parameters(recurse=False)}
        if not own or (only is not None and not any(key in only for key in own)):
            continue
        kept = {} if only is None else {key: p.clone() for key, p in own.items() if key not in only}
        _initialise_own(module, std_of(name))
        for key, value in kept.items():
            own[key].copy_(value)


def _initialise_own(module: nn.Module, std: float) -> None:
    """Initialise the parameters that the module itself holds."""
    own_rule = getattr(module, "initialise", None)
    if callable(own_rule):
        own_rule(std)
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        module.reset_parameters()  # ones and zeros
    elif isinstance(getattr(module, "weight", None), nn.Parameter):
        nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    else:
        raise TypeError(f"{type(module).__name__} holds parameters but has no initialise(std)")
