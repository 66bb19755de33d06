"""Code2Wav against the reference on random tiny models, and where the reference differs on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import once, seeded
from oracle import randomise
from torch import Tensor

from omni.code2wav.code2wav import Code2Wav
from omni.config.qwen3_omni import Code2WavConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "released_rates": {"codebook_size": 64, "num_quantizers": 4, "hidden_size": 32, "decoder_dim": 32},
    "many_codebooks": {"num_quantizers": 16, "upsample_rates": [4, 3], "upsampling_ratios": [2], "sliding_window": 3},
    "one_layer": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "decoder_dim": 48},
    "one_kv_head": {"num_key_value_heads": 1, "upsample_rates": [3, 5, 2], "upsampling_ratios": [2, 3]},
    "wide_window": {"sliding_window": 72, "num_hidden_layers": 3, "upsample_rates": [4], "upsampling_ratios": [2]},
    "biased": {"attention_bias": True, "rms_norm_eps": 1e-3, "upsample_rates": [2, 2], "upsampling_ratios": []},
}


def values(name: str) -> dict[str, Any]:
    base = {
        "codebook_size": 32,
        "num_quantizers": 3,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "sliding_window": 6,
        "decoder_dim": 16,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
    }
    return {**base, **CONFIGS[name]}


@once
def pair(name: str, strict_causal: bool = False) -> tuple[Any, Code2Wav]:
    """The reference and ours with the same random weights."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

    reference = Qwen3OmniMoeCode2Wav(Qwen3OmniMoeCode2WavConfig(**values(name))).eval()
    randomise(torch.nn.ModuleDict({"code2wav": reference}), seed=len(name))
    ours = Code2Wav(Code2WavConfig.from_dict(values(name)), strict_causal=strict_causal).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def draw(name: str, frames: int) -> Tensor:
    shape = (2, values(name)["num_quantizers"], frames)
    return torch.randint(0, values(name)["codebook_size"], shape, generator=seeded(frames))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [1, 2, 5, 26])
def test_waveform(name: str, frames: int) -> None:
    reference, ours = pair(name)
    codes = draw(name, frames)
    if values(name)["upsampling_ratios"] == [] and frames == 1:
        frames, codes = 3, draw(name, 3)  # one frame is shorter than what the reference trims
    expected = reference(codes)[:, 0]
    assert (expected.abs() == 1).float().mean() < 0.05, "a clipped waveform would hide differences"
    samples = ours(codes)
    assert samples.shape[1] == ours.hop_length * frames - ours.lookahead
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_waveform(name: str) -> None:
    reference, ours = pair(name)
    codes = draw(name, 12)
    expected = reference(codes)[:, 0]
    for sizes in ([1] * 12, [3, 1, 8], [12]):
        state = ours.init_state(2)
        streamed = torch.cat([ours.step(piece, state) for piece in codes.split(sizes, dim=2)], 1)
        torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_window_over_many_frames() -> None:
    """More frames than one block of queries, and many windows deep."""
    reference, ours = pair("wide_window")
    codes = draw("wide_window", 700)
    expected = reference(codes)[:, 0]
    torch.testing.assert_close(ours(codes), expected, atol=1e-5, rtol=0)
    with torch.enable_grad():  # in one piece
        torch.testing.assert_close(ours(codes).detach(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_strict_causal_mode_is_the_reference_555_samples_later() -> None:
    reference, strict = pair("released_rates", strict_causal=True)
    codes = draw("released_rates", 8)
    early, late = reference(codes)[:, 0], strict(codes)
    assert early.shape[1] == 1920 * 8 - 555 and late.shape[1] == 1920 * 8
    settled = 3 * 1920
    assert (early - late[:, 555:])[:, :settled].abs().max() > 1e-5
    torch.testing.assert_close(early[:, settled:], late[:, 555 + settled :], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_references_chunked_decoding_loses_samples_at_seams_and_ours_does_not() -> None:
    reference, ours = pair("released_rates")
    codes = draw("released_rates", 40)
    whole = reference(codes)[:, 0]
    chunked = reference.chunked_decode(codes, chunk_size=20, left_context_size=5)[:, 0]
    assert chunked.shape[1] == whole.shape[1] - 555
    state = ours.init_state(2)
    streamed = torch.cat([ours.step(piece, state) for piece in codes.split(20, dim=2)], 1)
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["released_rates", "many_codebooks"])
def test_bf16_is_as_near_to_fp32_as_the_reference(name: str) -> None:
    import copy

    reference, ours = pair(name)
    codes = draw(name, 10)
    exact = ours(codes)
    rough = copy.deepcopy(ours).bfloat16()(codes).float()
    theirs = copy.deepcopy(reference).bfloat16()(codes)[:, 0].float()
    assert (rough - exact).norm() < 0.05 * exact.norm()
    assert (rough - exact).norm() < 1.5 * (theirs - exact).norm()
