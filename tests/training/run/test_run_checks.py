"""What would end a run late, or with a raw error, is refused in words before its model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from build import TINY, chat, speech_codes, write_rows

from omni import OmniModel
from omni.cli.main import main
from omni.packaged.toy import TOY_DATA
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

ROOT = Path(__file__).parents[3]


def config_of(folder: Path, name: str = "thinker", /, **tables: Any) -> TrainConfig:
    """A short run in a folder, as a file would describe it."""
    rows = [{"messages": chat("Say it.", "All right."), "codes": speech_codes(6)} for _ in range(3)]
    write_rows(folder / "rows.jsonl", rows)
    values: dict[str, Any] = {
        "model": {"checkpoint": "nowhere"},
        "train": {"objective": name, "steps": 2, "precision": "fp32", "device": "cpu"},
        "data": {"train": [{"manifest": str(folder / "rows.jsonl")}], "bucket": 4},
        "log": {"progress": False},
    }
    for key, table in tables.items():
        values[key] = {**values.get(key, {}), **table}
    return TrainConfig.from_dict(values)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the check")

    monkeypatch.setattr(OmniModel, "from_pretrained", load)


OPTIONS: list[tuple[str, str, Any]] = [
    ("dpo", "beta", "strong"),
    ("dpo", "beta", 0),
    ("dpo", "label_smoothing", 0.5),
    ("dpo", "speech", "yes"),
    ("gspo", "group_size", 2.5),
    ("gspo", "group_size", 1),
    ("gspo", "rewards", 3),
    ("gspo", "rewards", ["exact_answr"]),
    ("gspo", "rewards", [{"name": "exact_answer", "weight": "high"}]),
    ("gspo", "max_new_tokens", 0),
    ("gspo", "sampling", "greedy"),
    ("codec", "crop_s", "long"),
    ("codec", "crop_s", -1),
    ("codec", "batch_size", 0),
    ("codec", "mel_scales", [[512]]),
    ("codec", "judge_lr", True),
    ("talker", "residual_share", "all"),
    ("talker", "residual_share", 0),
    ("talker", "residual_weight", -0.5),
    ("thinker", "detach", "no"),
    ("distillation", "temperature", [1]),
    ("distillation", "direction", "sideways"),
    ("distillation", "teacher", 7),
    ("flow_matching", "drop_rate", 2),
    ("flow_matching", "n_fft", "large"),
    ("transcription", "head", "ctcc"),
    ("transcription", "labels", "letters"),
    ("transcription", "speeds", [3.0]),
    ("transcription", "max_s", "30 s"),
    ("transcription", "dim", 0),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("objective", "option", "value"), OPTIONS)
def test_an_option_of_an_objective_is_checked_in_words(tmp_path: Path, objective: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.{option}") as caught:
        build_run(config_of(tmp_path, objective, objective={option: value}))
    said = str(caught.value)
    inner = value[0] if isinstance(value, list) else value
    inner = inner["weight"] if isinstance(inner, dict) else inner
    assert repr(value) in said or repr(inner) in said, said
    assert any(word in said for word in ("must", "did you mean", "neither")), said


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("wrong", ["thinkerr", "Talkers", "x", "data"])
def test_a_misspelt_objective_is_shown(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.objective = '{wrong}' is not known; (did you mean|it must be)"):
        build_run(config_of(tmp_path, wrong))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("objective", "parts", "tables", "part"),
    [
        ("talker", ["thinker"], {"train": {"objective": "talker", "parameters": ["talker.*"]}}, "talker"),
        ("joint", ["thinker"], {}, "talker"),
        ("thinker", ["thinker"], {"train": {"objective": "thinker", "parameters": ["code2wav.*"]}}, "code2wav"),
        ("dpo", ["thinker"], {"objective": {"speech": True}}, "talker"),
        ("talker", ["thinker"], {"speaker": {"add": "robin"}}, "talker"),
        ("thinker", ["thinker"], {"lora": {"patterns": ["talker.layers.*"]}}, "talker"),
    ],
)
def test_a_part_that_is_left_out_is_named(
    tmp_path: Path, objective: str, parts: list[str], tables: dict[str, Any], part: str
) -> None:
    tables = {**tables, "model": {"checkpoint": "nowhere", "parts": parts}}
    with pytest.raises(ValueError, match=rf"needs the {part}, which model\.parts = \['thinker'\] leaves out"):
        build_run(config_of(tmp_path, objective, **tables))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: str) -> None:
    """Also where a new model is drawn."""
    model = {"config": str(TINY), "processor": str(TOY_DATA)}
    values = config_of(tmp_path, train={"device": device}).to_dict() | {"model": model}
    with pytest.raises(ValueError, match=f"device '{device}'"):
        build_run(TrainConfig.from_dict(values))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", ["log.folder", "save.folder", "save.export", "data.codec.cache"])
@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/omni"])
def test_folders_that_cannot_be_written_are_found_first(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "taken").write_text("a file")
    tables: dict[str, Any] = {}
    inner, (*outer, last) = tables, name.split(".")
    for key in outer:
        inner = inner.setdefault(key, {})
    inner[last] = str(tmp_path / place)
    with pytest.raises(OSError, match=rf"^{name} = .*choose (a|another) folder"):
        build_run(config_of(tmp_path, "talker", **tables))
    assert not list(tmp_path.glob(".omni-*"))


def test_a_codec_without_its_folder_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Where neither the settings nor the checkpoint have an encoder, no row is blamed."""
    model = {"checkpoint": str(tiny_checkpoint)}
    for kind in ("mel", "omni"):
        table = {"train": [{"manifest": str(tmp_path / "rows.jsonl")}], "codec": {"kind": kind}}
        with pytest.raises(ValueError, match=rf"data\.codec\.kind = '{kind}' needs the folder .*data\.codec\.path"):
            build_run(config_of(tmp_path, "talker", model=model, data=table))
    write_rows(tmp_path / "said.jsonl", [{"messages": chat("Say it.", "So."), "speech": "said.wav"}])
    table = {"train": [{"manifest": str(tmp_path / "said.jsonl")}]}
    with pytest.raises(ValueError, match=r"nothing turns them into codes: set data\.codec"):
        build_run(config_of(tmp_path, "talker", model=model, data=table)).trainer.step()


