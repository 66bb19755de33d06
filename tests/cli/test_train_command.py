"""`omni train` as a user meets it: a dry run, a run, one that goes on, and its complaints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short run of the Thinker in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    return [
        "train",
        str(ROOT / "configs" / "train_thinker_sft.toml"),
        f"model.checkpoint={tiny_checkpoint}",
        "data.train=[{ manifest = 'talk.jsonl' }]",
        "data.workers=0",
        "train.steps=3",
        "train.device=cpu",
        "optimiser.warmup_steps=0",
        "log.progress=false",
    ]


@pytest.mark.filterwarnings("default:resumed with other settings")
def test_a_run_a_second_one_and_a_dry_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "thinker" in shown.err and not (tmp_path / "runs").exists()
    assert main(arguments) == 0
    assert "runs/thinker_sft/model" in capsys.readouterr().out
    assert (tmp_path / "runs" / "thinker_sft" / "model" / "model.safetensors").is_file()
    log = tmp_path / "runs" / "thinker_sft" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 3
    assert main([*arguments, "train.steps=5"]) == 0  # goes on
    assert "warning: resumed with other settings: train.steps 3 -> 5" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert main([*arguments, "--no-resume"]) == 1
    assert "holds checkpoints of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.stepps=3", "did you mean 'steps'"),
        ("train.objective=thinkerr", "did you mean 'thinker'"),
        ("train.parameters=['thinkr.*']", "matches no parameter"),
        ("data.train=[{ manifest = 'nowhere.jsonl' }]", "nowhere.jsonl"),
        ("model.checkpoint=nowhere", "nowhere"),
        ("optimiser.lr=-1", "must be above 0"),
        ("nonsense", "has no form table.key=value"),
        ("data.train=[]", "set data.train = "),
    ],
)
def test_a_wrong_setting_is_one_line(
    arguments: list[str], change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, change]) == 1
    error = capsys.readouterr().err
    assert error.startswith("omni: error: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.slow
def test_two_processes_started_by_torchrun(arguments: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "omni.cli",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "thinker_sft" / "model" / "model.safetensors").is_file()
