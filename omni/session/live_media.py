"""Media that arrive in pieces: a clip of sound, and a video (with or without its sound), into a conversation.

Both write what is decided and hold back what is not: mel frames wait for the end of their chunk, audio tokens for
their attention window, a frame for its partner, and in a video with sound a token for all that may precede it: in time,
or in its chunk of time, as the family's `PositionRule` has it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.encoders.resample import StreamingResampler
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.rope.positions import Video, segment_positions
from omni.session.conversation import Conversation

SAMPLE_RATE_HZ = 16000


def mono(samples: Any) -> Tensor:
    """Floating samples [n] from an array or tensor [n] or [n, channels]."""
    wave = samples if isinstance(samples, Tensor) else torch.tensor(np.array(samples))  # a copy: buffers are used again
    if not wave.is_floating_point():
        if wave.dtype == torch.int16:
            wave = wave.float() / 32768
        else:
            raise TypeError(f"audio samples must be floats in -1..1 or 16-bit integers, got {wave.dtype}")
    if wave.dim() == 2:
        wave = wave.float().mean(0 if wave.shape[0] < wave.shape[1] else 1)  # channels are few
    if wave.dim() != 1:
        raise ValueError(f"audio samples must be [n] or [n, channels], got shape {list(wave.shape)}")
    wave = wave.float().cpu()
    if not torch.isfinite(wave).all():
        raise ValueError("audio samples hold NaN or infinite values")
    return wave


class Ear:
    """Samples of any rate -> audio embeddings, as attention windows complete."""

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor,
        window_s: float | None,
        stage: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.encoder = encoder = model.require("audio_encoder")
        self.model, self.log_mel, self.stage = model, processor.log_mel, stage
        window = None if window_s is None else encoder.window_frames(window_s)
        self.mel_state, self.encoder_state = self.log_mel.init_state(), encoder.init_state(window)
        self.rate_hz = SAMPLE_RATE_HZ
        self.resampler: StreamingResampler | None = None
        self.resampler_state: Any = None
        self.samples = 0

    def push(self, samples: Tensor, rate_hz: int) -> Tensor:
        """The next samples [n] -> embeddings [m, D] that have become complete."""
        done = self._finish_rate() if rate_hz != self.rate_hz else samples[:0]
        if rate_hz != self.rate_hz:
            self.rate_hz = rate_hz
            self.resampler = None if rate_hz == SAMPLE_RATE_HZ else StreamingResampler(rate_hz, SAMPLE_RATE_HZ)
            self.resampler_state = None if self.resampler is None else self.resampler.init_state()
        if self.resampler is not None:
            samples = self.resampler.step(samples, self.resampler_state)
        return self._hear(torch.cat((done, samples)))

    def finish(self) -> Tensor:
        """The end of the clip: the embeddings that are left (none for a clip shorter than one mel frame)."""
        rest = self._hear(self._finish_rate())
        if self.samples < self.log_mel.hop_length:
            return rest
        mel = self.log_mel.finish(self.mel_state)
        last = self._encode(mel)
        with self.stage("encoders"):
            end = self.encoder.finish(self.encoder_state)
        return torch.cat([*(embeds for embeds in (rest, last) if len(embeds)), end])

    def _finish_rate(self) -> Tensor:
        if self.resampler is None:
            return torch.zeros(0)
        return self.resampler.finish(self.resampler_state)

    def _hear(self, samples: Tensor) -> Tensor:
        self.samples += samples.numel()
        return self._encode(self.log_mel.step(samples, self.mel_state))

    @torch.no_grad()
    def _encode(self, mel: Tensor) -> Tensor:
        with self.stage("encoders"):
            return self.encoder.step(mel.to(self.model.device, self.model.dtype), self.encoder_state)

    def clone(self) -> Ear:
        """An independent copy."""
        new = copy.copy(self)
        new.mel_state, new.encoder_state = self.mel_state.clone(), self.encoder_state.clone()
        new.resampler_state = None if self.resampler_state is None else self.resampler_state.clone()
        return new


@dataclass
class OpenClip:
    """A clip that is being heard."""

    ear: Ear
    begun: bool = False

    def clone(self) -> OpenClip:
        """An independent copy."""
        return OpenClip(self.ear.clone(), self.begun)

    def push(self, conversation: Conversation, samples: Tensor, rate_hz: int, begin: list[int], token: int) -> None:
        self._write(conversation, self.ear.push(samples, rate_hz), begin, token)

    def close(self, conversation: Conversation, begin: list[int], end: list[int], token: int) -> None:
        self._write(conversation, self.ear.finish(), begin, token)
        if self.begun:
            conversation.write_text(end)

    def _write(self, conversation: Conversation, embeds: Tensor, begin: list[int], token: int) -> None:
        if not len(embeds):
            return
        if not self.begun:
            conversation.write_text(begin)
            self.begun = True
        offsets = torch.arange(len(embeds), dtype=torch.float32).expand(3, -1)
        conversation.write_at([token] * len(embeds), offsets, embeds)
        conversation.move_on(len(embeds))


def write_marks(conversation: Conversation, marks: list[int], rule: PositionRule) -> None:
    """The tokens before or after a video; two of them share a position where the rule says so."""
    if rule.joint_marks and len(marks) > 1:
        conversation.write_text(marks[:1])
        conversation.move_on(-1)  # back to where the first one stands
        marks = marks[1:]
    conversation.write_text(marks)


@dataclass
class ChunkTurns:
    """Whose turn it is in a video with sound that is laid out by chunks of time.

    chunk: number of the chunk that is being written; in_sound: whether its video part is over; begun: whether that part
    has a token; done: tokens written of the grid step that waits first. As in `omni.rope.positions`, a chunk's video
    part begins with the next token, however late, and ends before the first one beyond the chunk.
    """

    chunk: int = 0
    in_sound: bool = False
    begun: bool = True
    done: int = 0

    def take(self, grid: tuple[float, Tensor, Tensor | None, int, int], rule: PositionRule, end: int) -> int:
        """How many of a grid step's tokens belong to the chunk that ends before place `end`, beyond those done."""
        place = float(segment_positions(Video((grid[0],), 1, 1), 0.0, rule)[0].max())
        left = len(grid[1]) - self.done
        count = left if place < end else int(not self.begun)
        self.begun = self.begun or count > 0
        return count

    def following(self) -> None:
        """The next chunk."""
        self.chunk, self.in_sound, self.begun = self.chunk + 1, False, False


