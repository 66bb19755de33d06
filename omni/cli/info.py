"""`omni info`: its arguments; `omni.cli.checkpoint_info` is what it prints."""

from __future__ import annotations

import argparse

from omni.cli.arguments import MODEL_HELP, NANO, consoles

HELP = "describe a checkpoint without loading it"


def add_arguments(info: argparse.ArgumentParser) -> None:
    """The arguments of `omni info`."""
    info.description = (
        "Parts, shapes, parameters, dtype, memory and speakers of a checkpoint, from config.json and the headers "
        "of its weight files. A folder or file with a config alone is described too."
    )
    info.add_argument("folder", nargs="?", help=f"{MODEL_HELP}, or a config.json (default: {NANO})")
    info.add_argument("--model", metavar="DIR", help="the same, as the other commands have it")
    info.set_defaults(run=run, misuse=info.error)


def run(args: argparse.Namespace) -> None:
    """Read and print. Raises FileNotFoundError or ValueError as `print_info`."""
    from omni.cli import checkpoint_info

    if args.folder and args.model:
        args.misuse("name one checkpoint, with --model or without")
    name = args.folder or args.model or NANO
    console, progress = consoles()
    with progress.status(f"reading {name} ..."):
        checkpoint_info.print_info(console, name)
