"""Damaged and joined files, the right one of several tracks, headers that say nothing: what can be heard is heard."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from media_files import amplitudes, encode_sound, fill, grey_film, sines, sound_track
from test_media import picture, read_video

from omni.processing.audio_file import load_audio
from omni.training.data.sound import read_speech

# ---- damaged packets ----

SOUNDS = [
    ("mp3", "libmp3lame"), ("adts", "aac"), ("ipod", "aac"), ("webm", "vorbis"), ("matroska", "aac"),
    ("matroska", "libmp3lame"), ("matroska", "flac"), ("matroska", "ac3"), ("matroska", "eac3"),
    ("wav", "libmp3lame"), ("w64", "libmp3lame"), ("caf", "libmp3lame"),
]  # fmt: skip


def packets_of(data: bytes, kind: str = "audio") -> list[bytes]:
    with av.open(io.BytesIO(data)) as container:
        return [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]


def damage(data: bytes, numbers: list[int], kind: str = "audio", spare: int = 0) -> bytes:
    """The contents of those packets overwritten, but for their first `spare` bytes."""
    out, start = bytearray(data), 0
    for number, packet in enumerate(packets_of(data, kind)):
        start = data.index(packet, start)
        if number in numbers:
            out[start + spare : start + len(packet)] = b"\xff" * (len(packet) - spare)
        start += len(packet)
    return bytes(out)


def manner(container: str) -> dict[str, Any]:
    """What makes a packet undecodable; headers that the container needs stay."""
    return {"spare": {"mp3": 4, "wav": 4, "w64": 4, "caf": 4, "adts": 7}.get(container, 0)}


@pytest.mark.parametrize(("container", "codec"), SOUNDS)
def test_a_damaged_packet_is_left_out(tmp_path: Path, container: str, codec: str) -> None:
    """What is left is heard, and the file is named once, with the number of packets that are lost."""
    stereo = codec == "vorbis"
    whole = encode_sound(container, codec, sines(1 + stereo, 3.0, hz=440, step_hz=0), 48000, ("mono", "stereo")[stereo])
    count = len(packets_of(whole))
    middle = [count // 2 + i for i in range(0, min(10, count // 4), 2)]
    path = tmp_path / "a.bin"
    path.write_bytes(damage(whole, middle, **manner(container)))
    with pytest.warns(UserWarning, match=r"a\.bin.*damaged") as said:
        samples = load_audio(path).numpy()
    assert len(said) == 1
    assert 0.7 < len(samples) / len(load_audio(whole)) <= 1.01
    assert amplitudes(samples[:14000], [440])[0] == pytest.approx(0.5, abs=0.1)
    with pytest.warns(UserWarning, match=r"a\.bin.*damaged"):
        assert len(read_speech(path, 24000)) > 24000 * 2  # a row of training data is not bad for it


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
@pytest.mark.parametrize("manner", ["zeros", "noise", "cut out"])
def test_lost_pages_of_an_ogg_file(tmp_path: Path, subtype: str, manner: str) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16000 * 12).astype(np.float32)
    soundfile.write(file, noise, 16000, format="OGG", subtype=subtype)
    data, path = file.getvalue(), tmp_path / "a.ogg"
    half, piece = len(data) // 2, len(data) // 5
    filler = {"zeros": bytes(piece), "noise": bytes(range(256)) * (piece // 256), "cut out": b""}[manner]
    path.write_bytes(data[:half] + filler + data[half + piece :])
    with pytest.warns(UserWarning, match=r"a\.ogg is damaged: .*pages are missing") as said:
        assert 4 * 16000 < len(load_audio(path)) <= 12 * 16000
    assert len(said) == 1
    path.write_bytes(data + data)  # two joined files count their pages anew
    assert abs(len(load_audio(path)) - 24 * 16000) <= 2000


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm"])
def test_a_damaged_packet_in_the_sound_of_a_film(container: str) -> None:
    codec, sound = ("libvpx", "vorbis") if container == "webm" else ("mpeg4", "aac")
    stamps = [40 * i for i in range(50)]
    channels = sines(2 if sound == "vorbis" else 1, 2.0, hz=440, step_hz=0)
    film = grey_film(container, codec, stamps, sound=channels, sound_codec=sound)
    count = len(packets_of(film))
    film = damage(film, [count // 2 + i for i in range(0, 12, 2)], **manner(container))
    with pytest.warns(UserWarning, match="damaged"):
        clip = read_video(film, want_sound=True)
    assert len(clip.frames) == 4 and clip.sound is not None and 20000 < len(clip.sound) < 33000


def test_a_film_whose_sound_is_lost_altogether() -> None:
    film = grey_film("matroska", "mpeg4", [40 * i for i in range(50)], sound=sines(1, 2.0), sound_codec="ac3")
    film = damage(film, list(range(len(packets_of(film)))))
    with pytest.warns(UserWarning, match="without its sound: .* cannot be decoded"):
        clip = read_video(film, want_sound=True)
    assert len(clip.frames) == 4 and clip.sound is None


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx-vp9")])
def test_a_damaged_picture_is_left_out(container: str, codec: str) -> None:
    stamps = [40 * i for i in range(100)]
    film = damage(grey_film(container, codec, stamps, options={"g": "10"}), [40, 41, 42, 43], "video")
    with pytest.warns(UserWarning, match="damaged"):
        clip = read_video(film, fps=2.0)
    assert len(clip.frames) == 8
    levels = clip.frames.float().mean(dim=(1, 2, 3))
    assert levels[[0, 1, 2, 6, 7]].tolist() == pytest.approx([20, 45, 70, 170, 195], abs=8)


def test_two_joined_mp3s() -> None:
    first, second = (encode_sound("mp3", "libmp3lame", sines(1, 1.0, hz=hz)) for hz in (440, 880))
    tag = b"TAG" + b"a title" + bytes(118)  # ID3v1 at the end of the first, between the two
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = load_audio(first + tag + second).numpy()
    assert abs(len(samples) - 32000) < 3000
    assert amplitudes(samples[1000:15000], [440])[0] > 0.4 and amplitudes(samples[-14000:], [880])[0] > 0.4


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    for codec in ("ac3", "libmp3lame", "flac"):
        whole = encode_sound("matroska", codec, sines(1, 1.0))
        path = tmp_path / "a.mka"
        path.write_bytes(damage(whole, list(range(len(packets_of(whole))))))
        with pytest.raises(ValueError, match=r"a\.mka.*cannot be decoded"):
            load_audio(path)


def test_a_whole_file_says_nothing() -> None:
    for container, codec in SOUNDS:
        if codec != "vorbis":
            load_audio(encode_sound(container, codec, sines(1, 0.5)))  # a warning would fail here


def test_a_cut_file_is_heard_to_its_cut() -> None:
    whole = encode_sound("mp3", "libmp3lame", sines(1, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 12000 < len(load_audio(whole[: len(whole) // 2])) < 20000


# ---- several tracks ----


def two_tracks(container: str, codec: str, tracks: list[np.ndarray], default: int | None = None) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        made = [sound_track(out, codec) for _ in tracks]
        for number, track in enumerate(made):
            if default is not None:
                track.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        for track, samples in zip(made, tracks):
            if len(samples):
                fill(out, track, samples)
    return file.getvalue()


@pytest.mark.parametrize(("container", "codec"), [("matroska", "flac"), ("mp4", "aac"), ("mov", "pcm_s16le")])
@pytest.mark.parametrize("default", [0, 1])
def test_the_default_sound_track(container: str, codec: str, default: int) -> None:
    film = two_tracks(container, codec, [sines(1, hz=440), sines(1, hz=880)], default)
    low, high = amplitudes(load_audio(film).numpy(), [440, 880])
    assert (low < 0.05 < 0.4 < high) if default else (high < 0.05 < 0.4 < low)


@pytest.mark.parametrize("container", ["matroska", "mov"])
def test_a_silent_track_does_not_hide_the_sound(container: str) -> None:
    quiet, loud = np.zeros((48000, 1), np.float32), sines(1, hz=880)
    assert amplitudes(load_audio(two_tracks(container, "pcm_s16le", [quiet, loud])).numpy(), [880])[0] > 0.4
    assert amplitudes(load_audio(two_tracks(container, "pcm_s16le", [quiet, loud], 0)).numpy(), [880])[0] > 0.4
    silence = load_audio(two_tracks(container, "pcm_s16le", [quiet, quiet]))
    assert len(silence) == 16000 and not silence.any()


def test_an_empty_track_does_not_hide_the_sound() -> None:
    film = two_tracks("matroska", "pcm_s16le", [sines(1, 0.0), sines(1, hz=880)])
    assert amplitudes(load_audio(film).numpy(), [880])[0] > 0.4


def with_cover(container: str, first: bool, default: bool = True) -> bytes:
    """A film of 2 s and its cover, a white still, as a picture track before it or after it."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        made = {}
        for kind in ("cover", "film") if first else ("film", "cover"):
            track = out.add_stream("mjpeg" if kind == "cover" else "mpeg4", rate=25)
            track.width, track.height, track.pix_fmt = 64, 48, "yuvj420p" if kind == "cover" else "yuv420p"
            made[kind] = track
        if default:
            made["cover"].disposition = av.stream.Disposition.attached_pic
        for kind, count, level in (("cover", 1, 255), ("film", 50, 60)):
            for _ in range(count):
                grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                out.mux(made[kind].encode(grey))
            out.mux(made[kind].encode(None))
    return file.getvalue()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_a_cover_is_not_the_film(container: str, first: bool) -> None:
    clip = read_video(with_cover(container, first))
    assert len(clip.frames) == 4
    assert clip.frames.float().mean() == pytest.approx(60, abs=5)


