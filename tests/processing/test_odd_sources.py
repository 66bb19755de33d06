"""Servers that lead elsewhere or never end, tracks of unknown codecs, parts without an end, too little memory."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from build import TOY_DATA, chat
from media_files import grey_film, sines
from PIL import Image
from test_media import picture, quickly, read_video

from omni.processing import sources
from omni.processing.audio_file import load_audio
from omni.processing.image_file import load_image
from omni.processing.processor import OmniProcessor
from omni.processing.sources import open_source

Send = Callable[[bytes], Any]


@pytest.fixture
def server() -> Iterator[str]:
    """/to/ADDRESS redirects there; /continue, /trailer, /drops and /headers never end; /ok has a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            with suppress(OSError):
                self.answer(self.path)

        def answer(self, path: str) -> None:
            if path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", path[4:])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if path == "/ok":
                self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nthe body")
                return
            start = {"/trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"}
            self.wfile.write(start.get(path, b""))
            line = {"/continue": b"HTTP/1.1 100 Continue\r\n\r\n", "/trailer": b"X-A: b\r\n"}.get(path, b"HTTP/1.1 ")
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                self.wfile.write(line * (1000 if path in ("/continue", "/trailer") else 0) or line[:1])
                time.sleep(0.001 if path in ("/continue", "/trailer") else 0.05)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:9/a.wav", "file:///etc/hostname", "data:,a", "gopher://a/b"])
def test_redirects_stay_on_the_web(server: str, target: str) -> None:
    quickly(OSError, "cannot be fetched: .*(redirect|HTTP 302)", lambda: open_source(f"{server}/to/{target}", "audio"))


def test_redirects_to_the_web_are_followed(server: str) -> None:
    assert open_source(f"{server}/to/{server}/to/{server}/ok", "audio") == b"the body"
    assert open_source(f"{server}/to//ok", "audio") == b"the body"


@pytest.mark.parametrize("path", ["continue", "trailer", "drops"])
def test_a_download_ends_with_its_limit(server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it goes on in the background."""
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_S", 0.3)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="more than"):
        open_source(f"{server}/{path}", "audio")
    mine = [thread for thread in threading.enumerate() if thread not in before and thread.daemon]
    mine = [thread for thread in mine if "process_request" not in thread.name]
    for thread in mine:
        thread.join(3.0)
    assert not any(thread.is_alive() for thread in mine)


def unknown_codec(data: bytes, known: bytes) -> bytes:
    assert known in data
    return data.replace(known, known[:2] + b"X" * (len(known) - 2))


def test_a_picture_track_of_unknown_codec() -> None:
    film = unknown_codec(grey_film("matroska", "mpeg4", [0, 40], sound=sines(1)), b"V_MPEG4/ISO/ASP")
    quickly(ValueError, "no picture track.*codec", lambda: read_video(film))
    assert len(load_audio(film)) == 16000  # its sound is there


def test_a_sound_track_of_unknown_codec() -> None:
    film = unknown_codec(grey_film("matroska", "mpeg4", [0, 40], sound=sines(1)), b"A_PCM/INT/LIT")
    quickly(ValueError, "no sound track.*codec", lambda: load_audio(film))
    clip = read_video(film, want_sound=True)
    assert len(clip.frames) == 2 and clip.sound is None


def test_an_svg_is_no_film() -> None:
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"><circle r="40"/></svg>'
    quickly(ValueError, "video", lambda: read_video(drawing))
    quickly(ValueError, "image", lambda: load_image(drawing))


@pytest.mark.parametrize("end", [float("inf"), 1e30, 10**30])
def test_a_part_without_an_end(end: float) -> None:
    film = grey_film("matroska", "mpeg4", [40 * i for i in range(50)], sound=sines(1, 2.0))
    clip, whole = read_video(film, end_s=end, want_sound=True), read_video(film, want_sound=True)
    assert clip.times_s == whole.times_s and clip.sound is not None and len(clip.sound) == 32000
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    assert read_video(frames, end_s=end).times_s == read_video(frames).times_s


@pytest.mark.parametrize("options", [
    {"video_start": float("inf")}, {"video_start": float("nan")}, {"video_end": float("nan")}, {"video_start": 10**400},
    {"fps": 10**400}, {"video_end": -float("inf")}, {"fps": float("inf")},
])  # fmt: skip
def test_numbers_that_name_no_moment(options: dict[str, Any]) -> None:
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    for film in (np.zeros((4, 48, 64, 3), np.uint8), grey_film("matroska", "mpeg4", [0, 40, 80, 120])):
        with pytest.raises(ValueError, match=r"video_start|fps"):
            processor(chat([{"video": film, **options}]))
    end = processor(chat([{"video": np.zeros((4, 48, 64, 3), np.uint8), "video_end": 10**400}]))
    assert end.video_grid_thw.shape == (1, 3)


@pytest.mark.parametrize("where", ["convert", "load"])
def test_too_little_memory_is_not_called_damage(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    value = picture() if where == "load" else picture().quantize()
    monkeypatch.setattr(Image.Image, where, fail)
    with pytest.raises(OSError, match="memory"):
        load_image(value)


def test_too_little_memory_for_sound_and_film(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from omni.processing import audio_file, video_file

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    film = grey_film("matroska", "mpeg4", [0, 40], sound=sines(1))
    monkeypatch.setattr(audio_file, "decode_sound_track", fail)
    with pytest.raises(OSError, match="memory"):
        load_audio(film)
    monkeypatch.setattr(video_file, "_decode", fail)
    with pytest.raises(OSError, match="memory"):
        read_video(film)
