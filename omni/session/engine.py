"""OmniEngine: many sessions in one process share the batched steps of the Thinker, the Talker and the codec.

One thread moves all rows that have a turn running; sessions are used from any other threads or from asyncio. A call
changes the session's list of messages in its own thread, where the encoders run too, and hands what touches the rows to
the engine's thread, which does it in bounded pieces between two ticks. A turn whose events are not read pauses.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from omni.config.keywords import names_keywords, takes_arguments_of
from omni.generation.events import Event
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.session import options
from omni.session.entries import Entry
from omni.session.jobs import Job, Steps, T, at_once
from omni.session.places import EngineFullError, Place
from omni.session.replies import Reply
from omni.session.reply_events import ReplyEvents
from omni.session.scheduler import Cancelled, Task
from omni.session.session import OmniSession
from omni.session.shared_rows import MAX_WAITING_EVENTS, Outlet, Seat, SharedRows

__all__ = ["MAX_WAITING_EVENTS", "EngineFullError", "EngineSession", "OmniEngine"]

_NO_ROW = 1 << 30  # of a session without one: whatever uses it fails


class OmniEngine:
    """Sessions side by side.

    max_sessions: rows that are reserved; so many sessions speak at once. max_parked: sessions beyond that, whose caches
    wait in host memory while others are in the rows; where all rows are busy a reply waits for one in order of arrival.
    A prompt is read in pieces of `streaming.prefill_tokens`, one between two steps of the replies that run.

    The engine's thread ends with `close`, with the last reference to the engine and its sessions, or before the process
    does. If it dies, every call and every reader gets RuntimeError with the reason, as they do in a forked child.
    """

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor | None = None,
        *,
        max_sessions: int = 8,
        max_parked: int = 0,
        streaming: StreamingConfig | None = None,
    ) -> None:
        for name, number, least in (("max_sessions", max_sessions, 1), ("max_parked", max_parked, 0)):
            if type(number) is not int or number < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")
        options.check_parts(model, processor, streaming)
        self.model, self.processor, self.streaming = model, processor, streaming
        try:
            self._shared = SharedRows(model, max_sessions, max_parked)
        except (RuntimeError, OverflowError, MemoryError) as error:  # of the allocator
            reason = str(error).partition("\n")[0] or "no memory"
            raise ValueError(f"an engine of max_sessions = {max_sessions} cannot be made: {reason}") from error
        weakref.finalize(self, self._shared.scheduler.stop).atexit = False  # the thread knows rows, and no engine
        self._shared.scheduler.start()

    @property
    def rows(self) -> Rows:
        """The states of all rows; only the engine's thread may touch them."""
        return self._shared.rows

    @property
    def ticks(self) -> int:
        """Steps of the replies so far; a step is at most one frame of each."""
        return self._shared.scheduler.ticks

    @property
    def closed(self) -> bool:
        """Whether the engine cannot be used any more."""
        return self._shared.scheduler.stopped

    @names_keywords
    def session(
        self,
        *,
        speaker: str | None = None,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        streaming: StreamingConfig | None = None,
        use_audio_in_video: bool = False,
        keep_media: bool = True,
        media_bytes: int = options.MEDIA_BYTES,
        make_room: float | None = None,
    ) -> EngineSession:
        """A new session with the options of `OmniSession` (streaming: None is the engine's).

        Raises EngineFullError when there are max_sessions + max_parked already.
        """
        self._shared.scheduler.check()
        return EngineSession(
            self,
            speaker=speaker,
            system=system,
            tools=tools,
            streaming=self.streaming if streaming is None else streaming,
            use_audio_in_video=use_audio_in_video,
            keep_media=keep_media,
            media_bytes=media_bytes,
            make_room=make_room,
        )

    def load(self, path: str | Path) -> EngineSession:
        """A session that was saved, of this engine or alone, to go on here.

        Raises FileNotFoundError, ValueError or EngineFullError.
        """
        self._shared.scheduler.check()
        session = EngineSession.__new__(EngineSession)
        session.engine = self
        session._load(options.session_folder(path), self.model, self.processor)
        session._move_in()
        return session

    def close(self) -> None:
        """Interrupt all replies, close all sessions and end the engine's thread. It may be called again.

        From the engine's own thread (a function that a reply calls) it does not wait for the end.
        """
        self._shared.scheduler.stop()
        self._shared.scheduler.join()

    def __enter__(self) -> OmniEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class EngineSession(OmniSession):
    """A session of an engine: the same methods, from any thread; `close` gives its place to another.

    What is pushed is read in advance when the engine gets to it. `respond` returns once the reply has its place in the
    conversation: what goes wrong while the prompt is read leaves the iterator of events.
    """

    _turn_is_own = False  # the engine's thread moves it
    _seat: Seat | None = None  # None: it has a row of its own, while it is being loaded
    _outlet: Outlet | None = None  # of the last reply
    _task: Task[Any] | None = None  # that a call waits for, or was waiting for when it was cut
    _ahead: Task[None] | None = None  # that reads in advance
    _decided: Sequence[Entry] = ()  # what it is to read
    _once = False  # a copy for one reply
    _closed_because: str | None = None

    def __init__(self, engine: OmniEngine, **arguments: Any) -> None:
        self.engine = engine
        super().__init__(engine.model, engine.processor, **arguments)
        self._take_seat()

    def _new_row(self) -> tuple[Rows, int]:
        return self.engine.rows, _NO_ROW

    def _take_seat(self, saved: Any = None) -> None:
        seat = Seat(self._shared)
        try:
            self._shared.scheduler.run(Task(None, at_once(lambda: seat.take(saved))))
            self._seat = seat
        except BaseException:
            seat.give_up()  # the error holds it for as long as it is kept
            raise

    def _move_in(self) -> None:
        """Move from a row of its own into the engine's."""
        saved = self._reader.rows.save_row(0)
        self._take_seat(saved)
        self._reader.rows, self._reader.row = self._new_row()
        self._encoders_to(self._reader.rows)

    @property
    def _shared(self) -> SharedRows:
        return self.engine._shared

    @property
    def closed_because(self) -> str | None:
        """Why the session cannot be used any more, None as long as it can."""
        return self._closed_because or self._shared.scheduler.end_because

    @closed_because.setter
    def closed_because(self, reason: str | None) -> None:
        self._closed_because = reason

    def _check_usable(self) -> None:
        self._shared.scheduler.refuse_here()
        if self._closed_because is None:
            self._shared.scheduler.check()

    def _check_reader(self) -> None:
        self._shared.scheduler.refuse_here()

    def _settle_reply(self) -> None:
        if not self._shared.scheduler.here:
            super()._settle_reply()

    # what touches the rows

    def _run(self, job: Job[T]) -> T:
        """Let the engine's thread do it, once the session has a row."""
        if self._seat is None:
            return super()._run(job)
        return self._hand_over(lambda: self._in_row(job))  # type: ignore[return-value]

    def _in_row(self, job: Job[T], *, ahead: bool = False) -> Steps[T | None]:
        """A job for the engine's thread that has the session's row."""
        place = self._place

        def located() -> Steps[T]:
            assert place.row is not None
            self._reader.row = place.row
            return (yield from job())

        return self._shared.places.with_row(place, located, ahead=ahead)

    def _hand_over(self, job: Job[T], *, ahead_of_others: bool = False) -> T:
        """Wait for a job of the engine's thread, which comes after the session's others unless `ahead_of_others`."""
        task = Task(None if ahead_of_others else self._place, job)
        self._task = task
        try:
            return self._shared.scheduler.run(task)
        except Cancelled:
            raise ValueError(f"the session is closed: {self.closed_because}") from None

    @property
    def _place(self) -> Place:
        assert self._seat is not None and self._seat.place is not None
        return self._seat.place

    def _read_ahead(self) -> None:
        if self._seat is None or self.responding:
            return
        self._forget_media()
        self._decided = self._conversation.entries
        task = self._ahead
        if task is None or task.done or task.steps is not None:  # else: it will read this
            self._ahead = task = Task(self._place, lambda: self._in_row(self._read_decided, ahead=True), _unheard)
            self._shared.scheduler.submit(task)

    def _read_decided(self) -> Steps[None]:
        reader, entries = self._reader, self._decided
        if reader.rows.turns[reader.row] is None and self._worth_reading(entries):
            yield from reader.read(entries)

    def _forget_media(self) -> None:
        """Only of a row that stands still is it known what it has read."""
        busy = [self._ahead, self._task, None if self._outlet is None else self._outlet.task]
        if all(task is None or task.done for task in busy):
            super()._forget_media()

    def _media_lost(self, entries: Sequence[Entry]) -> bool:
        if not any(entry.media and entry.embeds is None for entry in entries):
            return False
        return self._hand_over(at_once(lambda: self._reader.lost(entries)))

    def _settle_row(self) -> None:
        scheduler, outlet = self._shared.scheduler, self._outlet
        if self._seat is None or not scheduler.alive:
            return
        if self._task is not None:
            scheduler.let_go(self._task)
        if outlet is not None and outlet.task is not None and outlet.reply is not self._reply:
            scheduler.let_go(outlet.task)  # a call that was undone has begun this reply
        self._hand_over(at_once(self._settle_own_row))

    def _settle_own_row(self) -> None:
        place, rows = self._place, self._shared.rows
        if place.row is None:
            return
        self._reader.row, turn = place.row, rows.turns[place.row]
        if turn is not None and turn is not self._turn:
            self._shared.outlets.pop(place.row, None)
            rows.put(place.row, None)
        self._reader.settle()

    # replies

    def _start(self, reply: Reply, job: Job[None]) -> ReplyEvents:
        """The engine's thread reads the prompt and goes on from there."""
        outlet = Outlet(self, reply)
        place, shared = self._place, self._shared
        outlet.task = Task(place, lambda: self._in_row(lambda: shared.begin(outlet, place, job)), outlet.begun)
        self._outlet = outlet
        shared.scheduler.submit(outlet.task)
        return self._events_of(reply, lambda: self._next_events(outlet))

    def _next_events(self, outlet: Outlet) -> list[Event]:
        event = outlet.take(self._shared)
        return [] if event is None else [event]

    def _end_early(self, reply: Reply, played_ms: float | None) -> list[int] | None:
        outlet = self._outlet
        assert outlet is not None and outlet.reply is reply and outlet.task is not None
        self._shared.scheduler.let_go(outlet.task)
        kept = self._hand_over(at_once(lambda: self._shared.end(outlet, played_ms)), ahead_of_others=True)
        if reply.failed is not None:
            raise ValueError(f"there is no reply to interrupt: it has failed ({reply.failed})") from reply.failed
        return kept

    def _drop(self, reply: Reply) -> None:
        super()._drop(reply)
        outlet = self._outlet
        if reply.left and self._seat is not None and outlet is not None and outlet.reply is reply:
            assert outlet.task is not None
            self._shared.scheduler.cancel(outlet.task)
            self._shared.scheduler.post(None, at_once(lambda: self._shared.end(outlet, None)))
        self._end_once()

    def _leave(self, reply: Reply) -> None:
        scheduler = self._shared.scheduler
        if scheduler.here or not scheduler.alive:
            self._drop(reply)
        else:
            super()._leave(reply)

    def _forget(self, reply: Reply, error: BaseException) -> None:
        if not self._shared.scheduler.forked:
            super()._forget(reply, error)
            if reply.failed is error:  # whose frames hold this session
                reply.failed = RuntimeError(f"{type(error).__name__}: {error}")
            self._end_once()

    def _delivered(self, reply: Reply) -> None:
        super()._delivered(reply)
        self._end_once()

    def _respond_once(self, items: Any, arguments: dict[str, Any]) -> ReplyEvents:
        self._once = True
        try:
            return super()._respond_once(items, arguments)
        except BaseException:
            self._end_once()
            raise

    def _end_once(self) -> None:
        """Let a copy for one reply end with it, without waiting; whoever keeps its events keeps no place."""
        if self._once and self._seat is not None:
            self._closed_because = self._closed_because or "it was a copy for one reply"
            self._seat.give_up()

    @takes_arguments_of(OmniSession.respond)
    async def respond_async(self, **arguments: Any) -> AsyncIterator[Event]:
        """As `respond`, for `async for`. No thread waits for the events.

        Leaving the loop early interrupts the reply once the asynchronous iterator is closed (`aclose`, or the end of
        its scope), without waiting for the step that is running.
        """
        begun = asyncio.ensure_future(asyncio.to_thread(self.respond, **arguments))
        begun.add_done_callback(_heard)
        try:
            events = await asyncio.shield(begun)
        except asyncio.CancelledError:
            await asyncio.wait([begun])  # it is short, and then forgotten with its reply
            raise
        outlet = events.session._outlet  # type: ignore[attr-defined]  # a reply aside is another session's
        try:
            while not events.done:
                await outlet.ready(self._shared)
                yield next(events)
        finally:
            events.drop()

    # copies, and the end

    def _fork(self) -> EngineSession:
        other = self._twin(*self._new_row())
        other._seat = other._outlet = other._task = other._ahead = None
        seat = Seat(self._shared)

        def copy() -> None:
            seat.take()
            assert seat.place is not None
            place = self._place
            seat.place.saved = place.saved if place.row is None else self._shared.rows.save_row(place.row)
            other._reader.done = list(self._reader.done)

        try:
            self._hand_over(at_once(copy))
            other._seat = seat
        except BaseException:
            seat.give_up()  # the error holds it for as long as it is kept
            raise
        return other

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Interrupt a reply that is being given and give the place up; the session cannot be used any more.

        A call that waits in another thread ends with ValueError. From the engine's own thread it does not wait.
        """
        self._closed_because = self._closed_because or "close() was called"
        scheduler, seat = self._shared.scheduler, self._seat
        if seat is None or seat.place is None or seat.place.removed:
            return
        place = seat.place
        scheduler.post(None, at_once(lambda: self._shared.leave(place)))
        scheduler.flush()


def _unheard(error: BaseException | None) -> None:
    """What fails when it is read in advance fails again when it is needed."""


def _heard(call: asyncio.Future[Any]) -> None:
    """Note that what a call raised is known, if its task was cancelled and nobody waits for it."""
    if not call.cancelled():
        call.exception()
