"""The audio encoder: token counts, attention windows, independence of clips, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import draw, fixed
from torch import nn

from omni.config.qwen3_omni import AudioEncoderConfig
from omni.encoders.audio import AudioEncoder, num_audio_tokens, sinusoids, split_blocks

RELEASED = Path(__file__).parents[2] / "configs" / "qwen3_omni_30b_a3b.json"
SIZES = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 50,
    "n_window_infer": 200,
    "downsample_hidden_size": 3,
    "output_dim": 12,
}


def make_encoder(seed: int = 0, **changes: int) -> AudioEncoder:
    with fixed(seed):
        return draw(AudioEncoder(AudioEncoderConfig.from_dict({**SIZES, **changes})))


def encode(encoder: AudioEncoder, *clips: torch.Tensor, window_frames: Any = None, **cuts: Any) -> list[torch.Tensor]:
    """Embeddings of each clip [M, F], encoded together; the padding is rubbish that must not be read."""
    longest = max(clip.shape[1] for clip in clips)
    features = torch.full((len(clips), clips[0].shape[0], longest), 1e3)
    for row, clip in zip(features, clips):
        row[:, : clip.shape[1]] = clip
    with torch.no_grad():
        out = encoder(features, torch.tensor([clip.shape[1] for clip in clips]), window_frames, **cuts)
    assert out.taps == []
    return list(out.embeds.split(out.lengths))


def test_token_table() -> None:
    table = {1: 1, 8: 1, 9: 2, 37: 5, 50: 7, 99: 13, 100: 13, 101: 14, 199: 26, 200: 26, 800: 104}
    table |= {3000: 390, 30000: 3900}
    assert {frames: num_audio_tokens(frames) for frames in table} == table
    assert num_audio_tokens(0) == 0


@pytest.mark.parametrize("chunk", [100, 50, 2, 36])
def test_token_count_is_the_convolutions_own_length(chunk: int) -> None:
    convs = nn.Sequential(*(nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1) for _ in range(3)))
    convolved = [0] + [convs(torch.zeros(1, 1, width)).shape[-1] for width in range(1, chunk + 1)]
    for frames in range(1, 3001):
        assert num_audio_tokens(frames, chunk) == frames // chunk * convolved[chunk] + convolved[frames % chunk]


@pytest.mark.parametrize("n_window", [50, 25, 7, 1])
def test_every_clip_yields_its_token_count(n_window: int) -> None:
    encoder = make_encoder(n_window=n_window, n_window_infer=6 * n_window)
    lengths = [1, 2, 7, 14, 49, 50, 51, 99, 100, 101, 230]
    together = encode(encoder, *(torch.randn(16, n) for n in lengths))
    assert [len(y) for y in together] == [encoder.num_tokens(n) for n in lengths]


@pytest.mark.parametrize("n_window", [50, 25])
def test_a_clip_does_not_feel_its_neighbours(n_window: int) -> None:
    encoder = make_encoder(n_window=n_window)
    clips = [torch.randn(16, n) for n in (37, 250, 90, 100, 5, 433)]
    for clip, beside in zip(clips, encode(encoder, *clips)):
        torch.testing.assert_close(beside, encode(encoder, clip)[0], atol=1e-5, rtol=0)


def test_lengths_may_be_a_list_and_no_clips_give_no_tokens() -> None:
    encoder = make_encoder()
    features = torch.randn(2, 16, 60)
    assert torch.equal(encoder(features, [60, 31]).embeds, encoder(features, torch.tensor([60, 31])).embeds)
    none = encoder(features[:0], [])
    assert none.embeds.shape == (0, 12) and none.lengths == []


@pytest.mark.parametrize(("window", "frames"), [(100, 400), (200, 730), (300, 1030)])
def test_a_window_equals_encoding_it_alone(window: int, frames: int) -> None:
    encoder = make_encoder()
    clip = torch.randn(16, frames)  # its last block has at least one chunk: a shorter one, alone, is not padded
    whole = encode(encoder, clip, window_frames=window)[0]
    alone = [encode(encoder, block, window_frames=window)[0] for block in clip.split(window, dim=1)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=0)


def test_the_window_changes_cross_block_attention_only() -> None:
    encoder = make_encoder()
    clip = torch.randn(16, 450)
    short, long = (encode(encoder, clip, window_frames=w)[0] for w in (100, 400))
    assert (short - long)[:52].abs().amax(1).min() > 1e-4  # every token of the four whole chunks hears more
    torch.testing.assert_close(short[52:], long[52:], atol=1e-6, rtol=0)  # the rest is a block of its own in both
    within = clip[:, :100]
    assert torch.equal(encode(encoder, within, window_frames=100)[0], encode(encoder, within, window_frames=400)[0])
    for layer in encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
    short, long = (encode(encoder, clip, window_frames=w)[0] for w in (100, 400))
    torch.testing.assert_close(short, long, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [100, 200])
def test_no_token_depends_on_later_blocks(window: int) -> None:
    encoder = make_encoder()
    clip = torch.randn(16, 530)
    before = encode(encoder, clip, window_frames=window)[0]
    changed = clip.clone()
    changed[:, 2 * window :] += 1
    after = encode(encoder, changed, window_frames=window)[0]
    kept = encoder.num_tokens(2 * window)
    assert torch.equal(before[:kept], after[:kept])
    assert (before[kept:] - after[kept:]).abs().amax(1).min() > 1e-4


def test_default_window_is_the_configs() -> None:
    encoder = make_encoder(n_window_infer=250)  # two whole chunks fit
    clip = torch.randn(16, 470)
    assert torch.equal(encode(encoder, clip)[0], encode(encoder, clip, window_frames=200)[0])
    assert split_blocks(60, 26) == [26, 26, 8] and split_blocks(52, 26) == [26, 26]


def test_window_in_seconds() -> None:
    encoder = make_encoder()
    assert [encoder.window_frames(s) for s in (1, 2.0, 8, 1.0000000001)] == [100, 200, 800, 100]
    assert make_encoder(n_window=15).window_frames(0.9) == 90
    for bad in (0, -1, 0.5, 1.5, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValueError, match=r"window of .* s must be a positive multiple of one chunk of 1 s"):
            encoder.window_frames(bad)
    for wrong in ("1", None, True):
        with pytest.raises(TypeError, match="number of seconds"):
            encoder.window_frames(wrong)
    for frames in (150, 0):
        with pytest.raises(ValueError, match="multiple of one chunk of 100"):
            encoder.init_state(frames)


@pytest.mark.parametrize("chunk", [8, 48, 96])
def test_a_chosen_chunk_is_that_of_an_encoder_made_for_it(chunk: int) -> None:
    encoder, made_for_it = make_encoder(), make_encoder(n_window=chunk // 2, n_window_infer=200)
    made_for_it.load_state_dict(encoder.state_dict())
    clips = [torch.randn(16, n) for n in (5, chunk, 130, 470)]
    for window in (None, 2 * chunk):
        expected = encode(made_for_it, *clips, window_frames=window)
        for own, found in zip(expected, encode(encoder, *clips, window_frames=window, chunk_frames=chunk)):
            assert torch.equal(own, found)
    lengths = range(1, 500)
    counts = [encoder.num_tokens(n, chunk) for n in lengths]
    assert counts == [made_for_it.num_tokens(n) for n in lengths] and counts[-1] != encoder.num_tokens(499)


def test_the_own_chunk_may_be_named() -> None:
    encoder, clip = make_encoder(), torch.randn(16, 430)
    assert torch.equal(encode(encoder, clip)[0], encode(encoder, clip, chunk_frames=100)[0])
    assert encoder.init_state(chunk_frames=100).tail.shape == encoder.init_state().tail.shape


def test_every_clip_may_have_a_chunk_and_a_window_of_its_own() -> None:
    encoder = make_encoder()
    clips = [torch.randn(16, n) for n in (250, 48, 333, 48, 20)]
    chunks, windows = [100, 48, 48, 100, 8], [200, 96, 48, 100, 16]
    together = encode(encoder, *clips, window_frames=windows, chunk_frames=chunks)
    for clip, chunk, window, found in zip(clips, chunks, windows, together):
        alone = encode(encoder, clip, window_frames=window, chunk_frames=chunk)[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    for name in ("window_frames", "chunk_frames"):
        with pytest.raises(ValueError, match=f"5 audio clips need one {name}, or as many, got 2"):
            encode(encoder, *clips, **{name: [200, 200]})
    with pytest.raises(ValueError, match="window of 200 mel frames must be a positive multiple of one chunk of 48"):
        encode(encoder, *clips, window_frames=windows, chunk_frames=48)


def test_chunk_in_seconds() -> None:
    encoder = make_encoder()
    assert [encoder.chunk_frames(s) for s in (0.48, 0.08, 0.96, 1, 1.0000000001)] == [48, 8, 96, 100, 100]
    assert make_encoder(n_window=15).chunk_frames(0.24) == 24 and make_encoder(n_window=2).chunk_frames(0.04) == 4
    assert encoder.window_frames(0.96, chunk_frames=48) == 96
    for bad in (0, -0.48, 0.5, 0.485, 0.481, 1.04, 2.0, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValueError, match=r"audio_chunk_s of .* multiple of 0.08 s up to 0.96 s, or .* own 1 s"):
            encoder.chunk_frames(bad)
    with pytest.raises(ValueError, match=r"audio_chunk_s of 0.08 s is not possible: .* chunks of 0.04 s; leave it out"):
        make_encoder(n_window=2, n_window_infer=4).chunk_frames(0.08)
    for wrong in ("1", None, True):
        with pytest.raises(TypeError, match="a chunk of sound is a number of seconds"):
            encoder.chunk_frames(wrong)
    for frames in (50, 0, 104):
        for use in (encoder.init_state, encoder.num_tokens):
            with pytest.raises(ValueError, match=r"multiple of 0.08 s"):
                use(100, chunk_frames=frames)
    with pytest.raises(ValueError, match=r"1 s must be a positive multiple of one chunk of 0.48 s"):
        encoder.window_frames(1.0, chunk_frames=48)


def test_positions_restart_in_every_chunk() -> None:
    encoder = make_encoder()
    clip = torch.randn(16, 100).repeat(1, 2)
    first, second = encode(encoder, clip, window_frames=100)[0].split(13)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    table = sinusoids(3, 6, torch.device("cpu"))
    angles = torch.tensor([0.0, 1.0, 2.0])[:, None] * torch.tensor([1.0, 1e-2, 1e-4])
    torch.testing.assert_close(table, torch.cat((angles.sin(), angles.cos()), 1))


def test_convolutions_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    clip = torch.randn(16, 510)
    whole = encode(encoder, clip)[0]
    monkeypatch.setattr("omni.encoders.audio._CHUNKS_AT_ONCE", 2)
    torch.testing.assert_close(encode(encoder, clip)[0], whole, atol=1e-6, rtol=0)


def test_gradient_reaches_every_parameter() -> None:
    encoder = make_encoder()
    encoder(torch.randn(2, 16, 150), [150, 40]).embeds.square().sum().backward()
    # A key bias shifts all scores of a query alike, so that its gradient is zero up to rounding.
    dead = [n for n, p in encoder.named_parameters() if not n.endswith("k_proj.bias") and not p.grad.abs().sum() > 0]
    assert dead == []


def test_bf16_stays_near_fp32() -> None:
    encoder = make_encoder()
    clip = torch.randn(16, 230)
    exact = encode(encoder, clip)[0]
    rough = encode(encoder.to(torch.bfloat16), clip)[0]
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()  # measured 0.7 %


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 9, 16, 17])
def test_the_shortest_clips_in_bf16(frames: int) -> None:
    """Of up to eight frames one column comes out of a convolution; memory that others left behind is not read."""
    encoder = make_encoder(num_mel_bins=128, downsample_hidden_size=8)
    clip = torch.randn(128, frames)
    exact = encode(encoder, clip)[0]
    narrow = encoder.to(torch.bfloat16)
    for left in (float("nan"), 3e38, -3e38):
        junk = [torch.full((2**size,), left, dtype=torch.bfloat16) for size in range(4, 18)]
        del junk
        rough = encode(narrow, clip)[0]
        assert (rough.float() - exact).norm() < 0.05 * exact.norm()  # few values: three times what 230 frames have


def test_released_size() -> None:
    config = AudioEncoderConfig.from_dict(json.loads(RELEASED.read_text())["thinker_config"]["audio_config"])
    with torch.device("meta"):
        encoder = AudioEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == 647_927_168


@pytest.mark.parametrize(
    ("shape", "lengths", "window", "words"),
    [
        ((1, 15, 60), [60], None, "16 mel bins"),
        ((16, 60), [60], None, "must be \\[clips"),
        ((1, 16, 60), [60, 60], None, "as many lengths, got 2"),
        ((1, 16, 60), [61], None, "length of audio clip 0 is 61 .* 1..60"),
        ((2, 16, 60), [60, 0], None, "clip 1 is 0 mel frames"),
        ((1, 16, 60), [60], 150, "150 mel frames must be a positive multiple of one chunk of 100"),
        ((1, 16, 60), [60], 0, "window of 0"),
    ],
)
def test_bad_input(shape: tuple[int, ...], lengths: list[int], window: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_encoder()(torch.zeros(shape), lengths, window)
