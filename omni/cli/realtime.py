"""`omni chat --realtime`: files fed to a session at their own pace, the reply shown as it comes, and what it took.

A piece of input is pushed when its time has come on the wall clock, as from a microphone and a camera. Showing a reply
serves the ordinary `omni chat` as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from omni.generation.events import AudioChunk, Event, TextDelta, TurnEnd
from omni.processing.audio_file import check_samples, decode_audio
from omni.processing.sources import describe, open_source
from omni.processing.video_file import Sampling, load_video
from omni.session.session import OmniSession

if TYPE_CHECKING:
    from rich.console import Console

    from omni.processing.processor import OmniProcessor

PIECE_S = 0.1  # sound is pushed in pieces of this length, as sound cards deliver it
Clock = Callable[[], float]


@dataclass(frozen=True)
class Piece:
    """Input that is there `time_s` seconds after the start: samples [n] at rate_hz, or a frame uint8 [3, H, W]."""

    time_s: float
    samples: Tensor | None = None
    rate_hz: int = 0
    frame: Tensor | None = None

    def push(self, session: OmniSession) -> None:
        """Hand it to the session."""
        if self.frame is not None:
            session.push_video_frame(self.frame, self.time_s)
        if self.samples is not None:
            session.push_audio(self.samples, self.rate_hz)


def sound_pieces(samples: Tensor, rate_hz: int) -> list[Piece]:
    """Samples [n] cut into pieces; each is there when its last sample has been heard."""
    ends = range(size := max(1, round(PIECE_S * rate_hz)), len(samples) + size, size)
    return [Piece(min(end, len(samples)) / rate_hz, samples=samples[end - size : end], rate_hz=rate_hz) for end in ends]


def read_sound(source: str) -> list[Piece]:
    """The pieces of a sound file, at its own rate. Raises FileNotFoundError, OSError or ValueError."""
    name = describe(source)
    samples, rate_hz = decode_audio(open_source(source, "audio"), name)
    check_samples(samples, name)
    return sound_pieces(samples, rate_hz)


def read_video(processor: OmniProcessor, source: str, *, want_sound: bool) -> list[Piece]:
    """The frames of a video file, two a second, and with `want_sound` the pieces of its sound. Raises as `read_sound`.

    Frames are kept at the size that the model sees.
    """
    clip = load_video(source, Sampling(), lambda frame, _: processor.vision.frame(frame), None, want_sound)
    if want_sound and clip.sound is None:
        raise ValueError(f"video {describe(source)} has no sound; leave --use-audio-in-video out")
    pieces = [Piece(time_s, frame=frame) for time_s, frame in zip(clip.times_s, clip.frames)]
    return pieces + ([] if clip.sound is None else sound_pieces(clip.sound, 16000))


def in_time(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces in the order of time; at one moment a frame comes before the sound, so that it opens the video."""
    return sorted(pieces, key=lambda piece: (piece.time_s, piece.frame is None))


@dataclass(frozen=True)
class Listening:
    """How the feeding went: seconds of input, of wall clock, and the largest delay of a piece behind its time."""

    input_s: float
    wall_s: float
    delay_s: float


def feed(
    session: OmniSession,
    pieces: list[Piece],
    pace: float,
    show: Callable[[float, float], None],
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Listening:
    """Push the pieces in time: `pace` seconds of input a second of wall clock, 0 without waiting.

    `show` is called with the seconds heard and the seconds in all before each push.
    """
    end_s = max(piece.time_s for piece in pieces)
    start, delay_s = clock(), 0.0
    for piece in in_time(pieces):
        if pace > 0:
            early_s = start + piece.time_s / pace - clock()
            if early_s > 0:
                sleep(early_s)
        show(piece.time_s, end_s)
        piece.push(session)
        if pace > 0:
            delay_s = max(delay_s, clock() - start - piece.time_s / pace)
    return Listening(end_s, clock() - start, delay_s)


@dataclass
class Reply:
    """A reply that was shown. sound: float32 [n], None if it has none."""

    end: TurnEnd
    sound: Tensor | None
    sample_rate: int


def show_reply(
    events: Iterable[Event],
    console: Console,
    progress: Console,
    player: Callable[[AudioChunk], None] | None = None,
) -> Reply:
    """Print the text of a reply as it comes (reasoning to `progress`), hand on its sound, and collect it."""
    chunks: list[AudioChunk] = []
    end: TurnEnd | None = None
    thinking = False
    for event in events:
        if isinstance(event, AudioChunk):
            chunks.append(event)
            if player is not None:
                player(event)
        elif isinstance(event, TurnEnd):
            end = event
        elif isinstance(event, TextDelta) and event.text:
            if thinking and not event.reasoning:
                progress.out()
            thinking = event.reasoning
            _print_piece(event, console, progress)
    assert end is not None, "a turn ends with TurnEnd"
    console.out()
    sound = torch.cat([chunk.samples for chunk in chunks]) if chunks else None
    return Reply(end, sound, chunks[0].sample_rate if chunks else 0)


def _print_piece(event: TextDelta, console: Console, progress: Console) -> None:
    if event.reasoning:
        progress.out(event.text, style="dim", highlight=False, end="")
    else:
        console.out(event.text, highlight=False, end="")


_ROWS = {
    "preprocessing": "preprocessing",
    "encoders": "encoders",
    "thinker_prefill": "Thinker prefill",
    "talker_prefill": "Talker prefill",
    "thinker_first_token": "Thinker first token",
    "talker_first_code": "Talker first code",
    "thinker": "Thinker, later tokens",
    "talker": "Talker, later codes",
    "residual_codes": "residual codes",
    "codec": "codec",
}


def latency_table(reply: Reply) -> Table:
    """Milliseconds of each stage up to the first sound, then the whole reply and both real-time factors.

    End to end: wall time of the reply a second of its sound. Step: seconds that the model's steps take for a frame, a
    second of that frame. Below 1 speech comes faster than it plays.
    """
    timing = reply.end.timing
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("from the end of the input")
    table.add_column("ms", justify="right")
    for name, label in _ROWS.items():
        if name in timing:
            table.add_row(label, f"{1000 * timing[name]:.1f}")
    if "first_audio" in timing:
        table.add_row("first audio", f"{1000 * timing['first_audio']:.1f}", style="bold")
    table.add_row("total", f"{1000 * timing['total']:.1f}")
    if "rtf" in timing:
        table.add_section()
        table.add_row("real-time factor, end to end", f"{timing['rtf']:.2f}")
        table.add_row("real-time factor, step", f"{timing['rtf_step']:.2f}")
    return table
