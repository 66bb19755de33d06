"""Media that are not what they say: servers that break off, wrong clocks, text under a film's name, endless sound."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_media import picture, quickly, read_video, tone, write_video

from omni.processing import audio_file, sources
from omni.processing.audio_file import load_audio
from omni.processing.image_file import load_image
from omni.processing.sources import open_source


@pytest.fixture
def odd_server() -> Iterator[str]:
    """A server that breaks off, promises too much, and never ends its headers; other addresses are echoed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            if self.path == "/headers":
                with suppress(OSError):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    for _ in range(50):
                        self.wfile.write(b"X-A: b\r\n")
                        time.sleep(0.1)
                return
            body = self.path.encode()
            length = {"/short": 100, "/huge": 1 << 40}.get(self.path, len(body))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_downloads_that_are_not_what_they_say(odd_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_source(f"{odd_server}/ä b.wav?q=ü%20", "audio") == b"/%C3%A4%20b.wav?q=%C3%BC%20"
    quickly(OSError, "closed after 6 of 100 bytes", lambda: open_source(f"{odd_server}/short", "audio"))
    quickly(ValueError, "larger than 512 MB", lambda: open_source(f"{odd_server}/huge", "audio"))
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_S", 0.4)
    quickly(OSError, "more than 0.4 s", lambda: open_source(f"{odd_server}/headers", "audio"))
    quickly(OSError, "cannot be fetched", lambda: open_source("http://[::1/x", "audio"))


def test_odd_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg takes "12:" for a protocol; "#" and "?" in a file's address belong to its name."""
    name = "12:30 #1?.mp4"
    write_video(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for value in (name, (tmp_path / name).as_uri(), f"file://{tmp_path}/{name}"):
        assert len(read_video(value).frames) > 0
    quickly(FileNotFoundError, "x{80}…' cannot be looked up: File name too long$", lambda: load_audio("x" * 5000))


def test_text_is_neither_film_nor_sound(tmp_path: Path) -> None:
    for suffix in ("txt", "raw", "mp3", "mp4"):
        path = tmp_path / f"words.{suffix}"
        path.write_text("hello there, all of you\n" * 500)
        quickly(ValueError, path.name, lambda path=path: load_audio(path))
        quickly(ValueError, path.name, lambda path=path: read_video(path))


def test_damaged_mp3_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.mp3", tone(44100), 44100)
    whole = load_audio(tmp_path / "a.mp3")
    assert abs(len(whole) - 8000) < 800
    data = (tmp_path / "a.mp3").read_bytes()
    noise = np.random.default_rng(0).bytes(4000)
    for damaged in (data[: len(data) // 2], data[:1000] + noise, b"ID3 " + b"text " * 2000):
        with suppress(ValueError):
            load_audio(damaged)
    assert capfd.readouterr() == ("", "")


def test_a_clip_longer_than_any_model_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_file, "MAX_CLIP_S", 0.4)
    soundfile.write(tmp_path / "a.flac", tone(16000), 16000)
    soundfile.write(tmp_path / "a.mp3", tone(16000), 16000)
    for value in (tmp_path / "a.flac", tmp_path / "a.mp3", (tone(8000), 8000)):
        quickly(ValueError, "longer than the limit", lambda value=value: load_audio(value))


def test_arrays_without_numbers() -> None:
    quickly(ValueError, "no samples", lambda: load_audio(np.zeros((2, 0))))
    quickly(TypeError, "meta tensor", lambda: load_audio(torch.zeros(5000, device="meta")))
    quickly(TypeError, "meta tensor", lambda: load_image(torch.zeros(3, 9, 9, device="meta")))
    quickly(TypeError, "must be a path", lambda: load_image(np.zeros((9, 9, 3), complex)))
    half = torch.rand(3, 9, 9).bfloat16()
    assert np.array_equal(np.asarray(load_image(half)), np.asarray(load_image(half.float())))


def test_damaged_exif_data_is_passed_over(recwarn: pytest.WarningsRecorder) -> None:
    file = io.BytesIO()
    picture().save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert load_image(file.getvalue()).size == picture().size
    assert not recwarn.list


def test_dark_frames_of_a_float_film_stay_dark() -> None:
    film = np.full((4, 40, 60, 3), 200.0)
    film[0] = 1.0
    for value in (film, torch.from_numpy(film)):
        assert read_video(value).frames.amax((1, 2, 3)).tolist() == [1, 200, 200, 200]


def test_sound_with_a_wrong_clock(tmp_path: Path) -> None:
    """A track that begins hours after the pictures is no sound of theirs, and hours of silence fill the memory."""
    path = tmp_path / "a.mkv"
    write_video(path, sound_codec="flac", sound_start_s=90000.0)
    assert read_video(path, want_sound=True).sound is None
