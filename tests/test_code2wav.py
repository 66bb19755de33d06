"""Code2Wav: sample counts, causality, streaming equals offline, windowed attention, initial values, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.conv import (
    CausalConv1d,
    CausalConvTranspose1d,
    ConvNeXtBlock,
    DecoderBlock,
    ResidualUnit,
    SnakeBeta,
    StreamingLayer,
)
from omni.code2wav.window_transformer import windowed_attention
from omni.config import Code2WavConfig
from omni.layers.attention_backends import attention
from omni.layers.init import initialise

RELEASED = json.loads((Path(__file__).parents[1] / "configs" / "qwen3_omni_30b_a3b.json").read_text())
SIZES = {
    "codebook_size": 32,
    "num_quantizers": 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "sliding_window": 5,
    "decoder_dim": 16,
    "upsample_rates": [4, 3],
    "upsampling_ratios": [2],
}
SHAPES = [  # changes, hop_length, lookahead
    ({}, 24, 4 * 3 + 3),
    ({"sliding_window": 1, "num_key_value_heads": 1}, 24, 15),
    ({"upsample_rates": (2, 2, 3), "upsampling_ratios": (), "decoder_dim": 8}, 12, (2 * 2 + 2) * 3 + 3),
    ({"upsample_rates": (5,), "upsampling_ratios": (2, 2)}, 20, 5),
    ({"sliding_window": None, "num_hidden_layers": 1}, 24, 15),
]


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Weights that hide nothing and keep the waveform away from -1 and 1."""
    for name, p in module.named_parameters():
        if "code_embedding" in name:
            p.normal_()
        elif p.dim() > 1:
            p.normal_(std=0.6 / p[0].numel() ** 0.5)
        elif name.endswith(("alpha", "beta", "bias")):
            p.normal_(std=0.1)
        else:
            p.normal_(1, 0.1)


def make_decoder(strict_causal: bool = False, **changes: Any) -> Code2Wav:
    torch.manual_seed(0)
    config = Code2WavConfig.from_dict(SIZES).replace(**changes)
    decoder = Code2Wav(config, strict_causal=strict_causal)
    randomise(decoder)
    return decoder.eval()


def draw(frames: int, rows: int = 2, books: int = 3) -> Tensor:
    return torch.randint(0, 32, (rows, books, frames), generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize(("changes", "hop", "lookahead"), SHAPES)
@pytest.mark.parametrize("strict_causal", [False, True])
def test_sample_counts(changes: dict[str, Any], hop: int, lookahead: int, strict_causal: bool) -> None:
    decoder = make_decoder(strict_causal, **changes)
    assert decoder.hop_length == hop and decoder.lookahead == (0 if strict_causal else lookahead)
    for frames in (0, 1, 2, 7):
        samples = decoder(draw(frames))
        assert samples.shape == (2, max(0, hop * frames - decoder.lookahead))
        assert samples.dtype == torch.float32


def test_released_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", lambda self: None)  # 5 s of imports on meta
    with torch.device("meta"):
        decoder = Code2Wav(Code2WavConfig.from_dict(RELEASED["code2wav_config"]))
    assert sum(p.numel() for p in decoder.parameters()) == 216_016_577
    assert (decoder.frame_rate, decoder.sample_rate, decoder.num_codebooks) == (12.5, 24000, 16)
    assert (decoder.hop_length, decoder.lookahead) == (1920, 555)


@torch.no_grad()
@pytest.mark.parametrize("strict_causal", [False, True])
@pytest.mark.parametrize(("changes", "hop", "lookahead"), SHAPES)
def test_a_sample_depends_on_no_frame_beyond_the_lookahead(
    changes: dict[str, Any], hop: int, lookahead: int, strict_causal: bool
) -> None:
    decoder = make_decoder(strict_causal, **changes)
    codes = draw(12)
    before = decoder(codes)
    for frame in (3, 7, 11):
        changed = codes.clone()
        changed[:, :, frame:] = (changed[:, :, frame:] + 1) % 32
        first = frame * hop - decoder.lookahead
        difference = (decoder(changed) - before).abs().amax(0)
        assert difference[:first].max() == 0 and difference[first : first + hop].max() > 1e-4


@torch.no_grad()
def test_strict_causal_is_the_default_later_by_the_lookahead() -> None:
    """After the first frames, in which the trimmed edges of the inner stages differ."""
    default, strict = make_decoder(), make_decoder(strict_causal=True)
    codes = draw(40)
    early, late = default(codes), strict(codes)[:, default.lookahead :]
    settled = 15 * default.hop_length
    assert (early - late)[:, :settled].abs().max() > 1e-4
    torch.testing.assert_close(early[:, settled:], late[:, settled:], atol=1e-6, rtol=0)


CHUNKINGS = [[1] * 23, [23], [2, 1, 7, 1, 12], [22, 1], [9, 9, 5]]


@torch.no_grad()
@pytest.mark.parametrize("strict_causal", [False, True])
@pytest.mark.parametrize(("changes", "hop", "lookahead"), SHAPES)
def test_streamed_equals_offline(changes: dict[str, Any], hop: int, lookahead: int, strict_causal: bool) -> None:
    decoder = make_decoder(strict_causal, **changes)
    codes = draw(23)
    whole = decoder(codes)
    for sizes in CHUNKINGS:
        state = decoder.init_state(2)
        pieces = [decoder.step(piece, state) for piece in codes.split(sizes, dim=2)]
        assert pieces[0].shape[1] == max(0, hop * sizes[0] - decoder.lookahead)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 22), max_size=22, unique=True).map(sorted))
