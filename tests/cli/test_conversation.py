"""`omni chat` without a question: each line is a turn of one session, whatever is typed and wherever it is cut."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from build import ROOT
from rich.console import Console
from talking import REPLY, PlayerDouble, Talk, Typed, files

from omni import AudioChunk, OmniModel, OmniSession, TextDelta, TurnEnd
from omni.cli.conversation import WELCOME
from omni.cli.main import main
from omni.packaged.toy import TOY_DATA

PICTURE, SOUND = TOY_DATA / "picture.png", TOY_DATA / "question.wav"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def replies(session: OmniSession, *turns: Callable[[OmniSession], None]) -> tuple[list[str], list[np.ndarray]]:
    """The texts and sounds of a session used directly, one reply after each of these."""
    texts, sounds = [], []
    for push in turns:
        push(session)
        events = list(session.respond(**REPLY))
        texts.append("".join(event.text for event in events if isinstance(event, TextDelta)))
        sounds.append(np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)]))
    return texts, sounds


def ask(text: str) -> Callable[[OmniSession], None]:
    return lambda session: session.push_text(text)


# ---- it is a session ----


def test_it_is_a_session_used_directly(model: OmniModel, tmp_path: Path) -> None:
    """Texts, a picture with a question, a sound alone: the same ids, texts and sounds; empty lines are nothing."""
    samples, rate_hz = soundfile.read(SOUND, dtype="float32")
    direct = OmniSession(model, system="Be brief.")
    texts, sounds = replies(
        direct,
        ask("Name a river."),
        lambda session: (session.push_image(str(PICTURE)), session.push_text("What is it?")),  # type: ignore[arg-type,return-value]
        lambda session: session.push_audio(samples, rate_hz),
        ask("/etc is a folder"),
    )
    lines = [
        "Name a river.",
        "",
        "  ",
        f"/image {PICTURE}",
        " What is it? ",
        f"/audio {SOUND}",
        "",
        "//etc is a folder",
    ]
    talk = Talk(model, session={"system": "Be brief."}).run(*lines)
    assert talk.chat.session.ids == direct.ids and talk.code == 0
    assert talk.out == "".join(f"{text}\n" for text in texts)
    assert files(tmp_path) == [f"answer_{number}.wav" for number in (1, 2, 3, 4)]
    for number, sound in enumerate(sounds, 1):
        written = soundfile.read(f"answer_{number}.wav", dtype="float32")[0]
        assert np.allclose(written, np.clip(sound, -1, 1), atol=1e-4) and f"answer_{number}.wav" in talk.err
    assert talk.err.startswith(WELCOME) and set(talk.lines.prompts) == {"> "}


@pytest.mark.parametrize("with_sound", [True, False])
def test_a_video_is_what_realtime_makes_of_it(model: OmniModel, with_sound: bool) -> None:
    """And a sound after it is a sound of its own, not the video's."""
    from omni.cli.realtime import feed, read_video, sound_pieces

    assert model.processor is not None
    samples, rate_hz = soundfile.read(SOUND, dtype="float32")
    direct = OmniSession(model, use_audio_in_video=with_sound)
    feed(direct, read_video(model.processor, str(TOY_DATA / "clip.mp4"), want_sound=with_sound), 0.0, lambda a, b: None)
    direct.push_text("")
    feed(direct, sound_pieces(torch.from_numpy(samples), rate_hz), 0.0, lambda a, b: None)
    list(direct.respond(**REPLY))
    talk = Talk(model, session={"use_audio_in_video": with_sound})
    talk.run(f"/video {TOY_DATA / 'clip.mp4'}", f"/audio {SOUND}", "")
    assert talk.chat.session.ids == direct.ids and "watching" not in talk.out


def test_two_sounds_are_two_clips(model: OmniModel) -> None:
    talk = Talk(model).run(f"/audio {SOUND}", f"/audio {SOUND}", "")
    start = model.processor.tokens.audio_start  # type: ignore[union-attr]
    assert talk.chat.session.ids.count(start) == 2


