"""Random tiny decoders of the second family's reference, the same in omni, and processor files of the family."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from build import once
from oracle import randomise

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = Path(__file__).parents[2] / "omni" / "packaged" / "toy_data"
SPECIAL = {"audio_token_index": 275, "image_token_index": 265, "video_token_index": 266, "audio_start_token_id": 269}
SPECIAL |= {"vision_start_token_id": 262, "audio_end_token_id": 270, "vision_end_token_id": 263}
# Tiny encoders.
AUDIO = {
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "num_hidden_layers": 2,
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


def config_values(seed: int) -> dict[str, Any]:
    """A tiny `config.json` of the family: released keys, random sizes."""
    rng = random.Random(seed)
    values = json.loads((CONFIGS / "qwen2_5_omni_7b.json").read_text())
    thinker, talker = values["thinker_config"], values["talker_config"]
    text = _decoder(rng)
    del text["head_dim"]  # the Thinker has none of its own
    values.update(im_start_token_id=257, im_end_token_id=258, user_token_id=277, assistant_token_id=278)
    values["dtype"] = "float32"
    thinker.update(**SPECIAL, audio_config=None, vision_config=None)
    talker.update(
        **SPECIAL, **_decoder(rng), vocab_size=96, embedding_size=text["hidden_size"],
        tts_codec_start_token_id=81, tts_codec_end_token_id=82, tts_codec_pad_token_id=80, tts_codec_mask_token_id=84,
        tts_text_start_token_id=310, tts_text_end_token_id=311, tts_text_pad_token_id=309,
        speaker_id={"eve": 300, "bob": 301},
    )  # fmt: skip
    thinker["text_config"].update(text, vocab_size=320)
    for decoder in (thinker["text_config"], talker):
        del decoder["rope_theta"], decoder["rope_scaling"]
    return values


@once
def reference_parts(seed: int) -> tuple[Any, Any]:
    """The reference's Thinker decoder with head, and its Talker: fp32, random weights, evaluation mode."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
        Qwen2_5OmniTalkerConfig,
        Qwen2_5OmniTextConfig,
    )

    values = copy.deepcopy(config_values(seed))
    text = Qwen2_5OmniTextConfig(**values["thinker_config"]["text_config"])
    thinker = torch.nn.Module()
    thinker.model = modeling.Qwen2_5OmniThinkerTextModel(text)
    thinker.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    talker = modeling.Qwen2_5OmniTalkerForConditionalGeneration(Qwen2_5OmniTalkerConfig(**values["talker_config"]))
    for number, part in enumerate((thinker, talker)):
        randomise(part.eval(), 10 * seed + number)
    return thinker, talker


@once
def converted_parts(seed: int) -> tuple[Any, Any]:
    """The same Thinker and Talker in omni, by way of the file's key names."""
    from omni.checkpoint.keys import QWEN2_5_OMNI
    from omni.config.qwen3_omni import OmniConfig
    from omni.talker.single_codebook import SingleCodebookTalker
    from omni.thinker.thinker import Thinker

    config = OmniConfig.from_dict(config_values(seed))
    parts = {"thinker": Thinker(config.thinker_config), "talker": SingleCodebookTalker(config.talker_config)}
    for (name, part), reference in zip(parts.items(), reference_parts(seed)):
        found = {QWEN2_5_OMNI.slot(f"{name}.{key}").name: value for key, value in reference.state_dict().items()}
        part.eval().load_state_dict({key.removeprefix(name + "."): value for key, value in found.items()})
    return parts["thinker"], parts["talker"]


@once
def rope_reference() -> Any:
    """The reference's position rules, on a model without weights."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

    model = modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration.__new__(
        modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    )
    torch.nn.Module.__init__(model)
    model.spatial_merge_size = 2
    model.config = SimpleNamespace(
        image_token_id=265, video_token_id=266, audio_token_id=275, vision_start_token_id=262,
        audio_start_token_id=269, position_id_per_seconds=25, seconds_per_chunk=2,
    )  # fmt: skip
    return model


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
    """Tokenizer, preprocessor and template files laid out as in the release, around the demo's vocabulary.

    The media tokens keep the demo's ids (`SPECIAL`) and get this family's spellings.
    """
    from omni.processing.families import QWEN2_5, QWEN3, RELEASED

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (DEMO / name).read_text(encoding="utf-8")
        for key, own in QWEN2_5.tokens.items():
            text = text.replace(QWEN3.tokens[key], own)
        text = text.replace(QWEN3.processor_class, QWEN2_5.processor_class)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(RELEASED / "qwen2_5_omni.json", folder / "preprocessor_config.json")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder
