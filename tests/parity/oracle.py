"""Random tiny models of the reference (transformers), on which every parity test compares.

Every parameter is drawn so that none hides at its initial value; Code2Wav's are scaled so that few samples clip,
else the waveform comparison is ill-conditioned. Weights and prompts are the same whatever OMNI_TEST_SEED is: on some
the reference fails, for example where a reply ends at once.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from build import once

TINY = json.loads((Path(__file__).parents[2] / "configs" / "tiny.json").read_text())


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in ("rope_scaling", "speaker_id"):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _rope(section: list[int], theta: float = 1e6) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": {"mrope_section": section, "rope_type": "default"}}


def _width(thinker: int, talker: int) -> dict[str, Any]:
    """Change the widths of the Thinker and the Talker consistently."""
    return {
        "thinker_config": {
            "text_config": {"hidden_size": thinker},
            "audio_config": {"output_dim": thinker},
            "vision_config": {"out_hidden_size": thinker},
        },
        "talker_config": {
            "thinker_hidden_size": thinker,
            "text_config": {"hidden_size": talker},
            "code_predictor_config": {"hidden_size": talker},
        },
    }


def _thinker(text: Any = None, audio: Any = None, vision: Any = None, **rest: Any) -> dict[str, Any]:
    return {
        "thinker_config": {
            "text_config": text or {},
            "audio_config": audio or {},
            "vision_config": vision or {},
            **rest,
        }
    }


def _talker(text: Any = None, mtp: Any = None, **rest: Any) -> dict[str, Any]:
    return {"talker_config": {"text_config": text or {}, "code_predictor_config": mtp or {}, **rest}}


KV1 = {"num_key_value_heads": 1}

# name -> changes to configs/tiny.json: odd depths, one key-value head, few or no taps, other windows, other widths
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "tiny": [],
    "wide": [_width(48, 40)],
    "one_kv_head": [_thinker(KV1), _talker(KV1, KV1)],
    "odd_depth": [
        _thinker({"num_hidden_layers": 5}, {"encoder_layers": 3}, {"depth": 5, "deepstack_visual_indexes": [0, 2, 4]}),
        _talker({"num_hidden_layers": 1}, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}),
        {"talker_config": {"accept_hidden_layer": 4}, "code2wav_config": {"num_hidden_layers": 1}},
    ],
    "one_tap": [_thinker(vision={"deepstack_visual_indexes": [1]}), {"talker_config": {"accept_hidden_layer": 2}}],
    "short_window": [_thinker(audio={"n_window_infer": 100}), {"code2wav_config": {"sliding_window": 3}}],
    "other_chunk": [_thinker(audio={"n_window": 51, "n_window_infer": 408})],
    "last_layer": [{"talker_config": {"accept_hidden_layer": 4}}],  # the states after the final norm
    "first_layer": [{"talker_config": {"accept_hidden_layer": 1}}],  # before its DeepStack tap is added
    "many_codes": [
        _talker({"vocab_size": 1024 + 96}, {"num_code_groups": 7, "vocab_size": 80}, num_code_groups=7),
        {"code2wav_config": {"num_quantizers": 7, "codebook_size": 96}},
        {"code2wav_config": {"upsample_rates": [4, 3], "upsampling_ratios": [2]}},
    ],
    "other_heads": [
        _thinker({"num_attention_heads": 2, "head_dim": 24, **_rope([4, 4, 4], 5e5), "norm_topk_prob": False}),
        _talker({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, **_rope([2, 1, 1], 1e4)}),
    ],
    "mixed_mlp": [_thinker({"mlp_only_layers": [1]}), _talker({"decoder_sparse_step": 2, "num_experts_per_tok": 3})],
}  # fmt: skip


def reference_config(name: str = "tiny") -> dict[str, Any]:
    """The `config.json` values of a variant."""
    values = TINY
    for changes in VARIANTS[name]:
        values = _merge(values, changes)
    return values


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: gains near one, the rest 0.25 randn; Code2Wav by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.startswith("code2wav.") and "norm" not in name:
            fan_in = p[0].numel() if p.dim() > 1 else 1
            if "code_embedding" in name:
                value = noise
            elif p.dim() > 1:
                value = 0.6 * noise / fan_in**0.5
            elif name.endswith(("alpha", "beta", "bias")):
                value = 0.1 * noise
            else:
                value = 0.5 + 0.1 * noise  # layer scales and gamma
        elif p.dim() == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = 0.25 * noise
        p.copy_(value)


def reference_model(name: str = "tiny", seed: int = 0) -> Any:
    """A complete reference model with random weights, fp32, in evaluation mode; built once."""
    return _reference_model(name, seed)


@once
def _reference_model(name: str, seed: int) -> Any:
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    config = Qwen3OmniMoeConfig(**copy.deepcopy(reference_config(name)))
    model = Qwen3OmniMoeForConditionalGeneration(config).eval()
    randomise(model, seed)
    # The reference's Talker borrows the Thinker's position code, which reads an audio_config that it lacks.
    model.talker.config.audio_config = config.thinker_config.audio_config
    return model


def converted_model(name: str = "tiny", seed: int = 0) -> Any:
    """The same model in omni, by way of the checkpoint that the reference writes; built once."""
    return _converted_model(name, seed)


@once
def _converted_model(name: str, seed: int) -> Any:
    from omni import OmniModel

    reference = reference_model(name, seed)
    lent = reference.talker.config.__dict__.pop("audio_config")  # not the Talker's: keep it out of the file
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        reference.talker.config.audio_config = lent
        return OmniModel.from_pretrained(folder, device="cpu")


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, absolutely or relative to the largest value where that exceeds one."""
    assert ours.shape == expected.shape
    error = (ours - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error <= tolerance, f"error {error:.2e} exceeds {tolerance:.0e}"


class Conversation:
    """One random prompt in the reference's own format: chat ids with media placeholders, and their features."""

    def __init__(self, name: str, seed: int) -> None:
        values = reference_config(name)
        self.thinker = values["thinker_config"]
        self.rng = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []
        self.audio: list[torch.Tensor] = []
        self.images: list[tuple[torch.Tensor, list[int]]] = []
        self.videos: list[tuple[torch.Tensor, list[int], float]] = []

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.rng))

    def turn(self, role: int, *content: str, close: bool = True) -> Conversation:
        """Add a turn whose content names its items: text, audio_clip, image, video, av."""
        self.ids += [257, role, 10]
        for item in content:
            getattr(self, item)()
        if close:
            self.ids += [258, 10]
        return self

    def user(self, *content: str) -> Conversation:
        return self.turn(277, *content)

    def system(self) -> Conversation:
        return self.turn(276, "text")

    def assistant(self, *content: str) -> Conversation:
        return self.turn(278, *content)

    def ask(self) -> Conversation:
        """Open the assistant's turn."""
        return self.turn(278, close=False)

    def text(self) -> None:
        self.ids += [self.number(30, 200) for _ in range(self.number(2, 7))]

    def _mel(self) -> int:
        frames = self.number(100, 260)  # the reference's values of shorter clips depend on their neighbours
        self.audio.append(torch.randn(self.thinker["audio_config"]["num_mel_bins"], frames, generator=self.rng))
        from omni.encoders.audio import num_audio_tokens

        return num_audio_tokens(frames, 2 * self.thinker["audio_config"]["n_window"])

    def _pixels(self, grid: list[int]) -> torch.Tensor:
        return torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 16 * 16, generator=self.rng)

    def audio_clip(self) -> None:
        self.ids += [269, *[275] * self._mel(), 270]

    def image(self) -> None:
        grid = [1, 2 * self.number(1, 3), 2 * self.number(1, 3)]
        self.images.append((self._pixels(grid), grid))
        self.ids += [262, *[265] * (grid[1] * grid[2] // 4), 263]

    def _video(self) -> list[int]:
        grid = [self.number(1, 3), 2 * self.number(1, 2), 2 * self.number(1, 2)]
        self.videos.append((self._pixels(grid), grid, [0.5, 1.0, 2.0][self.number(0, 2)]))
        return grid

    def video(self) -> None:
        grid = self._video()
        self.ids += [262, *[266] * (grid[0] * grid[1] * grid[2] // 4), 263]

    def av(self) -> None:
        from omni.rope.positions import Audio, AudioVideo, MediaTokens, Video, placeholder_ids

        grid = self._video()
        times = tuple(i * self.videos[-1][2] for i in range(grid[0]))
        segment = AudioVideo(Video(times, grid[1] // 2, grid[2] // 2), Audio(self._mel()))
        tokens = MediaTokens(275, 265, 266, 269, 262)
        rate = self.thinker["position_id_per_seconds"]
        self.ids += [262, 269, *placeholder_ids(segment, tokens, rate), 270, 263]


def batch(conversations: list[Conversation]) -> dict[str, torch.Tensor]:
    """Left-padded keyword arguments of the reference's `generate`; OmniInputs takes them as they are."""
    width = max(len(c.ids) for c in conversations)
    padding = [width - len(c.ids) for c in conversations]
    out = {
        "input_ids": torch.tensor([[256] * n + c.ids for n, c in zip(padding, conversations)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(c.ids) for n, c in zip(padding, conversations)]),
    }
    audio = [a for c in conversations for a in c.audio]
    if audio:
        longest = max(a.shape[1] for a in audio)
        out["input_features"] = torch.stack([torch.nn.functional.pad(a, (0, longest - a.shape[1])) for a in audio])
        lengths = torch.tensor([a.shape[1] for a in audio])
        out["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    images = [i for c in conversations for i in c.images]
    if images:
        out["pixel_values"] = torch.cat([pixels for pixels, _ in images])
        out["image_grid_thw"] = torch.tensor([grid for _, grid in images])
    videos = [v for c in conversations for v in c.videos]
    if videos:
        out["pixel_values_videos"] = torch.cat([pixels for pixels, _, _ in videos])
        out["video_grid_thw"] = torch.tensor([grid for _, grid, _ in videos])
        out["video_second_per_grid"] = torch.tensor([seconds for _, _, seconds in videos])
    return out
