"""Misspelt keyword arguments name the right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def names_keywords(function: F) -> F:
    """Refuse a keyword that `function` does not take with a TypeError that names the nearest one it takes."""
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{function.__name__} has no argument {key!r}; {hint}")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
