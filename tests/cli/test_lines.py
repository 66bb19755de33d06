"""Where a conversation's lines come from: terminals with history and completion, and pipes."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from omni.cli import lines
from omni.cli.lines import PipedLines, TerminalLines, history_path, open_lines


class ReadlineDouble:
    """Stands in for the module readline."""

    def __init__(self, doc: str = "GNU readline") -> None:
        self.__doc__ = doc
        self.buffer, self.bound, self.kept = "", list[str](), list[str]()

    def set_completer_delims(self, delimiters: str) -> None:
        self.delimiters = delimiters

    def set_completer(self, completer: Any) -> None:
        self.completer = completer

    def parse_and_bind(self, line: str) -> None:
        self.bound.append(line)

    def read_history_file(self, path: Path) -> None:
        self.kept = Path(path).read_text().splitlines()

    def set_history_length(self, length: int) -> None:
        self.length = length

    def write_history_file(self, path: Path) -> None:
        Path(path).write_text("\n".join(self.kept[-self.length :]))

    def get_line_buffer(self) -> str:
        return self.buffer

    def get_begidx(self) -> int:
        return 1 + max(self.buffer.rfind(mark) for mark in self.delimiters)

    def get_endidx(self) -> int:
        return len(self.buffer)

    def tab(self, line: str) -> str:
        """The line after the only candidate has replaced its last word."""
        self.buffer = line
        word, more = self.completer("", 0), self.completer("", 1)
        assert more is None
        return line[: self.get_begidx()] + word


def test_pipes() -> None:
    text = "\ufeffone\r\n\n  two \nlast".replace("\r\n", "\n")  # text streams end their lines so
    piped = PipedLines(io.StringIO(text))
    assert [piped.read("> ") for _ in range(6)] == ["one", "", "  two ", "last", None, None]
    assert not piped.interactive


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"a\xff\r\nb"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    piped = open_lines(lambda line: [])
    assert [piped.read("") for _ in range(3)] == ["a\ufffd", "b", None]
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(lines, "_readline", lambda: None)
    assert isinstance(open_lines(lambda line: []), TerminalLines)


def test_a_terminal_without_readline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lines, "_readline", lambda: None)
    typed = iter(["one"])

    def read(prompt: str) -> str:
        assert prompt == ""  # stdout is no terminal here, so the prompt must not go there
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    terminal = TerminalLines(lambda line: [])
    assert (terminal.read("> "), terminal.read("> ")) == ("one", None)
    terminal.close()
    assert capsys.readouterr() == ("", "> > ")


def test_tab_replaces_the_last_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline = ReadlineDouble()
    monkeypatch.setattr(lines, "_readline", lambda: readline)
    whole = {"/im": ["/image "], "/image a/my p": ["/image a/my picture.png"], "/image": []}
    TerminalLines(lambda line: whole[line])
    assert readline.tab("/im") == "/image " and readline.tab("/image a/my p") == "/image a/my picture.png"
    readline.buffer = "/image"
    assert readline.completer("", 0) is None and readline.bound == ["tab: complete"]
    monkeypatch.setattr(lines, "_readline", lambda: (other := ReadlineDouble("libedit readline"), other)[1])
    other = TerminalLines(lambda line: [])
    assert other._readline.bound == ["bind ^I rl_complete"]


def test_history_is_the_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    readline = ReadlineDouble()
    monkeypatch.setattr(lines, "_readline", lambda: readline)
    terminal = TerminalLines(lambda line: [])
    readline.kept = [f"line {number}" for number in range(1005)]
    terminal.close()
    assert history_path() == tmp_path / "state" / "omni" / "chat_history"
    assert os.stat(history_path()).st_mode & 0o777 == 0o600
    assert history_path().read_text().splitlines()[0] == "line 5"
    readline.kept = []
    TerminalLines(lambda line: [])
    assert len(readline.kept) == 1000
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "omni" / "chat_history"


def test_history_that_cannot_be_kept_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in the place of its folder, a folder in its own, bytes that are no text."""
    monkeypatch.setattr(lines, "_readline", lambda: ReadlineDouble())
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "omni" / "chat_history").mkdir(parents=True)
    (tmp_path / "bytes" / "omni").mkdir(parents=True)
    (tmp_path / "bytes" / "omni" / "chat_history").write_bytes(b"\xff\xfe")
    for place in ("file", "folder", "bytes"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / place))
        TerminalLines(lambda line: []).close()
