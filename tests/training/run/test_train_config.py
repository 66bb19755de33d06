"""The TOML file of a run, parameters by pattern, AdamW's groups and the learning-rate curve."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from build import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from omni import OmniModel
from omni.layers.norm import RMSNorm
from omni.training.run.optimiser import lr_factor, make_adamw, match_names, named_state, param_groups, set_lr, trainable
from omni.training.run.train_config import GroupTable, OptimiserTable, TrainConfig

ROOT = Path(__file__).parents[3]
WHOLE = """
[model]
checkpoint = "~/checkpoints/base"
dtype = "bfloat16"
parts = ["thinker", "talker"]
[train]
objective = "talker"
steps = 1e4
accumulate = 4
parameters = ["talker.*", "!talker.mtp.*"]
precision = "fp32"
[optimiser]
lr = 1
betas = [0.9, 0.95]
warmup_steps = 100
schedule = "linear"
[[optimiser.group]]
pattern = "talker.mtp.*"
lr_scale = 2
[objective]
beta = 0.1
anything = ["the", "objective", "checks"]
[loss]
residual = 0.3
[data]
train = [{ manifest = "a.jsonl", weight = 2 }, { manifest = "b.jsonl" }]
filters = [{ key = "snr_db", min = 20 }]
codec = { kind = "omni", path = "codec", cache = "codes" }
[lora]
patterns = ["thinker.layers.*.self_attn.*"]
[speaker]
add = "Anna"
[save]
folder = "runs/a"
"""


@pytest.fixture(scope="module")
def tiny() -> OmniModel:
    return OmniModel(tiny_config())


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def tables(**changes: dict[str, Any]) -> dict[str, Any]:
    """The smallest run, with some keys set."""
    values: dict[str, Any] = {"train": {"objective": "talker"}, "model": {"config": "configs/tiny.json"}}
    for table, keys in changes.items():
        values[table] = {**values.get(table, {}), **keys}
    return values


def test_a_whole_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    config = TrainConfig.from_toml(write(tmp_path, WHOLE))
    assert config.train.steps == 10_000 and type(config.train.steps) is int  # 1e4 is a whole number
    assert config.train.parameters == ("talker.*", "!talker.mtp.*")
    assert config.optimiser.lr == 1.0 and type(config.optimiser.lr) is float
    assert config.optimiser.group == (GroupTable("talker.mtp.*", 2.0),)
    assert [source.weight for source in config.data.train] == [2.0, 1.0]
    assert config.data.filters[0].min == 20 and config.data.filters[0].max == math.inf
    assert config.lora is not None and config.lora.rank == 16 and config.speaker is not None
    assert config.loss == {"residual": 0.3} and config.objective["beta"] == 0.1
    assert config.model.checkpoint == str(Path("~/checkpoints/base").expanduser())
    assert config.save.folder == "runs/a"  # relative to the current folder, as the shell has it


def test_a_config_survives_its_tables_and_json(tmp_path: Path) -> None:
    config = TrainConfig.from_toml(write(tmp_path, WHOLE))
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    overrides = [
        "optimiser.lr=1e-4",
        "train.objective=thinker",
        "save.folder=runs/b-2",
        'data.train=[{manifest = "c.jsonl"}]',
        "eval.every=5",
    ]
    config = TrainConfig.from_toml(write(tmp_path, WHOLE), overrides)
    assert (config.optimiser.lr, config.train.objective, config.save.folder) == (1e-4, "thinker", "runs/b-2")
    assert [source.manifest for source in config.data.train] == ["c.jsonl"] and config.eval.every == 5
    assert config.train.accumulate == 4  # the rest stays


@pytest.mark.parametrize("override", ["optimiser.lr", "=3", "train..steps=3", "train.steps.deep=3", "train.steps=[1,"])
def test_an_override_without_meaning_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        TrainConfig.from_toml(write(tmp_path, WHOLE), [override])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (tables(optimiser={"learning_rte": 1}), "optimiser.learning_rte"),
        (tables(optimiser={"warmup_step": 1}), "did you mean 'warmup_steps'"),
        ({**tables(), "optimizer": {}}, "did you mean 'optimiser'"),
        (tables(train={"steps": "many"}), "train.steps must be a whole number, got 'many'"),
        (tables(train={"steps": 1.5}), "train.steps must be a whole number"),
        (tables(train={"steps": True}), "train.steps must be a whole number"),
        (tables(train={"steps": 0}), "train.steps must be at least 1, got 0"),
        (tables(train={"precision": "bf61"}), "did you mean 'bf16'"),
        (tables(train={"parameters": "talker.*"}), "train.parameters must be a list"),
        (tables(train={"parameters": ["a", 3]}), r"train.parameters\[1\] must be text"),
        (tables(optimiser={"lr": 0}), "optimiser.lr must be above 0"),
        (tables(optimiser={"lr": math.nan}), "optimiser.lr must be above 0"),
        (tables(optimiser={"betas": [0.9]}), "optimiser.betas must have 2 entries"),
        (tables(optimiser={"betas": [0.9, 1.0]}), r"optimiser.betas\[1\] must be at least 0 and below 1"),
        (tables(optimiser={"group": [{"lr_scale": 2}]}), r"optimiser.group\[0\].pattern is missing"),
        (tables(optimiser={"warmup_steps": 2000}), "optimiser.warmup_steps = 2000 is more than train.steps = 1000"),
        (tables(loss={"residual": "much"}), "loss.residual must be a number"),
        (tables(data={"train": [{"manifest": "a", "weight": 0}]}), r"data.train\[0\].weight must be above 0"),
        ({**tables(), "data": [1]}, r"\[data\] must be a table"),
        (tables(lora={"rank": 4}), "lora.patterns is missing"),
        (tables(model={"checkpoint": "x"}), "one of checkpoint"),
        ({"model": {"config": "x"}}, "train is missing"),
    ],
)
def test_errors_name_the_key_and_the_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        TrainConfig.from_toml(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML"):
        TrainConfig.from_toml(write(tmp_path, "[train\n"))
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML"):
        TrainConfig.from_toml(tmp_path / "run.toml")


def test_patterns_choose_in_order_and_later_ones_win(tiny: OmniModel) -> None:
    names = [name for name, _ in tiny.named_parameters()]
    chosen = match_names(names, ["talker.*", "!talker.mtp.*", "talker.mtp.lm_head.0.*"], "train.parameters")
    expected = [
        name
        for name in names
        if name.startswith("talker.")
        and (not name.startswith("talker.mtp.") or name.startswith("talker.mtp.lm_head.0."))
    ]
    assert chosen == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["talkr.*"], r"pattern 'talkr.\*' matches no parameter; did you mean 'talker.\*'"),
        (["talker"], r"did you mean 'talker.\*'"),
        (["talker.*", "!talker.mpt.*"], r"did you mean 'talker.mtp.\*'"),
        (["zzzzz"], "names begin with"),
        (["talker.*", "!*"], "leaves no parameter"),
        ([], "leaves no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(tiny: OmniModel, patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainable(tiny, patterns)


def test_trainable_sets_exactly_the_chosen_ones_and_makes_them_float32() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    before = model[1].weight.detach().clone()
    assert trainable(model, ["1.*"]) == ["1.weight", "1.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.dtype == torch.float32
    assert torch.equal(model[1].weight, before.float())
    trainable(model, ["*"])
    assert all(p.requires_grad for p in model.parameters())


def test_groups_have_the_decay_and_rate_of_their_parameters() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(4, 3), "norm": RMSNorm(3), "proj": nn.Linear(3, 3), "head": nn.Linear(3, 4)}
    )
    model["proj"].weight.requires_grad_(False)
    table = OptimiserTable(
        lr=0.1,
        weight_decay=0.5,
        group=(GroupTable("*", 3.0), GroupTable("head.*", 2.0, weight_decay=0.25), GroupTable("head.bias", 4.0)),
    )
    groups = param_groups(model, table)
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name, _ in g["params"]}
    assert found == {
        "embed.weight": (pytest.approx(0.3), 0.0),
        "norm.weight": (pytest.approx(0.3), 0.0),
        "proj.bias": (pytest.approx(0.3), 0.0),
        "head.weight": (pytest.approx(0.2), 0.25),
        "head.bias": (pytest.approx(0.4), 0.0),
    }
    with pytest.raises(ValueError, match="matches no parameter"):  # frozen ones learn at no rate
        param_groups(model, OptimiserTable(group=(GroupTable("proj.weight"),)))
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        param_groups(model.requires_grad_(False), table)


def test_a_state_made_at_once_changes_nothing() -> None:
    """Against PyTorch's plain AdamW, which makes its state at the first gradient; a parameter without one stands."""
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    table = OptimiserTable(lr=0.1, betas=(0.8, 0.9), weight_decay=0.0)
    optimizer = make_adamw(ours, table)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.0, eps=table.eps)
    for step in range(4):
        gradient = torch.randn(2, 3)
        for model in (ours, theirs):
            model.weight.grad = gradient.clone()
            model.bias.grad = torch.ones(2) if step else None
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)
    assert named_state(optimizer)["bias"]["step"] == 3 and named_state(optimizer)["weight"]["step"] == 4


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    least=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_curve_rises_to_one_and_falls_to_its_end(steps: int, warmup: int, least: float, schedule: Any) -> None:
    warmup = min(warmup, steps)
    curve = [
        lr_factor(i, steps=steps, warmup_steps=warmup, schedule=schedule, min_lr_ratio=least) for i in range(steps + 1)
    ]
    assert all(a < b for a, b in pairwise(curve[: warmup + 1]))
    if steps > warmup:
        assert curve[warmup] == pytest.approx(1)
        assert curve[-1] == pytest.approx(1 if schedule == "constant" else least)
    assert all(a >= b - 1e-12 for a, b in pairwise(curve[warmup:]))


def test_the_curve_in_closed_form() -> None:
    kind = {"steps": 110, "warmup_steps": 10, "min_lr_ratio": 0.1}
    assert [lr_factor(i, **kind) for i in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert lr_factor(60, **kind) == pytest.approx(0.55)  # half-way
    assert lr_factor(35, **kind) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert lr_factor(35, **kind, schedule="linear") == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_factor(500, **kind) == pytest.approx(0.1)


def test_set_lr_scales_every_group_from_its_peak() -> None:
    optimizer = make_adamw(nn.Linear(2, 2), OptimiserTable(lr=0.1, group=(GroupTable("bias", 5.0),)))
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.1 * factor, 0.5 * factor])
