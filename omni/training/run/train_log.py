"""The log of a run: one JSON object a line, and TensorBoard where it is installed.

Lines of training hold `step` (from 1), `loss`, `losses` by name, `lr`, `grad_norm`, `tokens`, `tokens_per_s`, `seconds`
and `skipped`; where rows were not used, `data`: how many the writing process has drawn so far, and of them the ones
filtered, left out and cut by reason, and the bad ones. Lines of an evaluation hold `step` and `eval`, its numbers by
name. No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


class TrainLog:
    """Appends to `folder`/log.jsonl, and to TensorBoard's files in the same folder.

    tensorboard: None writes them where it is installed; True warns where it is not. after: the step that the run goes
    on from; what the file says about later steps, and a line cut short by a kill, is removed, so that the curve of a
    resumed run is one curve. Raises OSError if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, after: int = 0, *, tensorboard: bool | None = None) -> None:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            os.truncate(path, _length_until(path, after))
        self._file = path.open("a", encoding="utf-8")
        self._board = None if tensorboard is False else _summary_writer(folder, after)
        if tensorboard and self._board is None:
            warnings.warn(
                "log.tensorboard = true, but TensorBoard is not installed: log.jsonl alone is written; "
                "pip install tensorboard, or leave the setting out",
                stacklevel=2,
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, which needs a `step`. It survives the end of this process, however it ends."""
        self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, number in _numbers(line):
                self._board.add_scalar(name, number, line["step"])

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint never knows of steps that the log does not."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the log; it may be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log, a last one cut short left out. Raises FileNotFoundError where there is none."""
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass the [log] folder of a training run")
    return [line for line, _ in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line and the place in the file where it ends, up to the first that is none."""
    end = 0
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            end += len(text)
            if not text.endswith(b"\n") or not isinstance(line, dict) or "step" not in line:
                return
            yield line, end


def _length_until(path: Path, step: int) -> int:
    """Bytes of the leading lines that are about steps up to `step`."""
    length = 0
    for line, end in _lines(path):
        if line["step"] > step:
            break
        length = end
    return length


def _summary_writer(folder: Path, after: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own deprecations
        return SummaryWriter(str(folder), purge_step=after + 1)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line under their paths: `losses/residual`."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and prefix + key != "step":
            yield prefix + key, float(value)
