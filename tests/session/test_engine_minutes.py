"""Minutes of concurrent use, in which sessions are dropped, cancelled, cut and left in reference cycles.

Each reply that comes to its end is what the same session says alone; memory, threads and open files stay as they are;
nobody waits for ever. OMNI_ENGINE_MINUTES (default 10) sets how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from build import noise, speckle

from omni import AudioChunk, Item, OmniEngine, OmniModel, OmniSession, StreamingConfig, TextDelta, TurnEnd
from omni.session.engine import EngineFullError

MINUTES = float(os.environ.get("OMNI_ENGINE_MINUTES") or 10)
STREAMING = StreamingConfig(prefill_tokens=24, audio_window_s=1.0, chunk_frames=(1,), loop_frames=None, silence_s=None)
REPLY = {**build.PLAIN, "max_new_tokens": 6, "max_frames": 6, "seed": 0}
SCRIPTS = 8
STUCK_S = 120  # without a round done, a worker hangs


def tell(session: OmniSession, script: int, turn: int) -> None:
    """The user's turn of a script."""
    session.push_text(f"script {script}, turn {turn}: " + "x" * (11 * script % 30))
    if (script + turn) % 3 == 0:
        for piece in noise(6000, script).split(2000):
            session.push_audio(piece)
    if (script + turn) % 3 == 1:
        session.push_image(speckle(32, 32, seed=script))


def told(events: Any) -> tuple[list[int], torch.Tensor]:
    ids = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
    return ids, torch.cat([e.samples for e in events if isinstance(e, AudioChunk)] or [torch.zeros(0)])


class Knot:
    """A reference cycle around something."""

    def __init__(self, held: Any) -> None:
        self.me, self.held = self, held


