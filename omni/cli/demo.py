"""`omni demo`: three packaged questions put to omni-nano, answered in text and speech."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from omni.cli.arguments import consoles, how_to_call
from omni.config.writing import check_can_write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from omni.cli.realtime import Reply

HELP = "put three packaged questions to the packaged model omni-nano"
_MAX_FRAMES = 100  # eight seconds, far beyond its longest answer
_STAGES = {"preprocessing": "reading the media", "encoders": "encoders", "thinker_prefill": "Thinker reads"}


def add_arguments(demo: argparse.ArgumentParser) -> None:
    """The arguments of `omni demo`."""
    demo.description = (
        "omni-nano, the small trained model that is part of omni, answers a spoken request, a spoken "
        "question about a picture, and a clip that asks in its sound. Prints each answer as it comes and a table of "
        "latencies; writes answer_1.wav to answer_3.wav, and all of them as out.wav with its picture, out.png."
    )
    demo.add_argument("--out-dir", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Ask, print and write. Raises OSError when a file cannot be written."""
    run_demo(*consoles(), args.out_dir)


def run_demo(console: Console, progress: Console, out_dir: Path) -> None:
    """Ask the packaged questions; print each answer as it comes and what it took, write answer_1.wav … and, of all of
    them in a row, out.wav and out.png.

    console receives the results, progress the stages as they pass. Raises OSError when a file cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("answer_1.wav", "answer_2.wav", "answer_3.wav", "out.wav", "out.png"):
        check_can_write(out_dir / name)
    with progress.status("loading omni-nano ..."):
        import torch

        from omni.cli.realtime import show_reply
        from omni.cli.sound_picture import save_sound_picture
        from omni.packaged.nano import QUESTIONS, nano_model
        from omni.processing.audio_file import write_sound

        model = nano_model()
        processor = model.processor
        assert processor is not None and model.code2wav is not None
        sample_rate = int(model.code2wav.sample_rate)
        # the first steps of a process are slow, and are not what is to be timed
        list(model.stream(processor([{"role": "user", "content": "say one"}]), max_frames=_MAX_FRAMES))
    replies = []
    for number, question in enumerate(QUESTIONS, 1):
        files = ", ".join(name for _, name in question.items)
        console.print(f"\n{number}. {question.title} ({files}): {question.asked!r}", markup=False, highlight=False)
        console.out("   ", end="")
        events = model.stream(processor(question.messages()), max_frames=_MAX_FRAMES)
        reply = show_reply(events, console, progress)
        assert reply.sound is not None, "omni-nano speaks every answer"
        write_sound(path := out_dir / f"answer_{number}.wav", reply.sound, sample_rate)
        seconds = len(reply.sound) / sample_rate
        console.print(f"   speech: {seconds:.2f} s in {path}", markup=False, highlight=False, soft_wrap=True)
        replies.append(reply)
    pause = torch.zeros(sample_rate // 4)
    joined = torch.cat([piece for reply in replies for piece in (reply.sound, pause) if piece is not None])
    title = "omni-nano: " + ", ".join(repr(reply.end.text) for reply in replies)
    write_sound(out_dir / "out.wav", joined, sample_rate)
    save_sound_picture(out_dir / "out.png", joined, sample_rate, title)
    files = f"{out_dir / 'out.wav'} and {out_dir / 'out.png'}"
    console.print(f"\nall answers: {files}", markup=False, highlight=False, soft_wrap=True)
    console.print(latencies(replies))
    line = f"\nTalk with it yourself: {how_to_call('chat')}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def latencies(replies: list[Reply]) -> Table:
    """Milliseconds from the question's end to the first word and sound, and real-time factors, of each reply."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms from the end of the question")
    for number in range(1, len(replies) + 1):
        table.add_column(f"answer {number}", justify="right")
    timings = [reply.end.timing for reply in replies]
    names = [name for name in _STAGES if any(name in timing for timing in timings)]
    for name in names:
        table.add_row(_STAGES[name], *(f"{1000 * timing.get(name, 0.0):.0f}" for timing in timings))
    table.add_row("first sound", *(f"{1000 * timing['first_audio']:.0f}" for timing in timings), style="bold")
    table.add_row("whole answer", *(f"{1000 * timing['total']:.0f}" for timing in timings))
    table.add_section()
    table.add_row("real-time factor, end to end", *(f"{timing['rtf']:.2f}" for timing in timings))
    return table
