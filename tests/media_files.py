"""Films and sounds made for tests, as bytes: any codec, layout and container that PyAV's own encoders have."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest


def sines(channels: int, seconds: float = 1.0, rate: int = 48000, hz: int = 40, step_hz: int = 10) -> np.ndarray:
    """fp32 [n, channels]: channel i is a sine of hz + i * step_hz, each of amplitude 0.5."""
    time = np.arange(int(rate * seconds))[:, None] / rate
    return (0.5 * np.sin(2 * np.pi * (hz + step_hz * np.arange(channels)) * time)).astype(np.float32)


def amplitudes(samples: np.ndarray, hz: Iterable[int], rate: int = 16000) -> list[float]:
    """How strong each whole frequency is in the middle half second of mono samples [n]."""
    start = max(0, (len(samples) - rate // 2) // 2)
    part = samples[start : start + rate // 2]
    time = np.arange(len(part)) / rate
    return [float(2 * abs(np.mean(part * np.exp(-2j * np.pi * f * time)))) for f in hz]


def encode_sound(
    container: str,
    codec: str,
    samples: np.ndarray,
    rate: int = 48000,
    layout: str = "mono",
    **muxing: str,
) -> bytes:
    """Samples fp32 [n, channels] in a file of that container and codec. Skips where the codec has no encoder here."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxing) as out:
        fill(out, sound_track(out, codec, rate, layout), samples)
    return file.getvalue()


def sound_track(out: Any, codec: str, rate: int = 48000, layout: str = "mono") -> Any:
    """A sound track of a container that is being written, before anything is put into it."""
    needs_encoder(codec)
    options = {"strict": "experimental"} if codec in ("dca", "truehd", "vorbis") else {}
    return out.add_stream(codec, rate=rate, layout=layout, options=options)


def needs_encoder(codec: str) -> None:
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"no encoder of {codec} here")


def fill(out: Any, track: Any, samples: np.ndarray, start_s: float = 0.0) -> None:
    """Samples fp32 [n, channels] into a track. Packed frames: PyAV cannot fill planes beyond the eighth."""
    rate, packed = track.rate, np.ascontiguousarray(samples).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=track.layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(start_s * rate), Fraction(1, rate)
    for packet in [*track.encode(frame), *track.encode(None)]:
        out.mux(packet)


def grey_film(
    container: str,
    codec: str,
    times_ms: Sequence[int],
    levels: Sequence[int] | None = None,
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "pcm_s16le",
    sound_start_s: float = 0.0,
    **muxing: str,
) -> bytes:
    """A film whose frame at t ms has the grey level of `levels` (default 20 + t / 20, as far as it goes)."""
    needs_encoder(codec)
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxing) as out:
        video = out.add_stream(codec, rate=25, options=options or {})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        if not codec.startswith("mpeg") or codec == "mpeg4":  # those two know a few rates only
            video.codec_context.time_base = Fraction(1, 1000)
        track = None if sound is None else sound_track(out, sound_codec, layout=("mono", "stereo")[sound.shape[1] - 1])
        for number, stamp in enumerate(times_ms):
            level = 20 + stamp // 20 if levels is None else levels[number]
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if track is not None:
            fill(out, track, sound, sound_start_s)
    return file.getvalue()


def in_child(code: str, *arguments: str, timeout_s: float = 100.0) -> list[Any]:
    """Run Python code in a process of its own: the values that it prints with `say`, one JSON a line.

    Fails with what it wrote where it ends by a signal or an error, or not in time. `memory_mb("VmHWM")` is known to the
    code: the peak of its memory since `forget_peak()`.
    """
    measure = (
        "import json, sys\n"
        "def say(value): print(json.dumps(value), flush=True)\n"
        "def forget_peak(): open('/proc/self/clear_refs', 'w').write('5')\n"
        "def memory_mb(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name + ':'))\n"
    )
    root = Path(__file__).parents[1]
    paths = os.pathsep.join((str(root), str(root / "tests"), str(root / "tests" / "processing")))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", measure + code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
    )
    assert done.returncode == 0, f"the child ended with {done.returncode}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]
