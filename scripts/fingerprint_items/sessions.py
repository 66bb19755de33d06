"""Items on sessions, which are told what is heard and seen piece by piece, and on the engine."""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import soundfile
import torch

from omni import AudioChunk, OmniEngine, OmniModel, OmniSession
from omni.packaged.nano import NANO_DATA

from .configs import checkpoint_content
from .models import nano, picture, sound, tiny
from .registry import complaint, cut, each_family, item
from .replies import PLAIN, SPEAKERS, told, windows


def open_session(model: OmniModel, **options: Any) -> OmniSession:
    """A session with small windows."""
    return OmniSession(model, **{"streaming": windows(silence_s=None), **options})


def answer(session: OmniSession, **changes: Any) -> Any:
    """What a session replies, and its ids after that."""
    return told(session.respond(**{**PLAIN, **changes})), session.ids


@each_family("session.text")
def text_turns(family: str) -> Any:
    """Turns of text: aloud, silent, empty, in another voice, asynchronous."""
    session, out = open_session(tiny(family), system="be brief", speaker=SPEAKERS[family][0]), []
    session.push_text("hel")
    session.push_text("lo")
    out.append((session.ids, answer(session)))
    session.push_text("and now?")
    out.append(answer(session, return_audio=False))
    out.append(answer(session, speaker=SPEAKERS[family][1], seed=9))

    async def collect() -> list[Any]:
        return [event async for event in session.respond_async(**PLAIN)]

    session.push_text("once more")
    return out, told(asyncio.run(collect())), session.ids


@each_family("session.sound")
def sound_in_pieces(family: str) -> Any:
    """Sound at 16 kHz, 24 kHz and 44.1 kHz in odd pieces; the ids after each push."""
    session, out = open_session(tiny(family)), []
    for rate_hz, pieces in ((16000, (1600, 333)), (24000, (2400, 1, 7001)), (44100, (4410,))):
        session.push_text(f"at {rate_hz}:")
        for piece in cut(sound(1.7, rate_hz % 7, rate_hz), pieces):
            session.push_audio(piece, rate_hz)
            out.append(len(session.ids))
        out.append(answer(session))
    stereo = torch.stack((sound(0.4, 1), sound(0.4, 2)))
    session.push_audio(stereo.numpy(), 16000)
    return out, answer(session)


@item("session.audio_window")
def audio_window() -> Any:
    """A shorter attention window, which is read while the user speaks."""
    session, out = open_session(tiny("qwen3"), streaming=windows(audio_window_s=1.0, prefill_tokens=5)), []
    for piece in cut(sound(3.4, 2), (1600,)):
        session.push_audio(piece)
        out.append(len(session.ids))
    return out, answer(session)


@each_family("session.picture")
def picture_turns(family: str) -> Any:
    """Pictures between texts and sounds, in two turns."""
    session, out = open_session(tiny(family)), []
    for number, size in enumerate(((70, 101), (120, 60))):
        session.push_text("look:")
        session.push_image(picture(*size, seed=number))
        session.push_audio(sound(0.5, number))
        session.push_image(picture(40, 40, seed=number))
        session.push_text("what is it?")
        out.append(answer(session))
    return out


@each_family("session.video")
def silent_video(family: str) -> Any:
    """Frames at uneven times, an odd last one; a second video after a text."""
    session, out = open_session(tiny(family)), []
    for times in ((10.0, 10.4, 11.0, 11.5, 12.25), (0.0, 3.3)):
        for number, time_s in enumerate(times):
            session.push_video_frame(picture(32, 32, seed=number), time_s)
            out.append(len(session.ids))
        session.push_text("and?")
    return out, answer(session)


