"""omni-nano, the small trained model that is part of the package, and `omni demo`: three questions put to it.

The model has the released architecture at small width and knows a small world (`recipes/nano`, which trained it):
repeating, arithmetic, drawn shapes and short clips, asked by text or by voice. `nano_data/README.md` is its card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from omni.checkpoint.hub import PACKAGED

if TYPE_CHECKING:
    from rich.console import Console

    from omni.model import OmniModel
    from omni.realtime import Reply

NANO = "omni-nano"
NANO_DATA = PACKAGED[NANO]
NOTICE = (
    "omni-nano answers: a small trained model that is part of omni. It repeats sentences, does sums up to twenty and "
    "looks at drawn shapes; anything else it does not know. Others: --model DIR."
)
_MAX_FRAMES = 100  # eight seconds, far beyond its longest answer
_STAGES = {"preprocessing": "reading the media", "encoders": "encoders", "thinker_prefill": "Thinker reads"}


@dataclass(frozen=True)
class Question:
    """One question of the demo: what it shows, its media in `NANO_DATA / "demo"`, and what is asked in them."""

    title: str
    items: tuple[tuple[str, str], ...]
    asked: str

    def messages(self) -> list[dict[str, Any]]:
        """As the processor takes them; videos are heard too."""
        folder = NANO_DATA / "demo"
        items: list[dict[str, Any]] = [{"type": kind, kind: str(folder / name)} for kind, name in self.items]
        for item in items:
            if item["type"] == "video":
                item["use_audio_in_video"] = True
        return [{"role": "user", "content": items}]


QUESTIONS = (
    Question("a spoken request", (("audio", "request.wav"),), "repeat after me the old king follows your blue fish"),
    Question(
        "a picture and a spoken question",
        (("image", "picture.png"), ("audio", "question.wav")),
        "what color is the star",
    ),
    Question("a clip that asks in its sound", (("video", "clip.mp4"),), "which way does it move"),
)


def nano_model() -> OmniModel:
    """The packaged model with its processor, fp32 on the CPU."""
    from omni.model import OmniModel

    return OmniModel.from_pretrained(NANO, dtype="float32", device="cpu")


def run_demo(console: Console, progress: Console, out_dir: Path) -> None:
    """Ask the packaged questions; print each answer as it comes and what it took, write answer_1.wav … and, of all of
    them in a row, out.wav and out.png.

    console receives the results, progress the stages as they pass. Raises OSError when a file cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with progress.status("loading omni-nano ..."):
        import torch

        from omni.demo import write_sound
        from omni.plot import save_sound_picture
        from omni.realtime import show_reply

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


def latencies(replies: list[Reply]) -> Table:
    """Milliseconds from the question's end to the first word and sound, and real-time factors, of each reply."""
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
