"""Checkpoints of a spread model: written by all processes together, read by any number of them, exported for the Hub.

The folder holds torch.distributed.checkpoint's files (`__{rank}_{i}.distcp` with tensors, `.metadata`) and
`values.json`. Names and whole tensors are those of the plain model, so that another number of processes, another mesh
or one process alone reads it. `.metadata` is a pickle: read folders of your own only, pass others on by `export`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from omni.config.writing import atomic_folder
from omni.layers.init import MetaBuild
from omni.model import OmniModel
from omni.training.parallel.processes import is_main, process_count

VALUES = "values.json"


def save_distributed(
    folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write model, optimiser state and `extra` (values that JSON can hold) into a folder that all processes see.

    Whole or not at all: the files get their place when every process has written its own. All processes must call it;
    rank 0's `extra` is kept. Raises TypeError for an `extra` that JSON cannot hold, OSError when writing fails.
    """
    import torch.distributed.checkpoint as dcp

    tensors, values = _state(model, optimizer)
    text = json.dumps({"extra": extra or {}, "optimizer": values}, indent=1)
    folder = Path(folder).expanduser().resolve()
    if not is_main():
        dcp.save(tensors, checkpoint_id=from_main(None))
        dist.barrier()
        return
    with atomic_folder(folder) as target:
        dcp.save(tensors, checkpoint_id=from_main(str(target)), no_dist=process_count() == 1)
        (target / VALUES).write_text(text + "\n", encoding="utf-8")
        written = {path.name for path in target.iterdir()}
    for stale in folder.glob("*.distcp"):  # of an older checkpoint by more processes
        if stale.name not in written:
            stale.unlink()
    if process_count() > 1:
        dist.barrier()


def load_distributed(folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Read what `save_distributed` wrote into a model (spread or not) and its optimiser, in place -> `extra`.

    All processes must call it. Raises FileNotFoundError where there is no such checkpoint, ValueError where it does
    not fit the model, or holds no optimiser state and one is asked for.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    folder = Path(folder).expanduser()
    if not (folder / VALUES).is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint of save_distributed ({VALUES} is missing)")
    read = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    if optimizer is not None and not read["optimizer"]:
        raise ValueError(f"{folder} was saved without an optimiser; load it without one")
    tensors, _ = _state(model, optimizer)
    try:
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=process_count() == 1)
    except (RuntimeError, ValueError, KeyError, dcp.CheckpointException) as error:
        raise ValueError(f"{folder} does not fit this model or optimiser: {error}") from error
    set_state_dict(
        model, [] if optimizer is None else [optimizer],
        model_state_dict=tensors["model"],
        optim_state_dict={**tensors.get("optimizer", {}), **(read["optimizer"] if optimizer is not None else {})},
        options=_options(),
    )  # fmt: skip
    return read["extra"]


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def _state(model: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by "model" and "optimizer", the optimiser's numbers and flags by name)."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, [] if optimizer is None else [optimizer], options=_options())
    tensors: dict[str, Any] = {"model": of_model}
    if optimizer is not None:
        tensors["optimizer"] = {k: v for k, v in of_optimizer.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in of_optimizer.items() if not isinstance(v, Tensor)}


def from_main(value: Any) -> Any:
    """Rank 0's value on every process, which must all call it."""
    box = [value]
    if process_count() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def export(
    model: OmniModel,
    folder: str | Path,
    max_shard_size: str | int = "5GB",
    experts: Literal["separate", "fused"] = "separate",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a spread model in the Hub's layout, as `OmniModel.save_pretrained` does; all processes must call it.

    dtype: of the floating weights in the files, see `stored_as`.

    One parameter after the other is gathered and put on rank 0's disk, beside the folder, so that memory holds one
    whole parameter and one shard at a time; until the end the disk holds the weights twice. Raises ValueError for a
    model whose parameters are not those of its config (merge LoRA first), OSError when writing fails.
    """
    folder = Path(folder).expanduser().resolve()
    with MetaBuild():
        plain = OmniModel(model.config, [part for part in ("thinker", "talker", "code2wav") if getattr(model, part)])
    state = model.state_dict()
    if unknown := sorted(set(state) ^ set(plain.state_dict())):
        raise ValueError(f"the parameter {unknown[0]} is not one of the config's model; merge or remove what was added")
    if not is_main():
        for tensor in state.values():
            _whole(tensor)
        dist.barrier()
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.gathering-", dir=folder.parent) as work:
        on_disk = {name: _on_disk(_whole(tensor), Path(work) / name) for name, tensor in state.items()}
        plain.load_state_dict(on_disk, assign=True)
        change_types(plain, dtype)
        plain.processor, plain.generation_config = model.processor, model.generation_config
        plain.voices = model.voices
        plain.save_pretrained(folder, max_shard_size=max_shard_size, experts=experts)
    if process_count() > 1:
        dist.barrier()


def change_types(model: nn.Module, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
    """Turn the floating weights into `dtype` (None: none of them) but those of modules that say `always_float32`, in
    place -> the tensors that were changed, and what they held."""
    wide = [module for module in model.modules() if getattr(module, "always_float32", False)]
    stay = {id(tensor) for module in wide for tensor in (*module.parameters(), *module.buffers())}
    changed = []
    for tensor in () if dtype is None else model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and tensor.dtype != dtype and id(tensor) not in stay:
            changed.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)
    return changed


@contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block a model has the types in which it is to be saved; afterwards it is as before, bit for bit."""
    changed: list[tuple[Tensor, Tensor]] = []
    try:
        changed = change_types(model, dtype)
        yield
    finally:
        for tensor, before in changed:
            tensor.data = before


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor on every process."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _on_disk(tensor: Tensor, path: Path) -> Tensor:
    """A copy that lives in a file."""
    if not tensor.numel():
        return tensor.cpu()
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)
