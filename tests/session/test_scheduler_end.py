"""How the engine's thread ends: everyone who waits is told, and no process is torn down around it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_scheduler import PATIENCE_S, Clock, cheap, running

from omni.session import scheduler as module
from omni.session.scheduler import Task

ROOT = Path(__file__).parents[2]
clock = pytest.fixture(running, name="clock")


def test_a_thread_that_dies_tells_everyone_why(clock: Clock) -> None:
    clock.begin()
    results: dict[str, BaseException] = {}

    def wait(name: str, job: Callable[[], Any]) -> None:
        try:
            clock.run(job, name)
        except BaseException as error:
            results[name] = error

    jobs = {"begun": clock.pieces("begun", 9), "second": clock.pieces("second", 9), "cheap": cheap}
    threads = [threading.Thread(target=wait, args=item) for item in jobs.items()]
    for thread in threads[:2]:
        thread.start()
    while clock.scheduler._inbox.qsize() < 2:
        threading.Event().wait(0.001)
    clock.next()
    threads[2].start()
    while clock.scheduler._inbox.qsize() < 1:
        threading.Event().wait(0.001)
    clock.error = SystemExit("the device is gone")
    clock.allowed.put(None)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(results) == sorted(jobs)
    for error in results.values():
        assert type(error) is RuntimeError and "the engine has died: SystemExit: the device is gone" in str(error)
        assert error.__cause__ is clock.error
    assert clock.over == [clock.error] and "begun closed" in clock.log
    with pytest.raises(RuntimeError, match="the engine has died"):
        clock.run(cheap)
    clock.scheduler.post(None, cheap)
    clock.scheduler.let_go(Task(None, cheap))
    clock.scheduler.stop()
    clock.scheduler.join()


def test_stop_refuses_what_is_left_and_may_be_called_by_anyone_at_any_time(clock: Clock) -> None:
    clock.begin()
    task = clock.submit("a", clock.pieces("a", 3))
    clock.next()
    threads = [threading.Thread(target=clock.scheduler.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    clock.scheduler.stop()
    clock.allowed.put(None)
    with pytest.raises(ValueError, match="the engine was closed"):
        clock.outcome(task)
    clock.scheduler.join()
    assert clock.over == [None] and clock.log[-1] == "a closed"
    with pytest.raises(ValueError, match="the engine is closed"):
        clock.run(cheap)
    for thread in threads:
        thread.join()


def test_stop_from_the_thread_itself(clock: Clock) -> None:
    def job() -> Iterator[None]:
        clock.scheduler.stop()
        clock.scheduler.join()
        return
        yield

    clock.run(job)
    clock.scheduler.join()
    assert clock.over == [None]


def test_what_comes_after_the_end_is_refused_and_not_left_waiting(clock: Clock) -> None:
    clock.scheduler.stop()
    clock.scheduler.join()
    clock.scheduler._stopping = False  # as if the thread had ended between the check and the hand-over
    clock.scheduler._ended, check = True, clock.scheduler.check
    clock.scheduler.check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the engine was closed"):
        clock.run(cheap)
    clock.scheduler.check = check  # type: ignore[method-assign]


def test_a_thread_that_is_gone_without_a_word(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the end itself fails, those who wait find that the thread is gone."""
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(clock.scheduler, "_end", lambda cause: None)
    clock.begin()
    task = clock.submit("a", clock.pieces("a", 3))
    clock.scheduler.stop()
    clock.allowed.put(None)
    with pytest.raises(RuntimeError, match="the engine has died"):
        clock.scheduler._wait(task)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told(clock: Clock) -> None:
    clock.begin()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            clock.scheduler.post(None, cheap)
            clock.scheduler.let_go(Task(None, cheap))
            clock.scheduler.join()
            clock.run(cheap)
        except RuntimeError as error:
            status = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    clock.next()


ENDS = {
    "end": "",
    "sys.exit": "sys.exit(0)",
    "exception": "raise ValueError('the end')",
    "in a thread": "t = threading.Thread(target=time.sleep, args=(0.2,)); t.start()",
    "fork": "if os.fork() == 0: sys.exit(0)\nos.wait()",
}


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=pytest.mark.slow) if end in ("sys.exit", "exception") else end for end in ENDS]
)
def test_a_process_may_end_while_it_ticks(end: str) -> None:
    """The thread is inside of the model then, which must not be torn away under it."""
    script = f"""
import os, sys, threading, time, torch
from omni.session.scheduler import Scheduler, Task
a = torch.randn(300, 300)
scheduler = Scheduler(lambda: (a @ a @ a).sum().item(), lambda: True, lambda cause: print("over", cause))
scheduler.start()
while scheduler.ticks < 3:
    time.sleep(0.001)
{ENDS[end]}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if end == "exception" else 0), done.stderr
    assert done.stdout == "over None\n"
    assert ("the end" in done.stderr) if end == "exception" else not done.stderr
