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
from omni.generation.arguments import stop_ids
from omni.generation.events import Event
from omni.generation.rows import Rows
from omni.generation.sampling import SamplingConfig
from omni.generation.streaming_config import StreamingConfig
from omni.generation.text_options import LogitsProcessor
from omni.generation.turn import Turn
from omni.parts import ModelParts
from omni.processing.audio_file import read_piece
from omni.processing.processor import OmniProcessor
from omni.processing.token_budget import TokenBudget
from omni.processing.vision import PixelBudget
from omni.session import options
from omni.session.conversation import Conversation
from omni.session.file import SavedSession, save_session
from omni.session.heard import ReplyTimes, heard_ids
from omni.session.history import History
from omni.session.items import COMPLETED, INCOMPLETE, Item, Message, new_id
from omni.session.open_turn import Encoders, OpenTurn
from omni.session.replies import Reply, begin_reply, end_early, fill, record, settle_reply
from omni.session.reply_events import ReplyEvents
from omni.session.row_reader import Job, RowReader
from omni.session.saved_values import naming
from omni.session.undo import Undo, settle, whole
from omni.talker.layout import PromptEnd

Sampling = SamplingConfig | Mapping[str, Any] | None
T = TypeVar("T")


class OmniSession(History):
    """A conversation with a model.

    speaker: default voice of its replies. system: text of a system turn. tools: JSON schemas or documented functions
    that the model may call. streaming: knobs of latency. use_audio_in_video: sound pushed while a video is open belongs
    to the video. keep_media: keep the embeddings of media (one vector of the Thinker's width a token) on the host, so
    that edits may read them again, up to `media_bytes`; what was read first is forgotten first. make_room: drop the oldest turns once the session is full, until this share of its
    positions is free (None: a full session is an error). A session takes one call at a time. A call that fails or is
    cut changes nothing; where it cannot be undone the session is `closed`, and every later call raises ValueError with
    the reason.
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
        self._open(Rows(model, 1), 0)
        self._write_beginning(system)

    def _set_up(
        self,
        model: ModelParts,
        processor: OmniProcessor | None,
        speaker: str | None,
        tools: Sequence[Any] | None,
        streaming: StreamingConfig | None,
        use_audio_in_video: bool,
        keep_media: bool,
        media_bytes: int,
        make_room: float | None,
    ) -> None:
        """Check and keep the options."""
        options.check_parts(model, processor, streaming)
        options.check_speaker(model, speaker)
        check_flags(use_audio_in_video=use_audio_in_video, keep_media=keep_media)
        found = processor if processor is not None else model.processor
        if found is None:
            raise ValueError("a session needs a processor: OmniSession(model, OmniProcessor.from_pretrained(folder))")
        self.model, self.processor, self.speaker = model, found, speaker
        self.streaming = streaming or StreamingConfig()
        options.check_window(model, self.streaming)
        self.tools, self.use_audio_in_video = options.tool_list(tools), use_audio_in_video
        self.keep_media, self.media_bytes = keep_media, options.byte_count(media_bytes)
        self.make_room = options.share(make_room)
        self._lock: Any = threading.RLock()  # of the one call
        self._stop_ids = stop_ids(model)
        self._reply: Reply | None = None  # that is being given, or was given last
        self._undo: Undo | None = None  # of the call that runs, or was cut
        self.closed_because: str | None = None

    def _open(self, rows: Rows, row: int) -> None:
        """Make the conversation, in an empty row."""
        self._conversation = Conversation(self.model.config.thinker.text_config.max_position_embeddings)
        self._reader = RowReader(rows, row, self.streaming.prefill_tokens)
        self._encoders = Encoders(self.model, self.processor, self.streaming.audio_window_s, rows.stage)

    def _write_beginning(self, system: str | None) -> None:
        """Write what comes before the first user turn: what the chat template writes there."""
        options.check_text("system", system)
        if self.model.talker is not None:
            self.processor.check_speech_system(system)
        if system is not None:
            part = {"type": "text", "text": system}
            self._conversation.messages = (Message(new_id(), "system", (part,), ()),)
        self._conversation.beginning = self._beginning(system)

    # what the session holds

    @property
    def ids(self) -> list[int]:
        """All ids of the conversation so far, those still to be read included (open media are not)."""
        self._settle_reply()
        return self._conversation.ids

    @property
    def closed(self) -> bool:
        """Whether the session cannot be used any more; every call then raises ValueError with the reason."""
        return self.closed_because is not None

    @property
    def responding(self) -> bool:
        """Whether a reply is being given."""
        return self._reply is not None and not self._reply.over

    @property
    def _turn(self) -> Turn | None:
        """Of the last reply."""
        return None if self._reply is None else self._reply.turn

    # input

    @whole
    def push_text(self, text: str, control_tokens: bool = False) -> None:
        """Add text to the user's turn. Consecutive texts are one text.

        control_tokens: special tokens and the markup of reasoning and tool calls in it become their ids; by default
        they are text, and other added tokens become their ids.
        """
        if not isinstance(text, str):
            raise TypeError(f"push_text takes a string, got {type(text).__name__}")
        positions = self._conversation.limit
        TokenBudget(positions, allow_long=None).check_text(text, self.processor.encode_text, short=32)  # else: respond
        pieces = self.processor.chat.pieces(text, control_tokens)  # what is no text is refused here
        before = self._conversation.end
        turn = self._user_turn()
        self._check_room(before)  # of the text itself it is the reply that must have room
        turn.add_text(text, pieces)
        self._read_ahead()

    @whole
    def push_audio(self, samples: Any, sample_rate: int = 16000) -> None:
        """Add sound: samples [n], [channels, n] or [n, channels] at any rate. Consecutive calls are one clip.

        Floats in -1 .. 1, or integers, which are PCM. A piece may be empty. Raises TypeError or ValueError.
        """
        wave = read_piece(samples)
        sample_rate = options.whole_rate(sample_rate)
        before = self._conversation.end
        self._user_turn().add_sound(wave, sample_rate)
        self._added(before)

    @whole
    def push_image(self, image: Any, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Add a picture: a path, address, bytes, array or PIL image. Its size is kept within the limits (None: the
        checkpoint's)."""
        self.model.require("vision_encoder")
        limits = PixelBudget(min_pixels, max_pixels)
        pixels, grid = self.processor.vision.image(image, limits, media_budget=self.processor.media_budget)
        before = self._conversation.end
        self._user_turn().add_picture(pixels, grid)
        self._added(before)

    @whole
    def push_video_frame(self, frame: Any, time_s: float) -> None:
        """Add a frame of the open video (or begin one): a picture, and its time in seconds, which must grow."""
        self.model.require("vision_encoder")
        picture = self.processor.vision.frame(frame, self.processor.media_budget)
        time_s = options.seconds(time_s)
        before = self._conversation.end
        self._user_turn().add_frame(time_s, picture, with_sound=self.use_audio_in_video)
        self._added(before)

    @whole
    def discard_input(self) -> bool:
        """Forget the clip or video that is open, as if nothing of it had been pushed; False if none is."""
        turn = self._conversation.open
        if turn is None or not turn.discard_medium():
            return False
        if turn.empty:
            self._conversation.open = None
        self._read_ahead()
        return True

    def _user_turn(self) -> OpenTurn:
        """The user's turn; one is opened if none is."""
        if self._conversation.open is None:
            self._conversation.open = OpenTurn(self._encoders)
        return self._conversation.open

    def _close_user_turn(self) -> None:
        """End the user's turn. Without input since the last reply it is empty."""
        messages = self._conversation.messages
        if self._conversation.open is None and messages and messages[-1].role in ("user", "tool"):
            return
        message = self._user_turn().finish(COMPLETED)
        self._conversation.open, self._conversation.messages = None, (*messages, message)

    def _added(self, before: PromptEnd) -> None:
        """Something was added to the list: there must be room, and what is decided is read."""
        self._check_room(before)
        self._read_ahead()

    def _check_room(self, before: PromptEnd) -> None:
        """Raise ValueError if the list is too long and may not be made shorter."""
        conversation = self._conversation
        if self.make_room is not None and not conversation.allow_long and conversation.room() < 0:
            while conversation.room() < self.make_room * conversation.limit:
                try:
                    conversation.messages = conversation.without_oldest(1)
                except ValueError:
                    break  # the last turn stays
        conversation.check_room(before)

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
        aside = self._fork()
        if items is not None:
            aside._conversation.open = None
            aside.become(items)
        return aside.respond(**arguments)

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
            self._reader.rows.raise_errors()
            if reply.turn.over:
                record(self, reply)
            reply.ticking = False
            return events

    def _forget(self, reply: Reply, error: BaseException) -> None:
        """Forget a reply that failed or was cut: the session is as before `respond`, but for input since."""
        with self._lock:
            if reply is self._reply and not reply.recorded:
                reply.failed = reply.failed or error
                self._settle_reply()

    def _settle_reply(self) -> None:
        """Finish what a reply has left undone."""
        settle_reply(self)

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

    def _end_early(self, reply: Reply, played_ms: float | None) -> list[int] | None:
        """End a reply that is being given and keep what was heard of it; None if it has ended in the meantime."""
        return self._run(lambda: end_early(self, reply, played_ms))

    # the row

    def _run(self, job: Job[T]) -> T:
        """Do what touches the row. Here it is done at once; an engine's session hands it to the engine's thread."""
        steps = job()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result

    def _read_ahead(self) -> None:
        """Let the row hold what is decided. A few words wait for what follows them, and all waits for a reply's end."""
        reader, entries = self._reader, self._conversation.entries
        if self.responding:
            return
        read = reader.read_entries(entries)
        rest = entries[read:]
        texts = sum(len(entry.ids) for entry in rest)
        if len(reader.done) > read or any(e.media for e in rest) or texts >= reader.prefill_tokens:
            self._run(lambda: reader.read(entries))
        self._forget_media()

    def _forget_media(self) -> None:
        """Keep no more embeddings than `keep_media` allows."""
        entries = self._conversation.entries
        limit = self.media_bytes if self.keep_media else 0
        self._conversation.forget_media(self._reader.read_entries(entries), limit)

    def _settle_row(self) -> None:
        """Let the row be sound after a call that failed or was cut."""

        def settle_row() -> Any:
            reader = self._reader
            turn = reader.rows.turns[reader.row]
            if turn is not None and (self._reply is None or self._reply.turn is not turn):
                reader.rows.put(reader.row, None)
            elif turn is None and self.responding and self._reply is not None and not self._reply.recorded:
                reader.rows.put(reader.row, self._reply.turn)
            reader.settle()
            return
            yield

        self._run(settle_row)

    # copies

    @whole
    def fork(self) -> OmniSession:
        """A second session that goes on from here independently; both start from the same past.

        During a reply the copy holds what was yielded of it.
        """
        return self._fork()

    def _fork(self) -> OmniSession:
        return self._copy(Rows(self.model, 1), 0)

    def _copy(self, rows: Rows, row: int) -> OmniSession:
        other = copy.copy(self)
        other._lock, other._reply, other._undo = threading.RLock(), None, None
        other._conversation = self._conversation.fork()
        other._reader = RowReader(rows, row, self._reader.prefill_tokens)
        other._encoders = Encoders(self.model, self.processor, self.streaming.audio_window_s, rows.stage)
        if other._conversation.open is not None:
            other._conversation.open.move(other._encoders)
        if (reply := self._reply) is not None and self.responding:
            kept = heard_ids(reply.turn, self.model.code2wav, None)
            message = reply.message
            cut = fill(self, message, kept, ReplyTimes(tuple(kept), None), INCOMPLETE)
            other._conversation.messages = other._conversation.replaced(message.id, cut)

        def copy_row() -> Any:
            reader = self._reader
            reader.rows.copy_row(reader.row, rows, row)
            other._reader.done = list(reader.done)
            other._reader.set_lengths()
            return
            yield

        self._run(copy_row)
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
        with naming(folder):
            saved = SavedSession(folder)
            session._set_up(model, processor, **saved.options)
            session._open(Rows(model, 1), 0)
            saved.fill(session)
        return session

    # tokens

    def _header(self, role: str) -> list[int]:
        return [self.model.config.im_start_token_id, *self.processor.encode_text(f"{role}\n")]

    def _closing(self) -> list[int]:
        return [self.model.config.im_end_token_id, *self.processor.encode_text("\n")]
