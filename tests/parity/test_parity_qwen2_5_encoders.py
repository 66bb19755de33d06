"""The encoders of Qwen2.5-Omni against the reference, on random tiny configs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from build import once, seeded
from oracle import randomise
from torch import Tensor

from omni.checkpoint.keys import KeyTable
from omni.config.qwen2_5_omni import QWEN2_5_OMNI, WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.encoders.whisper_audio import WhisperAudioEncoder, num_whisper_tokens
from omni.encoders.window_vision import WindowVisionEncoder

KEYS = KeyTable.of(QWEN2_5_OMNI)

AUDIO: dict[str, dict[str, Any]] = {
    "tiny": {},
    "short_blocks": {"n_window": 20, "encoder_layers": 3, "encoder_attention_heads": 2},
    "blocks_of_52": {"n_window": 26, "num_mel_bins": 80, "d_model": 48, "encoder_attention_heads": 6},
    "one_wide_layer": {"encoder_layers": 1, "encoder_ffn_dim": 80, "output_dim": 40, "num_mel_bins": 21},
    "deep_and_narrow": {"encoder_layers": 5, "d_model": 12, "encoder_attention_heads": 3, "encoder_ffn_dim": 20},
    "many_heads": {"encoder_attention_heads": 16, "num_mel_bins": 64, "n_window": 34, "output_dim": 9},
}
AUDIO_BASE = {
    "num_mel_bins": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "n_window": 100,
    "output_dim": 24,
}
VISION: dict[str, dict[str, Any]] = {
    "tiny": {},
    "windows_of_two": {"window_size": 56, "depth": 2, "fullatt_block_indexes": [0], "num_heads": 2},
    "windows_only": {"fullatt_block_indexes": [7, 15], "in_channels": 1},
    "whole_steps_only": {"fullatt_block_indexes": [0, 1, 2], "temporal_patch_size": 1},
    "no_merging": {"spatial_merge_size": 1, "patch_size": 8, "window_size": 24},
    "merge_three": {"spatial_merge_size": 3, "patch_size": 4, "window_size": 40, "rope_theta": 500.0},
}
VISION_BASE = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 24,
    "fullatt_block_indexes": [1],
}


@once
def audio_pair(name: str) -> tuple[Any, WhisperAudioEncoder]:
    """The reference and ours with the same random weights."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

    values = {**AUDIO_BASE, **AUDIO[name]}
    reference = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**values)).eval()
    randomise(reference, seed=len(name))
    with torch.no_grad():  # outputs near one: on larger ones fp32 itself is not exact to 1e-5
        reference.proj.weight.mul_(0.25)
    ours = WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict(reference.config.to_dict())).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@once
