"""What many test files are made of: seeds, tiny models of both families, processor files, voices, sounds, pictures."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from omni import OmniConfig, OmniModel, OmniProcessor, SamplingConfig
from omni.code2wav.ode_sampler import ODEConfig
from omni.code2wav.token2wav import Token2Wav
from omni.code2wav.voices import Voice
from omni.config.family import RELEASED
from omni.config.qwen2_5_omni import QWEN2_5_OMNI
from omni.config.qwen3_omni import QWEN3_OMNI
from omni.config.token2wav import Token2WavConfig
from omni.packaged.toy import TOY_DATA

SEED = int(os.environ.get("OMNI_TEST_SEED") or 0)
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny.json"
GREEDY = SamplingConfig(temperature=0)
# Greedy speech that goes on: without the penalty a tiny Talker repeats one code.
PLAIN: dict[str, Any] = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "residual_sampling": GREEDY}
M = TypeVar("M", bound=nn.Module)


# ---- seeds ----


def seeded(number: int) -> torch.Generator:
    """A generator of its own, which OMNI_TEST_SEED changes too."""
    return torch.Generator().manual_seed(number + 1_000_000 * SEED)


@contextmanager
def fixed(seed: int = 0) -> Iterator[None]:
    """Draw from this seed inside, whatever OMNI_TEST_SEED is, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call it once for the same arguments; who asks first does not matter, and no later draw feels it."""

    @cache
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with fixed(SEED):
            return make(*args, **kwargs)

    return made


@torch.no_grad()
def draw(module: M, std: float = 0.3) -> M:
    """Every parameter at random, so that none hides at its initial value; in evaluation mode."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


@torch.no_grad()
def widen(module: M, factor: float, but: str = "code2wav") -> M:
    """Larger matrices, but those of one part: choices and routing differ between tokens, gradients outdo rounding."""
    for name, p in module.named_parameters():
        if p.dim() > 1 and not (but and name.startswith(but)):
            p.mul_(factor)
    return module


# ---- the first family ----


def tiny_config() -> OmniConfig:
    return OmniConfig.from_pretrained(TINY)


@fixed()
def tiny_model(*parts: str, widened: float = 10.0) -> OmniModel:
    """The tiny random model (or some parts), far enough from uniform that greedy choices differ, with its processor."""
    model = widen(OmniModel(tiny_config(), *([parts] if parts else [])), widened)
    model.processor = OmniProcessor.from_pretrained(TOY_DATA)
    return model


# ---- the second family ----

SPECIAL = {"audio_token_index": 275, "image_token_index": 265, "video_token_index": 266, "audio_start_token_id": 269}
SPECIAL |= {"vision_start_token_id": 262, "audio_end_token_id": 270, "vision_end_token_id": 263}
AUDIO = {
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "num_hidden_layers": 2,
    "num_mel_bins": 128,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4, "fullatt_block_indexes": [1]}


