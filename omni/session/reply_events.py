"""The events of a session's reply as an iterator that may be left at any point."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from omni.generation.events import AudioChunk, Event, TextDelta, TurnEnd

if TYPE_CHECKING:
    from omni.session.replies import Reply
    from omni.session.session import OmniSession


class ReplyEvents(Iterator[Event]):
    """Yields the events of one reply and notes in it what has been delivered.

    `produce` gives more events while the turn runs. An interrupted turn yields its `TurnEnd` and stops. What `produce`
    raises, or cuts it, leaves the iterator, and the session forgets the reply. `samples_a_frame` and `missing`, the
    samples that all sound lacks of that, tell how many frames a chunk holds.
    """

    _done = True  # until it is made

    def __init__(
        self,
        session: OmniSession,
        reply: Reply,
        produce: Callable[[], list[Event]],
        samples_a_frame: int,
        missing: int,
    ) -> None:
        self.session, self._reply, self._produce = session, reply, produce
        self._samples_a_frame, self._missing = samples_a_frame, missing
        self._waiting: deque[Event] = deque()
        self._done = False

    def __iter__(self) -> ReplyEvents:
        return self

    def __next__(self) -> Event:
        self.session._check_reader()
        if self._done:
            raise StopIteration
        try:
            event = self._next()
        except BaseException as error:
            self._done = True
            self.session._forget(self._reply, error)
            if isinstance(error, StopIteration):  # of a part or a caller's function; it would pass for the end
                raise RuntimeError("the reply failed: what it calls raised StopIteration") from error
            raise
        if event is None:
            raise StopIteration
        return event

    def _next(self) -> Event | None:
        """The next event; None if another thread has taken the last one meanwhile."""
        turn = self._reply.turn
        while turn.interruption is None and not self._waiting and not self._done:
            self._waiting.extend(self._produce())
        if turn.interruption is not None:  # what was not delivered is dropped
            self._done = True
            self._waiting.clear()
            self.session._delivered(self._reply)
            return turn.interruption
        if not self._waiting:
            return None
        event = self._waiting.popleft()
        self._note(event)
        return event

    def _note(self, event: Event) -> None:
        turn = self._reply.turn
        if isinstance(event, TextDelta):
            turn.delivered_ids += len(event.token_ids)
        elif isinstance(event, AudioChunk):
            samples = event.start_sample + event.samples.numel() + self._missing
            turn.delivered_frames = samples // max(self._samples_a_frame, 1)
        elif isinstance(event, TurnEnd):
            self._done = turn.delivered_end = True
            self.session._delivered(self._reply)

    def close(self) -> None:
        """Stop reading events; a turn whose end was not delivered is interrupted."""
        if not self._done:
            self._done = True
            self.session._leave(self._reply)

    @property
    def done(self) -> bool:
        """Whether no event will follow."""
        return self._done

    def drop(self) -> None:
        """As `close`, without waiting: the reply is interrupted a little later."""
        if not self._done:
            self.session._drop(self._reply)
            self._done = True

    def __del__(self) -> None:
        # It may run at any moment, in any thread, and be cut as anything else; nobody would hear what it raises.
        try:
            self.drop()
        except BaseException:
            with contextlib.suppress(BaseException):
                self.drop()
