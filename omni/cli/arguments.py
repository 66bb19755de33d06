"""Arguments that several commands of `omni` share, the types of their values, and the model that they name."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omni.config.writing import check_can_write

if TYPE_CHECKING:
    from rich.console import Console

    from omni.model import OmniModel

MODEL_HELP = "checkpoint folder or Hub id"
NANO = "omni-nano"  # as `omni.packaged.nano` says; not imported, so that `omni --help` answers at once
ANSWER = Path("answer.wav")  # of a conversation, with the answer's number in its name


def add_speech_arguments(parser: argparse.ArgumentParser, default_out: str | None) -> None:
    where = "sound file to write: .wav, .flac, .ogg or .mp3" + (f" (default: {default_out})" if default_out else "")
    parser.add_argument("--out", type=Path, required=default_out is None, metavar="F", help=where)
    parser.add_argument("--speaker", metavar="S", help="voice, as `omni info` lists them (default: the checkpoint's)")
    parser.add_argument("--max-frames", type=count_value, metavar="N", help="frames of speech at most, 80 ms each")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    parser.add_argument("--device", metavar="D", help="cpu, cuda:1, or auto for all (default: cuda, else cpu)")
    parser.add_argument("--quantize", choices=("int8", "int4", "fp8"), help="keep decoder weights at low precision")


def count_value(text: str) -> int:
    """argparse's type of a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def pace_value(text: str) -> float:
    """argparse's type of a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def seconds_value(text: str) -> float:
    """argparse's type of a positive number of seconds."""
    value = pace_value(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def consoles() -> tuple[Console, Console]:
    """For results and for progress. A pipe has no width of its own, so tables get room there."""
    from rich.console import Console

    out = Console() if sys.stdout.isatty() else Console(width=160)
    return out, Console(stderr=True)


def how_to_call(command: str) -> str:
    """What to type for a command of `omni` in the shell that this process was called from."""
    if shutil.which("omni"):
        return f"omni {command}"
    beside = Path(sys.executable).with_name("omni")  # an environment that is not active, such as that of `make demo`
    with suppress(ValueError):  # elsewhere: its whole path
        beside = beside.relative_to(Path.cwd())
    words = [str(beside)] if beside.exists() else [sys.executable, "-m", "omni.cli"]
    return shlex.join([*words, command])


def numbered(path: Path, number: int) -> Path:
    """The file of an answer in a conversation: answer.wav -> answer_1.wav."""
    return path.with_name(f"{path.stem}_{number}{path.suffix}")


def check_sound_path(path: Path) -> None:
    """Fail before the model is loaded rather than after it has spoken. Raises OSError or ValueError."""
    import soundfile

    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it or choose another --out")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file in it, such as {path / 'out.wav'}")
    if path.suffix.lstrip(".").upper() not in soundfile.available_formats():
        raise ValueError(f"--out {path} must end in .wav, .flac, .ogg or .mp3")
    check_can_write(path)


def check_media(**media: Sequence[str]) -> None:
    """Fail for a file that is not there before the model is loaded; addresses are left for later. `media`: sources by
    their kind. Raises FileNotFoundError or ValueError."""
    from omni.processing.sources import open_source

    for kind, sources in media.items():
        for source in sources:
            if not source.lower().startswith(("http://", "https://")):
                open_source(source, kind)


def load_model(args: argparse.Namespace, console: Console, parts: Sequence[str]) -> OmniModel:
    """The model that --model and --device name. All parts: as many as there are."""
    from omni.model import OmniModel
    from omni.parts import PARTS

    if args.quantize and args.device == "auto":
        args.misuse("--quantize packs a model on one device; leave --device auto out")
    placement = {"device_map": "auto"} if args.device == "auto" else {"device": args.device}
    dtype = "float32" if args.model == NANO else "auto"  # small enough, and faster on a CPU than bfloat16
    with console.status(f"loading {args.model} ..."):
        parts = PARTS if tuple(parts) == PARTS else parts
        return OmniModel.from_pretrained(args.model, parts=parts, dtype=dtype, quantize=args.quantize, **placement)


def or_nano(args: argparse.Namespace, progress: Console) -> None:
    """The packaged model where no other is named, and a line that says so."""
    if args.model is None:
        from omni.packaged.nano import NOTICE

        args.model = NANO
        progress.print(NOTICE, style="yellow", markup=False, highlight=False)
