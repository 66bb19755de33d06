"""From checked messages to token ids, so that text written by a user is always text.

A tokenizer turns `<|im_end|>` into a control token wherever it stands, also inside a user's message. Here the template
gets what users, tools and replies have written as `Written` text, which it can read as any other and which keeps its
own characters up to the finished prompt. There only the template's own control tokens can be found; they are marked,
the users' characters restored, and all is tokenised at once, so that text merges as it does in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from omni.config.family import RELEASED, find_family
from omni.config.keywords import check_flags
from omni.processing.messages import ROLES
from omni.processing.sandbox import ChatTemplate
from omni.processing.vocabulary import Vocabulary
from omni.processing.written import Alphabet

_END = "\ufdd0\ufdd1"  # where a message that is to be continued ends; a blank follows
_PROBE = "probe"  # a text that shows whether a template writes it
MAX_DEPTH = 100  # of tool schemas and arguments: dicts and lists inside each other


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

    `tokenizer` is a transformers tokenizer backed by the `tokenizers` library; tokens that are added to it later count.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._sandbox = ChatTemplate(template)
        self._known: tuple[Any, Vocabulary] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokenizer, self.template)  # copies compile the template anew

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's added tokens as they are now."""
        added = self.tokenizer.added_tokens_decoder
        state = [(index, repr(token)) for index, token in added.items()]
        if self._known is None or self._known[0] != state:
            self._known = state, Vocabulary(self.tokenizer.backend_tokenizer, added, self.template)
        return self._known[1]

    @property
    def added_ids(self) -> dict[str, int]:
        """Ids of the added tokens by what is written."""
        return self.vocabulary.ids

    @property
    def special(self) -> frozenset[str]:
        """The added tokens that are no text."""
        return self.vocabulary.special

    def encode_text(self, text: str, control_tokens: bool = False) -> list[int]:
        """Ids of a text. Ordinary added tokens in it become their ids; control tokens stay text unless
        `control_tokens`."""
        _check_unicode(text)
        check_flags(control_tokens=control_tokens)
        vocabulary = self.vocabulary
        mark = vocabulary.mark_for(text)
        return vocabulary.encode(vocabulary.mark(text, mark) if control_tokens else text, mark)

    def pieces(self, text: str, control_tokens: bool = False) -> list[str | list[int]]:
        """A text as what may be joined with other text, and with `control_tokens` the ids of those in it between."""
        _check_unicode(text)
        check_flags(control_tokens=control_tokens)
        return self.vocabulary.pieces(text) if control_tokens else [text]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        continue_final: bool = False,
        control_tokens: bool = False,
        check: Callable[[str], None] | None = None,
        **options: Any,
    ) -> list[int]:
        """Ids of one conversation, each medium as the single placeholder that the template writes.

        continue_final: end where the text of the last message ends, which is the assistant's. control_tokens: what
        users wrote may hold control tokens. check: sees every text before the template does, but reasoning, which it
        may leave out, and the finished prompt before it is tokenised. `options` go to the template
        (add_generation_prompt, enable_thinking, …). Raises ValueError where the template refuses the messages.
        """
        check_flags(control_tokens=control_tokens)
        vocabulary = self.vocabulary
        names = self.tokenizer.special_tokens_map
        alphabet = Alphabet("".join((self.template, *vocabulary.ids, *names.values())))
        write = _Writing(alphabet, vocabulary, control_tokens, check, self._roles_of_lists)
        schemas = tool_schemas(tools)
        if continue_final:
            messages = [*messages[:-1], _with_end(messages[-1])]
        values = {
            **names,
            "documents": None,
            **options,
            "messages": [write.message(message) for message in messages],
            "tools": None if schemas is None else write.value(schemas),
        }
        prompt = self._sandbox.render(alphabet, write.characters, values)
        text = alphabet.restore(prompt)
        if continue_final:
            text = _up_to_end(text)
            prompt = prompt[: len(text)]  # of the same characters
        if check is not None:
            check(text)
        mark = vocabulary.mark_for(text)
        return vocabulary.encode(alphabet.restore(vocabulary.mark(prompt, mark)), mark)

    @cached_property
    def _roles_of_lists(self) -> frozenset[str]:
        """The roles whose texts the template writes where content is a list, and leaves out where it is a string."""
        lost = (role for role in ROLES if self._written(role, _PROBE) == self._written(role, ""))
        return frozenset(role for role in lost if _PROBE in self._written(role, [{"type": "text", "text": _PROBE}]))

    def _written(self, role: str, content: Any) -> str:
        """What the template makes of a message; nothing if it wants other messages."""
        values = {**self.tokenizer.special_tokens_map, "documents": None, "tools": None, "add_generation_prompt": False}
        values["messages"] = [{"role": role, "content": content}]
        try:
            return self._sandbox.render(Alphabet(), 0, values)
        except ValueError:
            return ""

    def reply_start(self, ids: list[int]) -> int:
        """Where the reply of the last turn begins, behind its header, of which added tokens may have more or fewer
        than the usual ids."""
        opens = self.added_ids.get("<|im_start|>")
        if opens not in ids:
            raise ValueError("the chat template opens turns without <|im_start|>, so no message can be continued")
        first = len(ids) - ids[::-1].index(opens)
        for end in range(first + 1, len(ids) + 1):
            header = self.tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)
            if "\n" in header:
                return end
            if not "assistant".startswith(header):  # a token that takes the blanks after it has taken the line break
                return end - 1
        return len(ids)