def test_a_cover_that_is_attached() -> None:
    cover, file = io.BytesIO(), io.BytesIO()
    picture().save(cover, "JPEG")
    with av.open(file, "w", format="matroska") as out:
        out.add_attachment("cover.jpg", "image/jpeg", cover.getvalue())
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for _ in range(50):
            grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60, np.uint8), format="rgb24")
            out.mux(track.encode(grey))
        out.mux(track.encode(None))
    assert len(read_video(file.getvalue()).frames) == 4


# ---- headers ----


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS", "FLAC"])
@pytest.mark.parametrize("links", [1, 2, 3])
def test_chained_ogg_is_read_to_its_end(subtype: str, links: int) -> None:
    data = b""
    for link in range(links):
        file, samples = io.BytesIO(), sines(1, 1.0, hz=440 + 200 * link)
        if subtype == "FLAC":
            file = io.BytesIO(encode_sound("ogg", "flac", samples))
        else:
            soundfile.write(file, samples[:, 0], 48000, format="OGG", subtype=subtype)
        data += file.getvalue()
    samples = load_audio(data).numpy()
    assert abs(len(samples) - 16000 * links) < 1000
    last = amplitudes(samples[-15000:], [440 + 200 * (links - 1)])[0]
    assert last == pytest.approx(0.5, abs=0.1)


