"""Checkpoints go from transformers to omni and back without a bit changed, in every layout; LoRA merges as in PEFT."""

import copy
import shutil

import pytest
import torch
from oracle import reference_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from omni.checkpoint import LoadReport, apply_adapter, atomic_folder, load_weights, read_headers, save_weights
from omni.checkpoint.keys import KeyTable
from omni.config.model import OmniConfig
from omni.config.qwen3_omni import QWEN3_OMNI
from omni.model import OmniModel

KEYS = KeyTable.of(QWEN3_OMNI)
# Lent to the reference's Talker by the oracle, so that its files name it.
pytestmark = pytest.mark.filterwarnings("ignore:config key 'talker_config.audio_config' is not known")


def empty(folder, **arguments):
    with torch.device("meta"):
        return OmniModel(OmniConfig.from_pretrained(folder), **arguments)


def load(folder, **arguments):
    model = empty(folder)
    assert load_weights(model, folder, table=KEYS, device="cpu", **arguments) == LoadReport()
    return model


ENCODERS = {"thinker": ("audio_encoder", "vision_encoder"), "talker": ()}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A reference checkpoint in shards, and the model itself."""
    folder = tmp_path_factory.mktemp("released")
    reference_model().save_pretrained(folder, max_shard_size="300KB")
    return reference_model(), folder


def assert_same_tensors(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_equal_to_reference(model, reference):
    """Every tensor of `model` equals the one at its place in the reference's memory."""
    inside = reference.state_dict()
    ours = {}
    for key, tensor in inside.items():
        slot = KEYS.slot(key)
        assert slot is not None, key
        ours[slot.name] = tensor
    assert_same_tensors(model.state_dict(), ours)


def test_every_released_key_has_a_place_and_comes_back(released):
    _, folder = released
    names = {key: KEYS.slot(key) for key in read_headers(folder)}
    state = empty(folder).state_dict()
    assert all(slot is not None and slot.name in state for slot in names.values())
    assert {slot.name for slot in names.values()} == state.keys()
    assert all(KEYS.to_hub(KEYS.from_hub(key)) == key for key in names)


