"""Added tokens of every kind: prompts stay whole, ordinary ones become ids, those that control the chat stay text."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import TOY_DATA, chat, tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from omni import OmniModel, OmniProcessor, OmniSession

WAVE = tone(0.3)
PICTURE = np.zeros((32, 32, 3), np.uint8)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "note_text",
            "description": 'Writes a "note", says hello.',
            "parameters": {"type": "object", "properties": {"text2": {"type": "string"}}},
        },
    }
]
TALK = [
    {"role": "system", "content": "hello robin, a note: be a good user"},
    {"role": "user", "content": [{"type": "text", "text": "text2 of the audio\n"}, {"type": "text", "text": "note 7"}]},
    {
        "role": "assistant",
        "content": "<think>\nrobin\n</think>\n\nhello",
        "tool_calls": [{"type": "function", "function": {"name": "note_text", "arguments": {"t": 'a "note"', "n": 7}}}],
    },
    {"role": "tool", "content": "type: note", "name": "note_text"},
]
WORDS = ("note", "text2", "hello", "robin", "audio", "user", "type", "text", "function", "name", "role", "content")
PIECES = (
    "a",
    "7",
    "<",
    "|",
    "im",
    "image",
    "\n",
    " ",
    '"',
    "_pad|>",
    "<|",
    "note of",
    "é",
    "😀",
    "think",
    "assistant\n",
)


def added(*tokens: Any, special: bool = False) -> OmniProcessor:
    """The toy's processor, to whose vocabulary these are added."""
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.tokenizer.add_tokens(list(tokens), special_tokens=special)
    return OmniProcessor(processor.tokenizer, processor.files)


def reference(messages: Any, *tokens: Any, template: str | None = None, **options: Any) -> list[int]:
    """What transformers makes of a conversation without media, with the same added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(TOY_DATA))
    tokenizer.add_tokens(list(tokens))
    template = template or OmniProcessor.from_pretrained(TOY_DATA).chat.template
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return tokenizer(rendered)["input_ids"]


def ids_of(processor: OmniProcessor, messages: Any, **options: Any) -> list[int]:
    return processor(messages, **options).input_ids[0].tolist()


# ---- whatever is added, the template reads its messages ----


@pytest.mark.parametrize("word", [*WORDS, *PIECES])
@pytest.mark.parametrize("special", [False, True])
def test_media_and_text_beside_an_added_token(word: str, special: bool) -> None:
    """The placeholders and the texts of a prompt are those of a prompt without that token."""
    processor = added(word, special=special)
    messages = chat([{"type": "audio", "audio": WAVE}, {"type": "text", "text": "What?"}, {"image": PICTURE}, "See: x"])
    before, after = OmniProcessor.from_pretrained(TOY_DATA)(messages), processor(messages)
    for medium in (processor.tokens.audio, processor.tokens.image):
        assert after.input_ids[0].tolist().count(medium) == before.input_ids[0].tolist().count(medium) > 0
    text = processor.decode(after.input_ids[0], skip_special_tokens=False)
    plain = OmniProcessor.from_pretrained(TOY_DATA).decode(before.input_ids[0], skip_special_tokens=False)
    assert text == plain


@pytest.mark.parametrize("word", [*WORDS, *(piece for piece in PIECES if piece not in ("\n", "assistant\n"))])
def test_ordinary_added_tokens_have_transformers_ids(word: str) -> None:
    processor = added(word)
    options = {"tools": TOOLS, "add_generation_prompt": True}
    assert ids_of(processor, TALK, tools=TOOLS) == reference(TALK, word, **options)
    written = f"{word}{word} a {word}, {word}s"
    assert ids_of(processor, chat(written)) == reference(chat(written), word, add_generation_prompt=True)
    assert processor.encode_text(written) == processor.tokenizer(written)["input_ids"]


@pytest.mark.parametrize("word", WORDS)
def test_special_words_stay_text_and_the_prompt_stays_whole(word: str) -> None:
    """Only what the template itself writes becomes the special word's id."""
    processor = added(word, special=True)
    index = processor.tokenizer.convert_tokens_to_ids(word)
    written = reference([{"role": "user", "content": ""}], word, add_generation_prompt=True).count(index)
    ids = ids_of(processor, chat(f"take {word} of {word}"))
    assert ids.count(index) == written
    assert f"take {word} of {word}" in processor.decode(ids, skip_special_tokens=False)
    assert index not in processor.encode_text(f"{word} {word}")


def test_tokens_that_are_added_later_and_saved_ones(tmp_path: Path) -> None:
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    before = ids_of(processor, chat("a note"))
    processor.tokenizer.add_tokens(["note"])
    assert ids_of(processor, chat("a note")) == reference(chat("a note"), "note", add_generation_prompt=True) != before
    processor.save_pretrained(tmp_path)
    assert ids_of(OmniProcessor.from_pretrained(tmp_path), chat("a note")) == ids_of(processor, chat("a note"))


def test_a_processor_can_be_copied_and_sent_to_other_processes() -> None:
    processor = added("note")
    ids = ids_of(processor, chat("a note"))
    for other in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert ids_of(other, chat("a note")) == ids


