"""Tools in sessions, alone and in an engine: calls are events and items, results are answered, nothing is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import build
import pytest
import torch
from build import second_model

from omni import AudioChunk, Item, OmniEngine, OmniModel, OmniSession, TextDelta, ToolCall, TurnEnd

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
PLAIN = {**build.PLAIN, "max_new_tokens": 200, "max_frames": 4, "seed": 0}
SILENT = {**PLAIN, "return_audio": False}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "größer"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "look", "arguments": {"at": 2}}\n</tool_call>'
END = 258


def writes(model: OmniModel, text: str) -> Any:
    """A function of the logits that lets a reply be this text."""
    ids, start = [*model.processor.encode_text(text, control_tokens=True), END], []

    def shape(read: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        start.append(len(read))
        logits[:] = -torch.inf
        logits[ids[min(len(read) - start[0], len(ids) - 1)]] = torch.inf
        return logits

    return shape


@pytest.fixture(scope="module", params=["first", "second"])
def either(request: pytest.FixtureRequest, model: OmniModel) -> OmniModel:
    return model if request.param == "first" else second_model()


@pytest.fixture(params=["alone", "in an engine"])
def session(request: pytest.FixtureRequest, either: OmniModel) -> Iterator[OmniSession]:
    if request.param == "alone":
        yield OmniSession(either, tools=TOOLS)
    else:
        with OmniEngine(either, max_sessions=2) as engine:
            yield engine.session(tools=TOOLS)


def says(session: OmniSession, text: str, **changes: Any) -> list[Any]:
    return list(session.respond(**{**SILENT, **changes, "logits_processor": writes(session.model, text)}))


def shown(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def ids_of(session: OmniSession, messages: list[dict[str, Any]]) -> list[int]:
    """The prompt that the processor makes of a conversation with these tools."""
    processor = session.processor
    beginning = processor.beginning_ids(None, session.model.config.im_start_token_id, TOOLS)
    turns: list[int] = []
    for message in messages:
        if message["role"] == "tool":
            turns += processor.tool_results_ids(message["content"])
            continue
        said = processor.encode_text(message["content"])
        if message["role"] == "assistant":
            said = processor.assistant_ids(message["content"], message["calls"])
        turns += [*session._header(message["role"]), *said, *session._closing()]
    return [*beginning, *turns]


def test_a_call_and_its_result(session: OmniSession) -> None:
    session.push_text("hi")
    events = says(session, CALL)
    (call,) = [event for event in events if isinstance(event, ToolCall)]
    assert (call.name, call.arguments, call.parsed) == ("look", '{"at": "größer"}', {"at": "größer"})
    assert shown(events) == "" == events[-1].text and events[-1].reason == "stop"
    reply = session.items[-1]
    part = {"type": "tool_call", "id": call.id, "name": "look", "arguments": call.arguments}
    assert (reply.status, list(reply.parts)) == ("completed", [part])
    session.push_tool_result(call.id, "a house")
    assert [item.role for item in session.items] == ["user", "assistant", "tool"]
    events = says(session, "a house")
    calls = [{"name": "look", "arguments": {"at": "größer"}}]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "calls": calls},
        {"role": "tool", "content": ["a house"]},
    ]
    header = session._header("assistant")
    assert session.ids[: events[-1].usage["prompt_tokens"]] == [*ids_of(session, messages), *header]
    assert shown(events) == "a house" == session.items[-1].text


def test_parallel_calls_with_text(session: OmniSession) -> None:
    session.push_text("hi")
    events = says(session, f"let me see\n{CALL}\n{OTHER}", return_audio=None)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [call.parsed for call in calls] == [{"at": "größer"}, {"at": 2}] and calls[0].id != calls[1].id
    assert shown(events).rstrip("\n") == "let me see" and any(isinstance(event, AudioChunk) for event in events)
    assert [part["type"] for part in session.items[-1].parts] == ["text", "tool_call", "tool_call"]
    for call in reversed(calls):
        session.push_tool_result(call.id, str(call.parsed["at"]))
    with pytest.raises(ValueError, match=f"no tool call '{calls[0].id}' to answer; no call waits"):
        session.push_tool_result(calls[0].id, "again")
    assert shown(says(session, "done")) == "done"


def test_a_call_is_spoken_by_nobody(session: OmniSession, either: OmniModel) -> None:
    silent = says(session, CALL, return_audio=None)
    assert not any(isinstance(event, AudioChunk) for event in silent)
    twin = OmniSession(either, tools=TOOLS)
    sounds = []
    for one, text in ((session, f"look{CALL}"), (twin, "look")):
        one.become([])
        one.push_text("hi")
        events = says(one, text, return_audio=None)
        sounds.append(torch.cat([torch.zeros(0), *(e.samples for e in events if isinstance(e, AudioChunk))]))
    torch.testing.assert_close(*sounds, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "text <tool_call>\n{",
        "<tool_call>",
    ],
)
def test_a_malformed_call_leaves_the_history_as_it_was(session: OmniSession, wrong: str) -> None:
    session.push_text("one")
    says(session, "yes")
    session.push_text("two")
    before, ids = [(item.id, item.status) for item in session.items], session.ids
    events = says(session, wrong)
    end = events[-1]
    assert isinstance(end, TurnEnd) and end.reason == "error" and end.error
    assert "<" not in shown(events) and "<" not in end.text and not session.responding
    assert [(item.id, item.status) for item in session.items] == before and session.ids == ids
    assert shown(says(session, "fine")) == "fine"
    twin = OmniSession(session.model, tools=TOOLS)
    for text, answer in (("one", "yes"), ("two", "fine")):
        twin.push_text(text)
        says(twin, answer)
    assert session.ids == twin.ids


@pytest.mark.parametrize("taken", range(0, 30, 4))
def test_a_cut_keeps_no_part_of_a_call(session: OmniSession, taken: int) -> None:
    session.push_text("hi")
    events = session.respond(**{**SILENT, "logits_processor": writes(session.model, f"ab{CALL}cd")})
    got = [event for event, _ in zip(events, range(taken))]
    session.interrupt()
    text = session.processor.decode(session.ids, skip_special_tokens=False).rpartition("assistant\n")[2]
    assert text.count("<tool_call>") == text.count("</tool_call>")
    parts = session.items[-1].parts
    assert "<" not in session.items[-1].text
    called = [event.id for event in got if isinstance(event, ToolCall)]
    known = [part["id"] for part in parts if part["type"] == "tool_call"]
    assert known == called[: len(known)] and text.count("</tool_call>") == len(known)
    assert shown(says(session, "on")) == "on"


@pytest.mark.parametrize("end", ["taken", "interrupted", "failed"])
def test_a_call_is_answered_while_its_reply_goes_on(session: OmniSession, end: str) -> None:
    session.push_text("hi")
    text = f"{CALL}and so on" if end != "failed" else f"{CALL}and <tool_call>no"
    events = session.respond(**{**SILENT, "logits_processor": writes(session.model, text)})
    call = next(event for event in events if isinstance(event, ToolCall))
    session.push_tool_result(call.id, "a house")
    if end == "interrupted":
        session.interrupt(0)  # a silent reply counts as far as it was yielded
    last = list(events)[-1]
    kept = [item.role for item in session.items]
    if end == "failed":
        assert last.reason == "error" and kept == ["user"]
    else:
        assert kept == ["user", "assistant", "tool"] and session.items[1].parts[-1]["id"] == call.id
    assert shown(says(session, "on")) == "on"


def test_calls_survive_a_file(either: OmniModel, tmp_path: Any) -> None:
    session = OmniSession(either, tools=TOOLS)
    session.push_text("hi")
    (call,) = [event for event in says(session, CALL) if isinstance(event, ToolCall)]
    session.save(tmp_path / "kept")
    loaded = OmniSession.load(tmp_path / "kept", either)
    assert loaded.tools == session.tools and loaded.items == session.items
    for one in (session, loaded):
        one.push_tool_result(call.id, "x")
        says(one, "done")
    assert loaded.ids == session.ids


def test_without_tools_a_call_is_text(either: OmniModel) -> None:
    session = OmniSession(either)
    session.push_text("hi")
    events = says(session, CALL)
    assert not any(isinstance(event, ToolCall) for event in events) and "look" in shown(events)


@pytest.mark.parametrize("mark", ["<tool_call>", "</tool_call>", '\\"</tool_call>'])
def test_a_mark_in_a_string_of_a_call_is_text(session: OmniSession, mark: str) -> None:
    session.push_text("hi")
    written = f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{mark}"}}}}\n</tool_call>'
    (call,) = [event for event in says(session, written) if isinstance(event, ToolCall)]
    part = {"type": "tool_call", "id": call.id, "name": "look", "arguments": call.arguments}
    assert list(session.items[-1].parts) == [part]
    session.push_tool_result(call.id, "x")
    assert shown(says(session, "done")) == "done"


def test_results_go_with_the_calls_that_are_cut(session: OmniSession) -> None:
    session.push_text("hi")
    events = says(session, f"let me see {CALL}{OTHER}", return_audio=None, max_frames=30)
    for call in [event for event in events if isinstance(event, ToolCall)][::-1]:
        session.push_tool_result(call.id, "x")
    assert [item.role for item in session.items] == ["user", "assistant", "tool", "tool"]
    session.interrupt(0)
    assert [item.role for item in session.items] == ["user", "assistant"]
    session.insert(Item(parts="so?"))
    assert shown(says(session, "done")) == "done"
