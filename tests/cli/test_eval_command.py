"""`omni eval`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from omni import OmniModel
from omni.cli.eval import DESCRIPTION, add_arguments, write_results
from omni.evaluation.row_metrics import METRICS, Record, Score
from omni.evaluation.suite import EvalResult

Capture = pytest.CaptureFixture[str]


def omni_eval(*argv: str | Path) -> int:
    """The command as `omni` runs it; misuse raises SystemExit."""
    parser = argparse.ArgumentParser(prog="omni eval")
    add_arguments(parser)
    args = parser.parse_args([str(word) for word in argv])
    return args.run(args)


def turn(user: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    codes = torch.arange(12).view(4, 3).tolist()
    return write(
        tmp_path / "set.jsonl",
        turn("One?", "Yes.", category="[short]", codes=codes),
        turn("Two, at some more length?", "No.", category="long"),
    )


def test_it_prints_and_writes_scores(tiny_checkpoint: Path, manifest: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "results.jsonl"
    words = ("--metrics", "wer,loss,codes", "--max-new-tokens", "4", "--batch", "2", "--device", "cpu", "--out", out)
    assert omni_eval(manifest, "--model", tiny_checkpoint, *words) == 0
    printed = capsys.readouterr()
    *rows, whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reference"] for row in rows] == ["Yes.", "No."] and whole["rows"] == 2
    assert [row["category"] for row in rows] == ["[short]", "long"]
    assert set(rows[0]["scores"]) == {"wer", "loss", "code_loss", "code_accuracy"} | {
        f"code_accuracy_{k}" for k in range(4)
    }
    assert set(rows[1]["scores"]) == {"wer", "loss"}
    assert whole["max_new_tokens"] == 4 and whole["model"] == str(tiny_checkpoint) and whole["skipped"] == {}
    for name, value in whole["numbers"].items():
        assert re.search(rf"^{name} +{value:.4f} +\d$", printed.out, re.MULTILINE), name
    for category, numbers in whole["categories"].items():
        line = next(line for line in printed.out.splitlines() if line.startswith(category))
        assert f"{numbers['loss']:.4f}" in line
    assert "2 rows scored" in printed.err
    first = out.read_text()
    omni_eval(manifest, "--model", tiny_checkpoint, *words)
    assert out.read_text() == first  # nothing in it is drawn by chance


def test_speech_metrics_load_what_speaks(
    tiny_checkpoint: Path, manifest: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_asr_here.py").write_text("def transcribe(samples, rate):\n    return 'yes'\n")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results.jsonl"
    words = ("--metrics", "mel,spoken-wer", "--transcriber", "my_asr_here:transcribe", "--max-frames", "3")
    omni_eval(manifest, "--model", tiny_checkpoint, *words, "--max-new-tokens", "3", "--speaker", "aiden", "--out", out)
    *rows, whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(whole["numbers"]) == {"mel", "spoken_wer"} and {row["transcript"] for row in rows} <= {"yes", ""}
    assert "mel" in rows[0]["scores"] and "mel" not in rows[1]["scores"]
    omni_eval(write(tmp_path / "mute.jsonl", turn("a", "b")), "--model", tiny_checkpoint, "--metrics", "loss,codes")
    assert "codes: no row has the speech that it compares" in capsys.readouterr().err


def test_a_model_without_speech_is_refused_before_it_loads(
    tmp_path: Path, manifest: Path, model: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    values = {**model.config.to_dict(), "enable_audio_output": False}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="answers in text only; leave the metrics of speech out"):
        omni_eval(manifest, "--model", folder, "--metrics", "codes")


def test_what_cannot_be_done_is_said_before_the_model_loads(manifest: Path, tmp_path: Path, capsys: Capture) -> None:
    model = ("--model", tmp_path / "nowhere")
    for words, told in (
        ((tmp_path / "none.jsonl", *model), "none.jsonl' does not exist"),
        ((manifest, *model, "--metrics", "wr"), "unknown metric 'wr'; did you mean 'wer'"),
        ((manifest, *model, "--metrics", "spoken_wer"), "needs a transcriber"),
        ((manifest, *model, "--metrics", "codec_mel"), "needs the codec"),
        ((manifest, *model, "--transcriber", "nothing_there:f"), "cannot be imported"),
        ((manifest, *model, "--language", "??"), "language"),
        ((manifest, *model, "--out", tmp_path / "no" / "a.jsonl"), "does not exist"),
        ((manifest, *model, "--out", tmp_path), "is a folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(told)):
            omni_eval(*words)
    for words, told in (
        (("--codec-path", "x"), "belong to --codec"),
        (("--codec", "mp3"), "is not one of mel, mimi, omni"),
        (("--batch", "0"), "at least 1"),
        (("--metrics", "wer,,cer"), "no list of names"),
    ):
        with pytest.raises(SystemExit):
            omni_eval(manifest, *model, *words)
        assert told in capsys.readouterr().err


def test_the_help_lists_every_metric() -> None:
    section = DESCRIPTION.partition("metrics:\n")[2]
    listed = [name for line in section.splitlines() for name in re.split(", ", re.split(" {2,}", line.strip())[0])]
    assert sorted(listed) == sorted(METRICS)


def result(reference: str) -> EvalResult:
    record = Record("a:1", None, reference, "x", scores={"wer": Score(2, 0)})
    return EvalResult({"wer": float("inf")}, {}, [record], {"wer": 1}, {}, ())


def test_the_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, result("Zoë \ud800"), {"model": "m"})
    row, whole = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert row["scores"] == {"wer": None} and whole["numbers"] == {"wer": None} and row["reference"] == "Zoë \ud800"
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, result("b"), {"model": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
