"""`omni chat --realtime` and live text: files fed in time, text printed as it comes, the latency table, playing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from talking import SoundDevice

from omni import AudioChunk, OmniSession, TextDelta, TurnEnd
from omni.cli.main import main
from omni.cli.realtime import feed, read_video, show_reply, sound_pieces
from omni.generation.events import Event
from omni.packaged.toy import TOY_DATA, toy_model

Capture = pytest.CaptureFixture[str]


def live(tiny_checkpoint: Path, *words: str | Path) -> list[str]:
    limits = ("--max-new-tokens", "6", "--max-frames", "6", "--seed", "0")
    return [str(w) for w in ("chat", "--model", tiny_checkpoint, "--realtime", *words, *limits)]


def test_realtime_shows_text_and_times_and_writes_the_answer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "answer.wav"
    argv = live(tiny_checkpoint, "--audio", TOY_DATA / "question.wav", "--pace", "0", "--out", out, "And now?")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "listened to 2.31 s" in captured.err
    table = captured.out[captured.out.index("from the end of the input") :]
    labels = ["preprocessing", "Thinker prefill", "Thinker first token", "Talker first code", "residual codes", "codec"]
    labels += ["first audio", "total", "real-time factor, end to end", "real-time factor, step"]
    values = {}
    for line in table.splitlines()[1:]:
        if line.strip():
            label, _, value = line.rstrip().rpartition("  ")
            values[label.strip()] = float(value)
    assert [label for label in values if label in labels] == labels
    stages = sum(values[label] for label in list(values)[: list(values).index("first audio")])
    assert stages == pytest.approx(values["first audio"], rel=0.1, abs=20)
    assert values["total"] >= values["first audio"] > 0
    seconds = soundfile.info(out).frames / 24000
    assert seconds == pytest.approx((6 * 1920 - 555) / 24000)
    assert values["real-time factor, end to end"] == pytest.approx(values["total"] / 1000 / seconds, abs=0.02)


@pytest.mark.parametrize(
    "words",
    [
        ("--video", TOY_DATA / "clip.mp4", "--use-audio-in-video"),
        ("--video", TOY_DATA / "clip.mp4", "--audio", TOY_DATA / "question.wav", "--audio-window", "1"),
        ("--audio", TOY_DATA / "question.wav", "--audio-chunk", "0.48", "--audio-window", "0.96"),
        (
            "--video",
            TOY_DATA / "clip.mp4",
            "--image",
            TOY_DATA / "picture.png",
            "--no-audio",
            "--system",
            "Be brief.",
        ),
    ],
    ids=["its own sound", "another sound", "shorter chunks", "silent"],
)
def test_realtime_video(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(live(tiny_checkpoint, *words, "--pace", "0")) == 0
    captured = capsys.readouterr()
    assert "tokens read" in captured.err and "total" in captured.out
    assert (tmp_path / "out.wav").exists() == ("--no-audio" not in words)
    assert ("first audio" in captured.out) == ("--no-audio" not in words)


def test_a_realtime_video_is_read_as_the_file_is(tiny_checkpoint: Path) -> None:
    """The pushed frames and sounds become the placeholders that the processor writes for the same video."""
    model = toy_model(0)
    assert model.processor is not None
    session = OmniSession(model, use_audio_in_video=True)
    feed(session, read_video(model.processor, str(TOY_DATA / "clip.mp4"), want_sound=True), 0.0, lambda now, end: None)
    list(session.respond(max_new_tokens=1, max_frames=1))
    clip = {"type": "video", "video": TOY_DATA / "clip.mp4", "use_audio_in_video": True}
    whole = model.processor([{"role": "user", "content": [clip]}]).input_ids[0].tolist()
    assert session.ids[: len(whole)] == whole


class SlowSession:
    """Notes what is pushed, and takes 0.25 s for it on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.pushed = 100.0, list[tuple[float, int]]()

    def push_audio(self, samples: torch.Tensor, rate_hz: int) -> None:
        self.pushed.append((round(self.now, 3), len(samples)))
        self.now += 0.25

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("pace", "starts", "delay_s"),
    [(1.0, [100.1, 100.35, 100.6], 0.6), (0.25, [100.4, 100.8, 101.05], 0.3), (0.0, [100.0, 100.25, 100.5], 0.0)],
)
def test_feeding_keeps_the_pace(pace: float, starts: list[float], delay_s: float) -> None:
    session = SlowSession()
    pieces = sound_pieces(torch.zeros(2000), 8000)  # ends after 0.1, 0.2 and 0.25 s
    heard = feed(session, pieces, pace, lambda now, end: None, clock=lambda: session.now, sleep=session.sleep)  # type: ignore[arg-type]
    assert session.pushed == list(zip(starts, [800, 800, 400]))
    assert heard.input_s == 0.25 and heard.delay_s == pytest.approx(delay_s)


def test_text_is_printed_as_it_comes() -> None:
    """Each piece of text is out before the next event is asked for; reasoning goes to stderr."""
    out, err = io.StringIO(), io.StringIO()
    seen = []

    def events() -> Iterator[Event]:
        yield TextDelta(0, "hm", (1,), reasoning=True)
        for text in ("[b]one ", ":smile: ", "two\n"):
            yield TextDelta(0, text, (1,))
            seen.append(out.getvalue())
        yield AudioChunk(0, torch.ones(3), 24000, 0)
        yield AudioChunk(0, torch.zeros(2), 24000, 3)
        yield TurnEnd(0, "stop", "one two")

    played: list[AudioChunk] = []
    reply = show_reply(events(), Console(file=out), Console(file=err), played.append)
    assert seen == ["[b]one ", "[b]one :smile: ", "[b]one :smile: two\n"] and err.getvalue() == "hm\n"
    assert reply.sound is not None and reply.sound.tolist() == [1, 1, 1, 0, 0] and len(played) == 2


def test_play(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    device = SoundDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    out = tmp_path / "a.wav"
    ask = ["chat", "--model", str(tiny_checkpoint), "--play", "--max-new-tokens", "3", "--max-frames", "4", "Hi"]
    assert main([*ask, "--out", str(out)]) == 0
    written = soundfile.read(out, dtype="float32")[0]
    assert device.calls == ["start", "stop", "close"] and np.allclose(
        np.clip(device.samples, -1, 1), written, atol=1e-4
    )
    assert "nothing is played" not in capsys.readouterr().err
    for module, reason in ((None, "not installed"), (SoundDevice(RuntimeError("no\ncard")), "(no card)")):
        monkeypatch.setitem(sys.modules, "sounddevice", module)  # type: ignore[arg-type]
        assert main([*ask, "--out", str(out)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "nothing is played" in line]
        assert len(lines) == 1 and reason in lines[0]