def failing(*_: Any) -> Any:
    """A scorer whose scores cannot be computed."""

    def score(model: OmniModel, step: int) -> dict[str, float]:
        raise RuntimeError("no scores today")

    return score


@pytest.mark.parametrize(
    ("row", "scorer", "message"),
    [
        ({"messages": chat("Hi", "Ho")}, "test_run_checks:failing", "no scores today"),
        ({"messages": chat("Hi")}, "omni.evaluation.suite:evaluation_hook", "none of 1 rows can be used"),
        (
            {"messages": chat("<image>Hi", "Ho"), "images": ["gone.png"]},
            "omni.evaluation.suite:evaluation_hook",
            r"(?s)none of 1 rows can be used.*gone\.png",
        ),
    ],
)
def test_an_evaluation_that_will_fail_fails_before_the_first_step(
    tiny_checkpoint: Path, tmp_path: Path, row: dict[str, Any], scorer: str, message: str
) -> None:
    write_rows(tmp_path / "eval.jsonl", [row])
    run = build_run(
        config_of(
            tmp_path,
            model={"checkpoint": str(tiny_checkpoint)},
            data={"eval": [{"manifest": str(tmp_path / "eval.jsonl")}]},
            eval={"every": 2, "scorer": scorer},
        )
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=message):
        run.train()
    assert run.trainer.steps_done == 0


@pytest.mark.filterwarnings("ignore:.*eval.jsonl.1 is skipped")
def test_a_first_row_that_is_bad_does_not_stop_the_rehearsal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.jsonl", [{"messages": chat("Hi")}, {"messages": chat("Hi", "Ho")}])
    data = {"eval": [{"manifest": str(tmp_path / "eval.jsonl")}]}
    run = build_run(config_of(tmp_path, model={"checkpoint": str(tiny_checkpoint)}, data=data, eval={"every": 2}))
    assert run.train().step == 2


