"""Which frames of a film are taken and when they are shown: uneven pace, restarted clocks, changing sizes, seeking."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch
from build import TOY_DATA, chat
from media_files import amplitudes, encode_sound, grey_film, needs_encoder, sines
from test_media import read_video

from omni.processing import vision
from omni.processing.audio_file import load_audio
from omni.processing.processor import OmniProcessor
from omni.processing.video_file import VideoClip

# ---- an uneven pace ----

LATE = [0, *range(55000, 60000, 50)]  # a screen recording: nothing changes for 55 s


def shown_at(stamps: list[int], moment_ms: float) -> int:
    return max((i for i, stamp in enumerate(stamps) if stamp <= moment_ms + 1), default=0)


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize(
    "stamps",
    [LATE, [0, 9000, 9500, 60000], [*range(0, 1000, 100), *range(1000, 20000, 1000)], [0, 40, 80, 30000], [0, 10000]],
)
def test_a_frame_is_shown_until_the_next_one(container: str, stamps: list[int]) -> None:
    """Times are the moments asked for, evenly spread; each shows the last frame that came before it."""
    levels = [20 + 190 * i // len(stamps) for i in range(len(stamps))]
    clip = read_video(grey_film(container, "mpeg4", stamps, levels), fps=2.0)
    gaps = np.diff(clip.times_s)
    assert clip.times_s[0] == 0.0 and gaps == pytest.approx(gaps[0], abs=2e-3)
    assert clip.times_s[-1] * 1000 == pytest.approx(stamps[-1], rel=0.55)
    found = clip.frames.float().mean(dim=(1, 2, 3)).tolist()
    assert found == pytest.approx([levels[shown_at(stamps, 1000 * t)] for t in clip.times_s], abs=4)


def test_grid_times_of_a_screen_recording() -> None:
    """60 s with frames at 0 and from 55 s on: every step has a time of its own."""
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    inputs = processor(chat([{"video": grey_film("matroska", "mpeg4", LATE, [50] * len(LATE)), "max_pixels": 1024}]))
    times = inputs.video_grid_times[0]
    assert len(times) == 50 and times[0] == 0
    assert torch.allclose(times.diff(), times[1].expand(49), atol=1e-6) and 58 < float(times[-1]) < 60


@pytest.mark.parametrize(("start_s", "end_s"), [(10.0, 20.0), (54.0, 56.0), (30.0, None), (0.0, 5.0)])
def test_a_part_in_which_nothing_changes(start_s: float, end_s: float | None) -> None:
    levels = [50, *(120 + i for i in range(len(LATE) - 1))]
    film = grey_film("matroska", "mpeg4", LATE, levels)
    clip = read_video(film, start_s=start_s, end_s=end_s, fps=1.0)
    assert clip.times_s[0] == 0.0
    found = clip.frames.float().mean(dim=(1, 2, 3)).tolist()
    moments = [1000 * (start_s + t) for t in clip.times_s]
    assert found == pytest.approx([levels[shown_at(LATE, moment)] for moment in moments], abs=4)


def test_a_steady_film_keeps_its_frames() -> None:
    film = grey_film("matroska", "mpeg4", [40 * i for i in range(50)])
    clip = read_video(film)
    assert clip.times_s == pytest.approx((0.0, 0.5, 1.0, 1.5), abs=1e-6)
    assert clip.frames.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([20, 44, 70, 94], abs=3)


# ---- what changes inside a stream ----


def joined_track(codec: str, container: str, sizes: list[tuple[int, int]], options: dict[str, str]) -> bytes:
    """One picture track whose size changes: 25 frames of each, of level 60, 90, 120 and so on."""
    needs_encoder(codec)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        track = out.add_stream(codec, rate=25)
        track.width, track.height, track.pix_fmt = *sizes[0], "yuv420p"
        track.time_base = Fraction(1, 25)
        for number, (width, height) in enumerate(sizes):
            encoder: Any = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 25), Fraction(25), options
            for index in range(25):
                grey = np.full((height, width, 3), 60 + 30 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = 25 * number + index, Fraction(1, 25)
                for packet in encoder.encode(frame):
                    packet.stream = track
                    out.mux(packet)
            for packet in encoder.encode(None):
                packet.stream = track
                out.mux(packet)
    return file.getvalue()


SIZES = [
    [(64, 48), (128, 96)], [(128, 96), (64, 48)], [(64, 48), (48, 64)], [(64, 48), (128, 96), (32, 24)],
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("codec", "container"),
    [("libvpx", "webm"), ("libvpx-vp9", "webm"), ("libx264", "mpegts"), ("mpeg2video", "mpegts")],
)
def test_the_picture_size_changes(codec: str, container: str, sizes: list[tuple[int, int]]) -> None:
    """As in recordings of WebRTC: all frames get the size of the first."""
    clip = read_video(joined_track(codec, container, sizes, {}), fps=4.0)
    assert clip.frames.shape == (4 * len(sizes), 3, sizes[0][1], sizes[0][0])
    levels = clip.frames.float().mean(dim=(1, 2, 3))[1::4].tolist()
    assert levels == pytest.approx([60 + 30 * i for i in range(len(sizes))], abs=4)


@pytest.mark.parametrize(
    ("first", "second"), [((44100, 1), (48000, 2)), ((48000, 2), (16000, 1)), ((24000, 1), (8000, 2))]
)
@pytest.mark.parametrize("container", ["adts", "mpegts", "mp3"])
def test_rate_and_channels_change(container: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    data = b""
    for (rate, channels), hz in ((first, 440), (second, 880)):
        codec = "libmp3lame" if container == "mp3" else "aac"
        layout = "mono" if channels == 1 else "stereo"
        data += encode_sound(container, codec, sines(channels, 1.0, rate, hz, 0), rate, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an MP3 loses the packet at the joint
        samples = load_audio(data).numpy()
    assert abs(len(samples) - 32000) < 4500
    assert amplitudes(samples[1000:14000], [440])[0] > 0.4
    assert amplitudes(samples[-13000:-500], [880])[0] > 0.4


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_clocks_that_restart(codec: str, parts: int) -> None:
    """TS files joined byte by byte: the second begins at the first one's clock."""
    film = b""
    for part in range(parts):
        levels = [40 + 60 * part + i for i in range(50)]
        film += grey_film("mpegts", codec, [40 * i for i in range(50)], levels, sound=sines(1, 2.0), sound_codec="aac")
    clip = read_video(film, want_sound=True)
    assert clip.times_s == pytest.approx([0.5 * i for i in range(4 * parts)], abs=0.05)
    expected = [40 + 60 * (i // 4) + 12.5 * (i % 4) for i in range(4 * parts)]
    assert clip.frames.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx(expected, abs=5)
    assert clip.sound is not None and abs(len(clip.sound) - 32000 * parts) < 3500 * parts
    last = read_video(film, start_s=2.0 * parts - 1.0, want_sound=True, fps=4.0)
    assert last.frames.float().mean(dim=(1, 2, 3))[0] == pytest.approx(40 + 60 * (parts - 1) + 25, abs=5)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_track_that_appears_later(codec: str) -> None:
    """A recording whose sound is switched on after a while."""
    stamps, levels = [40 * i for i in range(50)], [80] * 50
    mute = grey_film("mpegts", codec, stamps, levels)
    film = mute + grey_film("mpegts", codec, stamps, levels, sound=sines(1, 2.0), sound_codec="aac")
    assert len(read_video(film).frames) == 8
    assert len(read_video(film, want_sound=True).frames) == 8


def turned(matrix: tuple[int, int, int, int]) -> bytes:
    """A film of a white upper left quarter, whose display matrix has a, b, c, d."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            out.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(track.encode(None))
    data = bytearray(file.getvalue())
    a, b, c, d = (0x10000 * value for value in matrix)
    place = data.index(struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000), data.index(b"tkhd"))
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    return bytes(data)


@pytest.mark.parametrize(
    ("matrix", "corner"),  # where the white quarter is shown
    [
        ((1, 0, 0, 1), "top left"),
        ((0, 1, -1, 0), "top right"),
        ((-1, 0, 0, -1), "bottom right"),
        ((0, -1, 1, 0), "bottom left"),
        ((-1, 0, 0, 1), "top right"),
        ((1, 0, 0, -1), "bottom left"),
        ((0, 1, 1, 0), "top left"),
        ((0, -1, -1, 0), "bottom right"),
    ],
)
def test_display_matrices(matrix: tuple[int, int, int, int], corner: str) -> None:
    """The eight ways of turning and mirroring: (x, y) is shown at (a x + c y, b x + d y)."""
    frame = read_video(turned(matrix)).frames[0].float().mean(0)
    height, width = (48, 64) if matrix[0] else (64, 48)
    assert frame.shape == (height, width)
    top, left = "top" in corner, "left" in corner
    quarter = frame[: height // 2] if top else frame[height // 2 :]
    quarter = quarter[:, : width // 2] if left else quarter[:, width // 2 :]
    assert quarter.mean() > 200 and frame.mean() == pytest.approx(64, abs=10)


# ---- long films ----

CODINGS = [
    ("mp4", "libx264", {"g": "250", "bf": "3"}),
    ("matroska", "libx264", {"g": "250", "bf": "3", "x264-params": "scenecut=0:open-gop=1:keyint=60"}),
    ("mpegts", "libx264", {"g": "100", "bf": "2"}),
    ("mp4", "libx264", {"g": "100", "x264-params": "intra-refresh=1"}),
    ("matroska", "libx265", {"x265-params": "keyint=60:open-gop=1:bframes=4:log-level=none"}),
    ("mp4", "mpeg4", {"g": "100", "bf": "2"}),
    ("avi", "mpeg4", {"g": "100"}),
    ("webm", "libvpx-vp9", {"g": "120"}),
    ("flv", "libx264", {"g": "80"}),
    ("matroska", "mpeg4", {"g": "600"}),
]


def moving_film(container: str, codec: str, options: dict[str, str], frames: int = 600) -> bytes:
    """Frames that differ everywhere from one to the next, so that a wrong reference shows."""
    needs_encoder(codec)
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    with av.open(file, "w", format=container) as out:
        track = out.add_stream(codec, rate=25, options=options)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.roll(noise[number // 150 % 4], number * 2, axis=1) // 2 + np.uint8(number % 100)
            out.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(track.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("container", "codec", "options"), CODINGS)
def test_seeking_gives_the_frames_of_decoding_whole(container: str, codec: str, options: dict[str, str]) -> None:
    film = moving_film(container, codec, options)
    with av.open(io.BytesIO(film)) as whole:
        frames = [frame.to_ndarray(format="rgb24") for frame in whole.decode(video=0)]
    assert len(frames) == 600
    for sampling, first in (({"max_frames": 4}, 0), ({"max_frames": 16}, 0), ({"start_s": 20.0, "fps": 1.0}, 500)):
        clip = read_video(film, **sampling)
        length = (600 - first) / 25
        for place, frame in enumerate(clip.frames):
            moment = first + place * (600 - first) / len(clip.frames)
            assert clip.times_s[place] == pytest.approx(place * length / len(clip.frames), abs=1e-3)
            near = frames[int(moment) : int(moment + 0.51) + 1]
            assert any(np.array_equal(frame.permute(1, 2, 0).numpy(), each) for each in near), (sampling, place)


def test_few_frames_of_a_long_film_decode_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3000 frames with a key frame every 60, four chosen ones need at most their own groups."""
    from omni.processing import film

    data, decoded, original = moving_film("mp4", "mpeg4", {"g": "60"}, 3000), [], film.decode

    def counting(*arguments: Any) -> Iterator[Any]:
        for frame in original(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(film, "decode", counting)
    assert len(read_video(data, max_frames=4).frames) == 4
    assert 4 <= len(decoded) < 300


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (2000, 700)])
def test_a_long_video_is_capped(monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    """By default all frames of a video share 128000 * 0.9 tokens, as in Qwen's own recipe."""
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    sizes = {}

    def load(value: Any, sampling: Any, resize: Any, *others: Any) -> VideoClip:
        for frames in (2, 300, 768, 1500):
            sizes[frames] = resize(torch.zeros(3, height, width, dtype=torch.uint8), frames).shape[1:].numel()
        return VideoClip(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), (0.0, 0.5), None)

    monkeypatch.setattr(vision, "load_video", load)
    with pytest.warns(UserWarning, match="positions"):
        processor(chat([{"video": b"a film"}]), allow_long=True)
    total = int(128000 * 32 * 32 * 0.9)
    for frames, pixels in sizes.items():
        assert pixels <= total * 2 / frames
        assert pixels > 0.8 * min(768 * 32 * 32, total * 2 / frames)
    with pytest.warns(UserWarning, match="positions"):
        processor(chat([{"video": b"a film"}]), total_pixels=10**10, allow_long=True)
    assert sizes[1500] > 0.9 * 768 * 32 * 32
