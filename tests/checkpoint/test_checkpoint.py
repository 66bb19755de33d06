"""Loading and saving weights: what is read and where it lands, reports, memory, sharding, devices, adapters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import TINY, draw, fixed
from safetensors.torch import load_file, save_file
from torch import nn

from omni import OmniConfig, OmniModel
from omni.checkpoint import load, load_weights, read_headers, resolve_dtype, save_weights
from omni.checkpoint.keys import KeyTable
from omni.checkpoint.save import parse_size
from omni.config.qwen3_omni import QWEN3_OMNI
from omni.layers.moe import Experts

KEYS = KeyTable.of(QWEN3_OMNI)
E, D, W = 3, 4, 5  # experts, model width, expert width


class Part(nn.Module):
    """An embedding, a head and one layer of experts."""

    def __init__(self, experts=E, dim=D, hidden=W, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, dim)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].mlp = nn.Module()
        self.layers[0].mlp.experts = Experts(experts, dim, hidden)
        self.lm_head = nn.Linear(dim, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


class Model(nn.Module):
    """A small model under this library's names."""

    def __init__(self, parts=("audio_encoder", "thinker", "talker", "code2wav"), **part):
        super().__init__()
        if "audio_encoder" in parts:
            self.audio_encoder = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))  # has persistent buffers
        if "thinker" in parts:
            self.thinker = Part(**part)
        if "talker" in parts:
            self.talker = Part(**part)
        if "code2wav" in parts:
            self.code2wav = nn.Sequential(nn.Conv1d(3, 3, 3))


def random_model(**arguments):
    with fixed():
        return draw(Model(**arguments), std=1.0)


def empty_model(**arguments):
    """On the meta device, moved there: drawing weights on it would import torch's compiler, which takes seconds."""
    model = Model(**arguments)
    state = model.state_dict(keep_vars=True)
    meta = {id(t): nn.Parameter(t.to("meta")) if isinstance(t, nn.Parameter) else t.to("meta") for t in state.values()}
    for name, t in state.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, meta[id(t)])
    return model


def assert_same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def saved(tmp_path):
    model = random_model()
    save_weights(model, tmp_path, table=KEYS, max_shard_size=300)
    return model, tmp_path


@pytest.mark.parametrize("size", ["5GB", 300, 1])
@pytest.mark.parametrize("experts", ["separate", "fused"])
def test_round_trip(tmp_path, size, experts):
    model = random_model()
    names = save_weights(model, tmp_path, table=KEYS, max_shard_size=size, experts=experts)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
    loaded = empty_model()
    report = load_weights(loaded, tmp_path, table=KEYS, device="cpu")
    assert report == load.LoadReport()
    assert_same(loaded, model)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in loaded.parameters())


def test_files_are_laid_out_as_released(saved):
    model, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    parts = {key.partition(".")[0]: [] for key in index["weight_map"]}
    for key, name in index["weight_map"].items():
        parts[key.partition(".")[0]].append(name)
    assert max(parts["thinker"]) <= min(parts["talker"]) and max(parts["talker"]) <= min(parts["code2wav"])
    for name in files:
        assert sum(t.nbytes for t in load_file(folder / name).values()) <= 300
    assert index["weight_map"].keys() == read_headers(folder).keys()
    stacked = model.thinker.layers[0].mlp.experts
    written = {k: v for name in files for k, v in load_file(folder / name).items()}
    key = "thinker.model.layers.0.mlp.experts.2.{}_proj.weight"
    assert torch.equal(written[key.format("gate")], stacked.gate_up_proj[2, :W])
    assert torch.equal(written[key.format("up")], stacked.gate_up_proj[2, W:])
    assert torch.equal(written[key.format("down")], stacked.down_proj[2])