def test_without_sound_and_with_another_seed(model: OmniModel, tmp_path: Path) -> None:
    silent = Talk(model, arguments={"return_audio": False}).run("Hello")
    assert silent.out.strip() and not files(tmp_path) and "speech" not in silent.err
    one, same, other = (Talk(model, arguments={"seed": seed}, out=Path("x.wav")) for seed in (1, 1, 2))
    sounds = []
    for talk in (one, same, other):
        talk.run("Hello")
        sounds.append(soundfile.read("x_1.wav")[0])
    assert np.array_equal(sounds[0], sounds[1]) and not np.array_equal(sounds[0], sounds[2])


def test_numbers_go_on_and_go_into_the_name_that_is_given(model: OmniModel, tmp_path: Path) -> None:
    talk = Talk(model, out=Path("reply.flac")).run("one", "/new", "two")
    assert files(tmp_path) == ["reply_1.flac", "reply_2.flac"] and "in reply_2.flac" in talk.err
    alone = OmniSession(model)
    replies(alone, ask("two"))
    assert talk.chat.session.ids == alone.ids


# ---- the end of the lines ----


def test_leaving(model: OmniModel) -> None:
    ended, left = Talk(model).run(), Talk(model).run("/quit", "never read")
    assert ended.err.endswith("\n\n") and ended.out == "" and left.out == "" and left.lines.rest == ["never read"]


def test_a_pipe_says_nothing_but_answers(model: OmniModel) -> None:
    texts, _ = replies(OmniSession(model), ask("one"), ask("two"))
    talk = Talk(model).run("one", "", "/voice", "/help", "two", interactive=False)
    assert talk.out == "".join(f"{text}\n" for text in texts) and talk.code == 0 and WELCOME not in talk.err
    spoken = Talk(model).run(f"/audio {SOUND}", interactive=False)  # nobody presses Enter
    assert len(spoken.out.splitlines()) == 1 and spoken.code == 0


