"""What tests of a conversation are made of: lines that somebody types, a sound device, what the screen shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from omni import AudioChunk, OmniModel, OmniSession
from omni.cli.conversation import Chat

REPLY: dict[str, Any] = {"max_new_tokens": 6, "max_frames": 6, "seed": 0, "return_audio": True}


class Typed:
    """Lines that are typed one after the other. An exception among them is raised, a function called for its line."""

    def __init__(self, *lines: Any, interactive: bool = True) -> None:
        self.interactive, self.rest = interactive, list(lines)
        self.prompts, self.closed = list[str](), False

    def read(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        line = self.rest.pop(0) if self.rest else None
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line() if callable(line) else line

    def close(self) -> None:
        self.closed = True


class Talk:
    """A conversation with a model, and what it shows: `out` and `err` as they are at the end."""

    def __init__(
        self,
        model: OmniModel,
        *,
        console: type[Console] = Console,
        session: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.streams = io.StringIO(), io.StringIO()
        show, tell = console(file=self.streams[0]), Console(file=self.streams[1], width=200)
        arguments = {**REPLY, **options.pop("arguments", {})}
        self.chat = Chat(partial(OmniSession, model, **session or {}), model, show, tell, arguments, **options)

    def run(self, *lines: Any, interactive: bool = True) -> Talk:
        self.lines = Typed(*lines, interactive=interactive)
        self.code = self.chat.run(self.lines)
        assert self.lines.closed
        return self

    @property
    def out(self) -> str:
        return self.streams[0].getvalue()

    @property
    def err(self) -> str:
        return self.streams[1].getvalue()


class PlayerDouble:
    """Plays at once what it is given, up to `heard` samples; `during` is called while the rest is waited for."""

    def __init__(self, heard: int = 1 << 30, during: Callable[[], None] = lambda: None) -> None:
        self.limit, self.during, self.error = heard, during, None
        self.given, self.was_cut, self.finished = 0, False, 0

    def __call__(self, chunk: AudioChunk) -> None:
        self.given += len(chunk.samples)

    def cut(self) -> None:
        self.was_cut = True

    def finish(self) -> None:
        self.finished += 1
        if not self.was_cut:
            self.during()

    @property
    def played_samples(self) -> int:
        return min(self.given, self.limit)

    @property
    def played_ms(self) -> float:
        return self.played_samples / 24


class SoundDevice:
    """Stands in for the package sounddevice: notes what is played, and hears `blocks` when a recording begins."""

    def __init__(
        self, error: Exception | None = None, blocks: tuple[np.ndarray, ...] = (), latency: float = 0.0
    ) -> None:
        self.error, self.blocks, self.latency = error, blocks, latency
        self.samples, self.calls = list[float](), list[str]()

    def OutputStream(self, samplerate: int, channels: int, dtype: str) -> SoundDevice:
        if self.error is not None:
            raise self.error
        assert (samplerate, channels, dtype) == (24000, 1, "float32")
        return self

    def InputStream(self, callback: Callable[..., None], **options: Any) -> SoundDevice:
        assert options == {"samplerate": 44100, "channels": 1, "dtype": "float32", "blocksize": 4410}
        self.hear = callback
        return self

    def query_devices(self, kind: str) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"default_samplerate": 44100.0}

    def start(self) -> None:
        self.calls.append("start")
        for block in self.blocks:
            shared = block[:, None].copy()
            self.hear(shared, len(block), None, None)
            shared[:] = 9  # a sound card's memory is used again

    def stop(self) -> None:
        self.calls.append("stop")

    def abort(self) -> None:
        self.calls.append("abort")

    def write(self, samples: np.ndarray) -> None:
        assert samples.shape[1] == 1
        self.samples += samples[:, 0].tolist()

    def close(self) -> None:
        self.calls.append("close")


def files(folder: Path) -> list[str]:
    """Names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
