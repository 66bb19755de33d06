"""The commands of a conversation: what each does, and that one that fails changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from talking import REPLY, PlayerDouble, SoundDevice, Talk

from omni import Item, OmniModel, OmniSession, TextDelta, TurnEnd
from omni.cli.commands import COMMANDS, complete, file_name
from omni.generation.events import ToolCall
from omni.packaged.toy import TOY_DATA

PICTURE, SOUND, CLIP = TOY_DATA / "picture.png", TOY_DATA / "question.wav", TOY_DATA / "clip.mp4"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- what is typed wrongly ----


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/imgae x.png", "did you mean '/image'?"),
        ("/Undo", "did you mean '/undo'?"),
        ("/", "/help lists them"),
        ("/qwxyz", "/help lists them"),
        ("/image", "/image needs an argument: /image F"),
        ("/save", "/save needs an argument: /save DIR"),
        ("/undo 2", "/undo takes no argument, got '2'"),
        ("/image gone.png", "'gone.png' does not exist"),
        ("/image .", "is not a file"),
        ("/image broken.png", "broken.png"),
        ("/audio broken.png", "broken.png"),
        ("/video broken.png", "broken.png"),
        ("/audio empty.wav", "empty.wav"),
        ("/load gone", "gone"),
        ("/load broken.png", "broken.png"),
        ("/save broken.png", "broken.png"),
        ("/voice nobody", "this checkpoint has"),
        ("/tools gone.json", "gone.json"),
        ("/tools broken.png", "broken.png is not JSON"),
        ("/tools object.json", "must hold a list of tool schemas"),
        ("/image \0", "does not exist"),
    ],
)
def test_one_line_says_what_is_wrong_and_nothing_changes(
    model: OmniModel, tmp_path: Path, line: str, said: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing of the kind")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "empty.wav").touch()
    talk = Talk(model).run(line, "")
    errors = [shown for shown in talk.err.splitlines() if "error" in shown]
    assert len(errors) == 1 and errors[0].startswith("omni: error: ") and said in errors[0], talk.err
    assert talk.chat.session.ids == OmniSession(model).ids and talk.out == ""
    assert "unexpected" not in talk.err


def test_help_lists_every_command(model: OmniModel) -> None:
    talk = Talk(model).run("/help")
    for name, command in COMMANDS.items():
        assert f"  {name} {command.argument}".rstrip() in talk.err and command.help in talk.err
    assert max(map(len, talk.err.splitlines())) <= 110


# ---- names of files ----


@pytest.mark.parametrize(
    "name", ["a picture.png", "it's.png", 'say "x".png', "back\\slash.png", "$HOME.png", "ä ö.png"]
)
def test_names_are_taken_as_they_stand(model: OmniModel, tmp_path: Path, name: str) -> None:
    shutil.copy(PICTURE, tmp_path / name)
    assert f"  {name}: " in Talk(model).run(f"/image {name}").err


@pytest.mark.parametrize(
    "typed", ["'a picture.png'", '"a picture.png"', "a\\ picture.png", "  a picture.png  ", "~/a picture.png"]
)
def test_names_as_a_shell_writes_them(
    model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    """As terminals write them when a file is dropped on them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(PICTURE, tmp_path / "a picture.png")
    assert "tokens read" in Talk(model).run(f"/image {typed}").err
    assert Path(file_name(typed.strip())).resolve() == tmp_path / "a picture.png"


