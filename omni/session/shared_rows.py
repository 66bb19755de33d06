"""The rows that the sessions of an engine share: who speaks in them, who hears it, and the thread that moves them.

All but what is said to be for any thread runs in the engine's thread, which alone touches the rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from omni.generation.events import Event, TurnEnd
from omni.generation.rows import Rows
from omni.generation.turn import Turn
from omni.parts import ModelParts
from omni.session.jobs import Job, Steps, at_once
from omni.session.places import Place, Places
from omni.session.replies import Reply, end_early, end_unbegun, note_events, record
from omni.session.scheduler import Cancelled, Closed, Scheduler, Task

if TYPE_CHECKING:
    from omni.session.engine import EngineSession

MAX_WAITING_EVENTS = 64  # of one turn; it pauses until they are read
_LOOK_S = 1.0  # a waiting reader looks so often whether the thread is still there


class Outlet:
    """The events of one reply on their way from the engine's thread to their one reader.

    task: the job that reads the prompt and begins the turn.
    """

    def __init__(self, session: EngineSession, reply: Reply) -> None:
        self._session, self.reply = weakref.ref(session), reply
        self.task: Task[None] | None = None
        self._items: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def session(self) -> EngineSession | None:
        """Whose reply it is, as long as it is there."""
        return self._session()

    @property
    def turn(self) -> Turn:
        return self.reply.turn

    # the engine's thread

    def put(self, item: Event | BaseException | None) -> None:
        """Hand over an event, or an error that ends the reply; None only wakes the reader."""
        self._items.put(item)
        if (waiter := self._waiter) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                waiter[0].call_soon_threadsafe(_wake, waiter[1])

    def deliver(self, event: Event) -> None:
        """Hand over an event of the turn; with too many that wait, the turn pauses."""
        self.put(dataclasses.replace(event, row=0))
        if self.waiting >= MAX_WAITING_EVENTS:
            self.turn.paused = True
            if self._few_wait:  # they were read meanwhile, perhaps before the pause could be seen
                self.turn.paused = False

    def fail(self, error: BaseException) -> None:
        """End the reply by an error."""
        self.reply.failed = error
        self.put(error)

    def begun(self, error: BaseException | None) -> None:
        """The prompt was read and the turn begun, or not."""
        if isinstance(error, (Cancelled, Closed)):
            try:
                if (session := self.session) is not None:
                    end_unbegun(session, self.reply)
                self.put(None)
            except Exception as failed:  # else the reader would wait for ever
                self.fail(failed)
        elif error is not None:
            self.fail(error)

    # the reader

    @property
    def waiting(self) -> int:
        """What was handed over and not taken."""
        return self._items.qsize()

    @property
    def _few_wait(self) -> bool:
        return self.waiting < MAX_WAITING_EVENTS // 2

    def take(self, shared: SharedRows) -> Event | None:
        """Wait for what comes next, None if that is no event, or another reader has taken the last one.

        Raises what has ended the reply.
        """
        while True:
            try:
                item = self._items.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if self.reply.over:
                    return None
                if not shared.scheduler.alive:
                    shared.scheduler.check()
                    raise RuntimeError("the engine has died: its thread has ended") from None
        if self.turn.paused and self._few_wait:
            shared.scheduler.post(None, at_once(self._go_on))
        try:
            if isinstance(item, BaseException):
                raise item
            return item
        finally:
            del item  # it holds this frame

    async def ready(self, shared: SharedRows) -> None:
        """Wait until `take` returns at once."""
        loop = asyncio.get_running_loop()
        while self._items.empty() and shared.scheduler.alive:
            future = loop.create_future()
            self._waiter = loop, future
            try:
                if self._items.empty():  # else: it came before the engine's thread could see who waits
                    await asyncio.wait([future], timeout=_LOOK_S)
            finally:
                self._waiter = None

    def _go_on(self) -> None:
        self.turn.paused = False


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Seat:
    """A session's hold on its place among the rows; whatever becomes of the session, the place is given up with it."""

    place: Place | None = None

    def __init__(self, shared: SharedRows) -> None:
        self.shared = shared

    def take(self, saved: Any = None) -> None:
        """Take a place, for a session whose row was saved like this. In the engine's thread; raises EngineFullError."""
        if self.shared.places.full:
            self.shared.leave_forgotten()
        give_up = self.shared.give_up
        self.place = place = self.shared.places.add()
        place.saved = saved
        # No destructor: whoever keeps the error of one that is cut, as `sys.unraisablehook` may, keeps its object.
        self.shared.seats[place] = weakref.ref(self, lambda _: give_up(place))

    def give_up(self) -> None:
        """Give the place up, a little later. Never waits; it may be called again."""
        if self.place is not None:
            self.shared.give_up(self.place)


