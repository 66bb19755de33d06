"""Folders that hold less than a whole model: a Thinker saved by its own class, a variant without speech."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from build import TINY, TOY_DATA, chat, config_values, fixed, once, write_processor
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.checkpoint.keys import KeyTable

pytestmark = [
    pytest.mark.filterwarnings("ignore:config key .* is not known to omni"),
    pytest.mark.filterwarnings("ignore:the conversation does not begin with the system message"),
]
FIRST = json.loads(TINY.read_text())
SECOND = config_values(1, audio={}, vision={}, vocabulary=640)
CLASSES = {
    "first": ("Qwen3OmniMoeThinker", FIRST, "qwen3_omni_moe_thinker"),
    "second": ("Qwen2_5OmniThinker", SECOND, "qwen2_5_omni_thinker"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """A folder that transformers' Thinker class wrote, and the tensors in its memory."""

    @once
    def make(family: str, **options: Any) -> tuple[Path, dict[str, Tensor]]:
        name, values, _ = CLASSES[family]
        config = getattr(transformers, f"{name}Config")(**values["thinker_config"])
        with fixed(2):
            model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, **options)
        return folder, model.state_dict()

    return make


def assert_holds(model: OmniModel, tensors: dict[str, Tensor]) -> None:
    """Every tensor of transformers' Thinker is at its place."""
    assert model.talker is None and model.code2wav is None
    table, own = KeyTable.of(model.config.family), model.state_dict()
    seen = set()
    for key, tensor in tensors.items():
        if table.is_derived(key):
            continue
        slot = table.slot(f"thinker.{key}")
        assert slot is not None, key
        assert torch.equal(slot.of(own[slot.name]), tensor), key
        seen.add(slot.name)
    assert seen == own.keys()


