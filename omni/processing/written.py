"""Text that users wrote, as a chat template sees it: read as it is, written in characters of its own.

A template looks into content (`'</think>' in content`, `content.split(...)`, `message.role == 'user'`) and puts it into
a prompt. `Written` does both: it compares, searches and cuts as the user's text does, but the characters that it holds
are private ones, given out by an `Alphabet`. Whatever a template does with it, its characters stay private up to the
finished prompt, so no control token can be found in them; there `Alphabet.restore` gives them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class Alphabet(dict[int, int]):
    """Character -> private character that stands for it, given out when it first occurs.

    reserved: text in which private characters keep their meaning, such as the template's own.
    """

    def __init__(self, reserved: str = "") -> None:
        super().__init__()
        taken = set(map(ord, reserved))
        self._free = (code for code in _PRIVATE if code not in taken)
        self._back: dict[int, int] = {}

    def __missing__(self, code: int) -> int:
        private = next(self._free, None)
        if private is None:
            raise ValueError(f"the messages hold more than {len(self)} different characters; shorten them")
        self[code], self._back[private] = private, code
        return private

    def write(self, text: str) -> Written:
        """A user's text for a template."""
        return Written(str.translate(text, self), self)

    def restore(self, text: str) -> str:
        """A text with the users' characters given back."""
        return str.translate(text, self._back)

    def adopt(self, text: str) -> str:
        """A text that was put together from others: `Written` if a user's characters are in it."""
        return text if self._back.keys().isdisjoint(map(ord, text)) else Written(text, self)

    def holds(self, character: str) -> bool:
        """Whether a character stands for a user's."""
        return ord(character) in self._back


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._text if isinstance(value, Written) else value


class Written(str):
    """A string whose methods see the text that its private characters stand for."""

    _alphabet: Alphabet
    _text: str  # of the same length

    def __new__(cls, held: str, alphabet: Alphabet) -> Written:
        self = super().__new__(cls, held)
        self._alphabet, self._text = alphabet, alphabet.restore(held)
        return self

    def __hash__(self) -> int:
        return hash(self._text)

    def __int__(self) -> int:
        return int(self._text)

    def __float__(self) -> float:
        return float(self._text)

    def __add__(self, other: Any) -> Any:
        return Written(str.__add__(self, other), self._alphabet) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return Written(str.__add__(other, self), self._alphabet) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> Any:
        return Written(str.__mul__(self, times), self._alphabet)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Written:
        return Written(str.__getitem__(self, index), self._alphabet)

    def __iter__(self) -> Iterator[str]:
        return (Written(character, self._alphabet) for character in str.__iter__(self))

    def replace(self, old: str, new: str, count: Any = -1) -> Written:  # type: ignore[override]
        """As `str.replace`; what is put in stays whose it was."""
        if not old:
            return self._alphabet.write(self._text.replace("", _plain(new), count))
        return Written(str.join(new, self.split(old, count)), self._alphabet)

    def _pieces(self, pieces: Iterable[str], gap: int) -> list[Written]:
        """The parts of this text that equal `pieces`, in order; at least `gap` characters lie between them."""
        found, at = [], 0
        for piece in pieces:
            first = self._text.index(piece, at)
            found.append(self[first : first + len(piece)])
            at = first + len(piece) + gap
        return found


def _reading(name: str) -> Callable[..., Any]:
    def method(self: Written, *args: Any) -> Any:
        return getattr(self._text, name)(*map(_plain, args))

    return method


def _cutting(name: str) -> Callable[..., Any]:
    def method(self: Written, *args: Any, **options: Any) -> Any:
        parts = getattr(self._text, name)(*map(_plain, args), **{key: _plain(value) for key, value in options.items()})
        separator = args[0] if args else options.get("sep")
        if isinstance(parts, str):  # of a prefix, of a suffix
            return self[len(self) - len(parts) :] if name in ("lstrip", "removeprefix") else self._pieces([parts], 0)[0]
        if isinstance(parts, tuple):
            return tuple(self._pieces(parts, 0))
        return self._pieces(parts, len(separator) if name.endswith("split") and separator else 0)

    return method


def _changing(name: str) -> Callable[..., Any]:
    def method(self: Written, *args: Any) -> Written:
        return self._alphabet.write(getattr(self._text, name)(*map(_plain, args)))

    return method


for _make, _names in {
    _reading: "__contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ startswith endswith find rfind index rindex "
    "count isalnum isalpha isascii isdecimal isdigit islower isnumeric isprintable isspace istitle isupper",
    _cutting: "strip lstrip rstrip removeprefix removesuffix partition rpartition split rsplit splitlines",
    _changing: "capitalize casefold center expandtabs ljust lower rjust swapcase title upper zfill",
}.items():
    for _name in _names.split():
        setattr(Written, _name, _make(_name))
