"""Writing files all or nothing: folders, single files, tensors; and what a killed process left, put right.

A save is prepared in a hidden folder beside its target. One rename declares it complete; only then are the old files
put aside and the new ones moved in. A process killed before that leaves the old folder as it was, one killed later a
folder that the next `recover` (at every opening and saving) completes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Files of which a folder holds one set: where one of a set is written, the older files of the set go.
_SETS = (
    re.compile(r"model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors"),
    re.compile(r"chat_template\.(json|jinja)|additional_chat_templates"),
)


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
    recover(target)
    # beside the target, or inside it where only it can be written or it is a file system of its own
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    work = (target if inside else target.parent) / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"
    fresh = work / "new"
    try:
        fresh.mkdir(parents=True)
        with _held(work / "lock"):
            yield fresh
            _set_modes(fresh)
            _commit(work, target)
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # not imported here, which takes its time
            raise OSError(f"{target} could not be written: {error}; check the free space and its rights") from error
        raise
    finally:
        if not any(work.glob("old/*")):  # else the moves could not be undone, and the next opening completes them
            shutil.rmtree(work, ignore_errors=True)


def recover(target: str | Path) -> None:
    """Complete or forget the saves of a folder whose processes were killed; those of living ones are left alone.

    Where nothing can be written there, nothing happens.
    """
    with suppress(OSError, ValueError):
        target = Path(target).expanduser().resolve()
        for place in (target.parent, target):
            for work in sorted(place.glob(f".{_plain(target.name)}.saving-*")):
                with _held(work / "lock") as held:
                    if held and (work / "ready").is_dir():
                        target.mkdir(exist_ok=True)
                        _move_in(work, target)
                    if held:
                        shutil.rmtree(work, ignore_errors=True)


def _plain(name: str) -> str:
    """A name for glob, where every character means itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Whether the lock file could be taken, which ends with this block or with the process."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: a save is taken for living
        yield False
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _commit(work: Path, target: Path) -> None:
    """Move the new files into place, what they replace to `old`; undo every move if one fails."""
    fresh = work / "new"
    if not target.exists():
        fresh.rename(target)
        return
    (work / "old").mkdir()
    (work / "names.json").write_text(json.dumps(sorted(path.name for path in fresh.iterdir())), encoding="utf-8")
    os.rename(fresh, work / "ready")  # from here on the save is complete
    _move_in(work, target)


def _move_in(work: Path, target: Path) -> None:
    """Every old file aside, then every new one in; also where some moves have been made before."""
    ready, aside = work / "ready", work / "old"
    new = set(json.loads((work / "names.json").read_text(encoding="utf-8")))
    waiting = sorted(path.name for path in ready.iterdir())
    replaced = [name for name in waiting if os.path.lexists(target / name)]
    sets = [one for one in _SETS if any(one.fullmatch(name) for name in new)]
    older = [path.name for path in target.iterdir() if path.name not in new]
    replaced += sorted(name for name in older if any(one.fullmatch(name) for one in sets))
    moves = [(target / name, aside / name) for name in replaced]
    moves += [(ready / name, target / name) for name in waiting]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise
    ready.rmdir()
    shutil.rmtree(aside)


def _set_modes(folder: Path) -> None:
    """One mode for all new files, that of the process; safetensors makes its files readable for their owner alone."""
    probe = folder.parent / "probe"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, readable for whom other new files are. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}; check the free space and the folder's rights") from error


def check_can_write(path: str | Path) -> None:
    """Raise OSError where a file cannot be written, before the work whose result is to go there."""
    path = Path(path).expanduser()
    try:
        if path.exists():
            with path.open("ab"):  # changes nothing
                pass
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; name another place") from error
