"""The user's turn while it is open: text, sound, pictures and frames become its entries as far as they are decided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.generation.streaming_config import StreamingConfig
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.processing.vision import VideoPixels
from omni.rope.positions import Image, segment_positions
from omni.session.entries import Entry, Piece, Writing
from omni.session.items import IN_PROGRESS, KeptMedia, Message, forget, forget_parts, new_id
from omni.session.live_media import AudioFrontEnd, OpenClip, OpenVideo


@dataclass(frozen=True)
class Encoders:
    """What turns media into embeddings: the model's encoders, what prepares their input, and the audio chunk and window
    of `streaming`. stage: notes the time that they take."""

    model: ModelParts
    processor: OmniProcessor
    streaming: StreamingConfig
    stage: Callable[[str], AbstractContextManager[None]]

    def sound(self) -> AudioFrontEnd:
        """For a clip that arrives in pieces. Raises ValueError without an audio encoder."""
        return AudioFrontEnd(self.model, self.processor, self.streaming, self.stage)

    def pictures(self, pixels: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Patches of a picture, or of grid steps [t, h, w] -> embeddings [n, D] and taps [n_taps, n, D]."""
        with self.stage("encoders"):
            out = self.model.encode_vision(pixels, torch.tensor([list(grid)], device=self.model.device))
        return out.embeds, torch.stack(list(out.taps)) if out.taps else None