def vision_pair(name: str) -> tuple[Any, WindowVisionEncoder]:
    """The reference and ours with the same random weights."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniVisionEncoderConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder

    values = {**VISION_BASE, **VISION[name]}
    theta = values.pop("rope_theta", None)
    rope = {} if theta is None else {"rope_parameters": {"rope_theta": theta, "rope_type": "axial"}}
    reference = Qwen2_5OmniVisionEncoder(Qwen2_5OmniVisionEncoderConfig(**values, **rope)).eval()
    randomise(reference, seed=len(name))
    with torch.no_grad():
        for p in reference.parameters():
            if p.dim() > 1:
                p.mul_(0.5)
    ours = WindowVisionEncoder(WindowVisionEncoderConfig.from_dict(reference.config.to_dict())).eval()
    ours.load_state_dict(reference.state_dict())
    assert theta is None or ours.rotary.theta == theta
    return reference, ours


def hear(reference: Any, clips: list[Tensor]) -> Tensor:
    """What the reference gives for clips [M, n] together."""
    lengths = torch.tensor([clip.shape[1] for clip in clips])
    return reference(torch.cat(clips, dim=1), feature_lens=lengths).last_hidden_state


FRAMES = [[1, 2, 3, 4], [199, 200, 201, 399], [5, 400, 7, 333, 203, 1], [600], [39, 40, 41, 52, 53, 104, 79]]


@torch.no_grad()
@pytest.mark.parametrize("frames", FRAMES, ids=str)
@pytest.mark.parametrize("name", AUDIO)
def test_audio_encoder(name: str, frames: list[int]) -> None:
    """Alone and together: here the reference, too, gives a clip the same values beside any other."""
    reference, ours = audio_pair(name)
    bins, longest = ours.config.num_mel_bins, max(frames)
    features = torch.randn(len(frames), bins, longest, generator=seeded(longest))
    clips = [clip[:, :n] for clip, n in zip(features, frames)]
    out = ours(features, torch.tensor(frames))
    torch.testing.assert_close(out.embeds, hear(reference, clips), atol=1e-5, rtol=0)
    for clip, embeds in zip(clips, out.embeds.split(out.lengths)):
        torch.testing.assert_close(embeds, hear(reference, [clip]), atol=1e-5, rtol=0)
    if name == "tiny" and longest == 600:
        assert 0.3 < out.embeds.std() < 3


def test_audio_token_count() -> None:
    reference, _ = audio_pair("tiny")
    frames = torch.arange(1, 30_001)
    _, tokens = reference._get_feat_extract_output_lengths(frames)
    assert [num_whisper_tokens(n) for n in frames.tolist()] == tokens.tolist()


GRIDS = {
    "one_window": [(1, 6, 6)],
    "whole_windows": [(1, 24, 24)],
    "not_divisible": [(1, 18, 30), (1, 6, 42)],
    "video": [(4, 12, 18)],
    "images_and_videos": [(1, 6, 12), (3, 12, 30), (1, 6, 6), (2, 6, 18), (1, 30, 6), (1, 12, 30)],
}


@torch.no_grad()
@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", VISION)
def test_vision_encoder(name: str, grids: str) -> None:
    reference, ours = vision_pair(name)
    grid = torch.tensor(GRIDS[grids])
    width = ours.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(int(grid.prod(1).sum()), width, generator=seeded(1))
    out = ours(pixels, grid)
    torch.testing.assert_close(out.embeds, reference(pixels, grid).pooler_output, atol=1e-5, rtol=0)
    assert out.taps == [] and sum(out.lengths) == len(out.embeds)


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_reference() -> None:
    reference, ours = audio_pair("tiny")
    clip = torch.randn(128, 330, generator=seeded(0))
    exact = ours(clip[None], [330]).embeds
    rough = copy.deepcopy(ours).bfloat16()(clip[None], [330]).embeds.float()
    theirs = hear(copy.deepcopy(reference).bfloat16(), [clip]).float()
    assert (rough - exact).norm() < min(0.05 * exact.norm(), 1.5 * (theirs - exact).norm())

    reference, ours = vision_pair("tiny")
    pixels, grid = torch.randn(480, 1176, generator=seeded(0)), torch.tensor([[2, 12, 20]])
    exact = ours(pixels, grid).embeds
    rough = copy.deepcopy(ours).bfloat16()(pixels, grid).embeds.float()
    theirs = copy.deepcopy(reference).bfloat16()(pixels.bfloat16(), grid).pooler_output.float()
    assert (rough - exact).norm() < min(0.05 * exact.norm(), 1.5 * (theirs - exact).norm())


def test_names_of_the_reference_lead_to_our_modules_and_back() -> None:
    table = KEYS
    for part, hub, (reference, ours) in (
        ("audio_encoder.", "audio_tower.", audio_pair("tiny")),
        ("vision_encoder.", "visual.", vision_pair("tiny")),
    ):
        names = {part + name for name in ours.state_dict()}
        released = [f"thinker.{hub}{key}" for key in reference.state_dict()]
        assert {table.from_hub(key) for key in released} == names
        assert {table.to_hub(name) for name in names} == set(released)
        assert {table.from_hub(f"thinker.model.{hub}{key}") for key in reference.state_dict()} == names
    assert table.is_derived("thinker.visual.rotary_pos_emb.inv_freq")
    assert table.is_derived("thinker.audio_tower.positional_embedding.positional_embedding")
