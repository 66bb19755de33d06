"""Files of rows: where each row lies, and how it is read when it is asked for. Nothing but places is kept in memory.

`omni.training.data.row_sources` opens them by name.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

Locate = Callable[[str], Any]

_ADDRESS = re.compile("(data|https?|file):|~", re.IGNORECASE)
_GAP = re.compile(r"(?:\xef\xbb\xbf)?[\s,]*")  # between the values of an array, in Latin-1; a file may open with a mark
BLOCK = 1 << 22  # bytes of a file that are looked at together
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aiff", ".aif", ".webm"))
_SUFFIXES = {  # of the members of a tar file -> what they are
    "audio": AUDIO_SUFFIXES,
    "image": frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".heic")),
    "video": frozenset((".mp4", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")),
}
# columns of rows that place media by tags, so that a list of them is meant
_PLACED = ("messages", "conversations", "conversation", "query", "instruction", "prompt", "input")


def kind_of(suffix: str) -> str | None:
    """ "audio", "image" or "video", by how a file's name ends; None for others."""
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix.lower() in suffixes), None)


class Checksum:
    """A number that changes when rows change or change places; it is told every byte while a file is looked through."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: bytes | str) -> None:
        self.value = zlib.crc32(data.encode() if isinstance(data, str) else data, self.value)


class RowStore(ABC):
    """A file of rows: what is in it, and where the media of a row are. beside: the file that paths count from, where
    that is not `path`."""

    path: Path
    beside: Path | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    def label(self, index: int) -> str:
        """The row's place in the file."""
        return str(index)

    def name(self, index: int) -> str:
        """The row's file and its place there."""
        return f"{self.beside or self.path}:{self.label(index)}"

    @abstractmethod
    def read(self, index: int) -> Any:
        """The row as it is written."""

    def locate(self, index: int) -> Locate:
        """What finds the row's media."""
        return _beside((self.beside or self.path).parent)


class Lines(RowStore):
    """JSONL: one row a line; blank lines are passed over."""

    def __init__(self, path: Path, seen: Checksum) -> None:
        self.path, self.starts, self.lines = path, array("q"), array("q")
        start, number, checksum = 0, 1, seen.value
        with path.open("rb") as file, _bar(path) as bar:
            for line in file:
                if line.strip():
                    self.starts.append(start)
                    self.lines.append(number)
                    checksum = zlib.crc32(line, checksum)
                start, number = start + len(line), number + 1
                bar.update(len(line))
        seen.value = checksum

    def __len__(self) -> int:
        return len(self.starts)

    def label(self, index: int) -> str:
        return str(self.lines[index])

    def read(self, index: int) -> Any:
        with self.path.open("rb") as file:  # opened anew: threads and processes share nothing
            file.seek(self.starts[index])
            line = file.readline()
        return parse_json(line)


class Array(RowStore):
    """JSON: an array of rows."""

    def __init__(self, path: Path, seen: Checksum) -> None:
        self.path, self.starts, self.stops = path, array("q"), array("q")
        with path.open("rb") as file, _bar(path) as bar:
            for start, stop in _elements(file, seen, bar):
                self.starts.append(start)
                self.stops.append(stop)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return parse_json(file.read(self.stops[index] - self.starts[index]))


def _elements(file: Any, seen: Checksum, bar: Any) -> Iterator[tuple[int, int]]:
    """Where each value of a JSON array begins and ends, in bytes; a block of the file is in memory at a time.

    The text is read as Latin-1, which makes every byte a character and leaves JSON's own characters as they are.
    """
    decode = json.JSONDecoder().raw_decode
    text, gone, at, whole, begun = "", 0, 0, False, False
    while True:
        gap = _GAP.match(text, at)
        assert gap is not None  # it may be empty
        at = gap.end()
        if not begun and text.startswith("[", at):
            begun, at = True, at + 1
            continue
        if begun and text.startswith("]", at):
            return
        try:
            stop = decode(text, at)[1]
            known = whole or stop < len(text)  # a number may go on in the next block
        except (ValueError, RecursionError) as error:
            if whole:
                raise ValueError(f"the array cannot be read as JSON from byte {gone + at} on: {error}") from error
            known = False
        if known:
            yield gone + at, gone + stop
            at = stop
            continue
        block = file.read(max(BLOCK, len(text) - at))
        seen.add(block)
        bar.update(len(block))
        text, gone, at, whole = text[at:] + block.decode("latin-1"), gone + at, 0, not block


