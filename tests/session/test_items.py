"""The items of a session: what they show, and every edit of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import build
import pytest
import torch
from build import noise, speckle

from omni import AudioChunk, Item, OmniModel, OmniSession, StreamingConfig, TurnEnd
from omni.session.items import KeptMedia

PLAIN = {**build.PLAIN, "max_new_tokens": 5, "max_frames": 4, "seed": 0}
SILENT = {**PLAIN, "return_audio": False}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
QUICK = StreamingConfig(audio_window_s=1.0, prefill_tokens=16)


def answer(session: OmniSession, **changes: Any) -> tuple[list[int], torch.Tensor]:
    events = list(session.respond(**{**PLAIN, **changes}))
    sound = [event.samples for event in events if isinstance(event, AudioChunk)]
    return [i for event in events for i in getattr(event, "token_ids", ())], torch.cat([torch.zeros(0), *sound])


def assert_same_answer(one: OmniSession, other: OmniSession, **changes: Any) -> None:
    (ids, sound), (other_ids, other_sound) = answer(one, **changes), answer(other, **changes)
    assert ids == other_ids and one.ids == other.ids
    torch.testing.assert_close(sound, other_sound, atol=1e-4, rtol=0)


def asked(model: OmniModel, *questions: str, **options: Any) -> OmniSession:
    session = OmniSession(model, streaming=QUICK, **options)
    for text in questions:
        session.push_text(text)
        answer(session)
    return session


def roles(session: OmniSession) -> list[str]:
    return [item.role for item in session.items]


def test_items_show_what_was_said(model: OmniModel) -> None:
    session = OmniSession(model, system="be brief", streaming=QUICK)
    session.push_text("what is ")
    session.push_text("this?")
    session.push_image(speckle(40, 40))
    session.push_audio(noise(9000))
    (system, user) = session.items
    assert (system.role, system.text, system.status) == ("system", "be brief", "completed")
    assert (user.role, user.text, user.status) == ("user", "what is this?", "in_progress")
    assert [part["type"] for part in user.parts] == ["text", "image", "audio"]
    events = session.respond(**PLAIN)
    reply = session.items[-1]
    assert (reply.role, reply.status) == ("assistant", "in_progress")
    text = next(event.text for event in events if isinstance(event, TurnEnd))
    done = session.items[-1]
    assert (done.id, done.text, done.status) == (reply.id, text, "incomplete")  # it ran into max_new_tokens
    assert session.items[1].id == user.id and session.items[1].status == "completed"
    image = session.items[1].parts[1]["image"]
    assert isinstance(image, KeptMedia) and image.kept and image.tokens == 6 and "image" in repr(image)
    session.push_text("next")
    assert roles(session) == ["system", "user", "assistant", "user"]
    assert len({item.id for item in session.items}) == 4


def test_a_session_becomes_the_items_of_another(model: OmniModel) -> None:
    one = asked(model, "one")
    one.push_audio(noise(20000))
    one.push_image(speckle(40, 40))
    answer(one)
    other = OmniSession(model, streaming=QUICK)
    other.become(one.items)
    assert other.ids == one.ids and roles(other) == roles(one)
    for session in (one, other):
        session.push_text("and now?")
    assert_same_answer(one, other)


def test_items_are_written_as_they_are_pushed(model: OmniModel) -> None:
    """Text, sound, a picture and a video of an item become the same ids and embeddings as pushed ones."""
    pushed, written = (OmniSession(model, streaming=QUICK) for _ in range(2))
    frames = [speckle(32, 32, seed=i) for i in range(4)]
    pushed.push_text("look")
    pushed.push_audio(noise(20000))
    pushed.push_image(speckle(40, 40))
    for i, frame in enumerate(frames):
        pushed.push_video_frame(frame, i / 2)
    pushed.push_text("what?")
    written.insert(
        Item(
            role="user",
            parts=[
                "look",
                {"type": "audio", "audio": noise(20000).numpy()},
                {"type": "image", "image": speckle(40, 40)},
                {"type": "video", "video": frames, "fps": 2},
                {"text": "what?"},
            ],
        )
    )
    (ids, sound), (others, other_sound) = answer(pushed), answer(written)
    assert pushed.ids == written.ids and ids == others
    torch.testing.assert_close(sound, other_sound, atol=1e-4, rtol=0)


def test_edits_equal_a_session_that_was_told_so(model: OmniModel) -> None:
    session = asked(model, "one", "two", "three")
    items = session.items
    session.replace(items[2].id, Item(role="user", parts="zwei"))
    session.delete(items[4].id)
    session.insert(Item(role="user", parts="between"), after=items[1].id)
    session.insert(Item(role="system", parts="be kind"), after="root")
    fresh = OmniSession(model, streaming=QUICK, system="be kind")
    between, two = Item(role="user", parts="between"), Item(role="user", parts="zwei")
    fresh.become([fresh.items[0], items[0], items[1], between, two, items[3], items[5]])
    assert roles(session) == ["system", "user", "assistant", "user", "user", "assistant", "assistant"]
    for one in (session, fresh):
        one.push_text("so?")
    assert_same_answer(session, fresh)


@pytest.mark.parametrize("after", [None, "root"])
def test_where_an_item_is_inserted(model: OmniModel, after: str | None) -> None:
    session = asked(model, "one", system="s")
    session.push_text("open")
    id = session.insert(Item(id="mine", role="user", parts="x"), after=after)
    assert id == "mine" and [item.id for item in session.items].index("mine") == (1 if after else 3)
    assert session.items[-1].text == "open" and session.items[-1].status == "in_progress"
    session.delete("mine")
    assert_same_answer(session, said(model, "one", "open", system="s"))


def said(model: OmniModel, *texts: str, **options: Any) -> OmniSession:
    session = asked(model, *texts[:-1], **options)
    session.push_text(texts[-1])
    return session


def test_an_inserted_question_is_answered(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK)
    session.insert(Item(role="user", parts="hello"))
    assert_same_answer(session, said(model, "hello"))
    assert roles(session) == ["user", "assistant"]


def test_media_can_be_moved_and_taken_over(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK)
    session.push_image(speckle(40, 40))
    session.push_text("first")
    answer(session)
    item = session.items[0]
    new = dataclasses.replace(item, parts=({"type": "text", "text": "second"}, item.parts[0]))
    session.replace(item.id, new)
    told = OmniSession(model, streaming=QUICK)
    told.push_text("second")
    told.push_image(speckle(40, 40))
    told.insert(session.items[1])
    told_items = [*told.items][::-1]
    fresh = OmniSession(model, streaming=QUICK)
    fresh.become(told_items)
    assert fresh.ids == session.ids
    for one in (session, fresh):
        one.push_text("?")
    assert_same_answer(session, fresh)


@pytest.mark.parametrize("how", ["truncate", "interrupt"])
def test_an_earlier_reply_is_cut_after_new_input(model: OmniModel, how: str) -> None:
    session = asked(model, "one", "two")
    session.push_audio(noise(20000))
    reply = session.items[3]
    kept = session.truncate(reply.id, 100) if how == "truncate" else session.interrupt(100)
    assert len(kept.token_ids) < 5 and kept.text == model.processor.decode(kept.token_ids)
    cut = session.items[3]
    assert (cut.id, cut.status, cut.text) == (reply.id, "incomplete", kept.text)
    assert session.truncate(reply.id, 10**6).token_ids == kept.token_ids  # beyond the end all of it is kept
    whole = session.truncate(session.items[1].id, 10**6)
    assert whole.text == session.items[1].text
    fresh = OmniSession(model, streaming=QUICK)
    fresh.become(session.items[:4])
    fresh.push_audio(noise(20000))
    assert_same_answer(session, fresh)


def test_a_clip_is_discarded(model: OmniModel) -> None:
    session = said(model, "one", "before")
    session.push_audio(noise(40000))
    assert session.discard_input() is True and session.discard_input() is False
    session.push_text(" and after")
    assert_same_answer(session, said(model, "one", "before and after"))
    session.push_audio(noise(40000))
    session.discard_input()
    assert roles(session)[-1] == "assistant"
    session.push_video_frame(speckle(32, 32), 0.0)
    session.push_video_frame(speckle(32, 32), 0.5)
    assert session.discard_input()
    assert_same_answer(session, asked(model, "one", "before and after"))


def test_instructions_and_tools_change(model: OmniModel) -> None:
    session = asked(model, "one", system="be brief")
    session.configure(system="be long")
    assert session.system == "be long" and session.items[0].text == "be long"
    session.configure(tools=TOOLS)
    assert "look" in model.processor.decode(session.ids)
    session.configure(system="", tools=[])
    assert session.system is None and roles(session) == ["user", "assistant"]
    fresh = OmniSession(model, streaming=QUICK)
    fresh.become(session.items)
    assert_same_answer(session, fresh)


def test_an_answer_aside_changes_nothing(model: OmniModel) -> None:
    session, twin = (said(model, "one", "two") for _ in range(2))
    aside = session.respond(**PLAIN, items=[Item(role="user", parts="aside")], remember=False)
    main = session.respond(**PLAIN)  # both at once
    apart = OmniSession(model, streaming=QUICK)
    apart.push_text("aside")
    expected, got = answer(apart)[0], []
    for event in aside:
        got += getattr(event, "token_ids", ())
        next(main, None)
    assert got == expected
    list(main)
    answer(twin)
    assert session.ids == twin.ids and roles(session) == roles(twin)
    whole = [i for e in session.respond(**PLAIN, remember=False) for i in getattr(e, "token_ids", ())]
    assert session.ids == twin.ids and whole == answer(twin)[0]
    items = [Item(role="user", parts="anew")]
    list(session.respond(**PLAIN, items=items))
    assert roles(session) == ["user", "assistant"] and session.items[0].text == "anew"


def test_a_fork_during_a_reply_holds_what_was_yielded(model: OmniModel) -> None:
    session = said(model, "one", "two")
    events = session.respond(**SILENT)
    first = next(events)
    other = session.fork()
    assert other.items[-1].status == "incomplete" and not other.responding and session.responding
    rest = list(events)
    kept = list(getattr(first, "token_ids", ()))
    fresh = asked(model, "one")
    fresh.push_text("two")
    stream = fresh.respond(**SILENT)
    next(stream)
    fresh.interrupt()
    assert other.ids == fresh.ids and kept == [*other.ids[-2 - len(kept) : -2]] and rest
    for one in (other, fresh):
        one.push_text("three")
    assert_same_answer(other, fresh)


def test_a_reply_that_is_forgotten_is_cut_where_one_looks(model: OmniModel) -> None:
    session = said(model, "one")
    events = session.respond(**SILENT)
    first = next(events)
    del events
    assert session.items[-1].status == "incomplete"
    assert session.ids[-3] == getattr(first, "token_ids", ())[-1]


def test_room_is_made_instead_of_an_error(model: OmniModel) -> None:
    limit = model.config.thinker.text_config.max_position_embeddings
    full = OmniSession(model, streaming=StreamingConfig(), make_room=0.5)
    for number in range(4):
        full.insert(Item(role="user", parts=f"{number}" * (limit // 4 - 10)))
        full.insert(Item(role="assistant", parts="ok"))
    full.push_text("more" * 30)
    answer(full, return_audio=False)
    assert len(full.ids) <= limit // 2 + 200 and full.items[-2].text == "more" * 30
    strict = OmniSession(model)
    with pytest.raises(ValueError, match="session is full"):
        strict.insert(Item(role="user", parts="x" * limit))
    assert strict.items == ()


def test_kept_media_have_a_bound(model: OmniModel) -> None:
    config = model.config.thinker
    values = config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes))
    one = 4 * 4 * values  # fp32, of four tokens
    session = OmniSession(model, streaming=QUICK, media_bytes=2 * one)
    for number in range(4):
        session.push_image(speckle(32, 32, seed=number))
        answer(session, return_audio=False)
    kept = [part["image"].kept for item in session.items for part in item.parts if part["type"] == "image"]
    assert kept == [False, False, True, True]
    session.become(session.items[4:])  # the two that are kept
    with pytest.raises(TypeError, match="media_bytes"):
        OmniSession(model, media_bytes=0.5)
    with pytest.raises(ValueError, match="media_bytes"):
        OmniSession(model, media_bytes=-1)


def test_calls_and_results(model: OmniModel) -> None:
    session = OmniSession(model, streaming=QUICK, tools=TOOLS)
    session.push_text("what is there?")
    session.insert(Item(role="user", parts="go"))
    calls = [{"type": "tool_call", "id": f"c{i}", "name": "look", "arguments": {"at": "größer"}} for i in (1, 2)]
    session.insert(Item(role="assistant", parts=["one moment", *calls]))
    with pytest.raises(ValueError, match="calls that wait for one: c1, c2"):
        session.push_tool_result("c3", "x")
    session.push_tool_result("c2", "a tree")
    session.push_tool_result("c1", "a house <|im_end|>")
    with pytest.raises(ValueError, match="no call waits"):
        session.push_tool_result("c1", "again")
    assert roles(session) == ["user", "assistant", "tool", "tool", "user"]
    messages = [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "one moment",
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": "größer"}}}] * 2,
        },
        {"role": "tool", "content": "a tree"},
        {"role": "tool", "content": "a house <|im_end|>"},
        {"role": "user", "content": "what is there?"},
    ]
    events = list(session.respond(**PLAIN))
    prompt = session.ids[: events[-1].usage["prompt_tokens"]]
    assert prompt == model.processor(messages, tools=TOOLS).input_ids[0].tolist()
    with pytest.raises(ValueError, match="no tool call 'c2' to answer"):
        session.delete(session.items[1].id)
    session.delete(session.items[3].id)
    session.push_tool_result("c1", "a house")
    assert [item.role for item in session.items][2:4] == ["tool", "tool"]


def test_an_open_clip_is_no_item_for_others(model: OmniModel) -> None:
    """An answer aside hears it to its end, another session is told that it is open."""
    session, other = (OmniSession(model, streaming=QUICK) for _ in range(2))
    session.push_audio(noise(20000))
    aside = list(session.respond(**SILENT, items=session.items, remember=False))[-1]
    with pytest.raises(ValueError, match="audio of a part is still open"):
        other.become(session.items)
    assert other.ids == [] and session.items[-1].status == "in_progress"
    assert list(session.respond(**SILENT))[-1].usage == aside.usage
    other.become(session.items)
    assert other.ids == session.ids


def test_items_of_another_model(model: OmniModel) -> None:
    """Of another width they are refused; of another precision they are read in the session's own."""
    session, half = asked(model), build.tiny_model().to(torch.bfloat16)
    session.push_image(speckle(64, 64))
    answer(session)
    with pytest.raises(ValueError, match="another model's"):
        OmniSession(build.second_model()).become(session.items)
    other = OmniSession(half, streaming=QUICK)
    other.become(session.items)
    other.push_text("and?")
    assert answer(other)[0] and other.items[0].parts[0]["type"] == "image"
