"""What the items run: tiny models of both families, their processors and voices, and synthetic media.

A weight is drawn from a generator seeded by its name in the Hub's files, so neither the order in which modules are made
nor their names in the library change it. Only the items `weights.initial` look at how a new model is initialised.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.code2wav.voices import Voice
from omni.packaged.nano import nano_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, DEMO = ROOT / "configs", ROOT / "omni" / "packaged" / "toy_data"
NANO = ROOT / "omni" / "packaged" / "nano_data"
RELEASED = ROOT / "omni" / "processing" / "released"
FAMILIES = ("qwen3", "qwen2_5")
# The demo's spellings of the media tokens and those of the second family; the ids stay.
SPELLINGS = {
    "<|audio_pad|>": "<|AUDIO|>",
    "<|image_pad|>": "<|IMAGE|>",
    "<|video_pad|>": "<|VIDEO|>",
    "<|audio_start|>": "<|audio_bos|>",
    "<|audio_end|>": "<|audio_eos|>",
    "<|vision_start|>": "<|vision_bos|>",
    "<|vision_end|>": "<|vision_eos|>",
    "Qwen3OmniMoeProcessor": "Qwen2_5OmniProcessor",
}
MEDIA_IDS = {
    "audio_token_index": 275,
    "image_token_index": 265,
    "video_token_index": 266,
    "audio_start_token_id": 269,
    "audio_end_token_id": 270,
    "vision_start_token_id": 262,
    "vision_end_token_id": 263,
}
DIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "emb_dim": 6,
    "num_embeds": 20,
    "block_size": 4,
    "look_ahead_layers": [1],
    "look_backward_layers": [0, 2],
    "mel_dim": 5,
    "enc_emb_dim": 3,
    "enc_dim": 4,
    "enc_channels": [4, 4, 4, 8],
    "enc_kernel_sizes": [3, 3, 3, 1],
    "enc_dilations": [1, 2, 3, 1],
    "enc_attention_channels": 3,
    "enc_se_channels": 3,
    "max_position_embeddings": 120,
}
BIGVGAN = {
    "mel_dim": 5,
    "upsample_initial_channel": 8,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 2, 1]],
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [7, 4],
}


def _decoder(width: int, heads: int, **sizes: Any) -> dict[str, Any]:
    """Sizes of a dense decoder of two layers with heads of 8 channels."""
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 1, 1], "rope_type": "default"},
        **sizes,
    }


def second_values() -> dict[str, Any]:
    """`config.json` of a tiny second family: the released keys, the demo's token ids, small sizes."""
    values = json.loads((CONFIGS / "qwen2_5_omni_7b.json").read_text(encoding="utf-8"))
    thinker, talker = values["thinker_config"], values["talker_config"]
    values.update(im_start_token_id=257, im_end_token_id=258, system_token_id=276, user_token_id=277)
    values.update(assistant_token_id=278, dtype="float32")
    values["token2wav_config"] = {"dit_config": DIT, "bigvgan_config": BIGVGAN}
    thinker.update(MEDIA_IDS, user_token_id=277)
    thinker["text_config"].update(_decoder(32, 4, vocab_size=640))
    thinker["audio_config"].update(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, d_model=32)
    thinker["audio_config"].update(n_window=20, output_dim=32)
    thinker["vision_config"].update(depth=2, hidden_size=32, intermediate_size=44, num_heads=4, out_hidden_size=32)
    thinker["vision_config"].update(fullatt_block_indexes=[1])
    talker.update(MEDIA_IDS, **_decoder(16, 2, head_dim=8, vocab_size=96, embedding_size=32))
    talker.update(tts_codec_start_token_id=81, tts_codec_end_token_id=82, tts_codec_pad_token_id=80)
    talker.update(tts_codec_mask_token_id=84, tts_text_pad_token_id=309, tts_text_start_token_id=310)
    talker.update(tts_text_end_token_id=311, speaker_id={"ann": 300, "bob": 301})
    for part in (thinker["text_config"], talker):
        del part["rope_theta"], part["rope_scaling"]
    return values


def tiny_config(family: str) -> OmniConfig:
    """The config of a family's tiny model."""
    if family == "qwen3":
        return OmniConfig.from_pretrained(CONFIGS / "tiny.json")
    return OmniConfig.from_dict(second_values())


def write_processor(family: str, folder: Path) -> Path:
    """A family's processor files around the demo's tokenizer; the second family's get its token spellings."""
    folder.mkdir(parents=True, exist_ok=True)
    released = "qwen3_omni_moe" if family == "qwen3" else "qwen2_5_omni"
    shutil.copy(RELEASED / f"{released}.json", folder / "preprocessor_config.json")
    if family == "qwen3":
        shutil.copy(RELEASED / "chat_template.jinja", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (DEMO / name).read_text(encoding="utf-8")
        if family != "qwen3":
            for theirs, own in SPELLINGS.items():
                text = text.replace(theirs, own)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@cache
def processor_of(family: str) -> OmniProcessor:
    """A family's processor, the same object at each call."""
    with tempfile.TemporaryDirectory() as folder:
        return OmniProcessor.from_pretrained(write_processor(family, Path(folder)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_ids(high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 ids from 0 to high - 1."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill(model: OmniModel, noise: float = 0.0) -> OmniModel:
    """Draw all weights, far enough from uniform that choices depend on what was read; `noise` adds to the matrices."""
    for name, weight in model.named_parameters():
        seed = zlib.crc32(model.key_table.to_hub(name).encode())
        values = draw(*weight.shape, seed=seed)
        if weight.dim() < 2:
            weight.add_(0.1 * values)
            continue
        inputs = weight.shape[-1] if ".experts." in name else weight[0].numel()
        gains = {"code2wav.bigvgan": 0.5, "code2wav.decoder": 0.6, "code2wav": 1.0, "": 2.0}
        gain = next(value for prefix, value in gains.items() if name.startswith(prefix))
        weight.copy_(gain * values / math.sqrt(inputs))
        if noise:
            weight.add_(noise * draw(*weight.shape, seed=seed + 1) / math.sqrt(inputs))
    return model


def build(family: str, noise: float = 0.0) -> OmniModel:
    """A new tiny model with its processor and voices."""
    torch.manual_seed(0)
    model = fill(OmniModel(tiny_config(family)), noise)
    model.processor = processor_of(family)
    if family == "qwen2_5":
        with torch.no_grad():
            model.talker.codec_head.weight[[80, 82]] = 0  # greedy speech goes on to its limit
        model.voices = {
            name: Voice(draw(1, 3, seed=token), draw(1, 9, 5, seed=token), token)
            for name, token in (("Ann", 300), ("bob", 301))
        }
    return model


@cache
def tiny(family: str) -> OmniModel:
    """A family's tiny model, shared by all items that leave it as it is."""
    return build(family)


@cache
def nano() -> OmniModel:
    """The packaged trained model."""
    return nano_model()


def sound(seconds: float, seed: int = 0, rate_hz: int = 16000) -> Tensor:
    """A rising tone in noise, fp32 [n]."""
    samples = int(seconds * rate_hz)
    time_s = torch.arange(samples) / rate_hz
    return 0.2 * torch.sin(900 * time_s * (1 + time_s + seed)) + 0.03 * draw(samples, seed=seed)


def picture(height: int, width: int, seed: int = 0) -> Any:
    """A random picture, uint8 array [height, width, 3]."""
    return draw_ids(256, height, width, 3, seed=seed).to(torch.uint8).numpy()


def chat(*content: Any, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation of one user turn: a text, or a list of items."""
    given = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": given}]
