"""The log-mel front end of the audio encoder: 16 kHz samples in, 128 values every 10 ms out.

Framing, power spectrum and mel filters look at one frame. Compression looks at a reference level: of the whole clip, as
the reference does, or of the clip so far, so that a stream can be compressed as it arrives.
Source: Whisper (Radford et al., 2022), section 2.2; the released `preprocessor_config.json`.
Shapes: n samples, F frames, M mel bins.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.encoders.checks import check_open, check_samples
from omni.layers.state import State

LEVELS = ("clip", "causal")  # reference levels, see LogMel
ENDS = ("mirror", "silence")  # what follows a clip, see LogMel
POWER_FLOOR = 1e-10  # silence, before the logarithm
DYNAMIC_RANGE = 8.0  # log10 units kept below the reference level: 80 dB
_FRAMES_AT_ONCE = 4096  # bounds the memory that a long clip needs

# Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 steps for each factor of 6.4.
_LINEAR_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: float) -> float:
    """A frequency in Hz on Slaney's mel scale."""
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def mel_to_hz(mels: Tensor) -> Tensor:
    """Points on Slaney's mel scale in Hz."""
    return torch.where(
        mels < _BREAK_MEL,
        mels * _LINEAR_HZ_PER_MEL,
        _BREAK_HZ * torch.exp((mels - _BREAK_MEL) * _LOG_STEP),
    )


