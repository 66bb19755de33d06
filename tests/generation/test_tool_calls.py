"""Calls of tools in replies: what is told of them, and that nothing of them is shown or spoken."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from build import BATCH, GREEDY, TOY_DATA, chat, second_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omni import AudioChunk, OmniModel, OmniProcessor, StreamingConfig, TextDelta, TurnEnd
from omni.generation import generate as generation
from omni.generation.arguments import resolve
from omni.generation.events import ToolCall
from omni.generation.streaming_config import OFFLINE
from omni.generation.tool_calls import CallReader, MalformedCallError, Piece, WrittenCall, read_call
from omni.generation.turn import Turn
from omni.thinker.contract import ThinkerContract, ThinkerOutput

END = 258
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 200, "max_frames": 24, "text_sampling": None, "return_audio": None}
ARGUMENTS |= {"speaker": None, "residual_sampling": GREEDY, "seed": 3}
ARGUMENTS |= {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


class ScriptedThinker(ThinkerContract):
    """A Thinker that writes given ids in every row, whatever it reads; all else is a real one's.

    What comes next is told by how many tokens a row has read behind its prompt, so that reading some again changes
    nothing.
    """

    def __init__(self, inner: Any, script: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.inner, self.script, self.prompts = inner, [*script, *[END] * 400], None
        self.embed_tokens, self.lm_head = inner.embed_tokens, inner.lm_head

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def init_state(self, batch_size: int, capacity: int = 256) -> Any:
        return self.inner.init_state(batch_size, capacity)

    def _written(self, logits: Tensor, read: Sequence[int]) -> Tensor:
        """Logits [B, V] that leave one choice, where the rows have read so many tokens."""
        assert self.prompts is not None
        said = [self.script[max(0, n - p)] for n, p in zip(read, self.prompts)]
        return torch.full_like(logits, -1e4).scatter(-1, torch.tensor(said, device=logits.device)[:, None], 1e4)

    def forward(self, embeds: Tensor, positions: Tensor, state: Any = None, **options: Any) -> ThinkerOutput:
        out = self.inner(embeds, positions, state, **options)
        if self.prompts is None:
            self.prompts = list(state.cache.lengths)
        return out._replace(logits=self._written(out.logits[:, -1], state.cache.lengths)[:, None])

    def decode(self, ids: Tensor, positions: Tensor, caches: Any, *run: Any) -> tuple[Tensor, Tensor]:
        logits, final = self.inner.decode(ids, positions, caches, *run)
        return self._written(logits, (caches[0].slots[:, 0] + 1).tolist()), final


@contextmanager
def writing(model: OmniModel, script: Sequence[int]) -> Iterator[None]:
    inner = model.thinker
    model.thinker = ScriptedThinker(inner, script)
    try:
        yield
    finally:
        model.thinker = inner


class Reply(NamedTuple):
    events: list[Any]
    turn: Turn
    sound: Tensor

    @property
    def shown(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextDelta) and not e.reasoning)

    @property
    def calls(self) -> list[tuple[str, str, Any]]:
        return [(e.name, e.arguments, e.parsed) for e in self.events if isinstance(e, ToolCall)]

    @property
    def end(self) -> TurnEnd:
        return self.events[-1]


def reply(
    model: OmniModel, script: str | Sequence[int], streaming: StreamingConfig = OFFLINE, tools: bool = True, **own: Any
) -> Reply:
    """The reply of one row that writes these ids."""
    ids = encode(model, script) if isinstance(script, str) else script
    with writing(model, ids):
        args = resolve(model, 1, **{**ARGUMENTS, "tools": tools, **own})
        rows = generation.start(model, model.processor(chat("hi")), args, streaming)
        events: list[Any] = []
        for _ in range(600):
            if not rows.running():
                break
            events += rows.tick()
    assert isinstance(events[-1], TurnEnd) and not rows.running()
    sound = torch.cat([torch.zeros(0), *(e.samples for e in events if isinstance(e, AudioChunk))])
    return Reply(events, rows.turns[0], sound)


def encode(model: OmniModel, text: str) -> list[int]:
    return model.processor.encode_text(text, control_tokens=True)


def spelled(model: OmniModel, text: str) -> list[int]:
    """The marks of a call over ordinary tokens."""
    return model.processor.encode_text(text)


@pytest.fixture(scope="module")
def second() -> Iterator[OmniModel]:
    yield second_model()


@pytest.fixture(params=["qwen3", "qwen2.5"])
def either(request: pytest.FixtureRequest, model: OmniModel, second: OmniModel) -> OmniModel:
    return model if request.param == "qwen3" else second


def same_texts(one: list[Any], other: list[Any]) -> None:
    """What a Talker was given: ids or vectors."""
    assert len(one) == len(other)
    for a, b in zip(one, other):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        else:
            assert a == b


# ---- the reader: every way in which tokens divide a reply ----

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


# ---- whole replies ----


@pytest.mark.parametrize("write", [encode, spelled])
@pytest.mark.parametrize(
    ("said", "text"),
    [
        (f"One moment.\n{WEATHER}", "One moment.\n"),
        (WEATHER, ""),
        (f"\n{WEATHER}\n", ""),
        (f"{WEATHER}\n{TIME}", ""),
        (f"Ü: {WEATHER}\n{TIME}\n ", "Ü: "),
        (f"a<tool {WEATHER} </tool_call>", "a<tool  </tool_call>"),
    ],
)
def test_nothing_of_a_call_is_shown_or_spoken(either: OmniModel, said: str, text: str, write: Any) -> None:
    """Text, sound and what the Talker is given are those of the reply without its calls."""
    got = reply(either, write(either, said))
    assert got.shown == got.end.text == text and got.end.reason in ("stop", "max_frames")
    weather = ("weather", '{"city": "Zürich", "days": [1, 2]}', {"city": "Zürich", "days": [1, 2]})
    assert got.calls == [weather] * (WEATHER in said) + [("time", "{}", {})] * (TIME in said)
    assert got.turn.text.kept == got.turn.text.ids == [*write(either, said), END]
    if "</tool_call>" in text:  # what follows a call is read behind it
        return
    plain = reply(either, spelled(either, text), tools=False)
    same_texts(got.turn.speech.spoken, plain.turn.speech.spoken)
    assert got.turn.speech.first_codes == plain.turn.speech.first_codes
    torch.testing.assert_close(got.sound, plain.sound, atol=1e-4, rtol=1e-4)
    if not text:
        assert not got.turn.speech.codes and not got.sound.numel()


def test_events_are_told_in_order_and_ids_are_unique(either: OmniModel) -> None:
    got = reply(either, f"One.{WEATHER}Two.{TIME}", StreamingConfig(chunk_frames=(1,)), logprobs=0)
    told = [e for e in got.events if isinstance(e, ToolCall) or (isinstance(e, TextDelta) and e.text)]
    said = "".join("call " if isinstance(e, ToolCall) else e.text for e in told)
    assert said == "One.call Two.call " and got.end.text == "One.Two."
    ids = [e.id for e in told if isinstance(e, ToolCall)]
    assert len(set(ids)) == 2 and all(i.startswith("call_") and len(i) == 37 for i in ids)
    deltas = [e for e in got.events if isinstance(e, TextDelta)]
    assert [i for e in deltas for i in e.token_ids] == got.turn.text.ids
    assert [p.token_id for e in deltas for p in e.logprobs or ()] == got.turn.text.ids
    spans = got.turn.text.call_reader.spans
    inside = [either.processor.decode(got.turn.text.ids[a:b], skip_special_tokens=False) for a, b in spans]
    assert inside == [WEATHER, TIME]


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_streamed_equals_generated(either: OmniModel, ahead: int) -> None:
    script = [*encode(either, f"Let me look. {WEATHER}"), *spelled(either, f"Now {TIME}")]
    whole = reply(either, script)
    streaming = StreamingConfig(chunk_frames=(1, 2), text_ahead=ahead, codec_schedule="whole")
    got = reply(either, script, streaming)
    assert got.shown == whole.shown == "Let me look. Now " and got.calls == whole.calls
    same_texts(got.turn.speech.spoken, whole.turn.speech.spoken)
    assert got.turn.speech.first_codes == whole.turn.speech.first_codes
    torch.testing.assert_close(got.sound, whole.sound, atol=1e-4, rtol=1e-4)


def test_a_call_is_drawn_a_few_tokens_a_tick_while_speech_waits(either: OmniModel) -> None:
    with writing(either, spelled(either, f"Let me look.{WEATHER}")):
        args = resolve(either, 1, tools=True, **ARGUMENTS)
        rows = generation.start(either, either.processor(chat("hi")), args, StreamingConfig())
        longest = 0
        while rows.running():
            longest = max(longest, sum(isinstance(e, TextDelta) for e in rows.tick()))
    assert longest == 4


@given(st.lists(texts, min_size=1, max_size=3), st.data())
@settings(max_examples=8)
def test_calls_anywhere_in_a_reply(model: OmniModel, stretches: list[str], data: st.DataObject) -> None:
    calls = [data.draw(written_calls()) for _ in stretches[1:]]
    said = stretches[0] + "".join(call + stretch for (call, _), stretch in zip(calls, stretches[1:]))
    write = data.draw(st.sampled_from([encode, spelled]))
    got = reply(model, write(model, said), max_new_tokens=900, max_frames=4)
    kept = "".join(stretches if not calls else [s for s in stretches if s.strip()])
    assert got.shown == got.end.text == kept and got.calls == [call for _, call in calls]
    assert model.processor.decode(got.turn.speech.spoken, skip_special_tokens=False) == kept
    streamed = reply(model, write(model, said), StreamingConfig(), max_new_tokens=900, max_frames=4)
    assert streamed.shown == kept and streamed.calls == got.calls


# ---- tokens that hold text beside a part of a call ----


def with_tokens(model: OmniModel, *words: str) -> OmniModel:
    """The model with a tokenizer that has these words too."""
    other = copy.copy(model)
    other.processor = copy.copy(model.processor)
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    tokenizer.add_tokens(list(words))
    other.processor.tokenizer = tokenizer
    other.processor.chat = type(model.processor.chat)(tokenizer, model.processor.chat.template)
    return other


TORN = ["!<", "?<tool_call>", ">\n", ">!", "><", "!<tool_call>\n{"]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (["Hi", "!<", TIME[1:]], "Hi!"),
        (["Hi", "?<tool_call>", TIME[11:]], "Hi?"),
        (["Hi", "!<tool_call>\n{", TIME[13:-1], ">\n"], "Hi!"),
        (["Hi", "!<", TIME[1:-1], "><", TIME[1:]], "Hi!"),
        ([" ", "!<", "b"], " !<b"),
    ],
)
def test_a_token_may_hold_text_and_a_part_of_a_call(either: OmniModel, said: list[str], text: str) -> None:
    """Its text is spoken as if it stood alone, and the row goes on as if it had never been read again."""
    model = with_tokens(either, *TORN)
    tokenizer = model.processor.tokenizer
    script = [i for w in said for i in ([tokenizer.convert_tokens_to_ids(w)] if w in TORN else spelled(either, w))]
    got, plain = reply(model, script), reply(model, spelled(either, text), tools=False)
    assert got.shown == got.end.text == text and len(got.calls) == "".join(said).count("</tool_call>")
    if got.calls:
        same_texts(got.turn.speech.spoken, plain.turn.speech.spoken)
        assert got.turn.speech.first_codes == plain.turn.speech.first_codes
    silent = reply(model, script, return_audio=False)
    assert silent.turn.text.ids == got.turn.text.ids and silent.shown == text


def test_reading_a_text_again_leaves_no_trace(second: OmniModel) -> None:
    """Behind a torn token the model's own choices, and all that its row has read, are those of a silent reply."""
    model = with_tokens(second, *TORN)
    token = model.processor.tokenizer.convert_tokens_to_ids("!<")
    begin = [*spelled(second, "Hi"), token, *spelled(second, TIME[1:])]

    def force(ids: Tensor, logits: Tensor) -> Tensor | None:
        drawn = len(ids) - prompt
        if drawn >= len(begin):
            return None
        return torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([begin[drawn]]), 1e4)

    inputs = model.processor(chat("hi"))
    prompt, rows = inputs.input_ids.shape[1], []
    for audio in (True, False):
        own = {"return_audio": audio, "max_new_tokens": 70, "logits_processor": force, "tools": True}
        args = resolve(model, 1, **{**ARGUMENTS, **own, "text_sampling": {"repetition_penalty": 1.3}})
        rows.append(generation.start(model, inputs, args, OFFLINE))
        while rows[-1].running():
            rows[-1].tick()
    spoken, silent = (r.text for r in rows)
    assert rows[0].turns[0].text.ids == rows[1].turns[0].text.ids and len(rows[0].turns[0].speech.spoken) > 3
    read = min(spoken.decoder.cache.lengths[0], silent.decoder.cache.lengths[0])
    assert read > prompt + len(begin) and torch.equal(spoken.seen, silent.seen)
    assert torch.equal(spoken.decoder.cache.keys[:, :, :, :read], silent.decoder.cache.keys[:, :, :, :read])
    assert torch.equal(spoken.decoder.cache.values[:, :, :, :read], silent.decoder.cache.values[:, :, :, :read])


