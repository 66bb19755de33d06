"""The chunks in which speech codes become sound while they arrive, and what decoding remembers between them.

A chunk of codes is drawn by the whole ODE over a window: the chunk, some codes before it and some after it. Of the
window's mel only the chunk's part is kept. The windows depend on the number of codes alone, not on how they arrived.

Why not exact: one evaluation of the released DiT sees two blocks back and one ahead, but each of the 36 evaluations
reads the last one's result, so that in the end every frame depends on every other. How much is lost by the window is
measured by `omni.code2wav.schedule_report`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from omni.code2wav.bigvgan import BigVGANState, frame_reach
from omni.code2wav.contract import CodecState
from omni.code2wav.ode_sampler import ODEConfig
from omni.config.token2wav import Token2WavConfig
from omni.layers.state import State


class Window(NamedTuple):
    """Codes first .. last - 1 are kept of the window start .. stop - 1."""

    start: int
    first: int
    last: int
    stop: int


@dataclass(frozen=True)
class ChunkSchedule:
    """How codes are cut; all but `vocoder_lookahead_frames` in codes, whole attention blocks (released: 12 codes).

    The default is two blocks with two before and one after them: as much as one evaluation of the released DiT sees.
    Smaller chunks cost more, in windows that overlap, and give sound in smaller pieces; the first sound comes no sooner
    while the vocoder waits for all the frames that it sees (released: 34, more than a block).
    vocoder_lookahead_frames: mel frames that a sample waits for; None is all that it depends on (exact).
    """

    chunk_codes: int = 24
    left_codes: int = 24
    lookahead_codes: int = 12
    vocoder_lookahead_frames: int | None = None

    @classmethod
    def usual(cls, config: Token2WavConfig) -> ChunkSchedule:
        """The default in the blocks of a model (released: the default itself)."""
        block = config.dit_config.block_codes
        return cls(2 * block, 2 * block, block)

    def check(self, config: Token2WavConfig) -> None:
        """Raise ValueError where the schedule does not fit the model's blocks."""
        block = config.dit_config.block_codes
        for name in ("chunk_codes", "left_codes", "lookahead_codes"):
            value = getattr(self, name)
            if value < (name == "chunk_codes") or value % block:
                least = block if name == "chunk_codes" else 0
                raise ValueError(
                    f"ChunkSchedule.{name} {value} must be a multiple of the attention block of {block} codes, "
                    f"at least {least}"
                )
        frames = self.vocoder_lookahead_frames
        if frames is not None and frames < 0:
            raise ValueError(f"ChunkSchedule.vocoder_lookahead_frames {frames} must be 0 or more, or None (exact)")

    def next_window(self, done: int, received: int, *, ended: bool) -> Window | None:
        """The window after `done` codes are decoded and `received` have come; None while it must wait."""
        last = done + self.chunk_codes
        stop = last + self.lookahead_codes
        if stop > received:
            if not ended or done >= received:
                return None
            last, stop = min(last, received), received
        return Window(max(0, done - self.left_codes), done, last, stop)

    def windows(self, codes: int) -> Iterator[Window]:
        """All windows of a signal of so many codes."""
        done = 0
        while (window := self.next_window(done, codes, ended=True)) is not None:
            yield window
            done = window.last


@dataclass
class VoiceEmbedding(State):
    """A voice as the DiT hears it, computed once: speaker [B, enc_emb_dim], reference [B, enc_dim], null [B, enc_dim].

    `null` is the encoding of silence's zeros, which stands for no voice in guidance.
    """

    speaker: Tensor
    reference: Tensor
    null: Tensor


@dataclass
class Token2WavState(CodecState):
    """What decoding remembers of the codes so far. Make a fresh one for each turn; all rows are at the same code.

    codes int64 [B, n] that windows still to come need, from code `first` on; `done` codes are mel already.
    """

    voice: VoiceEmbedding
    codes: Tensor
    vocoder: BigVGANState
    seeds: list[int]
    schedule: ChunkSchedule
    ode: ODEConfig
    first: int = 0
    done: int = 0
    ended: bool = False

    @property
    def received(self) -> int:
        """Codes that have come."""
        return self.first + self.codes.shape[1]


class FirstAudio(NamedTuple):
    """What must have arrived before the first sound, and how much sound that is. Computing time comes on top."""

    codes: int
    wait_ms: float
    audio_ms: float


def first_audio(config: Token2WavConfig, schedule: ChunkSchedule, sample_rate: int = 24000) -> FirstAudio:
    """The algorithmic delay of a schedule: codes (and their duration) before the first samples come out."""
    schedule.check(config)
    frames = schedule.vocoder_lookahead_frames
    lookahead = frame_reach(config.bigvgan_config)[1] if frames is None else frames
    repeats = config.dit_config.repeats
    chunks = 1
    while (ready := chunks * schedule.chunk_codes * repeats - lookahead) <= 0:
        chunks += 1
    codes = chunks * schedule.chunk_codes + schedule.lookahead_codes
    return FirstAudio(
        codes,
        codes * config.hop_length * 1000 / sample_rate,
        ready * config.bigvgan_config.hop_length * 1000 / sample_rate,
    )
