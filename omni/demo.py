"""`omni demo`: one conversation with sound, picture and video, on a small model that is part of the package.

No trained weights are part of it yet: the model has the released architecture at toy width and random weights, so it
shows that every stage runs, and its answer means nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from omni.generation.output import OmniOutput
    from omni.model import OmniModel
    from omni.processing.processor import OmniProcessor

DEMO_DATA = Path(__file__).parent / "demo_data"
MAX_NEW_TOKENS, MAX_FRAMES = 24, 50  # random weights rarely end by themselves; 50 frames are four seconds
CODEC_GAIN = 0.7  # of the codec decoder's random matrices: heard, and not clipped
RANDOM_WEIGHTS = (
    "These weights are random: no trained ones ship with omni yet. The text and the sound below mean nothing; "
    "they show that every stage runs."
)


class Stages:
    """Shows which stage runs, and keeps the seconds of each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """A spinner on a terminal while the stage runs, one line when it is done."""
        start = time.perf_counter()
        with self.console.status(f"{label} ..."):
            yield
        self.seconds[label] = time.perf_counter() - start
        self.console.print(f"{label}: done in {self.seconds[label]:.2f} s", highlight=False)


def demo_processor() -> OmniProcessor:
    """The packaged processor: a byte-level tokenizer of some 500 ids, the released preprocessing."""
    from omni.processing.processor import OmniProcessor

    return OmniProcessor.from_pretrained(DEMO_DATA)


def demo_model(seed: int = 0, processor: OmniProcessor | None = None) -> OmniModel:
    """The packaged tiny model with random weights, the same at each call with one seed, and its processor."""
    import torch

    from omni.config import OmniConfig
    from omni.config_reading import read_json
    from omni.model import OmniModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OmniModel(OmniConfig.from_pretrained(DEMO_DATA))
        assert model.code2wav is not None
        _make_audible(model.code2wav)
    model.generation_config = read_json(DEMO_DATA / "generation_config.json")
    model.processor = processor or demo_processor()
    return model


def _make_audible(codec: torch.nn.Module) -> None:
    """Redraw its matrices wider: at a new model's usual 0.02 the sound is finer than the steps of 16 bits."""
    from torch import nn

    for name, parameter in codec.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if name.startswith("code_embedding.") else CODEC_GAIN / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)


def demo_messages() -> list[dict[str, Any]]:
    """The packaged conversation: a spoken question about a picture and a video with sound."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": DEMO_DATA / "picture.png"},
                {"type": "video", "video": DEMO_DATA / "clip.mp4", "use_audio_in_video": True},
                {"type": "audio", "audio": DEMO_DATA / "question.wav"},
            ],
        }
    ]


def write_sound(path: Path, samples: Tensor, sample_rate: int) -> None:
    """Write samples [n] in the format of the file's name; the old file stays until the new one is complete.

    Raises OSError when it cannot be written.
    """
    import soundfile

    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        soundfile.write(partial, samples.numpy(), sample_rate)
        partial.replace(path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def run_demo(console: Console, progress: Console, out_dir: Path, seed: int) -> None:
    """Answer the packaged conversation, print the answer and a time table, write out.wav and out.png into `out_dir`.

    console receives the results, progress the stages as they pass. Raises OSError when a file cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    console.print(RANDOM_WEIGHTS, style="yellow")
    stages = Stages(progress)
    with stages.stage("importing PyTorch and the model's code"):
        import omni.model  # noqa: F401  (timed here, used below)
    with stages.stage("importing transformers, loading the tokenizer"):
        processor = demo_processor()
    with stages.stage("building the model"):
        model = demo_model(seed, processor)
    with stages.stage("reading a spoken question, a picture and a video with sound"):
        inputs = processor(demo_messages())
    with stages.stage("answering"):
        out = model.generate(inputs, max_new_tokens=MAX_NEW_TOKENS, max_frames=MAX_FRAMES, speaker="Ethan", seed=seed)
    assert out.audio is not None and out.sample_rate is not None and out.text is not None
    with stages.stage("writing out.wav and out.png"):
        from omni.plot import save_sound_picture

        write_sound(out_dir / "out.wav", out.audio[0], out.sample_rate)
        title = "out.wav: speech from random weights"
        save_sound_picture(out_dir / "out.png", out.audio[0], out.sample_rate, title)
    prompt_tokens = inputs.input_ids.shape[1]
    console.print(f"answer (random weights, {prompt_tokens} prompt tokens): {out.text[0]!r}", markup=False)
    print_speech(console, out, [out_dir / "out.wav", out_dir / "out.png"])
    console.print(time_table(stages.seconds, out.timing))


def print_speech(console: Console, out: OmniOutput, files: list[Path]) -> None:
    """One line on the speech of row 0: its length and where it was written."""
    assert out.audio is not None and out.sample_rate is not None
    seconds = len(out.audio[0]) / out.sample_rate
    names = " and ".join(str(path) for path in files)
    console.print(f"speech: {seconds:.2f} s at {out.sample_rate} Hz in {names}", highlight=False, soft_wrap=True)


def time_table(stages: dict[str, float], answering: dict[str, float]) -> Table:
    """Seconds of each stage, those of the answer taken apart below it."""
    total = sum(stages.values())
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for label, seconds in stages.items():
        table.add_row(label, f"{seconds:.2f}", f"{seconds / total:.0%}")
        if label == "answering":
            for name, part_seconds in answering.items():
                table.add_row(f"  {name.replace('_', ' ')}", f"{part_seconds:.2f}", f"{part_seconds / total:.0%}")
    table.add_section()
    table.add_row("total", f"{total:.2f}", "")
    return table
