"""Media that arrive in pieces: a clip of sound, and a video (with or without its sound), into a conversation.

Both prefill what is decided and hold back what is not: mel frames wait for the end of their chunk, audio tokens for
their attention window, a frame for its partner, and in a video with sound a token for all that may precede it in the
order of `omni.rope.interleave`.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.encoders.contract import chosen_cuts, chosen_rate
from omni.encoders.resample import StreamingResampler
from omni.generation.streaming_config import StreamingConfig
from omni.parts import ModelParts
from omni.processing.processor import OmniProcessor
from omni.processing.vision import VideoPixels, VisionProcessor
from omni.rope.interleave import Interleave, Run
from omni.rope.positions import Video, segment_positions
from omni.session.entries import Writing

SAMPLE_RATE_HZ = 16000
EncodePicture = Callable[[Tensor, list[int]], tuple[Tensor, Tensor | None]]  # patches, grid -> embeddings, taps


class AudioFrontEnd:
    """Samples of any rate -> audio embeddings, as attention windows complete: resampler, log-mel, encoder."""

    def __init__(
        self,
        model: ModelParts,
        processor: OmniProcessor,
        streaming: StreamingConfig,
        stage: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.encoder = encoder = model.require("audio_encoder")
        cuts = chosen_cuts(encoder, streaming.audio_chunk_s, streaming.audio_window_s)
        chunk, own = cuts.get("chunk_frames"), processor.log_mel.chunk_frames
        self.model, self.log_mel, self.stage = model, processor.log_mel.in_chunks(chunk), stage
        self.rate = chosen_rate(encoder.num_tokens, chunk, own)  # tokens a second, None: as the position rule says
        self.mel_state = self.log_mel.init_state()
        self.encoder_state = encoder.init_state(cuts.pop("window_frames", None), **cuts)
        self.rate_hz = SAMPLE_RATE_HZ
        self.resampler: StreamingResampler | None = None
        self.resampler_state: Any = None
        self.samples = 0

    @torch.no_grad()
    def push(self, samples: Tensor, rate_hz: int) -> Tensor:
        """The next samples [n] -> embeddings [m, D] that have become complete."""
        with self.model.reading_threads(13 * samples.numel() // rate_hz):  # tokens a second in the releases
            return self._push(samples, rate_hz)

    def _push(self, samples: Tensor, rate_hz: int) -> Tensor:
        done = self._finish_rate() if rate_hz != self.rate_hz else samples[:0]
        if rate_hz != self.rate_hz:
            self.rate_hz = rate_hz
            self.resampler = None if rate_hz == SAMPLE_RATE_HZ else StreamingResampler(rate_hz, SAMPLE_RATE_HZ)
            self.resampler_state = None if self.resampler is None else self.resampler.init_state()
        if self.resampler is not None:
            samples = self.resampler.step(samples, self.resampler_state)
        return self._encode_samples(torch.cat((done, samples)))

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The end of the clip: the embeddings that are left (none for a clip shorter than one mel frame)."""
        with self.model.reading_threads(1):  # part of a window
            return self._finish()

    def _finish(self) -> Tensor:
        rest = self._encode_samples(self._finish_rate())
        if self.samples < self.log_mel.hop_length:
            return rest
        mel = self.log_mel.finish(self.mel_state)
        last = self._encode_mel(mel)
        with self.stage("encoders"):
            end = self.encoder.finish(self.encoder_state)
        return torch.cat([*(embeds for embeds in (rest, last) if len(embeds)), end])

    def _finish_rate(self) -> Tensor:
        if self.resampler is None:
            return torch.zeros(0)
        return self.resampler.finish(self.resampler_state)

    def _encode_samples(self, samples: Tensor) -> Tensor:
        self.samples += samples.numel()
        return self._encode_mel(self.log_mel.step(samples, self.mel_state))

    @torch.no_grad()
    def _encode_mel(self, mel: Tensor) -> Tensor:
        with self.stage("encoders"):
            return self.encoder.step(
                mel.to(self.model.device, self.model.input_dtype("audio_encoder")), self.encoder_state
            )

    def clone(self) -> AudioFrontEnd:
        """An independent copy."""
        return self._copy(lambda state: state.clone())

    def note(self) -> AudioFrontEnd:
        """A copy to go back to."""
        return self._copy(lambda state: getattr(state, "note", state.clone)())

    def _copy(self, of: Callable[[Any], Any]) -> AudioFrontEnd:
        new = copy.copy(self)
        new.mel_state, new.encoder_state = of(self.mel_state), of(self.encoder_state)
        new.resampler_state = None if self.resampler_state is None else of(self.resampler_state)
        return new


