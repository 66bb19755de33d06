"""The `omni` command. Results go to stdout, progress to stderr; an error is one line on stderr and an exit code:
2 for a misused command, 1 for anything that fails while it runs, 130 for Ctrl-C. OMNI_DEBUG=1 shows the stack.

Heavy imports stand inside the functions, so that `omni --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from omni.cli import bench, chat, demo, eval, info, speak, train
from omni.cli.failures import one_line

_DESCRIPTION = "Talk to Thinker-Talker models: text, audio, images and video in; text and speech out."
_EXAMPLES = """\
examples:
  omni demo
  omni chat --play
  omni chat --model Qwen/Qwen3-Omni-30B-A3B-Instruct --audio question.wav --out answer.wav
  omni chat --model ./checkpoint --image picture.png --no-audio "What is in the picture?"
  omni chat --model ./checkpoint --video clip.mp4 --use-audio-in-video "What happens, and what is said?"
  omni chat --model ./checkpoint --realtime --audio question.wav --play
  omni speak --model ./checkpoint --speaker Ethan --out hello.wav "Hello there."
  omni info ./checkpoint
  omni bench p2
  omni train configs/train_speaker.toml model.checkpoint=./checkpoint
  omni eval test.jsonl --model ./checkpoint
"""


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"omni {sys.modules['omni'].__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line of `omni`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="omni", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action=_Version, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)

    for command in (demo, chat, speak, info, bench, train, eval):
        command.add_arguments(commands.add_parser(command.__name__.rpartition(".")[2], help=command.HELP))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit code; misuse raises SystemExit(2)."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = args.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        print("omni: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: `omni info DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("OMNI_DEBUG"):
            raise
        print(f"omni: error: {one_line(error, args.command)}", file=sys.stderr)
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line; those meant for developers only on request."""
    if issubclass(category, UserWarning) or os.environ.get("OMNI_DEBUG"):
        print(f"omni: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