def json_rows(path: Path, seen: Checksum) -> RowStore:
    """An array of rows, or a row a line."""
    with path.open("rb") as file:
        start = file.read(BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return Array(path, seen)
    lines = Lines(path, seen)
    if len(lines):
        try:
            lines.read(0)
        except ValueError as error:
            raise ValueError(f"manifest {path} must hold an array of rows, or one row a line: {error}") from error
    return lines


class Cell(str):
    """A cell of CSV, which knows no types: what looks like a number may be one."""

    __slots__ = ()


class Csv(RowStore):
    """CSV: a row a record, columns named by the first one; empty cells are left out. `.tsv` knows no quotes."""

    def __init__(self, path: Path, seen: Checksum) -> None:
        self.path, self.starts, self.lines = path, array("q"), array("q")
        csv.field_size_limit(1 << 30)  # long conversations in one cell
        with path.open("rb") as file:
            first = file.readline().decode("utf-8-sig", "replace")
        self.options: dict[str, Any] = {"delimiter": max(",;\t", key=first.count), "strict": True}
        if path.suffix.lower() == ".tsv":
            self.options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        self.columns: list[str] = []
        with path.open("rb") as file, _bar(path) as bar:
            read = [0, 0]  # bytes and lines

            def lines() -> Iterator[str]:
                for line in file:
                    seen.add(line)
                    bar.update(len(line))
                    read[:] = read[0] + len(line), read[1] + 1
                    yield line.decode("utf-8-sig" if read[1] == 1 else "utf-8")

            records = csv.reader(lines(), **self.options)
            while True:
                start, number = read
                try:
                    record = next(records, None)
                except (csv.Error, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}:{number + 1} cannot be read as {path.suffix[1:]}: {error}") from error
                if record is None:
                    return
                if not self.columns:
                    self.columns = record
                elif any(record):
                    self.starts.append(start)
                    self.lines.append(number + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def label(self, index: int) -> str:
        return str(self.lines[index])

    def read(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            record = next(csv.reader((line.decode("utf-8") for line in file), **self.options))
        if len(record) > len(self.columns):
            raise ValueError(f"the row has {len(record)} cells for {len(self.columns)} columns")
        return {name: Cell(cell) if cell else None for name, cell in itertools.zip_longest(self.columns, record)}


class Tar(RowStore):
    """WebDataset: members with one name before the first dot form a sample.

    Its row is the `.json` member. Media that the row does not name are the ones it places (`images`, …); without a
    `.json` member, or beside one that places nothing, they and the text of a `.txt` member are the row.
    """

    def __init__(self, path: Path, seen: Checksum) -> None:
        self.path = path
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tqdm(tar, desc=path.name, unit="member", delay=2, leave=False):
                    if member.isfile():
                        folder, _, file = member.name.rpartition("/")
                        key, _, extension = file.partition(".")
                        place = (member.offset_data, member.size)
                        samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension] = place
                        seen.add(f"{member.name} {member.size} {member.mtime};")
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read as a tar file ({error}); compressed ones must be unpacked, or end in .gz"
            ) from error
        self.keys, self.samples = list(samples), list(samples.values())
        for index, sample in enumerate(self.samples):
            for extension in sample.keys() & {"json", "txt"}:
                seen.add(self._member(index, extension))

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> str:
        return self.keys[index]

    def read(self, index: int) -> Any:
        members = self.samples[index]
        row = parse_json(self._member(index, "json")) if "json" in members else {}
        if not isinstance(row, dict):
            return row
        if "txt" in members:
            row = {**row, "text": self._member(index, "txt").decode("utf-8-sig", "replace").strip()}
        elif "json" not in members:
            raise ValueError(f"the sample has no .json member, only {', '.join(members)}; add one, or a .txt")
        named = {name for text in _texts(row) for name in self._names(index, text)}
        placed = any(key in row for key in _PLACED)
        for kind in _SUFFIXES:
            own = [e for e in members if kind_of(f".{e.rpartition('.')[2]}") == kind]
            own = [e for e in own if e not in named]
            if own and kind not in row and f"{kind}s" not in row:
                row[f"{kind}s" if placed else kind] = own if placed or len(own) > 1 else own[0]
                named.update(own)
        for extension in members.keys() - {"json", "txt"} - named:
            row.setdefault(extension, extension)  # a column that some form reads, or none
        return row

    def locate(self, index: int) -> Locate:
        outside = super().locate(index)

        def locate(name: str) -> Any:
            own = [extension for extension in self._names(index, name) if extension in self.samples[index]]
            return self._member(index, own[0]) if own else outside(name)

        return locate

    def _names(self, index: int, name: str) -> tuple[str, ...]:
        """What a name may mean of the sample's members: an extension, alone or behind the sample's key."""
        key = self.keys[index]
        return name, name.removeprefix(f"{key}."), name.removeprefix(f"{key.rpartition('/')[2]}.")

    def _member(self, index: int, extension: str) -> bytes:
        offset, size = self.samples[index][extension]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Table(RowStore):
    """Rows of `datasets`, which maps them into memory; media stay as they are stored."""

    def __init__(self, path: Path, table: Any, name: str = "") -> None:
        self.path, self.shown = path, name or str(path)
        self.table: Any = table.with_format("arrow")  # decodes nothing

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.shown}:{index}"

    def read(self, index: int) -> Any:
        return without_none(self.table[index : index + 1].to_pylist()[0])


class Joined(RowStore):
    """The rows of several files, one file after the other."""

    def __init__(self, path: Path, stores: list[RowStore]) -> None:
        self.path, self.stores = path, stores
        self.stops = list(itertools.accumulate(map(len, stores)))

    def __len__(self) -> int:
        return self.stops[-1]

    def _find(self, index: int) -> tuple[RowStore, int]:
        number = bisect_right(self.stops, index)
        return self.stores[number], index - (self.stops[number - 1] if number else 0)

    def name(self, index: int) -> str:
        store, own = self._find(index)
        return store.name(own)

    def read(self, index: int) -> Any:
        store, own = self._find(index)
        return store.read(own)

    def locate(self, index: int) -> Locate:
        store, own = self._find(index)
        return store.locate(own)


def parse_json(text: bytes, what: str = "the row") -> Any:
    """The value; ValueError that begins with `what` for what is none."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read as JSON: {error}") from error


def without_none(value: Any) -> Any:
    """Tables have a cell for every key; those without a value are left out, inside rows too."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    deep = isinstance(value, list) and value and isinstance(value[0], (dict, list))
    return [without_none(item) for item in value] if deep else value


def _texts(value: Any) -> Iterator[str]:
    """Every string inside a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _beside(folder: Path) -> Locate:
    """Makes paths relative to `folder` whole; addresses stay."""

    def locate(name: str) -> str:
        return name if _ADDRESS.match(name) else str(folder / name)

    return locate


def _bar(path: Path) -> Any:
    return tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=2, leave=False)
