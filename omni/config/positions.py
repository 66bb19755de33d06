"""How a family lays positions out in time; the rules themselves are in `omni.rope.positions`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PositionRule:
    """The defaults are Qwen3-Omni's.

    rate: positions in a second of video or sound, one audio token each. whole: times of videos are rounded down to
    whole positions. chunk_s: a video and its sound take turns by chunks of so many seconds, the video's tokens first
    (None: token by token in the order of time). joint_marks: the two begin tokens of a video with sound share one
    position, and so do its two end tokens.
    """

    rate: float
    whole: bool = False
    chunk_s: float | None = None
    joint_marks: bool = False

    @classmethod
    def of(cls, rule: PositionRule | float) -> PositionRule:
        """A bare number is a rate, under the default rules."""
        return rule if isinstance(rule, PositionRule) else cls(rule)

    def at(self, rate: float | None) -> PositionRule:
        """This rule with another number of positions a second (None: its own)."""
        return self if rate is None else replace(self, rate=rate)
