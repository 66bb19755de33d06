"""Tool calls in an answer, told from its text while it is written: nothing of a call is shown or spoken.

The released families write a call as `<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`. The marks may be
added tokens or be spelled over ordinary ones, and a token may hold text beside a part of a call. What may be the
beginning of a call is held back until it is decided. What stands before, between or behind calls and is all blanks
belongs to them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

from torch import Tensor

from omni.processing.text_stream import TextStream

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL_TOKENS = 4  # drawn in a tick at most while speech waits for a call to end, so that other rows wait little
_OUTSIDE = re.compile(f'"|{OPEN}|{CLOSE}')
_IN_STRING = re.compile(r'"|\\.|[\x00-\x1f]', re.DOTALL)
_BLANKS = re.compile(r"[ \t\n\r]*")


class MalformedCallError(ValueError):
    """A reply holds a tool call that cannot be read."""


class WrittenCall(NamedTuple):
    """A call as the model wrote it: the function's name, the JSON text of its arguments, and what that says."""

    name: str
    arguments: str
    parsed: dict[str, Any]


@dataclass(eq=False)
class Piece:
    """A token of the text beside calls.

    token: its id, text: the characters that it completes, whole: whether none is unfinished then. index: of the reply's
    id that it is (`own`) or stands for a part of; before: what that id holds in front of it. vector [Di]: of a piece
    that is not the reply's own, once the Thinker has read it, where text enters the Talker by hidden states too.
    """

    token: int
    text: str
    whole: bool
    index: int
    own: bool = True
    before: str = ""
    vector: Tensor | None = None


# What an answer is made of, in order: text, the beginning of a call (None), a call, or what is wrong with one.
Found = Union[Piece, WrittenCall, MalformedCallError, None]


@dataclass(eq=False)
class _Part:
    """Ids of the reply that share characters, from `index` on: the text still to be told, and what was before it."""

    index: int
    tokens: list[int]
    text: str = ""
    before: str = ""

    @property
    def end(self) -> int:
        """The index behind its last id."""
        return self.index + len(self.tokens)


class CallReader:
    """Tells calls from text in one answer, a token at a time.

    inside: whether a call is open. spans: the indices of the ids that hold each complete call, first and behind the
    last.
    """

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.parts: list[_Part] = []  # held
        self.unfinished: _Part | None = None  # ends inside a character
        self.body: _Body | None = None
        self.blank = True  # no text since the beginning of the answer, or the last call
        self.ids = 0  # up to here
        self.began = (0, "")  # the id in which the open call begins, and what that holds in front of it
        self.spans: list[tuple[int, int]] = []

    @property
    def inside(self) -> bool:
        """Whether a call is open."""
        return self.body is not None

    @property
    def undecided(self) -> tuple[int, str] | None:
        """The first id that is undecided or belongs to an open call, and what of its text is decided; None: none is."""
        if self.inside:
            return self.began
        first = self.parts[0] if self.parts else self.unfinished
        return None if first is None else (first.index, first.before)

    def go_on_from(self, text: str) -> None:
        """The prompt holds the beginning of the answer, which may open a call."""
        self.push(0, 0, text, whole=True)
        self.parts, self.spans, self.ids, self.began = [], [], 0, (0, "")

    def push(self, index: int, token: int, text: str, *, whole: bool) -> list[Found]:
        """The reply's id at `index` and the text that it completes; whole: no character is unfinished."""
        if not text and (name := self.stream.names.get(token)) in (OPEN, CLOSE):  # a tokenizer calls them special
            text = self.stream.finish() + str(name)
            whole = True
        part = self.unfinished or _Part(index, [])
        part.tokens.append(token)
        part.text += text
        self.unfinished, self.ids = part, index + 1
        if not whole:
            return []
        self.unfinished = None
        self.parts.append(part)
        return self._tell(last=False)

    def finish(self, text: str, reason: str) -> list[Found]:
        """The end of the answer, its last text, and why it ends. Nothing is held any more."""
        if self.unfinished is not None:
            self.unfinished.text += text
            self.parts.append(self.unfinished)
            self.unfinished = None
        found = self._tell(last=True)
        if self.body is not None:
            why = "max_new_tokens was reached; allow more" if reason == "max_new_tokens" else "it is never closed"
            found.append(_malformed(f"the reply ends inside it: {why}", self.body.text))
        return found

    def _tell(self, *, last: bool) -> list[Found]:
        found: list[Found] = []
        try:
            while self._read_call(found) if self.inside else self._read_text(found, last):
                pass
        except MalformedCallError as error:
            found.append(error)
        return found

    def _read_text(self, found: list[Found], last: bool) -> bool:
        """Let go of the text that is decided; whether a call has begun."""
        text = "".join(part.text for part in self.parts)
        begin = text.find(OPEN)
        certain = len(text) - (0 if last else _beginning(text)) if begin < 0 else begin
        blank = self.blank and not text[:certain].strip()
        if begin >= 0:
            found += self._take(begin, spoken=not blank)
            self.began = self.parts[0].index, self.parts[0].before
            self._take(len(OPEN), spoken=False)
            self.body = _Body()
            found.append(None)
            return True
        if last:
            found += self._take(certain, spoken=not (blank and self.spans))
        else:
            ends, whole = 0, 0
            for part in self.parts:
                ends += len(part.text)
                whole = ends if ends <= certain else whole
            found += self._take(0 if blank else whole, spoken=True)
            self.blank = self.blank and (blank or whole == 0)
        return False

    def _read_call(self, found: list[Found]) -> bool:
        """Take what belongs to the open call; whether it has been closed."""
        assert self.body is not None
        text = "".join(part.text for part in self.parts)
        own = self.body.push(text)
        self._take(len(text) if own is None else own, spoken=False)
        if own is None:
            return False
        found.append(read_call(self.body.text))
        rest = self.parts[0] if self.parts else None
        self.spans.append((self.began[0], self.ids if rest is None else rest.end if rest.before else rest.index))
        self.body, self.blank = None, True
        return True

    def _take(self, characters: int, *, spoken: bool) -> list[Found]:
        """Take so many characters, and ids without any behind them, off what is held; their pieces if `spoken`."""
        taken: list[Found] = []
        while self.parts and len(self.parts[0].text) <= characters:
            part = self.parts.pop(0)
            characters -= len(part.text)
            if spoken:
                taken += self._pieces(part, part.text) if part.before else _own_pieces(part)
        if characters:
            part = self.parts[0]
            if spoken:
                taken += self._pieces(part, part.text[:characters])
            part.before, part.text = part.before + part.text[:characters], part.text[characters:]
        return taken

    def _pieces(self, part: _Part, text: str) -> list[Piece]:
        """A text that is only a part of its ids, as ids of its own."""
        processor, before = self.stream.processor, part.before
        stream, pieces = TextStream(processor), []
        for token in processor.encode_text(text):
            own = stream.push(token)
            pieces.append(Piece(token, own, stream.whole, part.index, own=False, before=before))
            before += own
        return pieces


