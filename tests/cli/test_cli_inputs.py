"""What commands are given: checkpoints under every name, media that are not there, what the demo leaves behind."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

import pytest
from build import ROOT

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.cli.arguments import how_to_call
from omni.cli.main import main

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *argv: object, code: int = 1) -> str:
    """The one line that a failing command writes."""
    assert main([str(word) for word in argv]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---- omni info takes what omni chat takes ----


@pytest.mark.parametrize("words", [[], ["omni-nano"], ["--model", "omni-nano"]])
def test_info_of_the_packaged_model(words: list[str], capsys: Capture) -> None:
    assert main(["info", *words]) == 0
    assert "omni-nano: qwen3_omni_moe" in capsys.readouterr().out


def test_info_by_option_and_by_word(tiny_checkpoint: Path, capsys: Capture) -> None:
    assert main(["info", str(tiny_checkpoint)]) == 0
    alone = capsys.readouterr().out
    assert main(["info", "--model", str(tiny_checkpoint)]) == 0
    assert capsys.readouterr().out == alone
    with pytest.raises(SystemExit) as ended:
        main(["info", str(tiny_checkpoint), "--model", str(tiny_checkpoint)])
    assert ended.value.code == 2 and "name one checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["omni-nan", "omni_nano", "omninano", "Omni-Nano", "omni nano", "omni-nanoo"])
def test_a_misspelt_packaged_name(name: str, capsys: Capture) -> None:
    """Said at once, without asking the Hub."""
    for load in (OmniModel.from_pretrained, OmniProcessor.from_pretrained, OmniConfig.from_pretrained):
        with pytest.raises(FileNotFoundError, match="did you mean 'omni-nano'"):
            load(name)
    assert "did you mean 'omni-nano'" in said(capsys, "info", name)
    assert "did you mean 'omni-nano'" in said(capsys, "chat", "--model", name, "--no-audio", "hi")


# ---- media that are not there ----


@pytest.mark.parametrize("kind", ["audio", "image", "video"])
def test_missing_media_are_noticed_before_the_model_is_loaded(kind: str, tmp_path: Path, capsys: Capture) -> None:
    """The model of these commands does not exist, so the complaint about the medium must have come first."""
    ask = ("chat", "--model", tmp_path / "no-model", "--no-audio", "hi", f"--{kind}")
    assert f"{kind} file '{tmp_path / 'gone.bin'}' does not exist" in said(capsys, *ask, tmp_path / "gone.bin")
    assert "does not exist" in said(capsys, *ask, (tmp_path / "gone.bin").as_uri())
    assert "is not a file" in said(capsys, *ask, tmp_path)
    (tmp_path / "empty.bin").touch()
    assert "empty.bin" in said(capsys, *ask, tmp_path / "empty.bin")
    if kind != "image":
        assert "gone.bin" in said(capsys, *ask, tmp_path / "gone.bin", "--realtime")
    (tmp_path / "there.bin").write_bytes(b"x")
    assert "no-model" in said(capsys, *ask, tmp_path / "there.bin")
    assert "no-model" in said(capsys, *ask, "https://example.org/a.bin")  # asked for when it is read


# ---- what the demo writes ----


def test_git_ignores_what_the_demo_writes() -> None:
    patterns = [line.lstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for name in ("out.wav", "out.png", "answer_1.wav", "answer_2.wav", "answer_3.wav"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_how_to_call_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the demo says at its end: by its name where the shell finds it, else by a path that works from here."""
    (tmp_path / "my env").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.chdir(tmp_path)
    assert how_to_call("chat") == f"'{tmp_path}/my env/python' -m omni.cli chat"
    (tmp_path / "my env" / "omni").touch()
    assert how_to_call("chat") == "'my env/omni' chat"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert how_to_call("chat") == f"'{tmp_path}/my env/omni' chat"
    (tmp_path / "omni").touch(mode=0o755)
    assert how_to_call("chat") == "omni chat"
