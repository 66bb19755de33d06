"""One simulated hour in one session, and an hour of speech from one codec state (`make test-slow`)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from build import TOY_DATA, seeded, tiny_config
from torch import Tensor

from omni import OmniConfig, OmniModel, OmniProcessor, OmniSession, StreamingConfig
from omni.layers.state import State

ROOT = Path(__file__).parents[2]


def bytes_of(value: Any) -> int:
    """Bytes of all tensors that a state holds."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, State):
        return sum(bytes_of(getattr(value, f.name)) for f in fields(value))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def tiny(positions: int) -> OmniConfig:
    values = tiny_config().to_dict()
    for part in ("thinker_config", "talker_config"):
        values[part]["text_config"]["max_position_embeddings"] = positions
    return OmniConfig.from_dict(values)


def listen(session: OmniSession, seconds: int) -> None:
    generator = seeded(0)
    for _ in range(seconds // 10):
        session.push_audio(0.1 * torch.randn(160000, generator=generator))


def sizes(session: OmniSession) -> tuple[int, int]:
    """(bytes of the caches per token they hold, bytes of everything else)."""
    rows = session._reader.rows
    caches = [rows.text.decoder.cache, rows.speech.decoder.cache]
    used = sum(c.keys[:, :, :, : c.longest].numel() * 2 * c.keys.element_size() for c in caches)
    front_end = session._conversation.open.clip.front_end
    other = bytes_of(rows.text) + bytes_of(rows.speech) - sum(map(bytes_of, caches))
    return used, other + sum(map(bytes_of, (front_end.mel_state, front_end.encoder_state)))


@pytest.mark.parametrize("minutes", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_memory_is_flat_but_for_the_caches(minutes: int) -> None:
    model = OmniModel(tiny(1 << 17))
    model.processor = OmniProcessor.from_pretrained(TOY_DATA)
    session = OmniSession(model, streaming=StreamingConfig(audio_window_s=1.0))
    listen(session, 60)
    tokens, (used, other) = len(session.ids), sizes(session)
    listen(session, (minutes - 1) * 60)
    grown, (used_later, other_later) = len(session.ids) - tokens, sizes(session)
    c = model.config
    per_token = sum(
        t.num_hidden_layers * t.num_key_value_heads * t.head_size * 2 * 4
        for t in (c.thinker_config.text_config, c.talker_config.text_config)
    )
    assert grown == (minutes - 1) * 60 * 13
    assert used_later - used == grown * per_token
    assert other_later <= other * 1.1
    capacity = bytes_of(session._reader.rows.text.decoder.cache)
    assert capacity <= 1.6 * used_later  # it grows by half at a time
    assert [e for e in session.respond(max_new_tokens=2, max_frames=2, seed=0)]


@pytest.mark.parametrize("minutes", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_the_end_of_long_speech_needs_only_the_window(minutes: int) -> None:
    """The last part of a long stream equals a decode from a context of one window a layer (and the convolutions')."""
    config = tiny(1 << 13)
    codec = OmniModel(config, parts=("code2wav",)).code2wav
    with torch.no_grad():
        for p in codec.parameters():
            if p.dim() > 1:
                p.mul_(0.6 / (0.02 * p[0].numel() ** 0.5))
    c = config.code2wav_config
    frames, last = int(minutes * 60 * 12.5), int(min(minutes / 2, 5) * 60 * 12.5)
    codes = torch.randint(0, c.codebook_size, (1, c.num_quantizers, frames))
    state, pieces, sizes_seen = codec.init_state(1), [], set()
    for piece in codes.split(50, dim=2):
        pieces.append(codec.step(piece, state))
        pieces = pieces[-(last // 50 + 1) :]
        sizes_seen.add(bytes_of(state))
    context = c.sliding_window * c.num_hidden_layers + 12
    whole = codec.forward(codes[:, :, -last - context :])
    samples = last * c.hop_length
    streamed = torch.cat(pieces, 1)[0, -samples:]
    torch.testing.assert_close(streamed, whole[0, -samples:], atol=1e-5, rtol=1e-5)
    assert streamed.abs().max() > 1e-3 and len(sizes_seen) <= 2  # flat memory once the window is full
