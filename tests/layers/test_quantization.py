"""Weights at low precision: what is packed, how close products stay, and that misuse is refused plainly."""

import copy
import json
from pathlib import Path

import pytest
import torch
from build import chat, tiny_config, tiny_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omni import OmniModel
from omni.checkpoint import apply_adapter, load_weights, save_weights
from omni.checkpoint.keys import KeyTable
from omni.config.qwen3_omni import QWEN3_OMNI
from omni.generation.prompt import encode_prompt
from omni.layers.init import MetaBuild
from omni.layers.moe import Experts
from omni.layers.packed_weight import KINDS, PackedWeight
from omni.layers.quantized import QuantizedExperts, QuantizedLinear, Quantizer, packed_kind, quantize
from omni.metrics.agreement import _speech, agreement, teacher_forced

KEYS = KeyTable.of(QWEN3_OMNI)

ROOT = Path(__file__).parents[2]
ERROR = {"int8": 0.01, "int4": 0.11, "fp8": 0.03}  # relative, of normal weights


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 128), (3, 128, 64), (2, 48, 96), (20, 32)], ids=str)
def test_products_equal_those_with_the_unpacked_matrix(kind, shape):
    """Every layout: those of torch's CPU kernels and our own; the kernels round tokens to bf16."""
    weight = torch.randn(shape)
    packed = PackedWeight.pack(weight, kind)
    matrices = weight.reshape(-1, *shape[-2:])
    for expert, matrix in enumerate(matrices):
        dense = packed.dense(torch.float32, expert)
        assert distance(dense, matrix) < ERROR[kind]
        for tokens in (0, 1, 5, 40):
            x = torch.randn(tokens, shape[-1])
            y = packed.matmul(x, expert)
            assert y.shape == (tokens, shape[-2]) and y.dtype == x.dtype
            assert tokens == 0 or distance(y, x @ dense.T) < 5e-3
        rows = packed.matmul_rows(x, torch.full((40,), expert))
        assert distance(rows, x @ dense.T) < 5e-3
        if not packed.for_cpu_kernel:
            assert distance(packed.fused_rows(x, torch.full((40,), expert)), x @ dense.T) < 1e-5
    assert distance(packed.matmul(x.bfloat16(), expert).float(), x @ dense.T) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_packed_values(kind):
    """Rows of zeros, one large value and negative extremes survive; codes are symmetric around zero."""
    weight = torch.zeros(64, 64)
    weight[1, 3], weight[2, 5], weight[3] = 100.0, -100.0, torch.linspace(-1, 1, 64)
    dense = PackedWeight.pack(weight, kind).dense(torch.float32)
    assert dense[0].eq(0).all() and dense[1].count_nonzero() == 1
    assert torch.allclose(dense[1:3].abs().amax(-1), torch.tensor(100.0), rtol=5e-3)
    assert torch.allclose(dense[3], weight[3], atol={"int8": 0.01, "int4": 0.13, "fp8": 0.04}[kind])


def test_sizes():
    weight = torch.randn(64, 128)
    size = {kind: sum(b.nbytes for b in PackedWeight.pack(weight, kind).buffers()) for kind in KINDS}
    assert size["int8"] == size["fp8"] == 64 * (128 + 2)
    assert 64 * 128 / 2 < size["int4"] <= 64 * (128 / 2 + 128 / 64 * 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["loop", "indexed"])
@pytest.mark.parametrize("dim,hidden", [(64, 128), (32, 96)], ids=str)
def test_experts_equal_the_plain_loop(kind, backend, dim, hidden):
    plain = Experts(5, dim, hidden)
    plain.initialise(0.2)
    packed = QuantizedExperts()
    packed.gate_up = PackedWeight.pack(plain.gate_up_proj, kind)
    packed.down = PackedWeight.pack(plain.down_proj, kind)
    with torch.no_grad():
        for name, own in (("gate_up_proj", packed.gate_up), ("down_proj", packed.down)):
            rounded = torch.stack([own.dense(torch.float32, e) for e in range(5)])
            getattr(plain, name).copy_(rounded)
        for tokens in (1, 6):
            x, ids = torch.randn(tokens, dim), torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
            weights = torch.rand(tokens, 2)
            out = packed(x, ids, weights, backend=backend)
            assert distance(out, plain(x, ids, weights, backend="loop")) < 1e-2
    with pytest.raises(ValueError, match="'grouped' is not one of indexed, loop"):
        packed(x, ids, weights, backend="grouped")


