"""Ctrl-C and SIGTERM ask a run to end after its step, and say at once that they were heard.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop(threading.Event):
    """Set by a signal that asks a run to end; number: which."""

    number = 0


@contextmanager
def stop_signals(say: bool = False) -> Iterator[Stop]:
    """An event that SIGINT and SIGTERM set inside the block; a second one interrupts at once. say: on stderr too.

    Outside the main thread, which alone receives signals, it is never set.
    """
    event = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.number = number
        event.set()
        if say:
            _say(f"omni: {signal.Signals(number).name}: ending after this step; once more ends at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """A line on stderr, from a signal's handler too: it may come while stderr is being written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except RuntimeError:  # which Python raises then
        os.write(2, f"{line}\n".encode())
