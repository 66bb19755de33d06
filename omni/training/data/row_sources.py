"""Rows by name: a file, the files that a pattern names, or a dataset of `datasets`.

    .jsonl      a row a line                            .json      an array of rows (or a row a line)
    .csv, .tsv  a row a record, named by the header     .parquet   through `datasets`
    .tar        WebDataset: the members of one name before the first dot are a row
    folder      what `datasets` has saved (folder:split where it holds several); name:split is one of the Hub

What ends in .gz is unpacked first, into a temporary file. Globs and shards in braces ("a-{000..010}.tar") are the rows
of all their files, in order.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from omni.training.data.row_stores import BLOCK, Checksum, Csv, Joined, Lines, RowStore, Table, Tar, json_rows

_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?:([\w.+\[\]%:-]+)")
_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{},]+(?:,[^{},]*)+)\}")


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{what} is read with the package datasets; install it (pip install datasets), or convert the rows to JSONL"
        ) from error
    return datasets


def _parquet(path: Path, seen: Checksum) -> RowStore:
    table = _datasets(f"{path.name}: Parquet").Dataset.from_parquet(str(path))
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            seen.add(block)
    return Table(path, table)


def _saved(folder: Path, split: str | None, seen: Checksum) -> RowStore:
    """A folder that `datasets` has written, one split of it where it holds several."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if split not in splits:
            raise ValueError(
                f"{folder} holds the splits {', '.join(splits)}; write one behind it, {folder}:{splits[0]}"
            )
        folder = folder / split
    elif not (folder / "state.json").is_file():
        raise ValueError(
            f"manifest {str(folder)!r} is a folder, not one that datasets has saved; name its files, "
            f"such as {folder}/*.jsonl"
        )
    table = _datasets(f"{folder}: a saved dataset").load_from_disk(str(folder))
    seen.add((folder / "state.json").read_bytes())
    return Table(folder / "state.json", table, str(folder))


def _hub(name: str, seen: Checksum) -> RowStore:
    """One split of a dataset of the Hub: name:split, or name:config:split."""
    found = _HUB.fullmatch(name)
    assert found is not None
    library = _datasets(f"{name}: a dataset of the Hub")
    try:
        table = library.load_dataset(found[1], found[2], split=found[3])
    except (ValueError, OSError):
        raise
    except Exception as error:  # the library's own classes
        raise OSError(f"dataset {name!r} cannot be loaded: {error}") from error
    seen.add(str(table._fingerprint))
    return Table(Path(found[1].replace("/", "--")), table, name)


_READERS: dict[str, Callable[[Path, Checksum], RowStore]] = {
    ".jsonl": Lines, ".tar": Tar, ".parquet": _parquet, ".json": json_rows, ".csv": Csv, ".tsv": Csv, ".ndjson": Lines,
}  # fmt: skip
FORMATS = f"{', '.join(_READERS)} (or one of them with .gz), a folder or Hub dataset of datasets (name:split)"


def open_rows(source: str | Path, seen: Checksum) -> RowStore:
    """The rows of a file, of all files that a pattern names, or of a dataset.

    Raises FileNotFoundError for what is not there, ValueError for another format, OSError, and ImportError where
    `datasets` is needed and not there.
    """
    text, path = str(source), Path(source).expanduser()
    if path.is_file():
        return _open_file(path, seen)
    if path.is_dir():
        return _saved(path, None, seen)
    whole = list(_expand(text))
    names = [name for own in whole for name in (sorted(glob(os.path.expanduser(own))) or [own])]
    if names != [text]:
        return Joined(path, [open_rows(name, seen) for name in names])
    folder, colon, split = text.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _saved(Path(folder).expanduser(), split, seen)
    if _HUB.fullmatch(text):
        return _hub(text, seen)
    raise FileNotFoundError(
        f"manifest {text!r} does not exist; check the path (a dataset of the Hub is written name:split)"
    )


def _open_file(path: Path, seen: Checksum) -> RowStore:
    inner = path.with_suffix(".tar") if path.suffix.lower() == ".tgz" else path
    packed = path.suffix.lower() in (".gz", ".tgz")
    inner = inner.with_suffix("") if path.suffix.lower() == ".gz" else inner
    suffix = inner.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"manifest {str(path)!r} must be one of {FORMATS}, got {path.suffix!r}")
    if not packed:
        return _READERS[suffix](path, seen)
    handle, name = tempfile.mkstemp(suffix=suffix, prefix="omni-rows-")
    try:
        with os.fdopen(handle, "wb") as file, gzip.open(path) as rows:
            shutil.copyfileobj(rows, file, BLOCK)
        store = _READERS[suffix](Path(name), seen)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        os.unlink(name)
        raise ValueError(f"manifest {path} cannot be unpacked: {error}") from error
    except BaseException:
        os.unlink(name)
        raise
    store.beside = path
    weakref.finalize(store, os.unlink, name)
    return store


def _expand(text: str) -> Iterator[str]:
    """The names that braces stand for: {000..010} counts, {a,b} lists."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    first, dots, last = found[1].partition("..")
    if dots:
        numbers = range(int(first), int(last) + 1) if int(first) <= int(last) else range(int(first), int(last) - 1, -1)
        parts = [str(number).zfill(len(first)) for number in numbers]
    else:
        parts = found[1].split(",")
    for part in parts:
        yield from _expand(text[: found.start()] + part + text[found.end() :])
