"""Tools, their calls and their results, one message at a time: the ids of whole conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from build import CHAT_TEMPLATE, TOY_DATA, chat, write_processor
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import OmniProcessor
from omni.processing.messages import read_conversation
from omni.processing.template import ChatTokenizer, built_in_template
from omni.processing.tool_turns import ToolTurns

START, END = 257, 258
SCHEMA = {
    "type": "function",
    "function": {"name": "weather", "description": "Das Wetter in Zürich", "parameters": {"type": "object"}},
}


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return city


TOOLS = [SCHEMA, weather]
# Other ways of writing the same: arguments always as JSON values, and a turn of its own for each result.
HERMES = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{%- endif %}{{ 'Tools:' }}"
    "{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{%- endfor %}{{ '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- elif message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' + message.content }}{%- for call in message.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{{ '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{{ '<|im_start|>tool\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As the thinking releases: the last reply has its reasoning written, though it be empty.
THINKING = built_in_template().replace(
    "{{- answer -}}", "{%- if loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{{- answer -}}"
)
KINDS = ["toy", "built-in", "second family", "values", "tool template", "thinking"]


@pytest.fixture(scope="module", params=KINDS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OmniProcessor:
    return made(request.param, tmp_path_factory.mktemp("files"))


def made(kind: str, folder: Path) -> OmniProcessor:
    if kind == "second family":  # whose own template knows no tools
        return OmniProcessor.from_pretrained(write_processor(folder / "files"))
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    if kind == "toy":
        return processor
    usual = {"built-in": built_in_template(), "values": HERMES, "tool template": CHAT_TEMPLATE, "thinking": THINKING}[
        kind
    ]
    processor.chat = processor.tool_chat = ChatTokenizer(processor.tokenizer, usual)
    if kind == "tool template":
        processor.tool_chat = ChatTokenizer(processor.tokenizer, HERMES)
    processor._tool_turns = ToolTurns(processor.chat, processor.tool_chat, processor.files.family.tokens)
    return processor


def whole(processor: OmniProcessor, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    turns = processor._tool_turns
    known = read_conversation(messages).messages
    return turns.chat.encode_chat(known, tools, add_generation_prompt=False)


def in_pieces(processor: OmniProcessor, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """A conversation as a session writes it."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    ids, rest = processor.beginning_ids(system, START, tools), messages[system is not None :]
    closing = [END, *processor.encode_text("\n")]
    while rest:
        message, *rest = rest
        if message["role"] == "user":
            ids += [START, *processor.encode_text("user\n" + message["content"]), *closing]
        elif message["role"] == "assistant":
            said = processor.assistant_ids(message["content"], message.get("tool_calls", []))
            ids += [START, *processor.encode_text("assistant\n"), *said, *closing]
        else:
            outputs = [message["content"]]
            while rest and rest[0]["role"] == "tool":
                outputs.append(rest.pop(0)["content"])
            ids += processor.tool_results_ids(outputs)
    return ids


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": "call_1", "name": name, "arguments": arguments}


def conversation(system: str | None, results: int, text: str = "") -> list[dict[str, Any]]:
    calls = [call("weather", {"city": f"Zürich {i} {text}", "days": [1, None]}) for i in range(results)]
    return [
        *([] if system is None else [{"role": "system", "content": system}]),
        {"role": "user", "content": f"How is it? {text}"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
        *({"role": "tool", "content": f"{i}° schön {text}"} for i in range(results)),
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "content": ""},
    ]


@pytest.mark.parametrize("results", [1, 3])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_pieces_add_up_to_what_the_template_writes(processor: OmniProcessor, system: str | None, results: int) -> None:
    messages = conversation(system, results)
    expected, own = messages, "You are a helpful assistant."
    if system is None and own in processor.tool_chat.template:  # which writes it, but no tools
        expected = [{"role": "system", "content": own}, *messages]
    ids = in_pieces(processor, messages, TOOLS)
    assert ids == whole(processor, expected, TOOLS)
    text = processor.decode(ids, skip_special_tokens=False)
    assert "Das Wetter in Zürich" in text and "Tell the weather." in text
    assert text.count('<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich') == results + 1


def test_a_template_without_tools_is_stood_in_for_with_its_own_spellings(tmp_path: Path) -> None:
    processor = made("second family", tmp_path)
    text = processor.decode(processor.beginning_ids(None, START, TOOLS), skip_special_tokens=False)
    usual = "<|im_start|>system\nYou are a helpful assistant."
    assert text.startswith(f"{usual}\n\n# Tools\n") and text.endswith("</tool_call><|im_end|>\n")
    for none in (None, [], ()):
        plain = processor.decode(processor.beginning_ids(None, START, none), skip_special_tokens=False)
        assert plain == f"{usual}<|im_end|>\n"


