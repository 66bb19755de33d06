"""The knobs of latency, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.code2wav.ode_sampler import ODEConfig


@dataclass(frozen=True)
class StreamingConfig:
    """How a turn streams. None of these changes what is said, except the audio window and the audio chunk.

    chunk_frames: frames a chunk of sound, one after the other, the last value for all that follow (a frame is 80 ms in
    the release): small first chunks answer early, larger ones later cost less. text_ahead: reply tokens that the
    Thinker may be ahead of the frames spoken. prefill_tokens: prompt tokens read in one piece at most, so that running
    streams of an engine do not wait long. audio_window_s: attention window of the audio encoder in seconds of a
    session's input (None: the checkpoint's, 8 s in the release); a shorter one lets reading follow speech closely.
    audio_chunk_s: seconds of sound that the encoder convolves together (None: the checkpoint's, 1 s of 13 tokens in the
    release); there also a multiple of 0.08 s below that, of a token each: 0.48 is heard as 6 tokens. The window is a
    multiple of it. It is a session's; inputs of `stream` say their own (`audio_chunk_s` of the processor).
    silence_s, loop_frames: speech is ended as runaway after that much silence, or when codebook 0 has repeated itself
    with one period for that many frames (the default is 20 s in the release, 5 s in Qwen2.5-Omni's). codec_schedule,
    codec_ode: of a codec decoder that draws sound by windows (`Token2Wav`): how codes are cut (None: its own way;
    "whole": all at once when the last has come, as the reference does) and how its flow is integrated (None: as
    released).
    """

    chunk_frames: tuple[int, ...] = (1, 1, 2, 4, 8)
    text_ahead: int = 1
    prefill_tokens: int = 512
    audio_window_s: float | None = None
    audio_chunk_s: float | None = None
    silence_s: float | None = 10.0
    loop_frames: int | None = 250
    codec_schedule: ChunkSchedule | str | None = None
    codec_ode: ODEConfig | None = None

    def __post_init__(self) -> None:
        frames = self.chunk_frames if isinstance(self.chunk_frames, (tuple, list)) else ()
        if not frames or any(type(n) is not int or n < 1 for n in frames):
            raise ValueError(f"chunk_frames must be whole numbers of at least 1, got {self.chunk_frames!r}")
        for name in ("text_ahead", "prefill_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("audio_window_s", "audio_chunk_s", "silence_s", "loop_frames"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise ValueError(f"{name} must be positive or None, got {value!r}")
        kinds: dict[str, Any] = {"codec_schedule": ChunkSchedule, "codec_ode": ODEConfig}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):  # of a saved session
                object.__setattr__(self, name, kind(**value))
            elif value is not None and not isinstance(value, kind) and (name, value) != ("codec_schedule", "whole"):
                raise TypeError(f"{name} must be of {kind.__name__} or None, got {value!r}")

    def chunk(self, index: int) -> int:
        """Frames of chunk number `index`."""
        return self.chunk_frames[min(index, len(self.chunk_frames) - 1)]


UNWATCHED = StreamingConfig(silence_s=None, loop_frames=None)  # of `stream`, which says what `generate` says
OFFLINE = StreamingConfig(chunk_frames=(64,), silence_s=None, loop_frames=None, codec_schedule="whole")
