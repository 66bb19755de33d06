"""Whole Qwen2.5-Omni checkpoints go from transformers to omni and back without a bit changed, voices beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import config_values, once, seeded
from safetensors.torch import load_file
from test_parity_token2wav import randomise, values
from transformers import PreTrainedModel

from omni import OmniConfig, OmniModel
from omni.checkpoint import read_headers
from omni.checkpoint.keys import KeyTable
from omni.code2wav.voices import Voice, load_voices
from omni.config.qwen2_5_omni import QWEN2_5_OMNI

KEYS = KeyTable.of(QWEN2_5_OMNI)

SEEDS = range(2)


def whole_values(seed: int) -> dict[str, Any]:
    """config.json of a complete tiny model."""
    made = config_values(seed, audio={"n_window": 20}, vision={"patch_size": 14, "window_size": 56})
    made["token2wav_config"] = values(("tiny", "other_encoder")[seed])
    del made["talker_config"]["speaker_id"]  # not in files
    return made


@once
def reference(seed: int) -> Any:
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    config = Qwen2_5OmniConfig(**copy.deepcopy(whole_values(seed)))
    model = Qwen2_5OmniForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def voices(seed: int) -> dict[str, Voice]:
    rng = seeded(seed)
    return {
        "Chelsie": Voice(torch.randn(1, 6, generator=rng), torch.randn(1, 9, 10, generator=rng), 302),
        "Ethan": Voice(torch.randn(1, 6, generator=rng), torch.randn(1, 5, 10, generator=rng), 300),
    }


def save_reference(seed: int, folder: Path, **options: Any) -> Path:
    """As released: weights, config and spk_dict.pt."""
    reference(seed).save_pretrained(folder, **options)
    entries = {
        name: {"bos_token": v.bos_token, "cond": v.cond, "ref_mel": v.ref_mel} for name, v in voices(seed).items()
    }
    torch.save(entries, folder / "spk_dict.pt")
    return folder


def assert_same_tensors(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def settings(config: Any) -> dict[str, Any]:
    """All values of a reference's config, but where it was read from and by which version."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("_name_or_path", "transformers_version")}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(config.to_dict())


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("seed", SEEDS)
def test_transformers_to_omni_to_transformers(seed: int, layout: str, tmp_path: Path) -> None:
    size = "300KB" if layout == "sharded" else "5GB"
    theirs = save_reference(seed, tmp_path / "theirs", max_shard_size=size)
    assert (len(list(theirs.glob("*.safetensors"))) > 1) == (layout == "sharded")
    model = OmniModel.from_pretrained(theirs, device="cpu")
    inside = reference(seed).state_dict()
    named = {KEYS.from_hub(key): value for key, value in inside.items() if not KEYS.is_derived(key)}
    assert_same_tensors(model.state_dict(), {str(name): value for name, value in named.items()})
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    kind = type(reference(seed))
    # its own from_pretrained, which also reads the voices, cannot return the report
    _, report = PreTrainedModel.from_pretrained.__func__(kind, tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    opened = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert_same_tensors(opened.state_dict(), inside)
    assert settings(opened.config) == settings(reference(seed).config)
    assert opened.speaker_map.keys() == voices(seed).keys()
    assert all(torch.equal(opened.speaker_map[name]["ref_mel"], v.ref_mel) for name, v in voices(seed).items())
    opened.save_pretrained(tmp_path / "again")
    again = OmniModel.from_pretrained(tmp_path / "again", device="cpu")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert again.voices == {}, "transformers writes none"


def test_written_files_hold_the_reference_s_tensors(tmp_path: Path) -> None:
    theirs = save_reference(0, tmp_path / "theirs")
    OmniModel.from_pretrained(theirs, device="cpu").save_pretrained(tmp_path / "ours")
    written, given = read_headers(tmp_path / "ours"), read_headers(theirs)
    known = {key: value for key, value in given.items() if not KEYS.is_derived(key)}
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in known.items()}
    assert_same_tensors(tensors_of(tmp_path / "ours"), {k: v for k, v in tensors_of(theirs).items() if k in known})


def test_omni_s_config_has_the_values_of_the_file(tmp_path: Path) -> None:
    theirs = save_reference(0, tmp_path / "theirs")
    config = OmniConfig.from_pretrained(theirs)
    first = json.loads((theirs / "config.json").read_text())

    def missing(given: Any, written: Any, where: str = "") -> list[str]:
        if isinstance(given, dict) and isinstance(written, dict):
            return [m for k, v in given.items() for m in missing(v, written.get(k), f"{where}.{k}")]
        same = written == given or (isinstance(given, (list, tuple)) and list(written or ()) == list(given))
        return [] if same or given is None else [f"{where}: {given!r} became {written!r}"]

    assert missing(first, config.to_dict()) == []


def test_voices_lie_beside_the_checkpoint(tmp_path: Path) -> None:
    theirs = save_reference(0, tmp_path / "theirs")
    model = OmniModel.from_pretrained(theirs, device="cpu")
    assert model.voices.keys() == {"Chelsie", "Ethan"}
    assert model.config.talker_config.speaker_id == {"chelsie": 302, "ethan": 300}
    assert model.talker.config.speaker_id == {"chelsie": 302, "ethan": 300}
    model.save_pretrained(tmp_path / "ours")
    for name in ("voices.safetensors", "spk_dict.pt"):
        read = load_voices(tmp_path / "ours" / name)
        for key, voice in voices(0).items():
            assert read[key].bos_token == voice.bos_token
            assert torch.equal(read[key].cond, voice.cond) and torch.equal(read[key].ref_mel, voice.ref_mel)
    (tmp_path / "ours" / "spk_dict.pt").unlink()
    assert OmniModel.from_pretrained(tmp_path / "ours", device="cpu").voices.keys() == {"Chelsie", "Ethan"}
    text = OmniModel.from_pretrained(theirs, device="cpu", parts=["thinker"])
    assert text.voices == {}


def test_a_checkpoint_without_voices_opens(tmp_path: Path) -> None:
    theirs = save_reference(0, tmp_path / "theirs")
    (theirs / "spk_dict.pt").unlink()
    model = OmniModel.from_pretrained(theirs, device="cpu")
    assert model.voices == {} and model.config.talker_config.speaker_id == {"chelsie": 151872, "ethan": 151870}
    model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "voices.safetensors").exists()
    (theirs / "spk_dict.pt").write_bytes(b"not a voice")
    with pytest.raises(ValueError, match=r"spk_dict\.pt"):
        OmniModel.from_pretrained(theirs, device="cpu")
