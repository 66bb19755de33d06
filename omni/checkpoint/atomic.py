"""Writing a folder all or nothing."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omni.checkpoint.shards import INDEX, WEIGHTS

_WEIGHT_FILE = re.compile(rf"{re.escape(WEIGHTS)}|{re.escape(INDEX)}|model-\d+-of-\d+\.safetensors")


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder whose files become those of `target` when the block ends, or vanish if it raises.

    Files that `target` already has and the block did not write stay, except the shards and index of an older
    checkpoint when the block wrote weights. Every old file is put aside before the first new one arrives and deleted
    after the last, so that a process killed in between never leaves a mix of two checkpoints under one name.
    Raises OSError when `target` is a file or cannot be written.
    """
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise OSError(f"{target} is a file; pass a folder to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, or inside it where only it can be written or it is a file system of its own
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    work = (target if inside else target.parent) / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"
    fresh, aside = work / "new", work / "old"
    try:
        fresh.mkdir(parents=True)
        aside.mkdir()
        yield fresh
        _commit(fresh, aside, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _commit(fresh: Path, aside: Path, target: Path) -> None:
    """Move `fresh` into place, what it replaces to `aside`; undo every move if one fails."""
    if not target.exists():
        fresh.rename(target)
        return
    new = {path.name for path in fresh.iterdir()}
    if any(_WEIGHT_FILE.fullmatch(name) for name in new):
        replaced = {path.name for path in target.iterdir() if path.name in new or _WEIGHT_FILE.fullmatch(path.name)}
    else:
        replaced = {name for name in new if os.path.lexists(target / name)}
    moves = [(target / name, aside / name) for name in sorted(replaced)]
    moves += [(fresh / name, target / name) for name in sorted(new)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise
