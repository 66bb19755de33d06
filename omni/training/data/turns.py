"""Turns of a conversation as other trainers write them -> messages as the processor takes them, and which are learnt.

{"role", "content"} or {"from", "value"}; roles by their other names (`ROLES`)
a `tool_call` (JSON of {"name", "arguments"}, or a list of them) becomes `tool_calls` of the answer it belongs to
`loss` (true, false) or `weight` (0, 1) of an answer says whether it is learnt; here it becomes `loss`, a bool
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omni.config.keywords import nearest
from omni.training.data.row_stores import parse_json, without_none

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), "tool_call"),
}
_LOSS = ("loss", "weight")
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)


def read_turns(given: Any) -> list[dict[str, Any]]:
    """The messages of a list of turns. What they hold is checked where they are read; ValueError and TypeError here are
    about roles, calls and losses."""
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"the row needs messages, a list of {{'role', 'content'}}, got {str(given)[:80]}")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(given):
        message = _read_turn(turn, number)
        if message["role"] != "tool_call":
            messages.append(message)
            continue
        text, calls = _read_calls(message["content"], number)
        own = {"role": "assistant", "content": text, "tool_calls": calls}
        own |= {key: value for key, value in message.items() if key == "loss"}
        before = messages[-1] if messages else own
        if before is own or before["role"] != "assistant" or (text and before.get("content")):
            messages.append(own)
            continue
        if before.get("loss") != own.get("loss"):
            raise ValueError(f"message {number} is a call of the answer before it, but their losses differ")
        before["content"] = before.get("content") or text
        before["tool_calls"] = [*before.get("tool_calls", ()), *calls]
    return messages


def _read_turn(turn: Any, number: int) -> dict[str, Any]:
    names = ("role", "content") if isinstance(turn, Mapping) and "role" in turn else ("from", "value")
    if not isinstance(turn, Mapping) or not isinstance(turn.get(names[0]), str):
        raise TypeError(f"message {number} must be an object with 'role' and 'content', got {str(turn)[:80]}")
    given = {key: value for key, value in without_none(dict(turn)).items() if key not in names}
    role = turn[names[0]]
    if names[0] == "from" and role not in ROLES:
        raise ValueError(f"message {number} is from {role!r}; {nearest(role, ROLES)}")
    message = {"role": ROLES.get(role, role), "content": without_none(turn.get(names[1])), **given}
    learnt = [_read_loss(message.pop(key), key, number) for key in _LOSS if key in message]
    if learnt and message["role"] not in ("assistant", "tool_call"):
        if any(learnt):
            raise ValueError(
                f"message {number} is of the {message['role']}, and only answers are learnt; drop its loss"
            )
    elif learnt:
        message["loss"] = all(learnt)
    return message


def _read_loss(value: Any, key: str, number: int) -> bool:
    if value not in (0, 1) or not isinstance(value, (bool, int, float)):
        raise ValueError(
            f"{key} of message {number} is {value!r}; an answer is learnt (1 or true) or not (0 or false), not in part"
        )
    return bool(value)


def _read_calls(content: Any, number: int) -> tuple[str, list[dict[str, Any]]]:
    """(reasoning before the calls, the calls)."""
    text = ""
    if isinstance(content, str):
        thought = _THOUGHT.match(content)
        text, content = (thought[1], content[thought.end() :]) if thought else ("", content)
        content = parse_json(content.encode(), f"the tool call of message {number}")
    calls = []
    for call in content if isinstance(content, list) else [content]:
        call = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(call.get("name"), str):
            raise ValueError(
                f"the tool call of message {number} must be {{'name', 'arguments'}}, got {str(content)[:80]}"
            )
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return text, calls


def plain(turns: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Messages of (role, text) pairs."""
    for role, text in turns:
        if not isinstance(text, str):
            raise TypeError(f"what the {role} says must be a text, got {str(text)[:80]}")
    return [{"role": role, "content": text} for role, text in turns]


def answer(value: Any) -> list[dict[str, Any]]:
    """An answer given as a text, a message or a list of messages."""
    if isinstance(value, str):
        return plain([("assistant", value)])
    return read_turns([value] if isinstance(value, Mapping) else value)
