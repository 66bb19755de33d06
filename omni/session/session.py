"""OmniSession: a conversation as an object. Push sound, pictures and text, respond, interrupt, edit, fork, save.

The work runs inside the calls. What is pushed is read by the Thinker and the Talker at once, as far as it is decided,
so that little is left to do when `respond` is called. The caches stay; the Talker's holds its part of the conversation.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omni.config.keywords import check_flags, names_keywords, takes_arguments_of
from omni.generation.events import Event
from omni.generation.rows import Rows
from omni.generation.sampling import SamplingConfig
from omni.generation.streaming_config import StreamingConfig
from omni.generation.text_options import LogitsProcessor
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.session import options
from omni.session.file import SavedSession, save_session
from omni.session.heard import ReplyTimes, heard_ids
from omni.session.history import History
from omni.session.input import Input
from omni.session.items import INCOMPLETE, Item
from omni.session.jobs import Job, at_once
from omni.session.replies import Reply, begin_reply, fill, note_events, record
from omni.session.reply_events import ReplyEvents
from omni.session.row_reader import RowReader
from omni.session.saved_values import naming
from omni.session.undo import settle, whole

Sampling = SamplingConfig | Mapping[str, Any] | None
S = TypeVar("S", bound="OmniSession")


class OmniSession(Input, History):
    """A conversation with a model.

    speaker: default voice of its replies. system: text of a system turn. tools: JSON schemas or documented functions
    that the model may call. streaming: knobs of latency. use_audio_in_video: sound pushed while a video is open belongs
    to the video. keep_media: keep the embeddings of media (one vector of the Thinker's width a token) on the host, so
    that edits may read them again, up to `media_bytes`; what was read first is forgotten first. make_room: drop the
    oldest turns once the session is full, until this share of its positions is free (None: a full session is an
    error). A session takes one call at a time. A call that fails or is cut changes nothing; where it cannot be undone
    the session is `closed`, and every later call raises ValueError with the reason.
    """

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor | None = None,
        *,
        speaker: str | None = None,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        streaming: StreamingConfig | None = None,
        use_audio_in_video: bool = False,
        keep_media: bool = True,
        media_bytes: int = options.MEDIA_BYTES,
        make_room: float | None = None,
    ) -> None:
        kept = (keep_media, media_bytes, make_room)
        self._set_up(model, processor, speaker, tools, streaming, use_audio_in_video, *kept)
        self._open(*self._new_row())
        self._write_beginning(system)

    def _new_row(self) -> tuple[Rows, int]:
        """A row of its own."""
        return Rows(self.model, 1), 0

    # replies

    @names_keywords
    @whole
    def respond(
        self,
        max_new_tokens: int = 1024,
        text_sampling: Sampling = None,
        return_audio: bool | None = None,
        speaker: str | None = None,
        max_frames: int = 4095,
        audio_sampling: Sampling = None,
        residual_sampling: Sampling = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        min_new_tokens: int = 0,
        logits_processor: LogitsProcessor | None = None,
        allow_long: bool = False,
        speak_prefill: bool = False,
        prefill: str | None = None,
        streaming: StreamingConfig | None = None,
        items: Sequence[Item] | None = None,
        remember: bool = True,
    ) -> ReplyEvents:
        """Answer what was pushed: the events of `OmniModel.stream`, with the same arguments for one row.

        speaker, streaming: None is the session's own. prefill: the beginning of the reply, which the model goes on
        with; it becomes part of the history, and the reply's text is what follows it. allow_long: the session may go
        beyond the model's positions from now on, until the next reply. The history holds a reply as far as it counts:
        without what a stop string cut off. items: answer these, which become the conversation (see `become`). remember:
        False answers aside: neither the reply nor `items` change the conversation, whose input stays open, and it may
        go on meanwhile.

        Without input since the last reply the user's turn is empty. Input may be pushed during the reply: it belongs to
        the next turn. Closing the iterator early interrupts the reply. What a part raises leaves the iterator, and the
        session is as before this call, but for input since.
        """
        return self._respond({name: value for name, value in locals().items() if name != "self"})

    def _respond(self, arguments: dict[str, Any]) -> ReplyEvents:
        items, remember = arguments.pop("items"), arguments.pop("remember")
        check_flags(remember=remember)
        if not remember:
            return self._respond_aside(items, arguments)
        if items is not None:
            self._become_items(items)
        reply, job = begin_reply(self, arguments)
        self._reply = reply
        return self._start(reply, job)

    def _respond_aside(self, items: Sequence[Item] | None, arguments: dict[str, Any]) -> ReplyEvents:
        """A reply of a copy of this session, which goes with it."""
        return self._fork()._respond_once(items, arguments)

    def _respond_once(self, items: Any, arguments: dict[str, Any]) -> ReplyEvents:
        """The one reply of a copy."""
        if items is not None:
            open_turn = self._conversation.open
            if open_turn is not None and not _holds(items, open_turn.id):
                self._conversation.open = None
            self.become(items)
        return self.respond(**arguments)

    def _start(self, reply: Reply, job: Job[None]) -> ReplyEvents:
        """Begin the turn in the row; its events."""
        self._run(job)
        self._forget_media()
        return self._events_of(reply, lambda: self._tick(reply))

    def _events_of(self, reply: Reply, produce: Callable[[], list[Event]]) -> ReplyEvents:
        codec = self.model.code2wav
        hop, missing = 1, 0
        if codec is not None:
            hop, missing = int(codec.hop_length), int(codec.missing_samples)
        return ReplyEvents(self, reply, produce, hop, missing)

    def _tick(self, reply: Reply) -> list[Event]:
        with self._lock:
            settle(self)
            if reply.turn.interruption is not None:
                return []
            if reply is not self._reply:
                raise ValueError("the reply was undone when it failed or was cut; call respond again")
            reply.ticking = True
            events = self._reader.rows.tick()
            note_events(reply, events)
            if reply.failed is None:
                self._reader.rows.raise_errors()
                if reply.turn.over:
                    record(self, reply)
            reply.ticking = False
            return events

    def _forget(self, reply: Reply, error: BaseException) -> None:
        """Forget a reply that failed or was cut: the session is as before `respond`, but for input since."""
        with self._lock:
            if reply is not self._reply:
                return
            if reply.recorded:  # it is whole, but was not delivered to its end
                reply.left = not reply.turn.delivered_end
            else:
                reply.failed = reply.failed or error
            self._settle_reply()

    def _delivered(self, reply: Reply) -> None:
        """All events of a reply have been taken."""
        if reply.failed is not None:
            self._forget(reply, reply.failed)

    def _leave(self, reply: Reply) -> None:
        """Interrupt a reply whose events nobody reads any more."""
        with self._lock:
            self._drop(reply)
            if reply is self._reply and not self.closed:
                settle(self)

    def _drop(self, reply: Reply) -> None:
        """Note that nobody reads the events of a reply any more; it is interrupted by the next call. Never waits."""
        if not reply.turn.delivered_end:
            reply.left = True

    @takes_arguments_of(respond)
    async def respond_async(self, **arguments: Any) -> AsyncIterator[Event]:
        """As `respond`, for `async for`; the model runs in a worker thread.

        Leaving the loop early interrupts the reply once the asynchronous iterator is closed (`aclose`, or the end of
        its scope), which waits for the step that is running.
        """
        events = await asyncio.to_thread(self.respond, **arguments)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            events.close()

    # copies

    @whole
    def fork(self) -> OmniSession:
        """A second session that goes on from here independently; both start from the same past.

        During a reply the copy holds what was yielded of it.
        """
        return self._fork()

    def _fork(self) -> OmniSession:
        other, rows = self._twin(*self._new_row()), self._reader.rows

        def copy_row() -> None:
            rows.copy_row(self._reader.row, other._reader.rows, other._reader.row)
            other._reader.done = list(self._reader.done)
            other._reader.set_lengths()

        self._run(at_once(copy_row))
        return other

    def _twin(self: S, rows: Rows, row: int) -> S:
        """A copy of this session, whose row is empty."""
        other = copy.copy(self)
        other._lock, other._reply, other._undo = threading.RLock(), None, None
        other._conversation = self._conversation.fork()
        other._reader = RowReader(rows, row, self._reader.prefill_tokens)
        other._encoders_to(rows)
        if (reply := self._reply) is not None and self.responding:
            kept = heard_ids(reply.turn, self.model.code2wav, None)
            message = reply.message
            cut = fill(self, message, kept, ReplyTimes(tuple(kept), (0.0,) * len(kept)), INCOMPLETE, reply.calls)
            other._conversation.messages = other._conversation.replaced(message.id, cut)
        return other

    @whole
    def save(self, path: str | Path) -> None:
        """Write the session into a folder (`session.json`, `session.safetensors`), from which `load` goes on.

        On the same device and backend it goes on bit for bit. Raises ValueError while it responds, OSError when
        writing fails; an older save is then intact.
        """
        save_session(self, options.session_folder(path))

    @classmethod
    def load(cls, path: str | Path, model: ModelParts, processor: OmniProcessor | None = None) -> OmniSession:
        """A session that `save` wrote, for the same model. Raises FileNotFoundError or ValueError."""
        folder = options.session_folder(path)
        options.check_parts(model, processor, None)
        session = OmniSession.__new__(OmniSession)
        session._load(folder, model, processor)
        return session

    def _load(self, folder: Path, model: ModelParts, processor: OmniProcessor | None) -> None:
        """Fill a session that has not been set up; it has a row of its own then."""
        with naming(folder):
            saved = SavedSession(folder)
            self._set_up(model, processor, **saved.options)
            self._open(Rows(model, 1), 0)
            saved.fill(self)


def _holds(items: Any, id: str) -> bool:
    """Whether an item of this id is among these."""
    return any(isinstance(item, Item) and item.id == id for item in (items if isinstance(items, Sequence) else ()))
