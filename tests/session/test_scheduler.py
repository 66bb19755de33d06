"""The engine's thread on its own: what it does between two ticks, and that no one waits in vain."""

from __future__ import annotations

import _thread
import gc
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cut_calls import cut_at

from omni.session import scheduler as module
from omni.session.scheduler import WAIT, Cancelled, Scheduler, Task

ROOT = Path(__file__).parents[2]
SCHEDULER = Path(module.__file__)  # its code
PATIENCE_S = 20  # for what comes at once; a test that hangs fails after it


class Clock:
    """A scheduler and what ticks in it: while `busy`, each tick waits until the test lets it end.

    log: what happens, in order; over: what the scheduler says at its end.
    """

    def __init__(self) -> None:
        self.busy = False
        self.error: BaseException | None = None  # what the next tick that may end raises
        self.allowed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.inside = threading.Semaphore(0)
        self.log: list[str] = []
        self.over: list[BaseException | None] = []
        self.scheduler = Scheduler(self.tick, lambda: self.busy, self.over.append)

    def tick(self) -> None:
        self.log.append("tick")
        self.inside.release()
        self.allowed.get(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error

    def begin(self) -> None:
        """Let it tick, and wait until it is inside of a tick."""
        self.busy = True
        self.scheduler.post(None, cheap)
        assert self.inside.acquire(timeout=PATIENCE_S)

    def next(self) -> list[str]:
        """Let this tick end and the next one begin -> what happened in between."""
        before = len(self.log)
        self.allowed.put(None)
        assert self.inside.acquire(timeout=PATIENCE_S)
        return self.log[before:-1]

    def end(self) -> None:
        """Let this tick be the last one."""
        self.busy = False
        self.allowed.put(None)

    def submit(self, owner: object, job: Callable[[], Any]) -> Task[Any]:
        task: Task[Any] = Task(owner, job)
        self.scheduler.submit(task)
        return task

    def run(self, job: Callable[[], Any], owner: object = None) -> Any:
        return self.scheduler.run(Task(owner, job))

    def outcome(self, task: Task[Any]) -> Any:
        assert task.wait(lambda: self.scheduler.alive)
        return task.outcome()

    def pieces(self, name: str, count: int) -> Callable[[], Generator[None, None, str]]:
        """A job of so many pieces."""

        def job() -> Generator[None, None, str]:
            self.log.append(f"{name} begins")
            try:
                for number in range(count):
                    yield
                    self.log.append(f"{name}{number}")
            except GeneratorExit:
                self.log.append(f"{name} closed")
                raise
            return name

        return job

    def hold(self) -> Callable[[], None]:
        """Keep the thread inside of a job until the function that is returned is called."""
        inside, go = threading.Event(), threading.Event()

        def job() -> Iterator[None]:
            inside.set()
            go.wait(PATIENCE_S)
            return
            yield

        self.scheduler.post(None, job)
        assert inside.wait(PATIENCE_S)
        return go.set


def cheap(value: Any = None) -> Generator[None, None, Any]:
    return value
    yield


def raising(error: BaseException, pieces: int = 0) -> Generator[None, None, None]:
    for _ in range(pieces):
        yield
    raise error


def running() -> Iterator[Clock]:
    """A clock whose thread runs, and has ended afterwards."""
    made = Clock()
    made.scheduler.start()
    yield made
    made.scheduler.stop()
    made.end()
    made.scheduler.join()
    made.scheduler._thread.join(PATIENCE_S)
    assert not made.scheduler.alive


clock = pytest.fixture(running, name="clock")


# order


def test_all_cheap_work_and_one_piece_between_two_ticks(clock: Clock) -> None:
    clock.begin()
    tasks = [clock.submit(owner, clock.pieces(owner, 2)) for owner in ("a", "b")]
    quick = [clock.submit(None, lambda i=i: cheap(i)) for i in range(5)]
    assert clock.next() == ["a begins", "b begins", "a0"]
    assert [clock.outcome(task) for task in quick] == list(range(5))
    assert {task.ended - task.submitted for task in quick} == {1}
    assert clock.next() == ["b0"]
    assert clock.next() == ["a1"] and clock.outcome(tasks[0]) == "a"
    assert clock.next() == ["b1"] and clock.outcome(tasks[1]) == "b"
    assert clock.next() == []
    assert (clock.scheduler.ticks, clock.scheduler.pieces) == (5, 4)


def test_a_job_of_one_piece_takes_the_tick_that_runs_and_a_piece(clock: Clock) -> None:
    clock.begin()
    task = clock.submit("a", clock.pieces("a", 1))
    assert clock.next() == ["a begins", "a0"]
    assert clock.outcome(task) == "a" and task.ended - task.submitted == 1


def test_a_short_job_behind_a_long_one_waits_for_one_piece_of_it(clock: Clock) -> None:
    clock.begin()
    long = clock.submit("long", clock.pieces("long", 100))
    clock.next()
    task = clock.submit("short", clock.pieces("short", 1))
    assert clock.next() == ["short begins", "long1"]
    assert clock.next() == ["short0"]
    assert clock.outcome(task) == "short" and task.ended - task.submitted == 2 and not long.done


def test_parts_of_a_piece_go_together_in_turn(clock: Clock) -> None:
    def parts(name: str, *shares: float) -> Iterator[Any]:
        for share in shares:
            yield share
            clock.log.append(name)

    clock.begin()
    for name, shares in (("a", (0.25, 0.25)), ("b", (0.5, 0.25)), ("c", (7.0,))):
        clock.submit(name, lambda name=name, shares=shares: parts(name, *shares))
    assert clock.next() == ["a", "b"]  # c, which comes next, wants a whole one
    assert clock.next() == ["c"]
    assert clock.next() == ["a", "b"]
    assert clock.next() == [] and clock.scheduler.pieces == 2.25


def test_pieces_run_back_to_back_in_turn_while_nothing_ticks(clock: Clock) -> None:
    go = clock.hold()
    tasks = [clock.submit(owner, clock.pieces(owner, 3)) for owner in ("a", "b")]
    go()
    assert [clock.outcome(task) for task in tasks] == ["a", "b"]
    assert clock.log == ["a begins", "b begins", "a0", "b0", "a1", "b1", "a2", "b2"]


def test_jobs_of_one_owner_run_in_order_one_at_a_time(clock: Clock) -> None:
    go, owner = clock.hold(), object()
    tasks = [clock.submit(owner, clock.pieces(name, count)) for name, count in (("a", 2), ("b", 0), ("c", 1))]
    go()
    assert [clock.outcome(task) for task in tasks] == ["a", "b", "c"]
    assert clock.log == ["a begins", "a0", "a1", "b begins", "c begins", "c0"]
    assert not clock.run(lambda: cheap(clock.scheduler.owns(owner)))


def test_what_waits_is_resumed_in_order_when_something_has_changed(clock: Clock) -> None:
    looks, free, taken = [], [False], []

    def job(name: str) -> Iterator[Any]:
        while not free[0]:
            looks.append(name)
            yield WAIT
        free[0] = False
        taken.append(name)

    tasks = [clock.submit(None, lambda name=name: job(name)) for name in ("a", "b")]
    clock.run(cheap)
    seen = len(looks)
    assert not any(task.done for task in tasks)
    clock.scheduler._inbox.put(None)  # a look that changes nothing
    clock.scheduler._inbox.put(None)
    assert len(looks) <= seen + 2

    def release() -> Iterator[Any]:
        free[0] = True
        return
        yield

    for task in tasks:
        clock.run(release)
        clock.outcome(task)
    assert taken == ["a", "b"]


# errors and cancelling


def test_what_a_job_raises_is_raised_in_its_caller_with_its_traceback(clock: Clock) -> None:
    for error in (ValueError("wrong"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        for pieces in (0, 2):
            with pytest.raises(type(error)) as caught:
                clock.run(lambda e=error, n=pieces: raising(e, n))
            assert "raising" in [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(TypeError):
        clock.run(lambda: 3)  # no generator
    assert clock.run(lambda: cheap(4)) == 4


def test_a_cancelled_job_ends_between_two_pieces_and_its_owner_s_next_begins(clock: Clock) -> None:
    clock.begin()
    first, second, third = (clock.submit("owner", clock.pieces(name, 3)) for name in "abc")
    clock.next()
    clock.scheduler.cancel(first)
    clock.scheduler.cancel(second)
    assert clock.next() == ["a closed", "c begins", "c0"]
    for task in (first, second):
        with pytest.raises(Cancelled):
            clock.outcome(task)
    clock.scheduler.cancel(second)  # again
    clock.end()
    assert clock.outcome(third) == "c"
    clock.scheduler.cancel(third)
    assert clock.run(lambda: cheap(1)) == 1


def test_a_cancelled_job_that_waits_is_let_go(clock: Clock) -> None:
    def waits() -> Iterator[Any]:
        while True:
            yield WAIT

    task = clock.submit("owner", waits)
    clock.run(cheap)
    clock.scheduler.let_go(task)
    with pytest.raises(Cancelled):
        clock.outcome(task)
    clock.scheduler.let_go(Task("never submitted", waits))


def test_a_cut_wait_cancels_its_job_and_the_thread_has_let_it_go(clock: Clock) -> None:
    closed = []

    def job() -> Iterator[None]:
        try:
            _thread.interrupt_main()
            while True:
                yield
        finally:
            closed.append(1)

    with pytest.raises(KeyboardInterrupt):
        clock.run(job)
    assert closed == [1]
    assert clock.run(lambda: cheap(2)) == 2


def test_a_wait_may_be_cut_at_any_bytecode(clock: Clock) -> None:
    """Whatever was handed over is over afterwards, and the next call finds the thread as ever."""
    running: list[str] = []

    def job() -> Iterator[None]:
        running.append("x")
        try:
            yield
            yield
        finally:
            running.remove("x")

    points = 0
    while True:
        points += 1
        if not cut_at(points, lambda: clock.run(job), SCHEDULER):
            break
        clock.run(cheap)
        assert not running, points
    assert points > 100


def test_a_wait_may_be_cut_twice(clock: Clock) -> None:
    """What is left of it is let go when it is asked for, as a session does before its next call."""
    running: list[str] = []

    def job() -> Iterator[None]:
        running.append("x")
        try:
            yield
            yield
        finally:
            running.remove("x")

    cut, point = True, 0
    while cut:
        point += 1
        task: Task[Any] = Task("owner", job)
        cut = cut_at(point, lambda task=task: clock.scheduler.run(task), SCHEDULER, twice=True)
        clock.scheduler.let_go(task)
        assert not running, point
    assert point > 100 and clock.run(lambda: cheap(3)) == 3


def test_a_call_from_the_thread_itself_is_refused(clock: Clock) -> None:
    def job() -> Iterator[None]:
        clock.run(cheap)
        yield

    with pytest.raises(RuntimeError, match="own thread"):
        clock.run(job)


class Dropped:
    """It hands a job over when it is collected."""

    def __init__(self, scheduler: Scheduler, log: list[str]) -> None:
        self.scheduler, self.log, self.me = scheduler, log, self

    def __del__(self) -> None:
        log = self.log
        self.scheduler.post(None, lambda: cheap(log.append(threading.current_thread().name)))


def test_what_is_collected_in_the_thread_may_hand_over_a_job(clock: Clock) -> None:
    log: list[str] = []

    def collect() -> Iterator[None]:
        for _ in range(20):
            Dropped(clock.scheduler, log)
            gc.collect()
        return
        yield

    gc.freeze()  # so that a collection is quick, whatever other tests have left
    try:
        clock.run(collect)
    finally:
        gc.unfreeze()
    clock.run(cheap)
    assert log == ["omni-engine"] * 20
