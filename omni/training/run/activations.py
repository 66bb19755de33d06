"""Activation checkpointing from outside: the model's files know nothing of it.

No shapes of its own: a layer's inputs and outputs are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from omni.code2wav.window_transformer import WindowLayer
from omni.encoders.audio import AudioLayer
from omni.encoders.vision import VisionBlock
from omni.layers.decoder_layer import DecoderLayer
from omni.layers.moe import RouterLog

LAYERS: tuple[type[nn.Module], ...] = (DecoderLayer, AudioLayer, VisionBlock, WindowLayer)


@contextmanager
def checkpoint_activations(model: nn.Module, layers: tuple[type[nn.Module], ...] = LAYERS) -> Iterator[None]:
    """Inside the block, transformer layers keep only their inputs and compute the rest again in the backward pass.

    Memory for time (Chen et al., 2016); gradients are the same. Nothing changes where no gradient is recorded.
    """
    touched = [module for module in model.modules() if isinstance(module, layers)]
    own = {id(module): module.__dict__.get("forward") for module in touched}
    for module in touched:
        module.forward = _checkpointed(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in touched:
            before = own[id(module)]
            if before is None:
                del module.forward
            else:
                module.forward = before  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that is run again for its backward. Lists among its arguments, those of router logits too, are
    filled once, by results of the first run: the second must not append to them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, RouterLog))]

        def fresh(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
            new: list[Any] = []

            def own(value: Any) -> Any:
                if not isinstance(value, (list, RouterLog)):
                    return value
                new.append(type(value)())
                return new[-1]

            return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()}), new

        result, filled = checkpoint(fresh, *args, use_reentrant=False, **kwargs)
        for old, new in zip(lists, filled):
            for value in new:
                old.append(value)
        return result

    return run
