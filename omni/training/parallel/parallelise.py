"""Many processes on a finished model: sharded data parallelism, expert and tensor parallelism (the model is unchanged).

    device = init_from_env()                                  # started by torchrun or accelerate launch
    mesh = make_mesh(config := ParallelConfig(expert=2), device.type)
    parallelise(model, mesh, config)                          # before the optimiser is made
    ...
    loss.total / sum_over_ranks(loss.count, mesh)             # every process: its own sum, the count of all
    backward, sum_gradients(model, mesh), clip_grad_norm(model.parameters(), 1.0), optimizer.step()

Losses are sums over items divided by the count of all processes, so gradients are summed over processes, not averaged:
a step equals that of one process on the union of the batches.

What is sharded (FSDP2, Zhao et al., 2023), each a unit that is gathered when it runs: the decoder layers of Thinker,
Talker and residual-code head, the layers of both encoders, the vision mergers, the Thinker's embedding and head. All
other parameters (norms, projections, codec embeddings and heads, convolutions, Code2Wav; 0.3 of the release's 35
billion) stay whole on every process, so that each function of a part may be called as often as a process likes; their
gradients are summed by `sum_gradients`. The sharded units run in the same order and number on every process: each
batch holds each modality on all processes or on none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omni.encoders.audio import AudioLayer
from omni.encoders.vision import PatchMerger, VisionBlock
from omni.layers.decoder_layer import DecoderLayer
from omni.layers.moe import Experts
from omni.model import OmniModel
from omni.training.parallel.processes import BATCH_DIMS, process_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_UNITS = (DecoderLayer, AudioLayer, VisionBlock, PatchMerger)
_BUCKET = 1 << 26  # numbers that are summed over processes at once
_RESHARDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a unit is spread again when it has run


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work; data * expert * tensor of them are needed.

    data: groups that read different data (None: as many as there are processes for); shard: also spread parameters,
    gradients and optimiser state over them (False: each keeps all); expert: processes that share the experts of a
    layer, each reading different data as well; tensor: processes that share heads and dense widths of a layer and read
    the same data; sequence: with tensor, also cut the tokens inside layers. Raises ValueError for impossible values.
    """

    data: int | None = None
    shard: bool = True
    expert: int = 1
    tensor: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor"):
            value = getattr(self, name)
            if not (name == "data" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a number of processes of at least 1, got {value!r}")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence cuts tokens over the processes of tensor=, which is 1; set tensor, or leave it")
        if self.shard and self.expert > 1 and self.tensor > 1:
            raise ValueError("expert and tensor parallelism together need shard=False: FSDP2 shards beside one of them")


def make_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """The processes as a grid [data, expert, tensor]; neighbours in rank share a tensor group, then an expert group.

    device_type: "cuda" or "cpu". Raises ValueError without a process group or where the numbers do not fit.
    """
    if not dist.is_initialized():
        raise ValueError("there is no process group; start with torchrun or accelerate launch and call init_from_env")
    from torch.distributed.device_mesh import init_device_mesh

    world, others = process_count(), config.expert * config.tensor
    data = world // others if config.data is None else config.data
    if data * others != world:
        raise ValueError(
            f"data={config.data} x expert={config.expert} x tensor={config.tensor} does not make up the {world} "
            "processes that were started"
        )
    return init_device_mesh(device_type, (data, config.expert, config.tensor), mesh_dim_names=(*BATCH_DIMS, "tensor"))


