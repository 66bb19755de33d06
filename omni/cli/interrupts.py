"""What Ctrl-C does while a reply is given."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While it is entered, the first Ctrl-C only notes itself in `pressed`, once the reply has begun.

    A session forgets a reply into which an exception breaks, so a reply is not broken off: what runs looks at `pressed`
    between two events. Before anything has come, and from the second Ctrl-C on, KeyboardInterrupt is raised as always.
    silence: is called at once, to stop the sound. In a thread that gets no signals nothing changes.
    """

    def __init__(self, silence: Callable[[], None]) -> None:
        self.pressed = self.begun = False
        self._silence = silence
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._silence()
        if self.pressed or not self.begun:
            raise KeyboardInterrupt
        self.pressed = True
