"""Which session of an engine has which row, and where the caches of the others are.

A session that has read nothing needs no row. When one needs a row and none is free, the caches of the idle session that
was used least recently move to host memory, and come back when that session has something to read. All of this is done
by the engine's thread, as jobs of its scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from omni.session.jobs import Job, Steps, T
from omni.session.scheduler import WAIT

_PATIENCE = 4  # jobs for each row, after which an idle session makes room for what is read in advance


class EngineFullError(RuntimeError):
    """An engine has as many sessions as it takes."""


class Place:
    """Where the caches of one session are: in `row`, else in `saved`, else nowhere, since it has read nothing yet."""

    def __init__(self) -> None:
        self.row: int | None = None
        self.saved: Any = None
        self.used = 0  # when a job last used the row, as a count of such jobs
        self.removed = False


class Places:
    """The places of `rows` rows and `parked` further sessions.

    save, load, clear: copy a row to host memory, put such a copy into a row, and forget what a row has read. idle:
    whether nothing runs or waits in a place, so that its row may be given away.
    """

    def __init__(
        self,
        rows: int,
        parked: int,
        *,
        save: Callable[[int], Any],
        load: Callable[[int, Any], None],
        clear: Callable[[int], None],
        idle: Callable[[Place], bool],
    ) -> None:
        self.parked = parked
        self._save, self._load, self._clear, self._idle = save, load, clear, idle
        self.in_row: list[Place | None] = [None] * rows
        self.all: set[Place] = set()
        self._queue: deque[Place] = deque()  # those that wait for a row, in order
        self._promised: Place | None = None  # whose row the first of them is about to get
        self._passed: Place | None = None  # has something to do, and lets it go first
        self._clock = 0

    @property
    def full(self) -> bool:
        """Whether there is no place left."""
        return len(self.all) >= len(self.in_row) + self.parked

    def add(self) -> Place:
        """A place for a new session, without a row. Raises EngineFullError."""
        rows = len(self.in_row)
        if self.full:
            parked = f" and {self.parked} parked" if self.parked else ""
            raise EngineFullError(
                f"all {rows} sessions{parked} of the engine are taken; close one, or raise max_sessions or max_parked"
            )
        place = Place()
        self.all.add(place)
        return place

    def remove(self, place: Place) -> None:
        """Give a place up; its row is free, and empty. It may be called again."""
        place.removed = True
        if place in self.all:
            self.all.remove(place)
            self._vacate(place)
        place.saved = None

    def with_row(self, place: Place, job: Job[T], *, ahead: bool = False) -> Steps[T | None]:
        """A job that needs the place's row: it waits for one in order of arrival, and has it until it ends.

        ahead: it reads what a later job would read anyway, and is dropped (None) when no row can be had at once, or
        only by moving a session that was used lately: many that are spoken to at once would only move each other.
        """
        if ahead and (place is self._promised or (place.row is None and not self._has_room())):
            return None
        while not place.removed and (place.row is None or place is self._promised):
            if place.row is None:
                yield from self._find_row(place)
            else:
                self._passed = place
                yield WAIT
        if place.removed:
            raise ValueError("the session was closed")
        self._clock += 1
        place.used = self._clock
        return (yield from job())

    def _find_row(self, place: Place) -> Steps[None]:
        """Wait until a row is to be had, then ask for leave to move there."""
        self._queue.append(place)
        try:
            while place.row is None:
                while not (self._queue[0] is place and self._can_have_row()):
                    yield WAIT
                self._promised = None if None in self.in_row else self._least_used()
                try:
                    yield  # moving is work; what the idle session has to do meanwhile comes after it
                    if self._can_have_row():
                        self._move_in(place)
                finally:
                    self._promised = self._passed = None
        finally:
            self._queue.remove(place)

    def _has_room(self) -> bool:
        """Whether a row can be had without moving a session that was used lately."""
        return not self._queue and self._can_have_row(after=_PATIENCE * len(self.in_row))

    def _can_have_row(self, after: int = 0) -> bool:
        """Whether a row is free, or that of an idle session which has not been used for so many jobs."""
        idle = self._least_used()
        return None in self.in_row or (idle is not None and self._clock - idle.used >= after)

    def _least_used(self) -> Place | None:
        promised = self._promised
        if promised is not None and promised.row is not None and promised is self._passed:
            return promised
        idle = [place for place in self.in_row if place is not None and self._idle(place)]
        return min(idle, key=lambda place: place.used, default=None)

    def _move_in(self, place: Place) -> None:
        """Give the place a row, moving another session's caches out of it if none is free."""
        if None not in self.in_row:
            other = self._least_used()
            assert other is not None and other.row is not None
            other.saved = self._save(other.row)  # if this fails, nothing has changed
            self._vacate(other)
        row = self.in_row.index(None)
        try:
            if place.saved is not None:
                self._load(row, place.saved)
        except BaseException:
            self._clear(row)
            raise
        self.in_row[row], place.row, place.saved = place, row, None

    def _vacate(self, place: Place) -> None:
        row, place.row = place.row, None
        if row is not None:
            self._clear(row)
            self.in_row[row] = None
