"""A session's ids are the processor's on the same conversation: where tokens merge, and where the template begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import (
    SIZES,
    TOY_DATA,
    config_values,
    fixed,
    make_token2wav,
    make_voice,
    speckle,
    tiny_config,
    tone,
    widen,
    write_processor,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from omni import Item, OmniConfig, OmniEngine, OmniModel, OmniProcessor, OmniSession, TextDelta
from omni.processing.template import ChatTokenizer, built_in_template

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
PIECES = ("\n", " ", "l", "list", "user", "\n\n", "\r\n", "  ", "<|im_end|>", "\u0301", "one two", "system\n", "")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
# Pairs that a tokenizer without a rule for words would merge across the end of a turn's header.
LOOSE = (("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"), ("Ċ", "l"), ("Ċ", "č"), ("ĊĠ", "Ġ"))
TIGHT = (*LOOSE, ("user", "Ċ"), ("userĊ", "Ċ"), ("system", "Ċ"), ("systemĊ", "Ġ"), ("assistant", "Ċ"))
TEMPLATES: dict[str, tuple[str, str]] = {  # what to replace in the chat template, and by what
    "as it is": ("", ""),
    "a system text of two lines": ("You are a helpful assistant.", "\n\n You are many.\n"),
    "a line before the first turn": (
        "{%- for message in messages -%}",
        "{{ 'chat\\n' }}{%- for message in messages -%}",
    ),
    "no default": ("loop.first and", "false and"),
}


def merging(folder: Path, merges: tuple[tuple[str, str], ...]) -> None:
    """Let the tokenizer of a folder merge more, and across words."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["pre_tokenizer"] = {**values["pre_tokenizer"]["pretokenizers"][1]}
    for left, right in merges:
        values["model"]["vocab"][left + right] = len(values["model"]["vocab"])
        values["model"]["merges"].append([left, right])
    path.write_text(json.dumps(values), encoding="utf-8")


def first_model(folder: Path, merges: tuple[tuple[str, str], ...] = ()) -> OmniModel:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((TOY_DATA / name).read_text(encoding="utf-8"), encoding="utf-8")
    merging(folder, merges)
    with fixed():
        model = widen(OmniModel(tiny_config()), 10)
    model.processor = OmniProcessor.from_pretrained(folder)
    return model


def second_model(
    folder: Path, merges: tuple[tuple[str, str], ...] = (), template: tuple[str, str] = ("", "")
) -> OmniModel:
    values = config_values(3, audio={"n_window": 20}, vision={}, vocabulary=640)
    values |= {"system_token_id": 276, "token2wav_config": SIZES}
    write_processor(folder)
    if merges:
        merging(folder, merges)
    path = folder / "chat_template.json"
    written = json.loads(path.read_text())["chat_template"]
    path.write_text(json.dumps({"chat_template": written.replace(*template) if template[0] else written}))
    with fixed():
        model = widen(OmniModel(OmniConfig.from_dict(values)), 10)
    model.code2wav, model.voices = make_token2wav(), {"eve": make_voice(1)}
    model.processor = OmniProcessor.from_pretrained(folder)
    model.processor.vision.frame_pixels = (56 * 56, 56 * 56)
    return model


