"""Adapters in every form that PEFT and the trainers around it write, and models that are saved with LoRA in them."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from build import TINY, TOY_DATA, chat, config_values, fixed, once, tiny_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni import OmniModel
from omni.checkpoint import apply_adapter
from omni.checkpoint.keys import KeyTable
from omni.training.run.lora import add_lora, merge_lora

VALUES = {"first": json.loads(TINY.read_text()), "second": config_values(1, audio={}, vision={})}
NAMES = {"first": "Qwen3OmniMoeThinker", "second": "Qwen2_5OmniThinker"}
VOCABULARY = VALUES["first"]["thinker_config"]["text_config"]["vocab_size"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """transformers' Thinker of a family and the folder that it wrote."""

    @once
    def make(family: str) -> tuple[nn.Module, Path]:
        config = getattr(transformers, f"{NAMES[family]}Config")(**VALUES[family]["thinker_config"])
        with fixed(4):
            model = getattr(transformers, f"{NAMES[family]}ForConditionalGeneration")(config).eval()
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return model, folder

    return make


def wrapped(folder: Path, model: nn.Module, **config: Any) -> nn.Module:
    """A fresh copy of the model of a folder, with PEFT's layers and every trained value at random."""
    peft = get_peft_model(type(model).from_pretrained(folder), LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return peft


def assert_merged(folder: Path, adapter: Path, merged: nn.Module) -> OmniModel:
    """The folder with the adapter is the merged model."""
    model = OmniModel.from_pretrained(folder, device="cpu", adapter=adapter)
    table, own, changed = KeyTable.of(model.config.family), model.state_dict(), 0
    plain = OmniModel.from_pretrained(folder, device="cpu").state_dict()
    for key, value in merged.state_dict().items():
        if table.is_derived(key):
            continue
        slot = table.slot(f"thinker.{key}")
        assert slot is not None
        torch.testing.assert_close(slot.of(own[slot.name]), value, atol=1e-5, rtol=1e-5, msg=key)
        changed += plain[slot.name].shape != own[slot.name].shape or not torch.equal(plain[slot.name], own[slot.name])
    assert changed
    return model


FORMS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding, head and layers": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "bias lora_only": {"target_modules": ["q_proj", "v_proj", "out_proj"], "bias": "lora_only"},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("family", list(VALUES))
@pytest.mark.parametrize("form", ["embedding", "embedding, head and layers", "bias lora_only", "bias all"])
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers", "ignore:Unsupported layer type")
def test_whatever_peft_saves_is_merged(form, family, reference, tmp_path: Path) -> None:
    model, folder = reference(family)
    peft = wrapped(folder, model, r=2, lora_alpha=4, **FORMS[form])
    peft.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".base_layer" in key or key.endswith("bias") for key in keys)
    assert_merged(folder, tmp_path, peft.merge_and_unload())


@pytest.mark.parametrize(
    ("family", "layers"), [("first", ["conv2d1", "conv2d3"]), ("first", ["patch_embed.proj"]), ("second", ["conv1"])]
)
def test_updates_of_convolutions_are_merged(family, layers, reference, tmp_path: Path) -> None:
    model, folder = reference(family)
    peft = wrapped(folder, model, r=2, lora_alpha=4, target_modules=layers)
    peft.save_pretrained(tmp_path)
    assert_merged(folder, tmp_path, peft.merge_and_unload())


@pytest.mark.parametrize("began", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_took_its_beginning_from_the_base_is_refused_without_that_base(
    began, reference, tmp_path: Path
) -> None:
    model, folder = reference("first")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=began)
    peft = get_peft_model(type(model).from_pretrained(folder), config)
    peft.save_pretrained(tmp_path / "factors")
    with pytest.raises(ValueError, match=f"'{began}' changed the base weights too, .* merge the adapter with peft"):
        OmniModel.from_pretrained(folder, device="cpu", adapter=tmp_path / "factors")
    with torch.no_grad():
        for name, p in peft.named_parameters():
            p.add_(0.1 if "lora_A" in name else 0)
    peft.save_pretrained(tmp_path / "whole")
    tensors = {key: value.clone() for key, value in peft.state_dict().items()}
    save_file(tensors, tmp_path / "whole" / "adapter_model.safetensors")
    assert_merged(folder, tmp_path / "whole", wrapped_merge(peft))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")
def test_the_wrapped_models_own_tensors_are_merged(form, reference, tmp_path: Path) -> None:
    model, folder = reference("first")
    peft = wrapped(folder, model, r=2, lora_alpha=4, **FORMS[form])
    peft.save_pretrained(tmp_path)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    for tensors in (
        {key: value for key, value in peft.state_dict().items() if key in trained},  # what optimisers see
        peft.state_dict(),  # everything, as a trainer of FSDP gathers it
    ):
        assert any(".default" in key for key in tensors)
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
        assert_merged(folder, tmp_path, wrapped_merge(peft))


