"""Conversations as the user writes them -> checked messages for the chat template, and their media in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config.keywords import nearest
from omni.processing.sources import decode_base64
from omni.processing.token_budget import TooLongError

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
_EMPTY_KEYS = frozenset({"refusal", "annotations", "audio", "function_call"})  # OpenAI replies carry them unset

_TYPES = {  # item type -> kind of medium
    "text": "text",
    "audio": "audio",
    "input_audio": "audio",
    "audio_url": "audio",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
_SOURCE_KEYS = {  # kind -> keys that may hold the medium
    "text": ("text",),
    "audio": ("audio", "input_audio", "audio_url", "url", "path"),
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path"),
}
_OPTIONS = {
    "text": (),
    "audio": ("sampling_rate", "audio_start", "audio_end"),
    "image": ("min_pixels", "max_pixels", "resized_height", "resized_width"),
    "video": (
        "fps",
        "min_pixels",
        "max_pixels",
        "total_pixels",
        "resized_height",
        "resized_width",
        "nframes",
        "min_frames",
        "max_frames",
        "video_start",
        "video_end",
        "use_audio_in_video",
    ),
}
_KIND_OF_KEY = {key: kind for kind, keys in _SOURCE_KEYS.items() for key in keys if key not in ("url", "path")}


@dataclass(frozen=True)
class Medium:
    """One audio clip, image or video of a conversation: the medium, and the options written beside it.

    where: its message and item, for errors.
    """

    kind: str
    source: Any
    options: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat template's form, and the media that its placeholders stand for, in order."""

    messages: list[dict[str, Any]]
    media: list[Medium]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors raised inside begin with the place: "conversation 2", "message 1, item 0"; "" leaves them alone."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if not where:
            raise
        kinds = (FileNotFoundError, PermissionError, OSError, TypeError, TooLongError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        mark = "," if str(error).startswith("message ") else ":"
        raise kind(f"{where}{mark} {error}") from error


def split_batch(messages: Any) -> list[list[Any]]:
    """One conversation or a list of them -> a list of conversations."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages must be a list of {{'role', 'content'}} dicts, or a list of such lists, "
            f"got {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty; give at least one message")
    if isinstance(messages[0], Mapping):
        return [list(messages)]
    for row, conversation in enumerate(messages):
        if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
            raise TypeError(f"conversation {row} must be a list of messages, got {type(conversation).__name__}")
        if not conversation:
            raise ValueError(f"conversation {row} is empty; give at least one message")
    return [list(conversation) for conversation in messages]


def read_conversation(messages: Sequence[Any]) -> Conversation:
    """Check one conversation. Raises TypeError or ValueError with the message's number and the nearest right word."""
    media: list[Medium] = []
    out = [_read_message(message, f"message {index}", media) for index, message in enumerate(messages)]
    return Conversation(out, media)


def _read_message(message: Any, where: str, media: list[Medium]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with 'role' and 'content', got {type(message).__name__}")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and not (key in _EMPTY_KEYS and not value):
            raise ValueError(f"{where} has the unknown key {key!r}; {nearest(str(key), _MESSAGE_KEYS)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has the unknown role {role!r}; {nearest(str(role), ROLES)}")
    out = {key: value for key, value in message.items() if key in _MESSAGE_KEYS and value is not None}
    if "tool_calls" in out:
        if role != "assistant":
            raise ValueError(f"{where}: only an assistant message may have tool_calls, its role is {role!r}")
        if not isinstance(out["tool_calls"], (list, tuple)):
            raise TypeError(f"{where}: tool_calls must be a list, got {type(out['tool_calls']).__name__}")
        out["tool_calls"] = [_read_call(call, f"{where}, tool call {i}") for i, call in enumerate(out["tool_calls"])]
    if "reasoning_content" in out and not isinstance(out["reasoning_content"], str):
        raise TypeError(f"{where}: reasoning_content must be a string, got {type(out['reasoning_content']).__name__}")
    if "content" not in out and not out.get("tool_calls"):
        raise ValueError(f"{where} ({role}) has no content; give a string or a list of items")
    out["content"] = _read_content(out.get("content", ""), where, media)
    return out


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must be a dict with 'function': {{'name', 'arguments'}}, got {call!r}")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, (str, Mapping)):
        raise TypeError(f"{where}: arguments must be a dict or JSON text, got {type(arguments).__name__}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _read_content(content: Any, where: str, media: list[Medium]) -> Any:
    """A string, or a list of items; a list of texts only is joined, as the templates write it."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise TypeError(f"{where}: content must be a string or a list of items, got {type(content).__name__}")
    items = [_read_item(item, f"{where}, item {index}") for index, item in enumerate(content)]
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) == len(items):
        return "".join(texts)
    out: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, str):
            out.append({"type": "text", "text": item})
        else:
            media.append(item)
            out.append({"type": item.kind, item.kind: item.kind})  # the template needs the key, not the medium
    return out


def _read_item(item: Any, where: str) -> str | Medium:
    """A text, or a medium with its options."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(f"{where} must be a string or a dict, got {type(item).__name__}")
    kind = _kind_of(item, where)
    sources = [key for key in _SOURCE_KEYS[kind] if item.get(key) is not None]
    if len(sources) != 1:
        unknown = [key for key in item if key not in (*_SOURCE_KEYS[kind], *_OPTIONS[kind], "type")]
        if unknown:
            raise ValueError(
                f"{where} ({kind}) has the unknown key {unknown[0]!r}; {nearest(str(unknown[0]), _keys(kind))}"
            )
        raise ValueError(
            f"{where} ({kind}) must have one of the keys {', '.join(_SOURCE_KEYS[kind])}, got "
            f"{' and '.join(sources) or 'none'}"
        )
    for key in item:
        if key not in ("type", sources[0], *_OPTIONS[kind]) and item[key] is not None:
            raise ValueError(f"{where} ({kind}) has the unknown key {key!r}; {nearest(str(key), _keys(kind))}")
    if kind == "text":
        if not isinstance(item["text"], str):
            raise TypeError(f"{where}: text must be a string, got {type(item['text']).__name__}")
        return item["text"]
    options = {key: item[key] for key in _OPTIONS[kind] if item.get(key) is not None}
    return Medium(kind, _unwrap(sources[0], item[sources[0]], where), options, where)


def _keys(kind: str) -> tuple[str, ...]:
    return (*_SOURCE_KEYS[kind], *_OPTIONS[kind], "type")


def _kind_of(item: Mapping[str, Any], where: str) -> str:
    if "type" in item:
        if not isinstance(item["type"], str) or item["type"] not in _TYPES:
            raise ValueError(f"{where} has the unknown type {item['type']!r}; {nearest(str(item['type']), _TYPES)}")
        return _TYPES[item["type"]]
    kinds = {_KIND_OF_KEY[key] for key in item if key in _KIND_OF_KEY}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        raise ValueError(f"{where} holds {' and '.join(sorted(kinds))} at once; write one item for each")
    key = next(iter(item), "")
    raise ValueError(f"{where} has the unknown key {key!r}; {nearest(str(key), _KIND_OF_KEY)}")


def _unwrap(key: str, value: Any, where: str) -> Any:
    """The medium inside an OpenAI spelling, or the value itself."""
    if key == "base64":
        is_uri = isinstance(value, str) and value.startswith("data:")
        return value if is_uri else decode_base64(value, "image")
    if key == "input_audio":
        if isinstance(value, Mapping):
            if not isinstance(value.get("data"), str):
                raise ValueError(f"{where}: input_audio must be {{'data': base64 text, 'format': 'wav'}}")
            if value["data"].startswith(("data:", "http://", "https://")):
                return value["data"]
            return decode_base64(value["data"], "audio")
        return value
    if key in ("image_url", "video_url", "audio_url", "url"):
        if isinstance(value, Mapping):
            value = value.get("url")
        if not isinstance(value, (str, Path)):
            raise ValueError(f"{where}: {key} must be an address or {{'url': address}}, got {type(value).__name__}")
    return value
