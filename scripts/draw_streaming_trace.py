"""Draws docs/streaming.png: what happened when in one real turn of a session.

The model has the shape of configs/bench.json (the released depths, small widths) and random weights; the packaged
spoken question is fed at its own pace with an audio window of one second. Development only: it needs matplotlib.

    OMP_NUM_THREADS=1 python scripts/draw_streaming_trace.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from omni import AudioChunk, OmniConfig, OmniModel, OmniSession, StreamingConfig, TextDelta, TurnEnd
from omni.cli.realtime import feed, read_sound
from omni.generation.rows import Rows
from omni.packaged.toy import TOY_DATA, toy_processor

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 12, "max_frames": 24, "seed": 0, "speaker": "Ethan"}
ROWS = ("question", "encoder", "prompt reading", "Thinker tokens", "Talker frames", "codec chunks", "answer heard")
COLOURS = {
    "question": "#7f8c8d",
    "encoders": "#e67e22",
    "thinker_prefill": "#2471a3",
    "talker_prefill": "#a9cce3",
    "thinker": "#2471a3",
    "talker": "#a9cce3",
    "residual_codes": "#5dade2",
    "codec": "#27ae60",
    "answer": "#1e8449",
}


@dataclass
class Trace:
    """Spans of every stage (name, start, end) in seconds of the clock, and the sound as it came out."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    chunks: list[tuple[float, float]] = field(default_factory=list)  # when it came, how long it is
    started: float = 0.0
    asked: float = 0.0
    tokens: int = 0
    end: TurnEnd | None = None

    def watch(self, model: OmniModel) -> None:
        """Record the stages of all rows from now on, and the audio encoder of `model`."""
        stage, trace = Rows.stage, self

        @contextmanager
        def recorded(rows: Rows, name: str) -> Iterator[None]:
            start = time.perf_counter()
            with stage(rows, name):
                yield
            trace.spans.append((name, start, time.perf_counter()))

        Rows.stage = recorded  # type: ignore[method-assign]
        for name in ("step", "finish"):
            setattr(model.audio_encoder, name, self._timed(getattr(model.audio_encoder, name)))

    def _timed(self, call: Any) -> Any:
        def run(*args: Any) -> torch.Tensor:
            start = time.perf_counter()
            out = call(*args)
            if len(out):
                self.spans.append(("encoders", start, time.perf_counter()))
            return out

        return run


def random_model() -> OmniModel:
    """configs/bench.json with random weights, wide enough that a reply does not end at once."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "bench.json"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("code2wav"):
                parameter.mul_(5)
    model.processor = toy_processor()
    return model


def run_turn(model: OmniModel, pace: float) -> Trace:
    """Listen to the packaged question at its own pace, then answer."""
    trace = Trace()
    stage, encoder = Rows.stage, model.audio_encoder
    trace.watch(model)
    try:
        session = OmniSession(model, streaming=StreamingConfig(audio_window_s=1.0))
        trace.spans.clear()
        trace.started = time.perf_counter()
        feed(session, read_sound(str(TOY_DATA / "question.wav")), pace, lambda now, end: None)
        trace.asked = time.perf_counter()
        for event in session.respond(**ARGUMENTS):
            if isinstance(event, AudioChunk):
                trace.chunks.append((time.perf_counter(), event.samples.numel() / event.sample_rate))
            elif isinstance(event, TextDelta):
                trace.tokens += len(event.token_ids)
            else:
                trace.end = event
    finally:
        Rows.stage = stage  # type: ignore[method-assign]
        del encoder.step, encoder.finish
    return trace


def heard(trace: Trace) -> list[tuple[float, float]]:
    """Start and length of every chunk as a player plays it: as it comes, but after those before it."""
    bars, free = [], 0.0
    for came, length in trace.chunks:
        bars.append((max(came, free), length))
        free = bars[-1][0] + length
    return bars


def draw(trace: Trace, path: Path) -> None:
    """The timeline, one row a stage."""
    rows = {name: len(ROWS) - 1 - i for i, name in enumerate(ROWS)}
    places = {
        "encoders": "encoder",
        "thinker_prefill": "prompt reading",
        "talker_prefill": "prompt reading",
        "thinker_first_token": "Thinker tokens",
        "thinker": "Thinker tokens",
        "talker_first_code": "Talker frames",
        "talker": "Talker frames",
        "residual_codes": "Talker frames",
        "codec": "codec chunks",
    }
    colour_of = {"thinker_first_token": "thinker", "talker_first_code": "talker"}
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(12, 4.8))

    def bar(row: str, start: float, length: float, colour: str) -> None:
        at = start - trace.asked
        edge = "white" if length > 0.02 else colour  # a white edge would hide what is quick
        axes.barh(rows[row], length, left=at, height=0.62, color=colour, edgecolor=edge, linewidth=0.6)

    bar("question", trace.started, trace.asked - trace.started, COLOURS["question"])
    for name, start, end in trace.spans:
        bar(places[name], start, end - start, COLOURS[colour_of.get(name, name)])
    for start, length in heard(trace):
        bar("answer heard", start, length, COLOURS["answer"])
    first = trace.chunks[0][0] - trace.asked
    axes.axvline(0, color="#c0392b", linewidth=1.2)
    axes.axvline(first, color="#1e8449", linewidth=1.2, linestyle="--")
    top = len(ROWS) - 0.45
    axes.text(-0.03, top, "respond()", color="#c0392b", ha="right", va="bottom")
    axes.text(first + 0.03, top, f"first sound after {1000 * first:.0f} ms", color="#1e8449", va="bottom")
    legend = {
        "Thinker": COLOURS["thinker"],
        "Talker": COLOURS["talker"],
        "residual codes": COLOURS["residual_codes"],
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in legend.values()]
    axes.legend(handles, legend.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3, frameon=False)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlabel("seconds since the end of the question")
    axes.set_ylim(-0.5, len(ROWS) - 0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    model = random_model()
    run_turn(model, pace=0)  # warm-up
    trace = run_turn(model, pace=1)
    assert trace.end is not None
    draw(trace, ROOT / "docs" / "streaming.png")
    frames = trace.end.usage["frames"]
    print(f"{trace.tokens} tokens, {frames} frames, {len(trace.chunks)} chunks, reason {trace.end.reason}")
    print(f"first sound after {1000 * (trace.chunks[0][0] - trace.asked):.0f} ms")


if __name__ == "__main__":
    main()
