"""What is refused of the items of a session; it changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from build import speckle
from test_items import PLAIN, QUICK, answer, asked, assert_same_answer, roles, said

from omni import Item, OmniModel, OmniSession

ITEMS: dict[str, tuple[Callable[[OmniSession], Any], type[Exception], str]] = {
    "no item": (lambda s: s.delete("item_9"), ValueError, "no item 'item_9'; the last ones are"),
    "no place": (lambda s: s.insert(Item(parts="x"), after="nowhere"), ValueError, "no item 'nowhere'"),
    "no Item": (lambda s: s.insert({"role": "user"}), TypeError, "must be an Item, got dict"),
    "no list": (lambda s: s.become(Item(parts="x")), TypeError, "list of Item"),
    "a list of dicts": (lambda s: s.become([{"role": "user"}]), TypeError, "must be an Item"),
    "an id twice": (lambda s: s.insert(Item(id=s.items[0].id, parts="x")), ValueError, "two items have the id"),
    "a role": (lambda s: s.insert(Item(role="usr", parts="x")), ValueError, "unknown role 'usr'"),
    "a status": (lambda s: s.insert(Item(parts="x", status="done")), ValueError, "unknown status 'done'"),
    "an id": (lambda s: s.insert(Item(id="root", parts="x")), ValueError, "an item's id must be"),
    "a part": (lambda s: s.insert(Item(parts=[3])), TypeError, "a part of an item must be"),
    "parts": (lambda s: s.insert(Item(parts=3)), TypeError, "parts must be"),
    "a kind of part": (lambda s: s.insert(Item(parts={"type": "smell"})), ValueError, "unknown type 'smell'"),
    "a file": (lambda s: s.insert(Item(parts={"image": "nowhere.png"})), FileNotFoundError, "nowhere.png"),
    "a picture of a reply": (
        lambda s: s.insert(Item(role="assistant", parts={"image": speckle(32, 32)})),
        ValueError,
        "texts and tool calls only",
    ),
    "a cut of a question": (lambda s: s.truncate(s.items[0].id, 5), ValueError, "only a reply"),
    "a time": (lambda s: s.truncate(s.items[1].id, -1), ValueError, "played_ms"),
    "a result": (lambda s: s.push_tool_result("call_1", "x"), ValueError, "no tool call 'call_1'.*no call waits"),
    "no text as result": (lambda s: s.push_tool_result("call_1", 5), TypeError, "output of a tool_result"),
    "a system": (lambda s: s.configure(system=5), TypeError, "system must be a text"),
    "tools": (lambda s: s.configure(tools="look"), TypeError, "tools must be a list"),
    "remember": (lambda s: s.respond(remember=1), TypeError, "remember must be True or False"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_what_is_refused_changes_nothing(model: OmniModel, name: str) -> None:
    edit, error, words = ITEMS[name]
    session = said(model, "one", "two")
    before, ids = [(item.id, item.parts, item.status) for item in session.items], session.ids
    with pytest.raises(error, match=words):
        edit(session)
    assert [(item.id, item.parts, item.status) for item in session.items] == before and session.ids == ids
    assert_same_answer(session, said(model, "one", "two"))


@pytest.mark.parametrize("share", [0, 1, "x", True])
def test_a_share_that_is_none(model: OmniModel, share: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="make_room"):
        OmniSession(model, make_room=share)


def test_a_system_item_with_media(model: OmniModel) -> None:
    session = asked(model, "one")
    item = Item(role="system", parts=["s", {"type": "image", "image": speckle(32, 32)}])
    with pytest.raises(ValueError, match="holds text alone"):
        session.insert(item, after="root")
    session.insert(item)
    with pytest.raises(ValueError, match="holds text alone"):
        session.become([session.items[-1]])
    assert roles(session) == ["user", "assistant", "system"]


def test_the_reply_that_is_being_given_stays(model: OmniModel) -> None:
    session = said(model, "one", "two")
    events = session.respond(**PLAIN)
    next(events)
    reply = session.items[-1]
    for edit in (
        lambda: session.delete(reply.id),
        lambda: session.replace(reply.id, Item(role="assistant", parts="x")),
        lambda: session.become(session.items[:2]),
    ):
        with pytest.raises(ValueError, match="being given; interrupt it first"):
            edit()
    session.delete(session.items[0].id)  # what was said before may change meanwhile
    session.push_text("three")
    list(events)
    assert roles(session) == ["assistant", "user", "assistant", "user"]
    fresh = OmniSession(model, streaming=QUICK)
    fresh.become(session.items[:3])
    fresh.push_text("three")
    assert_same_answer(session, fresh)


@pytest.mark.parametrize("options", [{"keep_media": False}, {"media_bytes": 0}], ids=["none", "no bytes"])
def test_media_that_were_not_kept_are_not_read_again(model: OmniModel, options: dict[str, Any]) -> None:
    session = OmniSession(model, streaming=QUICK, **options)
    session.push_text("zero")
    answer(session)
    session.push_image(speckle(40, 40))
    answer(session)
    session.push_text("two")
    answer(session)
    before, ids = session.items, session.ids
    assert not before[2].parts[0]["image"].kept
    edits: list[Callable[[], Any]] = [
        lambda: session.delete(before[0].id),
        lambda: session.replace(before[0].id, Item(role="user", parts="x")),
        lambda: session.insert(Item(role="user", parts="x"), after="root"),
        lambda: session.become([before[2]]),
        lambda: session.configure(system="x"),
        lambda: OmniSession(model).insert(dataclasses.replace(before[2], id=None)),
    ]
    for edit in edits:
        with pytest.raises(ValueError, match="not kept"):
            edit()
        assert session.ids == ids and [item.id for item in session.items] == [item.id for item in before]
    session.delete(before[4].id)  # behind them all can change
    session.truncate(before[3].id, 0)
    answer(session)
