"""What the encoders cost: no wait for the device, bounded memory, and the same values however the work is cut.

A GPU cannot be assumed: fake CUDA tensors, which have shapes and devices but no values, refuse to mix devices and to be
read by the host.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_whisper_audio
import test_window_vision
import torch
from build import draw, fixed, seeded
from test_streaming_encoders import AUDIO, VISION, make_audio_encoder, noise
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from omni.config.qwen2_5_omni import WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.config.qwen3_omni import AudioEncoderConfig, VisionEncoderConfig
from omni.encoders import audio, vision
from omni.encoders.audio import AudioEncoder
from omni.encoders.mel import LogMel, compress, running_level
from omni.encoders.resample import StreamingResampler
from omni.encoders.vision import VisionEncoder
from omni.encoders.whisper_audio import WhisperAudioEncoder
from omni.encoders.window_vision import WindowVisionEncoder
from omni.layers.packing import PackedBlocks

GRIDS = [(1, 4, 6), (3, 2, 2), (1, 6, 4), (2, 4, 6)]


def make_vision_encoder() -> VisionEncoder:
    with fixed():
        return draw(VisionEncoder(VisionEncoderConfig.from_dict(VISION)))


def patches() -> Tensor:
    rows = sum(t * h * w for t, h, w in GRIDS)
    return torch.randn(rows, 3 * 2 * 4 * 4, generator=seeded(0))


# ---- a device is not waited for ----


@torch.no_grad()
def test_encoders_stay_on_the_device_and_never_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (VisionEncoder, WindowVisionEncoder):
        monkeypatch.setattr(kind, "_check", lambda self, pixels, grids: grids)  # grids are read there, once
    with FakeTensorMode():
        with torch.device("cuda"):
            hear = AudioEncoder(AudioEncoderConfig.from_dict(AUDIO))
            see = VisionEncoder(VisionEncoderConfig.from_dict(VISION))
            hear_blocks = WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict(test_whisper_audio.SIZES))
            see_windows = WindowVisionEncoder(WindowVisionEncoderConfig.from_dict(test_window_vision.SIZES))
            clips, pixels = torch.randn(3, 16, 150), torch.randn(len(patches()), 96)
        heard, seen = hear(clips, [150, 7, 70]), see(pixels, GRIDS)
        outs = (heard, seen, hear_blocks(clips, [150, 7, 70]), see_windows(pixels, GRIDS))
        assert {x.device.type for out in outs for x in (out.embeds, *out.taps)} == {"cuda"}
        assert all(len(out.embeds) == sum(out.lengths) for out in outs)
        with pytest.raises(DataDependentOutputException):  # what the test relies on
            heard.embeds.sum().item()


@pytest.mark.parametrize("rate", [44100, 44101])
def test_front_end_on_a_device(rate: int) -> None:
    resampler, log_mel = StreamingResampler(rate), LogMel()
    with FakeTensorMode(allow_non_fake_inputs=True):
        samples = resampler._interpolate(torch.randn(60_000, device="cuda"), 7, 20_000)
        logs = log_mel.log_mel(samples.unfold(0, 400, 160))
        features = compress(logs, running_level(logs, 100))
    assert samples.shape == (19_993,) and features.shape == (128, 123) and features.device.type == "cuda"


# ---- memory is bounded, whatever the length ----


@torch.no_grad()
def test_audio_layers_run_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_audio_encoder()
    frames = [430, 35, 200, 60]  # windows of 9 tokens, and the rest of each clip
    features = torch.randn(4, 16, 430, generator=seeded(0))
    whole = encoder(features, frames)
    rows: list[int] = []
    encoder.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for limit, most in ((20, 20), (1, 9)):  # never less than one window
        rows.clear()
        monkeypatch.setattr(audio, "_TOKENS_AT_ONCE", limit)
        torch.testing.assert_close(encoder(features, frames).embeds, whole.embeds, atol=1e-5, rtol=0)
        assert most / 2 < max(rows) <= most and sum(rows) == len(whole.embeds)


@torch.no_grad()
def test_vision_blocks_run_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pixels, grids = make_vision_encoder(), patches(), torch.tensor(GRIDS)
    whole = encoder(pixels, grids)
    rows: list[int] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for limit, most in ((60, 60), (1, 24)):  # never less than one grid step
        rows.clear()
        monkeypatch.setattr(vision, "_PATCHES_AT_ONCE", limit)
        out = encoder(pixels, grids)
        for a, b in zip((out.embeds, *out.taps), (whole.embeds, *whole.taps)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert most / 2 < max(rows) <= most and sum(rows) == len(pixels)


def test_gradients_are_taken_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a sharded model then calls every layer equally often."""
    monkeypatch.setattr(vision, "_PATCHES_AT_ONCE", 1)
    monkeypatch.setattr(audio, "_TOKENS_AT_ONCE", 1)
    see, hear, calls = make_vision_encoder(), make_audio_encoder(), []
    for layer in (see.blocks[0], hear.layers[0]):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    see(patches(), torch.tensor(GRIDS))
    hear(torch.randn(2, 16, 150), [150, 40])
    assert len(calls) == 2


@torch.no_grad()
def test_convolutions_on_a_cpu_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_audio_encoder()
    clip = torch.randn(1, 16, 150, generator=seeded(0))
    whole = encoder(clip, [150]).embeds
    batches: list[int] = []
    encoder.conv2d1.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    monkeypatch.setattr(audio, "_CPU_VALUES", 3 * 3 * 16 * 20 // 4)  # three chunks of 16 mel bins and 20 frames
    torch.testing.assert_close(encoder(clip, [150]).embeds, whole, atol=1e-6, rtol=0)
    assert batches == [3, 3, 2]


@torch.no_grad()
def test_equal_grids_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of 24 patches, a video of two such steps, and three small steps between: two calls a layer."""
    runs: list[int] = []
    attend = vision.packed_attention

    def count(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Any:
        runs.append(len(blocks.runs))
        return attend(q, k, v, blocks)

    monkeypatch.setattr(vision, "packed_attention", count)
    make_vision_encoder()(patches(), torch.tensor(GRIDS))
    assert runs == [2] * VISION["depth"]


# ---- resampling by matrix ----


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 192000])
def test_whole_periods_equal_outputs_one_by_one(rate: int) -> None:
    resampler, signal = StreamingResampler(rate), noise(rate // 5)
    assert resampler.matrix is not None
    by_matrix = resampler(signal)
    resampler.matrix = None
    torch.testing.assert_close(by_matrix, resampler(signal), atol=1e-6, rtol=0)


def test_odd_rates_need_no_large_matrix() -> None:
    assert StreamingResampler(44101).matrix is None  # 16000 outputs a period
    matrix = StreamingResampler(44100).matrix
    assert matrix is not None and matrix.shape == (159 * 441 // 160 + 2 * StreamingResampler(44100).reach, 160)
    assert math.isclose(float(matrix.sum(0).mean()), 1, abs_tol=0.02)  # every output keeps the level