def mel_filter_bank(num_mels: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters from 0 Hz to half the sample rate, each of area one over Hz: fp32 [M, n_fft / 2 + 1]."""
    bins_hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    corners_hz = mel_to_hz(torch.linspace(0, hz_to_mel(sample_rate / 2), num_mels + 2, dtype=torch.float64))
    left, peak, right = corners_hz[:-2, None], corners_hz[1:-1, None], corners_hz[2:, None]
    triangles = torch.minimum((bins_hz - left) / (peak - left), (right - bins_hz) / (right - peak)).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def frame_signal(samples: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Overlapping frames [F, n_fft] of samples [n]: frame i starts at sample i * hop_length. A view, no copy."""
    return samples.unfold(0, n_fft, hop_length)


def power_spectrum(frames: Tensor, window: Tensor) -> Tensor:
    """Squared magnitudes [F, n_fft / 2 + 1] of windowed frames [F, n_fft]."""
    return torch.fft.rfft(frames * window).abs().square()


def log_power(mel_power: Tensor) -> Tensor:
    """log10 of mel powers, with silence at -10."""
    return mel_power.clamp(min=POWER_FLOOR).log10()


def compress(log_mel: Tensor, level: Tensor) -> Tensor:
    """Cut what lies 80 dB below `level` (the loudest value, log10) and scale to about -1 .. 1."""
    return (torch.maximum(log_mel, level - DYNAMIC_RANGE) + 4.0) / 4.0


def running_level(log_mel: Tensor, chunk_frames: int) -> Tensor:
    """The loudest value of each frame's chunk and all before it: log_mel [M, F] -> [F]."""
    loudest = log_mel.amax(0)
    whole = F.pad(loudest, (0, -loudest.numel() % chunk_frames), value=-torch.inf).unflatten(0, (-1, chunk_frames))
    return whole.amax(1).cummax(0).values.repeat_interleave(chunk_frames)[: loudest.numel()]


@dataclass
class LogMelState(State):
    """What a clip's next frames still need. `received` samples came in, `emitted` frames went out.

    tail [t]: mirrored start, then samples, from the first one that the next frame needs (at most one window and hop);
    chunk [M, c]: frames before compression of the chunk that is not complete, c < chunk_frames;
    level []: the loudest value of all complete chunks.
    """

    tail: Tensor
    chunk: Tensor
    level: Tensor
    received: int = 0
    emitted: int = 0
    finished: bool = False


class LogMel:
    """Log-mel features of one clip at a time; equals the reference's feature extractor on that clip alone.

    Frames are centred and the clip is mirrored at its start. Its `end` is mirrored too, and n samples give
    n // hop_length frames ("mirror", Qwen3-Omni); or silence follows, as where clips are padded before they are
    analysed, and a last frame that begins within the clip counts ("silence", Qwen2.5-Omni). The reference level is
    the loudest value of the whole clip (`level="clip"`, the reference's), which no stream knows, or the loudest value
    up to the end of the frame's own chunk of `chunk_frames` frames (`level="causal"`), which a stream knows as soon as
    the chunk is complete. `step` gives exactly the latter, however the samples are cut. Both levels agree on a clip
    that lies within one chunk or is loudest in its first. (With silence behind it, the clip's level also knows the two
    frames that reach back into the clip from there; they are no part of the features.)
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        hop_length: int = 160,
        num_mels: int = 128,
        chunk_frames: int = 100,  # one second, one chunk of the released audio encoder
        end: str = "mirror",
    ) -> None:
        if end not in ENDS:
            raise ValueError(f"end {end!r} of a clip is not one of {', '.join(map(repr, ENDS))}")
        if chunk_frames < 1:
            raise ValueError(f"a chunk of {chunk_frames} frames is empty; chunk_frames must be at least 1")
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.num_mels = num_mels
        self.chunk_frames = chunk_frames
        self.end = end
        self.edge = n_fft // 2  # samples mirrored at either end
        self.window = torch.hann_window(n_fft)
        self.filters = mel_filter_bank(num_mels, n_fft, sample_rate)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def in_chunks(self, chunk_frames: int | None) -> LogMel:
        """The same front end with another chunk for its level (None: its own); they share their tables."""
        if chunk_frames is None or chunk_frames == self.chunk_frames:
            return self
        other = copy.copy(self)
        other.chunk_frames = chunk_frames
        return other

    def num_frames(self, samples: int) -> int:
        """Feature frames of a clip of that many samples."""
        return -(-samples // self.hop_length) if self.end == "silence" else samples // self.hop_length

    def __call__(self, samples: Tensor, level: str = "clip") -> Tensor:
        """Floating samples [n] in -1 .. 1 at `sample_rate` -> fp32 [num_mels, num_frames(n)], on the same device.

        Raises TypeError for integer samples, ValueError for a clip that is not one-dimensional, is shorter than one
        hop, or holds NaN, infinite or absurdly large values, and for a level other than "clip" and "causal".
        """
        if level not in LEVELS:
            raise ValueError(f"reference level {level!r} is not one of {', '.join(map(repr, LEVELS))}")
        samples = check_samples(samples)
        self._check_length(samples.numel())
        count = self.num_frames(samples.numel())
        frames = frame_signal(self._continue(self._mirror_start(samples)), self.n_fft, self.hop_length)
        log_mel = self.log_mel(frames if self.end == "silence" else frames[:count])
        loudest, log_mel = log_mel.max(), log_mel[:, :count]
        return compress(log_mel, loudest if level == "clip" else running_level(log_mel, self.chunk_frames))

    def log_mel(self, frames: Tensor) -> Tensor:
        """log10 mel powers [num_mels, F] of frames [F, n_fft], before any reference level."""
        if not len(frames):  # FFT libraries refuse an empty batch
            return self.filters.new_zeros(self.num_mels, 0, device=frames.device)
        window, filters = self._on(frames.device)
        parts = [
            log_power(filters @ power_spectrum(part, window).T.contiguous()) for part in frames.split(_FRAMES_AT_ONCE)
        ]
        return torch.cat(parts, dim=1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Window and filters on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = (self.window.to(device), self.filters.to(device))
        return self._copies[device]

    def init_state(self, device: torch.device | str | None = None) -> LogMelState:
        """The state before the first sample of a clip. Raises ValueError for a hop of half a window or more."""
        if self.hop_length >= self.edge:  # `finish` continues the end, which the last frames must therefore reach
            raise ValueError(
                f"a hop of {self.hop_length} samples cannot be streamed; it must be below {self.edge}, half the window"
            )
        return LogMelState(
            tail=torch.zeros(0, device=device),
            chunk=torch.zeros(self.num_mels, 0, device=device),
            level=torch.tensor(-torch.inf, device=device),
        )

    def step(self, samples: Tensor, state: LogMelState) -> Tensor:
        """The next samples [n], n >= 0 -> the frames [num_mels, m] of the chunks that they complete.

        The frames are those of `level="causal"`; `state` is updated in place. Raises TypeError and ValueError for
        samples that the whole clip must not hold either and for a finished clip; the state is then as it was.
        """
        check_open(state.finished)
        samples = check_samples(samples, state.received).to(state.tail)
        received = state.received + samples.numel()
        tail = torch.cat((state.tail, samples))
        if state.received <= self.edge < received:
            tail = self._mirror_start(tail)
        log_mel = tail.new_zeros(self.num_mels, 0)
        if received > self.edge and tail.numel() >= self.n_fft:
            log_mel = self.log_mel(frame_signal(tail, self.n_fft, self.hop_length))
        state.tail = tail[log_mel.shape[1] * self.hop_length :].clone()
        state.received = received
        return self._advance(state, log_mel, last=False)

    def finish(self, state: LogMelState) -> Tensor:
        """The last frames [num_mels, m] of the clip, continued as `end` says. The state takes no further samples.

        Raises ValueError for a clip shorter than one hop, as for a whole clip; the state is then as it was.
        """
        check_open(state.finished)
        self._check_length(state.received)
        started = state.received > self.edge
        tail = self._continue(state.tail if started else self._mirror_start(state.tail))
        left = self.num_frames(state.received) - state.emitted - state.chunk.shape[1]
        frames = frame_signal(tail, self.n_fft, self.hop_length)[:left]
        log_mel = self.log_mel(frames)
        state.tail, state.finished = tail[:0].clone(), True
        return self._advance(state, log_mel, last=True)

    def _advance(self, state: LogMelState, log_mel: Tensor, *, last: bool) -> Tensor:
        """Take the new frames into the open chunk; compress and return the chunks that are complete (or last)."""
        log_mel = torch.cat((state.chunk, log_mel), dim=1)
        ready = log_mel.shape[1] if last else log_mel.shape[1] // self.chunk_frames * self.chunk_frames
        done, state.chunk = log_mel[:, :ready], log_mel[:, ready:].clone()
        if ready:
            levels = torch.maximum(running_level(done, self.chunk_frames), state.level)
            done, state.level = compress(done, levels), levels[-1].clone()
        state.emitted += ready
        return done

    def _mirror_start(self, samples: Tensor) -> Tensor:
        """The first samples of a clip with their reflection in front."""
        # Mirroring needs more samples than it adds. A shorter clip is continued with silence, as beside a longer one.
        samples = F.pad(samples, (0, max(0, self.edge + 1 - samples.numel())))
        return F.pad(samples[None], (self.edge, 0), mode="reflect")[0]

    def _continue(self, samples: Tensor) -> Tensor:
        """The last samples of a clip followed by their reflection, or by silence for all frames that touch them."""
        if self.end == "silence":
            return F.pad(samples, (0, self.n_fft))
        return F.pad(samples[None], (0, self.edge), mode="reflect")[0]

    def _check_length(self, samples: int) -> None:
        if samples < self.hop_length:
            raise ValueError(
                f"audio of {samples} samples is too short; at {self.sample_rate} Hz one feature frame needs "
                f"{self.hop_length} samples ({1000 * self.hop_length / self.sample_rate:g} ms)"
            )
