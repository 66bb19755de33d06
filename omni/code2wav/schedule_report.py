"""What a chunk schedule costs: how long the first sound waits, and how far the result is from the whole.

The distance is a property of the weights: measure it on the checkpoint that will speak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.code2wav.chunk_schedule import ChunkSchedule, first_audio
from omni.code2wav.ode_sampler import ODEConfig
from omni.code2wav.token2wav import AnyVoice, Token2Wav
from omni.config.token2wav import Token2WavConfig

_DB_PER_NEPER = 20 / math.log(10)


def schedule_in_words(config: Token2WavConfig) -> str:
    """How sound comes while codes are drawn, by the usual schedule, as `omni info` prints it."""
    schedule = ChunkSchedule.usual(config)
    first = first_audio(config, schedule)
    return (
        f"streaming: windows of {schedule.chunk_codes} codes; the first {first.audio_ms:.0f} ms of sound need "
        f"{first.codes} codes, {first.wait_ms:.0f} ms of speech, and the time to compute them"
    )


@dataclass(frozen=True)
class ScheduleReport:
    """first_codes must arrive, wait_ms of speech, before the first piece of first_audio_ms sounds.

    mel_rms_db: root mean square difference of the mel to that of one window over all codes, in dB of amplitude.
    mel_relative: the same divided by the deviation of that mel from its mean. waveform_relative: rms of the samples'
    difference over their rms (phases follow the mel loosely: read it beside the mel's). work: DiT frames computed a
    frame kept.
    """

    first_codes: int
    wait_ms: float
    first_audio_ms: float
    mel_rms_db: float
    mel_relative: float
    waveform_relative: float
    work: float


@torch.no_grad()
def report_schedule(
    model: Token2Wav,
    codes: Tensor,
    voice: AnyVoice,
    schedule: ChunkSchedule | None = None,
    *,
    seed: int = 0,
    ode: ODEConfig | None = None,
) -> ScheduleReport:
    """Compare decoding codes int64 [B, 1, T] by a schedule with decoding them whole, from the same noise."""
    schedule = schedule or ChunkSchedule.usual(model.config)
    first = first_audio(model.config, schedule, model.sample_rate)
    if codes.shape[-1] == 0:
        raise ValueError("there are no codes to compare schedules on")
    embedded = model.embed_voice(voice, codes.shape[0])
    whole = model.sample_mel(codes[:, 0], embedded, seed=seed, ode=ode)
    chunked = model.sample_mel_chunked(codes, embedded, schedule, seed=seed, ode=ode)
    samples = model.vocode(whole)
    streamed = model.vocode_chunked(chunked, schedule)
    spread = (whole - whole.mean((1, 2), keepdim=True)).square().mean().sqrt()
    error = (chunked - whole).square().mean().sqrt()
    return ScheduleReport(
        first_codes=first.codes,
        wait_ms=first.wait_ms,
        first_audio_ms=first.audio_ms,
        mel_rms_db=_DB_PER_NEPER * error.item(),
        mel_relative=(error / spread).item(),
        waveform_relative=((streamed - samples).norm() / samples.norm()).item(),
        work=sum(w.stop - w.start for w in schedule.windows(codes.shape[2])) / codes.shape[2],
    )
