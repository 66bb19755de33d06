"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.cli.lines import paths_that_begin
from omni.cli.microphone import record
from omni.cli.realtime import in_time, read_video
from omni.config.keywords import nearest
from omni.generation.arguments import speaker_ids, speaker_name
from omni.processing.audio_file import check_samples, decode_audio
from omni.processing.sources import describe, open_source
from omni.session.items import IN_PROGRESS
from omni.session.session import OmniSession

if TYPE_CHECKING:
    from omni.cli.conversation import Chat


@dataclass(frozen=True)
class Command:
    """act: takes the conversation and the command's argument. argument: its name in the help, in brackets if it may be
    left out, "" for none. completions: what Tab makes of an argument."""

    act: Callable[[Chat, str], None]
    argument: str
    help: str
    completions: Callable[[Chat, str], list[str]] = lambda chat, typed: []


def obey(chat: Chat, line: str) -> bool:
    """Do what a line with a slash says -> whether the conversation goes on. Raises what the command raises."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS, "/help lists them")
        raise ValueError(f"there is no command {name!r}; {hint} (a text that begins with a slash: type two)")
    command = COMMANDS[name]
    if argument and not command.argument:
        raise ValueError(f"{name} takes no argument, got {argument!r}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise ValueError(f"{name} needs an argument: {name} {command.argument}")
    command.act(chat, argument)
    return name != "/quit"


def complete(chat: Chat, line: str) -> list[str]:
    """The lines that a line may become."""
    name, space, typed = line.partition(" ")
    if not space:
        return [
            known + (" " if COMMANDS[known].argument else "") for known in COMMANDS if known.startswith(name or "/")
        ]
    if name not in COMMANDS:
        return []
    return [f"{name} {whole}" for whole in COMMANDS[name].completions(chat, typed)]


def file_name(argument: str) -> str:
    """The file that an argument names: all of it, or what a shell would make of its quotes and backslashes."""
    if not os.path.exists(os.path.expanduser(argument)):
        try:
            words = shlex.split(argument)
        except ValueError:  # a single quote, which belongs to the name
            words = []
        if len(words) == 1:
            argument = words[0]
    return os.path.expanduser(argument)


def take_back(session: OmniSession) -> str:
    """Make a conversation what it was before the last question, or before the media that wait for one -> its text.

    Raises ValueError if there is none, or if what stays would have to be read again and was not kept.
    """
    items = session.items
    last = max((place for place, item in enumerate(items) if item.role == "user"), default=None)
    if last is None:
        raise ValueError("there is no question to take back")
    question = items[last]
    if question.status == IN_PROGRESS and question.id is not None:
        session.delete(question.id)
    else:
        session.become(items[:last])
    return question.text


@contextmanager
def _whole_or_nothing(session: OmniSession) -> Iterator[None]:
    """Several calls that push one sound or video: if they do not all happen, nothing of it was pushed."""
    try:
        yield
        session.push_text("")  # ends it, so that the next one is not taken for its continuation
    except BaseException:
        session.discard_input()
        raise


def _tell_read(chat: Chat, name: str, before: int) -> None:
    tokens = len(chat.session.ids) - before
    chat.say(f"  {name}: {tokens} tokens read; ask about it, or press Enter to have it answered")


def image(chat: Chat, argument: str) -> None:
    source, before = file_name(argument), len(chat.session.ids)
    chat.session.push_image(source)
    _tell_read(chat, describe(source), before)


def audio(chat: Chat, argument: str) -> None:
    source, before = file_name(argument), len(chat.session.ids)
    name = describe(source)
    samples, rate_hz = decode_audio(open_source(source, "audio"), name)
    check_samples(samples, name)
    with _whole_or_nothing(chat.session):
        chat.session.push_audio(samples, rate_hz)
    _tell_read(chat, name, before)


def video(chat: Chat, argument: str) -> None:
    source, before = file_name(argument), len(chat.session.ids)
    session = chat.session
    pieces = in_time(read_video(session.processor, source, want_sound=session.use_audio_in_video))
    with _whole_or_nothing(session), chat.progress.status("watching ...") as status:
        for piece in pieces:
            status.update(f"watching: {piece.time_s:.1f} of {pieces[-1].time_s:.1f} s")
            piece.push(session)
    _tell_read(chat, describe(source), before)


def mic(chat: Chat, argument: str) -> None:
    if not chat.lines.interactive:
        raise ValueError("/mic needs a terminal, where Enter ends the recording; give a recording as /audio F")
    with _whole_or_nothing(chat.session):
        seconds = record(chat.session.push_audio, lambda: chat.lines.read("recording; Enter ends it, Ctrl-C drops it "))
    chat.say(f"  heard {seconds:.1f} s")
    chat.ask("")


def voice(chat: Chat, argument: str) -> None:
    if not chat.speaks:
        raise ValueError("answers are in text only here, so there is no voice to choose")
    if argument:
        chat.voice = speaker_name(chat.model, argument)
    current = speaker_name(chat.model, chat.voice or chat.session.speaker)
    names = _voices(chat, "")
    chat.say("  voices: " + ", ".join(f"{name} (now)" if name == current else name for name in names))


def _voices(chat: Chat, typed: str) -> list[str]:
    names = sorted(speaker_ids(chat.model)) if chat.speaks else []
    return [name for name in names if name.startswith(typed.lower())]


def save(chat: Chat, argument: str) -> None:
    chat.session.save(folder := file_name(argument))
    chat.say(f"  saved in {folder}; /load {folder} goes on from here")


def load(chat: Chat, argument: str) -> None:
    folder = file_name(argument)
    with chat.progress.status("loading ..."):
        session = OmniSession.load(folder, chat.model, chat.session.processor)
    chat.session = session
    if chat.waiting:
        session.push_text("")  # a sound or video that was open ends here
    chat.say(f"  goes on with the conversation in {folder}: {len(chat.session.ids)} tokens")


def new(chat: Chat, argument: str) -> None:
    chat.session = chat.new_session()
    chat.say("  a new conversation")


def undo(chat: Chat, argument: str) -> None:
    text = take_back(chat.session)
    chat.say(f"  took back {text!r}" if text else "  took back the last question")


def tools(chat: Chat, argument: str) -> None:
    if argument == "off":
        chat.session.configure(tools=[])
        chat.say("  no tools any more")
        return
    path = file_name(argument)
    schemas = read_tools(path)
    chat.session.configure(tools=schemas)
    names = ", ".join(str(one.get("function", one).get("name")) for one in schemas)
    chat.say(f"  tools: {names}; you give the results of their calls")


def read_tools(path: str) -> list[dict[str, Any]]:
    """The tool schemas of a JSON file, which is a list of them. Raises ValueError or OSError."""
    try:
        schemas = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(schemas, list) or not all(isinstance(one, dict) for one in schemas):
        raise ValueError(f"{path} must hold a list of tool schemas, such as " + _SCHEMA)
    return schemas


_SCHEMA = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'


def show_help(chat: Chat, argument: str) -> None:
    rows = [(f"{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(left) for left, _ in rows) + 2
    for left, right in rows:
        chat.say(f"  {left:<{width}}{right}")
    chat.say("  Anything else is a question; one that begins with a slash is typed with two. A file's name may hold")
    chat.say("  spaces. Ctrl-C interrupts a reply, which then counts as heard so far; Ctrl-D leaves.")


def leave(chat: Chat, argument: str) -> None:
    """`obey` ends the conversation."""


def _files(chat: Chat, typed: str) -> list[str]:
    return paths_that_begin(typed)


COMMANDS = {
    "/image": Command(image, "F", "show a picture", _files),
    "/audio": Command(audio, "F", "play a sound to the model", _files),
    "/video": Command(video, "F", "show a video, with its sound under --use-audio-in-video", _files),
    "/mic": Command(mic, "", "speak: records until Enter, then answers"),
    "/voice": Command(voice, "[NAME]", "choose the voice of the answers; without a name: list them", _voices),
    "/undo": Command(undo, "", "take back the last question and its answer"),
    "/new": Command(new, "", "forget everything and begin anew"),
    "/tools": Command(tools, "F|off", "offer the tools of a JSON file, a list of schemas", _files),
    "/save": Command(save, "DIR", "write the conversation into a folder", _files),
    "/load": Command(load, "DIR", "go on with a conversation that was saved", _files),
    "/help": Command(show_help, "", "this list"),
    "/quit": Command(leave, "", "leave, as Ctrl-D does"),
}
