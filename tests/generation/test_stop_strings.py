"""Stop strings: what is cut from text, from streams and from sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import BATCH, GREEDY, PLAIN, chat, saying, second_model
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import OmniModel, StreamingConfig, TextDelta, TurnEnd
from omni.generation.stop_strings import StopStrings

SPEECH: dict[str, Any] = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "residual_sampling": GREEDY}
SPEECH |= {"max_new_tokens": 40, "max_frames": 24, "seed": 3}


@pytest.fixture(scope="module")
def second() -> Iterator[OmniModel]:
    yield second_model()


def say(model: OmniModel, text: str, **arguments: Any) -> Any:
    with saying(model, model.processor.encode_text(text)):
        return model.generate(model.processor(chat("hi")), **{**SPEECH, **arguments})


CUTS = [
    ("one two three", " two", "one"),  # where a token begins
    ("one two three", "e tw", "on"),  # inside a token, across two
    ("one two three", "two", "one "),  # behind the first character of a token
    ("one two three", ["ee", "hre"], "one two t"),  # the first to occur
    ("one two three", ["two three", " tw"], "one"),
    ("one two three", ["three", "ee!"], "one two "),
    ("one two three", "one", ""),  # nothing is left
    ("aaab", "aab", "a"),  # it begins again inside itself
    ("grün é€ x", "€", "grün é"),
    ("grün é€ x", "n é€", "grü"),
    ("one\n\nUser: two", ["\nUser:", "\n\nUser"], "one"),
]


@pytest.mark.parametrize(("said", "stop", "kept"), CUTS)
def test_a_stop_string_is_cut_from_text_and_sound(model: OmniModel, said: str, stop: Any, kept: str) -> None:
    out = say(model, said, stop=stop)
    ids = model.processor.encode_text(said)
    assert out.text == [kept] and out.reason[0] in ("stop", "max_frames")
    assert out.replies[0] == ids[: len(out.replies[0])]  # to the token that completes it
    ends = [len(kept) + len(s) for s in ([stop] if isinstance(stop, str) else stop) if said.startswith(s, len(kept))]
    whole = model.processor.decode
    assert len(whole(out.replies[0])) >= min(ends) > len(whole(out.replies[0][:-1]).rstrip("\ufffd"))
    clean = say(model, kept)
    assert torch.equal(out.codes[0], clean.codes[0])
    torch.testing.assert_close(out.audio[0], clean.audio[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("said", "stop", "kept"), CUTS)
def test_the_second_family_too(second: OmniModel, said: str, stop: Any, kept: str) -> None:
    out, clean = say(second, said, stop=stop), say(second, kept)
    assert out.text == [kept] and torch.equal(out.codes[0], clean.codes[0])
    torch.testing.assert_close(out.audio[0], clean.audio[0], atol=1e-4, rtol=0)


def test_what_never_occurs_changes_nothing(model: OmniModel, second: OmniModel) -> None:
    for speaker in (model, second):
        for limit in ({}, {"max_new_tokens": 2}):
            plain = say(speaker, "one two", max_frames=9, **limit)
            for stop in ("twos", ["two!", "xx"], "twoo", [], None, "<|im_end|>"):
                out = say(speaker, "one two", stop=stop, max_frames=9, **limit)
                assert out.text == plain.text and out.replies == plain.replies and out.reason == plain.reason
                assert torch.equal(out.codes[0], plain.codes[0])


def cut_at(text: str, stops: list[str]) -> str:
    """Up to the stop string that is complete first, of several that end there the longest; all if there is none."""
    ends = (i for i in range(1, len(text) + 1) if any(text[:i].endswith(stop) for stop in stops))
    end = next(ends, None)
    return text if end is None else text[: end - max(len(s) for s in stops if text[:end].endswith(s))]


@given(
    st.lists(st.tuples(st.text("abc", max_size=3), st.booleans()), max_size=9),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=150)
def test_every_way_in_which_tokens_divide_a_text(tokens: list[tuple[str, bool]], stops: list[str]) -> None:
    """Tokens that end inside a character (False) go with those that follow; all that is let go adds up to the text."""
    search, pieces, shown, kept, cut = StopStrings(stops), [piece for piece, _ in tokens], "", 0, None
    for piece, whole in tokens:
        decided = search.push(piece, whole=whole)
        shown, kept, cut = shown + decided.text, kept + decided.tokens, decided.cut
        assert shown.startswith("".join(pieces[:kept])) and kept + search.tokens <= len(tokens)
        if cut is not None:
            break
    else:
        decided = search.finish("")
        shown, kept, cut = shown + decided.text, kept + decided.tokens, decided.cut
        assert cut is not None or search.tokens == 0
    assert shown == cut_at("".join(pieces), stops) == "".join(pieces[:kept]) + (cut or "")


@given(st.data())
@settings(max_examples=12)
def test_streamed_text_is_the_whole_text_cut_at_the_first_stop_string(model: OmniModel, data: st.DataObject) -> None:
    """Random replies of a random model: broken characters, control ids, anything."""
    arguments = {"max_new_tokens": 12, "text_sampling": {"temperature": 1.5}, "return_audio": False}
    arguments["seed"] = data.draw(st.integers(0, 5))
    inputs = model.processor(chat("hi"))
    text = model.generate(inputs, **arguments).text[0]
    begin = data.draw(st.integers(0, len(text) - 1))
    stops = [text[begin : begin + data.draw(st.integers(1, 4))], data.draw(st.text("ab \ufffd", min_size=1))]
    kept = cut_at(text, stops)
    events = list(model.stream(inputs, stop=stops, **arguments))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == kept == events[-1].text
    assert events[-1].reason == "stop"
    assert model.generate(inputs, stop=stops, **arguments).text == [kept]


def test_what_may_be_a_stop_string_is_held_back_until_it_is_decided(model: OmniModel) -> None:
    def deltas(stop: str) -> list[str]:
        with saying(model, model.processor.encode_text("abcabd")):
            events = list(model.stream(model.processor(chat("hi")), stop=stop, return_audio=False))
        assert all(len(e.token_ids) == 1 for e in events if isinstance(e, TextDelta))
        return [e.text for e in events if isinstance(e, TextDelta)]

    assert deltas("abd") == ["", "", "abc", "", "", ""]
    assert deltas("bcx") == ["a", "", "", "bca", "", "bd", ""]
    assert deltas("bdx") == ["a", "", "bc", "a", "", "", "bd"]  # decided by the end of the reply


@pytest.mark.parametrize("schedule", [(1,), (3,), (100,)])
def test_streamed_sound_ends_where_the_text_is_cut(model: OmniModel, second: OmniModel, schedule: Any) -> None:
    for speaker in (model, second):
        whole = say(speaker, "one two three four", stop=" th")
        streaming = StreamingConfig(chunk_frames=schedule, text_ahead=3, codec_schedule="whole")
        with saying(speaker, speaker.processor.encode_text("one two three four")):
            inputs = speaker.processor(chat("hi"))
            events = list(speaker.stream(inputs, stop=" th", streaming=streaming, **SPEECH))
        assert isinstance(events[-1], TurnEnd) and events[-1].text == whole.text[0] == "one two"
        sound = torch.cat([e.samples for e in events if not isinstance(e, (TextDelta, TurnEnd))])
        torch.testing.assert_close(sound, whole.audio[0], atol=1e-4, rtol=0)


def test_a_thought_is_not_searched(model: OmniModel) -> None:
    start, end = model.processor.think_token_ids
    encode = model.processor.encode_text
    with saying(model, [start, *encode("ab stop cd"), end, *encode("yes stop no")]):
        out = model.generate(model.processor(chat("hi")), stop="stop", max_new_tokens=40, return_audio=False)
    assert out.text[0].strip() == "yes" and out.reasoning == ["ab stop cd"] and out.reason == ["stop"]


def test_it_counts_from_the_least_length_on(model: OmniModel) -> None:
    tokens = len(model.processor.encode_text("a b"))
    assert say(model, "a b a b", stop="b", min_new_tokens=tokens).text == ["a "]
    assert say(model, "a b a b", stop="b", min_new_tokens=tokens + 1).text == ["a b a "]


def test_each_row_may_have_its_own(model: OmniModel) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 8, "max_frames": 6, **PLAIN, "seed": [1, 2, 3]}
    arguments["text_sampling"] = {"temperature": 1.5}
    texts = model.generate(model.processor(BATCH), **arguments).text
    stops: list[Any] = [[texts[0][-1]], None, [texts[2][-2:], "zzz"]]
    out = model.generate(model.processor(BATCH), stop=stops, **arguments)
    for row in range(3):
        alone = model.generate(model.processor(BATCH[row]), stop=stops[row], **{**arguments, "seed": row + 1})
        assert out.text[row] == alone.text[0] and torch.equal(out.codes[row], alone.codes[0])
    assert out.text[1] == texts[1] and out.text[0] == texts[0][: texts[0].index(texts[0][-1])]


@pytest.mark.parametrize(
    ("stop", "kind", "message"),
    [
        ("", ValueError, "stop holds an empty string"),
        (["a", ""], ValueError, "stop holds an empty string"),
        (3, TypeError, "stop must be a string or a list of strings, got 3"),
        (["a", 3], TypeError, "stop must be a string or a list of strings"),
        ([["a"], ["b"]], ValueError, "list of 2 for a batch of 1"),
    ],
)
def test_impossible_stop_strings(model: OmniModel, stop: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        model.generate(model.processor(chat("x")), stop=stop)


def test_a_model_without_words_cannot_look_for_them(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = model.processor(chat("x"))
    monkeypatch.setattr(model, "processor", None)
    with pytest.raises(ValueError, match=r"stop needs text.*model\.processor"):
        model.generate(inputs, stop="a")
