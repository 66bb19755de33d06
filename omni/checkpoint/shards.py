"""What a checkpoint folder holds, from the index and the safetensors headers alone, trusting neither.

A safetensors file is eight bytes of header length, a JSON header `{key: {dtype, shape, data_offsets}}`, and the data.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN = "omni.safetensors"  # beside the usual files: tensors that no other library knows
ITEM_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "BOOL": 8, "C64": 64},
    **{"U64": 64, "U32": 32, "U16": 16, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6},
}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_AGAIN = "download or save the checkpoint again"


class TensorInfo(NamedTuple):
    """One tensor as its file's header describes it; `dtype` in the format's spelling, `start` its first byte."""

    shape: tuple[int, ...]
    dtype: str
    shard: Path
    start: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """Which file of a checkpoint folder holds each key; shards are not opened. Raises as `read_contents` does."""
    return read_contents(folder, lambda key: False)[0]


def read_headers(folder: str | Path, keys: Iterable[str] | None = None) -> dict[str, TensorInfo]:
    """Shape, dtype and place of every tensor, without reading data. Raises as `read_contents` does.

    With `keys`, only the files that hold one of them are opened, and everything in those files is returned.
    """
    return read_contents(folder, (lambda key: True) if keys is None else set(keys).__contains__)[1]


def read_contents(folder: str | Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Path], dict[str, TensorInfo]]:
    """(the file of every key, the headers of all tensors in those files that hold a wanted key).

    Keys come from the index, else from the header of the only file. Shards that hold nothing wanted may be absent.
    Raises FileNotFoundError when there are no safetensors weights or a shard is missing, ValueError for a broken index,
    a shard that is truncated or contradicts the index, or pickled weights.
    """
    folder = Path(folder)
    files, headers = _read_usual(folder, wanted)
    if (own := folder / OWN).is_file():
        found = read_file_header(own)
        if both := files.keys() & found.keys():
            raise ValueError(f"{own} holds tensor {min(both)!r}, and so does {files[min(both)].name}; {_AGAIN}")
        files, headers = files | dict.fromkeys(found, own), headers | found
    return files, headers


def _read_usual(folder: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Path], dict[str, TensorInfo]]:
    """The same of the files that every library reads."""
    if (folder / WEIGHTS).is_file():
        headers = read_file_header(folder / WEIGHTS)
        return dict.fromkeys(headers, folder / WEIGHTS), headers
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    files = _read_index(folder / INDEX)
    named: dict[Path, set[str]] = defaultdict(set)
    for key, shard in files.items():
        named[shard].add(key)
    headers = {}
    for shard in sorted({shard for key, shard in files.items() if wanted(key)}):
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing though the index names it; {_AGAIN}")
        found = read_file_header(shard)
        if absent := named[shard] - found.keys():
            raise ValueError(f"{shard} lacks tensor {min(absent)!r} though the index places it there; {_AGAIN}")
        if extra := found.keys() - named[shard]:
            key = min(extra)
            where = f"places it in {files[key].name}" if key in files else "does not name it"
            raise ValueError(f"{shard} holds tensor {key!r} but the index {where}; {_AGAIN}")
        headers.update(found)
    return files, headers


def _no_weights(folder: Path) -> Exception:
    """Why a folder without the usual files cannot be read."""
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if loose:
        return FileNotFoundError(f"{folder} holds {loose[0]} but no {INDEX} that says what is where; {_AGAIN}")
    if ggufs := sorted(folder.glob("*.gguf")):
        return ValueError(
            f"{ggufs[0]} holds weights quantised by GGUF, which omni does not read; load the checkpoint that they were "
            "made from, with quantize='int8' or 'int4' to make it small"
        )
    if pickles:
        return ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code when opened and is never loaded; "
            f"convert the checkpoint to {WEIGHTS} first"
        )
    return FileNotFoundError(f"{folder} holds no weights; a checkpoint folder needs {WEIGHTS} or {INDEX}")


def _read_index(path: Path) -> dict[str, Path]:
    """The index's key -> file mapping; every file must be a plain safetensors name inside the index's own folder."""
    if path.stat().st_size > _MAX_HEADER_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, over the limit of {_MAX_HEADER_BYTES}; {_AGAIN}")
    weight_map = _parse(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to files; {_AGAIN}")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(f"{path} places {key!r} in {name!r}, which is not a file of its folder; {_AGAIN}")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} places {key!r} in {name!r}; only .safetensors files are read, convert it first")
    return {key: path.parent / name for key, name in weight_map.items()}


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against itself and the file's size; ValueError if it lies."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix, brace = file.read(8), file.read(1)
        if _is_pickle(prefix) and brace != b"{":  # a header's length may begin with the same two bytes
            raise ValueError(f"{path} is a pickle and not safetensors; convert the checkpoint to safetensors first")
        length = int.from_bytes(prefix, "little")
        file.seek(8)
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or not a safetensors file ({size} bytes); {_AGAIN}")
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    end = 8 + length  # where the data begins
    tensors = {key: _tensor_info(key, entry, path, end) for key, entry in header.items()}
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if info.start != end:
            raise ValueError(f"{path}: tensor {key!r} starts at byte {info.start} instead of {end}; {_AGAIN}")
        end += info.bytes
    if end != size:
        raise ValueError(f"{path} has {size} bytes but its header describes {end}; {_AGAIN}")
    return tensors


def _is_pickle(start: bytes) -> bool:
    """Whether a file that starts so is a zip of pickles (torch.save) or a bare pickle of protocol 2 to 5."""
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _tensor_info(key: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    """One entry of a header, checked against itself."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        natural = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        sound = natural and math.prod(shape) * ITEM_BITS[dtype] == 8 * (stop - start)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: the header entry of tensor {key!r} contradicts itself; {_AGAIN}")
    return TensorInfo(shape, dtype, path, data_start + start)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"it names {twice!r} twice")
        return values

    try:
        values = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} has no valid JSON where a table of tensors belongs ({error}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}; {_AGAIN}")
    return values


def format_bytes(size: int) -> str:
    """A size in decimal units, as file listings and the Hub give it."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