@dataclass
class OpenVideo:
    """A video that is being seen, and heard if it has an ear.

    frames [3, H, W] wait for the temporal patch to be complete; grids (time, embeds, taps, height, width) and sounds
    (embeddings, one token each) wait for what may precede them.
    """

    first_s: float
    ear: Ear | None
    frames: list[tuple[float, Tensor]] = field(default_factory=list)
    grids: deque[tuple[float, Tensor, Tensor | None, int, int]] = field(default_factory=deque)
    sounds: deque[Tensor] = field(default_factory=deque)
    last_s: float = -1.0
    heard: int = 0
    last_kind: str = ""
    tail: float = -1.0
    turns: ChunkTurns = field(default_factory=lambda: ChunkTurns())

    def clone(self) -> OpenVideo:
        """An independent copy."""
        ear = None if self.ear is None else self.ear.clone()
        grids, sounds = deque(self.grids), deque(self.sounds)
        return replace(self, ear=ear, frames=list(self.frames), grids=grids, sounds=sounds, turns=replace(self.turns))

    def begin(self, conversation: Conversation, tokens: Any, rule: PositionRule) -> None:
        """Write the marks before the video."""
        write_marks(conversation, [tokens.vision_start, *([tokens.audio_start] if self.ear else [])], rule)

    def end(self, conversation: Conversation, marks: list[int], rule: PositionRule) -> None:
        """Write the marks behind the video: [end of vision], or [end of sound, end of vision]."""
        conversation.move_on(self.tail + 1)
        write_marks(conversation, marks, rule)

    def write(self, conversation: Conversation, tokens: Any, rule: PositionRule, *, closing: bool = False) -> None:
        """Write all that nothing still to come can precede."""
        if rule.chunk_s is not None and self.ear is not None:
            self._write_chunks(conversation, tokens, rule, int(rule.rate * rule.chunk_s), closing)
            return
        rate = rule.rate
        while self.grids or self.sounds:
            due = bool(self.grids) and (self.ear is None or self.grids[0][0] * rate <= self.heard)
            if due or (self.grids and closing and not self.sounds):
                self._write_grid(conversation, tokens.video, rule)
            elif self.sounds and (closing or self.heard < self._next_grid_s() * rate):
                self._write_sound(conversation, tokens.audio, rate, closing=closing)
            else:
                return

    def _write_chunks(
        self, conversation: Conversation, tokens: Any, rule: PositionRule, size: int, closing: bool
    ) -> None:
        """Chunk by chunk, each with the video's part first and then `size` tokens of sound, or what is left."""
        turns = self.turns
        while self.grids or self.sounds:
            end = size * (turns.chunk + 1)  # the first place beyond this chunk
            if not turns.in_sound:
                count = turns.take(self.grids[0], rule, end) if self.grids else 0
                if count:
                    self._write_grid_part(conversation, tokens.video, rule, count)
                elif self.grids or closing or (turns.begun and self._next_grid_s() * rule.rate >= end):
                    turns.in_sound = True
                else:
                    return
            else:
                run = [self.sounds.popleft() for _ in range(min(end - self.heard, len(self.sounds)))]
                self._write_run(conversation, tokens.audio, run, f"audio {turns.chunk}")
                if self.heard < end and not closing:
                    return
                turns.following()

    def _write_grid_part(self, conversation: Conversation, token: int, rule: PositionRule, count: int) -> None:
        """The next `count` tokens of the first grid step that waits."""
        time_s, embeds, taps, height, width = self.grids[0]
        part = slice(self.turns.done, self.turns.done + count)
        offsets, _ = segment_positions(Video((time_s,), height, width), 0.0, rule)
        conversation.write_at([token] * count, offsets[:, part], embeds[part], None if taps is None else taps[:, part])
        self._note(f"video {self.turns.chunk}", float(offsets[:, part].max()))
        self.turns.done = part.stop
        if part.stop == len(embeds):
            self.grids.popleft()
            self.turns.done = 0

    def _next_grid_s(self) -> float:
        """No grid step still to come begins before this time."""
        if self.grids:
            return self.grids[0][0]
        return self.frames[0][0] - self.first_s if self.frames else self.last_s - self.first_s

    def _write_grid(self, conversation: Conversation, token: int, rule: PositionRule) -> None:
        time_s, embeds, taps, height, width = self.grids.popleft()
        offsets, _ = segment_positions(Video((time_s,), height, width), 0.0, rule)
        conversation.write_at([token] * len(embeds), offsets, embeds, taps)
        self._note("video", float(offsets.max()))

    def _write_sound(self, conversation: Conversation, token: int, rate: float, *, closing: bool) -> None:
        bound = self.grids[0][0] * rate if self.grids else (float("inf") if closing else self._next_grid_s() * rate)
        run: list[Tensor] = []
        while self.sounds and self.heard + len(run) < bound:
            run.append(self.sounds.popleft())
        self._write_run(conversation, token, run, "audio")

    def _write_run(self, conversation: Conversation, token: int, run: list[Tensor], kind: str) -> None:
        """The next audio tokens."""
        if not run:
            return
        offsets = torch.arange(self.heard, self.heard + len(run), dtype=torch.float32).expand(3, -1)
        conversation.write_at([token] * len(run), offsets, torch.stack(run))
        self.heard += len(run)
        self._note(kind, float(offsets.max()))

    def _note(self, kind: str, highest: float) -> None:
        """Keep the largest offset of the run of one kind that the video ends with: what follows starts after it."""
        self.tail = max(self.tail, highest) if kind == self.last_kind or self.ear is None else highest
        self.last_kind = kind
