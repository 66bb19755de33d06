"""Expert parallelism: each process of a group holds some experts of every layer, and tokens travel to them and back.

As in GShard (Lepikhin et al., 2020), without a capacity: no token is dropped, so the result is that of the whole layer.

Shapes: N tokens of this process, D model width, I expert width, E experts, R processes of the group, k experts a
token, S = N * k (token, expert) pairs sent, M pairs received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from omni.layers.experts_backends import invert, sort_pairs
from omni.layers.moe import Experts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Exchange(torch.autograd.Function):
    """Rows to the processes of a group: sends[r] rows go to process r, receives[r] come from it; its own transpose."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.receives, ctx.sends, ctx.group), None, None, None


class ParallelExperts(Experts):
    """Stands where `Experts` stood: the same parameters under the same names, sharded along the experts.

    gate_up_proj [E, 2I, D] and down_proj [E, D, I] are DTensors of which this process holds experts r E / R up to
    (r + 1) E / R. The gradient of an expert is the sum over the tokens of the whole group.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.group = mesh.get_group()
        self.backend = experts.backend
        rank, ranks = mesh.get_local_rank(), mesh.size()
        for name, full in experts.named_parameters():
            own = full.detach().chunk(ranks)[rank].clone()
            sharded = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            self.register_parameter(name, nn.Parameter(sharded, requires_grad=full.requires_grad))
        self.train(experts.training)

    def _run(self, backend: str | None, *inputs: Tensor) -> Tensor:
        """What `Experts.forward` does when types are settled: x [N, D], ids and weights [N, k], gate_up, down ->
        [N, D]. Every process of the group must call it, with any N."""
        x, ids, weights, *stacked = inputs
        gate_up, down = map(_local, stacked)
        own, ranks = gate_up.shape[0], dist.get_world_size(self.group)
        order, ends = sort_pairs(ids, own * ranks)
        counts = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.long)).view(ranks, own)
        arriving = torch.empty_like(counts)  # [R, own]: pairs of each process for each expert held here
        dist.all_to_all_single(arriving, counts, group=self.group)
        sends, receives = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        rows = _Exchange.apply(x.index_select(0, order // ids.shape[1]), sends, receives, self.group)  # [M, D]
        local_ids = torch.arange(own, device=x.device).repeat(ranks).repeat_interleave(arriving.flatten())
        rows = self._compute(backend, rows, local_ids[:, None], gate_up, down)
        pairs = _Exchange.apply(rows, receives, sends, self.group)  # [S, D], sorted as they were sent
        pairs = pairs.index_select(0, invert(order)).view(*ids.shape, x.shape[1])
        return (pairs * weights[..., None]).sum(1)

    def _compute(self, backend: str | None, rows: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Experts held here, rows [M, D] and ids [M, 1] -> [M, D], not weighted yet."""
        if not len(rows):  # all parameters still take part: the other processes wait for their gradients
            return rows + 0 * (gate_up[0, 0, 0] + down[0, 0, 0])
        return super()._run(backend, rows, ids, rows.new_ones(ids.shape), gate_up, down)


def _local(parameter: Tensor) -> Tensor:
    """The experts held here, differentiable."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Put `ParallelExperts` in place of every `Experts` of a model; `mesh` is one-dimensional. Returns their names.

    Raises ValueError where the experts cannot be shared out evenly, are not the plain ones, or there are none.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    if not found:
        raise ValueError("expert parallelism was asked for, but the model has no experts; use expert=1")
    for name, module in found:
        if type(module) is not Experts or {key for key, _ in module.named_parameters()} != {
            "gate_up_proj",
            "down_proj",
        }:
            raise ValueError(
                f"{name} is a changed {type(module).__name__}; expert parallelism takes the plain stacked experts: "
                "merge LoRA first, or leave the experts out of it"
            )
        if (experts := module.gate_up_proj.shape[0]) % mesh.size():
            raise ValueError(
                f"{name} has {experts} experts, which {mesh.size()} processes cannot share evenly; "
                "choose a divisor for expert="
            )
    for name, module in found:
        model.set_submodule(name, ParallelExperts(module, mesh))
    return [name for name, _ in found]
