"""A session's reply as a user gets it: its text printed as it comes, its sound played, all of it cut by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omni.cli.interrupts import Interrupts
from omni.generation.events import AudioChunk, Event, TextDelta, ToolCall, TurnEnd
from omni.session.replies import Kept
from omni.session.session import OmniSession

if TYPE_CHECKING:
    from rich.console import Console

    from omni.cli.player import Player


@dataclass
class Answer:
    """What came of a reply. chunks: its sound; calls: of tools; kept: what the history holds, if it was interrupted;
    played_samples: how much of the sound was played, None without a player."""

    chunks: list[AudioChunk] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    end: TurnEnd | None = None
    kept: Kept | None = None
    played_samples: int | None = None

    @property
    def sound(self) -> Tensor | None:
        """float32 [n], of an interrupted reply what was played; None if there is none."""
        whole = torch.cat([chunk.samples for chunk in self.chunks]) if self.chunks else None
        if whole is None or self.kept is None or self.played_samples is None:
            return whole
        return whole[: self.played_samples]


class Answering:
    """One reply of a session being given. interactive: Ctrl-C interrupts the reply, not the program."""

    def __init__(
        self, session: OmniSession, console: Console, progress: Console, player: Player | None, *, interactive: bool
    ) -> None:
        self.session, self.console, self.progress, self.player = session, console, progress, player
        self.interactive = interactive
        self.answer = Answer()
        self._events: Iterable[Event] = ()  # held here: a reply whose events are forgotten is interrupted
        self._printed = self._thinking = False

    def give(self, arguments: dict[str, Any]) -> Answer:
        """Ask for the reply and show it -> what came of it.

        After Ctrl-C the history holds what was heard. Raises KeyboardInterrupt if nothing had come yet, and what the
        reply raises; what was asked is then still in the session.
        """
        interrupts = Interrupts(self._silence)
        try:
            with self._listening(interrupts):
                self._begin(arguments)
                self._show(interrupts)
                if self.player is not None:
                    self.player.finish()
                if interrupts.pressed:
                    self._interrupt()
        except KeyboardInterrupt:
            if not self.interactive or (self.answer.end is None and not self.session.responding):
                raise
            self._interrupt()
            if not self._begun:
                raise
        finally:
            self._silence()
            if self.player is not None:
                self.player.finish()
            self._end_line()
        return self.answer

    @contextmanager
    def _listening(self, interrupts: Interrupts) -> Iterator[None]:
        """Let Ctrl-C interrupt the reply where somebody is there to go on talking."""
        if not self.interactive:
            yield
            return
        with interrupts:
            yield

    def _begin(self, arguments: dict[str, Any]) -> None:
        """Ask for the reply, with a sign of life until its first event has come."""
        with self.progress.status("reading ..."):
            events = self.session.respond(**arguments)
            self._events = chain([next(events)], events)

    def _show(self, interrupts: Interrupts) -> None:
        for event in self._events:
            self._take(event)
            interrupts.begun = self._begun
            if interrupts.pressed:
                return

    @property
    def _begun(self) -> bool:
        """Whether anything has come that can be seen or heard."""
        return self._printed or bool(self.answer.chunks) or self.answer.end is not None

    def _take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._print(event)
        elif isinstance(event, AudioChunk):
            self.answer.chunks.append(event)
            if self.player is not None:
                self.player(event)
        elif isinstance(event, ToolCall):
            self.answer.calls.append(event)
        else:
            self.answer.end = event

    def _print(self, event: TextDelta) -> None:
        if not event.text:
            return
        if self._thinking and not event.reasoning:
            self.progress.out()
        self._thinking = event.reasoning
        self._printed = True
        if event.reasoning:
            self.progress.out(event.text, style="dim", highlight=False, end="")
        else:
            self.console.out(event.text, highlight=False, end="")

    def _end_line(self) -> None:
        """An answer is at least one line, so that each question of a pipe gets one; a mere call is none."""
        ended = self.answer.end is not None and not self.answer.calls
        if self._printed or ended:
            self.console.out()

    def _silence(self) -> None:
        if self.player is not None:
            self.player.cut()

    def _interrupt(self) -> None:
        """Cut the reply to what was heard: what was played or, without a player, all that has come."""
        played_ms = None
        if self.player is not None:
            self.player.cut()
            self.player.finish()
            played_ms, self.answer.played_samples = self.player.played_ms, self.player.played_samples
        self.answer.kept = self.session.interrupt(played_ms)
        self.answer.calls.clear()  # whoever interrupts a reply does not want what it calls
