"""Checkpoints of a run: all or nothing, safetensors and JSON only, enough for an exact resume.

A checkpoint is a folder `step_00000100` with `tensors.safetensors` and `state.json`. The state of a run is a nest of
dicts, lists, tuples, numbers, text and tensors; `pack` parts it into JSON and named tensors, `unpack` joins them again.

No shapes of its own: tensors are [..] of any shape.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.config.writing import atomic_folder

TENSORS, STATE = "tensors.safetensors", "state.json"
SEVERAL = ".metadata"  # only a checkpoint by several processes has it
_FOLDER = re.compile(r"step_(\d{8,})")
_LEFT_OVER = re.compile(r"\.step_\d{8,}\.saving-[0-9a-f]+")
_PLAIN = (str, int, float, bool, type(None))


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors are put into `tensors` under `name` and their path.

    Tuples and keys that are not text come back as they were. Raises TypeError for what neither JSON nor safetensors
    can hold.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, np.ndarray):
        return {"$array": pack(torch.from_numpy(value.copy()), name, tensors)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
        pairs = enumerate(value.items())
        return {"$pairs": [[pack(k, f"{name}/{i}k", tensors), pack(v, f"{name}/{i}", tensors)] for i, (k, v) in pairs]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) not in _PLAIN:
        raise TypeError(f"{name} is of type {type(value).__name__}; a checkpoint holds tensors, numbers and text only")
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` took apart; KeyError for a tensor that is missing."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    for mark in ("$tensor", "$array", "$pairs", "$tuple"):
        if value.keys() == {mark}:
            inner = value[mark]
            if mark == "$tensor":
                return tensors[inner]
            if mark == "$array":
                return unpack(inner, tensors).numpy()
            items = unpack(inner, tensors)
            return tuple(items) if mark == "$tuple" else {key: item for key, item in items}
    return {key: unpack(item, tensors) for key, item in value.items()}


class Checkpoints:
    """The checkpoints of one run in one folder, of which the newest `keep` stay. One process writes them."""

    collective = False

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        self.folder = Path(folder).expanduser()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [_FOLDER.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete the oldest up to it. A process killed in between leaves the older
        checkpoints as they were. Raises OSError when it cannot be written, TypeError as `pack`."""
        tensors: dict[str, Tensor] = {}
        values = pack(state, "", tensors)
        target = self.path(step)
        with atomic_folder(target) as folder:
            save_file({name: _alone(tensor) for name, tensor in tensors.items()}, folder / TENSORS)
            (folder / STATE).write_text(json.dumps({"step": step, "state": values}), encoding="utf-8")
            for path in (folder / TENSORS, folder / STATE, folder):  # on the disk before it has its name
                sync(path)
        self.prune(step)
        return target

    def prune(self, step: int) -> None:
        """Delete the oldest checkpoints up to a step, once that step's own is on the disk."""
        sync(self.folder)
        for old in [number for number in self.steps() if number <= step][: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def load(self, step: int) -> dict[str, Any]:
        """The state that was saved, tensors on the CPU. Raises FileNotFoundError or ValueError for one not whole."""
        folder = self.path(step)
        try:
            values = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return unpack(values["state"], load_file(folder / TENSORS))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} is not a whole checkpoint: {error}") from error
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole checkpoint: {error!r}") from error

    def latest(self, current: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint that can be read, None where there is none. Broken ones are passed
        over with a warning. `current` is for stores that read into tensors which are there; here it is not needed.
        Raises ValueError for one that several processes wrote."""
        for step in reversed(self.steps()):
            if (self.path(step) / SEVERAL).exists():
                raise ValueError(
                    f"{self.path(step)} was written by {self._writers(step)} processes, each with its own place in the "
                    "data and its own random numbers, which one process cannot go on from; start as many with "
                    "torchrun, or save to another folder and begin a new run"
                )
            try:
                return step, self.load(step)
            except (OSError, ValueError) as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        return None

    def _writers(self, step: int) -> str:
        """How many processes wrote a checkpoint, as far as it says."""
        try:
            values = json.loads((self.path(step) / STATE).read_text(encoding="utf-8"))
            return str(len(values["state"]["ranks"]))
        except (OSError, ValueError, KeyError, TypeError):
            return "several"

    def clean(self) -> None:
        """Delete what saves left behind that were killed half-way. No other run may be writing here."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _LEFT_OVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


def rng_state() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy, PyTorch and, where it is in use, CUDA."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's device
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back into the states that `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Start the global generators of Python, NumPy, PyTorch and CUDA from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and the only one in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