class NoHostReads(TorchDispatchMode):
    """Fails where a value of a tensor, or a shape that depends on one, is read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_indexed_experts_ask_the_host_nothing(kind):
    """What a compiled or captured step needs."""
    packed = QuantizedExperts()
    packed.gate_up, packed.down = (PackedWeight.pack(torch.randn(3, *shape), kind) for shape in ((128, 64), (64, 64)))
    inputs = torch.randn(2, 64), torch.tensor([[0, 2], [1, 0]]), torch.rand(2, 2)
    with NoHostReads():
        packed(*inputs, backend="indexed")
        with pytest.raises(AssertionError, match="aten"):
            packed(*inputs, backend="loop")


def test_which_layers_are_packed():
    model = tiny_model()
    quantize(model, "int8")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["thinker.layers.0.self_attn.q_proj"] is kinds["talker.layers.2.self_attn.o_proj"] is QuantizedLinear
    assert kinds["thinker.layers.1.mlp.experts"] is kinds["talker.layers.0.mlp.experts"] is QuantizedExperts
    for name in ("thinker.lm_head", "talker.codec_head", "talker.text_projection.linear_fc1"):
        assert kinds[name] is nn.Linear
    for name, kind in kinds.items():
        if name.startswith(("talker.mtp.", "audio_encoder.", "vision_encoder.", "code2wav.")):
            assert kind not in (QuantizedLinear, QuantizedExperts)
    assert not any(p.requires_grad for p in model.parameters()) and packed_kind(model) == "int8"
    quantize(model, "int8", parts=["mtp"])
    assert isinstance(model.talker.mtp.layers[0].mlp.gate_proj, QuantizedLinear)


def test_a_bias_stays():
    linear = nn.Linear(64, 64)
    layer = QuantizedLinear(PackedWeight.pack(linear.weight, "int8"), linear.bias)
    layer.bias.requires_grad_(False)
    x = torch.randn(2, 3, 64)
    assert layer(x).shape == (2, 3, 64) and (layer.in_features, layer.out_features) == (64, 64)
    assert distance(layer(x), F.linear(x, linear.weight, linear.bias).detach()) < 0.02


def test_misuse_is_refused(tmp_path):
    model = tiny_model()
    for kind, parts, complaint in (
        ("int3", ["thinker"], "quantize='int3' is not one of int8, int4, fp8"),
        ("int8", ["code2wav"], "must name some of thinker, talker, mtp"),
        ("int8", [], "must name some of"),
    ):
        with pytest.raises(ValueError, match=complaint):
            quantize(model, kind, parts)
    with pytest.raises(ValueError, match="training mode"):
        quantize(model.train(), "int8")
    quantize(model.eval(), "int8")
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantize(model, "int8")
    with pytest.raises(ValueError, match="int8 cannot be trained; load the model without quantize="):
        model.thinker.train()
    layer = model.thinker.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="give no gradients"):
        layer(torch.randn(1, layer.in_features, requires_grad=True))
    with pytest.raises(ValueError, match=r"rounded to int8.*load the checkpoint without quantize="):
        save_weights(model, tmp_path, table=KEYS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not finite"):
        PackedWeight.pack(torch.full((64, 64), float("nan")), "int4")
    with pytest.raises(ValueError, match="multiple of 32 inputs, got 20"):
        PackedWeight.pack(torch.randn(4, 20), "int4")
    with pytest.raises(ValueError, match=r"shape \[0, 64, 64\] holds no matrix"):
        PackedWeight.pack(torch.zeros(0, 64, 64), "int8")
    packed = PackedWeight.pack(torch.randn(3, 64, 64), "int4")
    if packed.for_cpu_kernel:
        with pytest.raises(ValueError, match="one matrix at a time, 2 were asked for"):
            packed.dense(torch.float32, torch.tensor([0, 2]))


def empty_model(parts=("thinker", "talker", "code2wav")):
    with MetaBuild():
        return OmniModel(tiny_config(), parts)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_while_loading_equals_packed_afterwards(tiny_checkpoint, kind):
    later, at_once = empty_model(), empty_model()
    load_weights(later, tiny_checkpoint, table=KEYS, device="cpu")
    quantize(later, kind)
    load_weights(at_once, tiny_checkpoint, table=KEYS, device="cpu", quantize=kind)
    left, right = later.state_dict(), at_once.state_dict()
    assert left.keys() == right.keys() and any(name.endswith("packed.data") for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_loading_parts_and_refusals(tiny_checkpoint):
    model = empty_model(("thinker",))
    load_weights(
        model, tiny_checkpoint, table=KEYS, device="cpu", quantize="int8", quantize_parts=["thinker", "talker"]
    )
    assert packed_kind(model) == "int8"
    with pytest.raises(ValueError, match="quantize= and device_map= do not go together"):
        load_weights(empty_model(), tiny_checkpoint, table=KEYS, device_map={"": "cpu"}, quantize="int8")


def test_no_full_precision_copy_of_the_model_while_loading(tiny_checkpoint, monkeypatch):
    """A weight's full-precision form is gone as soon as it is packed."""
    alive, most = 0, 0
    pack = PackedWeight.pack.__func__

    class Watched:
        def __init__(self, size):
            nonlocal alive, most
            self.size = size
            alive += size
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.size

    def watching(cls, weight, kind):
        weight.watched = Watched(weight.nbytes)
        return pack(cls, weight, kind)

    monkeypatch.setattr(PackedWeight, "pack", classmethod(watching))
    model = empty_model()
    names = Quantizer(model, "int8").names
    largest = max(p.numel() * 4 for name, p in model.named_parameters() if name in names)
    total = sum(p.numel() * 4 for name, p in model.named_parameters() if name in names)
    load_weights(model, tiny_checkpoint, table=KEYS, device="cpu", quantize="int8")
    assert 0 < most == largest < total / 8


