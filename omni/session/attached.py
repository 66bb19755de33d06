"""A conversation and the row that is made equal to it: what all halves of a session stand on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from omni.config.keywords import check_flags
from omni.generation.arguments import stop_ids
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.generation.turn import Turn
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.session import options
from omni.session.conversation import Conversation
from omni.session.entries import Entry
from omni.session.items import COMPLETED, Message, new_id
from omni.session.jobs import Job, T, at_once
from omni.session.open_turn import Encoders, OpenTurn
from omni.session.replies import Reply, end_early, settle_reply
from omni.session.row_reader import RowReader
from omni.session.undo import Undo
from omni.talker.layout import PromptEnd


class Attached:
    """A conversation (`_conversation`, a list) attached to a row (`_reader`), with the options of a session."""

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
        self._encoders = Encoders(self.model, self.processor, self.streaming, rows.stage)

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
        """All ids of the conversation so far, those still to be read included (open media and text are not)."""
        self._settle_if_free()
        return self._conversation.ids

    @property
    def system(self) -> str | None:
        """The system text that opens the conversation, None without one."""
        first = self._conversation.system
        return None if first is None else first.item.text

    @property
    def closed(self) -> bool:
        """Whether the session cannot be used any more; every call then raises ValueError with the reason."""
        return self.closed_because is not None

    @property
    def responding(self) -> bool:
        """Whether a reply is being given."""
        return self._reply is not None and not self._reply.over

    _turn_is_own = True  # the turn of its reply moves in its own calls alone

    @property
    def _turn(self) -> Turn | None:
        """Of the last reply."""
        return None if self._reply is None else self._reply.turn

    def _check_usable(self) -> None:
        """Raise if no call can be made any more, whatever the session holds. Takes no lock."""

    def _check_reader(self) -> None:
        """Raise if the calling thread may not take events."""

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

    def _check_room(self, before: PromptEnd) -> None:
        """Raise ValueError if the list is too long and may not be made shorter."""
        conversation = self._conversation
        if self.make_room is not None and not conversation.allow_long and conversation.room() < 0:
            reply, due = conversation.reply_in_progress, self.make_room * conversation.limit
            while conversation.room() < due or self._media_lost(conversation.entries):
                try:
                    shorter = conversation.without_oldest(1)
                except ValueError:
                    break  # the last turn stays
                if reply is not None and reply not in shorter:
                    break
                conversation.messages = shorter
        conversation.check_room(before)

    # the reply

    def _settle_if_free(self) -> None:
        """Finish what a reply has left undone, unless a call is running, which has done so itself."""
        if self._lock.acquire(blocking=False):
            try:
                self._settle_reply()
            finally:
                self._lock.release()

    def _settle_reply(self) -> None:
        """Finish what a reply has left undone."""
        settle_reply(self)

    def _end_early(self, reply: Reply, played_ms: float | None) -> list[int] | None:
        """End a reply that is being given and keep what was heard of it; None if it has ended in the meantime."""
        return self._run(at_once(lambda: end_early(self, reply, played_ms)))

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
        if self._worth_reading(entries):
            self._run(lambda: reader.read(entries))
        self._forget_media()

    def _worth_reading(self, entries: Sequence[Entry]) -> bool:
        """Whether so much is decided that the row should hold it."""
        reader = self._reader
        read = reader.read_entries(entries)
        rest = entries[read:]
        texts = sum(len(entry.ids) for entry in rest)
        return len(reader.done) > read or any(e.media for e in rest) or texts >= reader.prefill_tokens

    def _forget_media(self) -> None:
        """Keep no more embeddings than `keep_media` allows."""
        entries = self._conversation.entries
        limit = self.media_bytes if self.keep_media else 0
        reply, before = self._reply, self._conversation.messages
        self._conversation.forget_media(self._reader.read_entries(entries), limit)
        if reply is not None and reply.listed is before:
            reply.listed = self._conversation.messages  # nothing that a reply which fails must not undo

    def _media_lost(self, entries: Sequence[Entry]) -> bool:
        """Whether media among these would have to be read again and were not kept."""
        return self._reader.lost(entries)

    def _encoders_to(self, rows: Rows) -> None:
        """Let the encoders note their times where these rows do."""
        self._encoders = Encoders(self.model, self.processor, self.streaming, rows.stage)
        if self._conversation.open is not None:
            self._conversation.open.move(self._encoders)

    def _settle_row(self) -> None:
        """Let the row be sound after a call that failed or was cut."""

        def settle_row() -> None:
            reader = self._reader
            turn = reader.rows.turns[reader.row]
            if turn is not None and (self._reply is None or self._reply.turn is not turn):
                reader.rows.put(reader.row, None)
            elif turn is None and self.responding and self._reply is not None and not self._reply.recorded:
                reader.rows.put(reader.row, self._reply.turn)
            reader.settle()

        self._run(at_once(settle_row))

    # tokens

    def _header(self, role: str) -> list[int]:
        return [self.model.config.im_start_token_id, *self.processor.encode_text(f"{role}\n")]

    def _closing(self) -> list[int]:
        return [self.model.config.im_end_token_id, *self.processor.encode_text("\n")]

    def _beginning(self, system: str | None) -> tuple[Entry, ...]:
        """What the chat template writes before the first turn."""
        start, tools = self.model.config.im_start_token_id, self.tools
        ids = self.processor.beginning_ids(system, start, tools)
        return (Entry(tuple(ids)),) if ids else ()
