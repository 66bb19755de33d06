"""Writes the model that training starts from: config.json, the tokenizer of the small world, and the processor's files.

    python recipes/nano/make_model.py FOLDER

There are no weights yet: the first stage draws them. Shapes and ids that are not named here are those of the packaged
toy (`omni/packaged/toy_data`), whose special tokens this tokenizer shares.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from world import SPOKEN, vocabulary

from omni.config.family import RELEASED
from omni.packaged.toy import TOY_DATA

FIRST_WORD_ID = 280  # below are bytes, special tokens and the names of roles
VOCABULARY_SIZE = 832
NUM_CODEBOOKS, CODEBOOK_SIZE = 8, 256
PATCH = 32  # pixels: with 16 a video frame would be 144 tokens
PICTURE_SIDE = 192  # pixels: 9 tokens, one a cell of the world's 3 x 3; it has learnt no other size or shape
FRAME_SIDE = 384  # of a video frame: 131072 pixels or more in whole tokens, as released
CODEC_CONTROL_IDS = 1024  # the Talker's vocabulary: codes, then this many control ids

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_ROPE = {"rope_scaling": {"interleaved": True, "mrope_interleaved": True, "mrope_section": [12, 10, 10],
                          "rope_type": "default", "type": "default"}}  # fmt: skip
SHAPES: dict[str, Any] = {
    "dtype": "bfloat16",
    "thinker_config": {
        "text_config": {
            "vocab_size": VOCABULARY_SIZE, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512,
            "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 2048,
            **_ATTENTION, **_ROPE,
        },
        "audio_config": {
            "d_model": 192, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 768,
            "downsample_hidden_size": 48, "output_dim": 256,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 96, "num_heads": 4, "intermediate_size": 384, "out_hidden_size": 256,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2], "patch_size": PATCH,
            "spatial_patch_size": PATCH,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 4, "num_code_groups": NUM_CODEBOOKS, "thinker_hidden_size": 256,
        "codec_pad_id": CODEBOOK_SIZE + 100, "codec_bos_id": CODEBOOK_SIZE + 101,
        "codec_eos_token_id": CODEBOOK_SIZE + 102, "codec_nothink_id": CODEBOOK_SIZE + 107,
        "codec_think_bos_id": CODEBOOK_SIZE + 108, "codec_think_eos_id": CODEBOOK_SIZE + 109,
        "speaker_id": {"slt": CODEBOOK_SIZE + 62},  # the row that the packaged weights learnt
        "text_config": {
            "vocab_size": CODEBOOK_SIZE + CODEC_CONTROL_IDS, "hidden_size": 256, "num_hidden_layers": 4,
            "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 256, "max_position_embeddings": 2048, **_ATTENTION, **_ROPE,
        },
        "code_predictor_config": {
            "vocab_size": CODEBOOK_SIZE, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512,
            "num_code_groups": NUM_CODEBOOKS, "max_position_embeddings": 64, **_ATTENTION,
        },
    },
    "code2wav_config": {
        "codebook_size": CODEBOOK_SIZE, "num_quantizers": NUM_CODEBOOKS, "hidden_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 512, "sliding_window": 8,
        "decoder_dim": 128, "upsample_rates": [5, 4, 4, 3, 2],
    },
}  # fmt: skip
GENERATION = {
    "do_sample": False,
    "talker_max_new_tokens": 150,
    "talker_do_sample": False,
    "talker_repetition_penalty": 1.0,
    "code_predictor_do_sample": False,
    "speakable_words": sorted(SPOKEN),  # a model that can say any text has no such list
}


def nano_config() -> dict[str, Any]:
    """config.json of omni-nano."""
    return _merged(json.loads((TOY_DATA / "config.json").read_text(encoding="utf-8")), SHAPES)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with the changes. The table of voices is replaced: those of the base are not in this model."""
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) and k != "speaker_id" else v
            for k, v in changes.items()}  # fmt: skip
    return base | both


def nano_tokenizer() -> dict[str, Any]:
    """tokenizer.json: every word of the world is one token, with and without a space before it; other text is bytes.

    Letters are made small, so that it does not matter how a question is typed.
    """
    tokenizer = json.loads((TOY_DATA / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    words = [piece for word in vocabulary() for piece in _pieces(word)]
    known = {token: id for token, id in model["vocab"].items() if id < FIRST_WORD_ID}
    fresh = [word for word in dict.fromkeys(words) if word not in known]
    known |= {word: FIRST_WORD_ID + place for place, word in enumerate(fresh)}
    if len(known) > VOCABULARY_SIZE:
        raise ValueError(f"{len(known)} tokens do not fit into {VOCABULARY_SIZE}")
    tokenizer["model"] = model | {"vocab": known, "merges": [], "ignore_merges": True}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    return tokenizer


def _pieces(word: str) -> list[str]:
    """What the pre-tokenizer makes of a word, first in a text and behind a space ("Ġ" in a byte-level vocabulary)."""
    head, mark, tail = word.partition("'")
    return [head, f"Ġ{head}"] + ([mark + tail] if mark else [])


def make_model(folder: Path) -> None:
    """Write the folder anew."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RELEASED / "chat_template.jinja", folder / "chat_template.jinja")
    released = json.loads((RELEASED / "qwen3_omni_moe.json").read_text(encoding="utf-8"))
    picture_pixels = PICTURE_SIDE * PICTURE_SIDE  # for transformers, which does not know a size; it keeps the shape
    settings = json.loads((TOY_DATA / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    files = {
        "config.json": nano_config(),
        "preprocessor_config.json": {
            **released, "patch_size": PATCH, "min_pixels": picture_pixels, "max_pixels": picture_pixels,
            "resized_height": PICTURE_SIDE, "resized_width": PICTURE_SIDE,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor", "patch_size": PATCH,
            **{name: released[name] for name in ("image_mean", "image_std", "merge_size", "temporal_patch_size")},
            "resized_height": FRAME_SIDE, "resized_width": FRAME_SIDE,
        },
        "tokenizer.json": nano_tokenizer(),
        "tokenizer_config.json": settings,
        "generation_config.json": GENERATION,
    }  # fmt: skip
    for name, values in files.items():
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make_model(parser.parse_args().folder)


if __name__ == "__main__":
    main()
