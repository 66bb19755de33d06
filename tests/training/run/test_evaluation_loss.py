"""The loss of an evaluation is that of the objective; a run that has exported into its own checkpoint merges once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import chat, speech_codes, write_rows

from omni import OmniModel
from omni.cli.main import main
from omni.training.data.batches import collate
from omni.training.objectives.supervised import Supervised
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import TrainConfig
from omni.training.run.train_log import read_log

SPOKEN = [{"messages": chat("q" * i, "abc"[:i]), "codes": speech_codes(4 + i)} for i in (1, 2, 3)]
PAIRS = [{"messages": chat("q", "good"), "rejected": "bad"}, {"messages": chat("q", "yes"), "rejected": "no"}]


def make(checkpoint: Path, rows: Path, objective: str, **tables: Any) -> Run:
    return build_run(TrainConfig.from_dict(values(checkpoint, rows, objective, **tables)))


def values(checkpoint: Path, rows: Path, objective: str, **tables: Any) -> dict[str, Any]:
    source = [{"manifest": str(rows)}]
    train = {"objective": objective, "steps": 2, "precision": "fp32", "device": "cpu", **tables.pop("train", {})}
    return {
        "model": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "train": train,
        "data": {"train": source, "eval": source, "bucket": 4},
        "eval": {"every": 1},
        "log": {"progress": False, "tensorboard": False},
        **tables,
    }


@pytest.mark.parametrize(
    ("objective", "rows", "losses"),
    [
        ("talker", SPOKEN, {"codebook_0", "residual", "talker_balance"}),
        ("joint", SPOKEN, {"text", "balance", "codebook_0", "residual"}),
        ("dpo", PAIRS, {"text_preference", "reward_margin"}),
    ],
)
def test_an_evaluation_has_the_objectives_loss(
    tiny_checkpoint: Path, tmp_path: Path, objective: str, rows: list[dict[str, Any]], losses: set[str]
) -> None:
    run = make(tiny_checkpoint, write_rows(tmp_path / "a.jsonl", rows), objective)
    assert run.stage.evaluate is not None
    with torch.no_grad():
        numbers = run.stage.evaluate(run.stage.module, 0)
    assert losses < set(numbers)
    expected = sum(weight * numbers[name] for name, weight in run.stage.objective.weights.items())
    assert numbers["loss"] == pytest.approx(expected) and numbers["loss"] > 0


def test_it_is_the_loss_of_all_rows_together(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = make(tiny_checkpoint, write_rows(tmp_path / "a.jsonl", SPOKEN), "talker")
    objective, model = run.stage.objective, run.setup.model
    assert isinstance(objective, Supervised) and run.stage.evaluate is not None
    maker = run.stage.data.batches.make_sample  # type: ignore[attr-defined]
    samples = [maker(run.stage.data.batches.mixture.manifests[0][i]) for i in range(3)]  # type: ignore[attr-defined]
    with torch.no_grad():
        numbers = run.stage.evaluate(model, 0)
        losses = objective.losses(model, collate(samples))
    for name in ("codebook_0", "residual"):
        assert numbers[name] == pytest.approx(float(losses[name].total / losses[name].count), rel=1e-6)


def test_metrics_stand_beside_the_loss(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", SPOKEN)
    run = make(tiny_checkpoint, rows, "talker", eval={"every": 1, "metrics": ["codes", "loss"], "limit": 2})
    assert run.stage.evaluate is not None
    with torch.no_grad():
        numbers = run.stage.evaluate(run.setup.model, 0)
    assert {"loss", "codebook_0"} < set(numbers) and any("code_accuracy" in name for name in numbers)


@pytest.mark.filterwarnings("default:.*left out")
def test_what_was_not_used_is_in_the_log_and_at_the_end(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": chat("q", "a" * (500 if i % 2 else 3)), "wer": i / 8} for i in range(8)]
    table = values(tiny_checkpoint, write_rows(tmp_path / "a.jsonl", rows), "thinker", eval={})
    table["data"] |= {"max_tokens": 200, "filters": [{"key": "wer", "max": 0.5}]}
    lines = [f"{name}.{key} = {_toml(value)}" for name, own in table.items() for key, value in own.items()]
    (tmp_path / "run.toml").write_text("\n".join([*lines, f"log.folder = {_toml(str(tmp_path / 'log'))}"]))
    assert main(["train", str(tmp_path / "run.toml")]) == 0
    told = capsys.readouterr().err
    assert "turned down by filters" in told and "left out (more than 200 tokens)" in told
    counts = read_log(tmp_path / "log")[-1]["data"]
    assert counts["filtered"] > 0 and counts["left_out"]["more than 200 tokens"] > 0 and counts["drawn"] >= 4


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


# ---- low-rank updates whose export takes the place of what they started from ----

LORA = {"patterns": ["thinker.layers.*.self_attn.?_proj", "thinker.layers.*.mlp.experts"], "rank": 2, "alpha": 64.0}


@pytest.fixture
def lora(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """The config of a run that exports into its own checkpoint."""
    own = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, own)
    rows = write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}])
    save = {"folder": str(tmp_path / "checkpoints"), "export": str(own)}
    return {**values(own, rows, "thinker", eval={}), "lora": LORA, "save": save, "optimiser": {"lr": 0.01}}


def weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(OmniModel.from_pretrained(folder, device="cpu").named_parameters())


def test_a_second_call_does_not_merge_again(lora: dict[str, Any]) -> None:
    before = weights(lora["save"]["export"])
    build_run(TrainConfig.from_dict(lora)).train()
    once = weights(lora["save"]["export"])
    assert any(not torch.equal(once[name], before[name]) for name in once)
    for _ in range(2):
        result = build_run(TrainConfig.from_dict(lora)).train()
        assert result.step == 2
        again = weights(lora["save"]["export"])
        assert all(torch.equal(again[name], once[name]) for name in once)


def test_it_cannot_go_on_from_merged_weights(lora: dict[str, Any]) -> None:
    build_run(TrainConfig.from_dict(lora)).train()
    longer = {**lora, "train": {**lora["train"], "steps": 4}}
    with pytest.warns(UserWarning, match="other settings"), pytest.raises(ValueError, match="begin a new run"):
        build_run(TrainConfig.from_dict(longer)).train()


def test_one_that_was_cut_short_goes_on(lora: dict[str, Any]) -> None:
    """Its checkpoint is not merged into anything yet."""
    run = build_run(TrainConfig.from_dict(lora))
    run.trainer.config = replace(run.trainer.config, train=replace(run.trainer.config.train, steps=1))
    run.trainer.train()
    before = weights(lora["save"]["export"])
    with pytest.warns(UserWarning, match="other settings"):
        assert build_run(TrainConfig.from_dict(lora)).train().step == 2
    after = weights(lora["save"]["export"])
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_another_place_to_export_to_is_exported_to_again(lora: dict[str, Any], tmp_path: Path) -> None:
    lora["save"]["export"] = str(tmp_path / "other")
    build_run(TrainConfig.from_dict(lora)).train()
    once = weights(str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    build_run(TrainConfig.from_dict(lora)).train()
    again = weights(str(tmp_path / "other"))
    assert all(torch.equal(again[name], once[name]) for name in once)
