"""Decoding of audio, images and video: every source and format, and plain errors for everything that is not media."""

from __future__ import annotations

import base64
import http.server
import io
import math
import struct
import threading
import time
import wave
import weakref
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni.processing import sources
from omni.processing.audio_file import load_audio
from omni.processing.image_file import load_image
from omni.processing.sources import open_source
from omni.processing.video_file import Sampling, VideoClip, load_video


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def picture() -> Image.Image:
    return Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))


def write_video(
    path: Path,
    codec: str = "mpeg4",
    times_ms: list[int] | None = None,
    sound_codec: str | None = None,
    sound_s: float = 1.0,
    sound_start_s: float = 0.0,
    size: tuple[int, int] = (64, 48),
) -> Path:
    """A small film whose frame shown at t ms has the grey level 20 + t / 20; optionally with a 440 Hz tone."""
    times_ms = [40 * i for i in range(50)] if times_ms is None else times_ms
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(sound_codec, rate=48000, layout="mono") if sound_codec else None
        for stamp in times_ms:
            grey = np.full((size[1], size[0], 3), 20 + stamp // 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(tone(48000, sound_s)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, round(48000 * sound_start_s), Fraction(1, 48000)
            converter = av.AudioResampler(format=track.format, layout="mono", rate=48000, frame_size=track.frame_size)
            for part in [*converter.resample(frame), *converter.resample(None)]:
                container.mux(track.encode(part))
            container.mux(track.encode(None))
    return path


def read_video(value: Any, frame_rate: float | None = None, want_sound: bool = False, **sampling: Any) -> VideoClip:
    return load_video(value, Sampling(**sampling), lambda frame, frames: frame, frame_rate, want_sound)


def quickly(error: type[Exception] | tuple[type[Exception], ...], match: str, call: Callable[[], Any]) -> None:
    """The call fails with that error and message within a second of computing, however busy the machine."""
    started = time.process_time()
    with pytest.raises(error, match=match):
        call()
    assert time.process_time() - started < 1.0


# ---- sources ----


def test_every_kind_of_source(tmp_path: Path) -> None:
    path = tmp_path / "a b.wav"
    soundfile.write(path, tone(16000), 16000)
    data = path.read_bytes()
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for value in (str(path), path, path.as_uri(), uri, data, bytearray(data), io.BytesIO(data)):
        assert load_audio(value).shape == (8000,)


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/ok":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_download_and_its_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_source(server + "/ok", "image") == b"x" * 5000
    quickly(OSError, "HTTP 404", lambda: open_source(server + "/gone", "image"))
    quickly(OSError, "cannot be fetched", lambda: open_source("http://127.0.0.1:9/none", "image"))
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", 1000)
    quickly(ValueError, "larger than", lambda: open_source(server + "/ok", "image"))
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", 10000)
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_S", -1.0)
    quickly(OSError, "more than", lambda: open_source(server + "/ok", "image"))


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    quickly(FileNotFoundError, "none.wav", lambda: load_audio(tmp_path / "none.wav"))
    quickly(FileNotFoundError, "does not exist", lambda: load_audio("file:///none.wav"))
    quickly(FileNotFoundError, "cannot be looked up|does not exist", lambda: load_audio("x" * 100_000))
    quickly(ValueError, "empty.wav.*empty", lambda: load_audio(tmp_path / "empty.wav"))
    quickly(ValueError, "not a file", lambda: load_audio(tmp_path))
    quickly(ValueError, "empty", lambda: load_image(b""))
    quickly(ValueError, "base64", lambda: load_image("data:image/png;base64,%%%"))
    quickly(ValueError, "comma", lambda: load_image("data:image/png"))
    quickly(ValueError, "on this machine", lambda: load_image("file://elsewhere/a.png"))
    quickly(TypeError, "binary mode", lambda: load_image(io.StringIO("text")))


# ---- audio ----


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_audio_formats_and_rates(tmp_path: Path, suffix: str, rate: int) -> None:
    stereo = np.stack((tone(rate), np.zeros_like(tone(rate))), axis=1)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, stereo, rate)
    samples = load_audio(path)
    assert abs(len(samples) - 8000) <= (700 if suffix == "mp3" else 1)
    spectrum = np.abs(np.fft.rfft(samples[1000:7000].numpy()))
    assert abs(spectrum.argmax() / 6000 * 16000 - 440) < 5
    middle = samples[1000:7000]
    assert 0.22 < float(middle.abs().max()) < 0.28  # two channels averaged


