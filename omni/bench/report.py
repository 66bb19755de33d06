"""Results as text: on the terminal and in Markdown tables, in JSON, and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from omni.bench.result import Growth, Row, Table, Verdict

START, END = "<!-- results: written by `omni bench --out`, do not edit below -->", "<!-- end of results -->"
_UNITS = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))}
Cells = tuple[list[str], list[list[str]]]


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit, three digits: 0.0021, "s" -> "2.10 ms"."""
    if value is None or not math.isfinite(value):
        return ""
    for size, name in _UNITS.get(unit, ()):
        if abs(value) >= size:
            return f"{_three(value / size)} {name}"
    if unit == "x":
        return f"{_three(value)}x"
    if unit in _UNITS and value:
        size, name = _UNITS[unit][-1]
        return f"{_three(value / size)} {name}"
    return f"{_three(value)} {unit}".strip()


def _three(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def table_cells(table: Table, bandwidth: float) -> Cells:
    """Header and rows of a table; the share is of the bandwidth in bytes a second."""
    head = ["", "median", "p95"]
    shared = any(series.bytes_touched for series in table.series)
    if table.rate is not None:
        head.append(table.rate[0])
    if table.baseline is not None:
        head.append(f"against {table.baseline}")
    if shared:
        head.append("of the roofline")
    rows = []
    for series in table.series:
        cells = [series.name, quantity(series.median, table.unit), quantity(series.p95, table.unit)]
        if table.rate is not None:
            cells.append(_three(table.rate[1] / series.median))
        if table.baseline is not None:
            cells.append(quantity(table.ratio(series.name), "x"))
        if shared:
            share = (series.bytes_touched or 0) / bandwidth / series.median
            cells.append(f"{share:.1%}" if share else "")
        rows.append(cells)
    return head, rows


def growth_cells(growth: Growth) -> Cells:
    """Header and rows of a growth table, the exponents last."""
    names = list(growth.curves)
    rows = [
        [f"{x:g}", *(quantity(growth.curves[name][i], growth.unit) for name in names)]
        for i, x in enumerate(growth.x)
    ]  # fmt: skip
    exponents = [growth.exponent(name) for name in names]
    rows.append(["exponent", *("" if math.isnan(p) else f"{p:.2f}" for p in exponents)])
    return [growth.x_name, *names], rows


def verdict_cells(verdicts: Sequence[Verdict]) -> Cells:
    """Header and rows of targets."""
    rows = [
        [
            v.claim,
            quantity(v.value, v.unit),
            f"{v.relation} {quantity(v.target, v.unit)}",
            "met" if v.met else "NOT met",
        ]
        for v in verdicts
    ]
    return ["target", "measured", "wanted", ""], rows


def show(console: Console, row: Row) -> None:
    """Print one row."""
    console.print(f"\n{row.name}: {row.title}", style="bold", markup=False, highlight=False)
    bandwidth = _bandwidth(row)
    for title, labels, cells in _all_cells(row, bandwidth):
        caption = ", ".join(f"{name} {value}" for name, value in labels.items())
        console.print(f"\n{title} ({caption})", markup=False, highlight=False, soft_wrap=True)
        console.print(_rich(cells))
    if row.verdicts:
        console.print()
        console.print(_rich(verdict_cells(row.verdicts)))
    for remark in row.remarks:
        console.print(f"- {remark}", markup=False, highlight=False, soft_wrap=True)


def _rich(cells: Cells) -> RichTable:
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left")
    for values in cells[1]:
        table.add_row(*values)
    return table


def _all_cells(row: Row, bandwidth: float) -> Iterable[tuple[str, dict[str, str], Cells]]:
    for table in row.tables:
        yield table.title, table.labels, table_cells(table, bandwidth)
    for growth in row.growths:
        yield growth.title, growth.labels, growth_cells(growth)


def _bandwidth(row: Row) -> float:
    ceilings = row.run.get("ceilings") or {}
    return max(ceilings.get("copy_bytes_s", 0.0), ceilings.get("read_bytes_s", 0.0)) or math.inf


def markdown(rows: Sequence[Row]) -> str:
    """All rows as Markdown: what was met, then each row with its tables, labels, remarks and command."""
    lines = ["| row | target | measured | wanted | |", "|---|---|---|---|---|"]
    for row in rows:
        for cells in verdict_cells(row.verdicts)[1]:
            lines.append(_line([row.name, *cells]))
    for row in rows:
        lines += ["", f"## {row.name}: {row.title}", ""]
        lines += [_run_line(row), ""] if row.run else []
        for title, labels, (head, body) in _all_cells(row, _bandwidth(row)):
            caption = ", ".join(f"{name} {value}" for name, value in labels.items() if row.run.get(name) != value)
            lines += [f"**{title}**" + (f" ({caption})" if caption else ""), "", _line(head)]
            lines += [_line(["---"] * len(head)), *map(_line, body), ""]
        lines += [f"- {remark}" for remark in row.remarks]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _run_line(row: Row) -> str:
    run = row.run
    ceilings = run["ceilings"]
    machine = ", ".join(f"{run[name]}" for name in ("device", "dtype") if name in run)
    threads = f", {run['threads']} of {run['cores']} cores" if "threads" in run else ""
    return (
        f"`{run['command']}`: {run['config']}, {machine}{threads}, Python {run['python']}, torch {run['torch']}, "
        f"transformers {run['transformers']}; copy {quantity(ceilings['copy_bytes_s'], 'B')}/s, "
        f"read {quantity(ceilings['read_bytes_s'], 'B')}/s, matrix product {ceilings['flops_s'] / 1e12:.3g} TFLOP/s."
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON file that `write_json` wrote; none if there is no such file. Raises ValueError for another one."""
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        held = data["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `omni bench`; move it away or choose another file") from error
    return [Row.from_dict(values) for values in held]


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    text = json.dumps({"rows": [_finite(row.to_dict()) for row in rows]}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def update_page(path: Path, rows: Sequence[Row], picture: str | None) -> None:
    """Replace what stands between the marks of a Markdown page; a page without them, or none, gets them at its end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    head, _, rest = text.partition(START)
    tail = rest.partition(END)[2]
    image = f"![Measured against the targets]({picture})\n\n" if picture else ""
    path.write_text(f"{head.rstrip()}\n\n{START}\n\n{image}{markdown(rows)}\n{END}{tail or chr(10)}", encoding="utf-8")


def plot(path: Path, rows: Sequence[Row]) -> bool:
    """A PNG of how far each target is reached, and of the growth curves. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(f"{row.name}  {v.claim}", _reached(v), v.met) for row in rows for v in row.verdicts]
    growths = [growth for row in rows if row.name == "growth" for growth in row.growths]
    panels = -(-len(growths) // 2)
    if not bars and not growths:
        return False
    heights = [0.28 * len(bars) + 1, 3.2 * panels]
    shown = [i for i, there in enumerate((bars, growths)) if there]
    figure = pyplot.figure(figsize=(10, sum(heights[i] for i in shown)), layout="constrained")
    parts = figure.subfigures(len(shown), 1, height_ratios=[heights[i] for i in shown], squeeze=False)[:, 0]
    for part, i in zip(parts, shown):
        if i == 0:
            _draw_bars(part, bars)
        else:
            _draw_growths(part, growths)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


def _draw_bars(figure: Any, bars: Sequence[tuple[str, float, bool]]) -> None:
    """How far each target is reached."""
    axes = figure.subplots()
    colours = ["#265ca8" if met else "#c0504d" for *_, met in bars]
    axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color=colours)
    axes.axvline(1, color="#282830", linewidth=1)
    axes.set(xscale="log", xlabel="measured over the target (right of 1: met)", xlim=(0.1, 100))
    axes.margins(y=0.01)
    axes.invert_yaxis()


def _draw_growths(figure: Any, growths: Sequence[Growth]) -> None:
    """The growth curves, two side by side."""
    panels = figure.subplots(-(-len(growths) // 2), 2, squeeze=False).flat
    for axes, growth in zip(panels, growths):
        for name, values in growth.curves.items():
            axes.plot(growth.x, [v or math.nan for v in values], marker="o", markersize=4, label=name)
        axes.set(title=growth.title, xlabel=growth.x_name, ylabel=growth.unit, xscale="log", yscale="log")
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xticks(growth.x[::2], [f"{x:g}" for x in growth.x[::2]])
        axes.legend(fontsize=7)
    for axes in panels:  # an odd number leaves one empty
        axes.set_axis_off()


def _reached(verdict: Verdict) -> float:
    """Above 1 where the target is met: the measure over the target, or the reverse where less is better."""
    value, target = max(verdict.value, 1e-9), max(verdict.target, 1e-9)
    return min(1e3, max(1e-3, value / target if verdict.relation == ">=" else target / value))
