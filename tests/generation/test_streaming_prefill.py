"""Thinker and Talker read a prompt in any pieces as they read it whole; the Talker follows piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from build import fixed, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import OmniSession, StreamingConfig
from omni.layers.init import initialise
from omni.rope.positions import Audio, AudioVideo, Image, Text, Video, prompt_positions
from omni.talker.talker import Talker
from omni.thinker.thinker import Thinker

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config()
SEGMENTS = [
    Text(3),
    Image(2, 3),
    Text(2),
    Video((0.0, 0.5, 1.25), 2, 1),
    AudioVideo(Video((0.0, 0.7), 3, 1), Audio(11)),
    Text(4),
    Audio(9),
    Text(3),
]
TOKENS = sum(s.length for s in SEGMENTS)
POSITIONS = prompt_positions(SEGMENTS, 13)[0]
PIECES = st.lists(st.integers(1, TOKENS - 1), max_size=6, unique=True).map(sorted)


def ready(part: torch.nn.Module) -> Any:
    with fixed():
        initialise(part, lambda _: 0.2)
    return part.eval()


THINKER: Thinker = ready(Thinker(CONFIG.thinker_config, accept_layer=3))
TALKER: Talker = ready(Talker(CONFIG.talker_config))


@settings(max_examples=25, deadline=None)
@given(PIECES, st.integers(0, 3))
@torch.no_grad()
def test_thinker(cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    embeds, taps = torch.randn(1, TOKENS, 32), torch.randn(2, 1, TOKENS, 32)
    whole = THINKER(embeds, POSITIONS[:, None], taps=taps)
    state, logits, hidden = THINKER.init_state(1, 4), [], []
    for a, b in zip([0, *cuts], [*cuts, TOKENS]):
        out = THINKER(embeds[:, a:b], POSITIONS[:, None, a:b], state, taps=taps[:, :, a:b])
        logits.append(out.logits)
        hidden.append(out.hidden)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(hidden, 1), whole.hidden, atol=1e-5, rtol=1e-5)
    once = THINKER.init_state(1, TOKENS)
    THINKER(embeds, POSITIONS[:, None], once, taps=taps)
    for name in ("keys", "values"):
        a, b = (getattr(s.cache, name)[..., :TOKENS, :] for s in (state, once))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(PIECES, st.integers(0, 3))
@torch.no_grad()
def test_talker(cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    embeds = torch.randn(1, TOKENS, 32)
    whole = TALKER(embeds, POSITIONS[:, None])
    state, logits = TALKER.init_state(1, 4), []
    for a, b in zip([0, *cuts], [*cuts, TOKENS]):
        logits.append(TALKER(embeds[:, a:b], POSITIONS[:, None, a:b], state).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-5, rtol=1e-5)


def test_the_talker_reads_a_piece_before_the_thinker_reads_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Talker prefill of piece k begins before Thinker prefill of piece k + 1 ends; the result is unchanged."""
    model = tiny_model(widened=1)
    trace: list[str] = []
    replies = []
    for pieces in (7, 10000):
        session = OmniSession(model, streaming=StreamingConfig(prefill_tokens=pieces))
        rows = session._reader.rows
        for name in ("prefill_thinker", "prefill_talker"):
            original = getattr(rows, name)

            def traced(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                trace.append(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(rows, name, traced)
        trace.clear()
        session.push_text("a prompt that is read in several pieces of a few tokens")
        events = session.respond(max_new_tokens=4, max_frames=4, seed=1)
        if pieces == 7:
            user = trace[: 2 * (len(trace) // 2)]
            alternating = [user[i : i + 2] for i in range(0, 8, 2)]
            assert alternating == [["prefill_thinker", "prefill_talker"]] * 4
        replies.append([event for event in events][-1].usage)
    assert replies[0] == replies[1]
