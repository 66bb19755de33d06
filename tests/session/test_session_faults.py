"""Any call of a session may fail or be cut at any moment: the session is as before the call, or closed and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import build
import numpy as np
import pytest
import torch
from build import noise, speckle
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from test_session_template import first_model, second_model

from omni import AudioChunk, OmniConfig, OmniEngine, OmniModel, OmniSession, StreamingConfig
from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.encoders.contract import AudioEncoderContract, EncoderOutput
from omni.generation.rows import Rows
from omni.generation.runner import Runner
from omni.layers.cache import KVCache
from omni.session.entries import Writing
from omni.session.live_media import AudioFrontEnd, OpenVideo
from omni.session.row_reader import RowNote, RowReader

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
PLAIN = {**build.PLAIN, "max_new_tokens": 4, "max_frames": 3, "seed": 0}
QUICK = StreamingConfig(audio_window_s=1.0, prefill_tokens=16)


class Broken(Exception):
    """What a part raises."""


HOOKS: list[tuple[Any, str]] = [
    (AudioFrontEnd, "push"),
    (AudioFrontEnd, "finish"),
    (OmniModel, "encode_vision"),
    (OpenVideo, "add_step"),
    (Writing, "write_text"),
    (Writing, "write_at"),
    (RowReader, "end_reply"),
    (Rows, "prefill_thinker"),
    (Rows, "prefill_talker"),
    (Rows, "release"),
    (Rows, "mark_seen"),
    (Runner, "draw_token"),
    (Runner, "read_token"),
    (Runner, "frame"),
    (Runner, "decode"),
    (KVCache, "adopt"),
]


@contextmanager
def fault(
    owner: Any, name: str, number: int = 1, *, after: bool = False, error: BaseException | None = None
) -> Iterator[list[int]]:
    """Raise in the `number`th call of a function, before or after it has done its work; lists the calls."""
    original, calls = getattr(owner, name), []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = original(*args, **kwargs) if after or len(calls) != number else None
        if len(calls) == number:
            raise error or Broken("the part is broken")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, hooked)
        yield calls


def standing(session: OmniSession) -> dict[str, Any]:
    """All that a session goes on from, read from a copy of it."""
    copied = session.fork()
    c, reader = copied._conversation, copied._reader
    copied._run(lambda: reader.read(c.entries))  # all that is decided
    caches = [state.decoder.cache for state in (reader.rows.text, reader.rows.speech) if state is not None]
    filled = [(k.keys[:, 0, :, : k.lengths[0]], k.values[:, 0, :, : k.lengths[0]]) for k in caches]
    turn = c.open
    return {
        "ids": (session.ids, c.ids, turn and turn.writing.tail, session.responding),
        "items": [(item.role, item.status, [part["type"] for part in item.parts]) for item in session.items],
        "ends": (reader.thinker, reader.talker, c.end),
        "past": [(entry.ids, entry.length, entry.by_user, entry.embeds is None) for entry in c.entries],
        "caches": filled,
        "open": [None if m is None else m.front_end for m in ((turn.clip, turn.video) if turn else (None, None))],
    }


def assert_alike(one: OmniSession, other: OmniSession) -> None:
    mine, theirs = standing(one), standing(other)
    for name in ("ids", "items", "ends", "past"):
        assert mine[name] == theirs[name], name
    for a, b in zip(sum(mine["caches"], ()), sum(theirs["caches"], ())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert [a is None for a in mine["open"]] == [b is None for b in theirs["open"]]


def reply(session: OmniSession, **changes: Any) -> tuple[list[int], torch.Tensor]:
    events = list(session.respond(**{**PLAIN, **changes}))
    ids = [i for event in events for i in getattr(event, "token_ids", ())]
    return ids, torch.cat([event.samples for event in events if isinstance(event, AudioChunk)] or [torch.zeros(0)])


def assert_same_reply(one: OmniSession, other: OmniSession, **changes: Any) -> None:
    (ids, sound), (other_ids, other_sound) = reply(one, **changes), reply(other, **changes)
    assert ids == other_ids
    torch.testing.assert_close(sound, other_sound, atol=1e-4, rtol=0)


def cramped(model: OmniModel, positions: int) -> OmniModel:
    """The same model with so many positions."""
    values = model.config.to_dict()
    values["thinker_config"]["text_config"]["max_position_embeddings"] = positions
    small = OmniModel(OmniConfig.from_dict(values))
    small.load_state_dict(model.state_dict())
    small.processor = model.processor
    return small


def frame(number: int, side: int = 32) -> np.ndarray:
    return speckle(side, side, seed=number)


PUSHES: dict[str, Callable[[OmniSession], Any]] = {
    "sound": lambda s: s.push_audio(noise(20000, 3)),
    "picture": lambda s: s.push_image(frame(1, 128)),
    "frame": lambda s: s.push_video_frame(frame(2), 1.0),
    "text": lambda s: s.push_text("more"),
}


@pytest.mark.parametrize("what", ["sound", "picture", "frame"])
def test_what_finds_the_session_full_can_be_pushed_again(model: OmniModel, what: str) -> None:
    small = cramped(model, 900)
    session, twin = (OmniSession(small, streaming=QUICK) for _ in range(2))
    for one in (session, twin):
        one.push_text("a long question " * 40)
        reply(one, return_audio=False)
        one.push_text("short")
        if what == "frame":
            one.push_video_frame(frame(1), 0.5)
    fill = 900 - 12 - len(session.ids)
    for one in (session, twin):
        one._user_turn().writing.write_text([75] * fill)
    for _ in range(2):
        with pytest.raises(ValueError, match="session is full"):
            PUSHES[what](session)
        assert_alike(session, twin)
    for one in (session, twin):
        one.drop_oldest_turns()
        PUSHES[what](one)
    assert_alike(session, twin)
    assert_same_reply(session, twin, return_audio=False)


@pytest.mark.parametrize("error", [Broken("no memory"), KeyboardInterrupt()], ids=["error", "cut"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_prompt_that_is_not_read_to_its_end(model: OmniModel, error: Any, after: bool, call: int) -> None:
    session, twin = (OmniSession(model, system="be brief", streaming=QUICK) for _ in range(2))
    for one in (session, twin):
        one.push_text("several pieces, " * 8)
        one.push_audio(noise(9000))
    for owner, name in ((Rows, "prefill_thinker"), (Rows, "prefill_talker"), (KVCache, "reserve")):
        with fault(owner, name, call, after=after, error=error), pytest.raises(type(error)):
            session.respond(**PLAIN)
        assert_alike(session, twin)
    assert_same_reply(session, twin)


@pytest.mark.parametrize("family", ["first", "second"])
@pytest.mark.parametrize("where", ["alone", "in an engine"])
@pytest.mark.parametrize("part", ["draw_token", "read_token", "frame", "decode"])
def test_a_part_that_fails_while_it_answers(tmp_path: Any, family: str, where: str, part: str) -> None:
    model = (first_model if family == "first" else second_model)(tmp_path / "files")
    with OmniEngine(model, max_sessions=2) as engine:
        session, twin = (engine.session() if where == "in an engine" else OmniSession(model) for _ in range(2))
        for one in (session, twin):
            one.push_text("one")
            one.push_audio(noise(5000))
        with fault(Runner, part, 2), pytest.raises((Broken, RuntimeError), match="the part is broken"):
            list(session.respond(**{**PLAIN, "max_frames": 60}))
        assert not session.responding
        with pytest.raises(ValueError, match="no reply to interrupt"):
            session.interrupt()
        assert session.ids == twin.ids
        assert_same_reply(session, twin)
        assert_same_reply(session, twin)


def test_an_interruption_that_fails_leaves_the_reply_running(tmp_path: Any) -> None:
    """A Talker that reads the whole prompt reads what was heard of a reply when that is cut."""
    model = second_model(tmp_path / "files")
    windows = StreamingConfig(codec_schedule=ChunkSchedule(4, 2, 2), codec_ode=build.FAST, silence_s=None)
    session, twin = (OmniSession(model, streaming=windows) for _ in range(2))
    streams = []
    for one in (session, twin):
        one.push_text("one")
        streams.append(one.respond(**{**PLAIN, "max_new_tokens": 20, "return_audio": False}))
        for _ in range(5):
            next(streams[-1])
    for after in (False, True):
        with fault(Rows, "prefill_talker", after=after), pytest.raises(Broken):
            session.interrupt()
    assert session.responding
    for event, other in zip(*([next(stream) for _ in range(2)] for stream in streams)):
        assert type(event) is type(other) and getattr(event, "token_ids", ()) == getattr(other, "token_ids", ())
    for stream in streams:
        stream.close()
    assert session.ids == twin.ids


def test_turns_are_dropped_whole_or_not_at_all(model: OmniModel) -> None:
    session, twin = (OmniSession(model, keep_media=True, streaming=QUICK) for _ in range(2))
    for one in (session, twin):
        for number in range(3):
            one.push_text(f"question {number}")
            one.push_image(frame(number))
            reply(one)
    for number in (1, 2, 4):
        for error in (Broken("no memory"), KeyboardInterrupt()):
            session = twin.fork()
            with fault(Rows, "prefill_thinker", number, error=error), pytest.raises(type(error)):
                session.drop_oldest_turns()
            assert_alike(session, twin)
    assert session.drop_oldest_turns() == twin.drop_oldest_turns()
    for one in (session, twin):
        one.push_text("and now?")
    assert_same_reply(session, twin)


@pytest.mark.parametrize("count", ["1", 1.0, None, True, [1]], ids=repr)
def test_turns_to_drop_are_a_whole_number(model: OmniModel, count: Any) -> None:
    session = OmniSession(model)
    for text in ("one", "two"):
        session.push_text(text)
        reply(session)
    before = session.ids
    with pytest.raises(TypeError, match="count"):
        session.drop_oldest_turns(count)
    assert session.ids == before


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_frames_of_a_video_have_one_size(model: OmniModel, frames: int) -> None:
    session, twin = OmniSession(model), OmniSession(model)
    model.processor.vision.frame_pixels, usual = (32 * 32, 1 << 20), model.processor.vision.frame_pixels
    try:
        for one in (session, twin):
            for number in range(frames):
                one.push_video_frame(frame(number, 64), number)
        with pytest.raises(ValueError, match="one size"):
            session.push_video_frame(frame(9, 96), 10)
        assert_alike(session, twin)
        for one in (session, twin):
            one.push_video_frame(frame(9, 64), 10)
        assert_same_reply(session, twin)
    finally:
        model.processor.vision.frame_pixels = usual


class Averaging(AudioEncoderContract):
    """Each token is the mean of twenty frames; it hears a clip at its end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(128, width)

    def num_tokens(self, length: int) -> int:
        return -(-length // 20)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> EncoderOutput:
        means = [frames.mean(0) for clip, n in zip(features, lengths.tolist()) for frames in clip[:, :n].T.split(20)]
        return EncoderOutput(self.proj(torch.stack(means)), [self.num_tokens(n) for n in lengths.tolist()], taps=[])


def test_an_encoder_of_one_s_own_forgets_what_was_undone(model: OmniModel) -> None:
    mine = OmniModel(model.config, audio_encoder=Averaging(model.config.thinker_config.text_config.hidden_size))
    mine.processor = model.processor
    session, twin = OmniSession(mine), OmniSession(mine)
    for number in range(3):
        for after in (False, True):
            with fault(AudioFrontEnd, "push", after=after), pytest.raises(Broken):
                session.push_audio(noise(30000, 9))
        for one in (session, twin):
            one.push_audio(noise(20000, number))
    with fault(AudioFrontEnd, "finish", after=True), pytest.raises(Broken):
        session.respond(**PLAIN)
    assert_same_reply(session, twin)


def test_a_session_that_cannot_be_put_back_is_closed_and_says_why(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK)
    session.push_text("one")
    events = session.respond(**{**PLAIN, "return_audio": False})

    def lost(*_: Any) -> None:
        raise Broken("the device is lost")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((RowReader, "set_lengths"), (RowNote, "apply")):
            patch.setattr(owner, name, lost)
        with pytest.raises(Broken):
            session.interrupt()
    assert session.closed and events is not None
    for call in (
        lambda: session.push_text("x"),
        lambda: session.push_audio(noise(10)),
        lambda: session.push_image(frame(0)),
        lambda: session.push_video_frame(frame(0), 0.0),
        lambda: session.respond(),
        lambda: session.interrupt(),
        lambda: session.fork(),
        lambda: session.drop_oldest_turns(),
    ):
        with pytest.raises(ValueError, match=r"closed: interrupt failed.*could not be undone"):
            call()


def test_a_second_cut_while_the_first_is_undone(model: OmniModel) -> None:
    session, twin = (OmniSession(model, streaming=QUICK) for _ in range(2))
    for one in (session, twin):
        one.push_text("several pieces, " * 8)
    for owner, name in ((KVCache, "grow"), (Rows, "put")):
        cut, cut_again = (Rows, "prefill_thinker", 2), (owner, name)
        with (
            fault(*cut, error=KeyboardInterrupt()),
            fault(*cut_again, error=KeyboardInterrupt()),
            pytest.raises(KeyboardInterrupt),
        ):
            session.respond(**PLAIN)
        assert_alike(session, twin)
    assert_same_reply(session, twin)


# every call, every part, any moment


class Faults(RuleBasedStateMachine):
    """A session whose calls fail at times, and its twin, for which the failed calls were never made."""

    model: OmniModel
    streaming: StreamingConfig
    plan = st.none() | st.tuples(
        st.sampled_from(HOOKS), st.integers(1, 4), st.booleans(), st.sampled_from((Broken, KeyboardInterrupt))
    )
    failures: tuple[type[BaseException], ...] = (Broken, KeyboardInterrupt)  # what calls raise that fail or are cut

    @initialize(video_sound=st.booleans())
    def begin(self, video_sound: bool) -> None:
        options: Any = {"keep_media": True, "streaming": self.streaming, "use_audio_in_video": video_sound}
        self.session, self.twin = (OmniSession(self.model, **options) for _ in range(2))
        self.time_s = 0.0

    def check_alike(self) -> None:
        """After each call."""
        assert_alike(self.session, self.twin)

    def both(self, call: Callable[[OmniSession], Any], plan: Any) -> None:
        """Make a call; if it succeeds, the twin makes it too. A call that is wrong anyway changes neither."""
        try:
            if plan is None:
                got = call(self.session)
            else:
                (owner, name), number, after, kind = plan
                error = (kind if kind in self.failures else Broken)("x")
                with fault(owner, name, number, after=after, error=error):
                    got = call(self.session)
        except (*self.failures, ValueError) as error:
            if isinstance(error, ValueError):
                with pytest.raises(ValueError):
                    call(self.twin)
        else:
            assert got == call(self.twin)
        self.check_alike()

    @rule(text=st.sampled_from(("\nhi", "a text " * 8, "")), plan=plan)
    def push_text(self, text: str, plan: Any) -> None:
        self.both(lambda s: s.push_text(text), plan)

    @rule(samples=st.sampled_from((700, 9000, 20000)), rate_hz=st.sampled_from((16000, 8000)), plan=plan)
    def push_audio(self, samples: int, rate_hz: int, plan: Any) -> None:
        self.both(lambda s: s.push_audio(noise(samples, samples), rate_hz), plan)

    @rule(plan=plan)
    def push_image(self, plan: Any) -> None:
        self.both(lambda s: s.push_image(frame(0)), plan)

    @rule(plan=plan)
    def push_frame(self, plan: Any) -> None:
        self.time_s += 0.5
        self.both(lambda s: s.push_video_frame(frame(int(2 * self.time_s)), self.time_s), plan)

    @rule(plan=plan, aloud=st.booleans())
    def respond(self, plan: Any, aloud: bool) -> None:
        self.both(lambda s: reply(s, return_audio=aloud)[0], plan)

    @rule(events=st.integers(0, 4))
    def leave(self, events: int) -> None:
        def cut(session: OmniSession) -> Any:
            stream = session.respond(**PLAIN)
            for _ in range(events):
                next(stream, None)
            return session.interrupt()

        self.both(cut, None)

    @rule(plan=plan)
    def interrupt_afterwards(self, plan: Any) -> None:
        self.both(lambda s: s.interrupt(played_ms=80), plan)

    @rule(plan=plan)
    def drop(self, plan: Any) -> None:
        self.both(lambda s: s.drop_oldest_turns(), plan)

    def teardown(self) -> None:
        if hasattr(self, "session"):
            assert_same_reply(self.session, self.twin)


@pytest.mark.parametrize("family", ["first", "second"])
def test_whatever_fails_or_is_cut(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    make = first_model if family == "first" else second_model
    made = make(tmp_path_factory.mktemp("files") / "own")
    streaming = QUICK if family == "first" else replace(QUICK, audio_window_s=None)  # the other hears in blocks
    machine = type("Machine", (Faults,), {"model": made, "streaming": streaming})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=8, stateful_step_count=12, phases=[Phase.generate])
    )
