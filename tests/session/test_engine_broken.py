"""What a hostile user does to an engine: nobody hangs, nobody else notices, and no place is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import build
import pytest
import torch
from test_engine_law import LONG, PATIENCE_S, PLAIN, asked, assert_sound, ids_of, in_threads, wait_until

from omni import Item, OmniEngine, OmniModel, OmniSession, StreamingConfig, TurnEnd
from omni.generation.rows import Rows
from omni.session import replies

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
ENDLESS = StreamingConfig(prefill_tokens=16, chunk_frames=(1,), loop_frames=None, silence_s=None)
SILENT = {**build.PLAIN, "max_new_tokens": 4, "return_audio": False}


@pytest.fixture
def engine(model: OmniModel) -> Iterator[OmniEngine]:
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as made:
        yield made


# calls from the engine's thread


def test_a_reply_s_function_that_calls_its_session_is_refused_while_another_call_waits(
    engine: OmniEngine, model: OmniModel
) -> None:
    """It would wait for the session, whose other call waits for the engine's thread."""
    session = asked(engine)
    inside, go, said = threading.Event(), threading.Event(), []

    def calls(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        inside.set()
        go.wait(PATIENCE_S)
        for call in (lambda: session.push_text("x"), lambda: session.items, lambda: session.ids, session.respond):
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
        return logits

    events = session.respond(**SILENT, logits_processor=calls)
    assert inside.wait(PATIENCE_S)

    def interrupts() -> None:
        with contextlib.suppress(ValueError):
            session.interrupt()

    other = threading.Thread(target=interrupts, daemon=True)
    other.start()
    wait_until(lambda: engine._shared.scheduler._inbox.qsize() > 0)
    go.set()
    other.join(PATIENCE_S)
    assert not other.is_alive(), "the engine hangs"
    assert len(said) >= 2 and all("own thread" in text for text in said)
    events.close()
    session.close()
    assert_sound(engine, model)


def test_a_reply_s_function_that_reads_events_is_refused(engine: OmniEngine, model: OmniModel) -> None:
    first, second = asked(engine), asked(engine)
    events, said = first.respond(**LONG), []

    def reads(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            if said:
                break
            try:
                next(events)
            except RuntimeError as error:
                said.append(str(error))
        return logits

    got = in_threads(lambda: list(second.respond(**SILENT, logits_processor=reads)))[0]
    assert isinstance(got, list) and said and "own thread" in said[0]
    first.close()
    second.close()
    assert_sound(engine, model)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_a_reply_s_function_that_ends_its_thread_ends_its_reply_alone(
    error: BaseException, engine: OmniEngine, model: OmniModel
) -> None:
    first, second = asked(engine), asked(engine)
    others = first.respond(**PLAIN)

    def leaves(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises((type(error), RuntimeError)):
        list(second.respond(**SILENT, logits_processor=leaves))
    assert ids_of(others)
    assert ids_of(second.respond(**SILENT))
    first.close()
    second.close()
    assert_sound(engine, model)


# one iterator, several threads


def test_two_readers_of_one_reply_both_come_to_its_end(engine: OmniEngine, model: OmniModel) -> None:
    session = asked(engine)
    events = session.respond(**PLAIN)
    one, two = in_threads(lambda: list(events), lambda: list(events))
    assert isinstance(one, list) and isinstance(two, list)
    assert ids_of(sorted_by_none([*one, *two]))
    session.close()
    assert_sound(engine, model)


def sorted_by_none(events: list[Any]) -> list[Any]:
    return [event for event in events if not isinstance(event, TurnEnd)]


# a process that forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_was_forked_inside_of_a_call_may_read_its_events(engine: OmniEngine, model: OmniModel) -> None:
    """The thread that holds the session's lock is not there in the child."""
    session = asked(engine)
    events = session.respond(**LONG)
    next(events)
    inside, go = threading.Event(), threading.Event()

    def hold() -> Iterator[None]:
        inside.set()
        go.wait(PATIENCE_S)
        return
        yield

    engine._shared.scheduler.post(None, hold)
    assert inside.wait(PATIENCE_S)
    waits = threading.Thread(target=session.interrupt)
    waits.start()
    wait_until(lambda: engine._shared.scheduler._inbox.qsize() > 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(2):
                with contextlib.suppress(RuntimeError):
                    for _ in events:
                        pass
            events.close()
            session.close()
            engine.close()
            status = 0
        finally:
            os._exit(status)
    go.set()
    waits.join()
    assert waited_for(child) == 0
    session.close()
    assert_sound(engine, model)


def waited_for(child: int) -> int:
    for _ in range(PATIENCE_S * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


# places


def test_replies_aside_one_after_the_other_need_one_place(engine: OmniEngine, model: OmniModel) -> None:
    session = asked(engine)
    for _ in range(3):
        events = session.respond(remember=False, **SILENT)  # the last iterator is still there
        assert ids_of(events)
    kept = session.respond(remember=False, **SILENT)
    next(kept)
    kept.close()
    other = engine.session()
    other.close()
    session.close()
    assert_sound(engine, model)


def test_a_reply_aside_that_is_refused_takes_no_place(engine: OmniEngine) -> None:
    session = asked(engine)
    for wrong in ({"speaker": "nobody"}, {"items": [3]}, {"max_new_tokens": 0}):
        try:
            session.respond(remember=False, **wrong)  # type: ignore[arg-type]
            raise AssertionError("it was taken")
        except (ValueError, TypeError):  # the error holds its frames here
            engine.session().close()


def test_a_copy_that_fails_takes_no_place(engine: OmniEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = asked(engine)
    list(session.respond(**SILENT))

    def fails(rows: Rows, row: int) -> Any:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "save_row", fails)
        try:
            session.fork()
            raise AssertionError("it was made")
        except OSError:
            engine.session().close()
    session.fork().close()


@pytest.mark.parametrize("what", ["a reply", "reading in advance"])
def test_a_session_that_has_failed_is_let_go_without_the_collector(
    what: str, engine: OmniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    gc.disable()

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("the device is lost")

    try:
        for _ in range(3):
            session = engine.session()
            with monkeypatch.context() as patch:
                if what == "a reply":
                    session.push_text("x")
                    patch.setattr(Rows, "tick", fails)
                    with contextlib.suppress(RuntimeError):
                        list(session.respond(**SILENT))
                else:
                    patch.setattr(Rows, "prefill_thinker", fails)
                    session.insert(Item(role="user", parts="a long text " * 30))
                    task = session._ahead
                    assert task is not None
                    wait_until(lambda t=task: t.done)
                    del task
            del session
        engine.session().close()
    finally:
        gc.enable()


# order and bounds


def test_interrupt_before_the_prompt_is_read_waits_for_a_piece(engine: OmniEngine) -> None:
    other = asked(engine)
    speaks = other.respond(**{**LONG, "return_audio": False})
    reads = threading.Thread(target=lambda: list(speaks))
    reads.start()
    session = engine.session()
    session.insert(Item(role="user", parts="a long text " * 60))  # it is read in advance
    events = session.respond(**SILENT)  # and waits for that
    before = engine.ticks
    pieces = engine._shared.scheduler.pieces
    session.interrupt()
    assert engine._shared.scheduler.pieces - pieces <= 3, engine._shared.scheduler.pieces - pieces
    assert engine.ticks - before <= 3
    assert not list(events)[:-1]
    other.close()
    reads.join()


def test_who_waits_for_a_row_is_not_passed_by_who_has_one(model: OmniModel) -> None:
    """One session reads a long text, another gives short replies without a pause; a third waits for a row."""
    with OmniEngine(model, max_sessions=2, max_parked=1, streaming=ENDLESS) as engine:
        reads, quick, waits = (engine.session() for _ in range(3))
        stop, turns = threading.Event(), []

        def chatter() -> None:
            while not stop.is_set():
                quick.push_text("x")
                list(quick.respond(**{**SILENT, "max_new_tokens": 1}))
                turns.append(1)
                if len(turns) % 10 == 0:
                    quick.become([])

        quick.push_text("x")
        list(quick.respond(**SILENT))
        reads.insert(Item(role="user", parts="a long text " * 400))
        thread = threading.Thread(target=chatter, daemon=True)
        wait_until(lambda: reads._reader.done != [])
        thread.start()
        wait_until(lambda: len(turns) > 2)
        before = len(turns)
        waits.push_text("hello")
        list(waits.respond(**SILENT))
        passed = len(turns) - before
        busy = reads._ahead is not None and not reads._ahead.done
        stop.set()
        thread.join(PATIENCE_S)
        assert busy, "it should have read all the time"
        assert passed <= 3, passed


# errors


def test_a_dead_engine_names_its_reason(engine: OmniEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = asked(engine)
    events = session.respond(**LONG)

    def dies(rows: Rows) -> Any:
        raise SystemExit("no more")

    monkeypatch.setattr(Rows, "tick", dies)
    with pytest.raises(RuntimeError):
        list(events)
    wait_until(lambda: session.closed)
    assert "no more" in str(session.closed_because)


def test_a_cancelled_waiter_s_end_that_fails_is_told(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes a reply's end into the history fails before the reply has begun."""
    with OmniEngine(model, max_sessions=1, max_parked=1, streaming=ENDLESS) as engine:
        first, second = asked(engine), asked(engine)
        running = first.respond(**LONG)
        next(running)
        waiting = second.respond(**SILENT)

        def fails(*_: Any, **__: Any) -> Any:
            raise OSError("no such text")

        with monkeypatch.context() as patch:
            patch.setattr(replies, "fill", fails)
            with pytest.raises((OSError, ValueError), match="no such text"):
                second.interrupt()
        got = in_threads(lambda: list(waiting))[0]
        assert got is not None
        first.interrupt()
        second.push_text("again")
        assert ids_of(second.respond(**SILENT))


def test_a_refused_task_of_asyncio_that_is_cancelled_prints_nothing(engine: OmniEngine) -> None:
    said: list[Any] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context))
        session = asked(engine)
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            with session._lock:
                held.set()
                go.wait(PATIENCE_S)

        threading.Thread(target=hold).start()
        held.wait(PATIENCE_S)

        async def listen() -> None:
            async for _ in session.respond_async(speaker="nobody"):
                pass

        task = asyncio.ensure_future(listen())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        go.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        await asyncio.sleep(0.01)
        session.close()

    asyncio.run(run())
    gc.collect()
    assert not said, said


def test_past_replies_are_not_kept_alive(engine: OmniEngine) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(held) is replies.Reply for held in gc.get_objects())

    session, before = engine.session(), alive()
    for turn in range(8):
        session.push_text(f"turn {turn}")
        list(session.respond(**SILENT))
    assert alive() - before <= 2


@pytest.mark.parametrize("where", ["alone", "in an engine"])
def test_a_reply_s_function_that_raises_stop_iteration_does_not_pass_for_the_end(
    where: str, engine: OmniEngine, model: OmniModel
) -> None:
    session = engine.session() if where == "in an engine" else OmniSession(model)
    session.push_text("hello")

    def runs_out(ids: Any, logits: torch.Tensor) -> torch.Tensor:
        return next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(session.respond(**SILENT, logits_processor=runs_out))
    assert ids_of(session.respond(**SILENT))