# ---- with everything else ----


@pytest.mark.parametrize(
    ("said", "own", "message"),
    [
        (f"Ok.{TIME[:-3]}", {}, "the reply ends inside it: it is never closed"),
        (f"Ok.{TIME}", {"max_new_tokens": 20}, "max_new_tokens was reached; allow more"),
        (f"Ok.{TIME[:20]}{TIME}", {}, "another one begins inside it|Expecting|line break"),
        ("Ok.<tool_call>\n{}\n</tool_call>", {}, "its name must be a string"),
    ],
)
@pytest.mark.parametrize("write", [encode, spelled])
def test_a_malformed_call_ends_the_turn(either: OmniModel, said: str, own: Any, message: str, write: Any) -> None:
    got = reply(either, write(either, said), **own)
    assert got.end.reason == "error" and got.shown == got.end.text == "Ok." and not got.calls
    assert isinstance(got.turn.error, ValueError)
    with pytest.raises(ValueError, match=message):
        raise got.turn.error
    with writing(either, write(either, said)), pytest.raises(ValueError, match="malformed tool call"):
        list(generation.stream(either, either.processor(chat("hi")), tools=True, **{**ARGUMENTS, **own}))


def test_what_only_looks_like_a_call_is_text(either: OmniModel) -> None:
    for said in ("a <tool_cal", "<tool_ call>", "</tool_call>", "  ", ""):
        got, plain = reply(either, spelled(either, said)), reply(either, spelled(either, said), tools=False)
        assert got.shown == plain.shown == said and not got.calls
        same_texts(got.turn.speech.spoken, plain.turn.speech.spoken)
        torch.testing.assert_close(got.sound, plain.sound, atol=1e-4, rtol=1e-4)


