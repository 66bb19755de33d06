"""Parts of a config are optional: each alone is read, written, built, saved, loaded and described."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omni import OmniConfig, OmniInputs, OmniModel, OmniSession
from omni.cli.main import main
from omni.packaged.toy import toy_processor

TINY = json.loads((Path(__file__).parents[2] / "configs" / "tiny.json").read_text())
ROPE = {"rope_theta": 1e6, "mrope_section": [2, 1, 1], "rope_type": "default"}
DENSE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
CONTROL = dict(zip(("start", "end", "pad", "mask"), (81, 82, 80, 84)))
DIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "emb_dim": 6,
    "block_size": 4,
}
DIT |= {"mel_dim": 5, "enc_emb_dim": 3, "enc_dim": 4, "enc_channels": [4, 4, 4], "enc_kernel_sizes": [3, 3, 1]}
DIT |= {"num_embeds": 20, "enc_dilations": [1, 2, 1], "enc_attention_channels": 3, "enc_se_channels": 3}
VOCODER = {"mel_dim": 5, "upsample_initial_channel": 8, "upsample_rates": [3, 2], "upsample_kernel_sizes": [7, 4]}
SECOND = {
    "talker_config": {
        **{**DENSE, "intermediate_size": 24, "vocab_size": 96, "embedding_size": 32, "rope_parameters": ROPE},
        **{f"tts_codec_{name}_token_id": value for name, value in CONTROL.items()},
    },
    "token2wav_config": {"dit_config": DIT, "bigvgan_config": VOCODER},
}
ALONE = {
    "talker": ("qwen3_omni_moe", {"talker_config": TINY["talker_config"]}, ["talker"]),
    "codec": ("qwen3_omni_moe", {"code2wav_config": TINY["code2wav_config"]}, ["code2wav"]),
    "both": (
        "qwen3_omni_moe",
        {key: TINY[key] for key in ("talker_config", "code2wav_config")},
        ["talker", "code2wav"],
    ),
    "second talker": ("qwen2_5_omni", {"talker_config": SECOND["talker_config"]}, ["talker"]),
    "second codec": ("qwen2_5_omni", {"token2wav_config": SECOND["token2wav_config"]}, ["code2wav"]),
}


def thinker_values(**changes: Any) -> dict[str, Any]:
    """A Thinker that answers in text, some of its parts changed."""
    return {**TINY, "enable_audio_output": False, "thinker_config": {**TINY["thinker_config"], **changes}}


def round_trip(values: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[OmniModel, str]:
    """The model of a config, saved and loaded again, and what `omni info` says of the folder."""
    config = OmniConfig.from_dict(values)
    assert OmniConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    torch.manual_seed(0)
    made = OmniModel(config)
    assert all(bool(torch.isfinite(p).all()) for p in made.parameters())
    made.save_pretrained(folder)
    loaded = OmniModel.from_pretrained(folder, device="cpu")
    assert {name for name, _ in loaded.named_children()} == set(config.parts)
    for (name, here), there in zip(made.named_parameters(), loaded.parameters()):
        assert torch.equal(here, there), name
    assert main(["info", str(folder)]) == 0
    return loaded, capsys.readouterr().out


@pytest.mark.parametrize("name", ALONE)
def test_a_part_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_type, parts, children = ALONE[name]
    model, printed = round_trip({"model_type": model_type, **parts}, tmp_path, capsys)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "thinker_config" not in written and set(parts) <= set(written)
    assert f"{model_type}, {' and '.join(children)} alone" in printed and "positions; its cache" not in printed
    only = children[0]
    sentence = f"this model has no thinker: its config describes {' and '.join(children)} alone"
    inputs = OmniInputs([[1, 2]])
    uses: list[Callable[[], Any]] = [
        lambda: model.generate(inputs),
        lambda: model.stream(inputs),
        lambda: model.forward(inputs),
        lambda: model.speak("hello"),
        lambda: model.compile("eager") or model.generate(inputs),
        lambda: OmniSession(model, toy_processor()),
        lambda: model.config.thinker,
    ]
    for use in uses:
        with pytest.raises(ValueError, match=sentence):
            use()
    with pytest.raises(ValueError, match=f"this checkpoint has {' and '.join(children)} alone"):
        OmniModel.from_pretrained(tmp_path, parts=("thinker",))
    assert getattr(OmniModel.from_pretrained(tmp_path, parts=(only,), device="cpu"), only) is not None


def test_a_codec_alone_decodes() -> None:
    codec = OmniModel(OmniConfig.from_dict({"model_type": "qwen3_omni_moe", **ALONE["codec"][1]})).code2wav
    assert codec is not None
    state = codec.init_state(1)
    assert codec.step(torch.zeros(1, codec.num_codebooks, 2, dtype=torch.int64), state).shape[0] == 1


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({"vision_config": None}, "text, audio in"),
        ({"audio_config": None}, "text, images and video in"),
        ({"audio_config": None, "vision_config": None}, "text in"),
    ],
)
def test_a_thinker_with_one_encoder_or_none(
    changes: dict[str, Any], takes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, printed = round_trip(thinker_values(**changes), tmp_path, capsys)
    assert f"{takes}; text out" in printed and "speakers" not in printed
    assert model.generate(OmniInputs([[1, 2]]), max_new_tokens=2).replies[0]


def test_a_config_of_nothing_and_a_broken_one() -> None:
    with pytest.raises(ValueError, match="describes no part"):
        OmniConfig.from_dict({"model_type": "qwen3_omni_moe"})
    with pytest.raises(ValueError, match="thinker_config must be a JSON object, got NoneType"):
        OmniConfig.from_dict({**TINY, "thinker_config": None})


def test_half_of_a_speaking_model_is_not_saved(tmp_path: Path) -> None:
    config = OmniConfig.from_dict({"model_type": "qwen3_omni_moe", **ALONE["both"][1]})
    with pytest.raises(ValueError, match="the code2wav was not loaded; add 'code2wav' to parts="):
        OmniModel(config, ("talker",)).save_pretrained(tmp_path / "half")
