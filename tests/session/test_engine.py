"""The engine: sessions that share batched steps say what they would say alone."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from build import noise

from omni import (
    AudioChunk,
    OmniEngine,
    OmniModel,
    OmniSession,
    SamplingConfig,
    TextDelta,
    TurnEnd,
)
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.session.engine import MAX_WAITING_EVENTS, EngineFullError, EngineSession

ROOT = Path(__file__).parents[2]
PLAIN = {**build.PLAIN, "max_new_tokens": 6, "max_frames": 8}


def outcome(events: list[Any]) -> tuple[list[int], torch.Tensor, str]:
    assert isinstance(events[-1], TurnEnd) and all(e.row == 0 for e in events)
    chunks = [e.samples for e in events if isinstance(e, AudioChunk)]
    ids = [i for e in events if isinstance(e, TextDelta) for i in e.token_ids]
    return ids, torch.cat(chunks) if chunks else torch.zeros(0), events[-1].reason


def assert_same(got: tuple[list[int], torch.Tensor, str], alone: tuple[list[int], torch.Tensor, str]) -> None:
    assert got[0] == alone[0] and got[2] == alone[2]
    torch.testing.assert_close(got[1], alone[1], atol=1e-5, rtol=1e-5)


def talk(session: OmniSession, seed: int) -> list[tuple[list[int], torch.Tensor, str]]:
    """Two turns of text and sound that depend on `seed`."""
    rng = random.Random(seed)
    done = []
    for turn in range(2):
        session.push_text(f"question {seed} " + "x" * rng.randint(0, 30))
        if rng.random() < 0.5:
            wave = noise(rng.randint(2000, 20000), seed)
            for piece in wave.split(3000):
                session.push_audio(piece)
        arguments = {**PLAIN, "max_new_tokens": rng.randint(1, 8), "max_frames": rng.randint(0, 9)}
        if rng.random() < 0.5:
            arguments["text_sampling"], arguments["seed"] = SamplingConfig(1.2, 20), 100 * seed + turn
        done.append(outcome(list(session.respond(**arguments))))
    return done


def test_eight_threads_say_what_they_would_say_alone(model: OmniModel) -> None:
    speakers = ["ethan", "aiden", "chelsie"]
    alone = [talk(OmniSession(model, speaker=speakers[i % 3]), i) for i in range(8)]
    results: dict[int, Any] = {}
    with OmniEngine(model, max_sessions=8) as engine:

        def run(i: int) -> None:
            results[i] = talk(engine.session(speaker=speakers[i % 3]), i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        for got, expected in zip(results[i], alone[i]):
            assert_same(got, expected)


def test_asyncio_sessions_side_by_side(model: OmniModel) -> None:
    async def one(engine: OmniEngine, i: int) -> Any:
        session = engine.session()
        session.push_text(f"hello {i}")
        return outcome([event async for event in session.respond_async(**PLAIN)])

    async def all_of_them() -> list[Any]:
        with OmniEngine(model, max_sessions=4) as engine:
            return await asyncio.gather(*(one(engine, i) for i in range(4)))

    for i, got in enumerate(asyncio.run(all_of_them())):
        session = OmniSession(model)
        session.push_text(f"hello {i}")
        assert_same(got, outcome(list(session.respond(**PLAIN))))


def test_no_thread_waits_for_the_events_of_an_asyncio_session(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While four replies are silent for a while, the one worker of the loop's executor is free."""
    go, tick = threading.Event(), Rows.tick

    def held(rows: Rows) -> Any:
        go.wait(20)
        return tick(rows)

    async def all_of_them() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        with OmniEngine(model, max_sessions=4) as engine:
            sessions = [engine.session() for _ in range(4)]

            async def one(session: EngineSession) -> Any:
                return outcome([event async for event in session.respond_async(**PLAIN)])

            monkeypatch.setattr(Rows, "tick", held)
            tasks = [asyncio.ensure_future(one(session)) for session in sessions]
            while not all(session.responding for session in sessions):
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 3), 20) == 3
            go.set()
            return await asyncio.gather(*tasks)

    assert all(got[0] for got in asyncio.run(all_of_them()))


def test_interrupt_and_next_turn_in_the_engine(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=2) as engine:
        noisy = engine.session()
        noisy.push_text("another conversation, at the same time")
        others = noisy.respond(**{**PLAIN, "max_new_tokens": 40, "max_frames": 40})
        session = engine.session()
        session.push_text("a story")
        events = session.respond(**{**PLAIN, "max_new_tokens": 30, "max_frames": 30})
        for event in events:
            if isinstance(event, AudioChunk):
                break
        kept = session.interrupt(played_ms=80)
        assert [e.reason for e in events if isinstance(e, TurnEnd)] == ["interrupted"]
        alone = OmniSession(model)
        alone.push_text("a story")
        list(alone.respond(**{**PLAIN, "max_new_tokens": max(1, len(kept.token_ids)), "return_audio": False}))
        alone._conversation.pending = []
        assert session.ids[-2 - len(kept.token_ids) :] == [*kept.token_ids, 258, 10]
        session.push_text("stop")
        assert outcome(list(session.respond(**PLAIN)))[0]
        assert outcome(list(others))[0]