def test_completion(model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my folder").mkdir()
    for name in ("my picture.png", "my folder/one.png", ".hidden"):
        (tmp_path / name).touch()
    chat = Talk(model).chat
    assert complete(chat, "/vi") == ["/video "] and complete(chat, "/un") == ["/undo"]
    assert complete(chat, "") == complete(chat, "/") and len(complete(chat, "/")) == len(COMMANDS)
    assert complete(chat, "/image my p") == ["/image my picture.png"]
    assert complete(chat, "/image ") == ["/image my folder/", "/image my picture.png"]
    assert complete(chat, "/load my folder/") == ["/load my folder/one.png"]
    assert complete(chat, "/image ~/.h") == ["/image ~/.hidden"]
    assert complete(chat, f"/image {tmp_path}/my f") == [f"/image {tmp_path}/my folder/"]
    assert complete(chat, "/voice ch") == ["/voice chelsie"]
    for nothing in ("/image gone/", "/undo x", "/nothing x", "what", "/image ~nobody/x", "/image \0/"):
        assert complete(chat, nothing) == [], nothing


# ---- voices, files of conversations ----


def test_voices(model: OmniModel, tmp_path: Path) -> None:
    talk = Talk(model).run("/voice", "/voice AIDEN", "/voice", "Hello")
    lists = [line for line in talk.err.splitlines() if "voices:" in line]
    assert "ethan (now)" in lists[0] and "aiden (now)" in lists[1] == lists[2] and "chelsie," in lists[1]
    direct = OmniSession(model)
    direct.push_text("Hello")
    list(direct.respond(**REPLY, speaker="aiden"))
    assert talk.chat.session.ids == direct.ids
    silent = Talk(model, arguments={"return_audio": False}).run("/voice", "/voice aiden")
    assert silent.err.count("text only") == 2


def test_saved_and_loaded(model: OmniModel, tmp_path: Path) -> None:
    """What was saved goes on as it would have; the voice and the sound device stay as they are."""
    direct = OmniSession(model)
    for text in ("one", "three"):
        direct.push_text(text)
        list(direct.respond(**REPLY, speaker="aiden"))
    device = PlayerDouble()
    talk = Talk(model, open_player=lambda: device)
    talk.run("/voice aiden", "one", "/save my talk", "two", "/load my talk", "three", "/save 'my talk'")
    assert talk.chat.session.ids == direct.ids and device.finished and "error" not in talk.err
    assert OmniSession.load(tmp_path / "my talk", model).ids == direct.ids


def test_begin_anew(model: OmniModel) -> None:
    talk = Talk(model, session={"system": "Be brief."}).run("one", f"/image {PICTURE}", "/new", "", "two")
    direct = OmniSession(model, system="Be brief.")
    direct.push_text("two")
    list(direct.respond(**REPLY))
    assert talk.chat.session.ids == direct.ids and len(talk.out.splitlines()) == 2


# ---- the microphone ----


def test_microphone(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is heard, at the device's rate, and Enter has it answered; after it sound is a clip of its own."""
    wave = np.sin(np.arange(44100 // 2) / 20).astype(np.float32) / 4
    blocks = tuple(np.array_split(wave, 6))
    device = SoundDevice(blocks=blocks)
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    talk = Talk(model).run("/mic", "")
    direct = OmniSession(model)
    for block in blocks:
        direct.push_audio(block, 44100)
    list(direct.respond(**REPLY))
    assert (talk.chat.session.ids == direct.ids and "heard 0.6 s" in talk.err) or "heard 0.5 s" in talk.err
    assert device.calls == ["start", "stop", "close"] and len(talk.out.splitlines()) == 1


def test_a_recording_that_is_dropped(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SoundDevice(blocks=(np.zeros(4410, np.float32),) * 3)
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    talk = Talk(model).run("/mic", KeyboardInterrupt, "")
    assert talk.chat.session.ids == OmniSession(model).ids and talk.out == "" and "as it was before" in talk.err
    assert device.calls == ["start", "stop", "close"]


def test_a_recording_that_does_not_fit(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(session: OmniSession, samples: torch.Tensor, rate_hz: int) -> None:
        raise ValueError("the session is full")

    monkeypatch.setitem(sys.modules, "sounddevice", SoundDevice(blocks=(np.zeros(4410, np.float32),) * 3))  # type: ignore[arg-type]
    monkeypatch.setattr(OmniSession, "push_audio", full)
    talk = Talk(model).run("/mic", "")
    assert talk.err.count("the session is full") == 1 and talk.out == ""


def test_no_microphone(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # type: ignore[arg-type]
    assert "pip install" in Talk(model).run("/mic").err
    monkeypatch.setitem(sys.modules, "sounddevice", SoundDevice(RuntimeError("no\ncard")))  # type: ignore[arg-type]
    assert "no microphone answers (no card)" in Talk(model).run("/mic").err
    assert "needs a terminal" in Talk(model).run("/mic", interactive=False).err


# ---- taking back ----


@pytest.mark.parametrize(
    "lines", [["two"], [f"/image {PICTURE}", "two"], [f"/audio {SOUND}", ""], [f"/image {PICTURE}"]]
)
def test_undo_takes_back_the_last_question(model: OmniModel, lines: list[str]) -> None:
    """With its media and its answer; the next question continues what was before."""
    talk = Talk(model).run("one", *lines, "/undo", "", "three")
    direct = OmniSession(model)
    for text in ("one", "three"):
        direct.push_text(text)
        list(direct.respond(**REPLY))
    assert talk.chat.session.ids == direct.ids and "took back" in talk.err and "error" not in talk.err


def test_undo_goes_back_to_the_beginning(model: OmniModel) -> None:
    talk = Talk(model, session={"system": "Be brief."}).run("one", "two", "/undo", "/undo", "/undo")
    assert talk.chat.session.ids == OmniSession(model, system="Be brief.").ids
    assert "took back 'two'" in talk.err and "took back 'one'" in talk.err
    assert "there is no question to take back" in talk.err


# ---- tools ----


SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def calling(monkeypatch: pytest.MonkeyPatch, *replies: list[Any], reason: str = "stop") -> None:
    """Let sessions give these replies one after the other: events, which the history holds as it holds real ones."""
    left = list(replies)

    def respond(session: OmniSession, **arguments: Any) -> Iterator[Any]:
        events = left.pop(0)
        items = list(session.items)
        if items[-1].status == "in_progress":
            session.delete(items[-1].id)  # type: ignore[arg-type]
            items[-1] = Item(role="user", parts=items[-1].text)
        calls = [event for event in events if isinstance(event, ToolCall)]
        parts: list[Any] = [{"type": "tool_call", "id": c.id, "name": c.name, "arguments": c.arguments} for c in calls]
        parts += [event.text for event in events if isinstance(event, TextDelta)]
        session.become([*items, Item(role="assistant", parts=parts)])
        yield from [*events, TurnEnd(0, reason, "")]

    monkeypatch.setattr(OmniSession, "respond", respond)


WEATHER = ToolCall(0, "a", "weather", '{"city": "Zürich"}', {"city": "Zürich"})
TIME, LATER = (ToolCall(0, name, "time", "{}", {}) for name in ("b", "c"))


def said(text: str) -> list[Any]:
    return [TextDelta(0, text, (1,))]


def results(talk: Talk) -> list[tuple[str, str]]:
    parts = [item.parts[0] for item in talk.chat.session.items if item.role == "tool"]
    return [(part["call_id"], part["output"]) for part in parts]


def test_tools_are_offered_and_dropped(model: OmniModel, tmp_path: Path) -> None:
    (tmp_path / "my tools.json").write_text(json.dumps([SCHEMA]))
    talk = Talk(model).run("one", "/tools my tools.json")
    direct = OmniSession(model, tools=[SCHEMA])
    direct.push_text("one")
    without = OmniSession(model)
    without.push_text("one")
    list(without.respond(**REPLY))
    assert talk.chat.session.tools == [SCHEMA] and "tools: weather;" in talk.err
    assert talk.chat.session.items[0].text == "one" and talk.chat.session.ids != without.ids
    opening = OmniSession(model, tools=[SCHEMA]).ids
    assert talk.chat.session.ids[: len(opening)] == opening
    talk.run("/tools off")
    assert talk.chat.session.ids == without.ids and not talk.chat.session.tools


@pytest.mark.parametrize("interactive", [True, False])
def test_calls_get_their_results_from_the_next_lines(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch, interactive: bool
) -> None:
    """Results are handed on together, then the reply goes on, with more calls or with an answer."""
    calling(monkeypatch, [WEATHER, TIME], [LATER], said("It rains."), said("Yes."))
    talk = Talk(model).run("weather?", "rain", "/noon", "1 pm", "sure?", interactive=interactive)
    assert results(talk) == [("a", "rain"), ("b", "/noon"), ("c", "1 pm")]
    assert talk.out == "It rains.\nYes.\n" and talk.code == 0
    assert 'calls weather({"city": "Zürich"})' in talk.err and "calls time({})" in talk.err
    assert talk.lines.prompts[1:4] == ["result of weather> ", "result of time> ", "result of time> "]
    talk.run("/undo")
    roles = [item.role for item in talk.chat.session.items]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    talk.run("/undo")
    assert talk.chat.session.ids == OmniSession(model).ids


def no_line() -> None:
    """The input ends."""


def ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [ctrl_c, no_line])
def test_a_call_without_a_result_takes_the_question_back(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    calling(monkeypatch, [WEATHER, TIME], said("Well."))
    talk = Talk(model).run("weather?", "rain", end, "next")
    assert [item.text for item in talk.chat.session.items] == ["next", "Well."] and talk.out == "Well.\n"
    assert "what was asked is taken back" in talk.err and not results(talk)


def test_an_interrupted_reply_calls_nothing(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calling(monkeypatch, [*said("Let me see."), WEATHER])
    device = PlayerDouble(during=lambda: signal.raise_signal(signal.SIGINT))
    talk = Talk(model, open_player=lambda: device).run("weather?", "/quit")
    assert talk.lines.prompts == ["> ", "> "] and "interrupted" in talk.err


def test_a_call_that_cannot_be_read_takes_the_question_back(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calling(monkeypatch, said("Well."), reason="error")
    talk = Talk(model).run("weather?")
    assert talk.chat.session.items == () and "cannot be read" in talk.err
