"""The Whisper-shaped audio encoder: token counts, independent blocks and clips, streaming, bad input, its config."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from build import draw, fixed, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.config.qwen2_5_omni import WhisperAudioEncoderConfig
from omni.encoders import whisper_audio
from omni.encoders.whisper_audio import WhisperAudioEncoder, num_whisper_tokens
from omni.layers.init import initialise

SIZES = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 10,  # blocks of 20 frames, 5 tokens
    "output_dim": 12,
}
# 7B; 3B differs in output_dim
RELEASED = {
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "attention_dropout": 0.0,
    "d_model": 1280,
    "dropout": 0.0,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "init_std": 0.02,
    "initializer_range": 0.02,
    "max_source_positions": 1500,
    "model_type": "qwen2_5_omni_audio_encoder",
    "n_window": 100,
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "output_dim": 3584,
    "scale_embedding": False,
}

fuzz = settings(max_examples=40, deadline=None, derandomize=True)


def make_encoder(**changes: int) -> WhisperAudioEncoder:
    with fixed():
        return draw(WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict({**SIZES, **changes})))


ENCODER = make_encoder()


def clip_of(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(16, frames, generator=seeded(seed))


@torch.no_grad()
def encode(*clips: Tensor, encoder: WhisperAudioEncoder = ENCODER) -> list[Tensor]:
    """Embeddings of each clip [M, F], encoded together; the padding is rubbish that must not be read."""
    longest = max(clip.shape[1] for clip in clips)
    features = torch.full((len(clips), clips[0].shape[0], longest), float("nan"))
    for row, clip in zip(features, clips):
        row[:, : clip.shape[1]] = clip
    out = encoder(features, torch.tensor([clip.shape[1] for clip in clips]))
    assert out.taps == []
    return list(out.embeds.split(out.lengths))


def stream(clip: Tensor, pieces: list[int], encoder: WhisperAudioEncoder = ENCODER) -> Tensor:
    state = encoder.init_state()
    return torch.cat([*(encoder.step(piece, state) for piece in clip.split(pieces, dim=1)), encoder.finish(state)])


def assert_near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- token counts ----


def test_token_table() -> None:
    table = {1: 0, 2: 0, 3: 1, 4: 1, 6: 1, 7: 2, 100: 25, 199: 50, 200: 50, 201: 50, 203: 51, 399: 100, 400: 100}
    table |= {3000: 750, 30000: 7500}
    assert {frames: num_whisper_tokens(frames) for frames in table} == table


@pytest.mark.parametrize("n_window", [2, 10, 26])
def test_every_clip_yields_its_token_count(n_window: int) -> None:
    encoder = make_encoder(n_window=n_window)
    lengths = [*range(1, 30), 51, 52, 53, 103, 104, 105]
    together = encode(*(clip_of(n) for n in lengths), encoder=encoder)
    assert [len(y) for y in together] == [encoder.num_tokens(n) for n in lengths]


# ---- blocks and clips are independent ----


def test_a_clip_does_not_feel_its_neighbours() -> None:
    clips = [clip_of(n, seed=n) for n in (7, 50, 18, 20, 1, 87, 40, 3)]
    for clip, beside in zip(clips, encode(*clips)):
        assert_near(beside, encode(clip)[0])


def test_a_block_does_not_feel_its_neighbours() -> None:
    clip = clip_of(87)
    assert_near(encode(clip)[0], torch.cat([encode(block)[0] for block in clip.split(20, dim=1)]))
    changed = clip.clone()
    changed[:, 20:40] += 1
    before, after = (encode(x)[0].split(5) for x in (clip, changed))
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, False, True, True, True]
    assert (before[1] - after[1]).abs().amax(1).min() > 1e-4  # inside the block every token feels it


def test_positions_restart_in_every_block() -> None:
    first, second = encode(clip_of(20).repeat(1, 2))[0].split(5)
    assert_near(first, second, 1e-6)


def test_lengths_may_be_a_list_and_no_clips_give_no_tokens() -> None:
    features = torch.randn(2, 16, 60)
    assert torch.equal(ENCODER(features, [60, 31]).embeds, ENCODER(features, torch.tensor([60, 31])).embeds)
    none = ENCODER(features[:0], [])
    assert none.embeds.shape == (0, 12) and none.lengths == []


# ---- streaming ----


@fuzz
@given(st.integers(1, 130), st.lists(st.floats(0, 1), max_size=8))
def test_streamed_equals_offline(frames: int, places: list[float]) -> None:
    clip = clip_of(frames)
    ends = [0, *sorted(round(place * frames) for place in places), frames]
    streamed = stream(clip, [b - a for a, b in itertools.pairwise(ends)])
    assert streamed.shape == (num_whisper_tokens(frames), 12)
    assert_near(streamed, encode(clip)[0])


@pytest.mark.parametrize("frames", [1, 2, 3, 19, 20, 21, 39, 40, 41, 63])
def test_streamed_frame_by_frame(frames: int) -> None:
    clip = clip_of(frames)
    assert_near(stream(clip, [1] * frames), encode(clip)[0])


def test_a_block_comes_with_its_last_frame() -> None:
    state = ENCODER.init_state()
    sizes = [len(ENCODER.step(frame, state)) for frame in clip_of(50).split(1, dim=1)]
    assert [i for i, n in enumerate(sizes) if n] == [19, 39] and sizes[19] == 5
    assert ENCODER.finish(state).shape == (2, 12)
    state = ENCODER.init_state()
    assert len(ENCODER.step(clip_of(40), state)) == 10 and ENCODER.finish(state).shape == (0, 12)


def test_the_future_does_not_change_what_came_out() -> None:
    state, clip = ENCODER.init_state(), clip_of(50)
    early = ENCODER.step(clip, state)
    assert_near(early, encode(clip)[0][:10])
    assert_near(early, encode(torch.cat((clip[:, :40], 7 * clip_of(30, 1)), 1))[0][:10])


def test_a_clone_goes_on_by_itself() -> None:
    first, other = clip_of(70), clip_of(70, seed=1)
    state = ENCODER.init_state()
    head = ENCODER.step(first[:, :33], state)
    clone = state.clone()
    branch = torch.cat((head, ENCODER.step(other[:, 33:], clone), ENCODER.finish(clone)))
    trunk = torch.cat((head, ENCODER.step(first[:, 33:], state), ENCODER.finish(state)))
    assert_near(trunk, encode(first)[0])
    assert_near(branch, encode(torch.cat((first[:, :33], other[:, 33:]), 1))[0])


def test_a_finished_or_empty_clip() -> None:
    state = ENCODER.init_state()
    with pytest.raises(ValueError, match="0 mel frames"):
        ENCODER.finish(state)
    ENCODER.step(clip_of(7), state)  # that was not the end
    assert len(ENCODER.finish(state)) == 2
    with pytest.raises(ValueError, match=r"finished .* init_state"):
        ENCODER.step(clip_of(7), state)
    with pytest.raises(ValueError, match="finished"):
        ENCODER.finish(state)


def test_bad_features_leave_the_state_as_it_was() -> None:
    clip, state = clip_of(50), ENCODER.init_state()
    early = ENCODER.step(clip[:, :30], state)
    for bad in (clip[None], clip[:15], clip[0]):
        with pytest.raises(ValueError, match="16 mel bins"):
            ENCODER.step(bad, state)
    assert_near(torch.cat((early, ENCODER.step(clip[:, 30:], state), ENCODER.finish(state))), encode(clip)[0])


def test_a_long_stream_keeps_a_bounded_state() -> None:
    state = ENCODER.init_state()
    for seed in range(5):
        ENCODER.step(clip_of(33, seed), state)
        assert state.tail.shape == (16, 20) and state.tail.untyped_storage().nbytes() == 4 * 16 * 20


# ---- the one window ----


def test_the_window_is_a_block() -> None:
    encoder = make_encoder(n_window=100)
    assert encoder.window_frames(2) == encoder.window_frames(2.0000000001) == 200
    for bad in (0, -1, 1, 4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"not possible: .* blocks of 2 s"):
            encoder.window_frames(bad)
    for wrong in ("2", None, True):
        with pytest.raises(TypeError, match="number of seconds"):
            encoder.window_frames(wrong)
    assert encoder.init_state(200).tail.shape == (16, 200)
    with pytest.raises(ValueError, match=r"window of 400 mel frames is not possible: .* blocks of 200"):
        encoder.init_state(400)
    assert encoder.chunk_frames(2) == 200 and encoder.num_tokens(99, chunk_frames=200) == encoder.num_tokens(99)
    assert len(encoder(torch.zeros(1, 16, 60), [60], 200, chunk_frames=[200]).embeds) == encoder.num_tokens(60)
    with pytest.raises(ValueError, match=r"audio_chunk_s of 0.48 s is not possible: .* chunks of 2 s; leave it out"):
        encoder.chunk_frames(0.48)
    for use in (
        lambda: encoder(torch.zeros(1, 16, 60), [60], chunk_frames=48),
        lambda: encoder.num_tokens(60, 48),
        lambda: encoder.init_state(None, 48),
    ):
        with pytest.raises(ValueError, match=r"chunks of 48 mel frames are not possible: .* blocks of 200"):
            use()


# ---- cost ----


@torch.no_grad()
def test_blocks_run_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    clips = [clip_of(n, n) for n in (130, 35, 60, 7)]
    whole, rows = encode(*clips, encoder=encoder), []
    encoder.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for limit, most in ((25, 25), (1, 10)):  # never less than one block
        rows.clear()
        monkeypatch.setattr(whisper_audio, "_POSITIONS_AT_ONCE", limit)
        for a, b in zip(encode(*clips, encoder=encoder), whole):
            assert_near(a, b)
        assert max(rows) <= most and sum(rows) == 65 + 18 + 30 + 4
    rows.clear()
    with torch.enable_grad():
        encoder(torch.randn(1, 16, 130), [130])
    assert rows == [65]  # one pass: every rank of a sharded model calls every layer equally often


# ---- parameters and dtypes ----

UNREAD = "audio_bos_eos_token.weight"


def test_gradient_reaches_every_parameter() -> None:
    encoder = make_encoder()
    encoder(torch.randn(2, 16, 50), [50, 17]).embeds.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == [UNREAD]
    assert not encoder.audio_bos_eos_token.weight.requires_grad


def test_a_clip_without_tokens_still_touches_every_parameter() -> None:
    """Ranks of a sharded model that read nothing encode one frame of silence, to meet in the same calls."""
    encoder = make_encoder()
    embeds = encoder(torch.zeros(1, 16, 1), [1]).embeds
    assert embeds.shape == (0, 12)
    (0 * embeds.sum()).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == [UNREAD]
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_every_parameter_is_initialised() -> None:
    encoder = WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict(SIZES))
    with torch.no_grad():
        for p in encoder.parameters():
            p.fill_(float("nan"))
    initialise(encoder, lambda name: 0.02)
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    encoder, clip = make_encoder(n_window=50), clip_of(230)
    exact = encode(clip, encoder=encoder)[0]
    encoder.to(torch.bfloat16)
    rough = encode(clip, encoder=encoder)[0]
    streamed = stream(clip, [120, 0, 110], encoder)
    assert rough.dtype == streamed.dtype == torch.bfloat16
    for values in (rough, streamed):
        assert (values.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("width", "parameters"), [(3584, 639_647_232), (2048, 637_676_544)])
def test_released_size(monkeypatch: pytest.MonkeyPatch, width: int, parameters: int) -> None:
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", lambda self: None)  # 5 s of imports on meta
    with torch.device("meta"):
        encoder = WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict({**RELEASED, "output_dim": width}))
    assert sum(p.numel() for p in encoder.parameters()) == parameters


# ---- what is refused ----


@pytest.mark.parametrize(
    ("shape", "lengths", "window", "words"),
    [
        ((1, 15, 60), [60], None, "16 mel bins"),
        ((16, 60), [60], None, "must be \\[clips"),
        ((1, 16, 60), [60, 60], None, "as many lengths, got 2"),
        ((1, 16, 60), [61], None, "length of audio clip 0 is 61 .* 1..60"),
        ((2, 16, 60), [60, 0], None, "clip 1 is 0 mel frames"),
        ((1, 16, 60), [60], 40, "window of 40 mel frames is not possible"),
    ],
)
def test_bad_input(shape: tuple[int, ...], lengths: list[int], window: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ENCODER(torch.zeros(shape), lengths, window)


def test_released_config_is_written_back_as_it_was_read(recwarn: pytest.WarningsRecorder) -> None:
    config = WhisperAudioEncoderConfig.from_dict(RELEASED)
    assert config.to_dict() == RELEASED and config.chunk_frames == 200
    assert WhisperAudioEncoderConfig.from_dict(config.to_dict()) == config
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_windows": 100}, "did you mean 'n_window'"),
        ({"n_window": 25}, "n_window 25 must be even"),
        ({"d_model": 1281}, "not a multiple of 20 heads"),
        ({"num_hidden_layers": 31}, "num_hidden_layers = 31 contradicts its other spelling encoder_layers = 32"),
        ({"activation_function": "relu"}, "must be 'gelu'"),
        ({"encoder_layers": "32"}, "must be of type int"),
        ({"num_mel_bins": 0}, "num_mel_bins must be positive"),
    ],
)
def test_bad_config(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WhisperAudioEncoderConfig.from_dict({**RELEASED, **changes}, "thinker_config.audio_config")