def wrapped_merge(peft: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(peft).merge_and_unload()


def test_two_adapters_in_one_file_are_refused(reference, tmp_path: Path) -> None:
    model, folder = reference("first")
    peft = wrapped(folder, model, r=2, target_modules=["q_proj"])
    peft.save_pretrained(tmp_path)
    tensors = {k: v.clone() for k, v in peft.state_dict().items() if ".lora_" in k}
    save_file({**tensors, **{k.replace("default", "other"): v + 0 for k, v in tensors.items()}},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"holds the adapters.*default.*other.*keep one"):
        OmniModel.from_pretrained(folder, device="cpu", adapter=tmp_path)


@pytest.mark.parametrize("rows", [VOCABULARY + 5, VOCABULARY + 64, VOCABULARY - 3])
@pytest.mark.parametrize("saved", ["modules_to_save", "embedding layers"])
@pytest.mark.filterwarnings("ignore:.*embedding.*", "ignore:.*mean_resizing.*")
def test_a_resized_vocabulary_resizes_the_model(saved, rows, reference, tmp_path: Path) -> None:
    model, folder = reference("first")
    copy = tmp_path / "base"
    shutil.copytree(folder, copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY_DATA / name, copy)
    base = type(model).from_pretrained(folder)
    base.resize_token_embeddings(rows)
    modules = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved == "modules_to_save" else {}
    peft = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], **modules))
    peft.save_pretrained(tmp_path / "adapter", **({} if modules else {"save_embedding_layers": True}))
    loaded = assert_merged(copy, tmp_path / "adapter", peft.merge_and_unload())
    assert loaded.config.thinker.text_config.vocab_size == rows == loaded.thinker.lm_head.out_features
    assert loaded.thinker.embed_tokens.num_embeddings == rows
    out = loaded.generate(loaded.processor(chat("hi")), max_new_tokens=3)
    loaded.save_pretrained(tmp_path / "again")
    again = OmniModel.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(again.generate(again.processor(chat("hi")), max_new_tokens=3).sequences, out.sequences)


def test_the_tokenizer_of_a_resized_vocabulary_comes_with_the_adapter(tiny_checkpoint, tmp_path: Path) -> None:
    plain = OmniModel.from_pretrained(tiny_checkpoint, device="cpu", parts=("thinker",))
    rows, width = plain.thinker.embed_tokens.weight.shape
    plain.processor.tokenizer.add_tokens(["<note>"])
    plain.processor.tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    prefix = "base_model.model.thinker.model.embed_tokens."
    save_file({f"{prefix}weight": torch.randn(rows + 1, width)}, tmp_path / "adapter_model.safetensors")
    model = OmniModel.from_pretrained(tiny_checkpoint, device="cpu", adapter=tmp_path)
    assert "<note>" in model.processor.tokenizer.get_added_vocab()
    torch.testing.assert_close(model.thinker.lm_head.weight[rows], plain.thinker.lm_head.weight.mean(0))


# ---- values that no adapter can have ----


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of never ending."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def hand_written(folder: Path, **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
    prefix = "base_model.model.thinker.model.layers.0.self_attn.q_proj.lora_"
    weight = tiny_model("thinker").thinker.layers[0].self_attn.q_proj.weight
    a, b = torch.ones(2, weight.shape[1]), torch.ones(weight.shape[0], 2)
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {r"(\w|\.|[a-z]|_)*[!-#]": 4}}, "takes too long"),
        ({"alpha_pattern": {"q_proj(": 4}}, "no pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha of q_proj must be a finite number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha of q_proj must be a finite number"),
        ({"lora_alpha": float("nan")}, "alpha of lora_alpha must be a finite number"),
        ({"lora_alpha": float("inf")}, "alpha of lora_alpha must be a finite number"),
        ({"lora_alpha": None}, "alpha of lora_alpha must be a finite number"),
    ],
)
def test_values_that_cannot_be(config, message, tmp_path: Path) -> None:
    model = tiny_model("thinker")
    before = model.thinker.layers[0].self_attn.q_proj.weight.clone()
    with within(6), pytest.raises(ValueError, match=message):
        apply_adapter(model, hand_written(tmp_path, **config), table=model.key_table)
    assert torch.equal(model.thinker.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*(.*)*x", r"(\w+\.?)+!"])
def test_patterns_of_many_stars_end(pattern, tmp_path: Path) -> None:
    model = tiny_model("thinker")
    with within(6):  # they match nothing: the layer's alpha is the usual 8
        apply_adapter(model, hand_written(tmp_path, alpha_pattern={pattern: 400}), table=model.key_table)
    before = tiny_model("thinker").thinker.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(model.thinker.layers[0].self_attn.q_proj.weight, before + 8)


# ---- saving with LoRA in the model ----


def trained(model: OmniModel) -> OmniModel:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"experts": "fused"}], ids=["", "shards", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_updates_is_saved_merged_and_stays_as_it_is(dtype, options, tmp_path: Path) -> None:
    model, twin = (tiny_model().to(dtype) for _ in range(2))
    for each in (model, twin):
        with fixed(5):
            add_lora(each, ["thinker.layers.*", "talker.layers.0.*", "thinker.lm_head"], rank=2)
            trained(each)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(tmp_path, **options)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(id(after[name]) == i and torch.equal(after[name], tensor) for name, (i, tensor) in before.items())
    merge_lora(twin)
    saved = OmniModel.from_pretrained(tmp_path, device="cpu").state_dict()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(saved[name], tensor), name


WHOLE = {"modules_to_save", "trainable_token_indices"}  # PEFT puts these into a whole model only
INJECTED = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "whole modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["k_proj"], "trainable_token_indices": {"thinker.embed_tokens": [3, 104, 5]}},
    "one token": {"target_modules": ["o_proj"], "trainable_token_indices": [104]},
    "tokens and modules": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [7, 104],
    },
}


@pytest.mark.parametrize("form", list(INJECTED))
@pytest.mark.filterwarnings("ignore:.*")
def test_whatever_peft_puts_into_a_model_is_saved_merged(form, tmp_path: Path) -> None:
    model = tiny_model("thinker")
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **INJECTED[form])
    peft = get_peft_model(model, config) if {*INJECTED[form]} & WHOLE else inject_adapter_in_model(config, model)
    trained(model)
    inputs = model.processor(chat("hi"))
    with torch.no_grad():
        expected = model.forward(inputs).logits
    model.save_pretrained(tmp_path)
    saved = OmniModel.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(saved.forward(inputs).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.forward(inputs).logits, expected)
    assert isinstance(peft, nn.Module) and isinstance(expected, Tensor)
