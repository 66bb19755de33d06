"""A family from outside, the one of docs/families.md: registered, it is served as omni's own are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from omni import AudioChunk, OmniConfig, OmniModel, OmniProcessor, OmniSession, TextDelta, TurnEnd
from omni.cli.main import main
from omni.config import family as registry
from omni.config import register_family
from omni.config.names import import_name
from omni.packaged.toy import TOY_DATA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
SPELLINGS = {
    "<|audio_pad|>": "<sound>",
    "<|image_pad|>": "<image>",
    "<|video_pad|>": "<film>",
    "<|audio_start|>": "<sound_begin>",
    "<|audio_end|>": "<sound_end>",
    "<|vision_start|>": "<image_begin>",
    "<|vision_end|>": "<image_end>",
    "Qwen3OmniMoeProcessor": "PebbleProcessor",
}
REPLY: dict[str, Any] = {"max_new_tokens": 5, "max_frames": 4, "seed": 3}


@pytest.fixture(scope="module")
def pebble() -> Iterator[ModuleType]:
    """The page's Python blocks as the module `pebble`; its family is forgotten afterwards."""
    module = ModuleType("pebble")
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    known = dict(registry._registered)
    sys.modules["pebble"] = module
    exec(compile(source, "docs/families.md", "exec"), vars(module))
    yield module
    del sys.modules["pebble"]
    registry._registered.clear()
    registry._registered.update(known)


def values() -> dict[str, Any]:
    """`config.json` of a tiny model, as this family spells it."""
    found = json.loads((ROOT / "configs" / "tiny.json").read_text())
    thinker = found.pop("thinker_config")
    del thinker["audio_config"]
    ear = {"frames_per_token": 4, "hidden_size": 8, "output_dim": thinker["text_config"]["hidden_size"]}
    thinker |= {"ear_config": {"model_type": "pebble_ear", "num_mel_bins": 128, "initializer_range": 0.2, **ear}}
    thinker |= {"sound_token": thinker.pop("audio_token_id"), "position_id_per_seconds": 25}
    thinker["model_type"] = "pebble_omni_thinker"
    found |= {"model_type": "pebble_omni", "architectures": ["PebbleForConditionalGeneration"]}
    return found | {"mind_config": thinker}


