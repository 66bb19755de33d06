"""Voices: what Token2Wav knows of a speaker, read from and written to a checkpoint's voice file.

The release keeps them in `spk_dict.pt`, a pickle that is read as tensors only. `voices.safetensors` holds the same,
without a pickle: `{name}.cond` and `{name}.ref_mel`, and each name's bos_token as JSON in the metadata.
"""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.config.keywords import nearest
from omni.config.writing import write_tensors

RELEASED_FILE, SAFE_FILE = "spk_dict.pt", "voices.safetensors"
_PARTS = ("cond", "ref_mel")
_BOS = "bos_tokens"


@dataclass(frozen=True)
class Voice:
    """One speaker: cond fp32 [1, E] (released: 192), a speaker embedding; ref_mel fp32 [1, F, M], log mel of a
    recording; bos_token, the text token that starts the Talker's reply in this voice, if known."""

    cond: Tensor
    ref_mel: Tensor
    bos_token: int | None = None

    def __post_init__(self) -> None:
        for name, dims in (("cond", 2), ("ref_mel", 3)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"a voice's {name} must be a floating tensor, got {_describe(value)}")
            if value.dim() != dims or value.shape[0] != 1 or 0 in value.shape:
                raise ValueError(
                    f"a voice's {name} must have shape [1, {'frames, ' * (dims - 2)}width], got {list(value.shape)}"
                )
            object.__setattr__(self, name, value.detach().float())
        if self.bos_token is not None and type(self.bos_token) is not int:
            raise TypeError(f"a voice's bos_token must be an integer, got {self.bos_token!r}")


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def load_voices(path: str | Path) -> dict[str, Voice]:
    """The voices of a file, or of a checkpoint folder (`voices.safetensors`, else `spk_dict.pt`), by name.

    Raises FileNotFoundError, and ValueError for a file that is broken, holds anything but voices, or would run code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (SAFE_FILE, RELEASED_FILE) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds no voices: neither {SAFE_FILE} nor {RELEASED_FILE} is there")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; voices are in {RELEASED_FILE} of a released checkpoint")
    entries = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not entries:
        raise ValueError(f"{path} holds no voice")
    return {name: _voice(path, name, entry) for name, entry in entries.items()}


def find_voices(folder: str | Path) -> dict[str, Voice]:
    """The voices of a checkpoint folder as in `load_voices`, none where it has no voice file."""
    folder = Path(folder)
    return load_voices(folder) if any((folder / name).is_file() for name in (SAFE_FILE, RELEASED_FILE)) else {}


def save_voice_files(voices: Mapping[str, Voice], folder: str | Path) -> None:
    """Write a checkpoint folder's voices, if there are any, both as `voices.safetensors` and in the release's form,
    without which other programs do not open the checkpoint."""
    for name in (SAFE_FILE, RELEASED_FILE) if voices else ():
        save_voices(voices, Path(folder) / name)


def _voice(path: Path, name: Any, entry: Any) -> Voice:
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise ValueError(f"{path} must map names to voices, got {name!r}: {type(entry).__name__}")
    missing = [part for part in _PARTS if part not in entry]
    if missing:
        raise ValueError(f"{path}: voice {name!r} lacks {' and '.join(missing)}; it has {sorted(map(str, entry))}")
    bos = entry.get("bos_token")
    if isinstance(bos, Tensor) and bos.numel() == 1:
        bos = int(bos.item())
    try:
        return Voice(entry["cond"], entry["ref_mel"], bos)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: voice {name!r}: {error}") from error


def _read_pickle(path: Path) -> Mapping[Any, Any]:
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a voice file that can be read safely: {error}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{path} must hold a mapping of names to voices, got {type(entries).__name__}")
    return entries


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    entries: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            bos = json.loads((file.metadata() or {}).get(_BOS, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, _, part = key.rpartition(".")
                entries.setdefault(name, {"bos_token": bos.get(name)})[part] = file.get_tensor(key)
    except (SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid voice file: {error}") from error
    return entries


def save_voices(voices: Mapping[str, Voice], path: str | Path) -> Path:
    """Write voices to `path`: a `.safetensors` file, a `.pt` file in the release's form, or a folder.

    A folder gets `voices.safetensors`. Returns the file's path. An old file is replaced whole or not at all.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix not in (".safetensors", ".pt"):
        path = path / SAFE_FILE
    if not voices:
        raise ValueError("there is no voice to save")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        if path.suffix == ".pt":
            released = {name: {k: v for k, v in vars(voice).items() if v is not None} for name, voice in voices.items()}
            torch.save(released, part)
        else:
            tensors = {
                f"{name}.{key}": getattr(voice, key).contiguous() for name, voice in voices.items() for key in _PARTS
            }
            bos = {name: voice.bos_token for name, voice in voices.items() if voice.bos_token is not None}
            write_tensors(tensors, part, {"format": "pt", _BOS: json.dumps(bos)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def choose_voice(voices: Mapping[str, Voice], name: str) -> Voice:
    """A voice by its name, in any case. Raises ValueError that lists the names."""
    by_lower = {known.lower(): voice for known, voice in voices.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    hint = nearest(name, voices, "")
    raise ValueError(f"there is no voice {name!r}; there are {', '.join(sorted(voices))}{hint and '; ' + hint}")
