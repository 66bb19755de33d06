"""Calls of tools told from text: every way in which tokens divide a reply, and what is malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from build import TOY_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import OmniProcessor
from omni.generation import generate as generation
from omni.generation.tool_calls import CallReader, MalformedCallError, Piece, WrittenCall, read_call

pieces = st.sampled_from(["a", "é", " ", "\n", "<", "<tool", "<tool_cal", "</tool_call>", ">", "tool_call>", '"', "{"])
texts = st.lists(pieces, max_size=4).map("".join).filter(lambda text: "<tool_call>" not in text)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\<{}é \n', max_size=6) | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab<", max_size=2), inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(st.text('kö"', max_size=3), values, max_size=3)


@st.composite
def written_calls(draw: Any) -> tuple[str, tuple[str, str, Any]]:
    """A call as it may be written, and what it says."""
    name, parsed = draw(st.text("fgé_", min_size=1, max_size=4)), draw(arguments)
    inner = json.dumps(parsed, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    given = json.dumps(inner, ensure_ascii=False) if draw(st.booleans()) else inner
    members = [f'"name": {json.dumps(name, ensure_ascii=False)}', f'"arguments": {given}']
    gap = draw(st.sampled_from(["", "\n", " \n "]))
    body = "{" + ", ".join(members[:: draw(st.sampled_from([1, -1]))]) + "}"
    return f"<tool_call>{gap}{body}{gap}</tool_call>", (name, inner, parsed)


def cut(data: st.DataObject, text: str) -> list[str]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]


@given(st.lists(texts, min_size=1, max_size=4), st.data())
@settings(max_examples=150)
def test_every_way_in_which_tokens_divide_a_reply(stretches: list[str], data: st.DataObject) -> None:
    """Tokens that end inside a character go with those that follow; what is text is told once and in order."""
    reader = CallReader(generation.TextStream(OmniProcessor.from_pretrained(TOY_DATA)))
    calls = [data.draw(written_calls()) for _ in stretches[1:]]
    text = stretches[0] + "".join(call + stretch for (call, _), stretch in zip(calls, stretches[1:]))
    tokens, found, shown = cut(data, text), [], 0
    for index, token in enumerate(tokens):
        found += reader.push(index, 1000 + index, token, whole=data.draw(st.integers(0, 4)) > 0)
        told = "".join(f.text for f in found if isinstance(f, Piece))
        assert len(told) >= shown
        shown = len(told)
        first, before = reader.undecided or (index + 1, "")
        assert first <= index + 1 and "".join(tokens)[: len("".join(tokens[:first]) + before)].endswith(before)
    found += reader.finish("", "stop")
    assert not [f for f in found if isinstance(f, MalformedCallError)] and not reader.inside
    assert [tuple(f) for f in found if isinstance(f, WrittenCall)] == [call for _, call in calls]
    kept = stretches if not calls else [s for s in stretches if s.strip()]
    own = [f for f in found if isinstance(f, Piece)]
    assert "".join(f.text for f in own) == "".join(kept)
    assert [f.token - 1000 for f in own if f.own] == [f.index for f in own if f.own]
    assert len({f.index for f in own if f.own}) == sum(f.own for f in own)
    assert all(tokens[f.index].startswith(f.before) for f in own if not f.own and len(tokens[f.index]) >= len(f.before))
    assert len(reader.spans) == len(calls) and all(0 <= a < b <= len(tokens) for a, b in reader.spans)
    order: list[str] = [""]
    for f in found:
        order += ["call", ""] if isinstance(f, WrittenCall) else []
        order[-1] += f.text if isinstance(f, Piece) else ""
    told = [s if s in kept else "" for s in stretches]
    assert order == [told[0], *(each for stretch in told[1:] for each in ("call", stretch))]


@given(written_calls(), st.data())
@settings(max_examples=60)
def test_an_open_call_is_never_told(call: tuple[str, Any], data: st.DataObject) -> None:
    text = call[0][: data.draw(st.integers(len("<tool_call>"), len(call[0]) - 1))]
    reader = CallReader(generation.TextStream(OmniProcessor.from_pretrained(TOY_DATA)))
    found: list[Any] = []
    for index, token in enumerate(cut(data, f"a{text}")):
        found += reader.push(index, index, token, whole=True)
    found += reader.finish("", "stop")
    assert "".join(f.text for f in found if isinstance(f, Piece)) == "a" and not reader.spans
    assert isinstance(found[-1], MalformedCallError) and "the reply ends inside it" in str(found[-1])


def test_what_is_read_of_a_call() -> None:
    assert read_call(' {"name":"f","arguments":{"é": "ü\\u00fc"}, "id": 3} ') == ("f", '{"é": "ü\\u00fc"}', {"é": "üü"})
    assert read_call('{"arguments": "{\\"x\\": 1}", "name": "f"}') == ("f", '{"x": 1}', {"x": 1})
    assert read_call('{"name": "f"}') == ("f", "{}", {})
    assert read_call('{"name": "f", "arguments": {"x": 1}, "arguments": {"y": 2}}') == ("f", '{"y": 2}', {"y": 2})


MALFORMED = [
    ("", "Expecting value"),
    ("hello", "a JSON object must follow"),
    ("[1]", "a JSON object must follow"),
    ('{"name": "f", "arguments": {"x": 1}', "Expecting ','"),
    ('{"name": "f"} {}', "Extra data"),
    ("{'name': 'f'}", "Expecting property name"),
    ('{"arguments": {}}', "its name must be a string"),
    ('{"name": "", "arguments": {}}', "its name must be a string"),
    ('{"name": 3, "arguments": {}}', "its name must be a string"),
    ('{"name": "f", "arguments": [1]}', "its arguments must be a JSON object"),
    ('{"name": "f", "arguments": null}', "its arguments must be a JSON object"),
    ('{"name": "f", "arguments": "x"}', "Expecting value"),
    ('{"name": "f", "arguments": "[1]"}', "its arguments must be a JSON object"),
    ('{"name": "f", "arguments": {"x": NaN}}', "NaN is no JSON number"),
    ('{"name": "f", "arguments": {"x": 1e999}}', "1e999 is no JSON number"),
    ('{"name": "f", "arguments": {"x": "\\ud800"}}', "half of a surrogate pair"),
    ('{"name": "f", "arguments": {"x": "a\nb"}}', "line break"),
    ('{"name": "f", "arguments": {"x": "a}}\n', "line break"),
    ('{"name": "f", "arguments": ' + '{"x": ' * 100000, "too many lists and objects|Expecting value"),
    ('{"name": "f", "arguments": {<tool_call>', "another one begins inside it"),
]


@pytest.mark.parametrize(("body", "message"), MALFORMED)
def test_malformed_calls(body: str, message: str) -> None:
    for size in (1, 5, len(body) + 40):
        reader = CallReader(generation.TextStream(OmniProcessor.from_pretrained(TOY_DATA)))
        text, found = f"a<tool_call>{body}</tool_call>b", []
        if len(text) > 10000:
            size = 10000
        for at in range(0, len(text), size):
            found += reader.push(at, 0, text[at : at + size], whole=True)
            if isinstance(found[-1:] and found[-1], MalformedCallError):
                break
        assert isinstance(found[-1], MalformedCallError), found
        with pytest.raises(ValueError, match=message):
            raise found[-1]
        assert len(str(found[-1])) < 500
        assert "".join(f.text for f in found if isinstance(f, Piece)) == "a"
