"""How many CPU threads a turn takes: one for a small model's small steps, else as many as torch has.

A token or a frame of a small model is thousands of operations of a few microseconds each. A second thread has next to
nothing to do in them, but every operation that is shared waits for it; where another process holds its core, each wait
is as long as the scheduler likes. docs/streaming.md has the measurements.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SMALL_WIDTH = 512  # hidden size of the Thinker up to which a model is small
SHORT_TOKENS = 256  # tokens up to which reading is a small step too: 20 s of sound, a picture of 512 x 512 pixels
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which torch is told its number


def numbers_of_torch() -> frozenset[int]:
    """The numbers of threads that torch may have chosen by itself: the CPUs of this process, or their cores.

    Which of them it is depends on how torch was built (with MKL: the cores).
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    numbers = {len(cpus), min(len(cpus), torch.get_num_interop_threads())}  # the latter: cores as torch counts them
    topology = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    with suppress(OSError):  # not Linux, or hidden
        numbers.add(len({path.read_text(encoding="ascii") for path in topology}))
    if sys.platform == "darwin":  # torch takes the fast cores of an Apple chip
        count, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        name = b"hw.perflevel0.physicalcpu"
        if ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            numbers.add(count.value)
    return frozenset(numbers)


TORCH_NUMBERS = numbers_of_torch()  # found at the start, as torch does: a process may be moved to other CPUs later


def chosen_by_user() -> bool:
    """Whether the user has chosen this OS thread's number: by a variable of the environment, or by
    `torch.set_num_threads`, seen as a number that torch does not choose by itself."""
    return torch.get_num_threads() not in TORCH_NUMBERS or any(os.environ.get(name) for name in _VARIABLES)


def threads_for(width: int, tokens: int = 1) -> int | None:
    """Threads for a step on so many tokens of a model of this width; None: as many as this OS thread has."""
    return 1 if width <= SMALL_WIDTH and tokens <= SHORT_TOKENS and not chosen_by_user() else None


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Inside, this OS thread computes with so many threads (None: as before); afterwards with as many as before.

    Threads that have used torch keep their numbers. One that uses it for the first time meanwhile begins with the
    number set here, since torch hands on what was set last.
    """
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)
