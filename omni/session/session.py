"""OmniSession: a conversation as an object. Push sound, pictures and text, respond, interrupt, fork, save.

The work runs inside the calls. What is pushed is read by the Thinker and the Talker at once, as far as it is decided,
so that little is left to do when `respond` is called. The caches stay; the Talker's holds its part of the conversation.
"""

from __future__ import annotations

import asyncio
import copy
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.generation.arguments import resolve
from omni.generation.events import Event
from omni.generation.generate import assistant_header, check_talker_room, make_request, make_turn
from omni.generation.reply import ReplyReader
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.generation.turn import SPEECH_OFF, SPEECH_OVER, Turn
from omni.parts import ModelParts
from omni.processing.audio_file import read_piece
from omni.processing.processor import OmniProcessor
from omni.processing.token_budget import TokenBudget
from omni.processing.vision import PixelBudget
from omni.rope.positions import Image
from omni.session.conversation import Conversation
from omni.session.file import load_session, save_session, streaming_of
from omni.session.live_media import AudioFrontEnd, GridStep, OpenClip, OpenVideo
from omni.session.reply_events import ReplyEvents
from omni.talker.layout import PromptEnd


class Kept(NamedTuple):
    """What an interrupted reply leaves in the history: the ids that count as heard, and their text."""

    token_ids: list[int]
    text: str


