"""Token2Wav against the reference on random tiny models: each part, the ODE from fixed noise, the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import once, seeded
from oracle import assert_close
from torch import Tensor

from omni.checkpoint.keys import KeyTable
from omni.code2wav.block_attention import block_mask
from omni.code2wav.ode_sampler import ODEConfig, integrate, time_grid
from omni.code2wav.token2wav import Token2Wav
from omni.code2wav.voices import Voice
from omni.config.qwen2_5_omni import QWEN2_5_OMNI
from omni.config.token2wav import Token2WavConfig

KEYS = KeyTable.of(QWEN2_5_OMNI)

DIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "ff_mult": 2,
    "emb_dim": 12,
    "num_embeds": 40,
    "repeats": 2,
    "block_size": 8,
    "look_ahead_layers": [1],
    "look_backward_layers": [0, 2],
    "mel_dim": 10,
    "dropout": 0.1,
    "enc_emb_dim": 6,
    "enc_dim": 8,
    "enc_channels": [8, 8, 8, 8, 24],
    "enc_kernel_sizes": [5, 3, 3, 3, 1],
    "enc_dilations": [1, 2, 3, 4, 1],
    "enc_attention_channels": 5,
    "enc_res2net_scale": 2,
    "enc_se_channels": 6,
    "max_position_embeddings": 256,
}
BIGVGAN: dict[str, Any] = {
    "mel_dim": 10,
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [7, 4],
}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": ({}, {}),
    "one_repeat": ({"repeats": 1, "block_size": 5, "look_ahead_layers": [0, 2], "num_attention_heads": 3}, {}),
    "other_encoder": (
        {"enc_channels": [12, 12, 12, 24], "enc_kernel_sizes": [3, 5, 3, 3], "enc_dilations": [2, 1, 2, 1]}
        | {"enc_res2net_scale": 4, "look_ahead_layers": []}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[2, 1, 4]]},
    ),
    "released_rates": (
        {"num_hidden_layers": 2, "block_size": 24, "repeats": 2},
        {"upsample_initial_channel": 64, "upsample_rates": [5, 3, 2, 2, 2, 2]}
        | {"upsample_kernel_sizes": [11, 7, 4, 4, 4, 4], "resblock_kernel_sizes": [3, 11]}
        | {"resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]]},
    ),
    "three_repeats": (
        {"repeats": 3, "block_size": 6, "look_backward_layers": [1], "look_ahead_layers": [0, 1], "hidden_size": 48}
        | {"num_attention_heads": 3, "ff_mult": 3, "enc_res2net_scale": 8},
        {"upsample_rates": [4], "upsample_kernel_sizes": [8]},
    ),
    "deep": (
        {"num_hidden_layers": 6, "head_dim": 8, "num_attention_heads": 4, "look_ahead_layers": [2, 5], "enc_dim": 4}
        | {"look_backward_layers": [], "emb_dim": 7, "enc_emb_dim": 3},
        {"upsample_initial_channel": 24, "upsample_rates": [2, 2, 2], "upsample_kernel_sizes": [4, 4, 4]}
        | {"resblock_kernel_sizes": [5, 3], "resblock_dilation_sizes": [[1, 2, 3], [2, 4, 8]]},
    ),
}  # fmt: skip


def values(name: str) -> dict[str, Any]:
    dit, bigvgan = CONFIGS[name]
    return {"dit_config": {**DIT, **dit}, "bigvgan_config": {**BIGVGAN, **bigvgan}}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """No parameter hides, and few samples clip."""
    generator = seeded(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1 and "embed" not in name.split(".")[-2]:
            gain = 0.3 if "bigvgan" in name else 0.8
            noise = gain * noise / p[0].numel() ** 0.5
        elif p.dim() == 1:
            noise = 0.1 * noise
        p.copy_(noise)


@once
def pair(name: str) -> tuple[Any, Token2Wav]:
    """The reference and ours with the same random weights, by way of the checkpoint's names."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

    reference = Qwen2_5OmniToken2WavModel(Qwen2_5OmniToken2WavConfig(**values(name))).eval()
    randomise(reference, seed=len(name))
    ours = Token2Wav(Token2WavConfig.from_dict(values(name))).eval()
    theirs = {f"token2wav.{key}": value for key, value in reference.state_dict().items()}
    named = {KEYS.from_hub(key): value for key, value in theirs.items() if not KEYS.is_derived(key)}
    ours.load_state_dict({str(key).removeprefix("code2wav."): value for key, value in named.items()})
    return reference, ours


class Draw:
    """Random inputs of a model, the same for both sides."""

    def __init__(self, name: str, codes: int, rows: int = 1) -> None:
        rng = seeded(codes)
        sizes = values(name)["dit_config"]
        self.codes = torch.randint(0, sizes["num_embeds"] + 1, (rows, codes), generator=rng)
        frames = codes * sizes["repeats"]
        self.noise, self.ref_mel, self.cond = (
            torch.randn(rows, *shape, generator=rng)
            for shape in ((frames, sizes["mel_dim"]), (23, sizes["mel_dim"]), (sizes["enc_emb_dim"],))
        )
        self.time = torch.rand(rows, generator=rng)

    @property
    def voice(self) -> Voice:
        return Voice(self.cond[:1], self.ref_mel[:1])


