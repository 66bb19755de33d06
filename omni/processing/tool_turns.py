"""The ids that a chat template writes for tools, their calls and their results, one message at a time.

Sessions write a conversation piece by piece. Each piece is cut out of a small conversation that the template writes
whole, so that it is what a whole conversation holds there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from omni.processing.messages import read_conversation
from omni.processing.template import ChatTokenizer, built_in_template

_PROBE = "probe_tool"  # a name that shows whether a template writes it
_SPACED = '{"probe":   "probe"}'  # arguments that show whether a template keeps their text
_QUESTION = {"role": "user", "content": "?"}


class ToolTurns:
    """What the turns of a conversation with tools look like.

    usual: the checkpoint's template, which writes what comes before the first turn where no tools are given; chat: the
    one that writes tools, their calls and results: `with_tools` where it writes all of them, else the built-in one with
    the family's media `tokens` (the released Qwen2.5-Omni template knows no tools).
    """

    def __init__(self, usual: ChatTokenizer, with_tools: ChatTokenizer, tokens: Mapping[str, str]) -> None:
        self.usual = usual
        self._with_tools, self._tokens = with_tools, tokens

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The template that writes tools."""
        if _writes_tools(self._with_tools):
            return self._with_tools
        return ChatTokenizer(self.usual.tokenizer, built_in_template(self._tokens))

    def beginning(self, system: str | None, turn_start_id: int, tools: Sequence[Any] | None) -> list[int]:
        """See `OmniProcessor.beginning_ids`."""
        chat = self.chat if isinstance(tools, Sequence) and tools else self.usual
        if system is None and chat not in (self.usual, self._with_tools):
            system = self._usual_system
        messages = [] if system is None else [{"role": "system", "content": system}]
        ids = chat.encode_chat(read_conversation([*messages, _QUESTION]).messages, tools, add_generation_prompt=False)
        return ids[: max((i for i, token in enumerate(ids) if token == turn_start_id), default=0)]

    @cached_property
    def _usual_system(self) -> str | None:
        """The text of the system turn that the checkpoint's template writes by itself, None for none."""
        start, end = (self.usual.added_ids.get(name) for name in ("<|im_start|>", "<|im_end|>"))
        ids = self.usual.encode_chat([_QUESTION], add_generation_prompt=False)
        if start is None or ids.count(start) < 2 or end not in ids:
            return None
        text = str(self.usual.tokenizer.decode(ids[1 : ids.index(end)], clean_up_tokenization_spaces=False))
        return text.removeprefix("system\n") if text.startswith("system\n") else None

    def results(self, outputs: Sequence[str]) -> list[int]:
        """See `OmniProcessor.tool_results_ids`."""
        if isinstance(outputs, str) or not isinstance(outputs, Sequence):
            raise TypeError(f"outputs must be a list of strings, got {type(outputs).__name__}")
        if not outputs:
            raise ValueError("outputs is empty; give the result of one tool call or of several")
        for number, output in enumerate(outputs):
            if not isinstance(output, str):
                raise TypeError(f"output {number} must be a string, got {type(output).__name__}; write it as JSON text")
        calls = [{"name": _PROBE, "arguments": {}}] * len(outputs)
        asked = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
        start = self._opening_id
        before = self._encode(asked).count(start)
        ids = self._encode([*asked, *({"role": "tool", "content": output} for output in outputs)])
        starts = [i for i, token in enumerate(ids) if token == start]
        if len(starts) <= before:
            raise ValueError("the chat template opens no turn for the results of tools")
        return ids[starts[before] :]

    def assistant(self, content: str, tool_calls: Sequence[Any]) -> list[int]:
        """See `OmniProcessor.assistant_ids`."""
        if not isinstance(content, str):
            raise TypeError(f"content must be a string, got {type(content).__name__}")
        if isinstance(tool_calls, (str, Mapping)) or not isinstance(tool_calls, Sequence):
            raise TypeError(f"tool_calls must be a list of calls, got {type(tool_calls).__name__}")
        calls = [call if self._keeps_text else _with_parsed(call) for call in tool_calls]
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        # Some templates write a conversation's last message otherwise than those before it.
        following = [{"role": "tool", "content": ""}] * len(calls) if calls else [_QUESTION]
        ids, start = self._encode([_QUESTION, message, *following]), self._opening_id
        starts, before = [i for i, token in enumerate(ids) if token == start], self._encode([_QUESTION]).count(start)
        turn = ids[: starts[before + 1]] if len(starts) > before + 1 else []
        end = self.chat.added_ids.get("<|im_end|>")
        if end not in turn:
            raise ValueError("the chat template writes an assistant's turn without <|im_start|> and <|im_end|>")
        return turn[self.chat.reply_start(turn) : len(turn) - 1 - turn[::-1].index(end)]

    @property
    def _opening_id(self) -> int:
        return self.chat.added_ids.get("<|im_start|>", -1)

    def _encode(self, messages: Sequence[Any]) -> list[int]:
        return self.chat.encode_chat(read_conversation(messages).messages, add_generation_prompt=False)

    @cached_property
    def _keeps_text(self) -> bool:
        """Whether the template writes arguments that are JSON text as they are (some write them as a JSON string)."""
        call = {"name": _PROBE, "arguments": _SPACED}
        ids = self._encode([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
        return _SPACED in self.chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _with_parsed(call: Any) -> Any:
    """A call whose arguments are no text, where that is JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {"name": function.get("name"), "arguments": json.loads(function["arguments"])}
    except ValueError as error:
        raise ValueError(f"arguments {function['arguments'][:80]!r} of a tool call are no JSON: {error}") from None


def _writes_tools(chat: ChatTokenizer) -> bool:
    """Whether a template writes tools, their calls and their results."""
    schema = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
    call = {"type": "function", "function": {"name": f"{_PROBE}_call", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        _QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": f"{_PROBE}_result"},
    ]
    try:
        ids = chat.encode_chat(messages, [schema], add_generation_prompt=False)
    except ValueError:  # it wants other messages
        return False
    text = str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return f"{_PROBE}_call" in text and f"{_PROBE}_result" in text and f'"{_PROBE}"' in text