def test_without_tools_a_call_is_text(either: OmniModel) -> None:
    got = reply(either, encode(either, TIME), tools=False)
    assert got.shown == TIME and not got.calls and got.turn.text.call_reader is None


def test_stop_strings_count_beside_calls_alone(either: OmniModel) -> None:
    said = spelled(either, f"ab{TIME}cd stop it {WEATHER}")
    plain = reply(either, said)
    assert reply(either, said, stop=["name", "bc", "tool", "}"]).shown == plain.shown == "abcd stop it "
    got = reply(either, said, stop=["name", "stop"])
    assert got.shown == got.end.text == "abcd " and got.end.reason in ("stop", "max_frames")
    assert [name for name, *_ in got.calls] == ["time"]
    assert either.processor.decode(got.turn.text.kept, skip_special_tokens=False) == f"ab{TIME}cd "
    before = reply(either, said, stop="b")
    assert before.shown == "a" and not before.calls
    same_texts(before.turn.speech.spoken, plain.turn.speech.spoken[:1])
    assert len(reply(either, said, stop="stop", return_audio=False).calls) == 1


def test_stop_strings_in_a_token_that_a_call_shares(either: OmniModel) -> None:
    model = with_tokens(either, "o!<tool_call>")
    script = [*spelled(either, "Hell"), model.processor.tokenizer.convert_tokens_to_ids("o!<tool_call>")]
    got = reply(model, [*script, *spelled(either, TIME[11:])], stop="!")
    assert got.shown == "Hello" and not got.calls and got.end.reason in ("stop", "max_frames")
    same_texts(got.turn.speech.spoken, reply(model, spelled(either, "Hello"), tools=False).turn.speech.spoken)
    assert model.processor.decode(got.turn.text.kept) == "Hello"