@dataclass
class OpenClip:
    """A clip that is being prefilled."""

    front_end: AudioFrontEnd
    begun: bool = False

    def clone(self) -> OpenClip:
        """An independent copy."""
        return OpenClip(self.front_end.clone(), self.begun)

    def note(self) -> OpenClip:
        """A copy to go back to."""
        return OpenClip(self.front_end.note(), self.begun)

    def push(self, writing: Writing, samples: Tensor, rate_hz: int, begin: list[int], token: int) -> None:
        self._write(writing, self.front_end.push(samples, rate_hz), begin, token)

    def close(self, writing: Writing, begin: list[int], end: list[int], token: int) -> None:
        self._write(writing, self.front_end.finish(), begin, token)
        if self.begun:
            writing.write_text(end)

    def _write(self, writing: Writing, embeds: Tensor, begin: list[int], token: int) -> None:
        if not len(embeds):
            return
        if not self.begun:
            writing.write_text(begin)
            self.begun = True
        offsets = torch.arange(len(embeds), dtype=torch.float32).expand(3, -1)
        writing.write_at([token] * len(embeds), offsets, embeds)
        writing.move_on(len(embeds))


def write_marks(writing: Writing, marks: list[int], rule: PositionRule) -> None:
    """The tokens before or after a video; two of them share a position where the rule says so."""
    if rule.joint_marks and len(marks) > 1:
        writing.write_text(marks[:1])
        writing.move_on(-1)  # back to where the first one stands
        marks = marks[1:]
    writing.write_text(marks)


class GridStep(NamedTuple):
    """A step of a video: its time from the start; embeds [n, D] and taps [n_taps, n, D], n = height * width."""

    time_s: float
    embeds: Tensor
    taps: Tensor | None
    height: int
    width: int