def test_parts_read_only_their_shards(saved, monkeypatch):
    model, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {name for key, name in index.items() if key.startswith("talker.")}
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    read, opened = [], []

    class Counting(load.ShardReader):
        def __init__(self, path):
            opened.append(path.name)
            super().__init__(path)

        def read(self, info, target):
            read.append((self.path.name, info.start))
            super().read(info, target)

    monkeypatch.setattr(load, "ShardReader", Counting)
    headers = read_headers(folder, [key for key in index if key.startswith("talker.")])
    loaded = empty_model(parts=("talker",))
    assert load_weights(loaded, folder, table=KEYS, device="cpu") == load.LoadReport()
    assert_same(loaded.talker, model.talker)
    assert sorted(opened) == sorted(needed)
    talker = [info for key, info in headers.items() if key.startswith("talker.")]
    assert sorted(read) == sorted((info.shard.name, info.start) for info in talker)


def test_dtype(tmp_path, saved):
    _, folder = saved
    for dtype, config_dtype, expected in [
        ("auto", None, torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("float16", "bfloat16", torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        ("torch.float32", "bfloat16", torch.float32),
    ]:
        loaded = empty_model()
        load_weights(loaded, folder, table=KEYS, device="cpu", dtype=dtype, config_dtype=config_dtype)
        assert {t.dtype for t in loaded.state_dict().values()} == {expected, torch.int64}  # batch norm counts in int64
    for wrong in ("int8", "float31", torch.int64, 3, "nn"):
        with pytest.raises(ValueError, match="is not one of auto, float64"):
            resolve_dtype(wrong)


METER = """
import gc, re, sys, threading
from pathlib import Path
from safetensors.torch import load_file
from omni import OmniModel

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak_growth(work):
    peaks, done = [], threading.Event()
    def watch():
        while not done.is_set():
            peaks.append(anonymous())
            done.wait(0.0005)
    gc.collect()
    start, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    result = work()
    peaks.append(anonymous())
    done.set()
    watcher.join()
    return max(peaks) - start, result

small, large = sys.argv[1:]
OmniModel.from_pretrained(small, device="cpu")  # lazy imports are not the model
ours, model = peak_growth(lambda: OmniModel.from_pretrained(large, device="cpu"))
twice, held = peak_growth(lambda: [[t.clone(), t.clone()] for t in load_file(large + "/model.safetensors").values()])
print(ours, twice, sum(p.nbytes for p in model.parameters()))
"""


def test_peak_memory_is_the_model(tmp_path):
    """Most anonymous memory while loading, in a process of its own, where no freed memory can be used again."""
    if not Path("/proc/self/status").exists():
        return  # the meter is Linux's
    values = json.loads(TINY.read_text())
    for name, experts in (("small", 8), ("large", 512)):
        values["thinker_config"]["text_config"]["num_experts"] = experts
        values["thinker_config"]["text_config"]["moe_intermediate_size"] = experts
        OmniModel(OmniConfig.from_dict(values)).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", METER, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, twice, kept = map(int, done.stdout.split())
    assert kept > 30e6
    assert twice > 1.5 * kept  # the meter sees a second copy
    assert ours < 1.1 * kept


def edit(folder, change):
    """Rewrite a single-file checkpoint with some tensors changed."""
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def single(tmp_path):
    model = random_model()
    save_weights(model, tmp_path, table=KEYS)
    return model, tmp_path


KEY = "thinker.model.layers.0.mlp.experts.1.up_proj.weight"


def test_report_is_an_error_by_default(single):
    _, folder = single

    def change(tensors):
        del tensors[KEY], tensors["talker.model.embed_tokens.weight"]
        tensors["thinker.model.extra.weight"] = torch.zeros(1)
        tensors["nobody.weight"] = torch.zeros(1)
        tensors["thinker.model.layers.0.mlp.experts.3.up_proj.weight"] = torch.zeros(W, D)
        tensors["code2wav.0.weight"] = torch.zeros(3, 3, 4)
        tensors["thinker.model.rotary_emb.inv_freq"] = torch.zeros(2)  # derived: ignored

    edit(folder, change)
    model = empty_model()
    with pytest.raises(ValueError) as error:
        load_weights(model, folder, table=KEYS, device="cpu")
    message = str(error.value)
    assert "2 missing" in message and KEY in message and "3 unexpected" in message and "strict=False" in message
    assert "1 of another shape: code2wav.0.weight [3, 3, 4] (model: [3, 3, 3])" in message
    assert all(p.is_meta for p in model.parameters())  # nothing was assigned


def test_strict_false_fills_the_rest(single):
    source, folder = single

    def change(tensors):
        del tensors[KEY]
        tensors["code2wav.0.weight"] = torch.zeros(3, 3, 4)
        tensors["nobody.weight"] = torch.zeros(1)

    edit(folder, change)
    model, asked = empty_model(), []

    def initialise(names):
        asked.extend(sorted(names))
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).fill_(7)

    with pytest.raises(ValueError, match="pass initialise"):
        load_weights(model, folder, table=KEYS, device="cpu", strict=False)
    with pytest.warns(UserWarning, match="2 tensors of the model are drawn at random"):
        report = load_weights(model, folder, table=KEYS, device="cpu", strict=False, initialise=initialise)
    assert report.missing == (KEY,) and report.unexpected == ("nobody.weight",)
    assert report.mismatched == (load.Mismatch("code2wav.0.weight", (3, 3, 4), (3, 3, 3)),)
    assert asked == ["code2wav.0.weight", "thinker.layers.0.mlp.experts.gate_up_proj"]
    assert (model.get_parameter(asked[0]) == 7).all() and (model.get_parameter(asked[1]) == 7).all()
    assert torch.equal(model.talker.embed_tokens.weight, source.talker.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused(single, dtype):
    edit(single[1], lambda t: t.update({KEY: t[KEY].to(dtype)}))
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj.*quantised weights are not read"):
        load_weights(empty_model(), single[1], table=KEYS, device="cpu", strict=False)


def test_a_tensor_stored_twice_is_refused(single):
    edit(single[1], lambda t: t.update({"thinker.model.audio_tower.0.bias": t["thinker.audio_tower.0.bias"] + 0}))
    with pytest.raises(ValueError, match="a second time"):
        load_weights(empty_model(), single[1], table=KEYS, device="cpu")
    fused = "thinker.model.layers.0.mlp.experts.down_proj"
    edit(single[1], lambda t: (t.pop("thinker.model.audio_tower.0.bias"), t.update({fused: torch.zeros(E, D, W)})))
    with pytest.raises(ValueError, match="both stacked and expert by expert"):
        load_weights(empty_model(), single[1], table=KEYS, device="cpu")


def test_tied_weights_are_stored_once(tmp_path):
    model = random_model(parts=("thinker",), tied=True)
    save_weights(model, tmp_path, table=KEYS)
    keys = read_headers(tmp_path).keys()
    assert "thinker.model.embed_tokens.weight" in keys and "thinker.lm_head.weight" not in keys
    loaded = empty_model(parts=("thinker",), tied=True)
    load_weights(loaded, tmp_path, table=KEYS, device="cpu")
    assert loaded.thinker.lm_head.weight is loaded.thinker.embed_tokens.weight
    assert_same(loaded, model)


def test_device_that_is_not_there(single):
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not available|device 'cud' is not"):
        load_weights(empty_model(), single[1], table=KEYS, device="cuda:99")
    with pytest.raises(ValueError, match="is not available"):
        load_weights(empty_model(), single[1], table=KEYS, device="cud")
    with pytest.raises(ValueError, match="device 'meta' holds no values"):
        load_weights(empty_model(), single[1], table=KEYS, device="meta")


def test_device_map_on_the_cpu(single, tmp_path):
    source, folder = single
    for device_map in (
        {"": "cpu"},
        "cpu",
        {"audio_encoder": "cpu", "thinker": "cpu", "talker": "cpu", "code2wav": "cpu"},
    ):
        loaded = empty_model()
        load_weights(loaded, folder, table=KEYS, device_map=device_map)
        assert_same(loaded, source)
    if not torch.cuda.is_available():
        loaded = empty_model()
        load_weights(loaded, folder, table=KEYS, device_map="auto")
        assert_same(loaded, source)


def test_device_map_with_disk(single, tmp_path):
    source, folder = single
    device_map = {"": "cpu", "talker": "disk", "talker.embed_tokens": "cpu"}
    with pytest.raises(ValueError, match="pass offload_folder"):
        load_weights(empty_model(), folder, table=KEYS, device_map=device_map)
    loaded = empty_model()
    load_weights(
        loaded, folder, table=KEYS, device_map=device_map, offload_folder=tmp_path / "offload", dtype="bfloat16"
    )
    assert loaded.talker.lm_head.weight.is_meta and not loaded.talker.embed_tokens.weight.is_meta
    x = torch.randn(2, D, dtype=torch.bfloat16)
    assert torch.equal(loaded.talker.lm_head(x), source.talker.lm_head.bfloat16()(x))
    with pytest.raises(ValueError, match="offloaded"):
        save_weights(loaded, tmp_path, table=KEYS)


def test_device_maps_that_cannot_be(single):
    folder = single[1]
    with pytest.raises(ValueError, match="places 6 tensors nowhere"):
        load_weights(empty_model(), folder, table=KEYS, device_map={"talker": "cpu", "thinker": "cpu"})
    with pytest.raises(ValueError, match="neither a device nor one of auto"):
        load_weights(empty_model(), folder, table=KEYS, device_map="automatic")
    with pytest.raises(ValueError, match="names 'talkr'"):
        load_weights(empty_model(), folder, table=KEYS, device_map={"": "cpu", "talkr": "disk"})


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "1.5 kb", "2MiB", 12, "7B")] == [5 * 10**9, 1500, 2**21, 12, 7]
    for wrong in ("5", "GB", "-1GB", 0, 1.5, "5 XB", True):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="neither 'separate' nor 'fused'"):
        save_weights(Model(), ".", table=KEYS, experts="both")


