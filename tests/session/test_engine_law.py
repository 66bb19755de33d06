"""The engine's law: any call may fail, be cut or be dropped at any moment, and nobody else ever notices.

Afterwards the session is as before the call, or closed with the reason; and if the engine itself dies, everyone is
told why.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import build
import pytest
import torch

from omni import OmniEngine, OmniModel, OmniSession, StreamingConfig, TextDelta, TurnEnd
from omni.generation.rows import Rows
from omni.session.engine import EngineSession

ROOT = Path(__file__).parents[2]
PLAIN = {**build.PLAIN, "max_new_tokens": 5, "max_frames": 5}
LONG = {**build.PLAIN, "max_new_tokens": 300, "max_frames": 300}
ENDLESS = StreamingConfig(chunk_frames=(1,), loop_frames=None, silence_s=None)
PATIENCE_S = 20


def two_rows(model: OmniModel) -> Iterator[OmniEngine]:
    """An engine of two sessions."""
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as made:
        yield made


engine = pytest.fixture(two_rows, name="engine")


def ids_of(events: Any) -> list[int]:
    return [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]


def asked(engine: OmniEngine, text: str = "hello") -> EngineSession:
    session = engine.session()
    session.push_text(text)
    return session


def assert_sound(engine: OmniEngine, model: OmniModel) -> None:
    """All rows can be had, and what is said in them is what is said alone."""
    alone = OmniSession(model, streaming=ENDLESS)
    alone.push_text("hello")
    expected = ids_of(alone.respond(**PLAIN))
    sessions = [asked(engine) for _ in range(2)]
    streams = [session.respond(**PLAIN) for session in sessions]
    assert [ids_of(stream) for stream in streams] == [expected] * 2
    for session in sessions:
        session.close()


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at the same time -> what each returned or raised."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a call hangs"
    return results


# at the same time


def test_close_while_a_consumer_takes_the_last_event(engine: OmniEngine, model: OmniModel) -> None:
    for number in range(40):
        session = asked(engine)
        events = session.respond(**PLAIN)
        count = sum(1 for _ in asked_again(engine))
        for _ in range(count - 1 - number % 2):
            next(events)
        left, closed = in_threads(lambda e=events: list(e), session.close)
        assert closed is None
        assert not isinstance(left, BaseException) or "closed" in str(left), repr(left)
        if isinstance(left, list) and left:
            assert isinstance(left[-1], TurnEnd)
    assert_sound(engine, model)


def asked_again(engine: OmniEngine) -> list[Any]:
    """The events of the same reply."""
    session = asked(engine)
    events = list(session.respond(**PLAIN))
    session.close()
    return events


@pytest.mark.parametrize("other", ["another interrupt", "the end"])
def test_interrupt_at_the_same_time_as(other: str, engine: OmniEngine, model: OmniModel) -> None:
    """The history holds the prompt, what was kept, and the end of the turn, once."""
    alone = OmniSession(model)
    alone.push_text("hello")
    list(alone.respond(**PLAIN))
    prompt = alone.ids[: -len(alone.interrupt().token_ids) - 2]
    for number in range(25):
        session = asked(engine)
        events = session.respond(**PLAIN)
        first = next(events)
        assert isinstance(first, TextDelta)
        for _ in range(number % 4):
            next(events)
        if other == "the end":
            kept, _ = in_threads(session.interrupt, lambda e=events: list(e))
        else:
            one, two = in_threads(session.interrupt, session.interrupt)
            kept = two if isinstance(one, BaseException) else one
            assert isinstance(one, ValueError) or isinstance(two, ValueError) or one == two
        list(events)
        assert not session.responding
        tail = [258, 10]
        if not isinstance(kept, BaseException):
            count = len(kept.token_ids) + len(tail)
            assert session.ids[-count:] == [*kept.token_ids, *tail], number
            assert session.ids[:-count] == prompt
        session.close()
    assert_sound(engine, model)


def test_close_of_the_engine_twice_and_from_several_threads(model: OmniModel) -> None:
    engine = OmniEngine(model, max_sessions=2, streaming=ENDLESS)
    session = asked(engine)
    events = session.respond(**LONG)
    next(events)
    assert in_threads(engine.close, engine.close, session.close, lambda: list(events))[:3] == [None] * 3
    engine.close()
    session.close()
    for call in (engine.session, lambda: session.push_text("x"), session.respond, session.fork):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_close_of_the_engine_from_its_own_thread(model: OmniModel) -> None:
    engine = OmniEngine(model, max_sessions=1)
    session = asked(engine)

    def close(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        engine.close()
        return logits

    got = in_threads(lambda: list(session.respond(**PLAIN, logits_processor=close)))[0]
    assert isinstance(got, BaseException) or got[-1].reason == "interrupted"
    with pytest.raises(ValueError, match="closed"):
        engine.session()


def test_calls_of_one_session_from_several_threads_come_one_after_the_other(engine: OmniEngine) -> None:
    session = engine.session()
    results = in_threads(*(lambda i=i: session.push_text(f"<{i}>") for i in range(8)))
    assert results == [None] * 8
    (item,) = session.items
    assert sorted(item.text[i : i + 3] for i in range(0, 24, 3)) == [f"<{i}>" for i in range(8)]


# dropped


class Knot:
    """A reference cycle around something."""

    def __init__(self, held: Any) -> None:
        self.me, self.held = self, held


@pytest.mark.parametrize("what", ["reply", "session", "both"])
def test_what_is_dropped_in_a_cycle_may_be_collected_in_the_engine_s_thread(
    what: str, engine: OmniEngine, model: OmniModel, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    tick, collected = Rows.tick, []

    def collecting(rows: Rows) -> Any:
        gc.collect()
        collected.append(threading.current_thread().name)
        return tick(rows)

    gc.disable()  # nothing but that collects
    gc.freeze()  # and it is quick, whatever other tests have left
    try:
        for _ in range(3):
            session = asked(engine, "a story")
            events = session.respond(**LONG)
            next(events)
            kept = session
            Knot({"reply": events, "session": session, "both": (session, events)}[what])
            del session, events
            if what != "reply":
                kept = None
            monkeypatch.setattr(Rows, "tick", collecting)
            other = asked(engine)
            assert ids_of(other.respond(**PLAIN))
            monkeypatch.setattr(Rows, "tick", tick)
            other.close()
            if kept is not None:
                wait_until(lambda k=kept: not k.responding)
                kept.push_text("and?")
                assert ids_of(kept.respond(**PLAIN))
                kept.close()
    finally:
        gc.unfreeze()
        gc.enable()
    assert collected and "omni-engine" in collected
    assert_sound(engine, model)
    assert not capfd.readouterr().err


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_S * 100):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never happens")


def test_a_session_that_is_dropped_gives_its_row_back(engine: OmniEngine, model: OmniModel) -> None:
    for number in range(6):
        session = asked(engine)
        if number % 2:
            next(session.respond(**LONG))
        del session
    gc.collect()
    assert_sound(engine, model)


def test_an_engine_that_is_dropped_ends_its_thread(model: OmniModel) -> None:
    before = threading.active_count()
    engine = OmniEngine(model, max_sessions=2, streaming=ENDLESS)
    session = asked(engine)
    next(session.respond(**LONG))
    gone = weakref.ref(engine)
    del engine, session
    wait_until(lambda: gone() is None and threading.active_count() <= before)


# failures


def test_a_tick_that_fails_reaches_each_reader(
    engine: OmniEngine, model: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause, tick = OSError("the device is lost"), Rows.tick
    sessions = [asked(engine) for _ in range(2)]
    before = [session.ids for session in sessions]
    streams = [session.respond(**LONG) for session in sessions]
    for stream in streams:
        next(stream)

    def fails(rows: Rows) -> Any:
        raise cause

    monkeypatch.setattr(Rows, "tick", fails)
    for stream in streams:
        with pytest.raises(RuntimeError, match="OSError: the device is lost") as caught:
            list(stream)
        assert caught.value.__cause__ is cause
    monkeypatch.setattr(Rows, "tick", tick)
    for session, ids in zip(sessions, before):
        assert session.ids == ids and not session.responding
        assert ids_of(session.respond(**PLAIN))
        session.close()
    assert_sound(engine, model)


def test_an_engine_that_dies_tells_everyone_why(
    engine: OmniEngine, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    first, second = asked(engine), asked(engine)
    streams = [session.respond(**LONG) for session in (first, second)]
    for stream in streams:
        next(stream)

    def dies(rows: Rows) -> Any:
        raise SystemExit("no more")

    monkeypatch.setattr(Rows, "tick", dies)
    told = in_threads(*(lambda s=stream: list(s) for stream in streams))
    for error in told:
        assert isinstance(error, RuntimeError) and "the engine has died: SystemExit: no more" in str(error)
    for call in (
        engine.session,
        lambda: first.push_text("x"),
        lambda: first.respond(**PLAIN),
        first.interrupt,
        first.fork,
        lambda: first.drop_oldest_turns(),
    ):
        with pytest.raises(RuntimeError, match="the engine has died: SystemExit: no more"):
            call()
    first.close()
    engine.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told(engine: OmniEngine, model: OmniModel) -> None:
    session = asked(engine)
    next(session.respond(**LONG))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            calls = (engine.session, lambda: session.push_text("x"), session.respond, session.interrupt, session.fork)
            said = []
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    said.append("forked child" in str(error))
            session.close()
            engine.close()
            status = 0 if said == [True] * len(calls) else 2
        finally:
            os._exit(status)
    for _ in range(PATIENCE_S * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise AssertionError("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    session.close()
    assert_sound(engine, model)


ENDS = {"end": "", "sys.exit": "sys.exit(0)", "exception": "raise ValueError('the end')"}


@pytest.mark.parametrize("end", ["end", *(pytest.param(end, marks=pytest.mark.slow) for end in list(ENDS)[1:])])
def test_a_process_may_end_while_a_turn_runs(end: str) -> None:
    script = f"""
import sys; sys.path.insert(0, "tests")
from build import tiny_model
from omni import OmniEngine, StreamingConfig
engine = OmniEngine(tiny_model(), streaming=StreamingConfig(chunk_frames=(1,), loop_frames=None, silence_s=None))
session = engine.session()
session.push_text("a story")
events = session.respond(max_new_tokens=300, max_frames=300)
next(events)
{ENDS[end]}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == (1 if end == "exception" else 0), done.stderr
    assert ("the end" in done.stderr) if end == "exception" else not done.stderr
