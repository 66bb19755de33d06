"""Weight-only low precision: linear layers and experts whose weights are packed, and the swap of a model's layers.

What is packed is what decoding reads most: attention and feed-forward matrices and the experts of decoder layers.
Embeddings, norms, routers, heads and projections keep their precision. So does, unless asked for, the residual-code
head: an error in a code is heard, and every later code of the frame builds on it.

Shapes: N tokens, D model width, I expert width, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.layers.moe import Experts
from omni.layers.packed_weight import KINDS, PackedWeight, group_size

LAYERS = {"thinker": "thinker.layers.", "talker": "talker.layers.", "mtp": "talker.mtp.layers."}
DEFAULT_PARTS = ("thinker", "talker")
_FEW_OUTPUTS = 16  # a gate of one output gains nothing
_FEW_CHOICES = 32  # tokens times experts a token up to which a GPU gathers rather than waits for the host


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight. x [..., D] -> [..., O]."""

    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.register_parameter("bias", bias)
        self.training = False

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.packed.inputs

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.packed.outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed.matmul(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class QuantizedExperts(nn.Module):
    """Gated feed-forward experts with packed weights; stands where `Experts` stood."""

    gate_up: PackedWeight
    down: PackedWeight

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.backend: str | None = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, backend: str | None = None) -> Tensor:
        """x [N, D], ids and weights [N, k] -> [N, D].

        backend: "loop" unpacks one chosen expert after the other, "indexed" never asks the host which were chosen.
        None: the module's own, else indexed where the host must not wait (torch.compile, CUDA graphs) or a GPU has few
        tokens, and the loop everywhere else.
        """
        backend = backend or self.backend or _choose(x, ids)
        if backend == "loop":
            return self._loop(x, ids, weights)
        if backend == "indexed":
            return self._indexed(x, ids, weights)
        raise ValueError(f"experts backend {backend!r} is not one of indexed, loop for weights at low precision")

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up.matmul(x, expert).chunk(2, dim=-1)
        return self.down.matmul(F.silu(gate) * up, expert)

    def _loop(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if len(x) == 1:
            for choice, expert in enumerate(ids[0].tolist()):
                out += self._expert(x, expert) * weights[:, choice, None]
            return out
        for expert in ids.unique().tolist():
            token, place = torch.where(ids == expert)
            out.index_add_(0, token, self._expert(x[token], expert) * weights[token, place, None])
        return out

    def _indexed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k = ids.shape[1]
        experts, tokens = ids.flatten(), x.repeat_interleave(k, dim=0)  # [N * k], [N * k, D]
        gate, up = self.gate_up.matmul_rows(tokens, experts).chunk(2, dim=-1)
        y = self.down.matmul_rows(F.silu(gate) * up, experts) * weights.flatten()[:, None]
        return y.unflatten(0, (-1, k)).sum(1)


def _choose(x: Tensor, ids: Tensor) -> str:
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "indexed"
    return "indexed" if x.is_cuda and ids.numel() <= _FEW_CHOICES else "loop"


class Quantizer:
    """Swaps layers of chosen parts of a model for packed ones: all at once, or one by one as a loader brings them.

    kind: "int8", "int4" or "fp8". parts: some of "thinker", "talker", "mtp" (the Talker's residual-code head); those
    that the model was built without are skipped. Layers that `kind` cannot hold stay as they are. Raises ValueError
    for an unknown kind or part, or when nothing is left to pack.
    """

    def __init__(self, model: nn.Module, kind: str, parts: Sequence[str] = DEFAULT_PARTS) -> None:
        if kind not in KINDS:
            raise ValueError(f"quantize={kind!r} is not one of {', '.join(KINDS)}")
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        if not self.parts or any(part not in LAYERS for part in self.parts):
            raise ValueError(f"parts to quantize must name some of {', '.join(LAYERS)}, got {list(self.parts)}")
        self.model, self.kind = model, kind
        self.lock = Lock()  # of the swap: loaders use threads
        self.names = set(self._find())
        if not self.names:
            raise ValueError(
                f"there is nothing to quantise to {kind} in {', '.join(self.parts)}: the parts are absent, "
                "already quantised, or too narrow"
            )

    def _find(self) -> Iterator[str]:
        """Full names of the weights to pack."""
        prefixes = tuple(LAYERS[part] for part in self.parts)
        for name, module in self.model.named_modules():
            if not name.startswith(prefixes):
                continue
            if type(module) is nn.Linear and module.out_features >= _FEW_OUTPUTS and self._fits(module.weight):
                yield f"{name}.weight"
            elif isinstance(module, Experts) and self._fits(module.gate_up_proj) and self._fits(module.down_proj):
                yield f"{name}.gate_up_proj"
                yield f"{name}.down_proj"

    def _fits(self, weight: Tensor) -> bool:
        return self.kind != "int4" or group_size(weight.shape[-1]) is not None

    def take(self, name: str, value: Tensor) -> bool:
        """Pack a weight that is to be packed, put it in the model and return True; False for any other."""
        if name not in self.names:
            return False
        try:
            packed = PackedWeight.pack(value, self.kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        owner, _, leaf = name.rpartition(".")
        with self.lock:
            module = self.model.get_submodule(owner)
            if leaf == "weight":
                self._swap(owner, QuantizedLinear(packed, module.bias))  # type: ignore[arg-type]
                return True
            if not isinstance(module, QuantizedExperts):
                module = QuantizedExperts()
                self._swap(owner, module)
            setattr(module, leaf.removesuffix("_proj"), packed)
        return True

    def finish(self) -> None:
        """Pack what is still at full precision, layer by layer, and freeze what is left of the model."""
        for name in sorted(self.names):
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if isinstance(module, nn.Linear):
                self.take(name, module.weight)
            elif isinstance(module, Experts) and leaf == "down_proj":
                down, gate_up = module.down_proj, module.gate_up_proj
                self.take(name, down)
                self.take(f"{owner}.gate_up_proj", gate_up)
        self.model.requires_grad_(False)

    def _swap(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


def quantize(model: nn.Module, kind: str, parts: Sequence[str] = DEFAULT_PARTS) -> None:
    """Pack the weights of a model's decoder layers in place, for decoding only; see `Quantizer` for the arguments."""
    if model.training:
        raise ValueError("the model is in training mode and weights at low precision cannot be trained; call eval()")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("the model holds offloaded weights, which cannot be quantised; load it without device_map")
    Quantizer(model, kind, parts).finish()


def packed_kind(model: nn.Module) -> str | None:
    """The kind of a model's first packed weight, None if it has none."""
    return next((module.kind for module in model.modules() if isinstance(module, PackedWeight)), None)