def test_parameters_that_share_memory_are_both_written(tmp_path):
    model = random_model(parts=("thinker",))
    model.thinker.lm_head.weight = nn.Parameter(model.thinker.embed_tokens.weight.detach())
    save_weights(model, tmp_path, table=KEYS)
    loaded = empty_model(parts=("thinker",))
    load_weights(loaded, tmp_path, table=KEYS, device="cpu")
    assert_same(loaded, model)


def test_adapter_on_single_experts_and_on_a_thinker_alone(single, tmp_path):
    source, folder = single
    a, b = torch.randn(2, D), torch.randn(W, 2)
    head = torch.randn(7, D)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    prefix = "base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_"  # the Thinker's class has no "thinker."
    file = {f"{prefix}A.weight": a, f"{prefix}B.weight": b, "base_model.model.lm_head.weight": head}
    save_file(file, adapter / "adapter_model.safetensors")
    model = empty_model()
    load_weights(model, folder, table=KEYS, device="cpu", adapter=adapter)
    expected = source.thinker.layers[0].mlp.experts.gate_up_proj.detach().clone()
    expected[2, W:] += 3 * b @ a
    torch.testing.assert_close(model.thinker.layers[0].mlp.experts.gate_up_proj, expected)
    assert torch.equal(model.thinker.lm_head.weight, head)
    assert torch.equal(model.talker.lm_head.weight, source.talker.lm_head.weight)
    save_file({**file, "base_model.model.nobody.lora_A.weight": a + 0}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"changes 1 layers that this model lacks.*nobody"):
        load_weights(empty_model(), folder, table=KEYS, device="cpu", adapter=adapter)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        load_weights(empty_model(), folder, table=KEYS, device="cpu", adapter=tmp_path / "none")


def test_every_written_key_has_a_place():
    model = random_model()
    for name in model.state_dict():
        assert KEYS.slot(KEYS.to_hub(name)).name == name
