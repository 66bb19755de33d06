"""How the steps of decoding are run: as written, or compiled by torch.compile.

A step is a function of a module and tensors; whatever it keeps lies in states that it updates in place, and nothing
depends on a value that is on the device. That is why the same step can be run as written, be compiled, or be captured
as a CUDA graph, with the same ids and codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from omni.generation.sampling import RowSampling
from omni.layers.decoder_layer import run_layer
from omni.layers.decoder_state import DecoderState
from omni.talker.mtp import MTP


def codec_step(codec: Any, codes: Tensor, state: Any) -> Tensor:
    """codes int64 [B, K, n] -> samples [B, m]."""
    wave: Tensor = codec.step(codes, state)
    return wave


@dataclass
class Steps:
    """The pieces that a token and a speech frame are made of.

    layer: one decoder layer of the Thinker or the Talker; residual: the logits of one residual code (None: as `MTP`
    does it); draw: `RowSampling.draw`; codec: a chunk of sound. static: each shape costs a compilation, so there
    should be few.
    """

    layer: Callable[..., Tensor] = run_layer
    residual: Callable[..., Tensor] | None = None
    draw: Callable[..., Tensor] = RowSampling.draw
    codec: Callable[..., Tensor] = codec_step
    static: bool = False

    def thinker(self, thinker: Any, ids: Tensor, state: DecoderState, span: int | None) -> tuple[Tensor, Tensor]:
        """The Thinker reads ids int64 [B] -> (logits of the next token [B, V], final hidden [B, D])."""
        logits, final = thinker.decode(ids, state.step_positions(), state.cache.decode(span), self.layer)
        return logits, final

    def talker(self, talker: Any, embeds: Tensor, state: DecoderState, span: int | None) -> tuple[Tensor, Tensor]:
        """The Talker reads embeds [B, Di] -> (logits of codebook 0 [B, C], hidden [B, D])."""
        logits, hidden = talker.decode(embeds, state.step_positions(), state.cache.decode(span), self.layer)
        return logits, hidden

    def begin_turn(self) -> None:
        """Called before a turn: what has been compiled must fit the modules as they are now."""
        for step in (self.layer, self.residual, self.codec):
            if isinstance(step, CompiledByModule):
                step.look_again()


class CompiledByModule:
    """A step `f(module, ...)` compiled once for each kind of module, which is looked at once a turn.

    torch.compile would check every parameter of the module at every call, which takes longer than a narrow layer. Here
    two modules are of one kind if type, structure, parameters (names, shapes, types, places), plain attributes and
    hooks agree; each kind has its own compiled function, whose checks of the module are left out.
    """

    def __init__(self, step: Callable[..., Tensor], backend: Any) -> None:
        self.step, self.backend = step, backend
        self._of_kind: dict[Any, Callable[..., Tensor]] = {}
        self._of_module: dict[int, Callable[..., Tensor]] = {}

    def __call__(self, module: nn.Module, *arguments: Any) -> Tensor:
        compiled = self._of_module.get(id(module))
        if compiled is None:
            kind = _kind(module)
            if kind not in self._of_kind:
                self._of_kind[kind] = self._compile()
            compiled = self._of_module[id(module)] = self._of_kind[kind]
        return compiled(module, *arguments)

    def look_again(self) -> None:
        """Take no module for what it was: it may have been moved or changed."""
        self._of_module.clear()

    def _compile(self) -> Callable[..., Tensor]:
        # torch keeps what it compiles by code object, and by name which sizes have changed and count as variable since
        code = self.step.__code__.replace(co_name=f"{self.step.__name__}_{next(_numbers)}")
        copy = FunctionType(code, self.step.__globals__, code.co_name)
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        return torch.compile(copy, fullgraph=True, backend=self.backend, options=options)


_numbers = count()  # of all compiled functions of this process


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What decides how a module computes, but for the values of its parameters."""
    plain = (bool, int, float, str, type(None))
    parts = [
        (
            name,
            type(part),
            len(part._forward_hooks) + len(part._forward_pre_hooks),
            tuple((k, v) for k, v in vars(part).items() if isinstance(v, plain)),
        )
        for name, part in module.named_modules()
    ]
    tensors = [
        (n, t.shape, t.stride(), t.dtype, t.device) for n, t in (*module.named_parameters(), *module.named_buffers())
    ]
    return (*parts, *tensors)


def compiled_steps(backend: Any = None) -> Steps:
    """Steps that torch.compile turns into fused kernels when they are first used (for each batch size).

    backend: of torch.compile (None: inductor, see inductor.py). A decoder is compiled by the layer, so that compiling
    takes seconds however deep it is.
    """
    if backend is None:
        from omni.generation.inductor import one_row_inductor as backend  # imports the compiler
    # Each width, kind of layer and batch size is a variant of its own; torch stops at 8 of them by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)

    def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(step, fullgraph=True, backend=backend)

    draw_random = compiled(RowSampling.draw)

    def draw(sampling: RowSampling, *arguments: Any) -> Tensor:
        return draw_random(sampling, *arguments) if sampling.any_random else sampling.draw(*arguments)

    return Steps(
        layer=CompiledByModule(run_layer, backend),
        residual=CompiledByModule(MTP.code_logits, backend),
        draw=draw,
        codec=CompiledByModule(codec_step, backend),
        static=True,
    )