def test_ogg_chains_of_other_rates() -> None:
    data = b""
    for rate in (48000, 44100):
        file = io.BytesIO()
        soundfile.write(file, sines(1, 1.0, rate, hz=440)[:, 0], rate, format="OGG", subtype="VORBIS")
        data += file.getvalue()
    samples = load_audio(data).numpy()
    assert abs(len(samples) - 32000) < 1000 and amplitudes(samples[-15000:], [440])[0] > 0.4


def wav(data_size: int | None, riff_size: int | None = None, channels: int = 1, extra: bytes = b"") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sines(channels, 1.0, hz=440), 48000, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    start = data.index(b"data") + 4
    if data_size is not None:
        data[start : start + 4] = struct.pack("<I", data_size)
    if riff_size is not None:
        data[4:8] = struct.pack("<I", riff_size)
    return bytes(data) + extra


@pytest.mark.parametrize("data_size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFF00, None])
@pytest.mark.parametrize("riff_size", [0, 36, 0xFFFFFFFF, None])
def test_a_wav_whose_header_knows_no_size(data_size: int | None, riff_size: int | None) -> None:
    """As programs write it into a pipe."""
    for channels in (1, 2):
        samples = load_audio(wav(data_size, riff_size, channels)).numpy()
        assert abs(len(samples) - 16000) < 3
        assert amplitudes(samples, [440])[0] == pytest.approx(0.5 / channels, abs=0.01)


@pytest.mark.parametrize(
    ("form", "mark", "order"), [("AU", b".snd", ">"), ("AIFF", b"SSND", ">"), ("W64", b"data", "<")]
)
def test_other_headers_that_know_no_size(form: str, mark: bytes, order: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, sines(1, 1.0, hz=440), 48000, format=form, subtype="PCM_16")
    data = bytearray(file.getvalue())
    place = data.index(mark)
    if form == "AU":
        data[place + 8 : place + 12] = b"\xff" * 4
    elif form == "AIFF":
        data[place + 4 : place + 8] = bytes(4)
    else:
        data[place + 16 : place + 24] = bytes(8)
    assert abs(len(load_audio(bytes(data))) - 16000) < 60


def test_an_empty_wav_still_has_no_samples() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(0, np.float32), 48000, format="WAV")
    with pytest.raises(ValueError, match="no samples"):
        load_audio(file.getvalue())


# ---- sound before the first picture ----


@pytest.mark.parametrize("lead_s", [0.3, 1.0, 2.5])
def test_sound_before_the_first_picture(lead_s: float) -> None:
    """It stays, and each picture keeps its moment in it."""
    start = round(1000 * lead_s)
    stamps = [start + 40 * i for i in range(50)]
    levels = [60 + i for i in range(50)]
    film = grey_film("matroska", "mpeg4", stamps, levels, sound=sines(1, lead_s + 2.0, hz=440))
    clip = read_video(film, want_sound=True)
    assert clip.sound is not None and abs(len(clip.sound) - 16000 * (lead_s + 2.0)) < 100
    assert clip.times_s == pytest.approx([lead_s + t for t in (0.0, 0.5, 1.0, 1.5)], abs=0.05)
    alone = read_video(film)
    assert alone.times_s == pytest.approx((0.0, 0.5, 1.0, 1.5), abs=0.05) and torch.equal(alone.frames, clip.frames)


def test_sound_before_the_first_picture_of_a_part() -> None:
    stamps = [1000 + 40 * i for i in range(50)]
    film = grey_film("matroska", "mpeg4", stamps, [60] * 50, sound=sines(1, 3.0))
    clip = read_video(film, want_sound=True, start_s=1.0)  # of the film's clock, which begins with its pictures
    assert clip.sound is not None and abs(len(clip.sound) - 16000) < 100 and clip.times_s[0] == 0.0
