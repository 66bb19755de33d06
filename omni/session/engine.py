"""OmniEngine: many sessions in one process share the batched steps of the Thinker, the Talker and the codec.

Each session has a row. One thread ticks all rows that have a turn running; sessions are used from any other threads or
from asyncio. A lock guards the rows: a push holds it for one piece of the prompt at a time and yields a tick between
pieces, so that running streams do not wait for a long prompt. A turn whose events are not read pauses.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from typing import Any

from omni.config.keywords import names_keywords
from omni.generation.events import Event, TurnEnd
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.generation.turn import Turn
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.session.options import check_parts
from omni.session.replies import Kept, begin_reply
from omni.session.reply_events import ReplyEvents
from omni.session.session import OmniSession
from omni.session.undo import whole

MAX_WAITING_EVENTS = 64  # of one turn; it pauses until they are read


class EngineFullError(RuntimeError):
    """All rows of an engine are taken."""


class OmniEngine:
    """Sessions side by side. `max_sessions` rows are reserved; the engine's thread ends with `close` or the process.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor | None = None,
        *,
        max_sessions: int = 8,
        streaming: StreamingConfig | None = None,
    ) -> None:
        if type(max_sessions) is not int or max_sessions < 1:
            raise ValueError(f"max_sessions must be a whole number of at least 1, got {max_sessions!r}")
        check_parts(model, processor, streaming)
        self.model, self.processor, self.streaming = model, processor, streaming
        try:
            self.rows = Rows(model, max_sessions)
        except (RuntimeError, OverflowError, MemoryError) as error:  # of the allocator
            reason = str(error).partition("\n")[0] or "no memory"
            raise ValueError(f"an engine of max_sessions = {max_sessions} cannot be made: {reason}") from error
        self.sessions: list[EngineSession | None] = [None] * max_sessions
        self.changed = threading.Condition(threading.RLock())
        self.ticks = 0
        self.closed = False
        self._thread = threading.Thread(target=self._work, name="omni-engine", daemon=True)
        self._thread.start()

    @names_keywords
    def session(
        self,
        *,
        speaker: str | None = None,
        system: str | None = None,
        streaming: StreamingConfig | None = None,
        use_audio_in_video: bool = False,
        keep_media: bool = False,
    ) -> EngineSession:
        """A new session with the options of `OmniSession` (streaming: None is the engine's).

        Raises EngineFullError when all rows are taken.
        """
        with self.changed:
            row = self.free_row()
            try:
                return EngineSession(
                    self,
                    row,
                    speaker=speaker,
                    system=system,
                    streaming=self.streaming if streaming is None else streaming,
                    use_audio_in_video=use_audio_in_video,
                    keep_media=keep_media,
                )
            except BaseException:
                self.rows.clear(row)
                self.sessions[row] = None
                raise

    def free_row(self) -> int:
        """A free row. Raises EngineFullError or, after `close`, ValueError."""
        if self.closed:
            raise ValueError("the engine is closed")
        if None not in self.sessions:
            raise EngineFullError(
                f"all {len(self.sessions)} sessions of the engine are taken; close one, or raise max_sessions"
            )
        return self.sessions.index(None)

    def close(self) -> None:
        """End all turns and the engine's thread."""
        with self.changed:
            for session in self.sessions:
                if session is not None:
                    session.close()
            self.closed = True
            self.changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> OmniEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def yield_tick(self) -> None:
        """Let running turns make a step; called with the lock held, between the pieces of a prompt."""
        before = self.ticks
        if threading.current_thread() is not self._thread:
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.ticks > before or not self._has_work(), timeout=1.0)

    def _has_work(self) -> bool:
        return any(not turn.paused for _, turn in self.rows.running())

    def _fail(self, row: int, error: Exception) -> None:
        """Undo the reply of a row, and let its reader know why."""
        turn, session = self.rows.turns[row], self.sessions[row]
        assert turn is not None and session is not None
        session.fail(turn, error)
        self.rows.put(row, None)

    def _work(self) -> None:
        """The engine's thread: tick while a turn runs."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self._has_work())
                if self.closed:
                    return
                try:
                    events = self.rows.tick()
                except Exception as error:  # it ends the replies that run, not the engine
                    events = []
                    for row, _ in self.rows.running():
                        self._fail(row, error)
                self.ticks += 1
                for event in events:
                    session = self.sessions[event.row]
                    if session is not None:
                        session.deliver(event)
                self.changed.notify_all()


class EngineSession(OmniSession):
    """A session of an engine: the same methods, from any thread; `close` gives its row back."""

    def __init__(self, engine: OmniEngine, row: int, *, system: str | None = None, **options: Any) -> None:
        self.engine = engine
        self._events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        engine.sessions[row] = self  # reserved before the lock can be let go
        names = ("speaker", "streaming", "use_audio_in_video", "keep_media")
        unknown = [name for name in options if name not in names]
        if unknown:
            raise TypeError(f"a session has no option {unknown[0]!r}; it has system, {', '.join(names)}")
        self._set_up(
            engine.model,
            engine.processor,
            options.get("speaker"),
            options.get("streaming"),
            options.get("use_audio_in_video", False),
        )
        self._lock = engine.changed
        self._open(engine.rows, row, options.get("keep_media", False))
        self._conversation.between = self._between_pieces
        self._write_beginning(system)

    def _respond(self, arguments: dict[str, Any]) -> ReplyEvents:
        """The engine's thread does the work."""
        events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        self._events = events
        turn = begin_reply(self, arguments)
        self.engine.changed.notify_all()
        return self._events_of(turn, lambda: self._next_events(turn, events))

    def _next_events(self, turn: Turn, events: queue.SimpleQueue[Event | Exception | None]) -> list[Event]:
        """The next event that the engine delivered; none after an interruption. Raises what the engine ran into."""
        event = events.get()
        if turn.paused and events.qsize() < MAX_WAITING_EVENTS // 2:
            with self.engine.changed:
                turn.paused = False
                self.engine.changed.notify_all()
        if isinstance(event, Exception):
            raise RuntimeError(f"the reply failed ({type(event).__name__}: {event}) and was undone") from event
        if isinstance(event, TurnEnd) and turn.error is not None:
            raise turn.error
        return [] if event is None else [event]

    def fail(self, turn: Turn, error: Exception) -> None:
        """Undo a reply and hand the error to its reader; called by the engine with the lock held."""
        self._abandon(turn, error)
        self._events.put(error)

    def deliver(self, event: Event) -> None:
        """Queue an event of this session's row for its reader; called by the engine with the lock held."""
        event = dataclasses.replace(event, row=0)
        self._events.put(event)
        assert self._turn is not None
        if self._events.qsize() >= MAX_WAITING_EVENTS:
            self._turn.paused = True

    def interrupt(self, played_ms: float | None = None) -> Kept:
        """As `OmniSession.interrupt`; events that were not read yet are dropped."""
        kept = super().interrupt(played_ms)
        self._events.put(None)  # wakes a reader
        return kept

    def _between_pieces(self) -> None:
        """Let the engine tick between the pieces of a long prompt; the session may be closed meanwhile."""
        undo = self._undo
        assert undo is not None, "a session reads in its calls only"
        undo.parked = True
        try:
            self.engine.yield_tick()
        finally:
            undo.parked = False
        if self.closed:
            raise ValueError("the session was closed while it was reading")

    @whole
    def fork(self) -> EngineSession:
        """A second session of the engine with the same past. Raises EngineFullError when no row is free."""
        row = self.engine.free_row()
        try:
            other: EngineSession = self._copy(self.engine.rows, row)  # type: ignore[assignment]
            other._events, other._lock = queue.SimpleQueue(), self.engine.changed
            other._conversation.between = other._between_pieces
            self.engine.sessions[row] = other
        except BaseException:
            self.engine.rows.clear(row)
            self.engine.sessions[row] = None
            raise
        return other

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End a running turn and give the row back; the session cannot be used any more."""
        with self.engine.changed:
            row = self._conversation.row
            if self.engine.sessions[row] is not self:
                return
            if self._turn is not None and self.responding and not self.closed:
                try:
                    self.interrupt()
                except Exception as error:  # the reply is lost, but the row is free
                    self.fail(self._turn, error)
            self.closed_because = self.closed_because or "close() was called"
            self.engine.rows.put(row, None)
            self.engine.rows.clear(row)
            self.engine.sessions[row] = None
