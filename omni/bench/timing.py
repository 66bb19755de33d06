"""Clocks: synchronised reads, runs that take turns, and the memory of a process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

Run = Callable[[], "float | list[float]"]


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, number: int = 1) -> float:
    """Seconds that one call takes, the mean of `number` calls in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(number):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / number


def enough_calls(work: Callable[[], object], device: torch.device, least_s: float = 0.02, most: int = 1000) -> int:
    """How many calls in a row take about `least_s` seconds, so that the clock's grain does not matter."""
    work()
    once = seconds_of(work, device)
    return max(1, min(most, int(least_s / max(once, 1e-7))))


def take_turns(
    runs: Mapping[str, Run], repeats: int, warm_up: int = 1, progress: Callable[[str], None] | None = None
) -> dict[str, list[list[float]]]:
    """Run all in turn, `repeats` times, so that they meet the same machine -> samples of each, one list a round.

    A run returns its own seconds, one number or several samples.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            if progress is not None:
                progress(f"{name}: {'warm-up' if turn < warm_up else f'{turn - warm_up + 1} of {repeats}'}")
            samples = run()
            if turn >= warm_up:
                rounds[name].append(samples if isinstance(samples, list) else [samples])
    return rounds


def percentile(samples: list[float], share: float) -> float:
    """The value below which `share` (0 .. 1) of the samples lie, linear between neighbours."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def paired_ratio(top: list[list[float]], bottom: list[list[float]]) -> float:
    """The median over the rounds of the ratio of the two medians of a round."""
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(top, bottom))


def anonymous_memory() -> int | None:
    """Bytes of this process's anonymous memory (RssAnon), None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


class Memory:
    """What a block has taken at its peak beyond what was there before, in bytes; None where it cannot be read."""

    peak: int | None = None


@contextmanager
def peak_memory(device: torch.device, period_s: float = 0.002) -> Iterator[Memory]:
    """Peak memory of the block: the allocator's on a GPU, RssAnon looked at every `period_s` on a CPU."""
    memory = Memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) - before
        return
    start = anonymous_memory()
    if start is None:
        yield memory
        return
    highest, done = [start], threading.Event()

    def watch() -> None:
        while not done.wait(period_s):
            highest.append(max(highest.pop(), anonymous_memory() or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
    memory.peak = max(highest[0], anonymous_memory() or 0) - start