def test_m4a_through_ffmpeg(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", sound_codec="aac")
    sound = load_audio(path)
    assert abs(len(sound) - 16000) < 2100
    assert 0.4 < float(sound[4000:8000].abs().max()) < 0.6


def test_audio_arrays() -> None:
    pcm = (tone(16000) * 32767).astype(np.int16)
    expected = torch.from_numpy(pcm / 32768).float()
    wide = pcm.astype(np.int32) << 16
    for value in (pcm, pcm.tolist(), torch.from_numpy(pcm), wide, {"array": pcm, "sampling_rate": 16000}, (pcm, 16000)):
        torch.testing.assert_close(load_audio(value), expected)
    torch.testing.assert_close(load_audio((pcm >> 8).astype(np.int8)), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(load_audio(((pcm >> 8) + 128).astype(np.uint8)), expected, atol=0.01, rtol=0)
    both = np.stack((pcm, pcm)) / 32768
    torch.testing.assert_close(load_audio(both), expected)
    torch.testing.assert_close(load_audio(both.T.astype(np.float64)), expected)
    assert load_audio(tone(8000), sampling_rate=8000).shape == (8000,)
    assert load_audio((tone(24000), 24000)).shape == (8000,)


def test_odd_rates_take_little_memory() -> None:
    for rate in (44101, 15999, 1001, 191999):
        samples = load_audio((tone(rate, hz=220), rate))
        assert abs(len(samples) - 8000) <= 16
        spectrum = np.abs(np.fft.rfft(samples[:7000].numpy()))
        assert abs(spectrum.argmax() / 7000 * 16000 - 220) < 3


def test_bad_audio(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(range(200)))
    (tmp_path / "text.mp3").write_text("this is not sound")
    with wave.open(str(tmp_path / "nothing.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
    bad = tone(16000)
    bad[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, 16000, subtype="FLOAT")
    quickly(ValueError, r"broken\.wav", lambda: load_audio(tmp_path / "broken.wav"))
    quickly(ValueError, r"text\.mp3", lambda: load_audio(tmp_path / "text.mp3"))
    quickly(ValueError, r"nothing\.wav.*no samples", lambda: load_audio(tmp_path / "nothing.wav"))
    quickly(ValueError, r"nan\.wav.*sample 5 is nan", lambda: load_audio(tmp_path / "nan.wav"))
    quickly(ValueError, "no samples", lambda: load_audio([]))
    quickly(ValueError, "sample 5 is nan", lambda: load_audio(bad))
    quickly(ValueError, "0 Hz", lambda: load_audio((tone(16000), 0)))
    quickly(ValueError, "sampling_rate", lambda: load_audio({"array": bad, "samplingrate": 1}))
    quickly(ValueError, "belongs to arrays", lambda: load_audio(tmp_path / "nan.wav", 8000))
    quickly(ValueError, "shape", lambda: load_audio(np.zeros((2, 2, 2))))
    quickly(ValueError, "16-bit", lambda: load_audio([100_000]))
    quickly((TypeError, ValueError), "audio", lambda: load_audio(object()))
    quickly((TypeError, ValueError), "audio", lambda: load_audio(None))


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    path = tmp_path / "lie.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    start = data.index(b"data") + 4
    data[start : start + 4] = struct.pack("<I", 0xFFFFFF00)
    assert len(load_audio(bytes(data))) <= 8000


# ---- images ----


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_image_formats(tmp_path: Path, form: str) -> None:
    picture().save(tmp_path / "a", format=form, **({"lossless": True} if form == "WEBP" else {}))
    read = load_image(tmp_path / "a")
    assert read.mode == "RGB" and read.size == (64, 48)
    if form != "JPEG":
        assert np.array_equal(np.array(read), np.array(picture()))


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (48, 64)


def test_modes_become_rgb() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("L", (4, 4), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(Image.fromarray(np.full((4, 4), 65535, np.uint16))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("CMYK", (4, 4))).mode == "RGB"
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert load_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_image_arrays() -> None:
    pixels = np.array(picture())
    for value in (
        pixels,
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels),
        pixels / 255,
        pixels.astype(np.float32),
        pixels.astype(np.int64),
        np.concatenate((pixels, np.full_like(pixels[..., :1], 255)), axis=-1),
        pixels.astype(np.uint16) * 257,
    ):
        assert np.array_equal(np.array(load_image(value)), pixels)
    assert np.array(load_image(pixels[..., 0])).shape == (48, 64, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images(tmp_path: Path) -> None:
    picture().save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    quickly(ValueError, r"cut\.png", lambda: load_image(tmp_path / "cut.png"))
    quickly(ValueError, r"text\.png.*png, jpeg or webp", lambda: load_image(tmp_path / "text.png"))
    quickly(ValueError, "limit of 100,000,000", lambda: load_image(png_header(100_000, 100_000)))
    quickly(ValueError, "limit of 100,000,000", lambda: load_image(png_header(12_000, 10_000)))
    quickly(ValueError, "200 times", lambda: load_image(png_header(10_000, 4)))
    quickly(ValueError, "200 times", lambda: load_image(np.zeros((1, 300, 3), np.uint8)))
    quickly(ValueError, "NaN", lambda: load_image(np.full((4, 4, 3), np.nan)))
    quickly(ValueError, "pixels in", lambda: load_image(np.full((4, 4, 3), -1.0)))
    quickly(ValueError, "at least one", lambda: load_image(np.zeros((0, 4, 3), np.uint8)))
    quickly(ValueError, "channels", lambda: load_image(np.zeros((8, 9, 7), np.uint8)))
    for value in (None, object(), 5):
        quickly(TypeError, "image", lambda value=value: load_image(value))


# ---- video ----


@pytest.mark.parametrize(
    ("suffix", "codec", "sound"),
    [("mp4", "mpeg4", "aac"), ("webm", "libvpx", "libopus"), ("mkv", "mpeg4", "flac")],
)
def test_video_formats(tmp_path: Path, suffix: str, codec: str, sound: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", codec, sound_codec=sound)
    clip = read_video(path, want_sound=True)
    assert clip.frames.shape == (4, 3, 48, 64)
    assert clip.times_s == pytest.approx((0.0, 0.48, 1.0, 1.48), abs=0.03)
    levels = clip.frames.float().mean(dim=(1, 2, 3))
    assert levels.tolist() == pytest.approx([20 + 50 * t for t in clip.times_s], abs=6)
    assert clip.sound is not None and abs(len(clip.sound) - 16000) < 1700
    assert read_video(path.read_bytes(), want_sound=False).sound is None


def test_frame_counts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")  # 50 frames, 2 s
    assert len(read_video(path, fps=10.0).frames) == 20
    assert len(read_video(path, fps=1000.0).frames) == 50
    assert len(read_video(path, fps=10.0, max_frames=7).frames) == 6
    assert len(read_video(path, fps=0.1).frames) == 4
    assert len(read_video(path, max_frames=1).frames) == 1
    short = write_video(tmp_path / "b.mp4", times_ms=[0])
    assert read_video(short).times_s == (0.0,)
    assert len(read_video(write_video(tmp_path / "c.mp4", times_ms=[0, 40, 80])).frames) == 2


def test_times_are_the_moments_asked_for(tmp_path: Path) -> None:
    """A film of uneven pace: dense in the first second, one frame a second after it."""
    stamps = [*range(0, 1000, 100), 1000, 2000, 3000, 4000]
    clip = read_video(write_video(tmp_path / "a.mkv", times_ms=stamps), fps=2.0)
    assert clip.times_s == pytest.approx([i * clip.times_s[1] for i in range(len(clip.times_s))])
    levels = clip.frames.float().mean(dim=(1, 2, 3))
    shown = [max(stamp for stamp in stamps if stamp <= 1000 * t + 1) for t in clip.times_s]
    assert levels.tolist() == pytest.approx([20 + stamp / 20 for stamp in shown], abs=8)


def test_a_part_of_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", sound_codec="aac", sound_s=2.0)
    clip = read_video(path, start_s=1.0, end_s=1.6, want_sound=True, fps=10.0)
    levels = clip.frames.float().mean(dim=(1, 2, 3))
    assert levels.tolist() == pytest.approx([20 + 50 * (1 + t) for t in clip.times_s], abs=6)
    assert clip.times_s[0] == pytest.approx(0.0, abs=0.05)
    assert clip.sound is not None and abs(len(clip.sound) - 9600) < 1000
    quickly(ValueError, "no frame lies", lambda: read_video(path, start_s=50.0))


def test_a_phone_held_upright(tmp_path: Path) -> None:
    """Stored lying, shown after a quarter turn clockwise (which FFmpeg calls -90 degrees)."""
    path = tmp_path / "a.mp4"
    lying = np.zeros((48, 64, 3), np.uint8)
    lying[:, :32] = 255  # what is on the left goes to the top
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.set_display_rotation(-90)
        for _ in range(4):
            container.mux(video.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        container.mux(video.encode(None))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90
    frame = read_video(path).frames[0].float()
    assert frame.shape == (3, 64, 48)
    assert float(frame[:, :24].mean()) > 200 > 50 > float(frame[:, 40:].mean())


def test_sound_is_lined_up_with_the_pictures(tmp_path: Path) -> None:
    """Pictures that begin one second after the sound: its first second is heard before them."""
    late = write_video(tmp_path / "a.mkv", times_ms=[1000 + 40 * i for i in range(25)], sound_codec="flac", sound_s=2.0)
    clip = read_video(late, want_sound=True)
    assert clip.times_s[0] == 1.0
    assert clip.sound is not None and abs(len(clip.sound) - 32000) < 500


def test_frame_lists_and_arrays() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    for value in (frames, frames.transpose(0, 3, 1, 2), torch.from_numpy(frames), pictures, list(frames)):
        clip = read_video(value, frame_rate=4.0)
        assert torch.equal(clip.frames, expected)
        assert clip.times_s == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    assert read_video(frames).times_s[1] == 0.5
    assert read_video(frames, max_frames=3, frame_rate=1.0).times_s == (0.0, 2.0, 4.0)


def test_only_small_frames_are_kept(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", size=(640, 480))
    seen: list[int] = []

    def resize(frame: torch.Tensor, frames: int) -> torch.Tensor:
        seen.append(frame.numel())
        return frame[:, ::10, ::10].clone()

    clip = load_video(path, Sampling(fps=5.0), resize, None, False)
    assert len(seen) == len(clip.frames) == 10  # frames that are not chosen are not even converted
    assert clip.frames.shape[2:] == (48, 64)


def test_one_full_size_frame_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def resize(frame: torch.Tensor, frames: int) -> torch.Tensor:
        assert frames == 10
        alive.append(sum(earlier() is not None for earlier in seen))
        seen.append(weakref.ref(frame))
        return frame[:, ::10, ::10].clone()

    for value in (write_video(tmp_path / "a.mp4", size=(640, 480)), np.zeros((10, 480, 640, 3), np.uint8)):
        seen.clear()
        load_video(value, Sampling(fps=5.0), resize, None, False)
    assert alive == [0] * 20


def test_bad_videos(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no film")
    soundfile.write(tmp_path / "sound.wav", tone(16000), 16000)
    quickly(ValueError, r"cut\.mp4", lambda: read_video(tmp_path / "cut.mp4"))
    quickly(ValueError, r"text\.mp4", lambda: read_video(tmp_path / "text.mp4"))
    quickly(ValueError, r"sound\.wav.*no picture", lambda: read_video(tmp_path / "sound.wav"))
    quickly(FileNotFoundError, r"none\.mp4", lambda: read_video(tmp_path / "none.mp4"))
    quickly(ValueError, "no frames", lambda: read_video([]))
    quickly(ValueError, "no frames", lambda: read_video(np.zeros((0, 4, 4, 3), np.uint8)))
    quickly(TypeError, "list of pictures", lambda: read_video(np.zeros((4, 4, 3), np.uint8)))
    quickly(ValueError, "one size", lambda: read_video([picture(), picture().resize((20, 20))]))
    quickly(ValueError, "fps", lambda: read_video([picture()], frame_rate=0.0))
    quickly(ValueError, "fps", lambda: Sampling(fps=float("nan")))
    quickly(ValueError, "max_frames", lambda: Sampling(max_frames=0))
    quickly(ValueError, "video_start", lambda: Sampling(start_s=3.0, end_s=1.0))