@dataclass
class OpenVideo:
    """A video that is being prefilled, with its sound if it has a front end for it.

    order: decides what comes next; frames [3, H, W] wait for the temporal patch to be complete, steps and sounds
    (embeddings, one token each) for what may precede them; size: of all frames [H, W]; last_s: time of the newest one;
    tail: the largest offset of the last piece, after which the next segment begins.
    """

    first_s: float
    front_end: AudioFrontEnd | None
    order: Interleave
    frames: list[tuple[float, Tensor]] = field(default_factory=list)
    steps: deque[GridStep] = field(default_factory=deque)
    sounds: deque[Tensor] = field(default_factory=deque)
    size: tuple[int, int] | None = None
    last_s: float = -math.inf
    tail: float = -1.0

    @classmethod
    def open(cls, first_s: float, front_end: AudioFrontEnd | None, rule: PositionRule) -> OpenVideo:
        """A video whose first frame was shown at `first_s`. Without sound it is one piece, not cut into chunks."""
        if front_end is None:
            return cls(first_s, None, Interleave(replace(rule, chunk_s=None), sound_over=True))
        return cls(first_s, front_end, Interleave(rule.at(front_end.rate)))

    def clone(self) -> OpenVideo:
        """An independent copy."""
        return self._copy(lambda front_end: front_end.clone())

    def note(self) -> OpenVideo:
        """A copy to go back to."""
        return self._copy(lambda front_end: front_end.note())

    def _copy(self, of: Callable[[AudioFrontEnd], AudioFrontEnd]) -> OpenVideo:
        front_end = None if self.front_end is None else of(self.front_end)
        new = replace(self, front_end=front_end, order=self.order.clone())
        new.frames, new.steps, new.sounds = list(self.frames), deque(self.steps), deque(self.sounds)
        return new

    def begin(self, writing: Writing, tokens: Any) -> None:
        """Write the marks before the video."""
        marks = [tokens.vision_start, *([tokens.audio_start] if self.front_end else [])]
        write_marks(writing, marks, self.order.rule)

    def push(self, writing: Writing, samples: Tensor, rate_hz: int, tokens: Any) -> None:
        """The next samples of the sound."""
        assert self.front_end is not None
        self.add_sound(self.front_end.push(samples, rate_hz))
        self.write(writing, tokens)

    def close(self, writing: Writing, tokens: Any, marks: list[int]) -> None:
        """Prefill what is left, and the marks behind it: end of sound (if there is any) and end of vision."""
        if self.front_end is not None:
            self.add_sound(self.front_end.finish())
        self.order.close()
        self._write(writing, tokens)
        writing.move_on(self.tail + 1)
        write_marks(writing, marks if self.front_end else marks[1:], self.order.rule)

    def add_frame(self, time_s: float, picture: Tensor) -> None:
        """A frame [3, H, W], to wait for its partner. Raises ValueError if it cannot follow the frames so far."""
        if not time_s > self.last_s:
            raise ValueError(f"frame times must grow: {time_s} s comes after {self.last_s} s")
        size = picture.shape[1], picture.shape[2]
        if self.size not in (None, size):
            raise ValueError(
                "all frames of a video must have one size; respond or push something else to end the video"
            )
        self.frames.append((time_s, picture))
        self.size, self.last_s = size, time_s

    def encode_frames(self, vision: VisionProcessor, encode: EncodePicture) -> None:
        """Turn the frames that wait into one grid step (an odd last frame stands for two)."""
        times, frames = zip(*self.frames)
        pixels, grid = vision.grid_step(list(frames))
        embeds, taps = encode(pixels, grid)
        height, width = (side // vision.merge_size for side in grid[1:])
        self.add_step(GridStep(times[0] - self.first_s, embeds, taps, height, width))
        self.frames.clear()

    def add_step(self, step: GridStep) -> None:
        """The next step, encoded."""
        self.steps.append(step)
        self.order.offer_steps((step.time_s,), len(step.embeds))

    def add_steps(self, film: VideoPixels, embeds: Tensor, taps: Tensor | None, merge: int) -> None:
        """All steps of a video: embeds [t * h * w, D] and taps [n_taps, t * h * w, D]."""
        steps, height, width = film.grid[0], film.grid[1] // merge, film.grid[2] // merge
        own_taps = [None] * steps if taps is None else taps.chunk(steps, dim=1)
        for time_s, step, tap in zip(film.grid_times_s, embeds.chunk(steps), own_taps):
            self.add_step(GridStep(time_s - self.first_s, step, tap, height, width))

    def add_sound(self, embeds: Tensor) -> None:
        """The next tokens of the sound, encoded: embeds [n, D]."""
        self.sounds.extend(embeds)
        self.order.offer_sound(len(embeds))

    def write(self, writing: Writing, tokens: Any) -> None:
        """Prefill all that nothing still to come can precede."""
        next_s = self.frames[0][0] if self.frames else self.last_s  # a frame that waits, or one after the newest
        self.order.expect_steps(next_s - self.first_s)
        self._write(writing, tokens)

    def _write(self, writing: Writing, tokens: Any) -> None:
        while (run := self.order.next_run()) is not None:
            if run.video:
                offsets = self._write_video(writing, tokens.video, run)
            else:
                offsets = self._write_sound(writing, tokens.audio, run)
            self.order.take(run)
            highest = float(offsets.max())
            self.tail = max(self.tail, highest) if run.joins else highest

    def _write_video(self, writing: Writing, token: int, run: Run) -> Tensor:
        """Prefill tokens of the first step that waits -> their offsets [3, n]."""
        step, part = self.steps[0], slice(run.first, run.first + run.tokens)
        whole, _ = segment_positions(Video((step.time_s,), step.height, step.width), 0.0, self.order.rule)
        offsets, taps = whole[:, part], None if step.taps is None else step.taps[:, part]
        writing.write_at([token] * run.tokens, offsets, step.embeds[part], taps)
        if part.stop == len(step.embeds):
            self.steps.popleft()
        return offsets

    def _write_sound(self, writing: Writing, token: int, run: Run) -> Tensor:
        """Prefill the next tokens of the sound -> their offsets [3, n]."""
        offsets = torch.arange(run.first, run.first + run.tokens, dtype=torch.float32).expand(3, -1)
        writing.write_at([token] * run.tokens, offsets, torch.stack(list(islice(self.sounds, run.tokens))))
        for _ in range(run.tokens):
            self.sounds.popleft()
        return offsets
