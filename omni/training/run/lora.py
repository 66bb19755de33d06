"""Low-rank adaptation (LoRA, Hu et al., 2021) of linear layers and of stacked experts.

W stays as it is and alpha / r * B A is learnt beside it; B starts at zero. Linear layers are PEFT's own. Experts have
factors of their own here, because PEFT adds the product to the stacked weight at every forward, which then needs a
gradient as large as the weight; the low-rank path of chosen tokens costs a fraction of that.

Shapes: N tokens, k experts a token, S = N * k pairs sorted by expert, D model width, E experts, I expert width, r rank,
O outputs of a matrix.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from omni.checkpoint.adapters import WEIGHTS
from omni.checkpoint.keys import KeyTable
from omni.config.writing import atomic_folder
from omni.layers.experts_backends import EXPERTS, GROUPED_DTYPES, grouped_product, invert, sort_pairs, spans_of
from omni.layers.moe import Experts
from omni.layers.quantized import packed_kind

_ADAPTER = "default"  # PEFT's name of a sole adapter
_STACKED = ("gate_up_proj", "down_proj")
_LOOKED_AT = 64  # rows of a weight that tell it from another


class LoRAExperts(Experts):
    """Experts with frozen weights and low-rank updates for each expert; stands where `Experts` stood.

    Factors: gate_up_lora_A [E, r, D], gate_up_lora_B [E, 2I, r], down_lora_A [E, r, I], down_lora_B [E, D, r]. With
    `backend` None the factors are applied to the chosen tokens; a backend that is named computes with the updated
    weights instead, at the cost of making them (and without dropout).
    """

    def __init__(self, experts: Experts, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self.backend = experts.gate_up_proj, experts.down_proj, experts.backend
        self.rank, self.alpha = rank, alpha
        self.dropout = nn.Dropout(dropout)
        for stacked in _STACKED:
            weight = getattr(self, stacked)
            (number, outputs, inputs), dtype = weight.shape, _factor_dtype(weight)
            for letter, shape in (("A", (number, rank, inputs)), ("B", (number, outputs, rank))):
                factor = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
                self.register_parameter(_factor_name(stacked, letter), factor)
            bound = inputs**-0.5  # as PEFT's linear layers: uniform within 1 / sqrt(inputs)
            nn.init.uniform_(getattr(self, _factor_name(stacked, "A")), -bound, bound)
        self.train(experts.training)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def factors(self, stacked: str) -> tuple[Tensor, Tensor]:
        """A [E, r, inputs] and B [E, outputs, r] of "gate_up_proj" or "down_proj"."""
        return getattr(self, _factor_name(stacked, "A")), getattr(self, _factor_name(stacked, "B"))

    def updated(self, stacked: str) -> Tensor:
        """The stacked weight with its update [E, O, inputs], differentiable, in the weight's type."""
        a, b = self.factors(stacked)
        return _updated(getattr(self, stacked), b @ a, self.scale)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, backend: str | None = None) -> Tensor:
        """x [N, D], ids and weights [N, k] -> [N, D]. ValueError for an unknown backend."""
        if (named := backend or self.backend) is not None:
            if named not in EXPERTS:
                raise ValueError(f"experts backend {named!r} is not one of {sorted(EXPERTS)}")
            return EXPERTS[named](x, ids, weights, self.updated("gate_up_proj"), self.updated("down_proj"))
        order, ends = sort_pairs(ids, self.gate_up_proj.shape[0])
        rows = x.index_select(0, order // ids.shape[1])
        gate, up = self._product(rows, "gate_up_proj", ends).chunk(2, dim=-1)
        y = self._product(F.silu(gate) * up, "down_proj", ends)
        y = y.index_select(0, invert(order)).view(*ids.shape, x.shape[1])
        return (y * weights[..., None]).sum(1)

    def _product(self, rows: Tensor, stacked: str, ends: Tensor) -> Tensor:
        """Sorted pairs [S, inputs] through each one's own expert, weight and update -> [S, O]."""
        a, b = (factor.to(rows.dtype) for factor in self.factors(stacked))
        whole = _each_expert(rows, getattr(self, stacked), ends)
        low = _each_expert(_each_expert(self.dropout(rows), a, ends), b, ends)
        return whole + self.scale * low


def add_lora(
    model: nn.Module,
    patterns: str | Sequence[str],
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    experts: bool = True,
) -> list[str]:
    """Give low-rank updates to the layers that the patterns name, and freeze every parameter that was there.

    patterns: of full module names with `*` and `?`, such as "thinker.layers.*.self_attn.?_proj" or "talker.layers.*";
    what they match of linear layers and, unless `experts` is False, of stacked experts is adapted. rank, alpha: the
    update is alpha / rank * B A. dropout: on the input of A, while training. Factors are fp32 where the weights are
    16-bit. Until a step is taken, the model computes what it did before. Returns the names of the trainable parameters.
    Raises ValueError for a pattern that matches nothing, impossible sizes, quantised weights or a model that already
    has LoRA, and says how to install PEFT where it is missing.
    """
    _check(model, rank, alpha, dropout)
    linear, stacked = _targets(model, [patterns] if isinstance(patterns, str) else list(patterns), experts)
    peft = _peft() if linear else None
    model.requires_grad_(False)
    if peft is not None:
        # PEFT sees the layers alone: in a model with a config it would go by transformers' rules for that model_type
        layers = nn.ModuleDict({str(i): model.get_submodule(name) for i, name in enumerate(linear)})
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(layers))
        peft.inject_adapter_in_model(config, layers, _ADAPTER)
        for name, layer in zip(linear, layers.values()):
            for factor in _linear_factors(layer):
                factor.data = factor.data.to(_factor_dtype(factor))
            _replace(model, name, layer)
    for name in stacked:
        _replace(model, name, LoRAExperts(model.get_submodule(name), rank, alpha, dropout))  # type: ignore[arg-type]
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add all updates to their weights and put the plain layers back, in place; parameters stay frozen or not.

    The result saves, loads and computes as any model. Sums are taken in fp32 and rounded once. ValueError if there is
    no LoRA in the model.
    """
    for name, layer in _required(model):
        if isinstance(layer, LoRAExperts):
            for stacked in _STACKED:
                getattr(layer, stacked).copy_(layer.updated(stacked))
            _replace(model, name, _plain(layer))
        else:
            base, (a, b) = layer.get_base_layer(), _linear_factors(layer)
            base.weight.copy_(_updated(base.weight, b @ a, layer.scaling[_ADAPTER]))
            _replace(model, name, base)


class LoRABase:
    """Remembers in a run's checkpoints which weights its low-rank updates belong to: a run that goes on must not add
    them to weights that hold them already, such as its own export in the place of the checkpoint it started from.

    The number is made of some rows of every weight that has an update. Where the model is spread over processes none is
    made, and `changed` stays False.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.changed = model, False

    def state_dict(self) -> dict[str, int]:
        """The number, 0 where none is made."""
        value = 0
        for _, layer in _lora_layers(self.model):
            experts = isinstance(layer, LoRAExperts)
            weights = [getattr(layer, name) for name in _STACKED] if experts else [layer.base_layer.weight]
            for weight in weights:
                if type(weight.data) is not Tensor:
                    return {"crc32": 0}
                rows = weight.detach().flatten(0, -2)
                rows = rows[:: max(1, len(rows) // _LOOKED_AT)].contiguous().cpu()
                value = zlib.crc32(rows.view(torch.uint8).numpy().tobytes(), value)
        return {"crc32": value}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Compare with what a checkpoint remembers."""
        self.changed = self.state_dict() != dict(state)


def save_lora(
    model: nn.Module,
    folder: str | Path,
    names: Literal["transformers", "hub"] = "transformers",
    table: KeyTable | None = None,
) -> None:
    """Write the updates as a PEFT adapter, atomically.

    `OmniModel.from_pretrained(base, adapter=folder)` then computes what this model does. names: those of the modules of
    transformers 5, for PEFT, or the Hub's, which other programs go by; omni reads both. table: of the model's family
    (None: the model's own). ValueError if there is no LoRA
    in the model or for other names, OSError where the folder cannot be written.
    """
    if names not in ("transformers", "hub"):
        raise ValueError(f"names {names!r} is neither 'transformers' nor 'hub'")
    own: Any = model.key_table if table is None else table
    family: KeyTable = own
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    rank, alpha, dropout = 0, 0.0, 0.0
    for name, layer in _required(model):
        saved = _saved_name(name, names, family)
        if isinstance(layer, LoRAExperts):
            rank, alpha = layer.rank, layer.alpha
            for depth, stacked in enumerate(_STACKED):
                # PEFT wraps one parameter around the other, here down_proj the outermost
                key = f"base_model.model.{saved}{'' if depth else '.base_layer'}"
                a, b = layer.factors(stacked)
                tensors[f"{key}.lora_A.weight"] = a.flatten(0, 1)  # [E * r, inputs]
                tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)  # [outputs, r * E]
                parameters.append(f"{saved}.{stacked}")
        else:
            rank, alpha = layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER]
            dropout = getattr(layer.lora_dropout[_ADAPTER], "p", 0.0)
            for letter, factor in zip("AB", _linear_factors(layer)):
                tensors[f"base_model.model.{saved}.lora_{letter}.weight"] = factor
            modules.append(saved)
    # PEFT refuses dropout on parameters when it loads them; trained factors do not depend on it
    config = _peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0 if parameters else dropout, target_modules=modules,
        **({"target_parameters": parameters} if parameters else {}), inference_mode=True,
    )  # fmt: skip
    with atomic_folder(Path(folder)) as target:
        config.save_pretrained(target)
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(kept, target / WEIGHTS, metadata={"format": "pt"})


def _peft() -> Any:
    """The PEFT package; ImportError with the remedy where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs the package peft; install it with: pip install 'thinker-talker[peft]'") from error
    return peft


def _check(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"LoRA rank {rank!r} must be a whole number of at least 1")
    if not alpha > 0:
        raise ValueError(f"LoRA alpha {alpha!r} must be positive; it scales the update by alpha / rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout {dropout!r} must lie in 0 .. 1 (1 excluded)")
    if (kind := packed_kind(model)) is not None:
        raise ValueError(f"the model's weights were rounded to {kind}; load it without quantize= to train it")
    if any(True for _ in _lora_layers(model)):
        raise ValueError("the model already has LoRA; merge it first with merge_lora, or name all layers in one call")


def _targets(model: nn.Module, patterns: list[str], experts: bool) -> tuple[list[str], list[str]]:
    """Names of the linear layers and of the stacked experts that the patterns match; each must match something."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, Experts) if experts else (nn.Linear,)
    names = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(
                f"LoRA pattern {pattern!r} matches no linear layer{' and no stacked experts' if experts else ''}; "
                f"names are like {near[0] if near else 'none: the model has no such layers'}"
            )
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError("no patterns were given; name the layers that LoRA is for, such as 'thinker.layers.*'")
    linear = [name for name in chosen if isinstance(names[name], nn.Linear)]
    return linear, [name for name in chosen if isinstance(names[name], Experts)]


def _is_peft_linear(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and _ADAPTER in getattr(module, "lora_A", ())


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of all layers with LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAExperts) or _is_peft_linear(module):
            yield name, module


def _required(model: nn.Module) -> list[tuple[str, Any]]:
    if not (layers := list(_lora_layers(model))):
        raise ValueError("the model has no LoRA; give it some with add_lora")
    return layers


def _linear_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [r, inputs] and B [outputs, r] of a linear layer."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _saved_name(name: str, names: str, table: KeyTable) -> str:
    """What a module of ours is called in an adapter's file."""
    name += "."  # prefixes in the table end in one, and may be all of a name
    hub = table.to_hub(name)
    if names == "transformers":
        for own, theirs in table.also_read:
            if name.startswith(own) and hub.removesuffix(name.removeprefix(own)) == table.to_hub(own):
                return (theirs + name.removeprefix(own)).removesuffix(".")
    return hub.removesuffix(".")


def _factor_name(stacked: str, letter: str) -> str:
    return f"{stacked.removesuffix('_proj')}_lora_{letter}"


def _factor_dtype(weight: Tensor) -> torch.dtype:
    """fp32 at least: an optimizer's small steps vanish in 16 bits."""
    return torch.promote_types(weight.dtype, torch.float32)


def _updated(weight: Tensor, product: Tensor, scale: float) -> Tensor:
    """weight + scale * product, rounded once to the weight's type."""
    wide = _factor_dtype(weight)
    return (weight.to(wide) + scale * product.to(wide)).to(weight.dtype)


def _each_expert(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [S, K] sorted by expert, matrices [E, M, K] -> [S, M], differentiable.

    torch's grouped product where type and both widths allow it (rows of 16 bytes), else one product an expert.
    """
    aligned = all(width * rows.element_size() % 16 == 0 for width in matrices.shape[1:])
    if aligned and rows.dtype in GROUPED_DTYPES and not torch.compiler.is_compiling():
        return grouped_product(rows, matrices.transpose(1, 2), ends)
    return torch.cat([rows[start:end] @ matrices[expert].t() for expert, (start, end) in enumerate(spans_of(ends))])


def _plain(experts: LoRAExperts) -> Experts:
    """`Experts` with the same weights."""
    with torch.device("meta"):
        plain = Experts(1, 1, 1)
    plain.gate_up_proj, plain.down_proj, plain.backend = experts.gate_up_proj, experts.down_proj, experts.backend
    return plain.train(experts.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
