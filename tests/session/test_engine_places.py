"""More sessions than rows, and what moves into an engine: everyone says what they would say alone."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from build import noise, speckle
from test_session_template import second_model

from omni import AudioChunk, OmniEngine, OmniModel, OmniSession, StreamingConfig, TextDelta, TurnEnd
from omni.session.engine import EngineFullError, EngineSession
from omni.session.shared_rows import SharedRows

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
PLAIN = {**build.PLAIN, "max_new_tokens": 5, "max_frames": 4, "seed": 0}
LONG = {**build.PLAIN, "max_new_tokens": 400, "max_frames": 400}
ENDLESS = StreamingConfig(prefill_tokens=32, audio_window_s=1.0, chunk_frames=(1,), loop_frames=None, silence_s=None)


def told(events: Any) -> tuple[list[int], torch.Tensor, str]:
    events = list(events)
    ids = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
    sound = [event.samples for event in events if isinstance(event, AudioChunk)]
    return ids, torch.cat(sound or [torch.zeros(0)]), events[-1].reason


def assert_same(got: Any, alone: Any) -> None:
    assert got[0] == alone[0] and got[2] == alone[2]
    torch.testing.assert_close(got[1], alone[1], atol=1e-5, rtol=1e-5)


def ask(session: OmniSession, number: int, turn: int) -> None:
    session.push_text(f"session {number}, turn {turn}: " + "x" * (number * 7 % 40))
    if (number + turn) % 3 == 0:
        session.push_audio(noise(4000 + 500 * number, number))
    if (number + turn) % 4 == 1:
        session.push_image(speckle(32, 32, seed=number))


def talk(session: OmniSession, number: int, turns: int = 2) -> list[Any]:
    out = []
    for turn in range(turns):
        ask(session, number, turn)
        out.append(told(session.respond(**PLAIN)))
    return out


def test_sixteen_sessions_on_eight_rows_all_finish(model: OmniModel) -> None:
    alone = [talk(OmniSession(model, streaming=ENDLESS), number) for number in range(16)]
    results: dict[int, Any] = {}
    with OmniEngine(model, max_sessions=8, max_parked=8, streaming=ENDLESS) as engine:
        sessions = [engine.session() for _ in range(16)]
        with pytest.raises(EngineFullError, match="all 8 sessions and 8 parked"):
            engine.session()

        def run(number: int) -> None:
            results[number] = talk(sessions[number], number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(16):
        for got, expected in zip(results[number], alone[number]):
            assert_same(got, expected)


@pytest.mark.parametrize("family", ["first", "second"])
def test_a_session_that_moved_off_its_row_goes_on_bit_for_bit(family: str, model: OmniModel, tmp_path: Path) -> None:
    made = model if family == "first" else second_model(tmp_path / "files")
    streaming = replace(ENDLESS, audio_window_s=1.0 if family == "first" else None)  # the other hears in blocks
    few = OmniEngine(made, max_sessions=1, max_parked=2, streaming=streaming)
    with few as engine, OmniEngine(made, max_sessions=3, streaming=streaming) as roomy:
        moved, stayed = ([e.session() for _ in range(3)] for e in (engine, roomy))
        for turn in range(3):
            for number in range(3):
                for sessions in (moved, stayed):
                    ask(sessions[number], number, turn)
                got, expected = (told(sessions[number].respond(**PLAIN)) for sessions in (moved, stayed))
                assert got[0] == expected[0] and got[2] == expected[2]
                assert torch.equal(got[1], expected[1])
                assert moved[number].ids == stayed[number].ids
        assert len([s for s in moved if s._place.row is not None]) == 1
        assert len([s for s in moved if s._place.saved is not None]) == 2


def test_replies_that_wait_for_a_row_come_in_order(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=1, max_parked=3, streaming=ENDLESS) as engine:
        first, *others = (engine.session() for _ in range(4))
        first.push_text("a story")
        events = first.respond(**LONG)
        next(events)
        order: list[int] = []
        threads = []
        for number, session in enumerate(others):
            session.push_text("hello")
            reply = session.respond(**PLAIN)  # it returns at once

            def listen(number: int = number, reply: Any = reply) -> None:
                next(reply)
                order.append(number)
                assert told(reply)[2] in ("max_new_tokens", "max_frames", "stop")

            threads.append(threading.Thread(target=listen))
            threads[-1].start()
        assert not order and first.responding
        first.interrupt()
        for thread in threads:
            thread.join()
        assert order == [0, 1, 2]
        first.push_text("go on")
        assert told(first.respond(**PLAIN))[0]


def test_a_reply_that_waits_for_a_row_may_be_interrupted_left_or_closed(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=1, max_parked=3, streaming=ENDLESS) as engine:
        first, second, third, fourth = (engine.session() for _ in range(4))
        first.push_text("a story")
        running = first.respond(**LONG)
        next(running)
        for session in (second, third, fourth):
            session.push_text("hello")
        waiting = {session: session.respond(**PLAIN) for session in (second, third, fourth)}
        assert second.interrupt() == ([], "")
        assert [event.reason for event in waiting[second] if isinstance(event, TurnEnd)] == ["interrupted"]
        del waiting[third]
        third.push_text("more")
        fourth.close()
        assert [event.reason for event in waiting[fourth] if isinstance(event, TurnEnd)] == ["interrupted"]
        engine.session().close()  # its place is free
        assert first.responding
        first.interrupt()
        for session in (second, third):
            session.push_text("and now?")
            assert told(session.respond(**PLAIN))[0]


def test_input_during_a_reply_is_heard_in_the_next_turn(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as engine:
        session, alone = engine.session(), OmniSession(model, streaming=ENDLESS)
        results = []
        for one in (session, alone):
            one.push_text("hello")
            events = one.respond(**PLAIN)
            next(events)
            with pytest.raises(ValueError):
                one.push_audio([float("nan")])
            one.push_audio(noise(9000))
            one.push_text("what was that?")
            first = told(events)
            results.append((first, told(one.respond(**PLAIN)), one.ids))
        for got, expected in zip(results[0][:2], results[1][:2]):
            assert_same(got, expected)
        assert results[0][2] == results[1][2]


def test_a_fork_during_a_reply_holds_what_was_yielded(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=3, max_parked=1, streaming=ENDLESS) as engine:
        session = engine.session()
        session.push_text("a story")
        events = session.respond(**{**LONG, "return_audio": False})
        said = [token for _ in range(3) for token in next(events).token_ids]
        other = session.fork()
        assert session.responding and not other.responding
        assert other.ids[-len(said) - 2 : -2] == said
        alone = OmniSession(model, streaming=ENDLESS)
        alone.become(other.items)
        for one in (other, alone):
            one.push_text("why?")
        assert alone.ids == other.ids
        assert_same(told(other.respond(**PLAIN)), told(alone.respond(**PLAIN)))
        assert next(events)


def test_a_saved_session_goes_on_in_an_engine(model: OmniModel, tmp_path: Path) -> None:
    alone = OmniSession(model, streaming=ENDLESS)
    talk(alone, 3, turns=2)
    alone.push_audio(noise(7000))
    alone.save(tmp_path / "one")
    with OmniEngine(model, max_sessions=1, max_parked=1, streaming=ENDLESS) as engine:
        session = engine.load(tmp_path / "one")
        assert isinstance(session, EngineSession) and session.ids == alone.ids
        with pytest.raises(ValueError, match="responding"):
            events = session.respond(**LONG)
            next(events)
            try:
                session.save(tmp_path / "two")
            finally:
                session.interrupt()
                session.close()
        session = engine.load(tmp_path / "one")
        other = engine.session()
        other.push_text("hello")
        told(other.respond(**PLAIN))  # moves the loaded one off the row
        session.save(tmp_path / "two")
        loaded = OmniSession.load(tmp_path / "two", model)
        with pytest.raises(EngineFullError):
            engine.load(tmp_path / "two")
        expected = told(alone.respond(**PLAIN))
        assert_same(told(session.respond(**PLAIN)), expected)
        assert_same(told(loaded.respond(**PLAIN)), expected)


def test_a_reply_aside_leaves_the_session_as_it_is(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as engine:
        session = engine.session()
        session.push_text("hello")
        before = session.ids
        aside = told(session.respond(remember=False, **PLAIN))
        assert session.ids == before
        assert_same(told(session.respond(**PLAIN)), aside)
        other = engine.session()  # the copy gave its place back
        other.close()


def test_places_of_sessions_that_could_not_say_goodbye_are_found(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C strikes at the first bytecode of what a seat's end calls."""
    monkeypatch.setattr(SharedRows, "give_up", lambda self, place: None)
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as engine:
        for _ in range(5):
            session = engine.session()
            session.push_text("hello")
            assert told(session.respond(**PLAIN))[0]
            del session
            gc.collect()
