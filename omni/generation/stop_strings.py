"""Stop strings, looked for while an answer is written: what may be the beginning of one is held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Decided(NamedTuple):
    """What a step of the search has decided.

    text is certain to stay, and so are the next so many `tokens` of those that were held. cut: None while no stop
    string was found; else the text that stays of the token in which it begins (often "").
    """

    text: str
    tokens: int
    cut: str | None = None


class StopStrings:
    """The search of one answer for the stop string that is complete first (of several, the longest).

    Tokens are decided together where they share a character. Text that has been let go is not searched again.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.text = ""  # of the tokens that are held
        self.shown = 0  # characters of it that were let go
        self.parts: list[tuple[int, int]] = []  # tokens that share characters, and where their text ends
        self.open = 0  # tokens that end inside a character
        self.passed = 0  # characters up to which a stop string that was complete did not count

    @property
    def tokens(self) -> int:
        """How many tokens are held (after a stop string: how many were cut off)."""
        return self.open + sum(tokens for tokens, _ in self.parts)

    def push(self, text: str, *, whole: bool, counts: bool = True) -> Decided:
        """The next token and the text that it completes.

        whole: no character is unfinished. counts: a stop string that is complete now ends the answer.
        """
        self.text += text
        self.open += 1
        if whole:
            self._close_part()
        return self._decide(counts, len(self.text) - self._beginning())

    def finish(self, text: str, *, counts: bool = True) -> Decided:
        """The end of the answer: its last text, of the tokens that came already. Nothing is held any more."""
        self.text += text
        self._close_part()
        return self._decide(counts, len(self.text))

    def _close_part(self) -> None:
        if self.open:
            self.parts.append((self.open, len(self.text)))
            self.open = 0

    def _decide(self, counts: bool, certain: int) -> Decided:
        """Let go of the text up to `certain`, or of what comes before a stop string."""
        begin = self._found() if counts else None
        self.passed = self.passed if counts else len(self.text)
        stop = certain if begin is None else begin
        free = [(tokens, end) for tokens, end in self.parts if end <= stop]
        start = free[-1][1] if free else 0
        decided = Decided(
            self.text[self.shown : stop],
            sum(tokens for tokens, _ in free),
            None if begin is None else self.text[start:begin],
        )
        self.text, self.shown, self.passed = self.text[start:], stop - start, max(0, self.passed - start)
        self.parts = [(tokens, end - start) for tokens, end in self.parts[len(free) :]]
        return decided

    def _found(self) -> int | None:
        """Where the stop string begins that ends first."""
        first = {stop: max(self.shown, self.passed - len(stop) + 1) for stop in self.stops}
        found = [(at + len(stop), at) for stop in self.stops if (at := self.text.find(stop, first[stop])) >= 0]
        return min(found)[1] if found else None

    def _beginning(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        longest = min(max(map(len, self.stops)) - 1, len(self.text) - self.shown)
        ends = ((n, self.text[-n:]) for n in range(longest, 0, -1))
        return next((n for n, end in ends if any(len(s) > n and s.startswith(end) for s in self.stops)), 0)
