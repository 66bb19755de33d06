"""Long and full sessions: nothing of what is over is kept, a push does not get dearer, and full is no dead end."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import build
import pytest
from build import noise, speckle
from test_items import assert_same_answer
from test_session_faults import Broken, cramped, fault

from omni import Item, OmniModel, OmniSession, StreamingConfig, TurnEnd
from omni.generation.rows import Rows
from omni.generation.runner import Runner
from omni.session import entries

PLAIN = {**build.PLAIN, "max_new_tokens": 4, "max_frames": 3, "seed": 0}
SILENT = {**PLAIN, "return_audio": False}
QUICK = StreamingConfig(audio_window_s=1.0, prefill_tokens=16)


def test_earlier_replies_are_not_kept(model: OmniModel) -> None:
    session, turns = OmniSession(model), []
    for text in ("one", "two", "three"):
        session.push_text(text)
        list(session.respond(**PLAIN))
        assert session._reply is not None
        turns.append(weakref.ref(session._reply.turn))
    gc.collect()
    assert [turn() is not None for turn in turns] == [False, False, True]


def test_a_push_does_not_count_all_that_was_pushed(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session, calls = OmniSession(model, streaming=StreamingConfig(audio_window_s=1.0)), []
    after = entries.after
    monkeypatch.setattr(entries, "after", lambda *args: (calls.append(1), after(*args))[1])
    counts = []
    for _ in range(12):
        session.push_audio(noise(16000))
        counts.append(len(calls))
        calls.clear()
    assert counts[-1] == counts[4] > 0


@pytest.mark.filterwarnings("ignore:the (prompt|reply)")
@pytest.mark.parametrize("allow_long", [True, False])
def test_a_session_beyond_its_positions_can_be_saved(model: OmniModel, tmp_path: Path, allow_long: bool) -> None:
    small = cramped(model, 100)
    session = OmniSession(small)
    session.push_text("q " * 20)
    events = session.respond(**{**SILENT, "max_new_tokens": 80, "min_new_tokens": 80}, allow_long=allow_long)
    next(events)
    session.push_text("w " * 14)
    list(events)
    with pytest.raises(ValueError, match="is full"):
        session.respond(**SILENT)
    session.save(tmp_path / "kept")
    loaded = OmniSession.load(tmp_path / "kept", small)
    assert loaded.ids == session.ids and len(loaded.ids) > 100
    for one in (session, loaded):
        one.drop_oldest_turns()
    assert_same_answer(session, loaded, return_audio=False)


def test_a_full_session_can_be_made_shorter(model: OmniModel) -> None:
    session = OmniSession(cramped(model, 300))
    session.push_text("q " * 20)
    list(session.respond(**PLAIN))
    session.push_text("long text " * 60)
    assert session.interrupt(0).token_ids == []
    first = session.items[0].id
    with pytest.raises(ValueError, match="is full"):
        session.insert(Item(parts="more"))
    session.replace(first, Item(parts="q"))
    session.delete(first)


def test_room_is_made_without_media_that_were_not_kept(model: OmniModel) -> None:
    session = OmniSession(cramped(model, 300), streaming=QUICK, make_room=0.3, keep_media=False)
    for number in range(12):
        session.push_image(speckle(96, 96, seed=number))
        session.push_text("a picture")
        list(session.respond(**SILENT))
    assert 0 < len(session.ids) <= 300


def test_room_is_not_made_by_dropping_the_reply_that_is_given(model: OmniModel) -> None:
    session = OmniSession(cramped(model, 200), streaming=QUICK, make_room=0.9)
    session.push_text("a question")
    events = session.respond(**PLAIN)
    next(events)
    before = session.items
    with pytest.raises(ValueError, match="is full"):
        for number in range(9):
            session.push_image(speckle(192, 192, seed=number))
    assert [item.id for item in session.items[:2]] == [item.id for item in before]
    list(events)
    assert session.items[1].text


def test_a_reply_that_fails_leaves_a_turn_open_whose_media_were_not_kept(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK, keep_media=False)
    session.push_audio(noise(40000))
    before = [(item.id, item.status) for item in session.items]
    with fault(Runner, "frame", 2), pytest.raises(Broken):
        list(session.respond(**PLAIN))
    assert [(item.id, item.status) for item in session.items] == before
    session.push_audio(noise(9000))
    assert list(session.respond(**PLAIN))


def test_an_interruption_that_fails_after_the_reply_leaves_its_events(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK)
    session.push_text("hi")
    events = session.respond(**{**PLAIN, "max_new_tokens": 20, "max_frames": 40})
    while not session._reply.recorded:  # type: ignore[union-attr]
        next(events)
    before = [(item.id, item.status, item.text) for item in session.items]
    with fault(Rows, "prefill_thinker", error=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        session.interrupt(20)
    assert [(item.id, item.status, item.text) for item in session.items] == before
    end = list(events)[-1]
    assert isinstance(end, TurnEnd) and end.reason != "interrupted"


@pytest.mark.parametrize("part", ["frame", "draw_token", "read_token"])
def test_a_reply_after_one_that_failed_begins_anew(model: OmniModel, part: str) -> None:
    """Its prompt was read to the end already."""
    session, twin = OmniSession(model), OmniSession(model)
    with fault(Runner, part, 3), pytest.raises(Broken):
        list(session.respond(**PLAIN))
    assert_same_answer(session, twin)
