"""`omni info`: its arguments; `omni.cli.checkpoint_info` is what it prints."""

from __future__ import annotations

import argparse

from omni.cli.arguments import consoles

HELP = "describe a checkpoint without loading it"


def add_arguments(info: argparse.ArgumentParser) -> None:
    """The arguments of `omni info`."""
    info.description = (
        "Parts, shapes, parameters, dtype, memory and speakers of a checkpoint, from config.json and the headers "
        "of its weight files. A folder or file with a config alone is described too."
    )
    info.add_argument("folder", help="checkpoint folder, or a config.json")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read and print. Raises FileNotFoundError or ValueError as `print_info`."""
    from omni.cli import checkpoint_info

    console, progress = consoles()
    with progress.status(f"reading {args.folder} ..."):
        checkpoint_info.print_info(console, args.folder)