def reference_sample(reference: Any, draw: Draw, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    """The reference's mel [B, N, M], its global noise replaced by ours."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: draw.noise.clone())
        return reference.code2wav_dit_model.sample(draw.cond, draw.ref_mel, draw.codes, **settings).transpose(1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_one_name_on_either_side(name: str) -> None:
    reference, ours = pair(name)
    theirs = {f"token2wav.{key}" for key in reference.state_dict()}
    assert {KEYS.to_hub(f"code2wav.{key}") for key in ours.state_dict()} == theirs


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [5, 40])
def test_speaker_encoder(name: str, frames: int) -> None:
    reference, ours = pair(name)
    mel = torch.randn(2, frames, 10, generator=seeded(frames))
    for x in (mel, torch.zeros_like(mel)):
        expected = reference.code2wav_dit_model.input_embed.spk_encoder(x)
        assert_close(ours.dit.encode_reference(x), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("codes", [1, 7, 12])
def test_dit_forward(name: str, codes: int) -> None:
    """With and without guidance, blocks full and not."""
    reference, ours = pair(name)
    draw = Draw(name, codes, rows=2)
    given = {
        "hidden_states": draw.noise,
        "condition_vector": draw.ref_mel,
        "speaker_embedding": draw.cond[:, None].expand(-1, draw.noise.shape[1], -1),
        "quantized_code": draw.codes,
        "time_step": draw.time,
    }
    steered, free = reference.code2wav_dit_model(**given, apply_cfg=True).chunk(2)
    encoded = ours.dit.encode_reference(draw.ref_mel)
    condition = ours.dit.condition(draw.codes, draw.cond, encoded)
    assert_close(ours.dit(draw.noise, draw.time, condition), steered, 1e-5)
    zeros = ours.dit.encode_reference(torch.zeros_like(draw.ref_mel))
    null = ours.dit.condition(torch.zeros_like(draw.codes), torch.zeros_like(draw.cond), zeros)
    assert_close(ours.dit(draw.noise, draw.time, null), free, 1e-5)
    assert (steered - free).abs().max() > 0.01, "the condition should matter"


def test_block_mask() -> None:
    reference, _ = pair("tiny")
    difference = reference.code2wav_dit_model._create_block_diff(torch.zeros(1, 21, 32))[0, 0]
    for back, ahead in ((0, 0), (1, 0), (0, 1), (1, 1)):
        assert torch.equal(block_mask(21, 8, back, ahead), (difference >= -back) & (difference <= ahead))


def test_solver_and_time_grid() -> None:
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

    times = time_grid(7, -1.0)
    start = torch.tensor([[0.3, -1.2]])

    def slope(t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(3 * t) * x + t - x

    expected = RungeKutta4ODESolver(slope, start).integrate(times)[-1]
    torch.testing.assert_close(integrate(slope, start, times), expected, atol=1e-6, rtol=0)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {}),
    ("other_encoder", {"guidance_scale": 0.0, "num_steps": 4}),
    ("one_repeat", {"num_steps": 3, "guidance_scale": 2.0, "sway_coefficient": None}),
    ("released_rates", {"num_steps": 5, "sway_coefficient": 0.5}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_sampled_mel(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ours = pair(name)
    draw = Draw(name, codes=13)
    expected = reference_sample(reference, draw, monkeypatch, **settings)
    mel = ours.sample_mel(draw.codes, draw.voice, noise=draw.noise, ode=ODEConfig(**settings))
    assert_close(mel, expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [1, 12])
def test_vocoder(name: str, frames: int) -> None:
    """Of mels that reach beyond both ends of the level that it clips to."""
    reference, ours = pair(name)
    mel = 5 * torch.randn(2, frames, 10, generator=seeded(frames)) - 4
    expected = reference.code2wav_bigvgan_model(mel.transpose(1, 2)).view(2, -1)
    assert (expected.abs() == 1).float().mean() < 0.05, "a clipped waveform would hide differences"
    assert_close(ours.vocode(mel), expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("name", "num_steps"), [("tiny", 10), ("other_encoder", 3), ("released_rates", 3)])
def test_waveform(name: str, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ours = pair(name)
    draw = Draw(name, codes=15)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: draw.noise.clone())
        expected = reference(draw.codes, draw.cond, draw.ref_mel, num_steps=num_steps)
    ode = ODEConfig(num_steps=num_steps)
    samples = ours(draw.codes[:, None], draw.voice, noise=draw.noise, ode=ode)
    assert samples.shape == (1, ours.hop_length * 15)
    assert expected.abs().max() > 1e-3  # a thousand times what may differ
    assert_close(samples[0], expected, 1e-6)
    assert torch.equal(ours(draw.codes[0], draw.voice, noise=draw.noise, ode=ode), samples[0])


def test_released_sizes() -> None:
    """The reference's defaults are the release's; counted without memory."""
    from omni.layers.init import MetaBuild

    with MetaBuild():
        ours = Token2Wav(Token2WavConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()}
    assert count == {"dit": 333_607_760, "bigvgan": 115_443_504}
    assert sum(p.numel() for p in ours.dit.speaker_encoder.parameters()) == 1_729_280
