"""What the rows share: the options of a run, the models that both sides load from one folder, and the labels."""

from __future__ import annotations

import copy
import gc
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from omni.bench.ceilings import Ceilings, measure_ceilings
from omni.bench.checkpoint import prompt, random_model, read_config, write_checkpoint
from omni.bench.result import Series
from omni.bench.sides import Peer, answer
from omni.bench.timing import Run, take_turns
from omni.code2wav.contract import SAMPLE_RATE_HZ
from omni.config.model import OmniConfig
from omni.model import OmniModel
from omni.packaged.toy import toy_processor
from omni.processing.processor import OmniProcessor

TRIALS = 2  # calls of each setting that are tried before one is chosen


@dataclass
class Options:
    """What the command line sets. config: the file whose shape most rows use; released: that of the full-size parts."""

    config: Path
    released: Path
    device: torch.device
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    compile: bool = False
    share: bool = False  # the main config's weights are built on the device and shared, with no folder
    quick: bool = False  # the smallest sizes that still show the row works
    command: str = ""
    parts: tuple[str, ...] = ()
    progress: Callable[[str], None] = field(default=lambda text: None)


class Workbench:
    """Holds the models of a run. Use it as a context manager; what it wrote is removed at the end."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = read_config(options.config)
        self.device, self.dtype, self.repeats = options.device, options.dtype, options.repeats
        self.notes: list[str] = []  # for the remarks of the row that is being measured
        self._folder = Path(tempfile.mkdtemp(prefix="omni-bench-"))

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def say(self, text: str) -> None:
        """Progress, one line."""
        self.options.progress(text)

    @property
    def frame_s(self) -> float:
        """Seconds of sound in a frame of codes (released: 0.08)."""
        codec = self.config.code2wav_config
        assert codec is not None
        return codec.hop_length / SAMPLE_RATE_HZ

    def need_frames(self) -> None:
        """Raise ValueError where the codec decoder draws sound by windows of codes, not by frames."""
        if not self.config.code2wav_config.by_frames:
            raise ValueError(
                f"{self.options.config} draws sound by windows of codes, and this row measures frames; "
                "benchmarks/chunk_schedules.py measures windows"
            )

    @cached_property
    def processor(self) -> OmniProcessor:
        """The packaged processor. Raises ValueError where it hears for models of another family."""
        if not self.hears:
            raise ValueError(f"{self.options.config} is of another family than the packaged processor of this row")
        return toy_processor()

    @cached_property
    def hears(self) -> bool:
        """Whether the packaged processor hears for models of the main config's family."""
        return toy_processor().files.family == self.config.family

    # the main config's models, loaded once

    @cached_property
    def folder(self) -> Path:
        """The checkpoint folder of the main config."""
        self.say("writing a checkpoint with random weights")
        return write_checkpoint(self.config, self._folder / "main", self.dtype)

    @cached_property
    def ours(self) -> OmniModel:
        if self.options.share:
            self.say("building a model with random weights")
            return random_model(self.config, self.device, self.dtype)
        return self.load(self.folder)

    @cached_property
    def peer(self) -> Peer:
        self.say("loading transformers' side")
        if self.options.share:
            return Peer.sharing(self.ours)
        return Peer.load(self.folder, self.config, self.device, self.dtype)

    @cached_property
    def compiled(self) -> OmniModel | None:
        """The same weights after `model.compile()`; None without --compile."""
        return self.compiled_twin(self.ours)

    def load(self, folder: Path, dtype: torch.dtype | None = None) -> OmniModel:
        """This library's side of a folder."""
        return OmniModel.from_pretrained(folder, dtype=dtype or self.dtype, device=self.device)

    def compiled_twin(self, model: OmniModel, mode: str | None = None) -> OmniModel | None:
        """A model on the same modules with compiled steps, warmed up; None without --compile, or where it fails."""
        if not self.options.compile:
            return None
        self.say("compiling")
        twin = copy.copy(model)  # `compile` changes how steps are run, not the modules
        start = time.perf_counter()
        try:
            twin.compile(mode)
            answer(twin, prompt(model.config, 20), tokens=3, frames=4, greedy=False)
        except Exception as error:  # whatever a compiler that does not work here raises
            self.notes.append(f"Compiling does not work here: {first_line(error)}")
            return None
        self.notes.append(f"Compiling and the first answer took {time.perf_counter() - start:.0f} s.")
        return twin

    @contextmanager
    def pair(self, config: OmniConfig, dtype: torch.dtype) -> Iterator[tuple[OmniModel, Peer, Path]]:
        """Both sides of another config, from one folder that is removed afterwards."""
        gc.collect()  # models of the pair before may lie in cycles
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            self.say("writing a checkpoint of the full-size part")
            write_checkpoint(config, folder / "model", dtype)
            model = self.load(folder / "model", dtype)
            yield model, Peer.load(folder / "model", config, self.device, dtype), folder / "model"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.collect()

    def drop_models(self) -> None:
        """Forget the main config's models, so that a row with large ones has the memory."""
        for name in ("ours", "peer", "compiled"):
            self.__dict__.pop(name, None)
        gc.collect()

    # measuring

    @cached_property
    def ceilings(self) -> Ceilings:
        """What the machine can do at best, measured once a run."""
        self.say("measuring the machine's bandwidth and matrix rate")
        return measure_ceilings(self.device, self.dtype, (1 << 20) if self.options.quick else None)

    def measure(self, runs: Mapping[str, Run], bytes_touched: float | None = None, warm_up: int = 1) -> list[Series]:
        """Series of runs that take turns."""
        rounds = take_turns(runs, self.repeats, warm_up, self.say)
        return [Series(name, samples, bytes_touched) for name, samples in rounds.items()]

    def best_setting(
        self, peer: Peer, settings: dict[str, dict[str, Any]], run: Callable[[], float | list[float]]
    ) -> tuple[str, list[str]]:
        """Try the peer's public settings -> (the fastest, what every one took or why it failed). Leaves it set."""
        found: dict[str, float] = {}
        remarks: list[str] = []
        for name, setting in settings.items():
            self.say(f"transformers, {name}")
            try:
                peer.use(**setting)
                run()
                samples = [run() for _ in range(1 if self.options.quick else TRIALS)]
            except Exception as error:  # whatever a setting that does not work here raises
                remarks.append(f"transformers with {name} does not run here: {first_line(error)}")
                continue
            found[name] = min(statistics.median(s) if isinstance(s, list) else s for s in samples)
        assert found, "transformers runs with none of its settings"
        remarks.append(
            "transformers' settings, shortest of a few runs: "
            + ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in found.items())
        )
        best = min(found, key=lambda name: found[name])
        peer.use(**settings[best])
        return best, remarks

    def labels(self, **more: Any) -> dict[str, str]:
        """Device, dtype, threads and what the caller adds."""
        base = {"device": device_name(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        if self.device.type == "cpu":
            base["threads"] = str(torch.get_num_threads())
        return base | {name: str(value) for name, value in more.items()}

    def run_labels(self) -> dict[str, Any]:
        """Machine, versions, command and ceilings, for the record."""
        import transformers

        return {
            "command": self.options.command,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cores": os.cpu_count(),
            "config": self.options.config.name,
            **self.labels(),
            "ceilings": asdict(self.ceilings),
        }


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def device_name(device: torch.device) -> str:
    """The processor's name, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return f"CPU ({names[0]})" if names else f"CPU ({platform.machine()})"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
