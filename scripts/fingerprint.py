"""A fingerprint of what the library does, to compare two commits before and after a refactor.

Prints one line an item, `<name> <hash>`: sha256, its first 16 hex digits, over the exact bits of the item's results.
Two commits that behave alike print the same lines on one machine, with one build of PyTorch and one number of threads;
on another machine the bits differ, so the lines are never stored. An item that raises prints
`<name> ERROR <type>: <message>`, and the rest goes on.

    OMP_NUM_THREADS=1 python scripts/fingerprint.py --out before.txt
    ... the refactor ...
    OMP_NUM_THREADS=1 python scripts/fingerprint.py --out after.txt
    diff before.txt after.txt

Items do not depend on each other, so `--only REGEX` gives the lines that the whole run gives. They are in the folder
`fingerprint_items/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import re
import struct
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whichever one is installed
os.environ.update(COLUMNS="120", NO_COLOR="1", TERM="dumb", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def digest(value: Any) -> str:
    """16 hex digits over nested results: tensors, arrays, numbers, texts, bytes, sequences, mappings, dataclasses."""
    hasher = hashlib.sha256()
    _feed(hasher.update, value)
    return hasher.hexdigest()[:16]


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Hand over the bytes of a value, each with its kind and size in front, so that no two values read alike.

    Mappings go in the order of their keys. A dataclass is the mapping of its fields, whatever its name, and a tuple is
    a list: names of classes may change, values may not.
    """
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray):
        _feed(update, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        update(f"{'text' if isinstance(value, str) else 'bytes'} {len(data)} ".encode() + data)
    elif value is None or isinstance(value, (bool, int)):
        update(f"value {value} ".encode())
    elif isinstance(value, float):
        update(b"float " + struct.pack(">d", value))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=str):
            _feed(update, str(key))
            _feed(update, value[key])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(update, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)} ".encode())
        for part in value:
            _feed(update, part)
    else:
        raise TypeError(f"a {type(value).__name__} has no fingerprint; let the item return plain values")


def line_of(name: str, compute: Callable[[], Any]) -> str:
    """The line of an item, computed from the same random state whatever was computed before."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f"{name} {digest(compute())}"
    except (Exception, SystemExit) as error:
        return f"{name} ERROR {type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    """Print the lines; 1 if an item failed."""
    parser = argparse.ArgumentParser(description="one hash an item over what the library does on fixed inputs")
    parser.add_argument("--only", metavar="REGEX", default="", help="items whose name contains a match")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    parser.add_argument("--times", action="store_true", help="print the seconds of each item to stderr")
    args = parser.parse_args()
    out = args.out.resolve() if args.out else None
    os.chdir(ROOT)  # what the command line prints holds paths as they were given
    torch.set_num_threads(1)
    from fingerprint_items import ITEMS

    lines = []
    for name, compute in ITEMS.items():
        if not re.search(args.only, name):
            continue
        began = time.perf_counter()
        lines.append(line_of(name, compute))
        print(lines[-1], flush=True)
        if args.times:
            print(f"{time.perf_counter() - began:7.2f} s {name}", file=sys.stderr)
    if out is not None:
        out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return int(any(line.split(" ", 2)[1] == "ERROR" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
