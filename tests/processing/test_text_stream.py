"""Incremental text equals decoding all ids at once, whatever the bytes."""

from __future__ import annotations

import pytest
from build import TOY_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import OmniProcessor
from omni.processing.text_stream import TextStream

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)


def stream(ids: list[int]) -> list[str]:
    text = TextStream(PROCESSOR)
    return [*map(text.push, ids), text.finish()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 639), max_size=20))
def test_any_ids(ids: list[int]) -> None:
    assert "".join(stream(ids)) == PROCESSOR.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_any_text_arrives_in_whole_characters(text: str) -> None:
    pieces = stream(PROCESSOR.encode_text(text))
    assert "".join(pieces) == PROCESSOR.decode(PROCESSOR.encode_text(text))
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@pytest.mark.parametrize("text", ["é", "漢字", "🙂 ok"])
def test_half_a_character_waits(text: str) -> None:
    ids = [PROCESSOR.tokenizer.convert_tokens_to_ids(c) for c in PROCESSOR.tokenizer.tokenize(text)]
    bytes_of = list(text.encode())
    pieces = stream(ids)
    assert len(ids) == len(bytes_of) or len(ids) < len(bytes_of)
    assert pieces[0] in ("", text[0]) and "".join(pieces) == text