@pytest.fixture(scope="module")
def checkpoint(pebble: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the family, as `save_pretrained` writes it, with tokenizer files in its spelling."""
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("pebble") / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (TOY_DATA / name).read_text(encoding="utf-8")
        for theirs, own in SPELLINGS.items():
            text = text.replace(theirs, own)
        (files / name).write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_dict(values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.startswith("code2wav"):
                weight.mul_(10)  # so far from uniform that choices depend on what was heard
    model.processor = OmniProcessor.from_pretrained(files)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> OmniModel:
    return OmniModel.from_pretrained(checkpoint, device="cpu")


def question(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"audio": str(TOY_DATA / "question.wav")}, *more, {"text": "Well?"}]}]


def test_its_config_is_read_and_written_in_its_own_spelling(pebble: ModuleType) -> None:
    config = OmniConfig.from_dict(values())
    assert type(config) is pebble.PebbleConfig and config.family is pebble.PEBBLE
    assert config.thinker.audio_token_id == 275 and config.thinker.audio_config.stack == 4
    written = config.to_dict()
    assert written["mind_config"]["ear_config"]["frames_per_token"] == 4 and "thinker_config" not in written
    assert OmniConfig.from_dict(written) == config
    broken = values()
    broken["mind_config"]["ear_config"]["frame_per_token"] = 4
    with pytest.raises(ValueError, match=r"mind_config\.ear_config\.frame_per_token.*did you mean 'frames_per_token'"):
        OmniConfig.from_dict(broken)
    with pytest.raises(ValueError, match="omni loads 'qwen3_omni_moe', 'qwen2_5_omni' and 'pebble_omni'"):
        OmniConfig.from_dict({**json.loads((ROOT / "configs" / "tiny.json").read_text()), "model_type": "gravel"})


def test_registering_twice_and_wrongly(pebble: ModuleType) -> None:
    register_family(pebble.PEBBLE)
    with pytest.raises(ValueError, match="'pebble_omni' belongs to another family"):
        register_family(pebble.replace(pebble.PEBBLE, n_window=7))
    with pytest.raises(ValueError, match="'qwen3_omni_moe' belongs to another family"):
        register_family(pebble.replace(pebble.PEBBLE, model_type="qwen3_omni_moe"))
    with pytest.raises(TypeError, match="takes a Family, got dict"):
        register_family({"model_type": "pebble_omni"})  # type: ignore[arg-type]


class Point:
    """An entry point of an installed package."""

    def __init__(self, value: str, found: Any) -> None:
        self.value, self.found = value, found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_installed_packages_bring_families(pebble: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = pebble.replace(pebble.PEBBLE, model_type="gravel_omni")
    points = [Point("gravel:GRAVEL", installed), Point("sand:SAND", ImportError("no sand")), Point("clay:CLAY", 3)]
    points.append(Point("copy:COPY", pebble.replace(installed, model_type="qwen2_5_omni")))
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "omni.families" else [])
    registry._installed.cache_clear()
    try:
        with pytest.warns(UserWarning) as warned:
            assert registry.find_family("gravel_omni") is installed
        said = [str(w.message) for w in warned]
        assert len(said) == 3 and "'sand:SAND'" in said[0] and "no sand" in said[0]
        assert "it is a int, not a Family" in said[1] and "'qwen2_5_omni' is taken" in said[2]
    finally:
        monkeypatch.undo()
        registry._installed.cache_clear()


def test_every_name_of_every_family_resolves(pebble: ModuleType) -> None:
    for family in registry.families():
        assert set(family.parts) == {"audio_encoder", "vision_encoder", "thinker", "talker", "code2wav"}
        assert family.preprocessor.is_file()
        for name in family.dotted_names():
            assert callable(import_name(name)), name


def test_it_saves_under_its_names_and_loads(pebble: ModuleType, checkpoint: Path, model: OmniModel) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert {key.partition(".")[0] for key in keys} == {"ear", "eye", "mind", "mouth", "codec"}
    assert "ear.fc1.weight" in keys and "mind.layers.0.mlp.experts.7.up_proj.weight" in keys
    assert type(model.audio_encoder) is pebble.PebbleEar and model.config == OmniConfig.from_pretrained(checkpoint)
    assert model.processor is not None and model.processor.files.family is pebble.PEBBLE


def test_the_processor_counts_and_spells_as_the_family(model: OmniModel) -> None:
    processor = model.processor
    assert processor is not None and processor.tokens.audio == 275 and processor.position_rule.rate == 25
    inputs = processor(question({"image": str(TOY_DATA / "picture.png")}))
    assert inputs.feature_attention_mask is not None
    frames = int(inputs.feature_attention_mask.sum())
    assert int((inputs.input_ids == 275).sum()) == -(-frames // 4)
    text = processor.decode(inputs.input_ids[0], skip_special_tokens=False)
    assert "<sound_begin><sound>" in text and "<image_begin><image>" in text and "<|audio" not in text
    (segments,) = inputs.segments(model.config.thinker)
    assert [type(segment).__name__ for segment in segments] == ["Text", "Audio", "Text", "Image", "Text"]


def test_it_answers_streams_and_sessions_say_the_same(model: OmniModel) -> None:
    assert model.processor is not None
    out = model.generate(model.processor(question()), **REPLY)
    deaf = model.generate(model.processor([{"role": "user", "content": "Well?"}]), **REPLY)
    assert out.codes is not None and deaf.codes is not None and out.replies != deaf.replies
    events = list(model.stream(model.processor(question()), **REPLY))
    ids = [i for event in events if isinstance(event, TextDelta) for i in event.token_ids]
    sound = torch.cat([event.samples for event in events if isinstance(event, AudioChunk)])
    assert ids == out.replies[0] and isinstance(events[-1], TurnEnd)
    assert out.audio is not None
    torch.testing.assert_close(sound, out.audio[0], rtol=1e-4, atol=1e-9)  # chunks add up in another order


def test_a_session_hears_what_a_whole_clip_says(model: OmniModel) -> None:
    import soundfile

    assert model.processor is not None
    samples, rate = soundfile.read(TOY_DATA / "question.wav", dtype="float32")
    messages = question()
    whole = model.generate(model.processor(messages, mel_level="causal"), **REPLY)
    session = OmniSession(model)
    for start in range(0, len(samples), 1600):
        session.push_audio(samples[start : start + 1600], rate)
    session.push_text("Well?")
    said = [i for event in session.respond(**REPLY) if isinstance(event, TextDelta) for i in event.token_ids]
    assert said == whole.replies[0]


def test_info_describes_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "pebble_omni, text, audio, images and video in; text and speech out" in printed
    assert "4 of 128 mel bins a token" in printed and "aiden" in printed