def _own_pieces(part: _Part) -> list[Piece]:
    """A part that is all text: its ids as they are; their text comes with the last one."""
    last = part.end - 1
    return [
        Piece(token, part.text if i == last else "", i == last, i) for i, token in enumerate(part.tokens, part.index)
    ]


def _beginning(text: str) -> int:
    """Characters at the end of the text that may be the beginning of a call."""
    return next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)


class _Body:
    """The text of an open call, behind `<tool_call>`, as far as it has come. Marks in a JSON string are part of it."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # looked at up to here
        self.in_string = False

    def push(self, text: str) -> int | None:
        """How many of these characters belong to the call; None for all while it goes on.

        Raises MalformedCallError as soon as it cannot become a call any more.
        """
        self.text += text
        begins = self.text.lstrip()
        if not begins.startswith(("{", CLOSE)) and not CLOSE.startswith(begins):
            raise _malformed("a JSON object must follow <tool_call>", self.text)
        while match := (_IN_STRING if self.in_string else _OUTSIDE).search(self.text, self.at):
            self.at = match.end()
            if match[0] == '"':
                self.in_string = not self.in_string
            elif match[0] == OPEN:
                raise _malformed("another one begins inside it", self.text)
            elif match[0] == CLOSE:
                surplus = len(self.text) - self.at
                self.text = self.text[: match.start()]
                return len(text) - surplus
            elif len(match[0]) == 1:
                raise _malformed("a string in it holds a line break or another control character", self.text)
        unsure = self.text.endswith("\\") if self.in_string else len(CLOSE) - 1
        self.at = max(self.at, len(self.text) - unsure)
        return None


def read_call(text: str) -> WrittenCall:
    """Read what stands between `<tool_call>` and `</tool_call>`: a JSON object with `name` and `arguments`.

    arguments: an object, a string that holds the JSON text of one, or left out for none. Further keys are ignored;
    which functions there are is the caller's business. Raises MalformedCallError.
    """
    try:
        call = _parse(text)
        if not isinstance(call, dict):
            raise ValueError("it must be a JSON object with name and arguments")
        name, given = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise ValueError(f"its name must be a string that is not empty, got {name!r}")
        arguments = given if isinstance(given, str) else _texts(text).get("arguments", "{}")
        parsed = _parse(given) if isinstance(given, str) else given
        if not isinstance(parsed, dict):
            raise ValueError(f"its arguments must be a JSON object, got {str(parsed)[:80]}")
        json.dumps([name, parsed], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("it holds half of a surrogate pair, which is no character", text) from None
    except RecursionError:
        raise _malformed("it has too many lists and objects inside each other", text) from None
    except ValueError as error:  # of JSON, too
        raise _malformed(str(error), text) from None
    return WrittenCall(name, arguments.strip(), parsed)


def _malformed(why: str, text: str) -> MalformedCallError:
    shown = text.strip()
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return MalformedCallError(f"the reply holds a malformed tool call, {shown!r}: {why}; ask for another reply")


def _parse(text: str) -> Any:
    """JSON as the standard has it. Raises ValueError, or RecursionError."""
    return json.loads(text, parse_constant=_no_number, parse_float=_finite)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _texts(text: str) -> dict[str, str]:
    """The JSON text of each value of a valid JSON object, by its key."""
    texts: dict[str, str] = {}
    decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
    at = _skip(text, text.index("{") + 1)
    while text[at] == '"':
        key, at = decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)  # behind the colon
        at = decode(text, begin)[1]
        texts[key] = text[begin:at]
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at
    return texts


def _skip(text: str, at: int) -> int:
    """The first character from `at` on that is no blank."""
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()