def test_a_full_engine_refuses_and_a_closed_session_makes_room(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=2) as engine:
        first, second = engine.session(), engine.session()
        with pytest.raises(EngineFullError, match="all 2 sessions"):
            engine.session()
        with pytest.raises(EngineFullError):
            first.fork()
        first.push_text("remembered by nobody")
        first.close()
        with pytest.raises(ValueError, match="closed"):
            first.push_text("x")
        fresh = engine.session()
        fresh.push_text("hello")
        alone = OmniSession(model)
        alone.push_text("hello")
        assert_same(outcome(list(fresh.respond(**PLAIN))), outcome(list(alone.respond(**PLAIN))))
        second.close()
    with pytest.raises(ValueError, match="closed"):
        engine.session()


def test_a_reader_that_does_not_read_pauses_its_turn_alone(model: OmniModel) -> None:
    streaming = StreamingConfig(chunk_frames=(1,), loop_frames=None, silence_s=None)
    long = {**PLAIN, "max_new_tokens": 200, "max_frames": 200}
    with OmniEngine(model, max_sessions=2, streaming=streaming) as engine:
        slow, quick = engine.session(), engine.session()
        slow.push_text("slow")
        events = slow.respond(**long)
        quick.push_text("quick")
        assert outcome(list(quick.respond(**PLAIN)))[0]
        for _ in range(200):
            if slow._turn.paused or slow._turn.over:
                break
            threading.Event().wait(0.02)
        assert slow._turn.paused and slow._outlet.waiting < MAX_WAITING_EVENTS + 10
        got = outcome(list(events))
    alone = OmniSession(model, streaming=streaming)
    alone.push_text("slow")
    assert_same(got, outcome(list(alone.respond(**long))))


def test_fork_inside_the_engine(model: OmniModel) -> None:
    with OmniEngine(model, max_sessions=3) as engine:
        session = engine.session()
        session.push_text("one")
        list(session.respond(**PLAIN))
        other = session.fork()
        session.push_text("left")
        other.push_text("right")
        left, right = outcome(list(session.respond(**PLAIN))), outcome(list(other.respond(**PLAIN)))
    for text, got in (("left", left), ("right", right)):
        alone = OmniSession(model)
        alone.push_text("one")
        list(alone.respond(**PLAIN))
        alone.push_text(text)
        assert_same(got, outcome(list(alone.respond(**PLAIN))))


def test_sixteen_sessions_with_cancels_and_bad_input_never_mix(model: OmniModel) -> None:
    """Every turn that runs to its end equals the same turn alone; what fails, fails alone."""
    results: dict[int, list[Any]] = {}
    errors: list[BaseException] = []

    def run(i: int, engine: OmniEngine) -> None:
        rng = random.Random(1000 + i)
        try:
            session = engine.session(speaker=["ethan", "aiden"][i % 2])
            for turn in range(3):
                session.push_text(f"session {i} turn {turn}")
                action = rng.choice(["finish", "cancel", "bad"])
                if action == "bad":
                    with pytest.raises((ValueError, TypeError, OSError)):
                        rng.choice(
                            [lambda: session.push_image("none.png"), lambda: session.push_audio([float("nan")])]
                        )()
                events = session.respond(**PLAIN)
                if action == "cancel":
                    for _ in range(rng.randint(0, 4)):
                        next(events)
                    session.interrupt()
                    events.close()
                    prompt: Any = None
                else:
                    got = outcome(list(events))
                    prompt = session.ids
                    results.setdefault(i, []).append((prompt, got))
            session.close()
        except BaseException as error:
            errors.append(error)

    with OmniEngine(model, max_sessions=16) as engine:
        threads = [threading.Thread(target=run, args=(i, engine)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors
    from omni import OmniInputs

    checked = 0
    for i, turns in results.items():
        for ids, (reply, audio, _) in turns[:1]:
            n = len(ids) - len(reply) - (1 if reply[-1] == 258 else 2)
            inputs = OmniInputs(input_ids=torch.tensor([ids[:n]]))
            fresh = model.generate(inputs, speaker=["ethan", "aiden"][i % 2], **PLAIN)
            assert fresh.replies[0] == reply
            torch.testing.assert_close(fresh.audio[0], audio, atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked >= 8


def test_options_are_checked(model: OmniModel) -> None:
    with pytest.raises(ValueError, match="max_sessions"):
        OmniEngine(model, max_sessions=0)
    with OmniEngine(model, max_sessions=1) as engine:
        with pytest.raises(TypeError, match="voice"):
            engine.session(voice="ethan")
        engine.session()
