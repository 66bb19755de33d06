"""OmniSession: a conversation as an object. Push sound, pictures and text, respond, interrupt, fork, save.

The work runs inside the calls. What is pushed is read by the Thinker and the Talker at once, as far as it is decided,
so that little is left to do when `respond` is called. The caches stay; the Talker's holds its part of the conversation.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.config.keywords import check_flags, names_keywords, takes_arguments_of
from omni.config.positions import PositionRule
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
from omni.rope.positions import Image
from omni.session import options
from omni.session.begin_reply import begin_reply
from omni.session.conversation import Conversation, Piece
from omni.session.file import SavedSession, save_session
from omni.session.heard import heard_ids
from omni.session.live_media import AudioFrontEnd, OpenClip, OpenVideo
from omni.session.reply_events import ReplyEvents
from omni.session.saved_values import naming
from omni.session.undo import Undo, put_back, settle, whole
from omni.talker.layout import PromptEnd

Sampling = SamplingConfig | Mapping[str, Any] | None


class Kept(NamedTuple):
    """What an interrupted reply leaves in the history: the ids that count as heard, and their text."""

    token_ids: list[int]
    text: str


class OmniSession:
    """A conversation with a model.

    speaker: default voice of its replies. system: text of a system turn. streaming: knobs of latency.
    use_audio_in_video: sound pushed while a video is open belongs to the video. keep_media: keep the embeddings of
    media (one vector of the Thinker's width a token), so that turns with media can be read again by
    `drop_oldest_turns`. A session takes one call at a time. A call that fails or is cut changes nothing; where it
    cannot be undone the session is `closed`, and every later call raises ValueError with the reason.
    """

    _conversation: Conversation

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor | None = None,
        *,
        speaker: str | None = None,
        system: str | None = None,
        streaming: StreamingConfig | None = None,
        use_audio_in_video: bool = False,
        keep_media: bool = False,
    ) -> None:
        self._set_up(model, processor, speaker, streaming, use_audio_in_video)
        self._open(Rows(model, 1), 0, keep_media)
        self._write_beginning(system)

    def _open(self, rows: Rows, row: int, keep_media: bool) -> None:
        """Make the conversation, in an empty row."""
        check_flags(keep_media=keep_media)
        encode, pieces = self.processor.encode_text, self.streaming.prefill_tokens
        self._conversation = Conversation(rows, row, encode, pieces, keep_media=keep_media)

    def _write_beginning(self, system: str | None) -> None:
        """Write what comes before the first user turn: what the chat template writes there."""
        options.check_text("system", system)
        if self.model.talker is not None:
            self.processor.check_speech_system(system)
        ids = self.processor.beginning_ids(system, self.model.config.im_start_token_id)
        self._conversation.write_text(ids)

    def _set_up(
        self,
        model: ModelParts,
        processor: OmniProcessor | None,
        speaker: str | None,
        streaming: StreamingConfig | None,
        use_audio_in_video: bool,
    ) -> None:
        options.check_parts(model, processor, streaming)
        options.check_speaker(model, speaker)
        check_flags(use_audio_in_video=use_audio_in_video)
        found = processor if processor is not None else model.processor
        if found is None:
            raise ValueError("a session needs a processor: OmniSession(model, OmniProcessor.from_pretrained(folder))")
        self.model, self.processor, self.speaker = model, found, speaker
        self.streaming = streaming or StreamingConfig()
        options.check_window(model, self.streaming)
        self.use_audio_in_video = use_audio_in_video
        self._lock: Any = threading.RLock()  # a reply that is taken asynchronously may be interrupted from elsewhere
        self._text: list[Piece] = []
        self._clip: OpenClip | None = None
        self._video: OpenVideo | None = None
        self._prompt: PromptEnd | None = None  # of the last reply, until new input comes
        self._turn: Turn | None = None
        self._undo: Undo | None = None  # of the call that runs, or was cut
        self._before_reply: Undo | None = None  # while a reply is being given
        self.closed_because: str | None = None

    # what the session holds

    @property
    def ids(self) -> list[int]:
        """All ids of the conversation so far, those still to be read included (open media and text are not)."""
        c = self._conversation
        return [*c.ids, *c.queued_ids, *c.pending]

    @property
    def closed(self) -> bool:
        """Whether the session cannot be used any more; every call then raises ValueError with the reason."""
        return self.closed_because is not None

    @property
    def responding(self) -> bool:
        """Whether a reply is being given."""
        return self._turn is not None and not self._turn.delivered_end

    # input

    @whole()
    def push_text(self, text: str, control_tokens: bool = False) -> None:
        """Add text to the user's turn. Consecutive texts are one text.

        control_tokens: special tokens and the markup of reasoning and tool calls in it become their ids; by default
        they are text, and other added tokens become their ids.
        """
        if not isinstance(text, str):
            raise TypeError(f"push_text takes a string, got {type(text).__name__}")
        positions = self.model.config.thinker.text_config.max_position_embeddings
        TokenBudget(positions, allow_long=None).check_text(text, self.processor.encode_text, short=32)  # else: respond
        pieces = self.processor.chat.pieces(text, control_tokens)  # what is no text is refused here
        self._open_user_turn()
        self._close_media()
        self._text += pieces

    @whole()
    def push_audio(self, samples: Any, sample_rate: int = 16000) -> None:
        """Add sound: samples [n], [channels, n] or [n, channels] at any rate. Consecutive calls are one clip.

        Floats in -1 .. 1, or integers, which are PCM. A piece may be empty. Raises TypeError or ValueError.
        """
        wave = read_piece(samples)
        sample_rate = options.whole_rate(sample_rate)
        self._open_user_turn()
        tokens = self.processor.tokens
        if self._video is not None and self._video.front_end is not None:
            self._video.push(self._conversation, wave, sample_rate, tokens)
            return
        self._close_video()
        self._flush_text()
        if self._clip is None:
            self._clip = OpenClip(self._new_front_end())
        self._clip.push(self._conversation, wave, sample_rate, [tokens.audio_start], tokens.audio)

    @whole()
    @torch.no_grad()
    def push_image(self, image: Any, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Add a picture: a path, address, bytes, array or PIL image. Its size is kept within the limits (None: the
        checkpoint's)."""
        self.model.require("vision_encoder")
        limits = PixelBudget(min_pixels, max_pixels)
        pixels, grid = self.processor.vision.image(image, limits, media_budget=self.processor.media_budget)
        self._open_user_turn()
        self._close_media()
        self._flush_text()
        embeds, taps = self._encode_picture(pixels, grid)
        merge = self.processor.vision.merge_size
        segment = Image(grid[1] // merge, grid[2] // merge)
        ids = [self.processor.tokens.image] * segment.length
        self._conversation.write_text([self.processor.tokens.vision_start])
        self._conversation.write(ids, segment, embeds, taps)
        self._conversation.write_text([self.processor.vision_end_id])

    @whole()
    @torch.no_grad()
    def push_video_frame(self, frame: Any, time_s: float) -> None:
        """Add a frame of the open video (or begin one): a picture, and its time in seconds, which must grow."""
        self.model.require("vision_encoder")
        picture = self.processor.vision.frame(frame, self.processor.media_budget)
        time_s = options.seconds(time_s)
        self._open_user_turn()
        if self._video is None:
            self._close_media()
            self._flush_text()
            front_end = self._new_front_end() if self.use_audio_in_video else None
            self._video = OpenVideo.open(time_s, front_end, self._rule)
            self._video.begin(self._conversation, self.processor.tokens)
        video = self._video
        video.add_frame(time_s, picture)
        if len(video.frames) == self.processor.vision.temporal_patch_size:
            video.encode_frames(self.processor.vision, self._encode_picture)
        video.write(self._conversation, self.processor.tokens)

    def _new_front_end(self) -> AudioFrontEnd:
        stage = self._conversation.rows.stage
        return AudioFrontEnd(self.model, self.processor, self.streaming.audio_window_s, stage)

    def _encode_picture(self, pixels: Tensor, grid: list[int]) -> tuple[Tensor, Tensor | None]:
        with self._conversation.rows.stage("encoders"):
            out = self.model.encode_vision(pixels, torch.tensor([grid], device=self.model.device))
        return out.embeds, torch.stack(list(out.taps)) if out.taps else None

    def _open_user_turn(self) -> None:
        """Open the user's turn if none is open."""
        if self.responding:
            raise ValueError("the session is responding; take all its events, or interrupt it, before pushing input")
        if not self._conversation.in_user:
            self._conversation.read_pending()
            self._prompt = None
            self._conversation.open_user_turn()
            self._header("user")

    def _close_media(self) -> None:
        tokens = self.processor.tokens
        clip, self._clip = self._clip, None
        if clip is not None:
            clip.close(self._conversation, [tokens.audio_start], [self.processor.audio_end_id], tokens.audio)
        self._close_video()

    def _close_video(self) -> None:
        video, self._video = self._video, None
        if video is None:
            return
        if video.frames:
            video.encode_frames(self.processor.vision, self._encode_picture)
        ends = [self.processor.audio_end_id, self.processor.vision_end_id]
        video.close(self._conversation, self.processor.tokens, ends)

    def _flush_text(self) -> None:
        pieces, self._text = self._text, []
        for piece in pieces:
            self._conversation.write_text(piece)

    # replies

    @names_keywords
    @whole()
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
    ) -> ReplyEvents:
        """Answer what was pushed: the events of `OmniModel.stream`, with the same arguments for one row.

        speaker, streaming: None is the session's own. prefill: the beginning of the reply, which the model goes on
        with; it becomes part of the history, and the reply's text is what follows it. allow_long: the session may go
        beyond the model's positions from now on, until the next reply. The history holds a reply as far as it counts:
        without what a stop string cut off.

        Without input since the last reply the user's turn is empty. The reply belongs to the history once all its
        events are taken; closing the iterator early interrupts it. What a part raises leaves the iterator, and the
        session is as before this call.
        """
        return self._respond({name: value for name, value in locals().items() if name != "self"})

    def _respond(self, arguments: dict[str, Any]) -> ReplyEvents:
        turn = begin_reply(self, arguments)
        return self._events_of(turn, lambda: self._tick(turn))

    def _events_of(self, turn: Turn, produce: Callable[[], list[Event]]) -> ReplyEvents:
        codec = self.model.code2wav
        hop, missing = 1, 0
        if codec is not None:
            hop, missing = int(codec.hop_length), int(codec.missing_samples)
        return ReplyEvents(turn, produce, self._finish, self._leave, self._abandon, hop, missing)

    def _tick(self, turn: Turn) -> list[Event]:
        with self._lock:
            settle(self)
            if turn.interruption is not None:
                return []
            if turn is not self._turn:
                raise ValueError("the reply was undone when it failed or was cut; call respond again")
            self._undo = self._before_reply
            events = self._conversation.rows.tick()
            self._conversation.rows.raise_errors()
            self._undo = None
            return events

    def _leave(self, turn: Turn) -> None:
        """Interrupt a reply whose events nobody reads any more."""
        if turn is self._turn and not self.closed:
            self.interrupt()

    def _abandon(self, turn: Turn, error: BaseException) -> None:
        """Forget a reply that failed or was cut: the session is as before `respond`."""
        with self._lock:
            if turn is self._turn and self._before_reply is not None:
                self._undo = self._before_reply
                put_back(self, error)

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

    def _finish(self, kept: list[int] | None = None) -> None:
        """Release the turn's row and append its reply (or the part that is kept) to the history."""
        turn, prompt = self._turn, self._prompt
        assert turn is not None and prompt is not None
        text = turn.text
        reply = text.kept if kept is None else kept
        closed = bool(reply) and reply[-1] in turn.request.stop_ids
        tail = self._closing()[1 if closed else 0 :]
        with self._lock:
            self._conversation.rows.release(self._conversation.row)
            self._conversation.end_reply(prompt, reply, min(text.read, len(reply)), tail, text.vectors)
            self._before_reply = None

    @whole(lambda session: session._conversation.reply_slots)
    def interrupt(self, played_ms: float | None = None) -> Kept:
        """Cut the reply to what was heard and return that.

        played_ms: how much of its sound was played (None: all that was yielded). Reply tokens count as heard in
        proportion to the frames played, rounded down; a silent reply counts as read as far as it was yielded. During
        `respond` the turn ends, its iterator yields `TurnEnd("interrupted")` and stops; after it the reply is cut as
        long as nothing was pushed. Raises ValueError if there is nothing to interrupt.
        """
        turn = self._turn
        if turn is None or self._prompt is None:
            raise ValueError("there is no reply to interrupt: none was given, or input was pushed since")
        with self._lock:
            kept = heard_ids(turn, self.model.code2wav, played_ms)
            if not turn.delivered_end:
                turn.interruption = self._conversation.rows.end(self._conversation.row, turn, "interrupted")
                turn.delivered_end = True
            self._finish(kept)
            self._turn = None
        return Kept(kept, self.processor.decode(kept))

    @whole(lambda session: (0, 0))
    def drop_oldest_turns(self, count: int = 1) -> int:
        """Make room: forget the oldest user turns with their replies, read the rest again, return the ids freed.

        What follows equals a session that never had those turns. The system text stays. Raises ValueError while it
        responds, if fewer turns are there, or if what stays holds media that were not kept.
        """
        if self.responding:
            raise ValueError("the session is responding; take all its events before dropping turns")
        count = options.whole_count(count)
        freed = self._conversation.drop_turns(count)  # what is pending stays so: there may be no room for it
        self._prompt = None
        return freed

    # copies

    @whole()
    def fork(self) -> OmniSession:
        """A second session that goes on from here independently; both start from the same past."""
        return self._copy(Rows(self.model, 1), 0)

    def _copy(self, rows: Rows, row: int) -> OmniSession:
        if self.responding:
            raise ValueError("the session is responding; take all its events before forking it")
        other = copy.copy(self)
        other._lock = threading.RLock()
        other._text = list(self._text)
        other._clip = None if self._clip is None else self._clip.clone()
        other._video = None if self._video is None else self._video.clone()
        other._conversation = self._conversation.fork(rows, row)
        for front_end in (other._clip and other._clip.front_end, other._video and other._video.front_end):
            if front_end:
                front_end.stage = rows.stage
        other._turn = other._prompt = other._undo = other._before_reply = None
        return other

    @whole()
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
            made = saved.options
            keep_media = made.pop("keep_media")
            session._set_up(model, processor, **made)
            session._open(Rows(model, 1), 0, keep_media)
            saved.fill(session)
        return session

    # tokens

    def _header(self, role: str) -> None:
        self._conversation.write_text([self.model.config.im_start_token_id])
        self._conversation.write_text(f"{role}\n")  # may become tokens together with the text that follows

    def _closing(self) -> list[int]:
        return [self.model.config.im_end_token_id, *self.processor.encode_text("\n")]

    @property
    def _rule(self) -> PositionRule:
        return self.model.config.thinker.position_rule