OPTIONS = [{}, {"max_shard_size": "100KB"}, {"save_original_format": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=["one file", "shards", "names in memory"])
@pytest.mark.parametrize("family", list(CLASSES))
def test_a_thinker_saved_by_its_own_class_loads(family, options, alone) -> None:
    folder, tensors = alone(family, **options)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == CLASSES[family][2] and "thinker_config" not in config
    for arguments in ({}, {"parts": ("thinker",)}):
        assert_holds(OmniModel.from_pretrained(folder, device="cpu", **arguments), tensors)


@pytest.mark.parametrize("family", list(CLASSES))
def test_its_weights_load_beside_the_config_of_the_whole_model(family, alone, tmp_path: Path) -> None:
    folder, tensors = alone(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    values = CLASSES[family][1]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_holds(OmniModel.from_pretrained(tmp_path, device="cpu", parts=("thinker",)), tensors)
    with pytest.warns(UserWarning, match=r"holds a Thinker alone.*parts="):
        assert_holds(OmniModel.from_pretrained(tmp_path, device="cpu"), tensors)
    with pytest.raises(ValueError, match=r"missing"):  # who asks for speech is told
        OmniModel.from_pretrained(tmp_path, device="cpu", parts=("thinker", "talker", "code2wav"))


@pytest.mark.parametrize("family", list(CLASSES))
def test_such_a_model_answers_is_saved_and_opens_again(family, alone, tmp_path: Path) -> None:
    folder, tensors = alone(family)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if family == "first":
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (TOY_DATA / name).is_file():
                shutil.copy(TOY_DATA / name, copy)
    else:
        write_processor(copy)
        (copy / "preprocessor_config.json").unlink()  # trainers often leave it out
    processor = OmniProcessor.from_pretrained(copy)
    whole = {**CLASSES[family][1], "talker_config": None, "enable_audio_output": False}
    assert processor.audio_tokens(1000) == OmniModel(OmniConfig.from_dict(whole)).audio_encoder.num_tokens(1000)
    model = OmniModel.from_pretrained(copy, device="cpu", dtype="float32")
    out = model.generate(processor(chat("hi")), max_new_tokens=3)
    model.save_pretrained(tmp_path / "again")
    again = OmniModel.from_pretrained(tmp_path / "again", device="cpu")
    assert_holds(again, tensors)
    assert torch.equal(again.generate(processor(chat("hi")), max_new_tokens=3).sequences, out.sequences)
    assert out.audio is None or not any(wave is not None and wave.numel() for wave in out.audio)


@pytest.mark.parametrize("family", list(CLASSES))
def test_a_variant_without_speech_that_transformers_saved_opens(family, tmp_path: Path) -> None:
    name, absent = CLASSES[family][0].removesuffix("Thinker"), ("talker_config", "code2wav_config", "token2wav_config")
    values = {key: value for key, value in CLASSES[family][1].items() if key not in absent}
    config = getattr(transformers, f"{name}Config")(**{**values, "enable_audio_output": False})
    with fixed(3):
        reference = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["talker_config"] and written["enable_audio_output"] is False
    model = OmniModel.from_pretrained(tmp_path, device="cpu")
    inside = {key.removeprefix("thinker."): value for key, value in reference.state_dict().items()}
    assert_holds(model, inside)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["talker_config"] == written["talker_config"] or family == "second"  # which can be read
    OmniModel.from_pretrained(tmp_path / "again", device="cpu")


@pytest.mark.parametrize("part", ["talker_config", "code2wav_config"])
def test_parts_that_are_not_there_are_kept_whatever_they_say(part) -> None:
    broken = {**FIRST, "enable_audio_output": False, part: {**FIRST[part], "num_code_groups": 99, "decoder_dim": 7}}
    config = OmniConfig.from_dict(broken)
    assert "talker" not in config.parts and config.to_dict()[part] == broken[part]
    with pytest.raises(ValueError):
        OmniConfig.from_dict({**broken, "enable_audio_output": True})


# ---- quantised weights ----

LAYER = "thinker.model.layers.0.self_attn.q_proj"
ZERO, SCALE = torch.zeros(4, 4, dtype=torch.int32), torch.ones(4)
KINDS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "GPTQ": (
        {"qweight": ZERO, "qzeros": ZERO, "scales": SCALE, "g_idx": ZERO[0]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ),
    "AWQ": ({"qweight": ZERO, "qzeros": ZERO, "scales": SCALE}, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "NVFP4": (
        {"weight_packed": ZERO.byte(), "weight_scale": SCALE.to(torch.float8_e4m3fn), "weight_global_scale": SCALE[:1]},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ),
    "compressed-tensors": (
        {"weight_packed": ZERO, "weight_scale": SCALE, "weight_shape": ZERO[0]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "bitsandbytes": (
        {"weight": ZERO.byte(), "weight.absmax": ZERO[0].byte(), "weight.quant_map": SCALE},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "fp8": (
        {"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "weight_scale_inv": SCALE},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "AQLM": ({"codes": ZERO.short(), "codebooks": SCALE, "scales": SCALE}, {"quant_method": "aqlm"}),
    "VPTQ": ({"indices": ZERO, "centroids.weight": SCALE}, {"quant_method": "vptq"}),
    "quanto": ({"weight._data": ZERO.byte(), "weight._scale": SCALE}, {"quant_method": "quanto"}),
    "torchao": ({"_weight_qdata": ZERO.byte(), "_weight_scale": SCALE}, {"quant_method": "torchao"}),
}


def quantised(source: Path, folder: Path, kind: str, *, names: bool, config: bool, layer: str = LAYER) -> Path:
    """The checkpoint with one layer's weights as a quantiser writes them, a quantization_config, or both."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    pieces, said = KINDS[kind]
    if names:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{layer}.weight"]
        tensors |= {f"{layer}.{name}": value.clone() for name, value in pieces.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": said}))
    return folder


@pytest.mark.parametrize(("signs", "strict"), [("names", False), ("config", True), ("both", True), ("both", False)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_quantised_checkpoints_are_refused_by_name(kind, signs, strict, tiny_checkpoint, tmp_path: Path) -> None:
    folder = quantised(tiny_checkpoint, tmp_path, kind, names=signs != "config", config=signs != "names")
    with pytest.raises(ValueError, match=rf"(?i)quantised by .*{kind}.*quantize=") as error:
        OmniModel.from_pretrained(folder, device="cpu", strict=strict)
    assert "pass strict=False" not in str(error.value)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "thinker_config"])
def test_wherever_it_says_so(file, tiny_checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    if file.endswith(".json"):
        (tmp_path / file).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    else:
        values = json.loads((tmp_path / "config.json").read_text())
        values[file]["quantization_config"] = {"quant_method": "NVFP4"}
        (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"quantised by NVFP4.*delete quantization_config"):
        OmniModel.from_pretrained(tmp_path, device="cpu")


def test_a_gguf_file_is_named(tiny_checkpoint, tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"quantised by GGUF.*quantize="):
        OmniModel.from_pretrained(tmp_path, device="cpu")


def test_parts_that_are_not_quantised_load(tiny_checkpoint, tmp_path: Path) -> None:
    folder = quantised(tiny_checkpoint, tmp_path, "AWQ", names=True, config=True)
    model = OmniModel.from_pretrained(folder, device="cpu", parts=("talker", "code2wav"))
    assert model.thinker is None and model.talker is not None


def test_what_is_drawn_at_random_is_counted_and_named_once(tiny_checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in ("lm_head", "model.layers.0.mlp.experts.1.up_proj"):
        del tensors[f"thinker.{key}.weight"]
    del tensors["talker.codec_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        OmniModel.from_pretrained(tmp_path, device="cpu", strict=False)
    mine = [str(w.message) for w in said if "random" in str(w.message)]
    assert len(mine) == 1 and mine[0].startswith("3 tensors")
    assert all(name in mine[0] for name in ("thinker.lm_head.weight", "talker.codec_head.weight", "experts.gate_up"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OmniModel.from_pretrained(tiny_checkpoint, device="cpu", strict=False)  # nothing is missing, nothing is said