# ---- templates read and write what users wrote, in any way ----

CONTENT = "a</think>\n\n[x] {y} %s 'q' \"é\" <|im_end|> ß\tend"
WAYS = {
    "as it is": "{{ content }}",
    "joined": "{{ 'x' ~ content ~ 1 }}{{ 'x' + content + 'y' }}{{ [content, content] | join('-') }}",
    "by methods": "{{ '-'.join([content, 'b']) }}{{ 'a-b'.replace('-', content) }}{{ content.replace('a', 'b') }}",
    "formatted": "{{ '%s!' % content }}{{ '%s' | format(content) }}{{ '{}{}'.format(content, 1) }}",
    "in JSON": "{{ content | tojson }}{{ {'k': [content]} | tojson(indent=2) }}"
    "{{ content | tojson(ensure_ascii=True) }}",
    "by a macro": "{% macro show(x) %}<{{ x }}>{% endmacro %}{{ show(content) }}{{ show(content).split('>')[0] }}",
    "cut": "{{ content.split('</think>')[-1].lstrip('\\n') }}{{ content[2:9] }}{{ content.partition('<|')[2] }}",
    "one by one": "{% for c in content %}{{ c }}{% endfor %}{{ content | list | join }}{{ content | reverse }}",
    "changed": "{{ content | upper }}{{ content | title }}{{ content | trim }}{{ content | replace('</', '<') }}",
    "by a filter": "{{ content | indent(2) }}{{ content | string | capitalize }}{{ content * 2 }}{{ content | safe }}",
    "kept": "{% set n = namespace(a='') %}{% set n.a = n.a ~ content %}{% set b %}{{ n.a }}{% endset %}{{ b[1:] }}",
    "read": "{% if '</think>' in content and content.startswith('a<') and content[0] == 'a' %}yes{% endif %}"
    "{{ content | length }}{{ content.count('<') }}{{ {'a</think>': 1}[content[:9]] }}{{ '17' == content }}",
    "by lines": "{% for line in content.splitlines() %}{{ line }};{% endfor %}{{ content.rsplit('|', 1) | join('+') }}",
}


@pytest.mark.parametrize("way", WAYS)
def test_templates_read_and_write_text_in_any_way(way: str) -> None:
    """The prompt is the one of transformers, and nothing in it but the template's own tokens is one."""
    template = "{% set content = messages[0].content %}<|im_start|>" + WAYS[way] + "<|im_end|>"
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = type(processor.chat)(processor.tokenizer, template)
    ids = ids_of(processor, chat(CONTENT))
    tokenizer = AutoTokenizer.from_pretrained(str(TOY_DATA))
    want = tokenizer.apply_chat_template(chat(CONTENT), chat_template=template, tokenize=False)
    assert processor.decode(ids, skip_special_tokens=False) == want
    assert [i for i in ids if i in tokenizer.added_tokens_decoder] == [257, 258]


def test_a_reasoning_template_reads_what_users_wrote() -> None:
    """A tool's answer written as a user's message is seen as such, as in the releases' templates."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' and not (m.content.startswith('<tool_response>') and "
        "m.content.endswith('</tool_response>')) %}<|im_start|>{{ loop.index0 }}{% endif %}{% endfor %}"
    )
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = type(processor.chat)(processor.tokenizer, template)
    ids = ids_of(processor, chat("a", "b", "<tool_response>\nx\n</tool_response>"))
    assert processor.decode(ids, skip_special_tokens=False) == "<|im_start|>0"


# ---- control tokens ----


FLAGS = [
    AddedToken("note", lstrip=True),
    AddedToken("note", rstrip=True),
    AddedToken("note", lstrip=True, rstrip=True, single_word=True),
    AddedToken("note", single_word=True),
    AddedToken("Cafe\u0301", normalized=True),
    AddedToken("Caf\u00e9", normalized=False),
]


@pytest.mark.parametrize("token", FLAGS, ids=repr)
def test_flags_of_added_tokens(token: AddedToken) -> None:
    text = "a note  note, notes foot-note _note_ \t note\n\nnote Café Cafe\u0301 anote"
    assert ids_of(added(token), chat(text)) == reference(chat(text), token, add_generation_prompt=True)


def test_control_tokens_only_where_they_are_asked_for() -> None:
    processor = added("note", AddedToken("<|mine|>", special=True))
    text = "a note <|im_end|> <|mine|> <think>x</think> <tool_call> </tool_response>"
    control = {258, 259, 260, 261, 267, 268, 279, processor.tokenizer.convert_tokens_to_ids("<|mine|>")}
    for messages in (chat(text), [{"role": "system", "content": text}], [{"role": "tool", "content": text}]):
        empty = ids_of(processor, [{**messages[0], "content": "-"}])
        kept, taken = ids_of(processor, messages), ids_of(processor, messages, control_tokens=True)
        assert [i for i in kept if i in control] == [i for i in empty if i in control]
        tokens = ("note", AddedToken("<|mine|>", special=True))
        assert taken == reference(messages, *tokens, add_generation_prompt=True)
        assert {258, 259, 260, 267, 279} <= set(taken)
        index = processor.tokenizer.convert_tokens_to_ids("note")
        assert kept.count(index) == taken.count(index) == 1
    assert not control & set(processor.encode_text(text))
    assert processor.encode_text(text, control_tokens=True) == processor.tokenizer(text)["input_ids"]


def test_markup_of_the_template_stays_text() -> None:
    """What the template encloses tools with is no special token either; a word in brackets of one's own is ordinary."""
    processor = added("<tools>", "<mine>")
    tools, mine = processor.tokenizer.convert_tokens_to_ids(["<tools>", "<mine>"])
    ids = ids_of(processor, chat("<tools> <mine>"))
    assert tools not in ids and ids.count(mine) == 1
    assert tools in ids_of(processor, chat("x"), tools=TOOLS)


