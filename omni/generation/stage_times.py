"""How long each stage of answering takes, without making a GPU wait for the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimes:
    """Adds up seconds by stage: the host's clock on a CPU, events in the stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`."""
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._pending.append((name, first, last))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far; on a GPU this waits for what has been started."""
        pending, self._pending = self._pending, []  # another thread may be adding to them
        for name, first, last in pending:
            last.synchronize()
            self._add(name, first.elapsed_time(last) / 1000)
        return self._seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
