"""A tokenizer's added tokens: which of them control the chat, and text to ids with or without those.

An added token becomes its id wherever it is written. Ordinary ones may, as in transformers; those that control the chat
may only where the template, or someone who is trusted, has written them. So text is encoded by a copy of the tokenizer
in which each control token is spelled with a mark before it, a private character that the text does not hold. Whoever
may write control tokens has them marked (`mark`); anywhere else they are text like any other. What else an added token
can ask for (blanks beside it, whole words, normalised text) stays the tokenizer's business.
"""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import Any

_MARKS = range(0x10FFFD, 0xFFFFF, -1)  # private characters, none of them an `Alphabet`'s
# What templates put around reasoning and tool calls; added tokens of the releases, though not special ones.
_MARKUP = frozenset(f"<{end}{name}>" for name in ("think", "tool_call", "tool_response") for end in ("", "/"))
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class Vocabulary:
    """The added tokens of a tokenizer as they are now.

    ids: by what is written; special: those that the tokenizer calls special; control: these, the markup of reasoning
    and tool calls, and what else of that shape (`<…>`, `[…]`) the template writes.
    """

    def __init__(self, backend: Any, added: dict[int, Any], template: str) -> None:
        self._backend = backend
        self.ids: dict[str, int] = {str(token): index for index, token in added.items()}
        self.special = frozenset(str(token) for token in added.values() if token.special)
        marks = (t for t in self.ids if t in _MARKUP or (_BRACKETED.fullmatch(t) and t in template))
        self.control = self.special | frozenset(marks)
        self.markup = self.control - self.special
        whole = {str(token) for token in added.values() if token.single_word}
        written = [t for t in self.ids if any(c in t for c in self.control)]  # a longer token wins over one in it
        self._written = _alternatives(written, whole)
        self._tokenizer = lru_cache(maxsize=2)(self._build)

    @cached_property
    def markup_pattern(self) -> re.Pattern[str]:
        """Matches the control tokens that are not special."""
        return _alternatives(self.markup)

    def mark_for(self, text: str) -> str:
        """A character to mark control tokens with, which does not occur in `text`. Raises ValueError if all do."""
        mark = next((chr(code) for code in _MARKS if chr(code) not in text), None)
        if mark is None:
            raise ValueError("the messages use every private Unicode character; remove some")
        return mark

    def mark(self, text: str, mark: str) -> str:
        """The text with a mark before every control token in it."""
        return self._written.sub(lambda m: mark + m[0] if m[0] in self.control else m[0], text)

    def pieces(self, text: str) -> list[str | list[int]]:
        """The text cut at its control tokens, each as its id."""
        pieces: list[str | list[int]] = [""]
        for part in self._written.split(text):
            if part in self.control:
                pieces += [[self.ids[part]], ""]
            else:
                pieces[-1] += part  # type: ignore[operator]
        return [piece for piece in pieces if piece]

    def encode(self, text: str, mark: str) -> list[int]:
        """Ids of a text whose control tokens are the marked ones. Raises ValueError where it cannot be tokenised."""
        try:
            return list(self._tokenizer(mark).encode(text, add_special_tokens=False).ids)
        except BaseException as error:  # a panic of the library's Rust code is none of Python's exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"a text of {len(text):,} characters cannot be tokenised ({error}); shorten it") from error

    def _build(self, mark: str) -> Any:
        """A `tokenizers.Tokenizer` of the same vocabulary and merges in which control tokens begin with `mark`."""
        from tokenizers import Tokenizer

        settings = json.loads(self._backend.to_str())
        settings["post_processor"] = settings["truncation"] = settings["padding"] = None
        model = settings["model"]
        if not isinstance(model["vocab"], dict):
            raise ValueError(f"a tokenizer of the kind {model.get('type')!r} is not supported; use a BPE one")
        if "merges" in model:  # no merge may end in a control token
            model["merges"] = [merge for merge in model["merges"] if self.control.isdisjoint(_members(merge))]
        for token in settings["added_tokens"]:
            if token["content"] in self.control:
                if len(token["content"]) > 1:  # a single one may be of the alphabet
                    model["vocab"].pop(token["content"], None)
                token.update(content=mark + token["content"], single_word=False, normalized=False)
            model["vocab"][token["content"]] = token["id"]  # or it would be given another one
        return Tokenizer.from_str(json.dumps(settings))


def _members(merge: Any) -> tuple[str, str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


def _alternatives(tokens: Any, whole_words: Any = ()) -> re.Pattern[str]:
    """A pattern with one group that matches the longest of the tokens (nothing if there are none)."""
    longest_first = sorted(tokens, key=len, reverse=True)
    spelled = (rf"(?<!\w){re.escape(t)}(?!\w)" if t in whole_words else re.escape(t) for t in longest_first)
    return re.compile("(" + ("|".join(spelled) or r"(?!)") + ")")
