"""What becomes of rows that are drawn and give nothing, or not all they have: named once, counted by reason."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omni.training.data.mixture import Mixture

_NAMED = 5  # bad rows that an error lists


@dataclass
class Tally:
    """bad: name -> reason of rows with which something is wrong, at most `limit`; left_out: draws of sound rows that
    were not used, by reason; cut: draws of which not everything was used, by what was not."""

    limit: int
    bad: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)

    def leave_out(self, name: str, reason: str, kind: str) -> None:
        """Count a sound row; the first of its kind is named by a warning."""
        self.left_out[kind] += 1
        if self.left_out[kind] == 1:
            warnings.warn(f"{name} is left out: {reason}; further ones are counted", stacklevel=6)

    def pass_over(self, name: str, reason: str) -> None:
        """Keep a bad row. Raises ValueError, naming the first ones, where there are too many."""
        if name in self.bad:
            return
        self.bad[name] = reason
        if len(self.bad) > self.limit:
            first = "".join(f"\n  {name}: {reason}" for name, reason in list(self.bad.items())[:_NAMED])
            raise ValueError(f"{len(self.bad)} rows are bad, more than skip_limit {self.limit}:{first}")
        warnings.warn(f"{name} is skipped: {reason}", stacklevel=6)

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": dict(self.bad),
            "left_out": self.left_out.total(),
            "reasons": dict(self.left_out),
            "cut": dict(self.cut),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bad = dict(state["skipped"])
        self.left_out = Counter(state.get("reasons", {"left out": state["left_out"]}))
        self.cut = Counter(state.get("cut", {}))

    def counts(self, drawn: int, filtered: int) -> dict[str, Any]:
        """The numbers for a log: rows drawn, and those of them that were filtered, left out, cut or bad; no zeros."""
        found: dict[str, Any] = {"filtered": filtered, "left_out": dict(self.left_out), "cut": dict(self.cut)}
        found = {key: value for key, value in {**found, "bad": len(self.bad)}.items() if value}
        return {"drawn": drawn, **found} if found else {}


class Tallied:
    """Batches drawn from a mixture, and what they tell of the rows that they did not use."""

    mixture: Mixture
    tally: Tally

    @property
    def skipped(self) -> dict[str, str]:
        """Bad rows, name -> reason."""
        return self.tally.bad

    @property
    def left_out(self) -> int:
        """Draws of rows that are too long, or not to be used for another reason (`tally.left_out`)."""
        return self.tally.left_out.total()

    def counts(self) -> dict[str, Any]:
        """What was drawn and not used so far, by reason."""
        return self.tally.counts(self.mixture.draws, sum(self.mixture.dropped))


def add_counts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of what several processes have counted."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            else:
                total[key] = total.get(key, 0) + value
    return total


def describe_counts(counts: Mapping[str, Any]) -> str:
    """One line: what was drawn, and what of it was not used; empty where everything was."""
    if not counts:
        return ""
    parts = [f"{counts['drawn']} rows drawn"]
    if "filtered" in counts:
        parts.append(f"{counts['filtered']} turned down by filters")
    for key, words in (("left_out", "left out"), ("cut", "cut")):
        parts += [f"{number} {words} ({reason})" for reason, number in counts.get(key, {}).items()]
    if "bad" in counts:
        parts.append(f"{counts['bad']} bad")
    return ", ".join(parts)
