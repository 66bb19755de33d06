"""Tensor parallelism: attention heads and the width of dense feed-forward layers spread over processes.

As in Megatron-LM (Shoeybi et al., 2019): the first matrices of a block are cut by output, the last by input, one sum
over processes a block. With `sequence` each layer also keeps its residual stream and norms cut along the tokens
(Korthikanti et al., 2022), which bounds what autograd remembers of them; between layers the stream is whole, because
DeepStack taps are added there. Routed experts are not cut (expert parallelism spreads them), nor embeddings, heads and
encoders. There is no context parallelism: torch's ring attention takes neither grouped queries with packed rows nor
the key-value caches used here. Cached decoding is not offered either: a state has room for all heads.

Shapes: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from omni.layers.decoder_layer import DecoderLayer, SelfAttention
from omni.layers.swiglu import SwiGLU

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Their weights are whole on every process, but each process sees the gradient of its own heads or tokens only.
PARTIAL_NORMS: WeakSet[nn.Module] = WeakSet()


def cut_layers(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> list[str]:
    """Spread every decoder layer of a model over a one-dimensional mesh; returns the names of the layers.

    Parameter names stay. `SelfAttention.heads` and `kv_heads` become those of this process. Raises ValueError where
    heads or widths cannot be shared out evenly, where a layer is not plain linear layers, or where there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DecoderLayer)}
    if not layers:
        raise ValueError("tensor parallelism was asked for, but the model has no decoder layers; use tensor=1")
    for name, layer in layers.items():
        _check(name, layer, mesh.size())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in layers.values():
        _cut_attention(layer.self_attn, mesh, sequence)
        for module in layer.mlp.modules():
            if isinstance(module, SwiGLU):
                _cut_swiglu(module, mesh, sequence and module is layer.mlp)
        if sequence:
            _cut_sequence(layer, mesh)
    for name, parameter in model.named_parameters():  # torch makes new parameters, some without the old one's flag
        parameter.requires_grad_(trained[name])
    return list(layers)


def _check(name: str, layer: DecoderLayer, ranks: int) -> None:
    attention = layer.self_attn
    for kind, heads in (("attention", attention.heads), ("key-value", attention.kv_heads)):
        if heads % ranks:
            raise ValueError(
                f"{name} has {heads} {kind} heads, which {ranks} processes cannot share evenly; "
                "choose a common divisor of all head counts for tensor="
            )
    for key, module in layer.named_modules():
        if isinstance(module, SwiGLU) and (width := module.down_proj.in_features) % ranks:
            raise ValueError(f"{name}.{key} is {width} wide, which tensor={ranks} does not divide; choose a divisor")
        if isinstance(module, (SwiGLU, SelfAttention)):
            for child, linear in module.named_children():
                if child.endswith("_proj") and type(linear) is not nn.Linear:
                    raise ValueError(
                        f"{name}.{key}.{child} is a {type(linear).__name__}; tensor parallelism takes plain linear "
                        "layers: merge LoRA first, or use tensor=1"
                    )


def _cut_attention(attention: SelfAttention, mesh: DeviceMesh, sequence: bool) -> None:
    """Heads over processes; the norms of queries and keys are whole and see their own heads."""
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(attention, mesh, {**plan, "o_proj": _last(sequence)})
    attention.heads //= mesh.size()
    attention.kv_heads //= mesh.size()
    PARTIAL_NORMS.update((attention.q_norm, attention.k_norm))
    attention.register_forward_pre_hook(_Whole(mesh))


def _cut_swiglu(mlp: SwiGLU, mesh: DeviceMesh, sequence: bool) -> None:
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": _last(sequence)}
    parallelize_module(mlp, mesh, plan)
    mlp.register_forward_pre_hook(_Whole(mesh))


def _last(sequence: bool) -> RowwiseParallel:
    """The last matrix of a block: its sum over processes is whole, or each process keeps its tokens of it."""
    return RowwiseParallel(output_layouts=Shard(1), use_local_output=False) if sequence else RowwiseParallel()


class _Whole:
    """Before a block that is cut: its input is whole on every process, and the gradients of all its uses are summed
    over processes once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return (x.redistribute(placements=[Replicate()]), *args[1:])


def _cut_sequence(layer: DecoderLayer, mesh: DeviceMesh) -> None:
    """Inside a layer tokens over processes: x [B, T, D] is cut on entry, whole for each block, joined on exit."""
    for norm in ("input_layernorm", "post_attention_layernorm"):
        parallelize_module(layer, mesh, {norm: SequenceParallel()})

    def cut(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)])

    def join(x: Tensor) -> Tensor:  # what follows is computed alike by all, so the gradient is whole as well
        assert isinstance(x, DTensor)
        return x.redistribute(placements=[Replicate()]).to_local()

    layer.register_forward_pre_hook(lambda module, args: (cut(args[0]), *args[1:]))
    layer.register_forward_hook(lambda module, args, out: join(out).clone())  # no view: FSDP2 warns of those
    if not isinstance(layer.mlp, SwiGLU):  # routed experts: every process computes all tokens
        layer.mlp.register_forward_pre_hook(lambda module, args: (join(args[0]), *args[1:]))
        layer.mlp.register_forward_hook(lambda module, args, out: cut(out))
