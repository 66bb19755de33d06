"""Configurations: strict reading, faithful writing, released values."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from omni.config.model import OmniConfig
from omni.config.reading import PASSIVE_KEYS

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str = "tiny") -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def at(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        values = values[parent]
    return values, key


def contained(inner: Any, outer: Any) -> bool:
    if isinstance(inner, dict):
        return all(key in outer and contained(value, outer[key]) for key, value in inner.items())
    return inner == outer


@pytest.mark.parametrize("name", ["tiny", "bench", "qwen3_omni_30b_a3b"])
def test_files_are_written_back_as_they_were_read(name: str) -> None:
    values = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = OmniConfig.from_dict(values)
    assert contained(values, config.to_dict())
    assert OmniConfig.from_dict(config.to_dict()) == config


def test_released_values_that_differ_from_the_reference_defaults() -> None:
    c = OmniConfig.from_pretrained(CONFIGS / "qwen3_omni_30b_a3b.json")
    assert c.talker_config is not None and c.code2wav_config is not None
    assert c.talker_config.text_config.num_experts_per_tok == 6
    assert c.talker_config.accept_hidden_layer == 24
    assert c.talker_config.num_code_groups == 16
    assert c.talker_config.code_predictor_config.theta == 1e6
    assert c.thinker_config.position_id_per_seconds == 13
    assert c.thinker_config.text_config.head_size == 128
    assert c.thinker_config.text_config.mrope_section == (24, 20, 20)
    assert c.code2wav_config.hop_length == 1920
    assert (c.code2wav_config.theta, c.code2wav_config.rms_norm_eps) == (10000, 1e-5)


def test_both_spellings_of_rotary_values_mean_the_same() -> None:
    old = load()
    new = load()
    text = new["thinker_config"]["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    a, b = (OmniConfig.from_dict(v).thinker_config.text_config for v in (old, new))
    assert (a.theta, a.mrope_section) == (b.theta, b.mrope_section)
    assert "rope_parameters" in b.to_dict() and "rope_scaling" not in b.to_dict()


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("enable_audio_ouput", "enable_audio_output"),
        ("thinker_config.text_config.hiden_size", "hidden_size"),
        ("thinker_config.text_config.num_expert", "num_experts"),
        ("thinker_config.audio_config.n_windows", "n_window"),
        ("talker_config.speaker_ids", "speaker_id"),
        ("code2wav_config.upsample_rate", "upsample_rates"),
    ],
)
def test_misspelt_key_is_refused_with_the_right_name(path: str, right: str) -> None:
    values = load()
    parent, key = at(values, path)
    parent[key] = 1
    with pytest.raises(ValueError, match=rf"{path}.*{right}"):
        OmniConfig.from_dict(values)


def test_unknown_key_is_kept_and_warned_about_once() -> None:
    values = load()
    values["thinker_config"]["my_trainer_flag"] = {"a": [1]}
    with pytest.warns(UserWarning, match="my_trainer_flag"):
        config = OmniConfig.from_dict(values)
    assert config.to_dict()["thinker_config"]["my_trainer_flag"] == {"a": [1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OmniConfig.from_dict(values)


def test_no_known_harmless_key_reads_as_a_misspelling() -> None:
    values = load()
    for part in (values, values["thinker_config"], values["talker_config"], values["code2wav_config"]):
        part.update({key: part.get(key) for key in PASSIVE_KEYS})
    OmniConfig.from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("thinker_config.text_config.hidden_size", "32", "must be of type int"),
        ("thinker_config.text_config.num_attention_heads", 5, "not a multiple"),
        ("thinker_config.text_config.num_experts_per_tok", 9, "num_experts_per_tok 9"),
        ("thinker_config.text_config.rope_scaling", {"mrope_section": [1, 1, 1]}, "mrope_section"),
        ("thinker_config.text_config.rope_scaling", {"rope_type": "yarn", "mrope_section": [4, 2, 2]}, "yarn"),
        ("thinker_config.text_config.rope_scaling", {"mrope_section": 4}, "mrope_section must be a list of integers"),
        ("thinker_config.text_config.rope_scaling", {"mrope_section": "abc"}, "mrope_section must be a list"),
        (
            "thinker_config.text_config.rope_scaling",
            {"rope_theta": "1e6"},
            r"rope_scaling\.rope_theta must be a positive",
        ),
        ("thinker_config.text_config.rope_theta", 0, "rope_theta must be a positive number, got 0"),
        ("thinker_config.text_config.rms_norm_eps", float("nan"), "rms_norm_eps must be a finite number"),
        ("thinker_config.text_config.rms_norm_eps", -1e-6, "rms_norm_eps must not be negative"),
        ("thinker_config.text_config.intermediate_size", 0, "intermediate_size must be positive"),
        ("thinker_config.text_config.hidden_act", "gelu", "hidden_act"),
        ("thinker_config.image_token_id", 275, "must differ from each other"),
        ("thinker_config.audio_token_id", -1, "audio_token_id must not be negative"),
        ("thinker_config.audio_config.encoder_layers", -1, "encoder_layers must not be negative"),
        ("thinker_config.vision_config.rope_parameters", {"rope_theta": -1}, "rope_theta must be a positive number"),
        ("thinker_config.audio_config.output_dim", 33, "output_dim 33"),
        ("thinker_config.audio_config.n_window_infer", 50, "n_window_infer 50"),
        ("thinker_config.vision_config.deepstack_visual_indexes", [0, 7], "deepstack_visual_indexes"),
        ("thinker_config.vision_config.num_position_embeddings", 65, "square"),
        ("thinker_config.vision_config", [], "must be a JSON object"),
        ("talker_config.accept_hidden_layer", 5, "accept_hidden_layer 5"),
        ("talker_config.num_code_groups", 5, "num_code_groups 5"),
        ("talker_config.codec_eos_token_id", 99999, "codec_eos_token_id 99999"),
        ("talker_config.speaker_id", {"eve": 99999}, "eve"),
        ("talker_config.thinker_hidden_size", 16, "thinker_hidden_size 16"),
        ("talker_config.position_id_per_seconds", 0, "position_id_per_seconds must be positive"),
        ("talker_config.text_config.shared_expert_intermediate_size", -1, "must not be negative"),
        ("talker_config.code_predictor_config.vocab_size", 0, "vocab_size must be positive"),
        ("code2wav_config.codebook_size", 8, "codebook_size is 8"),
        ("code2wav_config.decoder_dim", 33, "decoder_dim 33"),
        ("talker_config", None, "enable_audio_output"),
        ("model_type", "llama", "llama"),
    ],
)
def test_contradictions_are_refused(path: str, value: Any, message: str) -> None:
    values = copy.deepcopy(load())
    parent, key = at(values, path)
    parent[key] = value
    with pytest.raises(ValueError, match=message):
        OmniConfig.from_dict(values)


def test_a_window_inside_a_frame_of_residual_codes_is_refused() -> None:
    values = load()
    mtp = values["talker_config"]["code_predictor_config"]
    mtp.update(sliding_window=2, layer_types=["sliding_attention"] * mtp["num_hidden_layers"])
    with pytest.raises(ValueError, match="sliding_window of 2"):
        OmniConfig.from_dict(values)
    mtp["sliding_window"] = mtp["num_code_groups"]  # wide enough to change nothing
    OmniConfig.from_dict(values)


def test_a_key_that_is_not_text_is_refused() -> None:
    with pytest.raises(ValueError, match="keys must be text"):
        OmniConfig.from_dict({**load(), 1: 2})  # type: ignore[dict-item]


def test_text_only_variants_need_no_talker() -> None:
    values = load()
    del values["talker_config"], values["code2wav_config"]
    values["enable_audio_output"] = False
    assert not OmniConfig.from_dict(values).has_talker
    values["thinker_config"]["vision_config"] = None  # a captioner: audio only
    assert OmniConfig.from_dict(values).thinker_config.num_taps == 0


def test_replace_names_the_right_field() -> None:
    config = OmniConfig.from_dict(load())
    with pytest.raises(ValueError, match="im_end_token_id"):
        config.replace(im_end_tokn_id=3)
    assert config.replace(im_end_token_id=3).im_end_token_id == 3


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        OmniConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        OmniConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)  # nested deeper than the parser goes
    with pytest.raises(ValueError, match="not valid JSON"):
        OmniConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        OmniConfig.from_pretrained(tmp_path)


def test_a_router_is_written_where_one_is_named() -> None:
    values = load()
    text = OmniConfig.from_dict(values).thinker_config.text_config
    assert text.router is None and "router" not in text.to_dict()
    values["thinker_config"]["text_config"]["router"] = "mine"
    named = OmniConfig.from_dict(values)
    assert named.to_dict()["thinker_config"]["text_config"]["router"] == "mine"
    assert named.talker_config is not None and named.talker_config.text_config.router is None
    values["thinker_config"]["text_config"]["router"] = 3
    with pytest.raises(ValueError, match=r"thinker_config\.text_config\.router must be of type str, got 3"):
        OmniConfig.from_dict(values)
