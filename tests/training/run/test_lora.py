"""LoRA: which parameters exist and learn, merged equals unmerged, and the file is PEFT's."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from omni import OmniModel
from omni.checkpoint.keys import KeyTable
from omni.config.qwen3_omni import QWEN3_OMNI
from omni.layers.experts_backends import EXPERTS
from omni.layers.moe import Experts, set_experts_backend
from omni.packaged.toy import toy_model
from omni.training.run.lora import LoRAExperts, add_lora, merge_lora, save_lora

KEYS = KeyTable.of(QWEN3_OMNI)

PATTERNS = ["thinker.*", "audio_encoder.layers.*", "vision_encoder.*.qkv", "talker.layers.*", "talker.mtp.lm_head.1"]
NAMES = ("transformers", "hub")


def spoken(model):
    """Logits of Thinker, Talker and residual codes on fixed inputs, which reach every adapted decoder layer."""
    ids = torch.arange(12)[None]
    positions = ids.float().expand(3, 1, -1)
    embeds = model.thinker.embed_tokens(ids * 7)
    talker = model.talker(model.talker.codec_embedding(ids * 5), positions)
    residual = model.talker.mtp(talker.hidden[0], talker.hidden[0], ids.T.expand(-1, 3))
    return torch.cat([x.flatten() for x in (model.thinker(embeds, positions).logits, talker.logits, residual)])


def scatter_factors(model, std=0.2):
    """Factors as if trained."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=std)


def trained(patterns=PATTERNS):
    torch.manual_seed(0)
    model = toy_model(seed=0)
    add_lora(model, patterns, rank=4, alpha=6)
    scatter_factors(model)
    return model


def test_the_first_forward_is_the_base_models_exactly():
    model = toy_model(seed=0)
    set_experts_backend(model, "grouped")
    expected = spoken(model)
    add_lora(model, PATTERNS, rank=4)
    assert torch.equal(spoken(model), expected)  # each weight with a zero added
    set_experts_backend(model, None)
    assert torch.equal(spoken(model), expected)  # the low-rank path


def test_only_factors_learn_and_the_base_stays_bit_equal():
    model = toy_model(seed=0)
    before = {id(p): (p, p.detach().clone()) for p in model.parameters()}
    names = add_lora(model, ["thinker.layers.*", "talker.*"], rank=4, dropout=0.1)
    assert all("lora_" in name for name in names)
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].detach().clone() for name in names}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        spoken(model).square().mean().backward()
        optimizer.step()
    for parameter, value in before.values():
        assert parameter.grad is None
        assert torch.equal(parameter, value)
    still = [name for name in names if torch.equal(parameters[name], start[name])]
    # only what `spoken` never runs
    assert all(name.startswith(("talker.text_projection", "talker.hidden_projection")) for name in still)


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_path_of_experts_equals_updated_weights(rank):
    base = Experts(5, 8, 6).double()
    base.initialise(0.5)
    experts = LoRAExperts(base, rank, alpha=3.0)
    x, weights = torch.randn(7, 8, dtype=torch.double, requires_grad=True), torch.rand(7, 2, dtype=torch.double)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)])  # nobody chooses expert 4
    scatter_factors(experts)
    factors = [getattr(experts, f"{stacked}_lora_{letter}") for stacked in ("gate_up", "down") for letter in "AB"]

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), [x, *factors])

    y = experts(x, ids, weights)
    got = gradients(y)
    assert all((grad[:4] != 0).any() for grad in got[1:])
    assert all((grad[4:] == 0).all() for grad in got[1:])
    for backend in ("loop", "grouped", "blocked"):
        expected = experts(x, ids, weights, backend)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(got, gradients(expected))
    with pytest.raises(ValueError, match="'nothing' is not one of"):
        experts(x, ids, weights, "nothing")
    assert "nothing" not in EXPERTS


