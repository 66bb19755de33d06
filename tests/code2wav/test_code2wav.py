"""Code2Wav: sample counts, causality, streaming equals offline, windowed attention, initial values, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from build import fixed, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.conv import (
    StreamingSnake,
)
from omni.code2wav.window_transformer import Window
from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.attention_backends import attention
from omni.layers.init import initialise

RELEASED = json.loads((Path(__file__).parents[2] / "configs" / "qwen3_omni_30b_a3b.json").read_text())
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
    config = Code2WavConfig.from_dict(SIZES).replace(**changes)
    with fixed():
        decoder = Code2Wav(config, strict_causal=strict_causal)
        randomise(decoder)
    return decoder.eval()


def draw(frames: int, rows: int = 2, books: int = 3) -> Tensor:
    return torch.randint(0, 32, (rows, books, frames), generator=seeded(frames))


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
@pytest.mark.parametrize("frames", [1, 3])
def test_rows_out_of_step_share_a_batch(frames: int) -> None:
    """Rows begin alone, join a batch at different frame counts, stand still while others go on, and leave again."""
    decoder = make_decoder()
    codes = [draw(36, rows=1), draw(37, rows=1), draw(38, rows=1)]
    heard: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]

    def take(row: int) -> Tensor:
        done[row] += frames
        return codes[row][:, :, done[row] - frames : done[row]]

    batch = decoder.init_state(3)
    for row, before in enumerate((1, 4, 7)):
        alone = decoder.init_state(1)
        for _ in range(before):
            heard[row].append(decoder.step(take(row), alone))
        batch.write_row(row, alone)
    for active in ([True, False, True], [False, False, True], [True, True, True], [False, True, False]):
        pieces = [take(row) if moves else draw(frames, rows=1) for row, moves in enumerate(active)]
        samples = decoder.step(torch.cat(pieces), batch, torch.tensor(active))
        for row, moves in enumerate(active):
            if moves:
                heard[row].append(samples[row : row + 1])
    assert batch.transformer.frames.tolist() == [frames * n for n in (3, 6, 10)] == done
    for row in range(3):
        alone = batch.read_row(row)
        heard[row].append(decoder.step(take(row), alone))
        expected = decoder(codes[row][:, :, : done[row]])
        torch.testing.assert_close(torch.cat(heard[row], 1), expected, atol=1e-5, rtol=0)


def test_a_state_counts_as_started_once_nothing_is_left_to_drop() -> None:
    decoder = make_decoder()
    one, batch = decoder.init_state(1), decoder.init_state(2)
    assert not one.started and make_decoder(strict_causal=True).init_state(1).started
    with pytest.raises(ValueError, match="after its first frame"):
        batch.write_row(0, one)
    with pytest.raises(ValueError, match="stand still"):
        decoder.step(draw(1), batch, torch.tensor([True, False]))
    decoder.step(draw(1, rows=1), one)
    batch.write_row(0, one)
    assert one.started and batch.started


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, list):
        return [t for item in state for t in tensors(item)]
    return [t for value in vars(state).values() for t in tensors(value)] if hasattr(state, "clone") else []


@pytest.mark.parametrize("frames", [1, 9])
def test_a_step_keeps_its_tensors_in_place_and_reads_nothing_back(frames: int) -> None:
    decoder, codes = make_decoder(), draw(frames)
    state = decoder.init_state(2)
    decoder.step(codes, state)
    places = [t.data_ptr() for t in tensors(state)]
    decoder.step(codes, state, torch.tensor([True, False]))
    assert [t.data_ptr() for t in tensors(state)] == places and len(places) == 15
    decoder.to("meta")  # without values: a step that needed one on the host would fail
    samples = decoder.step(codes.to("meta"), state.to("meta"), torch.ones(2, dtype=torch.bool, device="meta"))
    assert samples.shape == (2, 24 * frames)


def test_a_step_is_one_graph() -> None:
    decoder, codes = make_decoder(num_hidden_layers=1, upsample_rates=(3,)), draw(7)
    step = torch.compile(decoder.step, fullgraph=True, backend="aot_eager")
    eager, traced = decoder.init_state(2), decoder.init_state(2)
    active = torch.tensor([True, False])
    for state in (eager, traced):
        decoder.step(codes[..., :1], state)
    for t in range(1, 7):
        expected, samples = (
            decoder.step(codes[..., t : t + 1], eager, active),
            step(codes[..., t : t + 1], traced, active),
        )
        torch.testing.assert_close(samples, expected, atol=1e-6, rtol=0)
    assert traced.transformer.frames.tolist() == [7, 1]


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


@pytest.mark.parametrize(("window", "frames"), [(5, 40), (1, 9), (72, 20), (3, 7)])
def test_windowed_attention_equals_a_dense_mask(window: int, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.code2wav.window_transformer._FRAMES_AT_ONCE", 7)
    q, k, v = torch.randn(2, 4, frames, 8), torch.randn(2, 2, frames, 8), torch.randn(2, 2, frames, 8)
    age = torch.arange(frames)[:, None] - torch.arange(frames)
    expected = attention(q, k, v, (age >= 0) & (age < window), backend="plain")
    torch.testing.assert_close(Window(window).attention(q, k, v), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 40, [6, 1, 20, 13], [40]])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_the_ring_equals_windowed_attention(window: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces shorter and longer than the ring and than a block."""
    monkeypatch.setattr("omni.code2wav.window_transformer._FRAMES_AT_ONCE", 8)
    transformer = make_decoder(sliding_window=window).pre_transformer
    x = torch.randn(2, 40, 16)
    state = transformer.init_state(2)
    streamed = torch.cat([transformer(piece, state) for piece in x.split(sizes, dim=1)], 1)
    torch.testing.assert_close(streamed, transformer(x), atol=1e-5, rtol=0)
    assert state.keys.shape[3] == window and state.frames.tolist() == [40, 40]


def test_snake_beta_formula() -> None:
    layer = StreamingSnake(2)
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