@torch.no_grad()
def test_streamed_equals_offline_for_any_cuts(cuts: list[int]) -> None:
    decoder, codes = make_decoder(), draw(23)
    state, ends = decoder.init_state(2), [*cuts, 23]
    pieces = [decoder.step(codes[:, :, a:b], state) for a, b in zip([0, *ends], ends)]
    torch.testing.assert_close(torch.cat(pieces, 1), decoder(codes), atol=1e-5, rtol=0)


@torch.no_grad()
def test_two_streams_and_a_copied_state_are_independent() -> None:
    decoder = make_decoder()
    codes = draw(12)
    one, two = codes[:1], codes[1:]
    state_one, state_two = decoder.init_state(1), decoder.init_state(1)
    heard: dict[str, list[Tensor]] = {"one": [], "two": [], "copy": []}
    copy = None
    for t in range(12):
        heard["one"].append(decoder.step(one[..., t : t + 1], state_one))
        if copy is not None:
            heard["copy"].append(decoder.step(two[..., t : t + 1], copy))
        heard["two"].append(decoder.step(two[..., t : t + 1], state_two))
        if t == 5:
            copy = state_one.clone()
            heard["copy"] = list(heard["one"])
    whole = decoder(codes)
    torch.testing.assert_close(torch.cat(heard["one"], 1), whole[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(heard["two"], 1), whole[1:], atol=1e-5, rtol=0)
    branched = decoder(torch.cat((one[..., :6], two[..., 6:]), 2))
    torch.testing.assert_close(torch.cat(heard["copy"], 1), branched, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_long_signal_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder()
    codes = draw(30)
    whole = decoder(codes)
    monkeypatch.setattr("omni.code2wav.code2wav._FRAMES_AT_ONCE", 7)
    calls = []
    monkeypatch.setattr(
        decoder, "step", lambda codes, state: calls.append(codes) or Code2Wav.step(decoder, codes, state)
    )
    torch.testing.assert_close(decoder(codes), whole, atol=1e-6, rtol=0)
    assert [c.shape[2] for c in calls] == [7, 7, 7, 7, 2]
    with torch.enable_grad():
        assert decoder(codes).requires_grad and len(calls) == 5


@pytest.mark.parametrize(("window", "past", "queries"), [(5, 0, 40), (5, 4, 40), (1, 0, 9), (72, 71, 1), (64, 0, 20)])
def test_windowed_attention_equals_a_dense_mask(
    window: int, past: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.code2wav.window_transformer._QUERIES_AT_ONCE", 7)
    q = torch.randn(2, 4, queries, 8)
    k, v = torch.randn(2, 2, past + queries, 8), torch.randn(2, 2, past + queries, 8)
    valid = torch.arange(-past, queries) >= -torch.tensor([[0], [past // 2]])
    age = torch.arange(past, past + queries)[:, None] - torch.arange(past + queries)
    mask = ((age >= 0) & (age < window)) & valid[:, None, None, :]
    expected = attention(q, k, v, mask, backend="plain")
    torch.testing.assert_close(windowed_attention(q, k, v, window, valid), expected, atol=1e-5, rtol=0)


LAYERS: list[StreamingLayer] = [
    CausalConv1d(4, 6, kernel_size=7),
    CausalConv1d(4, 6, kernel_size=3, dilation=4),
    CausalConv1d(4, 4, kernel_size=1),
    CausalConv1d(4, 4, kernel_size=7, groups=4),
    CausalConvTranspose1d(4, 6, kernel_size=2, stride=2),
    CausalConvTranspose1d(4, 6, kernel_size=6, stride=3),
    CausalConvTranspose1d(4, 6, kernel_size=6, stride=3, trim_start=False),
    CausalConvTranspose1d(4, 6, kernel_size=7, stride=2),
    SnakeBeta(4),
    ConvNeXtBlock(4),
    ResidualUnit(4, dilation=9),
    DecoderBlock(4, 2, rate=3, trim_start=True),
]


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_each_layer_streams_and_is_causal(layer: StreamingLayer) -> None:
    torch.manual_seed(0)
    randomise(layer)
    x = torch.randn(2, 4, 30)
    whole = layer(x)
    for sizes in ([1] * 30, [4, 0, 1, 25], [30]):
        state = layer.init_state(2)
        streamed = torch.cat([layer.step(piece, state) for piece in x.split(sizes, dim=2)], dim=2)
        torch.testing.assert_close(streamed, whole, atol=1e-6, rtol=0)
    rate = max(1, round(whole.shape[2] / 30))
    prefix = layer(x[..., :20])
    assert abs(prefix.shape[2] - 20 * rate) <= 5  # what the start is trimmed by
    torch.testing.assert_close(prefix, whole[..., : prefix.shape[2]], atol=1e-6, rtol=0)


def test_snake_beta_formula() -> None:
    layer = SnakeBeta(2)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([2.0, 3.0]).log())
        layer.beta.copy_(torch.tensor([4.0, 0.5]).log())
    y = layer(torch.full((1, 2, 1), 0.3)).flatten()
    assert y.tolist() == pytest.approx([0.3 + math.sin(0.6) ** 2 / 4, 0.3 + math.sin(0.9) ** 2 / 0.5])


def test_initial_values_are_all_written() -> None:
    decoder = make_decoder(layer_scale_initial_scale=0.03)
    with torch.no_grad():
        for p in decoder.parameters():
            p.fill_(float("nan"))
    initialise(decoder, lambda name: 0.02)
    assert all(torch.isfinite(p).all() for p in decoder.parameters())
    assert decoder.pre_transformer.layers[0].mlp_layer_scale.scale.unique().tolist() == pytest.approx([0.03])
    assert decoder.upsample[0][1].gamma.unique().tolist() == pytest.approx([1e-6])
    assert decoder.decoder[-2].alpha.abs().sum() == 0
    assert 0.01 < decoder.code_embedding.weight.std() < 0.03


def test_gradient_reaches_every_parameter() -> None:
    decoder = make_decoder()
    codes = torch.arange(96).reshape(1, 3, 32) % 32  # every row of the table
    decoder(codes).square().sum().backward()
    assert [n for n, p in decoder.named_parameters() if not p.grad.abs().sum() > 0] == []


@torch.no_grad()
def test_bf16_stays_near_fp32_and_streams() -> None:
    decoder = make_decoder()
    codes = draw(20)
    exact = decoder(codes)
    assert exact.abs().max() < 1
    decoder.to(torch.bfloat16)
    rough, state = decoder(codes), decoder.init_state(2)
    streamed = torch.cat([decoder.step(piece, state) for piece in codes.split(3, dim=2)], 1)
    for y in (rough, streamed):
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).norm() < 0.05 * exact.norm()  # measured 2.0 %


@pytest.mark.parametrize(
    ("codes", "error", "words"),
    [
        (torch.full((1, 3, 4), 32), ValueError, "code 32 at row 0, codebook 0, frame 0 lies outside 0..31"),
        (torch.tensor([[[0, 0], [0, -1], [0, 0]]]), ValueError, "code -1 at row 0, codebook 1, frame 1"),
        (torch.zeros(1, 4, 2, dtype=torch.int64), ValueError, "3 codebooks, frames\\], got \\[1, 4, 2\\]"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, "got \\[3, 2\\]"),
        (torch.zeros(1, 3, 2), TypeError, "int64, got torch.float32"),
    ],
)
def test_bad_input(codes: Tensor, error: type[Exception], words: str) -> None:
    decoder = make_decoder()
    with pytest.raises(error, match=words):
        decoder(codes)
    with pytest.raises(error, match=words):
        decoder.step(codes, decoder.init_state(1))


def test_step_needs_its_own_rows_and_a_frame() -> None:
    decoder = make_decoder()
    for codes in (draw(0), draw(1, rows=3)):
        with pytest.raises(ValueError, match="2 rows and at least one frame"):
            decoder.step(codes, decoder.init_state(2))
