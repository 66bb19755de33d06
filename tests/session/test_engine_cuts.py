"""Calls of an engine's session that are cut: by Ctrl-C at any bytecode, a cancelled task, or a `close` elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import noise
from cut_calls import cut_at
from test_engine_law import ENDLESS, LONG, PLAIN, asked, assert_sound, ids_of, in_threads, two_rows

from omni import Item, OmniEngine, OmniModel, OmniSession, StreamingConfig
from omni.session import scheduler
from omni.session.engine import EngineSession

SESSIONS = Path(scheduler.__file__).parent  # the sessions' code
engine = pytest.fixture(two_rows, name="engine")


def test_a_cancelled_task_leaves_the_session_usable(engine: OmniEngine, model: OmniModel) -> None:
    async def cancelled(after: int) -> None:
        session = asked(engine)
        seen = asyncio.Event()

        async def listen() -> None:
            count = 0
            async for _ in session.respond_async(**LONG):
                count += 1
                if count >= after:
                    seen.set()

        task = asyncio.create_task(listen())
        if after:
            await seen.wait()
        else:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(1000):
            if not session.responding:
                break
            await asyncio.sleep(0.005)
        session.push_text("and now?")
        assert ids_of([event async for event in session.respond_async(**PLAIN)])
        session.close()

    for after in (0, 1, 5):
        asyncio.run(cancelled(after))
    assert_sound(engine, model)


CALLS: dict[str, Callable[[EngineSession], Any]] = {
    "push_text": lambda s: s.push_text("more"),
    "push_audio": lambda s: s.push_audio(noise(3000)),
    "respond": lambda s: s.respond(**PLAIN),
    "next": lambda s: next(s.stream),  # type: ignore[attr-defined]
    "interrupt": lambda s: s.interrupt(),
    "close the events": lambda s: s.stream.close(),  # type: ignore[attr-defined]
    "insert": lambda s: s.insert(Item(role="user", parts="in between"), after="root"),
    "fork": lambda s: s.fork(),
    "close": lambda s: s.close(),
}


# A destructor that is cut in its first bytecodes is reported by Python; its place is found without it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("widest", [40, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_may_be_cut_at_any_bytecode(name: str, widest: int, model: OmniModel) -> None:
    """Afterwards the session stands before the call or after it, or is closed and says so; its place is not lost."""
    alone = OmniSession(model, streaming=ENDLESS)
    alone.push_text("hello")
    with OmniEngine(model, max_sessions=2, streaming=ENDLESS) as engine:
        point, step = 1, 1
        while True:
            session = asked(engine)
            if name in ("next", "interrupt", "close the events"):
                session.stream = session.respond(**LONG)  # type: ignore[attr-defined]
                next(session.stream)  # type: ignore[attr-defined]
            before = session.ids
            cut = cut_at(point, lambda s=session: CALLS[name](s), SESSIONS)
            if not session.closed:
                if name in ("push_text", "push_audio", "insert", "fork"):
                    after = session.ids
                    assert after == before or (not cut or len(after) > len(before)), point
                if session.responding:  # as before the call
                    session.interrupt()
                session.push_text("and now?")
                assert ids_of(session.respond(**{**PLAIN, "max_new_tokens": 1, "return_audio": False})), point
            session.close()
            if not cut:
                break
            point, step = point + step, min(step + 1, widest)
        assert point > 50
        assert_sound(engine, model)


def test_a_session_that_is_closed_while_its_call_waits(model: OmniModel) -> None:
    streaming = StreamingConfig(prefill_tokens=4, loop_frames=None, silence_s=None)
    with OmniEngine(model, max_sessions=2, streaming=streaming) as engine:
        for _ in range(5):
            noisy, session = asked(engine), engine.session()
            stream = noisy.respond(**LONG)
            next(stream)
            session.push_text("a long question " * 30)
            got, closed = in_threads(lambda s=session: list(s.respond(**PLAIN)), session.close)
            assert closed is None
            if isinstance(got, BaseException):
                assert "closed" in str(got)
            noisy.close()
        assert_sound(engine, model)