@pytest.fixture(scope="module", params=["first", "first, tight", "second", "second, tight"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """Models of both families whose tokenizers merge across a header, also with its role ("tight")."""
    make: Callable[..., OmniModel] = first_model if request.param.startswith("first") else second_model
    return make(tmp_path_factory.mktemp("files") / "own", TIGHT if "tight" in request.param else LOOSE)


def asked(session: OmniSession) -> list[int]:
    """The prompt of a reply of which nothing is kept."""
    events = session.respond(max_new_tokens=1, return_audio=False)
    prompt = session.ids
    events.close()
    return prompt


def put(session: OmniSession, item: Any) -> None:
    """Push an item of a message."""
    if item["type"] == "text":
        session.push_text(item["text"])
    elif item["type"] == "audio":
        session.push_audio(item["audio"])
    else:
        session.push_image(item["image"])


SOUND, PICTURE = {"type": "audio", "audio": tone(0.2)}, {"type": "image", "image": speckle(32, 32)}
ITEMS = TEXTS.map(lambda text: {"type": "text", "text": text}) | st.sampled_from((SOUND, PICTURE))
TURNS = st.tuples(st.lists(ITEMS, max_size=4), st.sampled_from(("", "fine", "a list.", "yes\nno")))


def split_clips(content: list[Any]) -> list[Any]:
    """A message's items, with a text between two clips, which in a session would be one."""
    out: list[Any] = []
    for item in content:
        if item.get("text") == "":
            continue
        if out and out[-1]["type"] == item["type"] == "audio":
            out.append({"type": "text", "text": "\n"})
        out.append(item)
    return out


@settings(max_examples=12)
@given(system=st.none() | TEXTS, turns=st.lists(TURNS, min_size=1, max_size=3))
def test_ids_are_the_processor_s(model: OmniModel, system: str | None, turns: list[Any]) -> None:
    session, processor = OmniSession(model, system=system), model.processor
    messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    for content, reply in turns:
        content = split_clips(content)
        for item in content:
            put(session, item)
        messages.append({"role": "user", "content": content or ""})
        assert asked(session) == processor(messages).input_ids[0].tolist()
        session.replace(session.items[-1].id, Item(role="assistant", parts=reply))  # as if it had been said
        messages.append({"role": "assistant", "content": reply})


@pytest.mark.parametrize("text", ["\nlist", "\n", "\n\n\nthree", " one", "list", ""])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_text_that_meets_the_line_break_of_its_header(tmp_path: Path, text: str, role: str) -> None:
    model = first_model(tmp_path / "own", LOOSE)
    session = OmniSession(model, system=text if role == "system" else None)
    messages = [{"role": "system", "content": text}] if role == "system" else []
    session.push_text(said := "x" if role == "system" else text)
    messages.append({"role": "user", "content": said})
    assert asked(session) == model.processor(messages).input_ids[0].tolist()


@pytest.mark.parametrize("how", ["fork", "save", "drop", "empty sound", "pieces"])
def test_the_header_s_line_break_waits_for_what_follows(tmp_path: Path, how: str) -> None:
    model = first_model(tmp_path / "own", LOOSE)
    session = OmniSession(model)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": ""}]
    for _ in range(2):
        session.push_text("one")
        asked(session)
    session.push_text("")
    if how == "fork":
        session = session.fork()
    elif how == "save":
        session.save(tmp_path / "kept")
        session = OmniSession.load(tmp_path / "kept", model)
    elif how == "drop":
        session.drop_oldest_turns()
        messages = messages[:2]
    elif how == "empty sound":
        session.push_audio([])
    for piece in ("\n", "list") if how == "pieces" else ("\nlist",):
        session.push_text(piece)
    messages = [*messages, *([] if how == "drop" else messages), {"role": "user", "content": "\nlist"}]
    assert asked(session) == model.processor(messages).input_ids[0].tolist()


@pytest.mark.parametrize("where", ["alone", "in an engine", "loaded", "forked"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "be brief", "\n be brief"])
def test_a_session_begins_as_the_template_begins(tmp_path: Path, name: str, system: str | None, where: str) -> None:
    model = second_model(tmp_path / "files", LOOSE, TEMPLATES[name])
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompt = model.processor([*messages, {"role": "user", "content": "hello"}]).input_ids[0].tolist()
    with OmniEngine(model, max_sessions=1) as engine:
        session: OmniSession = (
            engine.session(system=system) if where == "in an engine" else OmniSession(model, system=system)
        )
        if where == "loaded":
            session.save(tmp_path / "kept")
            session = OmniSession.load(tmp_path / "kept", model)
        elif where == "forked":
            session = session.fork()
        session.push_text("hello")
        assert asked(session) == prompt
        session.push_text("hello")
        session.drop_oldest_turns()  # the beginning stays
        assert asked(session) == prompt


def test_the_default_system_text_is_warned_about_once_where_speech_needs_another(tmp_path: Path) -> None:
    model = second_model(tmp_path / "files")
    with pytest.warns(UserWarning, match="speech may fail") as caught:
        for _ in range(2):
            OmniSession(model).push_text("hello")
    assert len(caught) == 1


WORDS = {
    "one letter of the role": AddedToken("a"),
    "its first letters": AddedToken("ass"),
    "its end": AddedToken("istant", rstrip=True),
    "it, with what follows": AddedToken("assistant", rstrip=True),
    "a line break": AddedToken("\n", single_word=True),
}


@pytest.mark.parametrize("prefill", [None, "A list.", "\nlist"])
@pytest.mark.parametrize("name", WORDS)
def test_added_words_that_change_the_header_s_tokens(tmp_path: Path, name: str, prefill: str | None) -> None:
    model = first_model(tmp_path / "own", LOOSE)
    processor = model.processor
    processor.tokenizer.add_tokens([WORDS[name]])
    messages = [{"role": "user", "content": "one two"}]
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    inputs = processor(messages, continue_final_message=prefill is not None)
    session = OmniSession(model)
    session.push_text("one two")
    events = session.respond(max_new_tokens=1, return_audio=False, prefill=prefill)
    assert session.ids == inputs.input_ids[0].tolist()
    events.close()
    if prefill is not None:
        reply = inputs.input_ids[0, int(inputs.reply_start[0]) :]
        assert processor.decode(reply).strip("\n") == prefill.strip("\n")


@pytest.mark.parametrize("given", ["<think>\n", "<think>\n\n</think>\n\n", "Well, "])
@pytest.mark.parametrize("where", ["alone", "in an engine"])
def test_a_reply_begins_as_the_template_begins_it(tmp_path: Path, given: str, where: str) -> None:
    usual = "{{- '<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking"
    template = built_in_template()
    assert usual in template
    model = first_model(tmp_path / "own")
    new = usual.replace("assistant\\n", "assistant\\n" + given.replace("\n", "\\n"))
    model.processor.chat = ChatTokenizer(model.processor.tokenizer, template.replace(usual, new))
    messages = [{"role": "user", "content": "one two"}]
    inputs = model.processor(messages)
    with OmniEngine(model, max_sessions=1) as engine:
        session = engine.session() if where == "in an engine" else OmniSession(model)
        session.push_text("one two")
        assert asked(session) == inputs.input_ids[0].tolist()
        session.push_text("one two")
        told = [e.reasoning for e in session.respond(max_new_tokens=2, return_audio=False) if isinstance(e, TextDelta)]
    assert set(told) <= {given == "<think>\n"}
