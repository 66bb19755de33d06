"""Many clips, made by several processes, in files of two hundred rows each.

A number names a clip: all else follows from it. `folder/<kind>/<source>_<file>.jsonl` says which clips there are, and a
run that is interrupted goes on with the file that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

ROWS = 200  # of a file


class Made(NamedTuple):
    """A clip: its sound, its text, who speaks, and what else its row says."""

    samples: np.ndarray
    text: str
    speaker: str
    about: Mapping[str, Any] = {}


Make = Callable[[str, int, Path], Made]  # of a source, a number, and the folder of all


def files(clips: int, shares: Mapping[str, float]) -> Iterator[tuple[str, int]]:
    """Source and number of every file, sources in turn, so that any beginning of them has clips of all."""
    counts = {source: -(-round(share * clips) // ROWS) for source, share in shares.items()}
    for place in range(max(counts.values())):
        yield from ((source, place) for source, count in counts.items() if place < count)


def write_file(folder: Path, kind: str, source: str, part: int, make: Make, rate_hz: int, suffix: str) -> int:
    """Write one file of clips; returns its rows. What a source cannot say is left out."""
    sounds = folder / kind / source
    sounds.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(part * ROWS, (part + 1) * ROWS):
        try:
            samples, text, who, about = make(source, number, folder)
        except (ValueError, RuntimeError):
            continue
        if len(samples) < rate_hz // 10:
            continue
        path = sounds / f"{number}.{suffix}"
        soundfile.write(path, samples, rate_hz, subtype="PCM_16")
        rows.append({"audio": f"{kind}/{source}/{path.name}", "text": text, "speaker": who, **about})
    write_rows(_path(folder, kind, source, part), rows)
    return len(rows)


def make_files(
    folder: Path, kind: str, wanted: Iterable[tuple[str, int]], make: Make, rate_hz: int, suffix: str, jobs: int
) -> None:
    """Write those of the wanted files that are missing. make: a function that other processes find by its name."""
    todo = [one for one in wanted if not _path(folder, kind, *one).exists()]
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [pool.submit(write_file, folder, kind, *one, make, rate_hz, suffix) for one in todo]
        for done in tqdm(waiting, kind):
            done.result()


def rows_of(folder: Path, kind: str, wanted: Iterable[tuple[str, int]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the files that are there, by source."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for source, part in wanted:
        found = rows.setdefault(source, [])
        if (path := _path(folder, kind, source, part)).exists():
            found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A manifest, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def _path(folder: Path, kind: str, source: str, part: int) -> Path:
    return folder / kind / f"{source}_{part:03d}.jsonl"
