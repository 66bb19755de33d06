"""Lines that a user types, with history and completion, or that another program writes into a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

HISTORY_LINES = 1000


class Lines(Protocol):
    """Where lines come from. interactive: somebody sees the prompts, and Ctrl-C ends what runs, not the program."""

    interactive: bool

    def read(self, prompt: str) -> str | None:
        """The next line without its end, None after the last. Raises KeyboardInterrupt for Ctrl-C."""

    def close(self) -> None:
        """No more lines are read."""


class PipedLines:
    """The lines of a file or a pipe; nothing is shown."""

    interactive = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def read(self, prompt: str) -> str | None:
        line = self._stream.readline()
        return line.removesuffix("\n").removeprefix("\ufeff") if line else None

    def close(self) -> None: ...


class TerminalLines:
    """Lines typed at a terminal, edited by readline where Python has it.

    complete: a line so far -> the lines that it may become, for the Tab key.
    """

    interactive = True

    def __init__(self, complete: Callable[[str], list[str]]) -> None:
        self._readline = _readline()
        if self._readline is not None:
            _set_up(self._readline, complete)

    def read(self, prompt: str) -> str | None:
        if not sys.stdout.isatty():  # answers go to a file; `input` would write the prompt there too
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            return None

    def close(self) -> None:
        if self._readline is not None:
            _save_history(self._readline)


def open_lines(complete: Callable[[str], list[str]]) -> Lines:
    """The lines of standard input: a terminal's, or those of a pipe. Bytes that are no text become U+FFFD."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    return TerminalLines(complete) if sys.stdin.isatty() else PipedLines(sys.stdin)


def history_path() -> Path:
    """Where typed lines are kept: in the folder that XDG_STATE_HOME names, else in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "omni" / "chat_history"


def paths_that_begin(typed: str) -> list[str]:
    """The files and folders (these with a slash at the end) whose path begins as typed. Hidden ones if asked for."""
    folder, slash, begun = typed.rpartition("/")
    with suppress(OSError, RuntimeError, ValueError):  # no such folder, no such user, no name of a file
        entries = sorted(Path((folder + slash) or ".").expanduser().iterdir())
        fit = [path for path in entries if path.name.startswith(begun) and (begun or not path.name.startswith("."))]
        return [folder + slash + path.name + ("/" if path.is_dir() else "") for path in fit]
    return []


def _readline() -> Any:
    """The module readline, None where there is none (Windows)."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _set_up(readline: Any, complete: Callable[[str], list[str]]) -> None:
    def candidate(_: str, number: int) -> str | None:
        begin, end = readline.get_begidx(), readline.get_endidx()
        whole = complete(readline.get_line_buffer()[:end])
        return whole[number][begin:] if number < len(whole) else None  # readline replaces the last word alone

    readline.set_completer_delims(" \t\n/")
    readline.set_completer(candidate)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    with suppress(OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: no home folder
        readline.read_history_file(history_path())


def _save_history(readline: Any) -> None:
    """Keep the last lines in a file that is the user's alone; where that cannot be, they are forgotten."""
    with suppress(OSError, RuntimeError):
        path = history_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(path)
