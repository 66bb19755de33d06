"""How long a session of an engine waits while others speak: counted in ticks and pieces, whatever a tick takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import build
import pytest
from build import noise, speckle

from omni import OmniEngine, OmniModel, StreamingConfig, TextDelta
from omni.generation.rows import Rows
from omni.session.engine import EngineSession
from omni.session.scheduler import Scheduler, Task
from omni.session.shared_rows import Outlet

ENDLESS = StreamingConfig(prefill_tokens=16, audio_window_s=1.0, loop_frames=None, silence_s=None)
SPEAKING = {**build.PLAIN, "max_new_tokens": 1500, "max_frames": 1500}
SILENT = {**build.PLAIN, "max_new_tokens": 4, "return_audio": False}


class Watch:
    """What an engine's scheduler did: the tasks that callers waited for, the pieces done before each tick, and the tick
    in which the first event of a reply came."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tasks: list[tuple[int, Task[Any]]] = []  # with the thread that waited
        self.pieces: list[int] = []
        self.first_event: dict[int, int] = {}
        run, tick, deliver = Scheduler.run, Rows.tick, Outlet.deliver

        def noted_run(scheduler: Scheduler, task: Task[Any]) -> Any:
            self.tasks.append((threading.get_ident(), task))
            return run(scheduler, task)

        def noted_tick(rows: Rows) -> Any:
            self.pieces.append(self.scheduler.pieces)
            return tick(rows)

        def noted_deliver(outlet: Outlet, event: Any) -> None:
            self.first_event.setdefault(id(outlet), self.scheduler.ticks)
            deliver(outlet, event)

        patch.setattr(Scheduler, "run", noted_run)
        patch.setattr(Rows, "tick", noted_tick)
        patch.setattr(Outlet, "deliver", noted_deliver)

    def over(self, engine: OmniEngine) -> None:
        self.scheduler = engine._shared.scheduler

    def ticks(self, call: Any) -> tuple[Any, list[int]]:
        """Make a call -> its result, and the ticks that passed while it waited, each time that it did."""
        self.tasks.clear()
        result = call()
        me = threading.get_ident()
        return result, [task.ended - task.received for thread, task in self.tasks if thread == me]


@contextmanager
def speaking(engine: OmniEngine, count: int) -> Iterator[list[EngineSession]]:
    """So many replies that run, and are read, all the time."""
    sessions = [engine.session() for _ in range(count)]
    stop = threading.Event()

    def listen(session: EngineSession, events: Any) -> None:
        for _ in events:
            if stop.is_set():
                session.close()
                return

    threads = []
    for number, session in enumerate(sessions):
        session.push_text(f"story {number}")
        events = session.respond(**SPEAKING)
        next(events)
        threads.append(threading.Thread(target=listen, args=(session, events)))
        threads[-1].start()
    try:
        yield sessions
        assert all(session.responding for session in sessions), "they should have spoken all the time"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("replies", [1, 4, 8])
def test_calls_wait_for_a_tick_and_a_piece(replies: int, model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    with OmniEngine(model, max_sessions=9, streaming=ENDLESS) as engine:
        watch.over(engine)
        with speaking(engine, replies):
            began = len(watch.pieces)
            session, waited = watch.ticks(engine.session)
            assert len(waited) == 1 and waited[0] <= 1
            for push in (
                lambda: session.push_text("how are you?"),
                lambda: session.push_audio(noise(1600)),
                lambda: session.push_image(speckle(32, 32)),
                lambda: session.push_video_frame(speckle(32, 32), 0.0),
                lambda: session.discard_input(),
            ):
                _, waited = watch.ticks(push)
                assert not waited  # it is read later
            events, waited = watch.ticks(lambda: session.respond(**SILENT))
            assert not waited
            assert isinstance(next(events), TextDelta)
            outlet = session._outlet
            assert outlet is not None and outlet.task is not None
            assert watch.first_event[id(outlet)] - outlet.task.ended < 3
            list(events)
            session.push_text("a story")
            events = session.respond(**SPEAKING)
            next(events)
            _, waited = watch.ticks(session.interrupt)
            assert len(waited) == 1 and waited[0] <= 1
            _, waited = watch.ticks(session.fork if replies < 8 else session.interrupt)
            assert sum(waited) <= 1
            between = [after - before for before, after in zip(watch.pieces[began:], watch.pieces[began + 1 :])]
            assert max(between) <= 1
        session.close()


def test_a_long_input_holds_nobody_up_by_more_than_a_piece(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of text, 20 s of sound and a large picture at once: between two ticks there is one piece of them."""
    watch = Watch(monkeypatch)
    with OmniEngine(model, max_sessions=4, streaming=ENDLESS) as engine:
        watch.over(engine)
        with speaking(engine, 1):
            began, pieces = len(watch.pieces), engine._shared.scheduler.pieces
            long, short = engine.session(), engine.session()
            long.push_text("a long text " * 20)
            long.push_audio(noise(320000))
            long.push_image(speckle(256, 256))
            short.push_text("short")
            events = short.respond(**SILENT)
            next(events)
            task = short._outlet.task  # type: ignore[union-attr]
            assert task is not None and task.ended - task.received <= 4, (
                "its turn comes after one piece of the long one"
            )
            list(events)
            next(long.respond(**SILENT))
            assert engine._shared.scheduler.pieces - pieces > 20
            between = [after - before for before, after in zip(watch.pieces[began:], watch.pieces[began + 1 :])]
            assert max(between) == 1
        for session in (long, short):
            session.close()


def test_a_wrong_argument_raises_at_the_call(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=1, streaming=ENDLESS) as engine:
        session = engine.session()
        session.push_text("hello")
        for wrong in ({"speaker": "nobody"}, {"max_new_tokens": 0}, {"stop": 3}, {"maximum": 3}):
            with pytest.raises((ValueError, TypeError)):
                session.respond(**wrong)  # type: ignore[arg-type]
        for options in ({"speaker": "nobody"}, {"system": 3}, {"keep_media": "yes"}):
            with pytest.raises((ValueError, TypeError)):
                engine.session(**options)  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            engine.load("nowhere")
        assert list(session.respond(**SILENT))