class OpenTurn:
    """A turn that is being written.

    writing: its entries; parts: content items of what is closed; clip and video: media that are open; before_medium: so
    many entries and the text that waited before the newest medium came, whose own entries begin at `medium_start`.
    """

    def __init__(self, encoders: Encoders, role: str = "user", id: str | None = None) -> None:
        self.encoders, self.role, self.id = encoders, role, id or new_id()
        self.writing = Writing(encoders.model, encoders.processor.encode_text, by_user=role in ("user", "tool"))
        self.parts: tuple[dict[str, Any], ...] = ()
        self.clip: OpenClip | None = None
        self.video: OpenVideo | None = None
        self.before_medium: tuple[int, tuple[Piece, ...]] = (0, ())
        self.medium_start = 0
        self.writing.write_text([encoders.model.config.im_start_token_id])
        self.writing.write_text(f"{role}\n")  # may become tokens together with the text that follows

    def add_text(self, text: str, pieces: Sequence[Piece] | None = None) -> None:
        """Text, and the pieces that it is made of (None: itself). Consecutive texts are one text."""
        self.close_media()
        for piece in [text] if pieces is None else pieces:
            self.writing.wait(piece)
        if text:
            before = self.parts[-1]["text"] if self.parts and self.parts[-1]["type"] == "text" else ""
            rest = self.parts[:-1] if before else self.parts
            self.parts = (*rest, {"type": "text", "text": before + text})

    def add_sound(self, samples: Tensor, rate_hz: int) -> None:
        """The next samples [n] of the open clip, or of the open video's sound."""
        tokens = self.encoders.processor.tokens
        if self.video is not None and self.video.front_end is not None:
            self.video.push(self.writing, samples, rate_hz, tokens)
            return
        self._close_video()
        if self.clip is None:
            self._open_medium()
            self.clip = OpenClip(self.encoders.sound())
        self.clip.push(self.writing, samples, rate_hz, [tokens.audio_start], tokens.audio)

    def add_picture(self, pixels: Tensor, grid: Sequence[int]) -> None:
        """A picture's patches and grid [1, h, w]."""
        processor = self.encoders.processor
        self.close_media()
        self._open_medium()
        embeds, taps = self.encoders.pictures(pixels, grid)
        merge = processor.vision.merge_size
        segment = Image(grid[1] // merge, grid[2] // merge)
        offsets, length = segment_positions(segment, 0.0, self._rule)
        self.writing.write_text([processor.tokens.vision_start])
        self.writing.write_at([processor.tokens.image] * segment.length, offsets, embeds, taps)
        self.writing.move_on(length)
        self.writing.write_text([processor.vision_end_id])
        self._close_medium("image")

    def add_frame(self, time_s: float, picture: Tensor, *, with_sound: bool) -> None:
        """A frame [3, H, W] of the open video, or of a new one; with_sound: sound that follows belongs to it."""
        processor = self.encoders.processor
        if self.video is None:
            self._open_video(time_s, with_sound=with_sound)
        video = self.video
        assert video is not None
        video.add_frame(time_s, picture)
        if len(video.frames) == processor.vision.temporal_patch_size:
            video.encode_frames(processor.vision, self.encoders.pictures)
        video.write(self.writing, processor.tokens)

    def add_film(self, film: VideoPixels) -> None:
        """A whole video, with its sound if that is to be heard."""
        self._open_video(0.0, with_sound=film.sound is not None)
        assert self.video is not None
        embeds, taps = self.encoders.pictures(film.pixels, film.grid)
        self.video.add_steps(film, embeds, taps, self.encoders.processor.vision.merge_size)
        if film.sound is not None:
            self.video.push(self.writing, film.sound, 16000, self.encoders.processor.tokens)
        self._close_video()

    def add_kept(self, media: KeptMedia) -> None:
        """Media that a session has read."""
        self.close_media()
        self._open_medium()
        self.writing.keep(media.entries)
        self._close_medium(media.kind)

    @property
    def _rule(self) -> PositionRule:
        return self.encoders.model.config.thinker.position_rule

    def _open_video(self, time_s: float, *, with_sound: bool) -> None:
        self.close_media()
        self._open_medium()
        self.video = OpenVideo.open(time_s, self.encoders.sound() if with_sound else None, self._rule)
        self.video.begin(self.writing, self.encoders.processor.tokens)

    def _open_medium(self) -> None:
        entries = len(self.writing.entries)  # the text that waits is decided once something of the medium is
        self.before_medium = entries, self.writing.tail
        self.medium_start = entries + len(self.writing.tail_entries())

    def _close_medium(self, kind: str) -> None:
        if media := self._medium(kind):
            self.parts = (*self.parts, {"type": kind, kind: media})

    def _medium(self, kind: str) -> KeptMedia | None:
        """What of the newest medium has become entries."""
        entries = tuple(self.writing.entries[self.medium_start :])
        return KeptMedia(kind, entries) if entries else None

    def close_media(self) -> None:
        """End the open clip or video: nothing more of it will come."""
        processor, clip = self.encoders.processor, self.clip
        if clip is not None:
            marks = [processor.tokens.audio_start], [processor.audio_end_id]
            clip.close(self.writing, *marks, processor.tokens.audio)
            self.clip = None
            self._close_medium("audio")
        self._close_video()

    def _close_video(self) -> None:
        processor, video = self.encoders.processor, self.video
        if video is None:
            return
        if video.frames:
            video.encode_frames(processor.vision, self.encoders.pictures)
        video.close(self.writing, processor.tokens, [processor.audio_end_id, processor.vision_end_id])
        self.video = None
        self._close_medium("video")

    def discard_medium(self) -> bool:
        """Forget the open clip or video; False if there is none."""
        if self.clip is None and self.video is None:
            return False
        first, tail = self.before_medium
        self.clip = self.video = None
        self.writing.entries, self.writing.tail = self.writing.entries[:first], tail
        return True

    def finish(self, status: str) -> Message:
        """End the turn."""
        model, processor = self.encoders.model, self.encoders.processor
        self.close_media()
        self.writing.write_text([model.config.im_end_token_id])
        self.writing.write_text(processor.encode_text("\n"))
        return Message(self.id, self.role, self.parts, tuple(self.writing.entries), status)

    @property
    def message(self) -> Message:
        """The turn as far as it has come."""
        parts, kind = self.parts, "audio" if self.clip is not None else "video"
        if self.clip is not None or self.video is not None:
            media = self._medium(kind) or KeptMedia(kind, ())
            parts = (*parts, {"type": kind, kind: media})
        return Message(self.id, self.role, parts, (*self.writing.entries, *self.writing.tail_entries()), IN_PROGRESS)

    @property
    def entries(self) -> list[Entry]:
        """Its entries without the text and the media that are open."""
        writing, tail = self.writing, self.writing.tail
        if self.clip is None and self.video is None:  # the text is open, but for the header's
            tail = tail[: len(writing.entries) == 1]
        return [*writing.entries, *writing.encoded(tail)]

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self.parts and self.clip is None and self.video is None

    def move(self, encoders: Encoders) -> None:
        """Belong to another session, whose stages note the time."""
        self.encoders = encoders
        for medium in (self.clip, self.video):
            if medium is not None and medium.front_end is not None:
                medium.front_end.stage = encoders.stage

    def forget(self, media: set[object]) -> None:
        """Keep no embeddings of these pieces of media."""
        self.parts = forget_parts(self.parts, media)
        self.writing.entries = list(forget(self.writing.entries, media))

    def clone(self) -> OpenTurn:
        """An independent copy."""
        return self._copy(lambda medium: medium.clone())

    def note(self) -> OpenTurn:
        """A copy to go back to."""
        return self._copy(lambda medium: medium.note())

    def _copy(self, of: Callable[[Any], Any]) -> OpenTurn:
        new = copy.copy(self)
        new.writing = self.writing.clone()
        new.clip = None if self.clip is None else of(self.clip)
        new.video = None if self.video is None else of(self.video)
        return new
