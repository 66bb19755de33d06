"""The flow-matching loss that trains Token2Wav's DiT, as a pure function of a batch and of what was drawn for it.

A straight path leads from noise x0 to a mel x1: x_t = (1 - t) x0 + t x1, whose velocity is x1 - x0 everywhere; the DiT
learns to tell it from x_t, t and the condition (Lipman et al., "Flow Matching for Generative Modeling", 2023, with
sigma_min = 0; Liu et al., "Flow Straight and Fast", 2023). For classifier-free guidance some rows are trained without
any condition (Ho and Salimans, 2022; rate as in F5-TTS, Chen et al., 2024). The reference voice is another recording of
the speaker, hence no frame is left out of the loss.
Shapes: B rows, T codes, N = repeats * T mel frames, F frames of the reference mel, M mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.code2wav.dit import DiT

DROP_RATE = 0.2  # of rows without a condition; F5-TTS


@dataclass(frozen=True)
class FlowBatch:
    """mel [B, N, M] of the codes int64 [B, T]; speaker [B, E] and reference_mel [B, F, M] of their voice.

    lengths int64 [B] counts each row's codes, the rest is padding (None: none).
    """

    mel: Tensor
    codes: Tensor
    speaker: Tensor
    reference_mel: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True)
class FlowDraw:
    """What chance decides: time [B] in 0 .. 1, noise [B, N, M], dropped bool [B] (rows without a condition)."""

    time: Tensor
    noise: Tensor
    dropped: Tensor


def draw_flow(mel: Tensor, generator: torch.Generator | None = None, drop_rate: float = DROP_RATE) -> FlowDraw:
    """Uniform times, normal noise and dropped rows for a mel [B, N, M]; the generator is on the mel's device."""
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate {drop_rate} must lie in 0 .. 1")

    def uniform() -> Tensor:
        return torch.rand(mel.shape[0], generator=generator, device=mel.device)

    noise = torch.randn(mel.shape, generator=generator, device=mel.device, dtype=mel.dtype)
    return FlowDraw(uniform().to(mel.dtype), noise, uniform() < drop_rate)


def flow_matching_loss(dit: DiT, batch: FlowBatch, draw: FlowDraw) -> Tensor:
    """Mean squared error of the velocity over all real frames, a scalar. Raises ValueError for wrong shapes."""
    repeats = dit.config.repeats
    if batch.mel.shape[:2] != (batch.codes.shape[0], batch.codes.shape[1] * repeats):
        raise ValueError(
            f"{batch.codes.shape[1]} codes need {batch.codes.shape[1] * repeats} mel frames in each of "
            f"{batch.codes.shape[0]} rows, got a mel of shape {list(batch.mel.shape)}"
        )
    dropped = draw.dropped[:, None]
    reference = dit.encode_reference(batch.reference_mel.masked_fill(dropped[..., None], 0))
    codes, speaker = batch.codes.masked_fill(dropped, 0), batch.speaker.masked_fill(dropped, 0)
    t = draw.time[:, None, None]
    x = (1 - t) * draw.noise + t * batch.mel
    lengths = None if batch.lengths is None else batch.lengths * repeats
    velocity = dit(x, draw.time, dit.condition(codes, speaker, reference), lengths)
    error = (velocity - (batch.mel - draw.noise)).square().mean(2)
    if lengths is None:
        return error.mean()
    real = torch.arange(error.shape[1], device=error.device) < lengths[:, None]
    return (error * real).sum() / real.sum().clamp(min=1)