def test_fp32_gradients_of_aligned_and_odd_ranks_agree():
    """torch's grouped product and one product an expert give the same."""
    for rank in (3, 4):
        base = Experts(4, 16, 8)
        base.initialise(0.3)
        experts = LoRAExperts(base, rank, alpha=2.0)
        scatter_factors(experts)
        x, ids = torch.randn(9, 16), torch.randint(0, 4, (9, 2))
        experts(x, ids, torch.ones(9, 2)).square().sum().backward()
        found = [p.grad for p in experts.parameters() if p.requires_grad and p.grad is not None]
        for p in experts.parameters():
            p.grad = None
        experts(x, ids, torch.ones(9, 2), "loop").square().sum().backward()
        for p, grad in zip([p for p in experts.parameters() if p.grad is not None], found):
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_merged_equals_unmerged_and_the_adapter_file(tiny_checkpoint, tmp_path):
    model = trained()
    with torch.no_grad():
        unmerged = spoken(model)
        assert (unmerged - spoken(toy_model(seed=0))).abs().max() > 0.1
        for names in NAMES:
            save_lora(model, tmp_path / names, names)
        kinds = {type(m) for m in toy_model(seed=0).modules()}
        merge_lora(model)
        assert {type(m) for m in model.modules()} == kinds
        torch.testing.assert_close(spoken(model), unmerged, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "merged")
        expected = model.state_dict()
        again = [OmniModel.from_pretrained(tmp_path / "merged", device="cpu")]
        again += [OmniModel.from_pretrained(tiny_checkpoint, adapter=tmp_path / n, device="cpu") for n in NAMES]
        for other in again:
            assert other.state_dict().keys() == expected.keys()
            assert all(torch.equal(other.state_dict()[name], expected[name]) for name in expected)


def test_peft_reads_the_adapter_on_the_transformers_model(tiny_checkpoint, tmp_path):
    from peft import PeftModel
    from transformers import Qwen3OmniMoeForConditionalGeneration

    # PEFT takes every dense gate, up and down projection of this model_type for experts: it cannot read shared ones
    patterns = ["thinker.*", "audio_encoder.*", "vision_encoder.*", "talker.layers.*.self_attn.*", "*.mlp.experts"]
    model = trained([*patterns, "talker.codec_head", "talker.mtp.lm_head.1", "talker.*_projection.*"])
    save_lora(model, tmp_path / "adapter")
    merge_lora(model)
    reference = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tiny_checkpoint)
    merged = PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload()
    expected, base, changed = model.state_dict(), toy_model(seed=0).state_dict(), 0
    for key, tensor in merged.state_dict().items():
        slot = KEYS.slot(key)
        if slot is not None and slot.name in expected:
            torch.testing.assert_close(tensor, expected[slot.name], rtol=1e-5, atol=1e-5)
            changed += not torch.equal(tensor, base[slot.name])
    assert changed == sum(not torch.equal(base[name], expected[name]) for name in base) > 20


def test_sixteen_bit_weights_get_fp32_factors_and_merge_in_one_rounding():
    model = toy_model(seed=0).to(torch.bfloat16)
    names = add_lora(model, ["talker.layers.*"], rank=4)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
    scatter_factors(model, 0.02)
    experts = model.talker.layers[0].mlp.experts
    a, b = experts.gate_up_lora_A, experts.gate_up_lora_B
    expected = (experts.gate_up_proj.float() + experts.scale * (b @ a)).bfloat16()
    with torch.no_grad():
        unmerged = spoken(model)
        merge_lora(model)
        torch.testing.assert_close(spoken(model), unmerged, rtol=0.1, atol=0.05)
    assert torch.equal(model.talker.layers[0].mlp.experts.gate_up_proj, expected)


def test_experts_can_be_left_out_and_names_are_exact():
    model = toy_model(seed=0)
    names = add_lora(model.talker, "layers.*", rank=2, experts=False)
    assert names and all(name.startswith("layers.") for name in names)  # not mtp.layers
    assert not any("experts" in name for name in names)
    assert sum("q_proj" in name for name in names) == 2 * len(model.talker.layers)


def test_errors_name_the_remedy(monkeypatch, tmp_path):
    model = toy_model(seed=0)
    with pytest.raises(
        ValueError, match=r"'thinker\.layer\.\*\.q_proj' matches no linear layer.*names are like thinker"
    ):
        add_lora(model, "thinker.layer.*.q_proj")
    for options, message in [
        (dict(rank=0), "rank 0 must be"),
        (dict(alpha=0), "alpha 0 must be positive"),
        (dict(dropout=1.0), r"dropout 1\.0 must lie"),
        (dict(patterns=[]), "no patterns were given"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_lora(model, **{"patterns": "thinker.*", **options})
    for needs in (lambda: merge_lora(model), lambda: save_lora(model, tmp_path)):
        with pytest.raises(ValueError, match="no LoRA; give it some with add_lora"):
            needs()
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'thinker-talker\[peft\]'"):
        add_lora(model, "thinker.*")
    monkeypatch.undo()
    add_lora(model, "thinker.*.q_proj")
    with pytest.raises(ValueError, match="already has LoRA; merge it first"):
        add_lora(model, "talker.*.q_proj")
    model = toy_model(seed=0)
    model.quantize("int8")
    with pytest.raises(ValueError, match="rounded to int8; load it without quantize="):
        add_lora(model, "thinker.*")
    assert isinstance(model.thinker.lm_head, nn.Linear)
