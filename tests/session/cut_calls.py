"""Calls that are cut at a chosen bytecode, as Ctrl-C cuts them."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cut_at(point: int, call: Callable[[], Any], code: Path, *, twice: bool = False) -> bool:
    """Make a call that is cut at the `point`th bytecode of `code`, a file or a folder; False if it ended before.

    twice: it is cut again at once, as soon as Python looks for signals.
    """
    left, of_code = [point], str(code)
    me = ctypes.c_ulong(threading.get_ident())

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(of_code):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                if twice:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(me, ctypes.py_object(KeyboardInterrupt))
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    with contextlib.suppress(KeyboardInterrupt):  # the second one may come as late as here
        try:
            sys.settrace(trace)
            with contextlib.suppress(KeyboardInterrupt):
                call()
        finally:
            sys.settrace(before)
    return left[0] <= 0
