"""Writes the model that all parts of the next omni-nano start from: config, tokenizer, the processor's files, weights.

    python recipes/nano/make_start.py FOLDER

The Thinker's embeddings are `tokens.vectors` and stay so, its head is tied to them, and every other weight is drawn
once, so that parts which are trained apart fit together. Shapes and ids that are not named here are those of the
packaged toy (`omni/packaged/toy_data`), whose special tokens the tokenizer shares.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import tokens
import torch
from name_things import VISION
from seeing_data import FRAME_SIDE, MAX_PIXELS, MIN_PIXELS
from torch import nn

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.config.family import RELEASED
from omni.encoders.audio import AudioEncoder
from omni.packaged.toy import TOY_DATA

NUM_CODEBOOKS, CODEBOOK_SIZE = 8, 512
CODEC_CONTROL_IDS = 1024  # the Talker's vocabulary: codes, then this many control ids
VOICES = ("heart", "oak")
_TALKER_WIDTH = 256
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_ROPE = {"rope_scaling": {"interleaved": True, "mrope_interleaved": True, "mrope_section": [12, 10, 10],
                          "rope_type": "default", "type": "default"}}  # fmt: skip
SHAPES: dict[str, Any] = {
    "dtype": "bfloat16",
    "thinker_config": {
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": tokens.SIZE, "hidden_size": tokens.WIDTH, "num_hidden_layers": 6, "intermediate_size": 640,
            "moe_intermediate_size": 224, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 4096,
            **_ATTENTION, **_ROPE,
        },
        "audio_config": {
            "d_model": 256, "encoder_layers": 6, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024,
            "downsample_hidden_size": 48, "output_dim": tokens.WIDTH,
        },
        "vision_config": VISION,
    },
    "talker_config": {
        "accept_hidden_layer": 4, "num_code_groups": NUM_CODEBOOKS, "thinker_hidden_size": tokens.WIDTH,
        "codec_pad_id": CODEBOOK_SIZE, "codec_bos_id": CODEBOOK_SIZE + 1, "codec_eos_token_id": CODEBOOK_SIZE + 2,
        "codec_nothink_id": CODEBOOK_SIZE + 3, "codec_think_bos_id": CODEBOOK_SIZE + 4,
        "codec_think_eos_id": CODEBOOK_SIZE + 5,
        "speaker_id": {name: CODEBOOK_SIZE + 8 + place for place, name in enumerate(VOICES)},
        "text_config": {
            "vocab_size": CODEBOOK_SIZE + CODEC_CONTROL_IDS, "hidden_size": _TALKER_WIDTH, "num_hidden_layers": 4,
            "intermediate_size": 256, "moe_intermediate_size": 112, "num_experts": 4, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 256, "max_position_embeddings": 4096, **_ATTENTION, **_ROPE,
        },
        "code_predictor_config": {
            "vocab_size": CODEBOOK_SIZE, "hidden_size": _TALKER_WIDTH, "num_hidden_layers": 2,
            "intermediate_size": 256, "num_code_groups": NUM_CODEBOOKS, "max_position_embeddings": 64, **_ATTENTION,
        },
    },
    "code2wav_config": {
        "codebook_size": CODEBOOK_SIZE, "num_quantizers": NUM_CODEBOOKS, "hidden_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 512, "sliding_window": 16,
        "decoder_dim": 192, "upsample_rates": [5, 4, 4, 3, 2],
    },
}  # fmt: skip
GENERATION = {
    "do_sample": False,
    "talker_max_new_tokens": 400,
    "talker_do_sample": False,
    "talker_repetition_penalty": 1.0,
    "code_predictor_do_sample": False,
}
_CONTENT = 2.0  # of the audio encoder's first convolutions: what is heard beside the waves of position
_HEARD = 0.6  # of the map from there to a token
_BRANCH = 0.4  # of what a layer adds to what it read


def start_config() -> dict[str, Any]:
    """config.json of omni-nano."""
    return _merged(json.loads((TOY_DATA / "config.json").read_text(encoding="utf-8")), SHAPES)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with the changes. The table of voices is replaced: those of the base are not in this model."""
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) and k != "speaker_id" else v
            for k, v in changes.items()}  # fmt: skip
    return base | both


def write_files(folder: Path) -> None:
    """All files but the weights, anew."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RELEASED / "chat_template.jinja", folder / "chat_template.jinja")
    shutil.copyfile(tokens.FILE, folder / "tokenizer.json")
    released = json.loads((RELEASED / "qwen3_omni_moe.json").read_text(encoding="utf-8"))
    settings = json.loads((TOY_DATA / "tokenizer_config.json").read_text(encoding="utf-8"))
    patch = SHAPES["thinker_config"]["vision_config"]["patch_size"]
    files = {
        "config.json": start_config(),
        "preprocessor_config.json": {
            **released, "patch_size": patch, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor", "patch_size": patch,
            **{name: released[name] for name in ("image_mean", "image_std", "merge_size", "temporal_patch_size")},
            "resized_height": FRAME_SIDE, "resized_width": FRAME_SIDE,
        },
        "tokenizer_config.json": settings | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096},
        "generation_config.json": GENERATION,
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def draw_hearing(encoder: AudioEncoder) -> None:
    """Draw the audio encoder by its fan-in: the config's 0.02 is for wide layers, and at this width a sound would be
    drowned by the waves of position that are added to it."""
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for convolution in (encoder.conv2d1, encoder.conv2d2, encoder.conv2d3):
        convolution.weight.mul_(_CONTENT)
    encoder.conv_out.weight.mul_(_HEARD)
    for layer in encoder.layers:
        layer.self_attn.out_proj.weight.mul_(_BRANCH)
        layer.fc2.weight.mul_(_BRANCH)


def make_start(folder: Path) -> OmniModel:
    """Write the folder anew and return its model, fp32."""
    write_files(folder)
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(folder))
    with torch.no_grad():
        model.thinker.embed_tokens.weight.copy_(tokens.vectors())
    assert isinstance(model.audio_encoder, AudioEncoder)
    draw_hearing(model.audio_encoder)
    model.processor = OmniProcessor.from_pretrained(folder)
    model.generation_config = dict(GENERATION)
    model.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make_start(parser.parse_args().folder)


if __name__ == "__main__":
    main()