def test_an_adapter_comes_before_packing(tiny_checkpoint, tmp_path):
    key = "base_model.model.thinker.model.layers.0.self_attn.q_proj.lora_{}.weight"
    plain = empty_model()
    load_weights(plain, tiny_checkpoint, table=KEYS, device="cpu")
    outputs, inputs = plain.thinker.layers[0].self_attn.q_proj.weight.shape
    save_file(
        {key.format("A"): torch.ones(1, inputs), key.format("B"): torch.ones(outputs, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1, "r": 1}))
    model = empty_model()
    load_weights(model, tiny_checkpoint, table=KEYS, device="cpu", adapter=tmp_path, quantize="int8")
    apply_adapter(plain, tmp_path, table=KEYS)
    quantize(plain, "int8")
    own, true = (m.thinker.layers[0].self_attn.q_proj.packed for m in (model, plain))
    assert torch.equal(own.data, true.data)
    with pytest.raises(ValueError, match="cannot be merged into weights at int8"):
        apply_adapter(plain, tmp_path, table=KEYS)


@pytest.fixture(scope="module")
def spoken():
    """A model with a processor and prompts of two lengths."""
    model = tiny_model()
    return model, model.processor([chat("Hello there"), chat("What is it?")])


def test_teacher_forcing_finds_the_choices_of_generation(spoken):
    """The logits that a given turn is read with are those that chose it: positions, prompts and frames are the same."""
    model, inputs = spoken
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    out = model.generate(
        inputs, 6, max_frames=14, text_sampling=greedy, audio_sampling=greedy, residual_sampling=greedy, seed=0
    )
    prompt = encode_prompt(model, inputs)
    for row, reply in enumerate(out.replies):
        codes = out.codes[row]
        assert codes.shape[1] > len(reply) + 2  # the text ends within the speech
        speech = _speech(model, prompt.row_ids(row), reply, codes, None)
        forced = teacher_forced(model, prompt, row, reply, speech)
        assert forced.text.argmax(-1).tolist() == reply
        banned = model.talker.suppressed()
        assert forced.codes[0].masked_fill(banned, float("-inf")).argmax(-1).tolist() == codes[0].tolist()
        for k in range(1, len(codes)):
            assert forced.codes[k].argmax(-1).tolist() == codes[k].tolist()


def test_agreement(spoken):
    """Perfect with itself; worse at fewer bits; the same at each call."""
    model, inputs = spoken
    kinds = {}
    for kind in ("int8", "int4"):
        rounded = copy.deepcopy(model)
        quantize(rounded, kind)
        kinds[kind] = agreement(rounded, model, inputs, max_new_tokens=4, max_frames=8)
    same = agreement(model, model, inputs, max_new_tokens=4, max_frames=8)
    assert same.text_kl == 0 and same.text_agreement == 1 and same.tokens == 8 and same.frames == 16
    assert set(same.code_kl) == {0.0} and set(same.code_agreement) == {1.0} and len(same.code_kl) == 4
    assert 0 < kinds["int8"].text_kl < kinds["int4"].text_kl
    assert 0 < sum(kinds["int8"].code_kl) < sum(kinds["int4"].code_kl)
    assert agreement(rounded, model, inputs, max_new_tokens=4, max_frames=8) == kinds["int4"]
    lines = same.table().splitlines()
    assert len(lines) == 2 + 1 + 4 and lines[2] == "| text | 8 | 0.00000 | 100.0% |"
    silent = agreement(rounded, model, inputs, max_new_tokens=4, return_audio=False)
    assert silent.frames == 0 and silent.code_kl == () and silent.text_kl == kinds["int4"].text_kl
