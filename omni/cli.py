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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omni.bench.command import add_arguments as add_bench_arguments
from omni.eval_command import add_arguments as add_eval_arguments
from omni.train_command import add_arguments as add_train_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from omni.model import OmniModel
    from omni.realtime import Player, Reply

_DESCRIPTION = "Talk to Thinker-Talker models: text, audio, images and video in; text and speech out."
_EXAMPLES = """\
examples:
  omni demo
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
_MODEL_HELP = "checkpoint folder or Hub id"
_NANO = "omni-nano"  # as `omni.nano` says; not imported, so that `omni --help` answers at once


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `omni`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="omni", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="put three packaged questions to the packaged model omni-nano",
        description="omni-nano, the small trained model that is part of omni, answers a spoken request, a spoken "
        "question about a picture, and a clip that asks in its sound. Prints each answer as it comes and a table of "
        "latencies; writes answer_1.wav to answer_3.wav, and all of them as out.wav with its picture, out.png.",
    )
    demo.add_argument("--out-dir", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")
    demo.set_defaults(run=_run_demo)

    chat = commands.add_parser(
        "chat",
        help="ask a checkpoint about text, audio, images and video",
        description="Asks one question and prints the answer; a checkpoint that speaks also writes it as sound. Media "
        "come before the text, audio first, then images, then videos; each option may be repeated. With --realtime "
        "one sound file, one video or both are fed to a session as if they happened now, after the images and before "
        "the text; both together are a video with that sound.",
    )
    chat.add_argument("text", nargs="?", help="what to say; may be left out when there is audio")
    chat.add_argument("--model", metavar="DIR", help=f"{_MODEL_HELP} (default: {_NANO}, which is part of omni)")
    for kind in ("audio", "image", "video"):
        chat.add_argument(f"--{kind}", action="append", default=[], metavar="F", help=f"{kind} file or address")
    chat.add_argument("--use-audio-in-video", action="store_true", help="listen to the videos' sound too")
    chat.add_argument("--system", metavar="TEXT", help="system prompt (default: what its speech needs, if anything)")
    chat.add_argument("--max-new-tokens", type=_count, default=1024, metavar="N", help="default: 1024")
    chat.add_argument("--no-audio", action="store_true", help="answer in text only; the Talker is not loaded")
    _add_speech_arguments(chat, "out.wav")
    chat.add_argument("--play", action="store_true", help="play the answer while it is made (package sounddevice)")
    live = chat.add_argument_group("real time")
    live.add_argument("--realtime", action="store_true", help="feed the media at their own pace; print a latency table")
    live.add_argument("--pace", type=_pace, metavar="X", help="speed of the feeding (default: 1; 0: without waiting)")
    live.add_argument(
        "--audio-window", type=_seconds, metavar="S", help="attention window of the hearing (default: the checkpoint's)"
    )
    chat.set_defaults(run=_run_chat, misuse=chat.error)

    speak = commands.add_parser(
        "speak",
        help="say a text",
        description="Writes speech for a given text. Without --model it is spoken by omni-nano, which knows about "
        "a hundred words.",
    )
    speak.add_argument("text", help="what to say")
    speak.add_argument("--model", metavar="DIR", help=f"{_MODEL_HELP} (default: {_NANO}, which is part of omni)")
    _add_speech_arguments(speak, None)
    speak.set_defaults(run=_run_speak, misuse=speak.error)

    info = commands.add_parser(
        "info",
        help="describe a checkpoint without loading it",
        description="Parts, shapes, parameters, dtype, memory and speakers of a checkpoint, from config.json and the "
        "headers of its weight files. A folder or file with a config alone is described too.",
    )
    info.add_argument("folder", type=Path, help="checkpoint folder, or a config.json")
    info.set_defaults(run=_run_info)

    bench = commands.add_parser("bench", help="measure speed and memory beside transformers")
    add_bench_arguments(bench)
    train = commands.add_parser("train", help="train a part of a model, as a TOML file says")
    add_train_arguments(train)
    score = commands.add_parser("eval", help="score a checkpoint on a manifest")
    add_eval_arguments(score)
    return parser


def _add_speech_arguments(parser: argparse.ArgumentParser, default_out: str | None) -> None:
    where = "sound file to write: .wav, .flac, .ogg or .mp3" + (f" (default: {default_out})" if default_out else "")
    parser.add_argument("--out", type=Path, required=default_out is None, metavar="F", help=where)
    parser.add_argument("--speaker", metavar="S", help="voice, as `omni info` lists them (default: the checkpoint's)")
    parser.add_argument("--max-frames", type=_count, metavar="N", help="frames of speech at most, 80 ms each")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    parser.add_argument("--device", metavar="D", help="cpu, cuda:1, or auto for all (default: cuda, else cpu)")
    parser.add_argument("--quantize", choices=("int8", "int4", "fp8"), help="keep decoder weights at low precision")


def _count(text: str) -> int:
    """argparse's type of a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _pace(text: str) -> float:
    """argparse's type of a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _seconds(text: str) -> float:
    """argparse's type of a positive number of seconds."""
    value = _pace(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit code; misuse raises SystemExit(2)."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("omni: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: `omni info DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("OMNI_DEBUG"):
            raise
        print(f"omni: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """An error's message in one line; an unforeseen kind is named, with the way to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, TypeError, OSError)) and text:
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text or 'no details'}); --no-audio loads less, --device auto uses all devices"
    return f"{type(error).__name__}: {text} (unexpected; OMNI_DEBUG=1 shows where)"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line; those meant for developers only on request."""
    if issubclass(category, UserWarning) or os.environ.get("OMNI_DEBUG"):
        print(f"omni: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _consoles() -> tuple[Console, Console]:
    """For results and for progress. A pipe has no width of its own, so tables get room there."""
    from rich.console import Console

    out = Console() if sys.stdout.isatty() else Console(width=160)
    return out, Console(stderr=True)


def _check_sound_path(path: Path) -> None:
    """Fail before the model is loaded rather than after it has spoken. Raises FileNotFoundError or ValueError."""
    import soundfile

    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it or choose another --out")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file in it, such as {path / 'out.wav'}")
    if path.suffix.lstrip(".").upper() not in soundfile.available_formats():
        raise ValueError(f"--out {path} must end in .wav, .flac, .ogg or .mp3")


def _load(args: argparse.Namespace, console: Console, parts: Sequence[str]) -> OmniModel:
    """The model that --model and --device name."""
    from omni.model import OmniModel

    if args.quantize and args.device == "auto":
        args.misuse("--quantize packs a model on one device; leave --device auto out")
    placement = {"device_map": "auto"} if args.device == "auto" else {"device": args.device}
    dtype = "float32" if args.model == _NANO else "auto"  # small enough, and faster on a CPU than bfloat16
    with console.status(f"loading {args.model} ..."):
        return OmniModel.from_pretrained(args.model, parts=parts, dtype=dtype, quantize=args.quantize, **placement)


def _or_nano(args: argparse.Namespace, progress: Console) -> None:
    """The packaged model where no other is named, and a line that says so."""
    if args.model is None:
        from omni.nano import NOTICE

        args.model = _NANO
        progress.print(NOTICE, style="yellow", markup=False, highlight=False)


def _run_demo(args: argparse.Namespace) -> None:
    from omni.nano import run_demo

    run_demo(*_consoles(), args.out_dir)


def _run_chat(args: argparse.Namespace) -> None:
    _check_chat(args)
    speaks, path = not args.no_audio, args.out or Path("out.wav")
    if speaks:
        _check_sound_path(path)
    console, progress = _consoles()
    _or_nano(args, progress)
    model = _load(args, progress, ("thinker", "talker", "code2wav") if speaks else ("thinker",))
    if model.processor is None:
        raise ValueError(f"{args.model} holds no tokenizer files; `omni chat` needs them to read and write text")
    speaks = speaks and model.config.has_talker
    if speaks and args.system is None:
        args.system = model.processor.speech_system
    if args.out and not speaks:
        raise ValueError(f"{args.model} answers in text only; leave --out out")
    arguments = {
        "max_new_tokens": args.max_new_tokens,
        "return_audio": speaks,
        "speaker": args.speaker,
        "max_frames": args.max_frames or 4095,
        "seed": args.seed,
    }
    from omni.realtime import open_player

    player = None
    if args.play and speaks:
        assert model.code2wav is not None
        player = open_player(int(model.code2wav.sample_rate), progress)
    answer = _answer_live if args.realtime else _answer
    reply = answer(args, model, console, progress, player, arguments)
    if reply.sound is not None:
        from omni.demo import write_sound

        write_sound(path, reply.sound, reply.sample_rate)
        seconds = len(reply.sound) / reply.sample_rate
        line = f"speech: {seconds:.2f} s at {reply.sample_rate} Hz in {path}"
        progress.print(line, markup=False, highlight=False, soft_wrap=True)
    if player is not None:
        player.finish()


def _check_chat(args: argparse.Namespace) -> None:
    """Options of `omni chat` that do not go together."""
    if not (args.text or args.audio or args.video):
        args.misuse("nothing is asked: give a text, or a question as --audio or --video")
    if args.no_audio and (args.out or args.play):
        args.misuse("--no-audio makes no sound; leave --out and --play out")
    if not args.realtime:
        if args.pace is not None or args.audio_window is not None:
            args.misuse("--pace and --audio-window belong to --realtime")
        return
    if not (args.audio or args.video):
        args.misuse("--realtime needs something that takes time: --audio, --video or both")
    if len(args.audio) > 1 or len(args.video) > 1:
        args.misuse("--realtime takes one --audio and one --video at most")
    if args.audio and args.use_audio_in_video:
        args.misuse("--realtime hears one sound: give --audio, or --use-audio-in-video")


def _answer(
    args: argparse.Namespace,
    model: OmniModel,
    console: Console,
    progress: Console,
    player: Player | None,
    arguments: dict[str, Any],
) -> Reply:
    """The reply to a whole conversation, shown as it comes."""
    from omni.realtime import show_reply

    assert model.processor is not None
    with progress.status("reading ..."):
        events = model.stream(model.processor(_messages(args)), **arguments)
    return show_reply(events, console, progress, player)


def _answer_live(
    args: argparse.Namespace,
    model: OmniModel,
    console: Console,
    progress: Console,
    player: Player | None,
    arguments: dict[str, Any],
) -> Reply:
    """Feed a session at the media's own pace, show its reply and the latency table."""
    from omni.generation.session import OmniSession
    from omni.generation.streaming_config import StreamingConfig
    from omni.realtime import feed, latency_table, read_sound, read_video, show_reply

    assert model.processor is not None
    pieces = [piece for source in args.audio for piece in read_sound(source)]
    for source in args.video:
        pieces += read_video(model.processor, source, want_sound=args.use_audio_in_video)
    session = OmniSession(
        model,
        system=args.system,
        streaming=StreamingConfig(audio_window_s=args.audio_window),
        use_audio_in_video=args.use_audio_in_video or bool(args.audio and args.video),
    )
    for image in args.image:
        session.push_image(image)
    with progress.status("listening ...") as line:
        pace = 1.0 if args.pace is None else args.pace
        tokens = len(session.ids)
        heard = feed(session, pieces, pace, lambda now, end: line.update(f"listening: {now:.1f} of {end:.1f} s"))
    summary = f"listened to {heard.input_s:.2f} s in {heard.wall_s:.2f} s, {len(session.ids) - tokens} tokens read"
    if pace > 0:
        summary += f", at most {1000 * heard.delay_s:.0f} ms behind"
    progress.print(summary, highlight=False, soft_wrap=True)
    if args.text:
        session.push_text(args.text)
    reply = show_reply(session.respond(**arguments), console, progress, player)
    console.print(latency_table(reply))
    return reply


def _messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The conversation that the options of `omni chat` describe."""
    content: list[dict[str, Any]] = []
    for kind in ("audio", "image", "video"):
        content += [{"type": kind, kind: source} for source in getattr(args, kind)]
    if args.use_audio_in_video:
        content = [{**item, "use_audio_in_video": True} if item["type"] == "video" else item for item in content]
    if args.text:
        content.append({"type": "text", "text": args.text})
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": content}]


def _run_speak(args: argparse.Namespace) -> None:
    from omni.demo import write_sound

    _check_sound_path(args.out)
    console, progress = _consoles()
    _or_nano(args, progress)
    model = _load(args, progress, ("thinker", "talker", "code2wav"))
    max_frames = args.max_frames or 4095
    with progress.status("speaking ..."):
        samples = model.speak(args.text, speaker=args.speaker, max_frames=max_frames, seed=args.seed)
    assert model.code2wav is not None
    sample_rate = int(model.code2wav.sample_rate)  # type: ignore[arg-type]
    write_sound(args.out, samples, sample_rate)
    seconds = len(samples) / sample_rate
    console.print(f"speech: {seconds:.2f} s at {sample_rate} Hz in {args.out}", highlight=False, soft_wrap=True)


def _run_info(args: argparse.Namespace) -> None:
    from omni.info import print_info

    console, progress = _consoles()
    with progress.status(f"reading {args.folder} ..."):
        print_info(console, args.folder)


if __name__ == "__main__":
    sys.exit(main())
