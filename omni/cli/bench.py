"""`omni bench`: its arguments, and the run over the rows that were asked for."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni.bench.rows import PARTS, ROWS, measure
from omni.cli.arguments import count_value
from omni.config.keywords import nearest
from omni.config.writing import check_can_write

if TYPE_CHECKING:
    from omni.bench.result import Row
    from omni.bench.workbench import Workbench

DESCRIPTION = """\
Measures the machine's own ceilings, then this library beside transformers: in one process, from one checkpoint folder
with random weights, in turns. Prints medians, 95th percentiles, ratios, shares of the roofline, and the targets.

rows:
  p1   time to the first audio sample          p7   batched speech beside single runs
  p2   cadence of speech frames                p8   real-time streams side by side
  p3   residual codes of a frame, full size    p9   load time and memory
  p4   Thinker decode                          p10  memory of a long session
  p5   mixture-of-experts block                p11  training step
  p6   Code2Wav frame by frame                 p12  import time
  growth  time and memory against context, batch, length of sound and number of sessions
  parts   the parts of a step alone (also: --parts)
  all     p1 to p12, growth and parts
"""
EXAMPLES = """\
examples:
  omni bench p2                                  one row, a minute or two
  omni bench p1 p2 p4 --threads 1 --compile      with compiled models
  omni bench --parts experts residual_codes      parts of a step alone
  omni bench growth --config configs/tiny.json   how cost grows, at tiny widths
  omni bench all --out benchmarks                everything, into results.json, RESULTS.md and results.png
  omni bench p1 p4 p7 --config configs/qwen2_5_omni_3b.json   the second family, on a GPU
  omni bench p1 p2 --config configs/qwen3_omni_30b_a3b.json --share-weights   all of it, on one large GPU
  omni bench --out benchmarks                    only write the page again from results.json
"""
HELP = "measure speed and memory beside transformers"


def _one_of(names: Sequence[str], kind: str) -> Callable[[str], str]:
    """argparse's type of a name; a wrong one is answered with the nearest right one."""

    def read(text: str) -> str:
        name = text.lower().replace("-", "_")
        if name in names:
            return name
        hint = nearest(name, names, f"there are {', '.join(names)}", cutoff=0.4)
        raise argparse.ArgumentTypeError(f"there is no {kind} {text!r}; {hint}")

    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", nargs="*", type=_one_of((*ROWS, "all"), "row"), metavar="ROW", help="rows to measure")
    parser.add_argument(
        "--parts", nargs="*", type=_one_of(PARTS, "part"), metavar="PART", help=f"time parts alone: {', '.join(PARTS)}"
    )
    parser.add_argument("--config", type=Path, metavar="F", help="config of the models (default: configs/bench.json)")
    parser.add_argument(
        "--released",
        type=Path,
        metavar="F",
        help="config of the full-size parts (default: configs/qwen3_omni_30b_a3b.json)",
    )
    parser.add_argument("--repeats", type=count_value, default=5, metavar="N", help="rounds of turns (default: 5)")
    parser.add_argument("--threads", type=count_value, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 on a GPU"
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled models too; compiling takes minutes")
    parser.add_argument(
        "--share-weights", action="store_true",
        help="build the models of --config on the device, both sides on the same tensors, instead of by way of a "
        "folder: for what does not fit twice",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="smallest sizes: shows that a row runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there; rows it holds already stay")
    parser.add_argument("--out", type=Path, metavar="DIR", help="update results.json, RESULTS.md and results.png there")
    parser.set_defaults(run=run, misuse=parser.error)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or FileNotFoundError for what cannot be done."""
    names = list(dict.fromkeys(ROWS if "all" in args.rows else args.rows))
    if args.parts is not None and "parts" not in names:
        names.append("parts")
    if not names and args.out is None:
        args.misuse("nothing to measure: name a row, such as p2, or all")
    for path in (args.out, args.json.parent if args.json else None):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"folder {path} does not exist; create it, or choose another")
    from rich.console import Console

    from omni.bench.report import read_rows, show

    files = [path for path in (args.json, args.out and args.out / "results.json") if path]
    for path in files:
        read_rows(path)  # fail before measuring rather than after
        check_can_write(path)
    from omni.bench.workbench import first_line

    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not names:
        _write(args, read_rows(files[-1]))
        return
    failed = []
    with _workbench(args) as bench:
        for name in names:
            try:
                row = measure(bench, name)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a GPU that is out of memory is one
                if len(names) == 1:
                    raise
                failed.append(f"{name} ({first_line(error)})")
                print(f"omni: error: {name}: {first_line(error)}", file=sys.stderr)
                continue
            show(console, row)
            _write(args, [row])
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} rows could not be measured: {', '.join(failed)}")


def _workbench(args: argparse.Namespace) -> Workbench:
    """The workbench that the arguments describe."""
    import warnings

    import torch

    from omni.bench.checkpoint import config_path
    from omni.bench.sides import peer_class
    from omni.bench.workbench import Options, Workbench

    warnings.simplefilter("ignore")  # transformers' advice on settings that are measured on purpose
    peer_class("qwen3_omni_moe")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} is not measured; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU; leave --device out")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    terminal = sys.stderr.isatty()

    def progress(text: str) -> None:
        print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    command = shlex.join(["omni", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else "omni bench"
    options = Options(
        config=args.config or config_path("bench.json"),
        released=args.released or config_path("qwen3_omni_30b_a3b.json"),
        device=device,
        dtype=getattr(torch, dtype),
        repeats=args.repeats,
        compile=args.compile,
        share=args.share_weights,
        quick=args.quick,
        command=command,
        parts=tuple(args.parts or ()),
        progress=progress,
    )
    return Workbench(options)


def _write(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Merge rows into the files that were asked for."""
    from omni.bench.report import plot, read_rows, update_page, write_json

    order = list(ROWS)
    for path in (args.json, args.out and args.out / "results.json"):
        if path is None:
            continue
        held = {row.name: row for row in read_rows(path)} | {row.name: row for row in rows}
        merged = [held[name] for name in sorted(held, key=order.index)]
        write_json(path, merged)
        if args.out is not None and path.parent == args.out:
            drawn = plot(args.out / "results.png", merged)
            update_page(args.out / "RESULTS.md", merged, "results.png" if drawn else None)
            if not drawn:
                print("omni: no plot: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
