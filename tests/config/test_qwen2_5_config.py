"""The second family's configuration: its own spellings in the file, the house's names in memory, released values."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from omni.config.model import OmniConfig
from omni.config.positions import PositionRule
from omni.config.qwen2_5_omni import Qwen2_5OmniConfig
from omni.config.qwen3_omni import Qwen3OmniConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("7b", "3b")


def load(size: str = "7b") -> dict[str, Any]:
    return json.loads((CONFIGS / f"qwen2_5_omni_{size}.json").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_files_are_written_back_as_they_were_read(size: str) -> None:
    values = load(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = OmniConfig.from_dict(values)
    assert isinstance(config, Qwen2_5OmniConfig)
    assert config.to_dict() == values, "nothing is added either"
    assert OmniConfig.from_dict(config.to_dict()) == config


def test_one_name_in_memory_for_both_spellings_of_the_file() -> None:
    values = load()
    c = OmniConfig.from_dict(values)
    thinker, talker = c.thinker_config, c.talker_config
    assert (thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id) == (151646, 151655, 151656)
    assert (talker.codec_pad_id, talker.codec_bos_id, talker.codec_eos_token_id) == (8292, 8293, 8294)
    assert talker.codec_stop_ids == {8292, 8294} and talker.num_codes == 8292 and talker.num_code_groups == 1
    assert talker.thinker_hidden_size == 3584 and talker.text_config.hidden_size == 896
    assert (c.tts_pad_token_id, c.tts_bos_token_id, c.tts_eos_token_id) == (151859, 151860, 151861)
    assert c.code2wav_config.to_dict() == values["token2wav_config"]
    values["thinker_config"]["audio_token_id"] = values["thinker_config"].pop("audio_token_index")
    again = OmniConfig.from_dict(values)
    assert again.thinker_config.audio_token_id == 151646
    assert again.to_dict() == values, "the spelling that was read is written"


@pytest.mark.parametrize(
    ("size", "heads", "section"), [("7b", (12, 4, 128), (16, 24, 24)), ("3b", (14, 2, 64), (16, 16, 0))]
)
def test_what_the_family_fixes_and_what_the_files_say(size: str, heads: tuple[int, int, int], section: Any) -> None:
    c = OmniConfig.from_pretrained(CONFIGS / f"qwen2_5_omni_{size}.json")
    for decoder in (c.thinker_config.text_config, c.talker_config.text_config):
        assert (decoder.qkv_bias, decoder.output_bias, decoder.qk_norm) == (True, False, False)
        assert not decoder.mrope_interleaved and not decoder.is_sparse(0) and decoder.theta == 1e6
    talker = c.talker_config
    assert (talker.num_attention_heads, talker.num_key_value_heads, talker.head_size) == heads
    assert talker.mrope_section == section and c.thinker_config.text_config.mrope_section == (16, 24, 24)
    rule = PositionRule(25, whole=True, chunk_s=2, joint_marks=True)
    assert c.thinker_config.position_rule == talker.position_rule == rule
    assert c.thinker_config.num_taps == 0 and c.has_talker


def test_the_first_family_keeps_its_rules() -> None:
    c = OmniConfig.from_pretrained(CONFIGS / "qwen3_omni_30b_a3b.json")
    text = c.thinker_config.text_config
    assert type(c) is Qwen3OmniConfig and c.thinker_config.position_rule == PositionRule(13)
    assert (text.qk_norm, text.qkv_bias, text.output_bias, text.mrope_interleaved) == (True, False, False, True)


def test_ids_of_a_small_vocabulary_and_own_voices_are_read_and_written() -> None:
    values = load()
    values.update(im_start_token_id=257, im_end_token_id=258)
    values["talker_config"]["speaker_id"] = {"mine": 300}
    config = OmniConfig.from_dict(values)
    assert config.im_start_token_id == 257 and config.talker_config.speaker_id == {"mine": 300}
    assert config.to_dict() == values


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("thinker_config", "audio_token_idex", 1, "audio_token_index"),
        ("talker_config", "tts_codec_pad_token", 1, "tts_codec_pad_token_id"),
        ("talker_config", "embedding_size", 16, "embedding_size 16"),
        ("talker_config", "tts_codec_end_token_id", 8448, "tts_codec_end_token_id 8448"),
        ("talker_config", "use_sliding_window", True, "use_sliding_window is not supported"),
        ("talker_config", "speaker_id", {"eve": -1}, "eve"),
        ("talker_config", "rope_scaling", {"mrope_section": [16, 24, 25]}, "mrope_section"),
        ("talker_config", "seconds_per_chunk", 0, "seconds_per_chunk must be positive"),
        ("thinker_config", "image_token_index", 151646, "must differ"),
        ("thinker_config", "audio_config", {"output_dim": 5}, "output_dim 5"),
    ],
)
def test_contradictions_are_refused(part: str, key: str, value: Any, message: str) -> None:
    values = copy.deepcopy(load())
    values[part][key] = value
    with pytest.raises(ValueError, match=message):
        OmniConfig.from_dict(values)


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_reads_what_is_written(size: str) -> None:
    from transformers import Qwen2_5OmniConfig as Reference

    config = OmniConfig.from_pretrained(CONFIGS / f"qwen2_5_omni_{size}.json")
    reference = Reference(**config.to_dict())
    ours, theirs = config.talker_config, reference.talker_config
    assert theirs.embedding_size == ours.thinker_hidden_size and theirs.audio_token_id == ours.audio_token_id
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert not reference.thinker_config.tie_word_embeddings
    # read back from the reference's own writing: rotary values in their newer spelling
    text = OmniConfig.from_dict(json.loads(reference.to_json_string())).thinker_config.text_config
    assert (text.theta, text.mrope_section) == (1e6, (16, 24, 24))