def test_a_pipe_goes_on_after_a_failure_and_tells_it(model: OmniModel) -> None:
    texts, _ = replies(OmniSession(model), ask("one"), ask("two"))
    talk = Talk(model).run("one", "/image missing.png", "two", interactive=False)
    assert talk.out == "".join(f"{text}\n" for text in texts) and talk.code == 1
    errors = [line for line in talk.err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("omni: error: ") and "missing.png" in errors[0]
    assert Talk(model).run("/image missing.png").code == 0, "at a terminal a mistake is no failure"


def test_a_pipe_is_ended_by_ctrl_c(model: OmniModel) -> None:
    talk = Talk(model)
    with pytest.raises(KeyboardInterrupt):
        talk.run("one", KeyboardInterrupt, interactive=False)
    assert talk.lines.closed
    with pytest.raises(KeyboardInterrupt):
        Talk(model, console=Cut).run("one", interactive=False)


def test_the_command_with_a_pipe(tmp_path: Path) -> None:
    """The process itself, with the packaged model: the answers and nothing else on stdout."""
    picture = ROOT / "omni" / "packaged" / "nano_data" / "demo" / "picture.png"
    lines = b"say one two three\n/new\n/image " + os.fsencode(picture) + b"\nwhat color is the star\n\xff?\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "omni.cli", "chat", "--seed", "0"]
    done = subprocess.run(argv, input=lines, capture_output=True, cwd=tmp_path, env=environment)
    answers = done.stdout.decode().splitlines()
    assert answers[0] == "one two three" and len(answers) == 3 and done.returncode == 0, done
    assert "answer_3.wav" in done.stderr.decode()
    assert files(tmp_path) == ["answer_1.wav", "answer_2.wav", "answer_3.wav"]


def test_the_command_takes_its_options(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Pictures of --image come first, --system, --seed and the limits count, --audio-window is the session's."""
    monkeypatch.setattr("omni.cli.conversation.open_lines", lambda complete: Typed("What?"))
    argv = ["chat", "--model", str(tiny_checkpoint), "--image", str(PICTURE), "--system", "Be brief.", "--seed", "0"]
    argv += ["--max-new-tokens", "6", "--max-frames", "6", "--audio-window", "1", "--speaker", "Aiden"]
    assert main(argv) == 0
    model = OmniModel.from_pretrained(tiny_checkpoint, device="cpu")
    direct = OmniSession(model, system="Be brief.", speaker="Aiden")
    texts, _ = replies(direct, lambda session: (session.push_image(PICTURE), session.push_text("What?")))  # type: ignore[arg-type,return-value]
    assert capsys.readouterr().out == texts[0] + "\n" and files(tmp_path) == ["answer_1.wav"]
    assert main([*argv, "--no-audio"]) == 0 and files(tmp_path) == ["answer_1.wav"]


def test_an_empty_question_is_no_conversation(capsys: Capture) -> None:
    """A script whose variable is empty must not wait for lines."""
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", "x", ""])
    assert ended.value.code == 2 and "nothing is asked" in capsys.readouterr().err


def test_where_the_sound_goes_is_checked_before_the_model_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    assert main(["chat", "--model", "no-model", "--out", str(tmp_path / "gone" / "a.wav")]) == 1
    assert "folder" in capsys.readouterr().err


# ---- Ctrl-C ----


class Cut(Console):
    """A screen at which KeyboardInterrupt is raised after the first piece of text."""

    def out(self, *words: Any, **options: Any) -> None:
        super().out(*words, **options)
        if words:
            raise KeyboardInterrupt


class Pressed(Console):
    """A screen at which Ctrl-C is pressed after the first piece of text: the system's signal."""

    def out(self, *words: Any, **options: Any) -> None:
        super().out(*words, **options)
        if words and not getattr(self, "was_pressed", False):
            self.was_pressed = True
            signal.raise_signal(signal.SIGINT)


def cut_directly(model: OmniModel, played_samples: int | None) -> tuple[OmniSession, str, str]:
    """A session whose reply was interrupted at its first piece of text, what was shown of it and what it keeps."""
    session = OmniSession(model)
    session.push_text("Tell me.")
    events = session.respond(**REPLY)
    for event in events:
        if isinstance(event, TextDelta) and event.text:
            break
    kept = session.interrupt(None if played_samples is None else played_samples / 24)
    return session, event.text, kept.text  # type: ignore[union-attr]


def test_at_the_prompt(model: OmniModel) -> None:
    """However often it is pressed, it says how to leave, and the conversation goes on."""
    talk = Talk(model).run("one", KeyboardInterrupt, KeyboardInterrupt, "two")
    assert talk.err.count("Ctrl-D (or /quit) leaves") == 2 and len(talk.out.splitlines()) == 2


@pytest.mark.parametrize("screen", [Cut, Pressed])
def test_while_the_answer_comes(model: OmniModel, screen: type[Console], tmp_path: Path) -> None:
    """What was yielded counts as heard, and the conversation goes on from there."""
    before = signal.getsignal(signal.SIGINT)
    direct, shown, kept = cut_directly(model, None)
    talk = Talk(model, console=screen).run("Tell me.")
    assert talk.chat.session.ids == direct.ids and talk.out == shown + "\n"
    assert f"interrupted; the conversation keeps {kept!r}" in talk.err
    assert signal.getsignal(signal.SIGINT) is before
    talk.chat.console = Console(file=talk.streams[0])
    talk.run("And then?")
    replies(direct, ask("And then?"))
    assert talk.chat.session.ids == direct.ids


@pytest.mark.parametrize("heard", [0, 2000, 4000])
def test_while_it_is_played(model: OmniModel, heard: int) -> None:
    """All of the reply has come, part of it was heard: this part is kept, in the history and in the file."""
    direct = OmniSession(model)
    _, sounds = replies(direct, ask("Tell me."))
    direct.interrupt(heard / 24)
    device = PlayerDouble(heard, lambda: signal.raise_signal(signal.SIGINT))
    talk = Talk(model, open_player=lambda: device, out=Path("a.wav")).run("Tell me.")
    assert talk.chat.session.ids == direct.ids and device.was_cut and device.given == len(sounds[0]) > 4000
    assert len(soundfile.read("a_1.wav")[0]) == heard and "interrupted" in talk.err
    assert f"{heard / 24000:.2f} s of speech played in a_1.wav" in talk.err


def test_before_anything_was_played(model: OmniModel, tmp_path: Path) -> None:
    """Text runs ahead of speech: what was only read on the screen is not kept where the answer is spoken."""
    direct, _, kept = cut_directly(model, 0)
    device = PlayerDouble()
    talk = Talk(model, console=Pressed, open_player=lambda: device).run("Tell me.")
    assert talk.chat.session.ids == direct.ids and kept == "" and device.was_cut and device.finished
    assert not files(tmp_path), "played, not written"


def test_in_a_command(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a video is no video: cut at any frame, the conversation is what it was."""
    push, count = OmniSession.push_video_frame, iter(range(100))

    def cut(session: OmniSession, frame: Any, time_s: float) -> None:
        push(session, frame, time_s)
        if next(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(OmniSession, "push_video_frame", cut)
    talk = Talk(model).run(f"/video {TOY_DATA / 'clip.mp4'}", "", "Hello")
    direct = OmniSession(model)
    replies(direct, ask("Hello"))
    assert talk.chat.session.ids == direct.ids and "as it was before" in talk.err
    assert len(talk.out.splitlines()) == 1, "nothing waits, so the empty line asks nothing"


def test_a_signal_elsewhere_is_not_ours(model: OmniModel) -> None:
    """In a thread that gets no signals it answers all the same."""
    import threading

    talk = Talk(model)
    thread = threading.Thread(target=partial(talk.run, "Hello"))
    thread.start()
    thread.join()
    assert len(talk.out.splitlines()) == 1


def cut_reading(session: OmniSession, **arguments: Any) -> Iterator[Any]:
    signal.raise_signal(signal.SIGINT)
    yield


def test_before_anything_came(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is taken back at once: nothing of an answer was heard."""
    monkeypatch.setattr(OmniSession, "respond", cut_reading)
    talk = Talk(model).run("one", f"/image {PICTURE}", "two")
    assert talk.chat.session.ids == OmniSession(model).ids and talk.out == "" and talk.err.count("taken back") == 2


@pytest.mark.parametrize("at", [0, 2, 4, 7, 11, 15, 19, 22, 26, 30])
def test_in_the_middle_of_the_models_work(model: OmniModel, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Wherever an exception breaks into it, its question is taken back, and the other one is answered as if alone."""
    calls = itertools.count()

    def cut(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return method(*args, **options)

    with monkeypatch.context() as patch:
        for part in (model.thinker, model.talker):
            for name in ("forward", "decode"):
                patch.setattr(part, name, partial(cut, getattr(part, name)), raising=True)
        patch.setattr(model.code2wav, "step", partial(cut, model.code2wav.step))  # type: ignore[union-attr]
        talk = Talk(model).run("one", "two")
    assert next(calls) > at and talk.err.count("taken back") == 1
    left = talk.chat.session.items[0].text
    direct = OmniSession(model)
    replies(direct, ask(left))
    assert left in ("one", "two") and talk.chat.session.ids == direct.ids


def test_between_the_first_event_and_the_first_word(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that shows nothing is no answer yet: the question is taken back, and no empty answer stays."""
    respond = OmniSession.respond

    def press(session: OmniSession, **arguments: Any) -> Iterator[Any]:
        events = respond(session, **arguments)
        yield TextDelta(0, "", ())
        signal.raise_signal(signal.SIGINT)
        yield from events

    monkeypatch.setattr(OmniSession, "respond", press)
    talk = Talk(model).run("one")
    assert talk.chat.session.items == () and "taken back" in talk.err and talk.out == ""


def test_twice_while_the_answer_comes(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one gives the reply up where the first has not ended it yet."""
    respond = OmniSession.respond

    def impatient(session: OmniSession, **arguments: Any) -> Iterator[Any]:
        events = respond(session, **arguments)
        yield next(events)
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as if it had come inside the step
            session._forget(session._reply, error)  # type: ignore[arg-type]
            raise

    monkeypatch.setattr(OmniSession, "respond", impatient)
    talk = Talk(model).run("one")
    assert talk.chat.session.ids == OmniSession(model).ids and "taken back" in talk.err


# ---- failures ----


def test_a_failed_reply_takes_its_question_back(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next question is not added to it."""

    def full(session: OmniSession, **arguments: Any) -> Iterator[Any]:
        raise ValueError("the session is full")

    monkeypatch.setattr(OmniSession, "respond", full)
    talk = Talk(model).run("one")
    assert talk.chat.session.ids == OmniSession(model).ids and "omni: error: the session is full" in talk.err
    piped = Talk(model).run("one", interactive=False)
    assert piped.code == 1 and piped.out == "" and piped.chat.session.ids == OmniSession(model).ids


def test_a_full_conversation_forgets_its_oldest_turns(model: OmniModel) -> None:
    """And says so; what is taken back or begun anew is not called forgotten."""
    talk = Talk(model, session={"make_room": 0.5})
    talk.chat.session._conversation.limit = 160
    talk.run(*["a question of some length"] * 8)
    assert "oldest turns are forgotten" in talk.err and "error" not in talk.err and len(talk.out.splitlines()) == 8
    other = Talk(model).run("one", "two", "/undo", "/undo", "three", "/save s", "/new", "four", "/load s", "five")
    assert "forgotten" not in other.err and "error" not in other.err


def test_a_closed_session_ends_it(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(model)
    talk.chat.session.closed_because = "the device is lost"
    with pytest.raises(ValueError, match="the device is lost"):
        talk.run("one", "two")
    assert talk.lines.rest == ["two"] and talk.lines.closed


def test_a_sound_that_cannot_be_written_does_not_end_it(model: OmniModel, tmp_path: Path) -> None:
    (tmp_path / "answer_1.wav").mkdir()
    talk = Talk(model).run("one", "two")
    assert "answer_1.wav" in talk.err and "error" in talk.err and len(talk.out.splitlines()) == 2
    direct = OmniSession(model)
    replies(direct, ask("one"), ask("two"))
    assert talk.chat.session.ids == direct.ids, "the answer was given; only its file is missing"


def test_a_device_that_is_missing_is_said_once_and_answers_are_written(model: OmniModel, tmp_path: Path) -> None:
    opened = list[int]()
    talk = Talk(model, open_player=lambda: opened.append(1))  # type: ignore[arg-type,func-returns-value]
    talk.run("one", "two")
    assert opened == [1] and files(tmp_path) == ["answer_1.wav", "answer_2.wav"]


def test_a_device_that_is_lost_is_said(model: OmniModel) -> None:
    device = PlayerDouble()
    device.error = OSError("unplugged")  # type: ignore[assignment]
    assert "the sound device failed (unplugged)" in Talk(model, open_player=lambda: device).run("one").err


def test_how_an_answer_ended_is_said_where_it_was_cut(model: OmniModel) -> None:
    *_, end = OmniSession(model).respond(**REPLY)
    assert isinstance(end, TurnEnd) and end.reason != "stop"
    assert f"ended by {end.reason}" in Talk(model).run("").run("Hi").err
