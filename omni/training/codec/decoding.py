"""Codes' embeddings to sound while Code2Wav learns.

By convolutions it is the sound that Code2Wav makes. A source and a filter are told the recording's own pitch and
voicing, so that the harmonics of both sounds lie at the same places and spectra can be compared; the network's pitch
and voicing are compared with them by losses of their own.
Shapes: B rows, F frames, D width, n and m samples, M periods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.source_filter import USUAL_HZ
from omni.training.codec.pitch import track_pitch
from omni.training.objectives.losses import Loss

PITCH = {"pitch": 2.0, "voicing": 0.3}
_SURE = 10.0  # a logit


class Decoded(NamedTuple):
    """wave [B, m], not yet limited to -1 .. 1; losses of the pitch, none for convolutions."""

    wave: Tensor
    losses: dict[str, Loss]


def decoded(code2wav: Code2Wav, embeds: Tensor, recorded: Tensor) -> Decoded:
    """Mean code embeddings [B, F, D], of recordings [B, n <= hop_length * F], to samples.

    In the weights' own type under autocast too: the error of a loud sample that is rounded to bf16 is louder than the
    quiet bands of its spectrum, and a decoder that is trained so from nothing only gets worse. pitch: octaves that the
    voiced moments are wrong by; voicing: binary cross-entropy; both are means over a row.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        embeds = embeds.to(code2wav.code_embedding.weight.dtype)
        source = code2wav.sounding
        if source is None:
            return Decoded(code2wav.decode_embeddings(embeds), {})
        said = source.controls(code2wav.pre_transformer(embeds).transpose(1, 2))
        whole = F.pad(recorded, (0, embeds.shape[1] * code2wav.hop_length - recorded.shape[1]))
        hz, voiced = track_pitch(whole, code2wav.sample_rate, source.config.period)
        octaves, sure = (hz / USUAL_HZ).log2(), voiced.to(hz)
        wrong = ((said.pitch - octaves).abs() * sure).sum(1) / sure.sum(1).clamp(min=1)
        unsure = F.binary_cross_entropy_with_logits(said.voiced, sure, reduction="none").mean(1)
        count = torch.tensor(float(len(wrong)), device=wrong.device)
        told = said._replace(pitch=torch.where(voiced, octaves, said.pitch), voiced=_SURE * (2 * sure - 1))
        return Decoded(source.sound(told), {"pitch": Loss(wrong.sum(), count), "voicing": Loss(unsure.sum(), count)})


def left_alone(code2wav: Code2Wav) -> tuple[nn.Module, ...]:
    """What does not learn of a Code2Wav with both ways to sound: the convolutions, or while they do all else, which the
    source and filter has learnt."""
    if code2wav.source_filter is None:
        return ()
    if code2wav.by_convolutions:
        return code2wav.source_filter, code2wav.pre_transformer, code2wav.code_embedding
    return code2wav.upsample, code2wav.decoder