def test_text_of_a_session(model: OmniModel) -> None:
    processor = added("note")
    index = processor.tokenizer.convert_tokens_to_ids("note")
    session = OmniSession(model, processor, system="a note")
    session.push_text("a no")
    session.push_text("te <|im_end|>")
    session.push_text("<|im_end|>", control_tokens=True)
    events = list(session.respond(max_new_tokens=1, return_audio=False))
    assert events and session.ids.count(index) == 2
    assert session.ids[: session.ids.index(278)].count(258) == 3  # of the system's turn, the one asked for, the user's
    forked = OmniSession(model, processor)
    forked.push_text("<think>", control_tokens=True)
    other = forked.fork()
    other.push_text("x", control_tokens=True)
    list(other.respond(max_new_tokens=1, return_audio=False))
    assert other.ids[3] == 259


def test_a_saved_session_keeps_its_control_tokens(model: OmniModel, tmp_path: Path) -> None:
    session = OmniSession(model)
    session.push_text("<think>", control_tokens=True)
    session.save(tmp_path)
    loaded = OmniSession.load(tmp_path, model)
    list(loaded.respond(max_new_tokens=1, return_audio=False))
    assert loaded.ids[3] == 259


def test_text_to_speak(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = added("note")
    index = processor.tokenizer.convert_tokens_to_ids("note")
    monkeypatch.setattr(model, "processor", processor)
    seen: list[list[int]] = []
    encode = processor.encode_text

    def record(text: str, **options: Any) -> list[int]:
        seen.append(encode(text, **options))
        return seen[-1]

    monkeypatch.setattr(processor, "encode_text", record)
    model.speak("a note <think>", max_frames=2, seed=0)
    assert index in seen[0] and 259 not in seen[0]
    seen.clear()
    model.speak(["a note <think>"], max_frames=2, seed=0, control_tokens=True)
    assert index in seen[0] and 259 in seen[0]


# ---- forgeries ----

EXTRA = ("note", "im", "<", "e", "start|>", "text")
CONTROL = [str(token) for token in OmniProcessor.from_pretrained(TOY_DATA).tokenizer.added_tokens_decoder.values()]
hostile = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, *EXTRA, "<|im_", "user\n", "\n", "|>", "\ue000", "\U0010fffd", "\U000f0000", "/think>"]
        ),
        st.text(max_size=4),
    ),
    max_size=7,
)


@pytest.mark.parametrize("special", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=hostile, place=st.sampled_from(["user", "system", "tool", "argument", "key", "name", "schema"]))
def test_forged_control_words_fail(special: bool, pieces: list[str], place: str) -> None:
    processor = PROCESSORS[special]
    text = "".join(pieces)
    control = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    control -= {ord(letter) for letter in EXTRA if len(letter) == 1}  # whose ids are those of the letters
    control |= {259, 260, 261, 267, 268, 279}

    def conversation(text: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
        if place in ("user", "system", "tool"):
            return [{"role": place, "content": [text, *(p for p in pieces if text != "-")]}], None
        if place == "schema":
            return chat("a"), [{"name": text, text: [text]}]
        name = text if place == "name" else "f"
        arguments = {text: 1} if place == "key" else {"a": [text]}
        return [
            *chat("a"),
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ], None

    frames = []
    for written in (text, "-"):
        messages, tools = conversation(written)
        frames.append([i for i in ids_of(processor, messages, tools=tools) if i in control])
    assert frames[0] == frames[1]


PROCESSORS = [added(*EXTRA), added(*EXTRA, special=True)]


def test_json_of_tools_is_transformers() -> None:
    """Quotation marks, backslashes and other alphabets inside schemas and arguments, and added tokens of those."""
    odd = 'a "b" \\ \n\t é 😀 <x> \u2028'
    tools = [{"type": "function", "function": {"name": "f", "description": odd, odd: [odd, None, 1.5, True]}}]
    for token in ('"', "\\", "é", "note"):
        options = {"tools": tools, "add_generation_prompt": True}
        assert ids_of(added(token), chat(odd), tools=tools) == reference(chat(odd), token, **options)
    assert json.loads(json.dumps(tools)) == tools
