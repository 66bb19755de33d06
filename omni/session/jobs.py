"""A job: work that is done in steps, so that its owner may do other things between two of them.

It is a function that returns a generator. Each `yield` ends a step, and what it yields says what the next one asks for
(see `omni.session.scheduler`); what the generator returns is the job's result. It may be closed where it yields. A
session that is alone takes all steps in a row; an engine's thread does the work of other sessions in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Any, None, T]
Job = Callable[[], Steps[T]]


def at_once(function: Callable[[], T]) -> Job[T]:
    """A job that does `function` in a single step and returns its result."""

    def steps() -> Steps[T]:
        return function()
        yield

    return steps
