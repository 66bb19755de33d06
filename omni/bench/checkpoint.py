"""Random models in the shape of a config file, and the checkpoint folder that both sides load.

The special token ids are those of the packaged tokenizer, whatever the config's own are, so that prompts can be written
for any config. Random weights have the right shapes, which is all that speed depends on; their experts are chosen
nearly evenly, the most bytes that a router can ask for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omni.code2wav.voices import Voice
from omni.config.model import OmniConfig
from omni.config.reading import read_json
from omni.model import OmniModel
from omni.packaged.toy import TOY_DATA
from omni.processing.inputs import OmniInputs

CONFIGS = Path(__file__).parents[2] / "configs"
NEWLINE = 10  # of the packaged tokenizer
_SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
_SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def config_path(name: str) -> Path:
    """A config file of the source checkout's `configs/`. Raises FileNotFoundError when omni is installed without it."""
    path = CONFIGS / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run from a source checkout, or name another with --config")
    return path


def read_config(path: Path, changes: Mapping[str, Any] | None = None) -> OmniConfig:
    """A config file with the packaged tokenizer's ids and with `changes` (nested) made to it.

    Raises FileNotFoundError or ValueError for a file that is no such config, ValueError for one that cannot speak.
    """
    if path.is_dir():
        path = path / "config.json"
    config = OmniConfig.from_dict(read_json(path))
    values = config.to_dict()
    if config.talker_config is None or config.code2wav_config is None:
        raise ValueError(f"{path} describes a model without speech; `omni bench` needs a Talker and a codec decoder")
    return OmniConfig.from_dict(merged(merged(values, _token_ids(values)), changes or {}))


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """The packaged config's special token ids, for the keys that both have."""
    demo = read_json(TOY_DATA / "config.json")
    out: dict[str, Any] = {key: value for key, value in demo.items() if key.endswith("_token_id") and key in values}
    for part in ("thinker_config", "talker_config"):
        ids = {key: demo[part][key] for key in demo[part] if key.endswith("_token_id") and "codec" not in key}
        out[part] = {key: value for key, value in ids.items() if key in values[part]}
    return out


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested values with others in their places."""
    out = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if nested else copy.deepcopy(value)
    return out


def only(part: str, path: Path, thinker_layers: int = 1) -> OmniConfig:
    """A config whose `part` (thinker, mtp, code2wav) is that of the file, and the rest as small as it can be.

    The Thinker is cut to `thinker_layers` layers and to a small vocabulary. Raises ValueError for a model of one
    codebook.
    """
    whole = read_config(path)
    if whole.talker_config is None or whole.talker_config.num_code_groups < 2:
        raise ValueError(f"{path}: full-size parts are measured on models with experts and residual codes")
    width = whole.thinker.text_config.hidden_size if part == "thinker" else 64
    text: dict[str, Any] = {"num_hidden_layers": thinker_layers, "vocab_size": 8192}
    if part != "thinker":
        text = {"num_hidden_layers": 1, "vocab_size": 640, "hidden_size": width, **_SMALL_EXPERTS, **_SMALL_HEADS}
    changes: dict[str, Any] = {
        "thinker_config": {
            "text_config": text,
            "audio_config": {
                "encoder_layers": 1,
                "d_model": 64,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "downsample_hidden_size": 8,
                "output_dim": width,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "num_heads": 4,
                "intermediate_size": 64,
                "out_hidden_size": width,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        },
        "talker_config": {
            "thinker_hidden_size": width,
            "accept_hidden_layer": 1,
            "text_config": {
                "num_hidden_layers": 1,
                "shared_expert_intermediate_size": 16,
                **_SMALL_EXPERTS,
                **_SMALL_HEADS,
            },
        },
    }
    if part != "mtp":
        changes["talker_config"]["text_config"]["hidden_size"] = 64
        small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, **_SMALL_HEADS}
        changes["talker_config"]["code_predictor_config"] = {**small, "layer_types": ["full_attention"]}
    if part != "code2wav":
        codec = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "decoder_dim": 32}
        changes["code2wav_config"] = {**codec, "num_attention_heads": 4, "num_key_value_heads": 4}
    return read_config(path, changes)


def random_model(config: OmniConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> OmniModel:
    """A model with random weights, built where it is to live; the same at each call on one device."""
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = OmniModel(config)
    finally:
        torch.set_default_dtype(default)
    _widen(model)
    if model.code2wav is not None and model.code2wav.needs_voice:
        speakers = model.require("talker").config.speaker_id or {}
        model.voices = {name: random_voice(model, token) for name, token in speakers.items()}
    return model


def random_voice(model: OmniModel, token: int) -> Voice:
    """Two seconds of noise as somebody's voice; token: begins a reply in it."""
    codec: Any = model.code2wav
    sizes = codec.config.dit_config
    return Voice(torch.randn(1, sizes.enc_emb_dim), torch.randn(1, 200, sizes.mel_dim), token)


@torch.no_grad()
def _widen(model: OmniModel) -> None:
    """Scale the matrices so that choices are far from uniform and sound is neither silent nor clipped.

    A greedy reply never ends by itself: the heads of the two stop ids are zero, and something else is always likelier.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if name.startswith("code2wav."):
            fan_in = 1.0 if "embedding" in name else float(parameter[0].numel())
            parameter.normal_(std=(1.0 if "embedding" in name else 0.6) / fan_in**0.5)
        elif name.startswith(("thinker.", "talker.")):
            parameter.mul_(max(1.0, 56 / parameter.shape[-1] ** 0.5))  # from 0.02 to about 1.1 / sqrt(fan-in)
    model.require("thinker").lm_head.weight[model.config.im_end_token_id] = 0
    talker = model.require("talker")
    talker.codec_head.weight[sorted(talker.config.codec_stop_ids)] = 0


def write_checkpoint(config: OmniConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of that config -> `folder`."""
    random_model(config, torch.device("cpu"), dtype).save_pretrained(folder)
    return folder


def prompt(config: OmniConfig, tokens: int, rows: int = 1, seed: int = 0) -> OmniInputs:
    """Questions of `tokens` ids in all, chat frame included (at least 9), without padding."""
    text = max(1, tokens - 8)
    words = torch.randint(30, 200, (rows, text), generator=torch.Generator().manual_seed(seed))
    head = [config.im_start_token_id, config.user_token_id, NEWLINE]
    tail = [config.im_end_token_id, NEWLINE, config.im_start_token_id, config.assistant_token_id, NEWLINE]
    frame = [torch.tensor([ids] * rows) for ids in (head, tail)]
    return OmniInputs(input_ids=torch.cat((frame[0], words, frame[1]), dim=1))


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
