"""The distribution: its name, its version, what it ships, and signatures that an editor can show."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import omni
from omni.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_distribution_has_a_name_of_its_own() -> None:
    assert re.search(r'^name = "thinker-talker"$', PROJECT, re.MULTILINE)
    for folder, pattern in (("omni", "*.py"), ("docs", "*.md"), ("recipes", "**/*.*"), ("scripts", "*.py")):
        for path in (ROOT / folder).rglob(pattern):
            if path.suffix in (".py", ".md", ".toml"):
                assert not re.search(r"(pip install|requires) ['\"]?omni\b", path.read_text()), path
    assert "omni[" not in (ROOT / "README.md").read_text()


def test_every_extra_that_a_message_names_exists() -> None:
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", PROJECT, re.DOTALL)
    assert extras is not None
    known = re.findall(r"^(\w+) =", extras[1], re.MULTILINE)
    named = {
        name for path in [*(ROOT / "omni").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
        for name in re.findall(r"thinker-talker\[(\w+)\]", path.read_text())
    }  # fmt: skip
    assert {"peft", "flash", "play", "train"} <= named <= set(known)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = re.search(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    assert version is not None

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)  # a source tree that nothing installed
    vars(omni).pop("__version__", None)
    assert omni.__version__ == version[1]
    monkeypatch.setattr(importlib.metadata, "version", {"thinker-talker": "7.8.9"}.__getitem__)
    vars(omni).pop("__version__", None)
    assert omni.__version__ == "7.8.9"
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == "omni 7.8.9\n"
    vars(omni).pop("__version__", None)


def test_the_command_says_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "omni.cli", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and re.fullmatch(r"omni \d+\.\d+\S*\n", done.stdout)


def test_public_names() -> None:
    assert issubclass(omni.EngineFullError, RuntimeError)
    for name in omni.__all__:
        assert getattr(omni, name).__name__ == name
    assert (ROOT / "omni" / "py.typed").is_file() and '"py.typed"' in PROJECT


def test_an_editor_shows_the_options_of_a_session() -> None:
    own = inspect.signature(omni.OmniSession).parameters
    shown = inspect.signature(omni.OmniEngine.session).parameters
    options = [name for name in own if name not in ("model", "processor")]
    assert [name for name in shown if name != "self"] == options
    for name in options:
        assert (
            shown[name].kind is inspect.Parameter.KEYWORD_ONLY and shown[name].annotation is not inspect.Parameter.empty
        )
        assert shown[name].default == own[name].default, name
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