def parallelise(
    model: OmniModel,
    mesh: DeviceMesh,
    config: ParallelConfig,
    *,
    mixed_precision: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Spread a finished model, equal on all processes, over the mesh, in place; make the optimiser afterwards.

    mixed_precision: the type in which shards are gathered and computed, under torch.autocast of that type; gradients
    are summed in fp32. reshard_after_forward=False keeps gathered weights until the backward pass has used them: more
    memory, less traffic. Parameter names stay, and so do `requires_grad` and the weights' values. Freeze parameters and
    wrap layers for activation checkpointing before. Raises ValueError for what cannot be shared out.
    """
    device = _device(mesh)
    if config.tensor > 1:
        from omni.training.parallel.tensor_parallel import cut_layers

        cut_layers(model, mesh["tensor"], sequence=config.sequence)
    if config.expert > 1:
        from omni.training.parallel.expert_parallel import shard_experts

        shard_experts(model, mesh["expert"])
    if config.shard and mesh["data"].size() * config.expert > 1:
        _shard(model, mesh, config, mixed_precision, reshard_after_forward)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _shard(
    model: OmniModel, mesh: DeviceMesh, config: ParallelConfig, dtype: torch.dtype | None, reshard: bool
) -> None:
    """`fully_shard` of every unit, innermost first, then of what holds them, which has no weights of its own left."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    # inputs are not cast: positions and rotary tables are fp32 whatever the weights are
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    batch = mesh["data"] if config.expert == 1 else mesh[BATCH_DIMS]._flatten("batch")
    units: list[nn.Module] = []

    def sharded(module: nn.Module, mesh: Any, again: bool, **options: Any) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=again, mp_policy=policy, **options)
        _RESHARDS[module] = again
        units.append(module)

    if config.expert > 1:
        for experts in [m for m in model.modules() if isinstance(m, Experts)]:
            # along another axis than the experts are, which each process of the expert group holds a part of
            _check_width(experts, mesh["data"].size())
            sharded(experts, mesh["data"], reshard, shard_placement_fn=lambda parameter: Shard(1))
    for module in _units(model):
        # an embedding is looked up as often as a process likes: gathered once, kept until the backward pass ends
        sharded(module, batch, reshard and not isinstance(module, nn.Embedding))
    inside = {id(p) for unit in units for p in unit.parameters()}
    whole = {p for p in model.parameters() if id(p) not in inside}
    for module in (*([model.talker.mtp] if model.talker is not None else []), *model.children(), model):
        if module is model or any(isinstance(m, FSDPModule) for m in module.modules()):
            sharded(module, batch, reshard, ignored_params=whole)
    for module in units:
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if isinstance(module, DecoderLayer):
            module.register_forward_pre_hook(_fill_through, prepend=True, with_kwargs=True)
        if isinstance(module, nn.Embedding):  # how often it was called must not decide what is gathered next
            module.set_modules_to_backward_prefetch([module])
    _enter_root(model, register_fsdp_forward_method)


class _Outlet(list[Any]):
    """Stands before a list that a layer fills (router logits): what is put in here goes there."""

    def __init__(self, target: list[Any]) -> None:
        super().__init__()
        self.target = target

    def append(self, item: Any) -> None:
        self.target.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.target.extend(items)


