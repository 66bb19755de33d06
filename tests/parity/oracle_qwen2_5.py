"""Random tiny decoders of the second family's reference, and the same in omni."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from build import config_values, once
from oracle import randomise


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
    from omni.checkpoint.keys import KeyTable
    from omni.config.qwen2_5_omni import QWEN2_5_OMNI

    KEYS = KeyTable.of(QWEN2_5_OMNI)
    from omni.config.model import OmniConfig
    from omni.talker.single_codebook import SingleCodebookTalker
    from omni.thinker.thinker import Thinker

    config = OmniConfig.from_dict(config_values(seed))
    parts = {"thinker": Thinker(config.thinker_config), "talker": SingleCodebookTalker(config.talker_config)}
    for (name, part), reference in zip(parts.items(), reference_parts(seed)):
        found = {KEYS.slot(f"{name}.{key}").name: value for key, value in reference.state_dict().items()}
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
