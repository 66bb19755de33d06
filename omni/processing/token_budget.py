"""What a conversation will cost in tokens, compared with the model's positions before anything large is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omni.config.reading import warn_user

USUAL_POSITIONS = 131_072  # where no config.json says how many the model has
_CUT = 8  # tokens more than there would be, at most, where a text is cut in two
_SHORT = 4  # characters a position


class TooLongError(ValueError):
    """A conversation has more tokens than the model has positions."""


@dataclass
class TokenBudget:
    """The tokens of one conversation so far, against a model's positions (None: `USUAL_POSITIONS`).

    allow_long: warn once instead of raising `TooLongError` (None: a caller that has no such choice).
    """

    positions: int | None
    allow_long: bool | None = False
    used: int = 0

    @property
    def limit(self) -> int:
        return USUAL_POSITIONS if self.positions is None else self.positions

    def check(self, tokens: int, name: str = "text") -> None:
        """Raise or warn if so many tokens more are too many; `name` says of what."""
        if self.used + tokens <= self.limit:
            return
        has = f"the model has positions for {self.limit:,}"
        if self.positions is None:
            has = f"the limit where config.json does not name the model's positions is {self.limit:,}"
        message = (
            f"the conversation has at least {self.used + tokens:,} tokens ({tokens:,} of {name}), {has}; shorten it, "
            "or lower fps, max_pixels or max_frames of its media"
        )
        if not self.allow_long:
            raise TooLongError(message + (" (allow_long=True only warns)" if self.allow_long is False else ""))
        self.positions = 2**62  # once
        warn_user(message)

    def spend(self, tokens: int, name: str) -> None:
        """Count tokens that are there."""
        self.check(tokens, name)
        self.used += tokens

    def check_text(self, text: str, encode: Callable[[str], list[int]], short: int = _SHORT) -> None:
        """Count a long text in pieces, up to the limit and no further; tokenised at once it takes hundreds of times
        its own memory. Texts of up to `short` characters a position are left to be tokenised."""
        piece = self.limit
        if self.allow_long or len(text) <= short * piece:
            return
        tokens = 0
        for first in range(0, len(text), piece):
            tokens += len(encode(text[first : first + piece])) - _CUT
            self.check(tokens)