def _fill_through(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Runs before FSDP's own hook, which gives a layer copies of the lists among its arguments."""

    def outlet(value: Any) -> Any:
        return _Outlet(value) if isinstance(value, list) else value

    return tuple(map(outlet, args)), {name: outlet(value) for name, value in kwargs.items()}


def _units(model: OmniModel) -> Iterator[nn.Module]:
    """Modules that are gathered one at a time."""
    for module in model.modules():
        if isinstance(module, _UNITS):
            yield module
    thinker = model.thinker
    if thinker is not None and thinker.embed_tokens.weight is not thinker.lm_head.weight:  # tied ones stay whole
        yield from (thinker.embed_tokens, thinker.lm_head)


def _check_width(experts: nn.Module, ranks: int) -> None:
    for name, parameter in experts.named_parameters():
        if parameter.shape[1] % ranks:
            raise ValueError(
                f"{name} of the experts is {parameter.shape[1]} wide, which data={ranks} does not divide; "
                "choose a divisor, or shard=False"
            )


def _enter_root(model: OmniModel, register: Callable[[nn.Module, str], None]) -> None:
    """Make the model the root of its units once, so that parts and layers may be called on their own from now on."""
    root: Any = model
    root._enter = lambda: None
    register(root, "_enter")
    root._enter()
    del root._enter


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block each process holds all of what FSDP spreads, and the model may be run in any way: generating
    reads weights outside the calls of their layers. Without gradients; all processes must enter it together. Memory:
    the whole model."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(_RESHARDS.get(unit, True), recurse=False)
            unit.reshard()


def full_weight(parameter: Tensor) -> Tensor:
    """The whole of a parameter that may be sharded, differentiable, for losses that use a weight itself.

    A parameter that is whole already is returned as it is. All processes must call it together. The gradient reaches
    the shards summed over processes that read different data.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(parameter, DTensor):
        return parameter
    names = parameter.device_mesh.mesh_dim_names or ()
    placements = [Replicate() if name == "tensor" else Partial() for name in names]
    return parameter.full_tensor(grad_placements=placements)


@torch.no_grad()
def sum_gradients(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """After the last backward pass of a step: sum the gradients that FSDP did not over the processes, in place.

    A parameter that got a gradient on some processes only counts as zero on the others; one without any keeps none.
    Without a mesh all processes read different data and hold whole parameters; without a group nothing happens.
    """
    if process_count() == 1:
        return
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                _place_gradient(parameter)
                key = (_sums_over(module, parameter, mesh), parameter.dtype)
                groups.setdefault(key, []).append(parameter)
    for (dims, _), parameters in groups.items():
        unique = list(dict.fromkeys(parameters))  # tied ones once
        if dims != () and (mesh is None or any(mesh[name].size() > 1 for name in dims)):
            _sum_group(unique, [None] if mesh is None else [mesh.get_group(n) for n in dims if mesh[n].size() > 1])


def _place_gradient(parameter: Any) -> None:
    """Finish the sum over a tensor group that autograd leaves open where the parameter is whole in it."""
    grad = parameter.grad
    if hasattr(grad, "placements") and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


def _sums_over(module: nn.Module, parameter: Tensor, mesh: DeviceMesh | None) -> tuple[str, ...] | None:
    """Names of the mesh dimensions over which this parameter's gradient is still to be summed (None: the world)."""
    if mesh is None:
        return None
    from torch.distributed.tensor import DTensor

    summed: set[str] = set()
    if isinstance(parameter, DTensor):
        names = set(parameter.device_mesh.mesh_dim_names or ())
        summed = set(BATCH_DIMS) if "batch" in names else names
    dims = [name for name in BATCH_DIMS if name not in summed]
    if mesh["tensor"].size() > 1:
        from omni.training.parallel.tensor_parallel import PARTIAL_NORMS

        if module in PARTIAL_NORMS:
            dims.append("tensor")
    return tuple(dims)


def _sum_group(parameters: list[nn.Parameter], groups: list[Any]) -> None:
    """Sum the local gradients of these parameters over each group in turn, some `_BUCKET` numbers at a time."""
    device = _local(parameters[0]).device
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(reached, group=group)
    chosen = [p for p, n in zip(parameters, reached.tolist()) if n]
    while chosen:
        bucket = [chosen.pop()]
        while chosen and sum(_local(p).numel() for p in bucket) + _local(chosen[-1]).numel() <= _BUCKET:
            bucket.append(chosen.pop())
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [_local(p.grad) for p in bucket if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        for group in groups:
            dist.all_reduce(flat, group=group)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad))


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm` -> the norm before, fp32 or wider.

    As `torch.nn.utils.clip_grad_norm_`, for any mixture of whole and sharded parameters; call it on every process after
    `sum_gradients`. A norm that is not finite leaves the gradients as they are; look at the result.
    """
    from torch.distributed.tensor import DTensor

    chosen = [p for p in parameters if p.requires_grad]
    if not chosen:
        return torch.zeros(())
    device = _local(chosen[0]).device
    squares: dict[tuple[Any, ...], Tensor] = {}
    for p in chosen:
        key: tuple[Any, ...] = ()
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            key = tuple(mesh.get_group(i) for i, placement in enumerate(p.placements) if not placement.is_replicate())
        square = squares.setdefault(key, torch.zeros((), device=device))
        if p.grad is not None:
            grad = _local(p.grad)
            squares[key] = square + grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum().to(device)
    for key, square in squares.items():
        for group in key:
            dist.all_reduce(square, group=group)
    norm = torch.stack(list(squares.values())).sum().sqrt()
    if norm.isfinite() and norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for p in chosen:
            if p.grad is not None:
                grad = _local(p.grad)
                grad.mul_(scale.to(grad))
    return norm