def push_mixed(session: OmniSession, rng: random.Random, times: list[float], seconds: float, eager: float) -> list[int]:
    """The first frame, then frames and pieces of sound in a random order; the number of ids after each."""
    samples, waiting, heard, out = sound(seconds, 4), 1, 0, []
    session.push_video_frame(picture(32, 32), times[0])
    while waiting < len(times) or heard < len(samples):
        if heard == len(samples) or (waiting < len(times) and rng.random() < eager):
            session.push_video_frame(picture(32, 32, seed=waiting), times[waiting])
            waiting += 1
        else:
            piece = rng.randint(200, 24000)
            session.push_audio(samples[heard : heard + piece])
            heard += piece
        out.append(len(session.ids))
    return out


@each_family("session.video_sound")
def video_with_sound(family: str) -> Any:
    """Frames and sound that come in mixed orders, with gaps, and either track the longer one."""
    rng, out = random.Random(5), []
    cases = [
        ([0.5 * i for i in range(7)], 3.1, 0.3),
        ([0.0, 0.9, 1.8, 6.0, 6.4], 2.0, 0.9),
        ([0.25 * i for i in range(6)], 5.2, 0.05),
        ([1.0, 1.7], 0.02, 0.5),
    ]
    for times, seconds, eager in cases:
        session = open_session(tiny(family), use_audio_in_video=True)
        session.push_text("what?")
        out.append(push_mixed(session, rng, times, seconds, eager))
        session.push_text("well?")
        out.append(answer(session, max_frames=5))
    for number in range(5):  # a sound that never comes
        session.push_video_frame(picture(32, 32, seed=number), 0.9 * number)
    return out, answer(session)


@each_family("session.interrupt")
def interrupted(family: str) -> Any:
    """While it speaks, after a reply, while it is silent, and by leaving the events."""
    session, out = open_session(tiny(family)), []
    frame_ms = 1000 / tiny(family).code2wav.frame_rate
    longer = {**PLAIN, "max_new_tokens": 12, "max_frames": 30}
    for played_ms in (None, 2.5 * frame_ms, 1e6):
        session.push_text("tell me a story")
        events = session.respond(**longer)
        begin = [next(events)]
        while not isinstance(begin[-1], AudioChunk):
            begin.append(next(events))
        out.append((told(begin), tuple(session.interrupt(played_ms)), told(events), session.ids))
        out.append(answer(session))
        out.append((tuple(session.interrupt(4 * frame_ms)), session.ids))
    session.push_text("in text")
    events = session.respond(max_new_tokens=9, return_audio=False)
    out.append((told([next(events), next(events)]), tuple(session.interrupt()), session.ids))
    session.push_text("left")
    events = session.respond(**longer)
    out.append(told([next(events), next(events)]))
    events.close()
    return out, answer(session), complaint(lambda: session.interrupt(-1))


@each_family("session.copies")
def copies(family: str) -> Any:
    """Forks and saves, with open sound and video too, go on as the session does."""
    out: list[Any] = []
    for with_video in (False, True):
        session = open_session(tiny(family), use_audio_in_video=with_video)
        session.push_text("first")
        out.append(answer(session))
        for number in range(5):
            if with_video:
                session.push_video_frame(picture(32, 32, seed=number), 0.7 * number)
            session.push_audio(sound(0.4, number, 24000), 24000)
        other = session.fork()
        with tempfile.TemporaryDirectory() as folder:
            session.save(Path(folder) / "kept")
            loaded = OmniSession.load(Path(folder) / "kept", tiny(family))
        for one in (session, other, loaded):
            one.push_audio(sound(0.9, 9, 24000), 24000)
            one.push_text("?")
            out.append((one.streaming, answer(one)))
    return out


@each_family("session.saved_file")
def saved_file(family: str) -> Any:
    """What a saved session holds, the caches included."""
    session = open_session(tiny(family), use_audio_in_video=True, system="be brief")
    session.push_image(picture(40, 60))
    out = [answer(session)]
    for number in range(5):
        session.push_video_frame(picture(32, 32, seed=number), 0.5 * number)
        session.push_audio(sound(0.3, number))
    with tempfile.TemporaryDirectory() as folder:
        session.save(Path(folder) / "kept")
        file = Path(folder) / "kept" / "session.json"
        file.write_text(re.sub("item_[0-9a-f]{32}", "item", file.read_text()))  # names are drawn anew each time
        return out, checkpoint_content(Path(folder) / "kept")