def _decoder(rng: random.Random) -> dict[str, Any]:
    head_dim, kv = rng.choice((8, 16, 24)), rng.choice((1, 2))
    heads = kv * rng.choice((1, 2, 3))
    first, second = sorted((rng.randint(0, head_dim // 2), rng.randint(0, head_dim // 2)))
    section = [first, second - first, head_dim // 2 - second]  # any, also an axis without pairs
    rope = {"rope_theta": rng.choice((1e4, 1e6)), "mrope_section": section, "rope_type": "default"}
    return {
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.choice((24, 40)),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "head_dim": head_dim,
    }


def config_values(
    seed: int, audio: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, vocabulary: int = 320
) -> dict[str, Any]:
    """A tiny `config.json` of the family: released keys, random sizes; the encoders that are given, as wide as it."""
    rng = random.Random(seed)
    values = json.loads((CONFIGS / "qwen2_5_omni_7b.json").read_text())
    thinker, talker = values["thinker_config"], values["talker_config"]
    text = _decoder(rng)
    del text["head_dim"]  # the Thinker has none of its own
    width = text["hidden_size"]
    values.update(im_start_token_id=257, im_end_token_id=258, user_token_id=277, assistant_token_id=278)
    values["dtype"] = "float32"
    thinker.update(**SPECIAL)
    thinker["audio_config"] = None if audio is None else {**AUDIO, "output_dim": width, **audio}
    thinker["vision_config"] = None if vision is None else {**VISION, "out_hidden_size": width, **vision}
    talker.update(
        **SPECIAL, **_decoder(rng), vocab_size=96, embedding_size=width,
        tts_codec_start_token_id=81, tts_codec_end_token_id=82, tts_codec_pad_token_id=80, tts_codec_mask_token_id=84,
        tts_text_start_token_id=310, tts_text_end_token_id=311, tts_text_pad_token_id=309,
        speaker_id={"eve": 300, "bob": 301},
    )  # fmt: skip
    thinker["text_config"].update(text, vocab_size=vocabulary)
    for decoder in (thinker["text_config"], talker):
        del decoder["rope_theta"], decoder["rope_scaling"]
    return values


# Of the family's own style: a default system text, and its spellings of the media tokens.
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'audio' -%}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
{%- elif item.type == 'image' -%}{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}
{%- elif item.type == 'video' -%}{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}
{%- else -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def write_processor(folder: Path) -> Path:
    """Tokenizer, preprocessor and template files laid out as in the release, around the toy's vocabulary.

    The media tokens keep the toy's ids (`SPECIAL`) and get this family's spellings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (TOY_DATA / name).read_text(encoding="utf-8")
        for key, own in QWEN2_5_OMNI.tokens.items():
            text = text.replace(QWEN3_OMNI.tokens[key], own)
        text = text.replace(QWEN3_OMNI.processor_class, QWEN2_5_OMNI.processor_class)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(RELEASED / "qwen2_5_omni.json", folder / "preprocessor_config.json")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


# A codec of 12 samples a code: two mel frames a code, 6 samples a frame.
SIZES: dict[str, Any] = {
    "dit_config": {
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
    },
    "bigvgan_config": {
        "mel_dim": 5,
        "upsample_initial_channel": 8,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 2, 1]],
        "upsample_rates": [3, 2],
        "upsample_kernel_sizes": [7, 4],
    },
}
FAST = ODEConfig(num_steps=3, solver="euler")


@torch.no_grad()
def draw_token2wav(module: M, gain: float = 1.0) -> M:
    """Every parameter by fan-in; half as large in the vocoder, which else magnifies rounding."""
    for name, p in module.named_parameters():
        scale = gain * (0.5 if "bigvgan" in name else 1.0)
        p.copy_(scale * torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1 * torch.randn_like(p))
    return module


def make_token2wav(seed: int = 0) -> Token2Wav:
    with fixed(seed):
        return draw_token2wav(Token2Wav(Token2WavConfig.from_dict(SIZES)).eval())


def make_voice(seed: int = 0, frames: int = 9) -> Voice:
    rng = seeded(seed)
    return Voice(torch.randn(1, 3, generator=rng), torch.randn(1, frames, 5, generator=rng), 7)


def second_config() -> OmniConfig:
    """A config of the second family with a codec that speaks, two voices and the toy's vocabulary."""
    values = {**config_values(1, vocabulary=640), "token2wav_config": SIZES, "system_token_id": 276}
    values["talker_config"]["speaker_id"] = {"ann": 300, "bob": 301}
    return OmniConfig.from_dict(values)


@torch.no_grad()
@fixed(1)
def second_model() -> OmniModel:
    """A random model of the second family whose greedy speech goes on to its limit, with its processor."""
    model = widen(OmniModel(second_config()), 10)
    draw_token2wav(model.code2wav)
    model.talker.codec_head.weight[[80, 82]] = 0
    model.processor = OmniProcessor.from_pretrained(TOY_DATA)
    model.voices = {"Ann": make_voice(1), "bob": make_voice(2)}
    for name, token in (("Ann", 300), ("bob", 301)):
        object.__setattr__(model.voices[name], "bos_token", token)
    return model


@contextmanager
def saying(model: OmniModel, ids: Sequence[int]) -> Iterator[None]:
    """Every row of a batch says these ids, then stops: one set of logits for a prompt, one for each token read."""
    said = iter([*ids, *[258] * 99])

    def force(_: Any, __: Any, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([next(said)]), 1e4)

    hook = model.thinker.lm_head.register_forward_hook(force)
    try:
        yield
    finally:
        hook.remove()


# ---- conversations and media ----


def chat(*texts: Any) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Three prompts of unlike lengths.
BATCH = [chat("hi"), chat("a much longer question than the first one"), chat("three")]


def tone(seconds: float = 0.5, hz: float = 440.0, rate: int = 16000, level: float = 0.5) -> np.ndarray:
    """A sine, fp32 [n]."""
    return (level * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def noise(samples: int, seed: int = 0, level: float = 0.1) -> Tensor:
    """White noise, fp32 [n]."""
    return level * torch.randn(samples, generator=seeded(seed))


def speckle(*shape: int, seed: int = 0) -> np.ndarray:
    """A picture [H, W, 3] or film [T, H, W, 3] of random bytes: shape without the 3."""
    return np.random.default_rng([SEED, seed]).integers(0, 256, (*shape, 3), dtype=np.uint8)


def sound_item(seconds: float) -> dict[str, Any]:
    return {"type": "audio", "audio": tone(seconds, level=1.0), "sampling_rate": 16000}


def picture_item(height: int = 64, width: int = 64) -> dict[str, Any]:
    return {"type": "image", "image": speckle(height, width)}


def speech_codes(frames: int, books: int = 4, size: int = 64) -> list[list[int]]:
    """Random codes of an answer [K][n]; as a rule of the tiny model's codebooks."""
    return torch.randint(0, size, (books, frames), generator=seeded(frames)).tolist()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest: one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
