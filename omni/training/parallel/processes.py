"""The processes of a run: joining and leaving the group, what each one reads, sums over all of them.

A mesh names its dimensions "data", "expert" and "tensor" (`omni.training.parallel.parallelise.make_mesh`). The
processes along "data" and "expert" read different batches, those along "tensor" work on the same one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BATCH_DIMS = ("data", "expert")  # along these, processes read different batches


def init_from_env(backend: str | None = None) -> torch.device:
    """Join the group that `torchrun` or `accelerate launch` describes in the environment -> this process's device.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (and what `init_process_group` reads, MASTER_ADDR and MASTER_PORT); without
    RANK the process is alone and nothing is joined. A group that exists already is kept. backend: None is NCCL for
    tensors on a GPU and gloo for those on the CPU. Raises ValueError for an incomplete environment or too few GPUs.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    local, rank, world = _number("LOCAL_RANK", default=0), _number("RANK"), _number("WORLD_SIZE")
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} GPUs; "
            "start at most one process for each (--nproc-per-node)"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo"), rank=rank, world_size=world)
    return device


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment's {name} is {value!r}, expected a number; start the processes with torchrun or "
            "accelerate launch, or unset RANK to run one process"
        )
    return int(value)


def shut_down() -> None:
    """Wait for the other processes and leave the group; nothing where there is none. Call it once, after the work.

    After an error do not call it: the others may never arrive, and the launcher ends them when this process fails.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that logs and writes: rank 0, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def process_count() -> int:
    """Processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_share(mesh: DeviceMesh | None = None) -> tuple[int, int]:
    """(i, n): this process reads part i of the data cut into n parts. Without a mesh every process has its own part."""
    if mesh is None:
        return (0 if is_main() else dist.get_rank()), process_count()
    share, shares = 0, 1
    for name in _batch_dims(mesh):
        share = share * mesh[name].size() + mesh[name].get_local_rank()
        shares *= mesh[name].size()
    return share, shares


@torch.no_grad()
def sum_over_ranks(tensor: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """The sum over all processes that read different data: a new tensor of the same shape, without gradient.

    Counts and losses of a batch that is spread over processes. Without a mesh over the whole group, without a group
    the tensor itself. Every process must call it.
    """
    tensor = tensor.detach()
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    if mesh is None:
        dist.all_reduce(total)
        return total
    for name in _batch_dims(mesh):
        if mesh[name].size() > 1:
            dist.all_reduce(total, group=mesh.get_group(name))
    return total


def _batch_dims(mesh: DeviceMesh) -> list[str]:
    return [name for name in BATCH_DIMS if name in (mesh.mesh_dim_names or ())]