@pytest.mark.parametrize("variant", ["tiny", "mixed_mlp", "many_codes"])
@pytest.mark.parametrize("layout", ["single", "sharded", "in-memory names"])
def test_reference_to_omni(tmp_path, variant, layout):
    reference = reference_model(variant)
    reference.save_pretrained(
        tmp_path,
        max_shard_size="200KB" if layout == "sharded" else "5GB",
        save_original_format=layout != "in-memory names",
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or layout == "sharded"
    assert_equal_to_reference(load(tmp_path), reference)


@pytest.mark.parametrize("experts", ["separate", "fused"])
@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_omni_to_reference_to_omni(released, tmp_path, size, experts):
    reference, folder = released
    model = load(folder)
    with atomic_folder(tmp_path / "ours") as target:
        save_weights(model, target, table=KEYS, max_shard_size=size, experts=experts)
        reference.config.save_pretrained(target)
    opened, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert_same_tensors(opened.state_dict(), reference.state_dict())
    opened.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(load(tmp_path / "theirs").state_dict(), model.state_dict())


def test_written_files_equal_the_reference_s(released, tmp_path):
    _, folder = released
    save_weights(load(folder), tmp_path, table=KEYS)
    theirs = read_headers(folder)
    ours = read_headers(tmp_path)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def test_bfloat16_round_trip(released, tmp_path):
    reference, folder = released
    model = load(folder, dtype="bfloat16")
    save_weights(model, tmp_path, table=KEYS)
    reference.config.save_pretrained(tmp_path)
    opened = type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal_to_reference(model, opened)


def test_model_from_pretrained_and_back(released, tmp_path):
    reference, folder = released
    model = OmniModel.from_pretrained(folder, device="cpu")
    assert_equal_to_reference(model, reference)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    opened, report = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_tensors(opened.state_dict(), reference.state_dict())
    again = OmniModel.from_pretrained(tmp_path, device="cpu")
    assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("parts", [("thinker",), ("talker",), ("talker", "code2wav")])
def test_parts_need_only_their_shards(released, tmp_path, parts):
    _, folder = released
    shutil.copytree(folder, tmp_path / "some")
    needed = {info.shard.name for key, info in read_headers(folder).items() if key.startswith(parts)}
    for path in (tmp_path / "some").glob("*.safetensors"):
        if path.name not in needed:
            path.write_bytes(b"broken")
    model = OmniModel.from_pretrained(tmp_path / "some", device="cpu", parts=parts)
    whole = OmniModel.from_pretrained(folder, device="cpu").state_dict()
    assert model.state_dict().keys() == {k for k in whole if k.startswith((*parts, *ENCODERS[parts[0]]))}
    assert_same_tensors(model.state_dict(), {k: whole[k] for k in model.state_dict()})
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        OmniModel.from_pretrained(tmp_path / "some", device="cpu")


def test_model_with_a_tensor_missing(released, tmp_path):
    _, folder = released
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    del tensors["talker.codec_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"1 missing: talker\.codec_head\.weight"):
        OmniModel.from_pretrained(tmp_path, device="cpu")
    with pytest.warns(UserWarning, match=r"1 tensors of the model are drawn at random: talker\.codec_head\.weight"):
        model = OmniModel.from_pretrained(tmp_path, device="cpu", strict=False)
    assert model.load_report.missing == ("talker.codec_head.weight",)
    assert 0.01 < model.talker.codec_head.weight.std() < 0.03  # drawn at initializer_range 0.02


def adapter(tmp_path, seed=0, **config):
    """An adapter with random factors on a copy of the reference: the merged reference and the adapter's folder."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(copy.deepcopy(reference_model()), LoraConfig(init_lora_weights=False, **config))
    for name, p in wrapped.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(p)
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped.merge_and_unload(), tmp_path / "adapter"


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "linear_fc1", "qkv"]),
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["linear_fc2"], modules_to_save=["codec_head"]),
        dict(r=4, alpha_pattern={"talker.+v_proj": 3}, rank_pattern={"k_proj": 2}, target_modules=["k_proj", "v_proj"]),
        dict(r=3, target_modules=["code_embedding", "pos_embed"]),
        dict(r=2, lora_alpha=5, target_modules=[], target_parameters=EXPERTS),
        dict(r=2, target_modules=["fc1"], target_parameters=EXPERTS[1:]),
    ],
    ids=["linear", "rslora", "patterns", "embeddings", "experts", "one experts matrix"],
)
def test_adapter_merges_as_in_peft(released, tmp_path, config):
    merged, folder = adapter(tmp_path, **config)
    model = load(released[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_adapter(model, folder, table=KEYS)
    expected = {KEYS.slot(key).name: tensor for key, tensor in merged.state_dict().items()}
    changed = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
        changed += not torch.equal(tensor, before[name])
    assert changed == sum(not torch.equal(before[name], expected[name]) for name in before) > 0


def test_adapter_trained_on_omni(released, tmp_path):
    model, plain = load(released[1]), load(released[1])
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "thinker.lm_head", "mtp.lm_head.0"])
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    apply_adapter(plain, tmp_path, table=KEYS)
    merged = wrapped.merge_and_unload()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_adapter_with_parts(released, tmp_path):
    merged, folder = adapter(tmp_path, r=4, target_modules=["q_proj"])
    model = empty(released[1], parts=("talker",))
    load_weights(model, released[1], table=KEYS, device="cpu", adapter=folder)
    weight = model.talker.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, merged.talker.model.layers[0].self_attn.q_proj.weight)


def test_adapters_that_do_not_fit(released, tmp_path):
    _, folder = adapter(tmp_path, r=4, target_modules=["q_proj"])
    model = load(released[1])
    model.thinker.layers = model.thinker.layers[:2]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"changes 2 layers that this model lacks.*layers\.2\.self_attn\.q_proj"):
        apply_adapter(model, folder, table=KEYS)
    assert_same_tensors(model.state_dict(), before)  # nothing was merged
    config = folder / "adapter_config.json"
    text = config.read_text()
    for broken, message in [
        (text.replace('"use_dora": false', '"use_dora": true'), "use_dora is not supported"),
        (text.replace('"LORA"', '"IA3"'), "'IA3' is not supported"),
        ("{", "not valid JSON"),
    ]:
        config.write_text(broken)
        with pytest.raises(ValueError, match=message):
            load_weights(empty(released[1]), released[1], table=KEYS, device="cpu", adapter=folder)
    config.write_text(text)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        apply_adapter(model, folder, table=KEYS)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        apply_adapter(model, folder, table=KEYS)