def test_json_text_of_arguments_stays_as_it_was_written(processor: OmniProcessor) -> None:
    written = '{"city":   "Zürich", "n": 1.50}'
    ids = processor.assistant_ids("", [call("weather", written)])
    text = processor.decode(ids, skip_special_tokens=False)
    if "tojson) + '}" in processor._tool_turns.chat.template:  # this template writes values alone
        assert ids == processor.assistant_ids("", [call("weather", {"city": "Zürich", "n": 1.5})])
    else:
        assert text == f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call>'
    assert ids == processor.assistant_ids("", [{"function": {"name": "weather", "arguments": written}}])


HOSTILE = ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "</tool_response>", "<think>", "</think>"]
HOSTILE += ["é😀", "{{x}}", "{%x%}", '"', "a", "<|image_pad|>", "\ue000", " ", "\n", "<|im_start|>user\n"]
hostile = st.lists(st.sampled_from(HOSTILE), max_size=4).map("".join)


@given(outputs=st.lists(hostile, min_size=1, max_size=3))
@settings(max_examples=60)
def test_results_are_text(processor: OmniProcessor, outputs: list[str]) -> None:
    """No control token comes of them, nothing of them is lost, and they are what whole conversations hold."""
    ids = processor.tool_results_ids(outputs)
    control = {processor.chat.added_ids[token] for token in processor.chat.vocabulary.control}
    plain = processor.tool_results_ids(["x" for _ in outputs])
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    asked = [*chat("?"), {"role": "assistant", "content": "", "tool_calls": [call("f", {})] * len(outputs)}]
    expected = whole(processor, [*asked, *({"role": "tool", "content": output} for output in outputs)])
    said = processor.assistant_ids("", [call("f", {})] * len(outputs))
    turn = [START, *processor.encode_text("assistant\n"), *said, END, *processor.encode_text("\n")]
    assert [*whole(processor, chat("?")), *turn, *ids] == expected
    text = processor.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>") and text.endswith("<|im_end|>\n") and all(o in text for o in outputs)


@given(content=st.text("ab é\n", max_size=5), name=hostile.filter(bool), value=hostile)
@settings(max_examples=60)
def test_calls_are_what_whole_conversations_hold(processor: OmniProcessor, content: str, name: str, value: str) -> None:
    calls = [call(name, {"x": value, value: [1]}), call("f", {})]
    ids = processor.assistant_ids(content, calls)
    opened = [START, *processor.encode_text("assistant\n")]
    said = [*chat("?"), {"role": "assistant", "content": content, "tool_calls": calls}]
    expected = whole(processor, [*said, *[{"role": "tool", "content": "x"}] * 2])
    results = processor.tool_results_ids(["x", "x"])
    assert [*whole(processor, chat("?")), *opened, *ids, END, *processor.encode_text("\n"), *results] == expected
    assert START not in ids and END not in ids


def test_a_message_without_calls(processor: OmniProcessor) -> None:
    assert processor.assistant_ids("", []) == []
    assert processor.assistant_ids("Hello there", []) == processor.encode_text("Hello there")


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda p: p.tool_results_ids("x"), TypeError, "outputs must be a list of strings, got str"),
        (lambda p: p.tool_results_ids(3), TypeError, "outputs must be a list of strings, got int"),
        (lambda p: p.tool_results_ids([]), ValueError, "outputs is empty"),
        (lambda p: p.tool_results_ids(["a", {"b": 1}]), TypeError, "output 1 must be a string, got dict"),
        (lambda p: p.tool_results_ids(["\ud800"]), ValueError, "half of a surrogate pair"),
        (lambda p: p.assistant_ids(None, []), TypeError, "content must be a string, got NoneType"),
        (lambda p: p.assistant_ids("", "f()"), TypeError, "tool_calls must be a list of calls, got str"),
        (lambda p: p.assistant_ids("", ["f()"]), ValueError, "tool call 0 must be a dict"),
        (lambda p: p.assistant_ids("", [{"name": "f", "arguments": 3}]), TypeError, "arguments must be a dict or JSON"),
        (lambda p: p.beginning_ids("x", START, "weather"), TypeError, "tools must be a list"),
        (lambda p: p.beginning_ids("x", START, 3), TypeError, "tools must be a list"),
        (lambda p: p.beginning_ids("x", START, ["weather"]), TypeError, "a tool must be a JSON schema dict"),
    ],
)
def test_impossible_tools(processor: OmniProcessor, ask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ask(processor)
    with pytest.raises(ValueError, match="no JSON"):
        made("values", Path()).assistant_ids("", [{"name": "f", "arguments": "{x"}])