@each_family("session.drop_turns")
def dropped(family: str) -> Any:
    """Oldest turns forgotten, with media kept and read again."""
    session, out = open_session(tiny(family), system="be brief", keep_media=True), []
    for number in range(4):
        session.push_text(f"turn {number}")
        if number == 1:
            session.push_audio(sound(1.2, number))
        if number == 2:
            session.push_image(picture(60, 60))
        out.append(answer(session))
    for count in (1, 2):
        out.append((session.drop_oldest_turns(count), session.ids))
        session.push_text("go on")
        out.append(answer(session))
    forgetful = open_session(tiny(family))
    forgetful.push_image(picture(40, 40))
    out.append(answer(forgetful))
    forgetful.push_text("a")
    said = [complaint(lambda: forgetful.drop_oldest_turns(1)), complaint(lambda: session.drop_oldest_turns(9))]
    return out, said, answer(forgetful)


@each_family("session.errors")
def session_errors(family: str) -> Any:
    session = open_session(tiny(family))
    session.push_video_frame(picture(32, 32), 1.0)
    calls: list[Any] = [
        lambda: session.push_text(3),
        lambda: session.push_audio([1, 2], 16000),
        lambda: session.push_audio(sound(0.1), 10),
        lambda: session.push_video_frame(picture(32, 32), 1.0),
        lambda: session.push_video_frame(picture(64, 32), 2.0),
        lambda: session.interrupt(),
        lambda: session.respond(tokens=3),
        lambda: session.respond(speaker="eve"),
    ]
    return [complaint(call) for call in calls], answer(session)


@each_family("engine")
def engine(family: str) -> Any:
    """Two sessions side by side, each beside what it says alone.

    Which steps they share depends on the moment, and with it the last bits of sound: ids, texts, reasons and the
    numbers of samples are compared, and that the sound is that of a session alone to 1e-4.
    """
    model, out = tiny(family), []
    with OmniEngine(model, max_sessions=2, streaming=windows(silence_s=None)) as running:
        for turn in ("hello", "and now?"):
            if turn == "hello":
                pairs = [(running.session(speaker=s), open_session(model, speaker=s)) for s in SPEAKERS[family][:2]]
            for number, pair in enumerate(pairs):
                for session in pair:
                    session.push_audio(sound(0.5, number))
                    session.push_text(turn)
            streams = [shared.respond(**PLAIN) for shared, _ in pairs]
            for (shared, alone), events in zip(pairs, streams):
                got, expected = list(events), list(alone.respond(**PLAIN))
                out.append((_discrete(got), shared.ids, _sound_agrees(got, expected)))
        said = complaint(lambda: running.session())
    return out, said


def _discrete(events: list[Any]) -> Any:
    """What of events does not depend on rounding."""
    ids = [i for kind, *rest in told(events) if kind == "text" for i in rest[2]]
    chunks = [(event.start_sample, event.samples.numel()) for event in events if isinstance(event, AudioChunk)]
    return ids, sum(n for _, n in chunks), told(events[-1:])


def _sound_agrees(events: list[Any], others: list[Any]) -> bool:
    mine, theirs = (torch.cat([e.samples for e in run if isinstance(e, AudioChunk)]) for run in (events, others))
    return mine.shape == theirs.shape and bool((mine - theirs).abs().max() < 1e-4)


@item("nano.session")
def nano_session() -> Any:
    """A picture and a spoken question, then a question in text."""
    session = OmniSession(nano())
    session.push_image(NANO_DATA / "demo" / "picture.png")
    samples, rate_hz = soundfile.read(NANO_DATA / "demo" / "question.wav", dtype="float32")
    for piece in cut(torch.from_numpy(samples).clone(), (1600,)):
        session.push_audio(piece, rate_hz)
    seen = told(session.respond(max_frames=30)), session.ids
    session.push_text("what is two plus two")
    return seen, told(session.respond(return_audio=False)), session.ids
