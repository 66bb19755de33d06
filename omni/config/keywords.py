"""Misspelt words name the right one, in every message in the same way."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def nearest(word: Any, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """The end of an error message: the known word that `word` resembles in any case, else `otherwise` (None: all of
    them). A word that is no string is taken as it prints. cutoff: the least likeness that counts, from 0 to 1.
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=cutoff)
    if near:
        return f"did you mean {names[near[0]]!r}?"
    return f"it must be one of {', '.join(names.values())}" if otherwise is None else otherwise


def is_misspelt(word: Any, name: str) -> bool:
    """Whether `word` was surely meant to be `name`: at most two edits away, or nearly all letters shared."""
    word = str(word).lower()
    close = _edit_distance(word, name) <= min(2, len(name) // 5)
    return close or difflib.SequenceMatcher(None, word, name).ratio() >= 0.9


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, ca in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, cb in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (ca != cb))
    return row[-1]


P = ParamSpec("P")
R = TypeVar("R")


def takes_arguments_of(
    other: Callable[P, Any],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Show and check the signature of `other` for a method that hands all its keywords on to it."""

    def show(function: Callable[..., R]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return names_keywords(function)

    return show


def names_keywords(function: F) -> F:
    """Refuse a keyword that `function` does not take with a TypeError that names the nearest one it takes."""
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs:
            if key not in known:
                hint = nearest(key, known, f"it takes {', '.join(known)}")
                name = type(args[0]).__name__ if function.__name__ in ("__init__", "__call__") else function.__name__
                raise TypeError(f"{name} has no argument {key!r}; {hint}")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def check_flags(**flags: bool) -> None:
    """Raise TypeError for a flag that is neither True nor False: a text such as "false" would be taken as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
