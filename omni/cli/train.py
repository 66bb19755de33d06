"""`omni train CONFIG.toml`: what a run will train, the run, and where its result lies."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni.training.run.stages import Run

_EPILOG = """\
Any setting of the file can be given after it, as table.key=value with the value in TOML:

  omni train configs/train_speaker.toml model.checkpoint=./checkpoint speaker.add=robin train.steps=500
  omni train configs/train_thinker_sft.toml 'data.train=[{ manifest = "mine.jsonl" }]' --dry-run
  torchrun --nproc-per-node 8 -m omni.cli train configs/train_s2_general.toml

A run whose save.folder holds a checkpoint goes on from there, exactly where it was. Ctrl-C ends it after the step, with
a checkpoint, and the command with code 130. docs/training.md walks from recordings to a new voice.
"""


HELP = "train a part of a model, as a TOML file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `omni train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Trains a part of a model as a TOML file says; the published stages are configs/train_*.toml."
    parser.epilog = _EPILOG
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run; see configs/train_*.toml")
    parser.add_argument("overrides", nargs="*", metavar="table.key=value", help="settings in place of the file's")
    parser.add_argument("--dry-run", action="store_true", help="load model and data, say what would learn, and end")
    parser.add_argument("--no-resume", action="store_true", help="an error instead, where save.folder holds a run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    from omni.training.data.tally import describe_counts
    from omni.training.parallel.processes import is_main, shut_down
    from omni.training.run.stages import build_run
    from omni.training.run.train_config import TrainConfig

    config = TrainConfig.from_toml(args.config, args.overrides)
    training = build_run(config)
    if is_main():
        _describe(training)
    if args.dry_run:
        shut_down()
        return 0
    result = training.train(resume=not args.no_resume)
    counts = describe_counts(training.trainer.data_counts())
    if is_main() and counts:
        print(f"data: {counts}", file=sys.stderr)
    if is_main():
        _conclude(training, result.step, result.stopped, result.skipped)
    shut_down()
    return 128 + (result.signal or signal.SIGINT) if result.stopped else 0  # as a shell says it


def _describe(training: Run) -> None:
    """What learns, on stderr: parameters by part."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("part", "learns", "of"):
        table.add_column(name, justify="left" if name == "part" else "right")
    parts: dict[str, list[int]] = {}
    for name, parameter in training.stage.module.named_parameters():
        counts = parts.setdefault(name.split(".")[0], [0, 0])
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    for part, (learns, total) in parts.items():
        table.add_row(part, f"{learns:,}", f"{total:,}")
    console = Console(stderr=True)
    console.print(f"objective {training.setup.config.train.objective}, {training.setup.config.train.steps} steps")
    console.print(table)


def _conclude(training: Run, step: int, stopped: bool, skipped: int) -> None:
    config = training.setup.config
    if skipped:
        print(f"{skipped} of {step} steps were skipped: no finite loss or gradient", file=sys.stderr)
    if stopped:
        where = f"; run the same command again to go on from {config.save.folder}" if config.save.folder else ""
        print(f"ended after step {step} of {config.train.steps}{where}", file=sys.stderr)
    elif config.save.export:
        print(f"the trained model is in {config.save.export}")