class Storm:
    """Workers that use one engine; `wrong` lists what should not have happened."""

    def __init__(self, model: OmniModel, engine: OmniEngine) -> None:
        self.model, self.engine = model, engine
        self.until = time.monotonic() + 60 * MINUTES
        self.wrong: list[str] = []
        self.rounds: dict[str, int] = {}
        self.replies = 0
        self.moved: dict[str, float] = {}  # when a worker last finished a round
        self.alone = [list(self.script_alone(number)) for number in range(SCRIPTS)]

    def script_alone(self, script: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        session = OmniSession(self.model, streaming=STREAMING)
        for turn in range(3):
            tell(session, script, turn)
            yield told(list(session.respond(**REPLY)))

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until or bool(self.wrong)

    def check(self, events: list[Any], script: int, turn: int) -> None:
        """A reply that came to its end is the one that is given alone."""
        end = events[-1]
        if not isinstance(end, TurnEnd) or end.reason == "interrupted":
            self.wrong.append(f"a reply ended with {end}")
            return
        (ids, sound), (expected, wave) = told(events), self.alone[script][turn]
        if ids != expected or sound.shape != wave.shape or not torch.allclose(sound, wave, atol=1e-5):
            self.wrong.append(f"script {script}, turn {turn}: {ids} is not {expected}")
        self.replies += 1

    def open(self) -> Any:
        while True:
            try:
                return self.engine.session(streaming=STREAMING)
            except EngineFullError:
                time.sleep(0.01)

    def round(self, rng: random.Random) -> None:
        """One session, from its beginning to whatever end."""
        script, session = rng.randrange(SCRIPTS), self.open()
        for turn in range(rng.randint(1, 3)):
            tell(session, script, turn)
            mischief = rng.choice(["", "", "", "bad", "fork", "aside", "drop", "knot", "close", "cut", "edit", "late"])
            if mischief == "bad":
                with contextlib.suppress(ValueError, TypeError):
                    session.push_audio([float("nan")])
            with contextlib.suppress(EngineFullError):
                if mischief == "fork":
                    session = session.fork()
                if mischief == "aside":
                    list(session.respond(remember=False, **REPLY))
            if mischief == "edit":
                session.delete(session.insert(Item(role="user", parts="not this"), after="root"))
            events = session.respond(**REPLY)
            taken = [next(events) for _ in range(rng.randint(0, 4))] if mischief else []
            if mischief == "drop":
                return
            if mischief == "knot":
                Knot((session, events, taken))
                return
            if mischief == "close":
                threading.Thread(target=session.close).start()
                with contextlib.suppress(ValueError):
                    list(events)
                return
            if mischief == "cut":
                session.interrupt(played_ms=rng.choice([None, 0, 100]))
                session.push_text("and then?")
                list(session.respond(**REPLY))
                return
            self.check([*taken, *events], script, turn)
        if rng.random() < 0.5:
            session.close()

    async def round_async(self, rng: random.Random) -> None:
        """The same from asyncio, now and then cancelled."""
        script = rng.randrange(SCRIPTS)
        try:
            session = self.engine.session(streaming=STREAMING)
        except EngineFullError:
            await asyncio.sleep(0.01)
            return

        async def converse() -> None:
            for turn in range(2):
                await asyncio.to_thread(tell, session, script, turn)
                self.check([event async for event in session.respond_async(**REPLY)], script, turn)

        task = asyncio.ensure_future(converse())
        if rng.random() < 0.4:
            await asyncio.sleep(rng.random() * 0.3)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(session.close)

    def work(self, name: str) -> None:
        """A worker; a cut may end it anywhere, and another takes its place."""
        rng = random.Random(f"{name} {self.rounds.get(name, 0)}")
        try:
            while not self.over:
                self.round(rng)
                self.rounds[name] = self.rounds.get(name, 0) + 1
                self.moved[name] = time.monotonic()
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")

    def work_async(self, name: str) -> None:
        async def loop(number: int) -> None:
            rng = random.Random(f"{name} {number}")
            while not self.over:
                await self.round_async(rng)
                self.rounds[name] = self.rounds.get(name, 0) + 1
                self.moved[name] = time.monotonic()

        async def loops() -> None:
            await asyncio.gather(*(loop(number) for number in range(3)))

        try:
            asyncio.run(loops())
        except BaseException as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")


def held() -> tuple[float, int, int]:
    """Resident memory in MiB, threads, open files of this process."""
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    return resident, threading.active_count(), len(os.listdir("/proc/self/fd"))


def start(storm: Storm, name: str) -> threading.Thread:
    work = storm.work_async if name.startswith("async") else storm.work
    thread = threading.Thread(target=work, args=(name,), name=name, daemon=True)
    storm.moved[name] = time.monotonic()
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_minutes_of_use_in_which_everything_is_cut_somewhere(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    before, thresholds = threading.active_count(), gc.get_threshold()
    gc.set_threshold(200)  # collected everywhere, in the engine's thread too
    printed: list[str] = []  # of what destructors raise
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: printed.append(repr(raised.object)))
    rng, first = random.Random(0), None
    try:
        with OmniEngine(model, max_sessions=4, max_parked=6, streaming=STREAMING) as engine:
            storm = Storm(model, engine)
            names = [f"worker {number}" for number in range(5)] + ["async"]
            threads = {name: start(storm, name) for name in names}
            settled = time.monotonic() + 60 * MINUTES / 3
            while not storm.over:
                time.sleep(rng.random() * 0.2)
                name = rng.choice(names)
                if not threads[name].is_alive() and not storm.over:
                    threads[name] = start(storm, name)
                elif not name.startswith("async") and rng.random() < 0.3:  # Ctrl-C, as if it were the main thread
                    ident = ctypes.c_ulong(threads[name].ident or 0)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
                stuck = [n for n, then in storm.moved.items() if time.monotonic() - then > STUCK_S]
                if stuck and all(threads[n].is_alive() for n in stuck):
                    faulthandler.dump_traceback(all_threads=True)
                    storm.wrong.append(f"{stuck} hang")
                if first is None and time.monotonic() > settled:
                    gc.collect()
                    first = held()
            for name, thread in threads.items():
                thread.join(STUCK_S)
                assert not thread.is_alive(), f"{name} hangs"
            assert not storm.wrong, storm.wrong
            last = held()
            del threads, thread
            for _ in range(500):
                gc.collect()
                if not engine._shared.places.all:
                    break
                time.sleep(0.02)
            assert not engine._shared.places.all, "a place was lost"
            said = list(storm.open().respond(**REPLY))
            assert isinstance(said[-1], TurnEnd)
    finally:
        gc.set_threshold(*thresholds)
    with capfd.disabled():
        print(
            f"\n{storm.replies} replies, {sum(storm.rounds.values())} rounds, {engine.ticks} ticks; {first} -> {last}"
        )
    assert storm.replies > 20 * MINUTES and first is not None
    assert last[0] - first[0] < 40, "memory grows"
    assert last[1] <= first[1] + 6 and last[2] <= first[2] + 3
    assert threading.active_count() <= before + 1
    assert not [what for what in printed if "omni" in what or "ReplyEvents" in what or "Seat" in what]
