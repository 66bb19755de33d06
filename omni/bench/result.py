"""What a measurement yields: series, tables, growth curves and verdicts, as plain data that JSON can hold."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from omni.bench.timing import paired_ratio, percentile


@dataclass
class Series:
    """Samples of one thing in its table's unit, one list a round. bytes_touched: what one sample must read."""

    name: str
    rounds: list[list[float]]
    bytes_touched: float | None = None
    note: str = ""

    @property
    def samples(self) -> list[float]:
        """The samples of all rounds."""
        return [value for samples in self.rounds for value in samples]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        return percentile(self.samples, 0.95)


@dataclass
class Verdict:
    """A target and what was measured: value `relation` target, where relation is ">=" or "<="."""

    claim: str
    value: float
    relation: str
    target: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.relation == ">=" else self.value <= self.target


@dataclass
class Table:
    """Series that were measured in turns. unit: "s" or "B", less is better in both.

    baseline: the series that ratios refer to. rate: (unit, count), what one sample makes: ("tok/s", 1).
    """

    title: str
    unit: str
    labels: dict[str, str]
    series: list[Series]
    baseline: str | None = None
    rate: tuple[str, float] | None = None

    def __getitem__(self, name: str) -> Series:
        return next(series for series in self.series if series.name == name)

    def ratio(self, name: str, over: str | None = None) -> float:
        """How many times better `name` is than `over` (default: the baseline), round by round."""
        reference = over or self.baseline
        assert reference is not None, "a table without a baseline has no ratios"
        return paired_ratio(self[reference].rounds, self[name].rounds)


@dataclass
class Growth:
    """How `y` grows with `x`. curves: name -> one value an x, None where not measured, in `unit`."""

    title: str
    x_name: str
    unit: str
    labels: dict[str, str]
    x: list[float]
    curves: dict[str, list[float | None]]

    def exponent(self, name: str) -> float:
        """The p of y ~ x^p by least squares in logarithms over the upper half of the points (nan: too few)."""
        points = [(math.log(x), math.log(y)) for x, y in zip(self.x, self.curves[name]) if x > 0 and y]
        points = points[-max(2, (len(points) + 1) // 2) :]
        if len({x for x, _ in points}) < 2:
            return math.nan
        return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


@dataclass
class Row:
    """The result of one row of `omni bench`. remarks: how it was measured, and what did not work."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)  # machine, versions, command, ceilings

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, medians included."""
        data = asdict(self)
        for table, values in zip(self.tables, data["tables"]):
            for series, held in zip(table.series, values["series"]):
                held |= {"median": series.median, "p95": series.p95}
                if table.baseline is not None:
                    held["ratio"] = table.ratio(series.name)
        for verdict, values in zip(self.verdicts, data["verdicts"]):
            values["met"] = verdict.met
        for growth, values in zip(self.growths, data["growths"]):
            values["exponents"] = {name: growth.exponent(name) for name in growth.curves}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The reverse of `to_dict`; what it derived is computed anew. Raises ValueError for anything else."""
        try:
            tables = [
                Table(
                    t["title"],
                    t["unit"],
                    t["labels"],
                    [Series(s["name"], s["rounds"], s["bytes_touched"], s["note"]) for s in t["series"]],
                    t["baseline"],
                    tuple(t["rate"]) if t["rate"] else None,
                )
                for t in data["tables"]
            ]
            names = ("title", "x_name", "unit", "labels", "x", "curves")
            growths = [Growth(**{name: g[name] for name in names}) for g in data["growths"]]
            parts = ("claim", "value", "relation", "target", "unit")
            verdicts = [Verdict(**{name: v[name] for name in parts}) for v in data["verdicts"]]
            return cls(data["name"], data["title"], tables, growths, verdicts, data["remarks"], data["run"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not results of `omni bench`: {error!r}") from error
