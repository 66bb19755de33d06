"""Answers as training learns them: whole, whatever the chat template leaves out.

Some templates drop reasoning: that of earlier turns, or all of it where a question is no plain text. What is left would
be learnt without a word, so the text between an answer's header and its end is compared with what the row says.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from omni.processing.processor import OmniProcessor

_BREAKS = re.compile(r"\A\s*[\r\n]+")
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def without_opening_breaks(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """An assistant message whose text does not begin with blank lines; items of text that open it are one text."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, (str, list, tuple)):
        return message
    if isinstance(content, str):
        return {**message, "content": _BREAKS.sub("", content)}
    items, text = list(content), ""
    while items and (own := _text_of(items[0])) is not None:
        text, items = text + own, items[1:]
    text = _BREAKS.sub("", text)
    if not items:
        return {**message, "content": text}
    return {**message, "content": [{"type": "text", "text": text}, *items] if text else items}


def whole_answer(ids: Sequence[int], message: Mapping[str, Any], processor: OmniProcessor) -> list[int]:
    """Ids of an answer, its end included, with the reasoning of its message if the template has left it out.

    Raises ValueError where the answer lacks anything else that the message says.
    """
    reasoning, texts, calls = _target(message)
    written, thought = _squeezed(processor.decode(ids, skip_special_tokens=False)), _squeezed(reasoning)
    at = written.find(thought) if thought else 0
    reasoned = at >= 0 and _missing(written, texts, at + len(thought)) is None
    if not reasoned and (text := _missing(written, texts, 0)) is not None:
        raise ValueError(
            f"the chat template wrote {written[:60]!r} for an answer that says {text[:60]!r}; use one that writes "
            "answers as they are"
        )
    for call in calls:
        if not any(_squeezed(form) in written for form in _forms(call)):
            raise ValueError(f"the chat template leaves {call!r} of a tool call out; use one that writes tool calls")
    return list(ids) if reasoned else _with_reasoning(ids, reasoning, processor)


def _missing(written: str, texts: Sequence[str], at: int) -> str | None:
    """The first of the texts that does not follow the one before it in what was written, from `at` on."""
    for text in texts:
        found = written.find(_squeezed(text), at)
        if found < 0:
            return text
        at = found + len(_squeezed(text))
    return None


def _with_reasoning(ids: Sequence[int], reasoning: str, processor: OmniProcessor) -> list[int]:
    """The ids with the reasoning before them, as released templates write it; an empty block gives way to it."""
    body, think = list(ids), processor.think_token_ids
    if think is not None and body[:1] == [think[0]] and think[1] in body:
        end = body.index(think[1])
        body = body if processor.decode(body[1:end]).strip() else body[end + 1 :]
    control = set(processor.chat.added_ids.values())
    edge = next((i for i, token in enumerate(body) if token in control), len(body))
    thought, text = f"\n{reasoning.strip()}\n", processor.decode(body[:edge])
    text = "\n\n" + (text.lstrip("\n") or text)
    if think is None:
        return [*processor.encode_text(f"<think>{thought}</think>{text}"), *body[edge:]]
    return [think[0], *processor.encode_text(thought), think[1], *processor.encode_text(text), *body[edge:]]


def _target(message: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """What an answer says: its reasoning, its texts between media, and names and values of its tool calls."""
    content = message.get("content")
    items = [content] if isinstance(content, str) else content if isinstance(content, (list, tuple)) else []
    texts = [text for item in items if (text := _text_of(item))]
    reasoning = message.get("reasoning_content") or ""
    thought = _THOUGHT.match(texts[0]) if texts and not reasoning else None
    if thought is not None:
        reasoning, texts[0] = thought[1], texts[0][thought.end() :]
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(ValueError):  # else it is written as it is
                arguments = json.loads(arguments)
        calls += [str(function.get("name", "")), *_leaves(arguments)]
    return str(reasoning), texts, calls


def _text_of(item: Any) -> str | None:
    """The text of an item of content, None for media."""
    if isinstance(item, Mapping) and item.get("type", "text") == "text" and isinstance(item.get("text"), str):
        return item["text"]
    return item if isinstance(item, str) else None


def _leaves(value: Any) -> Iterator[str]:
    """Keys and texts inside a call's arguments; numbers have more than one spelling."""
    if isinstance(value, Mapping):
        yield from (str(key) for key in value)
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _leaves(item)
    if isinstance(value, str):
        yield value


def _forms(text: str) -> tuple[str, ...]:
    """A text as it may stand in a template's JSON."""
    plain, ascii_only = (json.dumps(text, ensure_ascii=flag)[1:-1] for flag in (False, True))
    return text, plain, ascii_only, re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", plain)


def _squeezed(text: str) -> str:
    """Without blanks, which templates strip and add, in the normal form that tokenizers may bring about."""
    return "".join(unicodedata.normalize("NFKC", text).split())
