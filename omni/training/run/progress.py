"""How far a run is, for whoever waits: a bar in a terminal, a line now and then where there is none.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Lines:
    """Takes the place of the bar in a log file: a line on stderr after the first step, then one every `every_s`."""

    def __init__(self, total: int, initial: int, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.first, self.every_s, self.clock = total, initial, initial, every_s, clock
        self.began = clock()
        self.due = self.began  # when the next line is
        self.shown: dict[str, Any] = {}

    def set_postfix(self, refresh: bool = False, **shown: Any) -> None:
        """What the next line says beside the step."""
        self.shown = shown

    def update(self) -> None:
        """A step is done."""
        self.done += 1
        now = self.clock()
        if now < self.due and self.done < self.total:
            return
        self.due = now + self.every_s
        left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
        said = ", ".join(f"{name} {value}" for name, value in self.shown.items())
        end = f", {tqdm.format_interval(left)} left" if self.done < self.total else ""
        print(f"step {self.done}/{self.total}: {said}{end}", file=sys.stderr, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def show_progress(total: int, initial: int, *, show: bool, every_s: float) -> Any:
    """A bar where stderr is a terminal, else lines every `every_s` seconds (0: none); `show` False is neither."""
    if show and every_s and not sys.stderr.isatty():
        return Lines(total, initial, every_s)
    return tqdm(total=total, initial=initial, unit="step", delay=2, disable=None if show else True)
