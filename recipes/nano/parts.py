"""The finished parts of omni-nano, each a file of its own: shards of a checkpoint, in bfloat16.

    python recipes/nano/parts.py split CHECKPOINT FOLDER audio_encoder vision_encoder
    python recipes/nano/parts.py join START FOLDER OUT      # START's files, with the parts that FOLDER has

A part that is trained is written once and not changed again: `recipes/nano/parts` has those of the next omni-nano so
far. The others begin from them, and the last one makes them a model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.checkpoint.shards import INDEX, WEIGHTS

PARTS = Path(__file__).resolve().parent / "parts"
PREFIXES = {  # of the names in a file
    "audio_encoder": "thinker.audio_tower.", "vision_encoder": "thinker.visual.", "thinker": "thinker.",
    "talker": "talker.", "code2wav": "code2wav.",
}  # fmt: skip


def part_of(key: str) -> str:
    """The part that a weight belongs to. Raises ValueError for a weight of none."""
    found = [part for part, prefix in PREFIXES.items() if key.startswith(prefix)]
    if not found:
        raise ValueError(f"{key} belongs to none of {', '.join(PREFIXES)}")
    return max(found, key=lambda part: len(PREFIXES[part]))


def split(checkpoint: Path, folder: Path, parts: Sequence[str]) -> None:
    """Write some parts of a checkpoint into a folder, a file each."""
    weights = load_file(checkpoint / WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        own = {key: value.to(torch.bfloat16).contiguous() for key, value in weights.items() if part_of(key) == part}
        save_file(own, folder / f"{part}.safetensors", {"format": "pt"})


def join(start: Path, folder: Path, out: Path) -> list[str]:
    """Write the checkpoint of `start` with the parts that a folder has; returns which.

    Where all are there, the files are the parts' own and an index; else one file of float32, to be trained further.
    """
    there = [part for part in PREFIXES if (folder / f"{part}.safetensors").exists()]
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("*.safetensors", INDEX), dirs_exist_ok=True)
    weights = {} if len(there) == len(PREFIXES) else load_file(start / WEIGHTS)
    owned: dict[str, Mapping[str, Tensor]] = {part: load_file(folder / f"{part}.safetensors") for part in there}
    for part, own in owned.items():
        wanted = {key for key in weights if part_of(key) == part}
        if weights and wanted != own.keys():
            raise ValueError(f"{part}.safetensors is of another model: {sorted(wanted ^ own.keys())[:3]}")
        weights |= {key: value.float() for key, value in own.items()} if weights else {}
    if weights:
        save_file(weights, out / WEIGHTS, {"format": "pt"})
        return there
    for part in there:
        shutil.copyfile(folder / f"{part}.safetensors", out / f"{part}.safetensors")
    every = [(key, part, value) for part, own in owned.items() for key, value in own.items()]
    index = {
        "metadata": {
            "total_parameters": sum(value.numel() for *_, value in every),
            "total_size": sum(value.nbytes for *_, value in every),
        },
        "weight_map": {key: f"{part}.safetensors" for key, part, _ in sorted(every, key=lambda one: one[0])},
    }
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("split", help="write parts of a checkpoint")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("folder", type=Path)
    command.add_argument("parts", nargs="+", choices=list(PREFIXES))
    command = commands.add_parser("join", help="write a checkpoint that has them")
    for name in ("start", "folder", "out"):
        command.add_argument(name, type=Path)
    args = parser.parse_args()
    if args.command == "split":
        split(args.checkpoint, args.folder, args.parts)
    else:
        print("parts:", ", ".join(join(args.start, args.folder, args.out)))


if __name__ == "__main__":
    main()
