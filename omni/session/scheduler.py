"""One thread alone does the model's work: the ticks of what runs and, between two of them, the jobs handed to it.

What a job (see `omni.session.jobs`) does before its first `yield` is cheap; a `yield` asks for leave to do one bounded
piece of model work, which then follows, and `yield 0.25` for a quarter of one; `yield WAIT` asks to be resumed once
something has changed. Between two ticks all cheap work is done, and one piece at most: the jobs that want some take
turns in the order in which they came. While nothing ticks, pieces run back to back. Jobs of one owner run one after the
other. No lock is held while the model works.

Whoever waits may be cut at any moment, and what is handed over may come from a destructor that runs in any thread, this
one included. Therefore all goes through a `SimpleQueue`, whose `put` neither blocks nor minds being re-entered, and
the thread takes no lock that another thread could leave locked.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic

import torch

from omni.session.jobs import Job, Steps, T, at_once

WAIT = object()  # what a generator yields to be resumed once something has changed
_LOOK_S = 1.0  # a waiting caller looks so often whether the thread is still there
_NOTHING: Job[None] = at_once(lambda: None)

_LIVE: set[Scheduler] = set()  # those whose thread runs


class Cancelled(Exception):
    """The job was cancelled before its end."""


class Closed(ValueError):
    """The thread was stopped before the job's end."""