def test_a_stop_string_inside_an_id_of_a_torn_token(model: OmniModel) -> None:
    torn = with_tokens(model, "x speech<tool_call>")
    script = [torn.processor.tokenizer.convert_tokens_to_ids("x speech<tool_call>"), *spelled(model, TIME[11:])]
    got = reply(torn, script, stop="ech")
    assert got.shown == "x spe" and not got.calls
    assert torn.processor.decode(got.turn.speech.spoken) == torn.processor.decode(got.turn.text.kept) == "x spe"


def test_reasoning_stays_reasoning(model: OmniModel) -> None:
    start, end = model.processor.think_token_ids
    thought = spelled(model, f"I could call {WEATHER}")
    got = reply(model, [start, *thought, end, *spelled(model, "\n\n"), *encode(model, f"So:{TIME}")])
    assert got.shown == got.end.text == "So:" and [name for name, *_ in got.calls] == ["time"]
    assert got.turn.text.reasoning == f"I could call {WEATHER}"
    only = reply(model, [start, *spelled(model, "x"), end, *encode(model, f"\n\n{TIME}")])
    assert only.shown == "" and not only.turn.speech.codes and len(only.calls) == 1


def test_rows_of_a_batch_and_broken_characters(either: OmniModel) -> None:
    """Each row tells its own calls; bytes that never become a character are no calls."""
    inputs = either.processor(BATCH)
    broken = [*"é".encode()[:1], *encode(either, TIME), *"é€".encode()[:4]]  # the toy's ids of bytes
    arguments = {**ARGUMENTS, "max_new_tokens": 60}
    with writing(either, broken):
        events = list(generation.stream(either, inputs, tools=True, **arguments))
    for row in range(3):
        own = [e for e in events if e.row == row]
        assert sum(isinstance(e, ToolCall) for e in own) == 1
        assert "".join(e.text for e in own if isinstance(e, TextDelta)) == own[-1].text
        assert "tool" not in own[-1].text and "{" not in own[-1].text


