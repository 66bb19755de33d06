"""Log-mel features, audio and vision encoders against the reference, and where the reference differs on purpose."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from build import once, seeded
from oracle import randomise
from torch import Tensor

from omni.config.qwen3_omni import AudioEncoderConfig, VisionEncoderConfig
from omni.encoders.audio import AudioEncoder, num_audio_tokens
from omni.encoders.mel import LogMel
from omni.encoders.vision import VisionEncoder

AUDIO: dict[str, dict[str, Any]] = {
    "tiny": {},
    "one_chunk_window": {"n_window_infer": 100, "encoder_layers": 3, "encoder_attention_heads": 2},
    "chunk_of_98": {"n_window": 49, "n_window_infer": 294, "num_mel_bins": 80},
    "chunk_of_104": {"n_window": 52, "n_window_infer": 208, "d_model": 48, "encoder_attention_heads": 6},
    "window_not_whole_chunks": {"n_window_infer": 250, "num_mel_bins": 21, "downsample_hidden_size": 5},
    "released_window": {"n_window_infer": 800, "encoder_layers": 1, "output_dim": 40},
}
AUDIO_BASE = {
    "num_mel_bins": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "n_window": 50,
    "n_window_infer": 200,
    "downsample_hidden_size": 8,
    "output_dim": 24,
}
VISION: dict[str, dict[str, Any]] = {
    "two_taps": {},
    "one_tap": {"deepstack_visual_indexes": [1], "depth": 2, "num_heads": 2},
    "no_taps": {"deepstack_visual_indexes": [], "num_position_embeddings": 36},
    "no_merging": {"spatial_merge_size": 1, "patch_size": 8, "num_position_embeddings": 49},
    "merge_three": {"spatial_merge_size": 3, "deepstack_visual_indexes": [0, 1, 2], "temporal_patch_size": 1},
    "exact_gelu": {"hidden_act": "gelu", "hidden_size": 48, "num_heads": 6, "in_channels": 1},
}
VISION_BASE = {
    "depth": 3,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 48,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 24,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}


@once
def audio_pair(name: str) -> tuple[Any, AudioEncoder]:
    """The reference and ours with the same random weights."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

    values = {**AUDIO_BASE, **AUDIO[name]}
    reference = Qwen3OmniMoeAudioEncoder(Qwen3OmniMoeAudioEncoderConfig(**values)).eval()
    randomise(reference, seed=len(name))
    ours = AudioEncoder(AudioEncoderConfig.from_dict(values)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@once
def vision_pair(name: str) -> tuple[Any, VisionEncoder]:
    """The reference and ours with the same random weights."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

    values = {**VISION_BASE, **VISION[name]}
    reference = Qwen3OmniMoeVisionEncoder(Qwen3OmniMoeVisionEncoderConfig(**values)).eval()
    randomise(reference, seed=len(name))
    with torch.no_grad():  # outputs near one: on larger ones fp32 itself is not exact to 1e-5
        for p in reference.parameters():
            if p.dim() > 1 and p is not reference.pos_embed.weight:
                p.mul_(3 / p[0].numel() ** 0.5)
    ours = VisionEncoder(VisionEncoderConfig.from_dict(values)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def reference_alone(reference: Any, clip: Tensor) -> Tensor:
    return reference(clip, feature_lens=torch.tensor([clip.shape[1]])).last_hidden_state


@once
def feature_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, chunk_length=300)


def noise(samples: int) -> Tensor:
    return 0.3 * torch.randn(samples, generator=seeded(samples))


SIGNALS = {
    "noise": noise(16000),
    "one_hop_over": noise(16161),
    "shortest_that_mirrors": noise(201),
    "odd_length": noise(8_123),
    "long": noise(700_001),
    "sine": torch.sin(2 * math.pi * 440 * torch.arange(12_000) / 16000),
    "quiet": 1e-6 * noise(5_000),
    "loud": 1e3 * noise(5_000),
    "speech_then_silence": torch.cat((noise(4000), torch.zeros(8000))),
    "silence": torch.zeros(1600),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel(name: str) -> None:
    batch = feature_extractor()(
        SIGNALS[name].numpy(),
        sampling_rate=16000,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    ours = LogMel()(SIGNALS[name])
    assert ours.shape[1] == batch["attention_mask"].sum()
    torch.testing.assert_close(ours, batch["input_features"][0], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", AUDIO)
@pytest.mark.parametrize("frames", [[1, 9, 37, 49], [96, 98, 99, 100], [101, 103, 104, 105, 199, 200, 250], [433, 816]])
def test_audio_encoder(name: str, frames: list[int]) -> None:
    """Clips of a batch equal the reference on each clip alone."""
    reference, ours = audio_pair(name)
    bins, longest = ours.config.num_mel_bins, max(frames)
    features = torch.randn(len(frames), bins, longest, generator=seeded(longest))
    out = ours(features, torch.tensor(frames))
    for clip, n, embeds in zip(features, frames, out.embeds.split(out.lengths)):
        expected = reference_alone(reference, clip[:, :n])
        torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)


def test_audio_token_count() -> None:
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    frames = torch.arange(1, 30_001)
    assert [num_audio_tokens(n) for n in frames.tolist()] == _get_feat_extract_output_lengths(frames).tolist()


@torch.no_grad()
def test_the_reference_changes_a_short_clip_with_its_neighbours_and_ours_does_not() -> None:
    """A clip below one chunk is padded beside a longer one there, and its last convolutions see the padding."""
    reference, ours = audio_pair("tiny")
    clip, neighbour = torch.randn(128, 50), torch.randn(128, 300)
    alone = reference_alone(reference, clip)
    beside = reference(torch.cat((clip, neighbour), 1), feature_lens=torch.tensor([50, 300])).last_hidden_state
    assert (beside[: len(alone)] - alone).abs().max() > 1e-3
    features = torch.zeros(2, 128, 300)
    features[0, :, :50], features[1] = clip, neighbour
    torch.testing.assert_close(ours(features, [50, 300]).embeds[: len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_the_reference_counts_13_tokens_a_chunk_whatever_the_chunk() -> None:
    """With another chunk length than about 100 frames, ours counts what the convolutions yield."""
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    assert _get_feat_extract_output_lengths(torch.tensor([200]), n_window=25).item() == 4 * 13
    assert num_audio_tokens(200, chunk_frames=50) == 4 * 7


GRIDS = {
    "image": [(1, 6, 6)],
    "not_square": [(1, 6, 24), (1, 18, 6)],
    "larger_than_the_table": [(1, 30, 12)],
    "video": [(4, 6, 12)],
    "images_and_videos": [(1, 6, 12), (3, 12, 6), (1, 6, 6), (2, 6, 18), (1, 24, 6)],
}


@torch.no_grad()
@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", VISION)
def test_vision_encoder(name: str, grids: str) -> None:
    reference, ours = vision_pair(name)
    grid = torch.tensor(GRIDS[grids])
    width = ours.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(int(grid.prod(1).sum()), width, generator=seeded(1))
    expected, out = reference(pixels, grid), ours(pixels, grid)
    torch.testing.assert_close(out.embeds, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert len(out.taps) == len(expected.deepstack_features) == len(ours.config.deepstack_visual_indexes)
    for tap, theirs in zip(out.taps, expected.deepstack_features):
        torch.testing.assert_close(tap, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_reference() -> None:
    reference, ours = audio_pair("tiny")
    clip = torch.randn(128, 230, generator=seeded(0))
    exact = ours(clip[None], [230]).embeds
    rough = copy.deepcopy(ours).bfloat16()(clip[None], [230]).embeds.float()
    theirs = reference_alone(copy.deepcopy(reference).bfloat16(), clip).float()
    assert (rough - exact).norm() < min(0.05 * exact.norm(), 1.5 * (theirs - exact).norm())

    reference, ours = vision_pair("two_taps")
    pixels, grid = torch.randn(48, 1536, generator=seeded(0)), torch.tensor([[2, 4, 6]])
    exact = ours(pixels, grid).embeds
    rough = copy.deepcopy(ours).bfloat16()(pixels, grid).embeds.float()
    theirs = copy.deepcopy(reference).bfloat16()(pixels.bfloat16(), grid).pooler_output.float()
    assert (rough - exact).norm() < min(0.05 * exact.norm(), 1.5 * (theirs - exact).norm())
