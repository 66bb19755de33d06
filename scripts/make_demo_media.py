"""Make the media that `omni demo` shows the model: question.wav, picture.png and clip.mp4, in omni/packaged/toy_data/.

Needs the speech synthesiser flite on the PATH (Debian and Ubuntu: `apt-get install flite`); nothing else does, the
files it makes are part of the package. Run it from the repository: `python scripts/make_demo_media.py`.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parent.parent / "omni" / "packaged" / "toy_data"
QUESTION = "What can you see, and what can you hear?"
SAMPLE_RATE_HZ = 16_000
CLIP_SECONDS, CLIP_FPS, CLIP_WIDTH, CLIP_HEIGHT = 2.5, 12, 160, 120


def make_question(path: Path) -> None:
    """A spoken question: 16 kHz mono PCM16, with 0.1 s of silence at both ends."""
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        subprocess.run(["flite", "-voice", "slt", "-t", QUESTION, "-o", str(spoken)], check=True)
        samples, sample_rate_hz = soundfile.read(spoken, dtype="float32")
    assert sample_rate_hz == SAMPLE_RATE_HZ, f"flite spoke at {sample_rate_hz} Hz"
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    spoken_part = samples[loud[0] : loud[-1] + 1]
    silence = np.zeros(SAMPLE_RATE_HZ // 10, dtype=np.float32)
    soundfile.write(path, np.concatenate([silence, spoken_part, silence]), SAMPLE_RATE_HZ, subtype="PCM_16")


def make_picture(path: Path) -> None:
    """A red circle, a blue square and a green triangle over a horizon."""
    image = Image.new("RGB", (320, 240), (236, 240, 247))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 190, 320, 240), fill=(214, 205, 190))
    draw.ellipse((24, 60, 114, 150), fill=(214, 48, 49))
    draw.rectangle((126, 90, 206, 190), fill=(41, 98, 201))
    draw.polygon(((266, 62), (220, 190), (312, 190)), fill=(39, 147, 78))
    draw.ellipse((262, 14, 300, 52), fill=(247, 201, 72))
    image.save(path, optimize=True)


def _clip_frame(time_s: float) -> av.VideoFrame:
    """A ball that rolls from left to right and back, bouncing on the ground."""
    phase = time_s / CLIP_SECONDS
    x = 16 + (CLIP_WIDTH - 32) * (1 - abs(2 * phase - 1))
    y = 92 - 60 * abs(np.sin(4 * np.pi * phase))
    image = Image.new("RGB", (CLIP_WIDTH, CLIP_HEIGHT), (32, 36, 48))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 104, CLIP_WIDTH, CLIP_HEIGHT), fill=(96, 110, 96))
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=(250, 170, 40))
    return av.VideoFrame.from_image(image)


def _clip_sound() -> np.ndarray:
    """A short falling tone each time the ball touches the ground. Returns float32 [1, samples]."""
    samples = np.zeros(int(CLIP_SECONDS * SAMPLE_RATE_HZ), dtype=np.float32)
    length = SAMPLE_RATE_HZ // 4
    time_s = np.arange(length) / SAMPLE_RATE_HZ
    bounce = 0.5 * np.sin(2 * np.pi * (520 - 600 * time_s) * time_s) * np.exp(-12 * time_s)
    for quarter in range(4):  # the ball is down at the start of each quarter of the clip
        start = int(quarter * CLIP_SECONDS / 4 * SAMPLE_RATE_HZ)
        samples[start : start + length] += bounce.astype(np.float32)
    return samples[None]


def make_clip(path: Path) -> None:
    """The bouncing ball with its sound: H.264 and AAC in MP4."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=CLIP_FPS, options={"crf": "26"})
        video.width, video.height, video.pix_fmt = CLIP_WIDTH, CLIP_HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        for index in range(int(CLIP_SECONDS * CLIP_FPS)):
            container.mux(video.encode(_clip_frame(index / CLIP_FPS)))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(_clip_sound(), format="fltp", layout="mono")
        sound.sample_rate = SAMPLE_RATE_HZ
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


if __name__ == "__main__":
    make_question(FOLDER / "question.wav")
    make_picture(FOLDER / "picture.png")
    make_clip(FOLDER / "clip.mp4")
