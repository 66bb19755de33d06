"""The rows of `omni bench` by name, the parts that can be timed alone, and how one row is measured."""

from __future__ import annotations

import time
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni.bench.result import Row
    from omni.bench.workbench import Workbench

ROWS = {
    "p1": "rows_speech:first_audio",
    "p2": "rows_speech:frame_cadence",
    "p3": "rows_decode:residual_codes",
    "p4": "rows_decode:thinker_decode",
    "p5": "rows_experts:experts",
    "p6": "rows_decode:codec",
    "p7": "rows_speech:batched_speech",
    "p8": "rows_streams:streams",
    "p9": "rows_process:loading",
    "p10": "rows_streams:long_session",
    "p11": "rows_training:training",
    "p12": "rows_process:importing",
    "growth": "growth:growth",
    "parts": "parts:parts",
}
PARTS = ("thinker", "talker", "layers", "attention", "experts", "residual_codes", "codec", "encoder")


def measure(bench: Workbench, name: str) -> Row:
    """One row by its name, with the labels of its run and the seconds that it took."""
    module, function = ROWS[name].split(":")
    labels = bench.run_labels()
    start = time.perf_counter()
    row: Row = getattr(import_module(f"omni.bench.{module}"), function)(bench)
    row.remarks += bench.notes
    bench.notes.clear()
    row.run = {**labels, "seconds": round(time.perf_counter() - start, 1)}
    return row