class OmniSession:
    """A conversation with a model.

    speaker: default voice of its replies. system: text of a system turn. streaming: knobs of latency.
    use_audio_in_video: sound pushed while a video is open belongs to the video. keep_media: keep the embeddings of
    media (one vector of the Thinker's width a token), so that turns with media can be read again by
    `drop_oldest_turns`. A session is used from one thread at a time.
    """

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
        self._conversation = Conversation(Rows(model, 1), 0, self.streaming.prefill_tokens, keep_media=keep_media)
        self._write_system(system)

    def _write_system(self, system: str | None) -> None:
        if system is not None:
            self._check_system(system)
            self._header("system")
            self._conversation.write_text([*self.processor.encode_text(system), *self._closing()])

    def _check_system(self, system: str | None) -> None:
        if self.model.talker is not None:
            self.processor.check_speech_system(system)

    def _set_up(
        self,
        model: ModelParts,
        processor: OmniProcessor | None,
        speaker: str | None,
        streaming: StreamingConfig | None,
        use_audio_in_video: bool,
    ) -> None:
        model.require("thinker")
        found = processor if processor is not None else model.processor
        if found is None:
            raise ValueError("a session needs a processor: OmniSession(model, OmniProcessor.from_pretrained(folder))")
        self.model, self.processor, self.speaker = model, found, speaker
        self.streaming = streaming or StreamingConfig()
        self.use_audio_in_video = use_audio_in_video
        self._lock: Any = threading.RLock()  # a reply that is taken asynchronously may be interrupted from elsewhere
        self._text: list[str] = []
        self._control_tokens = False  # whether those texts may hold control tokens
        self._clip: OpenClip | None = None
        self._video: OpenVideo | None = None
        self._prompt: PromptEnd | None = None  # of the last reply, until new input comes
        self._turn: Turn | None = None
        c = model.config
        self._roles = {"system": c.system_token_id, "user": c.user_token_id, "assistant": c.assistant_token_id}

    # what the session holds

    @property
    def ids(self) -> list[int]:
        """All ids of the conversation so far, those still to be read included (open media and text are not)."""
        c = self._conversation
        return [*c.ids, *(token for ids, _ in c.queued for token in ids), *c.pending]

    @property
    def responding(self) -> bool:
        """Whether a reply is being given."""
        return self._turn is not None and not self._turn.delivered_end

    # input

    def push_text(self, text: str, control_tokens: bool = False) -> None:
        """Add text to the user's turn. Consecutive texts are one text.

        control_tokens: special tokens and the markup of reasoning and tool calls in it become their ids; by default
        they are text, and other added tokens become their ids.
        """
        if not isinstance(text, str):
            raise TypeError(f"push_text takes a string, got {type(text).__name__}")
        positions = self.model.config.thinker.text_config.max_position_embeddings
        TokenBudget(positions, allow_long=None).check_text(text, self.processor.encode_text, short=32)  # else: respond
        self._open_user_turn()
        self._close_media()
        if control_tokens != self._control_tokens:
            self._flush_text()
        self._control_tokens = control_tokens
        self._text.append(text)

    def push_audio(self, samples: Any, sample_rate: int = 16000) -> None:
        """Add sound: samples [n], [channels, n] or [n, channels] at any rate. Consecutive calls are one clip.

        Floats in -1 .. 1, or integers, which are PCM. A piece may be empty. Raises TypeError or ValueError.
        """
        wave = read_piece(samples)
        whole = isinstance(sample_rate, Real) and not isinstance(sample_rate, bool) and sample_rate % 1 == 0
        if not whole or not 1000 <= sample_rate <= 384000:
            raise ValueError(f"sample_rate must be a whole number of Hz in 1000..384000, got {sample_rate!r}")
        sample_rate = int(sample_rate)
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

    @torch.no_grad()
    def push_image(self, image: Any) -> None:
        """Add a picture: a path, address, bytes, array or PIL image."""
        self.model.require("vision_encoder")
        pixels, grid = self.processor.vision.image(image, PixelBudget())
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

    @torch.no_grad()
    def push_video_frame(self, frame: Any, time_s: float) -> None:
        """Add a frame of the open video (or begin one): a picture, and its time in seconds, which must grow."""
        self.model.require("vision_encoder")
        picture = self.processor.vision.frame(frame)
        if not isinstance(time_s, Real) or not math.isfinite(time_s):
            raise ValueError(f"time_s must be a number of seconds, got {time_s!r}")
        self._open_user_turn()
        if self._video is None:
            self._close_media()
            self._flush_text()
            front_end = self._new_front_end() if self.use_audio_in_video else None
            self._video = OpenVideo.open(float(time_s), front_end, self._rule)
            self._video.begin(self._conversation, self.processor.tokens)
        video = self._video
        if not time_s > video.last_s:
            raise ValueError(f"frame times must grow: {time_s} s comes after {video.last_s} s")
        if video.frames and video.frames[0][1].shape != picture.shape:
            raise ValueError(
                "all frames of a video must have one size; respond or push something else to end the video"
            )
        video.frames.append((float(time_s), picture))
        video.last_s = float(time_s)
        if len(video.frames) == self.processor.vision.temporal_patch_size:
            self._encode_frames(video)
        video.write(self._conversation, self.processor.tokens)

    def _new_front_end(self) -> AudioFrontEnd:
        stage = self._conversation.rows.stage
        return AudioFrontEnd(self.model, self.processor, self.streaming.audio_window_s, stage)

    def _encode_frames(self, video: OpenVideo) -> None:
        """Turn the frames that wait into one grid step (an odd last frame stands for two)."""
        times, frames = zip(*video.frames)
        pixels, grid = self.processor.vision.grid_step(list(frames))
        embeds, taps = self._encode_picture(pixels, grid)
        merge = self.processor.vision.merge_size
        video.add_step(GridStep(times[0] - video.first_s, embeds, taps, grid[1] // merge, grid[2] // merge))
        video.frames.clear()

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
            if not self.ids:
                self._check_system(None)
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
            self._encode_frames(video)
        ends = [self.processor.audio_end_id, self.processor.vision_end_id]
        video.close(self._conversation, self.processor.tokens, ends)

    def _flush_text(self) -> None:
        text, self._text = "".join(self._text), []
        self._conversation.write_text(self.processor.encode_text(text, control_tokens=self._control_tokens))

    # replies

    def respond(self, **arguments: Any) -> ReplyEvents:
        """Answer what was pushed: the events of `OmniModel.stream`, with the same keyword arguments.

        Without input since the last reply the user's turn is empty. The reply belongs to the history once all its
        events are taken; closing the iterator early interrupts it.
        """
        with self._lock:
            turn = self._begin(arguments)
        return self._events_of(turn, self._tick)

    def _events_of(self, turn: Turn, produce: Callable[[], list[Event]]) -> ReplyEvents:
        codec = self.model.code2wav
        hop, missing = 1, 0
        if codec is not None:
            hop, missing = int(codec.hop_length), int(codec.missing_samples)
        return ReplyEvents(turn, produce, self._finish, self.interrupt, hop, missing)

    def _tick(self) -> list[Event]:
        with self._lock:
            return self._conversation.rows.tick() if self.responding else []

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

    def _begin(self, arguments: dict[str, Any]) -> Turn:
        """Close the user's turn, open the assistant's and start to answer."""
        streaming = arguments.pop("streaming", None) or self.streaming
        if not isinstance(streaming, StreamingConfig):
            raise TypeError(f"streaming must be a StreamingConfig, got {type(streaming).__name__}")
        defaults: dict[str, Any] = {"max_new_tokens": 1024, "max_frames": 4095, "speaker": self.speaker}
        for name in ("text_sampling", "return_audio", "audio_sampling", "residual_sampling", "seed"):
            defaults[name] = None
        unknown = [name for name in arguments if name not in defaults]
        if unknown:
            raise TypeError(f"respond has no argument {unknown[0]!r}; it takes streaming, {', '.join(defaults)}")
        if self.responding:
            raise ValueError("the session is responding already; take all its events, or interrupt it")
        args = resolve(self.model, 1, **{**defaults, **arguments})
        conversation = self._conversation
        began, spent = time.perf_counter(), dict(conversation.rows.seconds)
        self._check_room(args.speakers is not None)
        self._open_user_turn()
        self._close_media()
        self._flush_text()
        conversation.write_text(self._closing())
        conversation.in_user = False
        header = assistant_header(self.model, None, self.processor)
        conversation.write_text(header)
        conversation.begin_reply()
        self._prompt = conversation.thinker
        reader = ReplyReader(self.processor.think_token_ids, decode=self.processor.decode)
        request = make_request(self.model, args, 0, streaming, len(conversation.ids), header, conversation.talker)
        turn = make_turn(request, reader, self.processor)
        conversation.rows.begin(conversation.row, turn, began, spent)  # the input's tail is part of the answer's delay
        self._turn = turn
        return turn

    def _check_room(self, speaks: bool) -> None:
        """Raise ValueError, before anything is changed, if the reply cannot begin for want of positions."""
        conversation, closing = self._conversation, len(self._closing())
        user = len(self.processor.encode_text("".join(self._text), control_tokens=self._control_tokens)) + closing
        user += 0 if conversation.in_user else 2 + closing
        conversation.check_room(user + len(conversation.pending) + 2 + closing)
        layout = conversation.rows.layout
        if speaks and layout is not None:
            tokens = user + sum(len(ids) for ids, by_user in conversation.queued if layout.in_prompt(by_user))
            if layout.in_prompt(False):
                tokens += len(conversation.pending) + 2 + closing
            check_talker_room(layout, conversation.talker.tokens + tokens)

    def _finish(self, kept: list[int] | None = None) -> None:
        """Release the turn's row and append its reply (or the part that is kept) to the history."""
        turn, prompt = self._turn, self._prompt
        assert turn is not None and prompt is not None
        text = turn.text
        reply = text.ids if kept is None else kept
        closed = bool(reply) and reply[-1] in turn.request.stop_ids
        tail = self._closing()[1 if closed else 0 :]
        with self._lock:
            self._conversation.rows.release(self._conversation.row)
            self._conversation.end_reply(prompt, reply, min(text.read, len(reply)), tail, text.vectors)

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
            kept = self._played_ids(turn, played_ms)
            if not turn.delivered_end:
                turn.interruption = self._conversation.rows.end(self._conversation.row, turn, "interrupted")
                turn.delivered_end = True
            self._finish(kept)
            self._turn = None
        return Kept(kept, self.processor.decode(kept))

    def _played_ids(self, turn: Turn, played_ms: float | None) -> list[int]:
        """The ids of a reply that count as heard."""
        if played_ms is not None and not (isinstance(played_ms, Real) and 0 <= played_ms < math.inf):
            raise ValueError(f"played_ms must be a number of milliseconds, 0 or more, got {played_ms!r}")
        codec = self.model.code2wav
        text, speech, stop_ids = turn.text, turn.speech, turn.request.stop_ids
        silent = speech.state == SPEECH_OFF or codec is None or (speech.state == SPEECH_OVER and not speech.codes)
        if silent:
            return [token for token in text.ids[: turn.delivered_ids] if token not in stop_ids]
        frames = turn.delivered_frames
        if played_ms is not None:  # a multiple of a frame's length is that many frames, whatever the rounding
            frames = min(frames, math.floor(float(played_ms) * codec.frame_rate / 1000 + 1e-6))
        spoken = [token for token in text.ids if token not in stop_ids]
        return spoken[: len(spoken) * frames // max(len(speech.codes), 1)]

    def drop_oldest_turns(self, count: int = 1) -> int:
        """Make room: forget the oldest user turns with their replies, read the rest again, return the ids freed.

        What follows equals a session that never had those turns. The system text stays. Raises ValueError while it
        responds, if fewer turns are there, or if what stays holds media that were not kept.
        """
        if self.responding:
            raise ValueError("the session is responding; take all its events before dropping turns")
        freed = self._conversation.drop_turns(count)  # what is pending stays so: there may be no room for it
        self._prompt = None
        return freed

    # copies

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
        other._turn = other._prompt = None
        return other

    def save(self, path: str | Path) -> None:
        """Write the session into a folder (`session.json`, `session.safetensors`), from which `load` goes on.

        On the same device and backend it goes on bit for bit. Raises ValueError while it responds, OSError when
        writing fails; an older save is then intact.
        """
        save_session(self, path)

    @classmethod
    def load(cls, path: str | Path, model: ModelParts, processor: OmniProcessor | None = None) -> OmniSession:
        """A session that `save` wrote, for the same model. Raises FileNotFoundError or ValueError."""
        session = OmniSession(model, processor, **streaming_of(path))
        load_session(session, path)
        return session

    # tokens

    def _header(self, role: str) -> None:
        newline = self.processor.encode_text("\n")
        self._conversation.write_text([self.model.config.im_start_token_id, self._roles[role], *newline])

    def _closing(self) -> list[int]:
        return [self.model.config.im_end_token_id, *self.processor.encode_text("\n")]

    @property
    def _rule(self) -> PositionRule:
        return self.model.config.thinker.position_rule
