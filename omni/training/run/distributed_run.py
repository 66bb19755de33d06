"""A run on several processes: the model spread over them, what the trainer asks of them, and checkpoints by all.

    ranks, share = spread(model, config)      # started by torchrun or accelerate launch; alone, nothing happens
    trainer = Trainer(..., ranks=ranks, store=store_of(config))

A step equals that of one process on the union of the batches. Checkpoints hold whole tensors by name, each process
writing its shards; they are resumed by as many processes as wrote them, whose places in the data they hold.

No shapes of its own: tensors are [..] of any shape, whole or sharded.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni.config.writing import atomic_folder
from omni.model import OmniModel
from omni.training.parallel.parallelise import ParallelConfig, clip_grad_norm, make_mesh, parallelise, sum_gradients
from omni.training.parallel.processes import batch_share, init_from_env, is_main, process_count, sum_over_ranks
from omni.training.run.checkpoints import STATE, TENSORS, Checkpoints, pack, sync, unpack
from omni.training.run.contracts import Ranks
from omni.training.run.distributed_checkpoint import from_main
from omni.training.run.train_config import ParallelTable, TrainConfig

_FIXED = ("parameters", "buffers", "optimizer", "ema")  # parts of the state whose shapes follow from the model


def spread(model: OmniModel, config: TrainConfig, *, whole: bool = False) -> tuple[Ranks, tuple[int, int]]:
    """Join the processes, share the model out as [parallel] says -> what the trainer needs of the others, and this
    process's share of the data (index, shares).

    The model is changed in place, equal on all processes before; choose what learns before, make the optimiser
    afterwards. whole: shard nothing over the data, for what learns in a module made around a part of the model later.
    One process alone is `Ranks()`, (0, 1), and the model stays as it is. Raises ValueError for sizes that do not fit
    the processes or the model, for a device that all would share, or where [parallel] needs more processes.
    """
    device = init_from_env()
    if process_count() == 1:
        _check_alone(config.parallel)
        return Ranks(), (0, 1)
    kind = config.train.device
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"train.device = {kind!r} is one device for all {process_count()} processes; leave it at 'auto', which is "
            "a GPU for each"
        )
    place = device.type if kind == "auto" else kind
    table = config.parallel
    sizes = ParallelConfig(table.data or None, table.shard and not whole, table.expert, table.tensor)
    mesh = make_mesh(sizes, place)
    half = config.train.precision == "bf16" and place == "cuda"  # on a CPU autocast alone
    parallelise(model, mesh, sizes, mixed_precision=torch.bfloat16 if half else None)
    share = batch_share(mesh)
    ranks = Ranks(
        rank=dist.get_rank(),
        share=share[0],
        sum_over_ranks=partial(_sum, mesh=mesh),
        gather=_gather,
        sum_gradients=partial(sum_gradients, mesh=mesh),
        clip_grad_norm=clip_grad_norm,
    )
    return ranks, share


def _check_alone(table: ParallelTable) -> None:
    for name in ("data", "expert", "tensor"):
        if getattr(table, name) > 1:
            raise ValueError(
                f"parallel.{name} = {getattr(table, name)} needs several processes, this is one; start them with "
                "torchrun or accelerate launch, or leave [parallel] out"
            )


def _sum(tensor: Tensor, mesh: Any) -> Tensor:
    """The sum over all shares; the processes of a tensor group, which have one share, agree on what each of them got
    alone, such as a signal to stop."""
    total, others = sum_over_ranks(tensor, mesh), mesh["tensor"].size()
    if others > 1:
        dist.all_reduce(total, group=mesh.get_group("tensor"))
        total /= others
    return total


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def store_of(config: TrainConfig) -> DistributedStore | None:
    """Where several processes save; None for one process (the trainer's own store) and without save.folder."""
    if process_count() == 1 or config.save.folder is None:
        return None
    return DistributedStore(config.save.folder, config.save.keep)


class DistributedStore(Checkpoints):
    """The checkpoints of one run by all its processes, in a folder that all of them see; the newest `keep` stay.

    A checkpoint is a folder `step_00000100` with torch.distributed.checkpoint's files and `state.json`; it appears when
    every process has written its part. `.metadata` among these files is a pickle: resume from folders of your own only.
    Every process must call `save` and `latest`.
    """

    collective = True

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete the oldest up to it. Processes killed in between leave the older
        checkpoints as they were. Raises OSError when it cannot be written, TypeError as `pack`."""
        import torch.distributed.checkpoint as dcp

        tensors: dict[str, Tensor] = {}
        values = pack(state, "", tensors)
        target = self.path(step)
        with ExitStack() as stack:
            folder = stack.enter_context(atomic_folder(target)) if is_main() else None
            try:
                dcp.save(
                    tensors,
                    checkpoint_id=from_main(None if folder is None else str(folder)),
                    no_dist=process_count() == 1,
                )
            except dcp.CheckpointException as error:
                raise OSError(f"{target} cannot be written: {error}") from error
            if folder is not None:
                (folder / STATE).write_text(json.dumps({"step": step, "state": values}), encoding="utf-8")
                for path in (folder / STATE, folder):  # on the disk before it has its name, as the tensors are
                    sync(path)
        if is_main():
            self.prune(step)
        if process_count() > 1:
            dist.barrier()
        return target

    def latest(self, current: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest whole checkpoint, None where there is none. Tensors that `current` has are
        filled in place, others are new, on the CPU.

        Broken checkpoints are passed over with a warning. Raises ValueError for one of another model or of a run by
        one process, or that cannot be read after all (`current` is then undefined).
        """
        step, problem = from_main(self._newest_whole() if is_main() else None)
        if problem:
            raise ValueError(problem)
        return None if step is None else (step, self.load(step, current))

    def load(self, step: int, current: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The state that was saved, into the tensors of `current` as in `latest`."""
        import torch.distributed.checkpoint as dcp

        folder = self.path(step)
        live: dict[str, Tensor] = {}
        pack(current or {}, "", live)
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {name: _room(folder, name, entry, live.get(name)) for name, entry in saved.items()}
        try:
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=process_count() == 1)
        except dcp.CheckpointException as error:
            raise ValueError(f"{folder} cannot be read: {error}; delete it to go on from the one before") from error
        return unpack(json.loads((folder / STATE).read_text(encoding="utf-8"))["state"], tensors)

    def _newest_whole(self) -> tuple[int | None, str]:
        """(step of the newest checkpoint that has all its files, or None; what forbids to resume at all)."""
        for step in reversed(self.steps()):
            if (self.path(step) / TENSORS).exists():
                return None, (
                    f"{self.path(step)} was written by one process, this run has {process_count()}; start one, or "
                    "begin a new run from its exported model"
                )
            try:
                self._check(self.path(step))
                return step, ""
            except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
                warnings.warn(f"passed over: {self.path(step)} is not a whole checkpoint: {error!r}", stacklevel=2)
        return None, ""

    def _check(self, folder: Path) -> None:
        """Raises where a file is missing or too short."""
        import torch.distributed.checkpoint as dcp

        json.loads((folder / STATE).read_text(encoding="utf-8"))
        for entry in dcp.FileSystemReader(folder).read_metadata().storage_data.values():
            size = (folder / entry.relative_path).stat().st_size
            if size < entry.offset + entry.length:
                raise ValueError(f"{entry.relative_path} has {size} bytes, {entry.offset + entry.length} are needed")


def _room(folder: Path, name: str, entry: Any, live: Tensor | None) -> Tensor:
    """Where a saved tensor is read into: the one that is there, or a new one."""
    if live is not None and live.shape == entry.size:
        return live
    if live is not None and name.split("/")[1] in _FIXED:
        raise ValueError(
            f"{folder} is of another model: {name[1:]} is {list(entry.size)} there and {list(live.shape)} here; "
            "resume with the model that the run began with"
        )
    return torch.empty(entry.size, dtype=entry.properties.dtype)
