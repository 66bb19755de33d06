"""The events of a session's reply as an iterator that may be left at any point."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from omni.generation.events import AudioChunk, Event, TextDelta, TurnEnd
from omni.generation.turn import Turn


class ReplyEvents(Iterator[Event]):
    """Yields the events of one turn and records in it what has been delivered.

    `produce` gives more events while the turn runs; `finish` is called when the turn's end has been delivered, and
    `interrupt` when the iterator is closed (or forgotten) before. An interrupted turn yields its `TurnEnd` and stops.
    What `produce` or `finish` raises, or cuts them, is handed to `abandon` with the turn and leaves the iterator.
    `samples_a_frame` and `missing`, the samples that all sound lacks of that, tell how many frames a chunk holds.
    """

    def __init__(
        self,
        turn: Turn,
        produce: Callable[[], list[Event]],
        finish: Callable[[], None],
        interrupt: Callable[[Turn], None],
        abandon: Callable[[Turn, BaseException], None],
        samples_a_frame: int,
        missing: int,
    ) -> None:
        self._turn, self._produce, self._finish, self._interrupt = turn, produce, finish, interrupt
        self._abandon, self._samples_a_frame, self._missing = abandon, samples_a_frame, missing
        self._waiting: deque[Event] = deque()
        self._done = False

    def __iter__(self) -> ReplyEvents:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        try:
            return self._next()
        except BaseException as error:
            self._done = True
            self._abandon(self._turn, error)
            raise

    def _next(self) -> Event:
        while self._turn.interruption is None and not self._waiting:
            self._waiting.extend(self._produce())
        if self._turn.interruption is not None:  # what was not delivered is dropped
            self._done = True
            self._waiting.clear()
            return self._turn.interruption
        event = self._waiting.popleft()
        self._record(event)
        return event

    def _record(self, event: Event) -> None:
        turn = self._turn
        if isinstance(event, TextDelta):
            turn.delivered_ids += len(event.token_ids)
        elif isinstance(event, AudioChunk):
            samples = event.start_sample + event.samples.numel() + self._missing
            turn.delivered_frames = samples // max(self._samples_a_frame, 1)
        elif isinstance(event, TurnEnd):
            self._done = turn.delivered_end = True
            self._finish()

    def close(self) -> None:
        """Stop reading events; a turn whose end was not delivered is interrupted."""
        if not self._done:
            self._done = True
            if self._turn.interruption is None and not self._turn.delivered_end:
                self._interrupt(self._turn)

    def __del__(self) -> None:
        self.close()
