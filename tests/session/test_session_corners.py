"""Corners of a session: left at any event, full, cut twice, odd clocks and layouts."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import build
import numpy as np
import pytest
import torch

from omni import (
    AudioChunk,
    Item,
    OmniConfig,
    OmniEngine,
    OmniInputs,
    OmniModel,
    OmniSession,
    StreamingConfig,
    TurnEnd,
)

PLAIN = {**build.PLAIN, "max_new_tokens": 5, "max_frames": 4}


@pytest.fixture(scope="module")
def cramped(model: OmniModel) -> OmniModel:
    """The same model with few positions, which fill up quickly."""
    values = model.config.to_dict()
    values["thinker_config"]["text_config"]["max_position_embeddings"] = 1024
    small = OmniModel(OmniConfig.from_dict(values))
    small.load_state_dict(model.state_dict())
    small.processor = model.processor
    return small


def ids_of(events: list[Any]) -> list[int]:
    return [i for e in events for i in getattr(e, "token_ids", ())]


def check_fresh(model: OmniModel, session: OmniSession, events: list[Any]) -> None:
    prompt = session.ids[: events[-1].usage["prompt_tokens"]]
    fresh = model.generate(OmniInputs(input_ids=torch.tensor([prompt])), **PLAIN)
    assert ids_of(events) == fresh.replies[0] and events[-1].usage["frames"] == fresh.codes[0].shape[1]


@pytest.mark.parametrize("how", ["interrupt", "close", "forget"])
def test_a_reply_may_be_left_at_every_event(model: OmniModel, how: str) -> None:
    def asked() -> tuple[OmniSession, Any]:
        session = OmniSession(model, streaming=StreamingConfig(chunk_frames=(1,)))
        session.push_text("hello")
        return session, session.respond(**PLAIN)

    total = len(list(asked()[1]))
    for taken in range(total):
        session, events = asked()
        got = [next(events) for _ in range(taken)]
        with pytest.raises(ValueError, match="responding"):
            session.respond()
        with pytest.raises(ValueError, match="responding"):
            session.save("nowhere")
        if how == "interrupt":
            session.interrupt()
            assert [type(e) for e in events] == [TurnEnd] and next(events, None) is None
        elif how == "close":
            events.close()
        else:
            del events
        assert not session.responding and not isinstance((got or [None])[-1], TurnEnd)
        session.push_text("next")
        check_fresh(model, session, list(session.respond(**PLAIN)))


def test_what_was_not_handed_out_does_not_count_as_heard(model: OmniModel) -> None:
    for made in (lambda _: OmniSession(model), lambda engine: engine.session()):
        with OmniEngine(model, max_sessions=1) as engine:
            session = made(engine)
            session.push_text("hello")
            events = session.respond(**{**PLAIN, "max_new_tokens": 30, "return_audio": False})
            first = next(events)
            assert session.interrupt().token_ids == list(first.token_ids)
            session.push_text("hello")
            events = session.respond(**{**PLAIN, "max_frames": 20})
            next(events)
            assert session.interrupt().token_ids == []  # no sound was handed out
            assert [e.reason for e in events] == ["interrupted"]


def test_all_that_was_played_of_a_reply_counts(model: OmniModel) -> None:
    session = OmniSession(model, streaming=StreamingConfig(chunk_frames=(1,)))
    session.push_text("hello")
    events = list(session.respond(**{**PLAIN, "max_new_tokens": 8, "max_frames": 8}))
    reply, drawn = ids_of(events), events[-1].usage["frames"]
    assert session.interrupt(played_ms=80 * drawn).token_ids == reply
    session.push_text("x")
    list(session.respond(**PLAIN))
    for wrong in (-1, float("inf"), float("nan"), "80"):
        with pytest.raises(ValueError, match="played_ms"):
            session.interrupt(played_ms=wrong)


def test_frames_with_the_time_of_day(model: OmniModel) -> None:
    session = OmniSession(model)
    for i in range(4):
        session.push_video_frame(np.zeros((32, 32, 3), np.uint8), np.float64(1.7e9 + 0.5 * i))
    with pytest.raises(ValueError, match="must grow"):
        session.push_video_frame(np.zeros((32, 32, 3), np.uint8), 1.7e9)
    assert ids_of(list(session.respond(**PLAIN)))


def test_a_reply_cut_twice_and_then_read_again(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("one")
    list(session.respond(**PLAIN))
    session.push_text("two")
    list(session.respond(**PLAIN))
    kept = session.interrupt(played_ms=80).token_ids
    session.drop_oldest_turns()
    assert session.ids[-2 - len(kept) :] == [*kept, 258, 10]
    assert session.ids.count(277) == 1
    session.push_text("three")
    check_fresh(model, session, list(session.respond(**PLAIN)))


def test_a_full_session_keeps_what_was_pushed(cramped: OmniModel) -> None:
    session = OmniSession(cramped)
    limit = cramped.config.thinker_config.text_config.max_position_embeddings
    word = len(cramped.processor.encode_text("kkkkkkkk"))
    session.push_text("kkkkkkkk" * ((limit - 100) // word))
    list(session.respond(**{**PLAIN, "return_audio": False}))
    session.push_text("the question that does not fit " * 10)
    before = session.ids
    with pytest.raises(ValueError, match="session is full"):
        session.respond(**{**PLAIN, "return_audio": False})
    assert session.ids == before
    session.drop_oldest_turns()
    events = list(session.respond(**PLAIN))
    assert "the question that does not fit" in cramped.processor.decode(session.ids)
    check_fresh(cramped, session, events)


def test_a_video_whose_sound_never_came(model: OmniModel) -> None:
    session = OmniSession(model, use_audio_in_video=True)
    for i in range(4):
        session.push_video_frame(np.full((32, 32, 3), 40 * i, np.uint8), 0.5 * i)
    events = list(session.respond(**PLAIN))
    video = model.processor(
        [{"role": "user", "content": [{"video": [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(4)], "fps": 2}]}]
    )
    prompt = session.ids[: events[-1].usage["prompt_tokens"]]
    inputs = OmniInputs(
        input_ids=torch.tensor([prompt]),
        pixel_values_videos=video.pixel_values_videos,
        video_grid_thw=video.video_grid_thw,
        video_grid_times=video.video_grid_times,
    )
    assert model.generate(inputs, **PLAIN).replies[0] == ids_of(events)


def test_layouts_of_stereo_and_kinds_of_numbers(model: OmniModel) -> None:
    sound = 0.1 * np.random.default_rng(0).standard_normal((8000, 2)).astype(np.float32)
    replies = []
    for samples, rate in ((sound, 16000), (sound.T, np.int64(16000)), (sound.mean(1), 16000.0)):
        session = OmniSession(model)
        session.push_audio(samples, rate)
        replies.append(ids_of(list(session.respond(**PLAIN))))
    assert replies[0] == replies[1] == replies[2]


def test_leaving_an_asynchronous_loop(model: OmniModel) -> None:
    async def listen() -> None:
        for make in (lambda _: OmniSession(model), lambda engine: engine.session()):
            with OmniEngine(model, max_sessions=1) as engine:
                session = make(engine)
                session.push_text("hello")
                events = session.respond_async(**{**PLAIN, "max_new_tokens": 30, "max_frames": 30})
                async for event in events:
                    if isinstance(event, AudioChunk):
                        break
                await events.aclose()
                assert not session.responding
                session.push_text("next")
                assert [event async for event in session.respond_async(**PLAIN)]

    asyncio.run(asyncio.wait_for(listen(), 60))


def test_a_session_closed_while_it_reads_writes_nothing_more(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with OmniEngine(model, max_sessions=1, streaming=StreamingConfig(prefill_tokens=4)) as engine:
        session = engine.session()
        read, pieces, closers = engine.rows.prefill_thinker, [], []

        def close_after_two(*arguments: Any) -> Any:
            pieces.append(1)
            if len(pieces) == 2:
                closers.append(threading.Thread(target=session.close))
                closers[0].start()
                while not session.closed:
                    time.sleep(0.001)
            return read(*arguments)

        monkeypatch.setattr(engine.rows, "prefill_thinker", close_after_two)
        session.push_text("a text of several pieces that is never read to its end")
        events = session.respond(**PLAIN)
        assert [event.reason for event in events if isinstance(event, TurnEnd)] == ["interrupted"]
        closers[0].join(10)
        assert 2 <= len(pieces) <= 3 and engine.rows.text.decoder.cache.lengths == [0]
        with pytest.raises(ValueError, match="closed"):
            session.push_text("x")
        engine.session().push_text("the next owner")


def test_turns_survive_saving(model: OmniModel, tmp_path: Any) -> None:
    session = OmniSession(model)
    for text in ("one", "two"):
        session.push_text(text)
        list(session.respond(**PLAIN))
    session.save(tmp_path)
    loaded = OmniSession.load(tmp_path, model)
    assert loaded.drop_oldest_turns() == session.drop_oldest_turns() and loaded.ids == session.ids


def test_a_reply_that_fills_the_session_to_its_last_position(cramped: OmniModel) -> None:
    session = OmniSession(cramped)
    limit = cramped.config.thinker_config.text_config.max_position_embeddings
    session.push_text("one")
    list(session.respond(**PLAIN))
    session.push_text("k" * 50)
    list(session.respond(**{**PLAIN, "return_audio": False}))
    room = limit - len(session.ids) - 20
    session.insert(Item(role="assistant", parts="K" * (room - 5)))  # with its header and end, as a long history would
    session.push_text("two")
    end = list(session.respond(max_new_tokens=1024, return_audio=False))[-1]
    assert end.reason == "max_new_tokens"
    before = session.ids
    with pytest.raises(ValueError, match="session is full"):
        session.push_text("three")
    assert session.ids == before
    freed = session.drop_oldest_turns()
    assert freed > 0 and len(session.ids) == len(before) - freed and session.ids[-20:] == before[-20:]
    session.push_text("four")
    assert len(session.ids) <= limit
