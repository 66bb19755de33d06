"""`omni chat`: one question to a checkpoint, in text and media, and its answer in text and sound; or a conversation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.cli.arguments import (
    ANSWER,
    MODEL_HELP,
    NANO,
    add_speech_arguments,
    check_media,
    check_sound_path,
    consoles,
    count_value,
    load_model,
    numbered,
    or_nano,
    pace_value,
    seconds_value,
)

if TYPE_CHECKING:
    from rich.console import Console

    from omni.cli.player import Player
    from omni.cli.realtime import Reply
    from omni.model import OmniModel

HELP = "ask a checkpoint about text, audio, images and video, or talk with it"


def add_arguments(chat: argparse.ArgumentParser) -> None:
    """The arguments of `omni chat`."""
    chat.description = (
        "Asks one question and prints the answer; a checkpoint that speaks also writes it as sound. Media "
        "come before the text, audio first, then images, then videos; each option may be repeated. Without text, audio "
        "and video it is a conversation: type /help in it for its commands; from a pipe each line is a question, and "
        "only answers go to stdout. Its answers are written as answer_1.wav, answer_2.wav and so on (--out F: F with "
        "that number), with --play they are played instead. With --realtime "
        "one sound file, one video or both are fed to a session as if they happened now, after the images and before "
        "the text; both together are a video with that sound."
    )
    chat.add_argument("text", nargs="?", help="what to say; without it, audio and video: a conversation")
    chat.add_argument("--model", metavar="DIR", help=f"{MODEL_HELP} (default: {NANO}, which is part of omni)")
    for kind in ("audio", "image", "video"):
        chat.add_argument(f"--{kind}", action="append", default=[], metavar="F", help=f"{kind} file or address")
    chat.add_argument("--use-audio-in-video", action="store_true", help="listen to the videos' sound too")
    chat.add_argument("--system", metavar="TEXT", help="system prompt (default: what its speech needs, if anything)")
    chat.add_argument("--max-new-tokens", type=count_value, default=1024, metavar="N", help="default: 1024")
    chat.add_argument("--no-audio", action="store_true", help="answer in text only; the Talker is not loaded")
    add_speech_arguments(chat, "out.wav")
    chat.add_argument("--play", action="store_true", help="play the answer while it is made (package sounddevice)")
    chat.add_argument(
        "--audio-chunk",
        type=seconds_value,
        metavar="S",
        help="seconds of sound that the hearing takes together, such as 0.48 (default: the checkpoint's)",
    )
    live = chat.add_argument_group("real time")
    live.add_argument("--realtime", action="store_true", help="feed the media at their own pace; print a latency table")
    live.add_argument(
        "--pace", type=pace_value, metavar="X", help="speed of the feeding (default: 1; 0: without waiting)"
    )
    live.add_argument(
        "--audio-window",
        type=seconds_value,
        metavar="S",
        help="attention window of the hearing, also in a conversation (default: the checkpoint's)",
    )
    chat.set_defaults(run=run, misuse=chat.error)


def run(args: argparse.Namespace) -> int:
    """Ask, print the answer and write its sound. Raises ValueError or OSError for what cannot be done."""
    _check_chat(args)
    talks = _talks(args)
    speaks, path = not args.no_audio, args.out or Path("out.wav")
    if speaks and not (talks and args.play and args.out is None):
        check_sound_path(numbered(args.out or ANSWER, 1) if talks else path)
    check_media(audio=args.audio, image=args.image, video=args.video)
    console, progress = consoles()
    or_nano(args, progress)
    model = load_model(args, progress, ("thinker", "talker", "code2wav") if speaks else ("thinker",))
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
    if talks:
        from omni.cli.conversation import converse

        return converse(args, model, console, progress, arguments)
    from omni.cli.player import open_player

    player = None
    if args.play and speaks:
        assert model.code2wav is not None
        player = open_player(int(model.code2wav.sample_rate), progress)
    answer = _answer_live if args.realtime else _answer
    reply = answer(args, model, console, progress, player, arguments)
    if reply.sound is not None:
        from omni.processing.audio_file import write_sound

        write_sound(path, reply.sound, reply.sample_rate)
        seconds = len(reply.sound) / reply.sample_rate
        line = f"speech: {seconds:.2f} s at {reply.sample_rate} Hz in {path}"
        progress.print(line, markup=False, highlight=False, soft_wrap=True)
    if player is not None:
        player.finish()
    return 0


def _talks(args: argparse.Namespace) -> bool:
    """Whether it is a conversation: nothing is asked yet, and there are lines to come."""
    asked = args.text is not None or args.audio or args.video
    return not (asked or args.realtime) and sys.stdin is not None


def _check_chat(args: argparse.Namespace) -> None:
    """Options of `omni chat` that do not go together."""
    talks = _talks(args)
    if not (talks or args.text or args.audio or args.video):
        args.misuse("nothing is asked: give a text, or a question as --audio or --video")
    if args.no_audio and (args.out or args.play):
        args.misuse("--no-audio makes no sound; leave --out and --play out")
    if not args.realtime:
        if args.pace is not None or (args.audio_window is not None and not talks):
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
    from omni.cli.realtime import show_reply

    assert model.processor is not None
    with progress.status("reading ..."):
        events = model.stream(model.processor(_messages(args), audio_chunk_s=args.audio_chunk), **arguments)
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
    from omni.cli.realtime import feed, latency_table, read_sound, read_video, show_reply
    from omni.generation.streaming_config import StreamingConfig
    from omni.session.session import OmniSession

    assert model.processor is not None
    pieces = [piece for source in args.audio for piece in read_sound(source)]
    for source in args.video:
        pieces += read_video(model.processor, source, want_sound=args.use_audio_in_video)
    session = OmniSession(
        model,
        system=args.system,
        streaming=StreamingConfig(audio_window_s=args.audio_window, audio_chunk_s=args.audio_chunk),
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