class Task(Generic[T]):
    """A job on its way: `done` once it is over, with a result or an error.

    owner: jobs of one owner run in order, one at a time; None is nobody. told: called once at its end with its error,
    None if it has none, by the thread that ends it; it must not block. submitted, received, ended: ticks done when it
    was handed over, when the thread saw it, which is after the tick or the piece that runs then, and at its end.
    """

    def __init__(self, owner: object, job: Job[T], told: Callable[[BaseException | None], None] | None = None) -> None:
        self.owner, self.told = owner, told
        self.job: Job[T] | None = job  # until its end
        self.steps: Steps[T] | None = None  # once it has begun
        self.share = 1.0  # of a piece, that it asks for
        self.cancelled = self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.submitted = self.received = self.ended = 0
        self._latch = threading.Lock()
        self._latch.acquire()

    def finish(self, result: T | None, error: BaseException | None, ticks: int) -> None:
        """End it and wake whoever waits. Never blocks."""
        if self.done:
            return
        told, self.told, self.job = self.told, None, None
        if told is not None:
            with contextlib.suppress(BaseException):
                told(error)
        self.error = error if told is None else None  # it was told; its frames may hold who holds this
        self.result, self.ended, self.done = result, ticks, True
        self._latch.release()

    def wait(self, alive: Callable[[], bool]) -> bool:
        """Wait until it is over; False if the thread that runs it is there no more. It may be cut, and called again."""
        while not self.done:
            if self._latch.acquire(timeout=_LOOK_S):
                self._latch.release()  # for others that wait
            elif not alive():
                return self.done
        return True

    def outcome(self) -> T:
        """Its result, once it is over; raises what the job has raised."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame
        return self.result  # type: ignore[return-value]


class Scheduler:
    """The thread, its queue, and the order in which it works.

    busy: whether anything ticks now; tick: moves it one step; what that raises ends the thread. over: called in the
    thread at its end with what has ended it, None after `stop`. name: of the thread. All three run in the thread alone.
    """

    def __init__(
        self,
        tick: Callable[[], None],
        busy: Callable[[], bool],
        over: Callable[[BaseException | None], None],
        name: str = "omni-engine",
    ) -> None:
        self._tick, self._busy, self._over = tick, busy, over
        self.ticks = 0  # done so far
        self.pieces = 0.0
        self.cause: BaseException | None = None  # what the thread died of
        self._inbox: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._lines: dict[int, deque[Task[Any]]] = {}  # by owner; the first of each is the one that runs
        self._fresh: deque[Task[Any]] = deque()  # firsts that have not begun
        self._wanting: deque[Task[Any]] = deque()  # firsts that want a piece, in turn
        self._stalled: list[Task[Any]] = []  # firsts that wait for a change
        self._changed = self._stopping = self._ended = False
        self._pid = os.getpid()
        self._at_end = Task[None](None, _NOTHING)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    # for any thread

    def start(self) -> None:
        """Start the thread. It ends with `stop`, or before the process does."""
        _LIVE.add(self)
        try:
            self._thread.start()
        except BaseException:
            self.stop()
            if not self._thread.is_alive():
                _LIVE.discard(self)
            raise

    @property
    def here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.get_ident() == self._thread.ident

    def refuse_here(self) -> None:
        """Raise RuntimeError in the thread itself, which would wait for itself or for a lock that its caller holds."""
        if self.here:
            raise RuntimeError("a call from the engine's own thread would wait for itself; make it from another thread")

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the thread lives in; locks may be held there for ever."""
        return os.getpid() != self._pid

    @property
    def end_because(self) -> str | None:
        """Why the thread has ended or is about to, None otherwise."""
        if self.cause is not None:
            return f"the engine has died: {_named(self.cause)}"
        return "the engine was closed" if self.stopped else None

    @property
    def stopped(self) -> bool:
        """Whether the thread has ended, or is about to."""
        return self._stopping or self._ended

    @property
    def alive(self) -> bool:
        """Whether the thread is there, in this process."""
        return os.getpid() == self._pid and self._thread.is_alive()

    def check(self) -> None:
        """Raise what a call is refused with: RuntimeError in a forked child or once the thread has died, ValueError
        after `stop`. Takes no lock."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"the engine lives in process {self._pid}, and a forked child has no part in it; make an engine in the "
                "child, or start the child by spawn"
            )
        if self.cause is not None:
            raise RuntimeError(f"the engine has died: {_named(self.cause)}") from self.cause
        if self._stopping or self._ended:
            raise ValueError("the engine is closed")

    def submit(self, task: Task[Any]) -> None:
        """Hand a task over; it is `done` some time later. Raises as `check` does."""
        self.check()
        task.submitted = self.ticks
        self._inbox.put(task)
        if self._ended:
            self._refuse_rest()

    def post(self, owner: object, job: Job[Any]) -> None:
        """Hand over a job of which nobody wants to know more. Never blocks, never raises: for destructors."""
        if not self._ended and os.getpid() == self._pid:
            self._inbox.put(Task(owner, job))

    def run(self, task: Task[T]) -> T:
        """Hand a task over and wait for its result.

        Raises what the job raises, and as `check` does. If the wait is cut, the job is cancelled and, unless it is cut
        again, let go of by the thread before this raises.
        """
        self.refuse_here()
        try:
            self.submit(task)
            self._wait(task)
        except BaseException:
            self.let_go(task)
            raise
        return task.outcome()

    def cancel(self, task: Task[Any]) -> None:
        """End a task between two of its pieces, or before it begins. Never blocks, never raises."""
        task.cancelled = True
        self.post(None, at_once(lambda: self._drop(task)))

    def let_go(self, task: Task[Any]) -> None:
        """Cancel a task, whether it was submitted or not, and wait until the thread has nothing to do with it."""
        task.cancelled = True
        if not task.done:
            self.flush(Task(None, at_once(lambda: self._drop(task))))  # the queue is in order: it comes after the task

    def flush(self, task: Task[Any] | None = None) -> None:
        """Wait until a cheap task is over (None: one that does nothing), and so all cheap work handed over before.

        It is done even after `stop`, unless the thread ends first. Raises nothing.
        """
        task = task if task is not None else Task(None, _NOTHING)
        if self.here or not self.alive:
            return
        self._inbox.put(task)
        if self._ended:
            self._refuse_rest()
        task.wait(lambda: self.alive)

    def stop(self) -> None:
        """Let the thread end: what it has not done is refused. Never blocks, never raises."""
        self._stopping = True
        self._inbox.put(None)

    def join(self) -> None:
        """Wait until the thread has ended; at once in a forked child and in the thread itself."""
        if not self.here:
            self._at_end.wait(lambda: self.alive)

    # in the thread

    def owns(self, owner: object) -> bool:
        """Whether an owner has a job that runs or waits."""
        return id(owner) in self._lines

    def drop_all(self, owner: object) -> None:
        """End all jobs of an owner between two of their pieces; for a job of another owner."""
        for task in list(self._lines.get(id(owner), ())):
            self._drop(task)

    def _wait(self, task: Task[Any]) -> None:
        if not task.wait(lambda: self.alive):
            cause = self.cause or RuntimeError("its thread has ended")
            raise RuntimeError(f"the engine has died: {_named(cause)}") from cause

    def _main(self) -> None:
        cause: BaseException | None = None
        try:
            with torch.no_grad():
                self._work()
        except BaseException as error:
            cause = error
        try:
            self._end(cause)
        finally:
            _LIVE.discard(self)
            self._at_end.finish(None, None, self.ticks)

    def _work(self) -> None:
        while True:
            self._receive()
            if self._stopping:
                return
            self._begin()
            self._do_piece()
            if self._busy():
                self._tick()
                self.ticks += 1
                self._changed = True

    def _do_piece(self) -> None:
        """Do one piece of what is wanted, or several parts of one."""
        left = 1.0
        while self._wanting and self._wanting[0].share <= left:
            task = self._wanting.popleft()
            left -= task.share
            self.pieces += task.share
            self._advance(task)

    def _receive(self) -> None:
        """Take what was handed over; wait for something if there is nothing to do."""
        retries = self._changed and bool(self._stalled)
        waits = not (self._fresh or self._wanting or retries or self._busy())
        for _ in range(self._inbox.qsize() or waits):  # what comes meanwhile is for the next time
            task = self._inbox.get()
            if task is not None:
                task.received = self.ticks
                line = self._lines.setdefault(id(task if task.owner is None else task.owner), deque())
                line.append(task)
                if len(line) == 1:
                    self._fresh.append(task)

    def _begin(self) -> None:
        """Do all cheap work: begin what is new, and resume what waits for a change if there was one."""
        while self._fresh:
            self._advance(self._fresh.popleft())
        if self._changed:
            self._changed, stalled, self._stalled = False, self._stalled, []
            for task in stalled:
                self._advance(task)
        while self._fresh:
            self._advance(self._fresh.popleft())

    def _advance(self, task: Task[Any]) -> None:
        """Run a task to its next `yield`, or its end."""
        if task.done:
            return
        if task.cancelled:
            self._close(task)
            return
        try:
            if task.steps is None:
                assert task.job is not None
                task.steps = task.job()
            wish = next(task.steps)
        except StopIteration as end:
            self._finish(task, end.value, None)
        except BaseException as error:
            self._finish(task, None, error)
        else:
            if wish is WAIT:
                self._stalled.append(task)
            else:
                task.share = 1.0 if wish is None else min(float(wish), 1.0)
                self._wanting.append(task)
                self._changed = True

    def _close(self, task: Task[Any]) -> None:
        """End a task between two pieces."""
        error: BaseException = Cancelled("the job was cancelled")
        if task.steps is not None:
            try:
                task.steps.close()
            except BaseException as raised:
                error = raised
        self._finish(task, None, error)

    def _finish(self, task: Task[Any], result: Any, error: BaseException | None) -> None:
        """End a task; the next of its owner's may begin."""
        key = id(task if task.owner is None else task.owner)
        line = self._lines[key]
        if line[0] is task:
            line.popleft()
            if line:
                self._fresh.append(line[0])
        else:
            line.remove(task)
        if not line:
            del self._lines[key]
        task.steps = None
        self._changed = True
        task.finish(result, error, self.ticks)

    def _drop(self, task: Task[Any]) -> None:
        """End a task wherever it stands."""
        key = id(task if task.owner is None else task.owner)
        if not task.done and task in self._lines.get(key, ()):
            for where in (self._fresh, self._wanting, self._stalled):
                with contextlib.suppress(ValueError):
                    where.remove(task)
            self._close(task)

    def _end(self, cause: BaseException | None) -> None:
        """Tell everyone who waits why there is no more to wait for."""
        self.cause, self._ended = cause, True
        for line in list(self._lines.values()):
            for task in line:
                if task.steps is not None:
                    with contextlib.suppress(BaseException):
                        task.steps.close()
                task.finish(None, self.refusal(), self.ticks)
        self._lines.clear()
        self._refuse_rest()
        self._over(cause)

    def refusal(self) -> Exception:
        """What those get who wait for a thread that has ended."""
        if self.cause is None:
            return Closed("the engine was closed before this was done")
        error = RuntimeError(f"the engine has died: {_named(self.cause)}")
        error.__cause__ = self.cause
        return error

    def _refuse_rest(self) -> None:
        """End what was handed over when the thread had ended already."""
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._inbox.get_nowait()
                if task is not None:
                    task.finish(None, self.refusal(), self.ticks)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _end_all() -> None:
    """Before the process ends: a thread inside the model when Python is taken down would abort it."""
    mine = [scheduler for scheduler in list(_LIVE) if scheduler.alive]
    for scheduler in mine:
        scheduler.stop()
    for scheduler in mine:
        scheduler.join()
        scheduler._thread.join(timeout=_LOOK_S)


atexit.register(_end_all)
