"""What accelerate must not split stays on one device, whatever the devices hold."""

from __future__ import annotations

from pathlib import Path

import accelerate.utils
import pytest
import torch
from torch import nn

from omni import OmniConfig, OmniModel
from omni.checkpoint.placement import device_of, plan_devices
from omni.code2wav.bigvgan import AMPBlock
from omni.code2wav.dit import DiTBlock
from omni.code2wav.token2wav import Token2Wav
from omni.config.qwen2_5_omni import WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.config.token2wav import Token2WavConfig
from omni.encoders.audio import AudioLayer
from omni.encoders.contract import AudioEncoderContract, EncoderOutput
from omni.encoders.vision import VisionBlock
from omni.encoders.whisper_audio import WhisperAudioEncoder
from omni.encoders.window_vision import WindowVisionEncoder
from omni.layers.decoder_layer import DecoderLayer

ROOT = Path(__file__).parents[2]
AUDIO = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 16}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
DIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 6, "num_embeds": 20,
    "block_size": 4, "mel_dim": 5, "enc_emb_dim": 3, "enc_dim": 4, "enc_channels": [4, 4, 4, 8],
    "enc_kernel_sizes": [3, 3, 3, 1], "enc_dilations": [1, 2, 3, 1], "enc_attention_channels": 3, "enc_se_channels": 3,
    "max_position_embeddings": 120,
}  # fmt: skip
BIGVGAN = {"mel_dim": 5, "upsample_initial_channel": 8, "upsample_rates": [3, 2], "upsample_kernel_sizes": [7, 4]}


def second_family() -> nn.Module:
    """The parts of Qwen2.5-Omni that are not decoders, small."""
    return nn.ModuleDict(
        {
            "audio_encoder": WhisperAudioEncoder(WhisperAudioEncoderConfig.from_dict(AUDIO)),
            "vision_encoder": WindowVisionEncoder(WindowVisionEncoderConfig.from_dict(VISION)),
            "code2wav": Token2Wav(Token2WavConfig.from_dict({"dit_config": DIT, "bigvgan_config": BIGVGAN})),
        }
    )


def first_family() -> nn.Module:
    return OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "tiny.json"))


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a residual path, and modules that are called by methods beside `forward`, whose hooks do not run."""
    layers = (AudioLayer, VisionBlock, DecoderLayer, DiTBlock, AMPBlock)
    by_method = ("step", "condition", "code_logits")
    return {
        name: module
        for name, module in model.named_modules()
        if name not in ("", "thinker", "talker")  # their steps run layer by layer, each with its hook
        and (isinstance(module, layers) or any(callable(getattr(module, method, None)) for method in by_method))
    }


@pytest.mark.parametrize("family", [first_family, second_family])
def test_no_layer_and_no_stepped_part_is_split(family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family()
    whole = whole_modules(model)
    total = sum(p.numel() * 4 for p in model.parameters())
    used = set()
    for share in range(3, 100, 4):
        memory = {0: total * share // 100, 1: total * (100 - share) // 150, "cpu": 10 * total}
        monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, memory=memory, **__: memory)
        devices = plan_devices(model, "auto", torch.float32)
        used.add(len(set(devices.values())))
        for name, module in whole.items():
            places = {device_of(f"{name}.{key}", devices) for key, _ in module.named_parameters()}
            assert len(places) <= 1, f"{name} ({type(module).__name__}) lies on {places}"
    assert max(used) > 1, "nothing was spread"


def test_a_module_of_ones_own_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(nn.Module):
        keep_together = True

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    class Mine(AudioEncoderContract):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def num_tokens(self, length: int) -> int:
            return length

        def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> EncoderOutput:
            raise NotImplementedError

    for pair in (Pair(), Mine()):
        model = nn.ModuleDict({"pair": pair, "rest": nn.Linear(64, 64)})
        size = sum(p.numel() * 4 for p in pair.parameters())
        memory = {0: size * 3 // 4 + 64 * 65 * 4, 1: 4 * size, "cpu": 10 * size}
        monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, memory=memory, **__: memory)
        devices = plan_devices(model, "auto", torch.float32)
        assert len({device_of(f"pair.{key}", devices) for key, _ in pair.named_parameters()}) == 1