class _Writing:
    """Turns what users wrote into what the template sees, and counts its characters."""

    def __init__(
        self,
        alphabet: Alphabet,
        vocabulary: Vocabulary,
        control_tokens: bool,
        check: Callable[[str], None] | None,
        roles_of_lists: frozenset[str],
    ) -> None:
        self.alphabet, self.markup, self.control_tokens = alphabet, vocabulary.markup_pattern, control_tokens
        self.check, self.roles_of_lists = check, roles_of_lists
        self.characters = 0

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as `read_conversation` returns it: its role, its keys and the kinds of its items are ours."""
        role = message["role"]
        others = {key: value for key, value in message.items() if key not in ("role", "content", "reasoning_content")}
        written = {key: self.value(value) for key, value in others.items()}
        if "reasoning_content" in message:  # some templates read it under another name
            written["reasoning_content"] = written["thinking"] = self._mark(str(message["reasoning_content"]))
        if "content" in message:
            content, text = message["content"], self.reply if role == "assistant" else self.text
            if isinstance(content, str):
                said = text(content)
                written["content"] = [{"type": "text", "text": said}] if role in self.roles_of_lists else said
            else:
                written["content"] = [{**i, "text": text(i["text"])} if i["type"] == "text" else i for i in content]
        return {"role": role, **written}

    def text(self, text: str) -> str:
        """A text whose control tokens are text, unless they are allowed."""
        if self.check is not None:
            self.check(str.__str__(text))
        return self._mark(text)

    def _mark(self, text: str) -> str:
        _check_unicode(text)
        self.characters += len(text)
        return str.__str__(text) if self.control_tokens else self.alphabet.write(text)

    def reply(self, text: str) -> str:
        """A reply keeps its markup (<think>, <tool_call>), which templates read and write again."""
        if self.check is not None:
            self.check(text.rpartition("</think>")[2])
        pieces = self.markup.split(text)  # text, markup, text, …
        return self.alphabet.adopt("".join(p if i % 2 else str(self._mark(p)) for i, p in enumerate(pieces)))

    def value(self, value: Any, depth: int = 0) -> Any:
        """Tool schemas, arguments and names: the same structure, keys too. Raises ValueError for what is no JSON."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return _number(value)
        if depth == MAX_DEPTH:
            raise ValueError(
                f"the messages or tools hold what JSON cannot express: more than {MAX_DEPTH} lists and dicts inside "
                "each other; make them flatter"
            )
        if isinstance(value, Mapping):
            return {self._key(key): self.value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, depth + 1) for item in value]
        return self.text(str(value))  # as a template would write it

    def _key(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.text(key)
        if key is None or isinstance(key, (bool, int, float)):
            return _number(key)
        raise ValueError(
            f"the messages or tools hold what JSON cannot express: the key {key!r}; write it plainly, as a string"
        )


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


def _number(value: Any) -> Any:
    """None, a bool or a number of Python's own kind; what is derived from one may print anything."""
    if value is None or type(value) in (bool, int, float):
        return value
    return int(value) if isinstance(value, int) else float(value)


def _check_unicode(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair ({text[error.start]!r}), which is no character; remove it"
        ) from error


def tool_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
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
