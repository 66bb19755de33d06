"""Rows on the process: loading (p9) and importing (p12), each in a fresh Python."""

from __future__ import annotations

from functools import partial

import torch

from omni.bench.probe import import_seconds, probe
from omni.bench.result import Row, Series, Table, Verdict
from omni.bench.timing import take_turns
from omni.bench.workbench import Workbench


def loading(bench: Workbench) -> Row:
    """p9: seconds and peak memory of `from_pretrained`, from the same folder."""
    row = Row("p9", "Loading a checkpoint")
    folder = str(bench.folder)
    dtype = str(bench.dtype).removeprefix("torch.")
    found: dict[str, list[dict[str, float]]] = {"omni": [], "transformers": []}
    for turn in range(1 + bench.repeats):  # the first turn brings the files into the page cache
        for side, results in found.items():
            bench.say(f"loading in a fresh process: {side}, {turn} of {bench.repeats}")
            got = probe(
                "load", side=side, folder=folder, dtype=dtype, device=str(bench.device), threads=torch.get_num_threads()
            )
            if turn:
                results.append(got)
    kept = found["omni"][0]["kept"]
    labels = bench.labels(weights=f"{kept / 1e6:.0f} MB")
    seconds = Table("load", "s", labels, _series(found, "seconds"), "transformers")
    row.tables.append(seconds)
    row.verdicts.append(Verdict("load time over transformers'", 1 / seconds.ratio("omni"), "<=", 1.0))
    if all(got["peak"] is not None for results in found.values() for got in results):
        memory = Table("peak memory while loading", "B", labels, _series(found, "peak"), "transformers")
        row.tables.append(memory)
        row.verdicts.append(Verdict("peak memory over bytes kept", memory["omni"].median / kept, "<=", 1.1))
    else:
        row.remarks.append("This system does not tell a process's anonymous memory; peaks were not measured.")
    row.remarks.append(
        "Imports come before the clock, the files are in the page cache, and the folder holds no processor. Peak: "
        "anonymous memory (on a GPU its allocator's) beyond what was there before."
    )
    return row


def _series(found: dict[str, list[dict[str, float]]], key: str) -> list[Series]:
    return [Series(side, [[got[key]] for got in results]) for side, results in found.items()]


def importing(bench: Workbench) -> Row:
    """p12: seconds of `import omni` and of the model's class beside `import torch`."""
    row = Row("p12", "Import time")
    statements = ("import torch", "import omni", "from omni import OmniModel")
    runs = {code: partial(import_seconds, code) for code in statements}
    rounds = take_turns(runs, bench.repeats, progress=bench.say)
    table = Table("import", "s", bench.labels(), [Series(code, samples) for code, samples in rounds.items()])
    row.tables.append(table)
    base = table["import torch"].median
    for code in statements[1:]:
        row.verdicts.append(Verdict(f"{code}, beyond import torch", table[code].median - base, "<=", 0.5, "s"))
    row.remarks.append("`import omni` alone loads no PyTorch: names are imported on first use.")
    return row