@pytest.mark.parametrize(
    ("dtype", "saved"), [("checkpoint", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_bf16_checkpoint_is_exported_in_bf16(tmp_path: Path, model: OmniModel, dtype: str, saved: str) -> None:
    """Frozen weights bit for bit, what was trained rounded; the model in memory stays as it was trained."""
    start = OmniModel.from_pretrained(stored(tmp_path / "start", model, torch.bfloat16), device="cpu")
    config = config_of(
        tmp_path,
        model={"checkpoint": str(tmp_path / "start"), "parts": ["thinker"]},
        train={"objective": "thinker", "steps": 1, "parameters": ["thinker.lm_head.*"], "device": "cpu"},
        save={"export": str(tmp_path / "end"), "dtype": dtype},
    )
    run = build_run(config)
    run.train()
    assert {p.dtype for p in run.setup.model.parameters()} == {torch.float32}
    end = OmniModel.from_pretrained(tmp_path / "end", device="cpu")
    assert {str(p.dtype) for p in end.parameters()} == {f"torch.{saved}"}
    before = dict(start.named_parameters())
    for name, p in end.named_parameters():
        assert torch.equal(p.float(), before[name].float()) == ("lm_head" not in name), name


def test_a_checkpoint_that_names_no_type_is_exported_as_its_weights_are(tmp_path: Path, model: OmniModel) -> None:
    folder = stored(tmp_path / "start", model, torch.bfloat16)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"dtype": "bfloat16"', '"dtype": null'))
    run = build_run(
        config_of(
            tmp_path,
            model={"checkpoint": str(folder), "parts": ["thinker"]},
            train={"objective": "thinker", "steps": 1, "parameters": ["thinker.lm_head.*"], "device": "cpu"},
            save={"export": str(tmp_path / "end")},
        )
    )
    run.train()
    assert OmniModel.from_pretrained(tmp_path / "end", device="cpu").dtype == torch.bfloat16


def stored(folder: Path, model: OmniModel, dtype: torch.dtype) -> Path:
    """The tiny model's Thinker in a type, on disk."""
    model.save_pretrained(folder)
    OmniModel.from_pretrained(folder, dtype=dtype, device="cpu", parts=["thinker"]).save_pretrained(folder)
    return folder


def test_tensorboard_that_is_missing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.training.run.train_log import TrainLog

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"log\.tensorboard = true, but TensorBoard is not installed"):
        TrainLog(tmp_path, tensorboard=True).close()
    TrainLog(tmp_path).close()  # nobody asked for it
    assert TrainConfig.from_dict({"model": {"config": "x"}, "train": {"objective": "thinker"}}).log.tensorboard is None


@pytest.mark.parametrize(
    ("command", "offered"),
    [
        (["train", "x.toml"], "data.max_tokens"),
        (["eval", "x.jsonl", "--model", "y"], "--batch"),
        (["chat", "hello"], "--no-audio"),
        (["speak", "--out", "x.wav", "hello"], "--device auto"),
    ],
)
def test_out_of_memory_offers_what_the_command_has(
    command: list[str], offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    def run(args: object) -> int:
        raise MemoryError("16 GiB")

    module = importlib.import_module(f"omni.cli.{command[0]}")
    monkeypatch.setattr(module, "run", run)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert offered in said and ("--no-audio" in said) == (command[0] == "chat"), said


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from omni.cli.main import main
from omni.packaged.toy import TOY_DATA
from omni.training.run.trainer import Trainer
step, number = Trainer.step, getattr(signal, sys.argv[1])

def interrupted(self, *args):
    if self.steps_done == 1:
        os.kill(os.getpid(), number)
        Path("said").write_text("handled")
    return step(self, *args)

Trainer.step = interrupted
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)])
def test_a_signal_is_answered_at_once_and_in_the_exit_code(
    tiny_checkpoint: Path, tmp_path: Path, name: str, code: int
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"messages": chat("Say it.", "All right.")}])
    command = [sys.executable, "-c", SIGNALLED, name, "train", str(ROOT / "configs" / "train_thinker_sft.toml")]
    command += [f"model.checkpoint={tiny_checkpoint}", "data.train=[{ manifest = 'rows.jsonl' }]", "data.workers=0"]
    command += ["train.steps=9", "train.device=cpu", "train.threads=1", "optimiser.warmup_steps=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    heard, ended = (
        next(i for i, line in enumerate(done.stderr.splitlines()) if text in line)
        for text in (name, "ended after step 2")
    )
    assert heard < ended and "once more ends at once" in done.stderr  # fmt: skip
    assert (tmp_path / "runs" / "thinker_sft" / "checkpoints" / "step_00000002").is_dir()
