"""From checked messages to token ids, so that text written by a user is always text.

A tokenizer turns `<|im_end|>` into a control token wherever it stands, also inside a user's message. Here the first and
last characters of every added token ("<" and ">") are replaced by private characters in all that users, tools and
replies have written, the template is rendered, and the result is cut at the added tokens that are left, which the
template itself wrote. The pieces between get their characters back and are tokenised by a copy of the tokenizer that
has no added tokens. Replacing single characters keeps this true where pieces of text meet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from omni.config.family import RELEASED, find_family

_END = "\ufdd0\ufdd1"  # where a message that is to be continued ends; a blank follows
# Private-use characters, from which those are taken that occur nowhere in the conversation.
_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def built_in_template(tokens: Mapping[str, str] | None = None) -> str:
    """The chat template for checkpoints that bring none: ChatML in the style of Qwen3-Omni.

    `tokens`: spellings of the media tokens by their names as in `Family.tokens` (None: Qwen3-Omni's).
    """
    template = (RELEASED / "chat_template.jinja").read_text(encoding="utf-8")
    for name, own in (tokens or {}).items():
        template = template.replace(find_family().tokens[name], own)
    return template


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template.

    `tokenizer` is a transformers tokenizer backed by the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        added = tokenizer.added_tokens_decoder
        self.added_ids: dict[str, int] = {str(token): index for index, token in added.items()}
        self.special = frozenset(str(token) for token in added.values() if token.special)
        self._edges = sorted({end for token in self.added_ids for end in (token[0], token[-1])})
        self._split = _alternatives(self.added_ids)

    @cached_property
    def plain(self) -> Any:
        """A `tokenizers.Tokenizer` with the same vocabulary and merges and no added tokens."""
        from tokenizers import Tokenizer

        settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
        settings["added_tokens"] = []
        settings["post_processor"] = settings["truncation"] = settings["padding"] = None
        return Tokenizer.from_str(json.dumps(settings))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; control tokens written in it stay text."""
        _check_unicode(text)
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        continue_final: bool = False,
        **options: Any,
    ) -> list[int]:
        """Ids of one conversation, each medium as the single placeholder that the template writes.

        continue_final: end where the text of the last message ends, which is the assistant's. `options` go to the
        template (add_generation_prompt, enable_thinking, …). Raises ValueError where the template refuses the messages.
        """
        schemas = _tool_schemas(tools)
        if continue_final:
            messages = [*messages[:-1], _with_end(messages[-1])]
        try:
            written = json.dumps([list(messages), schemas], ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the messages or tools hold what JSON cannot express: {error}; write it plainly"
            ) from error
        guard = self._private_characters(written)
        guarded = [self._guard_message(message, guard) for message in messages]
        prompt = self._render(guarded, None if schemas is None else _map_text(schemas, guard_text(guard)), options)
        return self._encode_prompt(_up_to_end(prompt) if continue_final else prompt, guard)

    def _private_characters(self, written: str) -> dict[str, str]:
        """Edge character of added tokens -> a character that does not occur in what was written."""
        _check_unicode(written)
        used = set(written)
        free: Iterator[str] = (chr(code) for code in _PRIVATE if chr(code) not in used)
        try:
            return {edge: next(free) for edge in self._edges}
        except StopIteration:
            raise ValueError("the messages use every private Unicode character; remove some") from None

    def _guard_message(self, message: Mapping[str, Any], guard: dict[str, str]) -> dict[str, Any]:
        """A message whose text cannot form control tokens; a reply keeps its markup (<think>, <tool_call>)."""
        everything = guard_text(guard)
        reply = everything
        if message["role"] == "assistant":
            reply = guard_text(guard, keep=[token for token in self.added_ids if token not in self.special])
        guarded = {}
        for key, value in message.items():
            guarded[key] = value if key == "role" else _map_text(value, reply if key == "content" else everything)
        return guarded

    def _render(self, messages: list[dict[str, Any]], tools: Any, options: Mapping[str, Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=False, **options
            )
        except Exception as error:  # whatever the template's own code runs into
            raise ValueError(f"the chat template cannot write these messages: {error}") from error

    def _encode_prompt(self, prompt: str, guard: dict[str, str]) -> list[int]:
        """Ids of a rendered prompt: added tokens by name, what lies between as plain text."""
        restore = str.maketrans({private: edge for edge, private in guard.items()})
        pieces = self._split.split(prompt)  # plain, added, plain, …
        encoded = self.plain.encode_batch([piece.translate(restore) for piece in pieces[::2]], add_special_tokens=False)
        ids = list(encoded[0].ids)
        for token, plain in zip(pieces[1::2], encoded[1:]):
            ids.append(self.added_ids[token])
            ids.extend(plain.ids)
        return ids


def _with_end(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message of a reply that is to be continued, its end marked. Raises ValueError where it cannot be."""
    if message["role"] != "assistant":
        raise ValueError(
            f"continue_final_message needs a last message of the assistant, got one of the {message['role']}"
        )
    if message.get("tool_calls"):
        raise ValueError("a last message with tool_calls cannot be continued; leave continue_final_message out")
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": f"{content}{_END} "}
    if content[-1].get("type") != "text":
        raise ValueError("a message that is to be continued must end with text; put a text after the last medium")
    return {**message, "content": [*content[:-1], {**content[-1], "text": f"{content[-1]['text']}{_END} "}]}


def _up_to_end(prompt: str) -> str:
    """A prompt up to the mark; without blanks before it where the template leaves blanks at the end of messages out."""
    before, mark, after = prompt.rpartition(_END)
    if not mark:
        raise ValueError("the chat template leaves out the end of the last message, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def guard_text(guard: Mapping[str, str], keep: Sequence[str] = ()) -> Callable[[str], str]:
    """A function that replaces the guarded characters of a text, except inside the tokens of `keep`."""
    table = str.maketrans(dict(guard))
    if not keep:
        return lambda text: str.translate(text, table)  # not a subclass's own
    kept = _alternatives(keep)

    def replace(text: str) -> str:
        pieces = kept.split(text)
        return "".join(piece if i % 2 else str.translate(piece, table) for i, piece in enumerate(pieces))

    return replace


def _alternatives(tokens: Any) -> re.Pattern[str]:
    """A pattern with one group that matches the longest of the tokens (nothing if there are none)."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair ({text[error.start]!r}), which is no character; remove it"
        ) from error


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same structure with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_text(key, change): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    # Whatever else there is, the template would write as `str` does.
    return value if value is None or isinstance(value, (bool, int, float)) else change(str(value))


def _tool_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise TypeError(f"tools must be a list of JSON schemas or documented functions, got {type(tools).__name__}")
    return [_tool_schema(tool) for tool in tools] if tools else None


def _tool_schema(tool: Any) -> Any:
    """A tool's JSON schema; a Python function is described by its signature and docstring."""
    if isinstance(tool, Mapping):
        return dict(tool)
    if callable(tool):
        from transformers.utils import get_json_schema

        try:
            return get_json_schema(tool)
        except Exception as error:  # the library has its own classes for missing docstrings and type hints
            raise ValueError(f"tool {getattr(tool, '__name__', tool)!r} cannot be described: {error}") from error
    raise TypeError(f"a tool must be a JSON schema dict or a documented function, got {type(tool).__name__}")