class SharedRows:
    """`rows` rows of a model, `parked` places more, and the thread."""

    def __init__(self, model: ModelParts, rows: int, parked: int) -> None:
        self.rows = Rows(model, rows)
        self.scheduler = Scheduler(self._tick, self._busy, self._over)
        self.outlets: dict[int, Outlet] = {}  # of the turns that run, by row
        self.seats: dict[Place, weakref.ref[Seat]] = {}
        self.places = Places(
            rows, parked, save=self.rows.save_row, load=self.rows.load_row, clear=self._clear, idle=self._idle
        )

    def give_up(self, place: Place) -> None:
        """Have a place left, a little later. Any thread may call it, at any moment: it never waits and never raises."""
        with contextlib.suppress(BaseException):  # nobody would hear of it; if it is cut, `leave_forgotten` makes up
            self.scheduler.post(None, at_once(partial(self.leave, place)))

    # what jobs do

    def begin(self, outlet: Outlet, place: Place, job: Job[None]) -> Steps[None]:
        """Read a prompt and begin a turn, in the session's row."""
        yield from job()
        assert place.row is not None
        self.outlets[place.row] = outlet

    def end(self, outlet: Outlet, played_ms: float | None) -> list[int] | None:
        """Interrupt a reply -> the ids that are kept of it; None if it has ended in the meantime. Needs no row."""
        session, reply = outlet.session, outlet.reply
        if reply.recorded:
            return None if reply.turn.interruption is None else _kept(reply)
        if reply.failed is not None or session is None:
            return None
        row = self.row_of(reply.turn)
        if row is None:
            end_unbegun(session, reply)
        else:
            end_early(session, reply, played_ms)
            self.outlets.pop(row, None)
        outlet.put(None)
        return _kept(reply)

    def leave(self, place: Place) -> None:
        """Give a place up, with all that runs or waits in it."""
        self.scheduler.drop_all(place)
        if place.row is not None:
            self._end_turn(place.row)
        self.places.remove(place)
        self.seats.pop(place, None)

    def leave_forgotten(self) -> None:
        """Give up the places of sessions that are gone and could not say so."""
        for place, seat in list(self.seats.items()):
            if seat() is None:
                self.leave(place)

    def row_of(self, turn: Turn) -> int | None:
        """The row in which a turn runs."""
        return next((row for row, running in enumerate(self.rows.turns) if running is turn), None)

    # what the scheduler asks for

    def _busy(self) -> bool:
        return any(not turn.paused for _, turn in self.rows.running())

    def _idle(self, place: Place) -> bool:
        return place.row is not None and self.rows.turns[place.row] is None and not self.scheduler.owns(place)

    def _clear(self, row: int) -> None:
        self.outlets.pop(row, None)
        self.rows.put(row, None)
        self.rows.clear(row)

    def _tick(self) -> None:
        try:
            events = self.rows.tick()
        except Exception as error:  # it ends the replies that take part, not the engine
            for row, turn in self.rows.running():
                if turn.runs:
                    self._fail(row, _reply_failed(error))
            return
        for row, outlet in list(self.outlets.items()):
            self._hand_out(row, outlet, [event for event in events if event.row == row])

    def _hand_out(self, row: int, outlet: Outlet, events: Sequence[Event]) -> None:
        """Give the events of a row to their reader; a reply that has ended is recorded before its end is told."""
        note_events(outlet.reply, events)
        for event in events:
            if isinstance(event, TurnEnd) and (wrong := self._ended(row, outlet)) is not None:
                self._fail(row, wrong)
            else:
                outlet.deliver(event)

    def _ended(self, row: int, outlet: Outlet) -> BaseException | None:
        """Take a reply that has ended out of its row -> what went wrong, unless the events tell of it."""
        session, reply, error = outlet.session, outlet.reply, outlet.turn.error
        if error is not None and reply.failed is None:
            return error
        try:
            if error is None and session is not None:
                record(session, reply)
        except Exception as failed:
            return _reply_failed(failed)
        self.rows.put(row, None)
        del self.outlets[row]
        return None

    def _fail(self, row: int, error: BaseException) -> None:
        """End the reply of a row by an error."""
        self.rows.put(row, None)
        if (outlet := self.outlets.pop(row, None)) is not None:
            outlet.fail(error)

    def _end_turn(self, row: int) -> None:
        """Interrupt what is said in a row."""
        outlet = self.outlets.get(row)
        if outlet is None:
            return
        try:
            self.end(outlet, None)
        except Exception as error:
            self._fail(row, _reply_failed(error))

    def _over(self, cause: BaseException | None) -> None:
        """The thread ends: no more will come of what runs."""
        for row, outlet in list(self.outlets.items()):
            if cause is None:
                self._end_turn(row)
            else:
                outlet.fail(self.scheduler.refusal())


def _kept(reply: Reply) -> list[int]:
    times = reply.message.times
    return [] if times is None else list(times.token_ids)


def _reply_failed(error: Exception) -> RuntimeError:
    failed = RuntimeError(f"the reply failed ({type(error).__name__}: {error}) and was undone")
    failed.__cause__ = error
    return failed
