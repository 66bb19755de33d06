"""One step of each part at any batch and context, as functions that can be timed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omni.generation.arguments import default_residual
from omni.generation.sampling import RESIDUAL_STREAM, RowSampling
from omni.layers.decoder_state import DecoderState
from omni.model import OmniModel

Step = Callable[[], Any]
_PREFILL = 512  # positions read at once


def fill(decoder: Any, state: DecoderState, batch: int, positions: int, steps: int = 0) -> None:
    """Let a Thinker or a Talker read random vectors up to `positions` a row; room for `steps` more is reserved."""
    table = decoder.embed_tokens if hasattr(decoder, "embed_tokens") else decoder.codec_embedding
    weight = table.weight  # as wide as what the decoder reads
    generator = torch.Generator().manual_seed(0)
    state.cache.reserve(max(0, positions - state.cache.longest) + steps)
    while (start := state.cache.longest) < positions:
        count = min(_PREFILL, positions - start)
        places = torch.arange(start, start + count, device=weight.device, dtype=torch.float32).expand(3, batch, -1)
        embeds = torch.randn(batch, count, weight.shape[1], generator=generator).to(weight)
        decoder(embeds, places, state)
    state.next_position = torch.full((batch,), float(positions), device=weight.device)


def thinker_step(model: OmniModel, batch: int = 1, context: int = 1, room: int = 1024) -> Step:
    """One text token a row after `context` positions, which grow by one a call."""
    thinker: Any = model.thinker
    state = thinker.init_state(batch, context + room)
    fill(thinker, state, batch, context)
    ids = torch.arange(batch, device=model.device) + 30
    return lambda: thinker.step(ids, state)


def talker_step(model: OmniModel, batch: int = 1, context: int = 1, room: int = 1024) -> Step:
    """One code 0 a row after `context` positions, without drawing it."""
    talker: Any = model.talker
    state = talker.init_state(batch, context + room)
    fill(talker, state, batch, context)
    embeds = talker.codec_embedding(torch.arange(batch, device=model.device))
    return lambda: talker.step(embeds, state)


def residual_codes(model: OmniModel, batch: int = 1, hidden: Tensor | None = None, first: Tensor | None = None) -> Step:
    """The residual codes of one frame a row, sampled as released -> int64 [B, K - 1].

    hidden, first [B, D]: the Talker's hidden state and its embedding of code 0 (None: random).
    """
    mtp, steps = model.require("talker").mtp, model.steps
    weight = mtp.norm.weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, batch, weight.shape[0], generator=generator).to(weight)
    hidden, first = drawn[0] if hidden is None else hidden, drawn[1] if first is None else first
    sampling = RowSampling.of(
        [default_residual(model)] * batch, torch.arange(batch, device=weight.device), RESIDUAL_STREAM
    )
    places = torch.arange(len(mtp.lm_head) * batch, device=weight.device).view(-1, batch).unbind(0)
    cache = mtp.init_cache(batch)

    def draw(logits: Tensor, i: int) -> Tensor:
        return steps.draw(sampling, logits, places[i])

    return lambda: mtp.generate(hidden, first, draw, cache, step=steps.residual)[0]


def codec_frame(model: OmniModel, batch: int = 1) -> Step:
    """One frame a row to samples, once decoding is steady."""
    codec: Any = model.code2wav
    generator = torch.Generator().manual_seed(0)
    shape = (batch, codec.config.num_quantizers, 1)
    codes = torch.randint(codec.config.codebook_size, shape, generator=generator).to(model.device)
    state = codec.init_state(batch)
    codec.step(codes, state)
    return lambda: codec.step(codes, state)


def each_layer(decoder: Any, piece: str = "") -> Step:
    """All decoder layers of the Thinker or the Talker on one token, or one `piece` of each: "self_attn" or "mlp"."""
    weight = decoder.norm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, weight.shape[0], generator=generator).to(weight)
    tables = decoder.rope(torch.zeros(3, 1, 1, device=weight.device))

    def step() -> None:
        for layer in decoder.layers:
            if piece == "mlp":
                layer.mlp(x)
            elif piece:
                getattr(layer, piece)(x, tables)
            else:
                layer(x, tables)

    return step


def audio_encoding(model: OmniModel, seconds: float) -> Step:
    """A clip of that length through the audio encoder (100 mel frames a second)."""
    encoder: Any = model.audio_encoder
    frames, mels = max(1, round(100 * seconds)), encoder.config.num_mel_bins
    features = torch.randn(1, mels, frames, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    return lambda: encoder(features, [frames])
