"""Keys of released files that this library does not read: silent, and written back; values that are spelled twice."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from build import CONFIGS

from omni import OmniConfig, OmniModel

QWEN3, QWEN2_5 = "qwen3_omni_30b_a3b", "qwen2_5_omni_7b"
HARMLESS = [
    (QWEN3, "thinker_config.audio_config.num_hidden_layers", 32),
    (QWEN3, "thinker_config.audio_config.tie_word_embeddings", True),
    (QWEN3, "thinker_config.vision_config.in_chans", 3),
    (QWEN3, "thinker_config.vision_config.tie_word_embeddings", True),
    (QWEN3, "code2wav_config.tie_word_embeddings", True),
    (QWEN2_5, "talker_config.use_mrope", False),
    (QWEN2_5, "thinker_config.use_mrope", False),
    (QWEN2_5, "thinker_config.text_config.use_mrope", False),
    (QWEN2_5, "thinker_config.vision_token_id", 151654),
    (QWEN2_5, "thinker_config.audio_config.encoder_layerdrop", 0.0),
    (QWEN2_5, "thinker_config.audio_config.tie_word_embeddings", True),
    (QWEN2_5, "thinker_config.vision_config.tie_word_embeddings", True),
    (QWEN2_5, "token2wav_config.tie_word_embeddings", True),
    (QWEN2_5, "token2wav_config.bigvgan_config.tie_word_embeddings", True),
    (QWEN2_5, "token2wav_config.dit_config.tie_word_embeddings", True),
]


def values_of(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def place(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        values = values[parent]
    return values, key


def read_quietly(values: dict[str, Any]) -> OmniConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return OmniConfig.from_dict(values)


@pytest.mark.parametrize(("name", "path", "value"), HARMLESS)
def test_harmless_keys_are_silent_and_written_back(
    name: str, path: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.config.reading._warned", set())
    values = values_of(name)
    parent, key = place(values, path)
    parent[key] = value
    parent, key = place(read_quietly(values).to_dict(), path)
    assert parent[key] == value


def test_what_transformers_writes_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key that its config classes give to any part."""
    from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig

    monkeypatch.setattr("omni.config.reading._warned", set())
    for name, peer in ((QWEN3, Qwen3OmniMoeConfig), (QWEN2_5, Qwen2_5OmniConfig)):
        written = peer(**values_of(name)).to_dict()
        config = read_quietly(written)
        assert read_quietly(config.to_dict()) == config


def test_a_key_that_nobody_knows_still_warns() -> None:
    values = values_of(QWEN3)
    values["thinker_config"]["vision_config"]["my_own"] = 1
    with pytest.warns(UserWarning, match="my_own"):
        OmniConfig.from_dict(values)


TWICE = [
    (QWEN2_5, "token2wav_config.dit_config.heads", "num_attention_heads"),
    (QWEN2_5, "token2wav_config.dit_config.dim", "hidden_size"),
    (QWEN2_5, "token2wav_config.dit_config.depth", "num_hidden_layers"),
    (QWEN3, "thinker_config.text_config.num_local_experts", "num_experts"),
]


@pytest.mark.parametrize(("name", "path", "usual"), TWICE)
@pytest.mark.parametrize("first", [True, False])
def test_both_spellings_are_written_back(name: str, path: str, usual: str, first: bool) -> None:
    values = values_of(name)
    parent, other = place(values, path)
    value = parent.pop(usual, None) or parent.pop(other)
    parent.pop(other, None)
    pair = {other: value, usual: value} if first else {usual: value, other: value}
    parent.update(pair)
    config = OmniConfig.from_dict(values)
    saved, _ = place(config.to_dict(), path)
    assert saved[other] == saved[usual] == value
    assert OmniConfig.from_dict(config.to_dict()) == config
    del parent[usual]
    alone, _ = place(OmniConfig.from_dict(values).to_dict(), path)
    assert alone[other] == value and usual not in alone
    parent[usual] = value + 1
    with pytest.raises(ValueError, match="contradicts its other spelling"):
        OmniConfig.from_dict(values)


def test_a_changed_value_is_written_in_both_spellings() -> None:
    values = values_of(QWEN3)
    text = values["thinker_config"]["text_config"]
    text["num_local_experts"] = text["num_experts"]
    config = OmniConfig.from_dict(values).thinker_config
    assert config is not None
    saved = config.text_config.replace(num_experts=64).to_dict()
    assert saved["num_local_experts"] == saved["num_experts"] == 64


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "auto"}, None),
        ({"dtype": "auto", "torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": None}, None),
    ],
)
def test_dtypes_in_every_form(values: dict[str, Any], dtype: str | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = json.loads((tiny_checkpoint / "config.json").read_text())
    file.pop("dtype", None)
    file.update(values)
    config = OmniConfig.from_dict(file)
    assert config.dtype == dtype
    assert {key: config.to_dict()[key] for key in values} == values
    for path in tiny_checkpoint.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(file))
    model = OmniModel.from_pretrained(tmp_path, parts=("thinker",), device="cpu")
    assert str(model.dtype).removeprefix("torch.") == (dtype or "float32")
