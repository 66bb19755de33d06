"""`omni chat` without a question: a conversation, line by line, from a terminal or from a pipe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.cli.answer import Answer, Answering
from omni.cli.arguments import ANSWER, NANO, numbered
from omni.cli.commands import complete, obey, take_back
from omni.cli.failures import one_line
from omni.cli.lines import Lines, open_lines
from omni.cli.player import Player, open_player
from omni.generation.events import ToolCall
from omni.generation.streaming_config import StreamingConfig
from omni.processing.audio_file import write_sound
from omni.session.items import IN_PROGRESS
from omni.session.session import OmniSession

if TYPE_CHECKING:
    from rich.console import Console

    from omni.model import OmniModel

WELCOME = "Type a question. /help lists the commands, Ctrl-C interrupts a reply, Ctrl-D leaves."
PROMPT = "> "
MAKE_ROOM = 0.25  # a full conversation forgets its oldest turns until this share of its positions is free


def converse(
    args: argparse.Namespace, model: OmniModel, console: Console, progress: Console, arguments: dict[str, Any]
) -> int:
    """What `omni chat` does without a question: lines of standard input until they end -> the exit code.

    The pictures of --image come before the first question. arguments: of every reply.
    """
    new_session = partial(
        OmniSession,
        model,
        speaker=args.speaker,
        system=args.system,
        streaming=StreamingConfig(audio_window_s=args.audio_window, audio_chunk_s=args.audio_chunk),
        use_audio_in_video=args.use_audio_in_video,
        make_room=MAKE_ROOM,
    )
    player = None
    if args.play and arguments["return_audio"]:
        assert model.code2wav is not None
        player = partial(open_player, int(model.code2wav.sample_rate), progress)
    chat = Chat(new_session, model, console, progress, arguments, voice=args.speaker, out=args.out, open_player=player)
    for picture in args.image:
        chat.session.push_image(picture)
    if args.model == NANO:
        chat.say(
            "omni-nano was taught questions that stand alone: before the next one let it forget the last with /new."
        )
    return chat.run(open_lines(chat.complete))


class Chat:
    """A conversation in progress.

    new_session: begins one; arguments: of every reply (`OmniSession.respond`); voice: the speaker of the next replies,
    None for the session's.
    out: the answers' sound file, into whose name their number is put; None writes none where sound is played.
    open_player: a player for one reply, None if the sound is not to be played or no device answers.
    """

    def __init__(
        self,
        new_session: Callable[[], OmniSession],
        model: OmniModel,
        console: Console,
        progress: Console,
        arguments: dict[str, Any],
        *,
        voice: str | None = None,
        out: Path | None = None,
        open_player: Callable[[], Player | None] | None = None,
    ) -> None:
        self.new_session, self.session = new_session, new_session()
        self.model, self.console, self.progress = model, console, progress
        self.arguments, self.voice, self.out = arguments, voice, out
        self.lines: Lines
        self.failed = False
        self._open_player, self._answers = open_player, 0
        self._oldest: tuple[OmniSession, str | None] = (self.session, None)

    @property
    def speaks(self) -> bool:
        """Whether answers have sound."""
        return bool(self.arguments.get("return_audio"))

    @property
    def waiting(self) -> bool:
        """Whether media were given that nobody has asked about yet."""
        items = self.session.items
        return bool(items) and items[-1].role == "user" and items[-1].status == IN_PROGRESS

    def run(self, lines: Lines) -> int:
        """Take lines until there are no more -> the exit code: 1 if a line of a pipe failed."""
        self.lines = lines
        if lines.interactive:
            self.say(WELCOME)
        try:
            while self._go_on():
                pass
        finally:
            lines.close()
        return int(self.failed and not lines.interactive)

    def _go_on(self) -> bool:
        """Take the next line -> whether there was one, and none that leaves."""
        try:
            line = self.lines.read(PROMPT)
            if line is None and self.lines.interactive:
                self.progress.out()  # the shell goes on in a line of its own
            elif line is None and self.waiting:  # a pipe that ends after a spoken question
                self._take("")
            return line is not None and self._take(line)
        except KeyboardInterrupt:
            if not self.lines.interactive:
                raise
            self.progress.out()
            self.say("Ctrl-D (or /quit) leaves the conversation.")
            return True

    def say(self, text: str) -> None:
        """A line about the conversation, which is no part of it."""
        self.progress.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def complete(self, line: str) -> list[str]:
        """What a line may become with the Tab key."""
        return complete(self, line)

    def _take(self, line: str) -> bool:
        """Obey a command or answer a question, whatever comes of it -> whether the conversation goes on."""
        goes_on = self._try(line.strip())
        ids = [item.id for item in self.session.items if item.role != "system"]
        session, oldest = self._oldest
        if session is self.session and ids and oldest is not None and oldest not in ids:
            self.say("  the conversation was full, and its oldest turns are forgotten")
        self._oldest = self.session, ids[0] if ids else None
        return goes_on

    def _try(self, line: str) -> bool:
        try:
            if line.startswith("/") and not line.startswith("//"):
                return obey(self, line)
            if line or self.waiting:
                self.ask(line[1:] if line.startswith("//") else line)
        except KeyboardInterrupt:
            if not self.lines.interactive:
                raise
            self.progress.out()  # behind the ^C that the terminal shows
            what = "the conversation is as it was before" if line.startswith("/") else "what was asked is taken back"
            self.say(f"stopped; {what}")
        except Exception as error:
            if os.environ.get("OMNI_DEBUG") or self.session.closed:
                raise
            self.failed = True
            text = f"omni: error: {one_line(error, 'chat')}"
            self.progress.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return True

    def ask(self, text: str) -> None:
        """Put a question ("": the media that wait are the question) and give the answer.

        If that fails, the question and its media are taken back, so that the next one is not added to them.
        """
        if text:
            self.session.push_text(text)
        answer = self._answer()
        while answer.calls:
            with self._or_taken_back():
                self._push_results(answer.calls)
            answer = self._answer()

    @contextmanager
    def _or_taken_back(self) -> Iterator[None]:
        """If it is left by a failure or by Ctrl-C, what was asked is taken back."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.session.closed or not (self.lines.interactive or isinstance(error, Exception)):
                raise
            take_back(self.session)
            if isinstance(error, Exception):
                self.say("what was asked is taken back")
            raise

    def _answer(self) -> Answer:
        player = self._open_player() if self._open_player is not None else None
        if player is None:
            self._open_player = None  # said once
        answering = Answering(self.session, self.console, self.progress, player, interactive=self.lines.interactive)
        with self._or_taken_back():
            answer = answering.give({**self.arguments, "speaker": self.voice})
            if answer.end is not None and answer.end.reason == "error":
                raise ValueError("the model wrote the call of a tool in a form that cannot be read; ask again")
        if player is not None and player.error is not None:
            self.say(f"the sound device failed ({one_line(player.error, 'chat')})")
        self._tell(answer, played=player is not None)
        return answer

    def _tell(self, answer: Answer, *, played: bool) -> None:
        """Write the sound, and say where it is and what an interrupted reply left."""
        notes = []
        sound = answer.sound
        if sound is not None:
            rate_hz = answer.chunks[0].sample_rate
            note = f"{len(sound) / rate_hz:.2f} s of speech" + (" played" if played else "")
            if self.out is not None or not played:
                self._answers += 1
                path = numbered(self.out or ANSWER, self._answers)
                write_sound(path, sound, rate_hz)
                note += f" in {path}"
            notes.append(note)
        if answer.kept is not None:
            notes.append(f"interrupted; the conversation keeps {answer.kept.text!r}")
        elif answer.end is not None and answer.end.reason != "stop":
            notes.append(f"ended by {answer.end.reason}")
        if notes:
            self.say("  " + "; ".join(notes))

    def _push_results(self, calls: Sequence[ToolCall]) -> None:
        """Show what the model calls and ask for each result, then hand all of them on."""
        results = []
        for call in calls:
            self.say(f"  calls {call.name}({call.arguments})")
            result = self.lines.read(f"result of {call.name}> ")
            if result is None:
                raise ValueError(f"the call of {call.name} got no result: the input ended")
            results.append(result)
        for call, result in zip(calls, results):
            self.session.push_tool_result(call.id, result)
