"""Codes' embeddings to sound while Code2Wav learns.

By convolutions it is the sound that Code2Wav makes. A source and a filter are told pitch, voicing and envelope of the
recording, each by a loss of its own. That is enough to learn to speak: spectra, which know nothing of what belongs to
the voice and what to breath, and discriminators may follow. For these what is heard has the recording's own pitch, so
that the harmonics of both sounds lie at the same places.
Shapes: B rows, F frames, D width, n and m samples, M moments, C bands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.source_filter import USUAL_HZ, Controls, SourceFilter
from omni.training.codec.envelope import spectral_envelope
from omni.training.codec.pitch import track_pitch
from omni.training.objectives.losses import Loss

TOLD = {"pitch": 2.0, "voicing": 0.3, "envelope": 1.0}
_SURE = 10.0  # a logit
_BREATH_HZ = (2500.0, 7500.0)  # in a voice hardly anything is noise up to here, and from here on most of it
_BREATH = (0.02, 0.8)  # its share of the magnitude there
_FAINT, _FULL = -10.0, -4.0  # levels that hardly count, and count in full


class Decoded(NamedTuple):
    """wave [B, m], not yet limited to -1 .. 1; losses of what a source and a filter are told, none for convolutions."""

    wave: Tensor
    losses: dict[str, Loss]


def decoded(
    code2wav: Code2Wav, embeds: Tensor, recorded: Tensor, told: Controls | None = None, *, heard: bool = True
) -> Decoded:
    """Mean code embeddings [B, F, D], of recordings [B, n <= hop_length * F], to samples.

    In the weights' own type under autocast too: the error of a loud sample that is rounded to bf16 is louder than the
    quiet bands of its spectrum, and a decoder that is trained so from nothing only gets worse. pitch: octaves that the
    voiced moments are wrong by; voicing: binary cross-entropy; envelope: absolute difference of logarithms, of voice
    and noise, less where it is faint. Each is a mean over a row. told: the recordings' `controls_of`, if known.
    heard: False leaves out the sound of a source and a filter, and the wave is silence.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        embeds = embeds.to(code2wav.code_embedding.weight.dtype)
        source = code2wav.sounding
        if source is None:
            return Decoded(code2wav.decode_embeddings(embeds), {})
        said = source.controls(code2wav.pre_transformer(embeds).transpose(1, 2))
        whole = F.pad(recorded, (0, embeds.shape[1] * code2wav.hop_length - recorded.shape[1]))
        told = controls_of(source, whole) if told is None else told
        sure = (told.voiced > 0).to(told.pitch)
        wrong = ((said.pitch - told.pitch).abs() * sure).sum(1) / sure.sum(1).clamp(min=1)
        unsure = F.binary_cross_entropy_with_logits(said.voiced, sure, reduction="none").mean(1)
        far = 0.5 * (_difference(said.tone, told.tone) + _difference(said.noise, told.noise))
        count = torch.tensor(float(len(wrong)), device=wrong.device)
        losses = {name: Loss(rows.sum(), count) for name, rows in zip(TOLD, (wrong, unsure, far))}
        if not heard:
            return Decoded(torch.zeros_like(whole), losses)
        pitch = torch.where(told.voiced > 0, told.pitch, said.pitch)
        return Decoded(source.sound(said._replace(pitch=pitch, voiced=told.voiced)), losses)


@torch.no_grad()
def controls_of(source: SourceFilter, wave: Tensor) -> Controls:
    """What a source and a filter would have to be told to sound like a recording [B, n], of whole periods."""
    period, sample_rate = source.config.period, source.sample_rate
    pitch = track_pitch(wave, sample_rate, period)
    bands, _ = source.tables(wave.device)
    envelope = spectral_envelope(wave, pitch, sample_rate, period, bands)
    hz = torch.linspace(0, sample_rate / 2, bands.shape[1], device=wave.device) @ (bands / bands.sum(1, True)).t()
    lower, upper = _BREATH_HZ
    breath = ((hz - lower) / (upper - lower)).clamp(*_BREATH)
    noise = torch.where(pitch.voiced[..., None], breath.log(), 0.0)
    sure = _SURE * (2 * pitch.voiced.to(envelope) - 1)
    tone = envelope + 0.5 * (1 - breath.square()).log()
    return Controls((pitch.hz / USUAL_HZ).log2(), sure, tone, envelope + noise)


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean difference of envelopes [B, M, C] over each row."""
    weights = ((theirs - _FAINT) / (_FULL - _FAINT)).clamp(0.1, 1.0)
    return ((ours - theirs).abs() * weights).mean((1, 2))


def left_alone(code2wav: Code2Wav) -> tuple[nn.Module, ...]:
    """What does not learn of a Code2Wav with both ways to sound: the convolutions, or while they do all else, which the
    source and filter has learnt."""
    if code2wav.source_filter is None:
        return ()
    if code2wav.by_convolutions:
        return code2wav.source_filter, code2wav.pre_transformer, code2wav.code_embedding
    return code2wav.upsample, code2wav.decoder