def test_an_open_call_is_not_kept(either: OmniModel) -> None:
    """What counts of a reply that is interrupted: nothing of a call that is not complete."""
    script = spelled(either, f"Hi{TIME}Yo{WEATHER}")
    with writing(either, script):
        args = resolve(either, 1, **{**ARGUMENTS, "tools": True, "return_audio": False})
        rows = generation.start(either, either.processor(chat("hi")), args, StreamingConfig())
        kept = set()
        while rows.running():
            rows.tick()
            if not rows.turns[0].text.reason:
                kept.add(either.processor.decode(rows.turns[0].text.kept, skip_special_tokens=False))
    texts = {"H", "Hi", f"Hi{TIME}", f"Hi{TIME}Y", f"Hi{TIME}Yo", f"Hi{TIME}Yo{WEATHER}"}
    assert kept == texts


@pytest.mark.parametrize("given", ["<tool_call>", '<tool_call>\n{"name":', f"Ok.{TIME}\n<tool_call>\n"])
def test_a_call_that_the_prompt_has_begun(either: OmniModel, given: str) -> None:
    said = "".join(f"<tool_call>{TIME[11:]}".removeprefix(given.rpartition("</tool_call>\n")[2]))
    inputs = either.processor([*chat("hi", given)], continue_final_message=True)
    with writing(either, encode(either, f"{said}{WEATHER} Yes")):
        events = list(generation.stream(either, inputs, tools=True, **ARGUMENTS))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == events[-1].text == " Yes"
    assert [e.name for e in events if isinstance(e, ToolCall)] == ["time", "weather"]


def test_a_reply_that_its_limit_ends_where_a_call_may_begin(either: OmniModel) -> None:
    script = spelled(either, "Hi<tool")
    got, plain = (reply(either, script, tools=tools, max_new_tokens=len(script)) for tools in (True, False))
    assert got.shown == plain.shown == "Hi<tool" and got.end.reason == plain.end.reason
    same_texts(got.turn.speech.spoken, plain.turn.speech.spoken)


def test_a_model_without_words_cannot_look_for_calls(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = model.processor(chat("x"))
    monkeypatch.setattr(model, "processor", None)
    with pytest.raises(ValueError, match=r"tools need text.*model\.processor"):
        generation.stream(model, inputs, tools=True, **{**ARGUMENTS, "return_audio": False})
