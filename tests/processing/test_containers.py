"""Files through FFmpeg: which containers are opened at all, and tracks of any number of channels.

What can end or hang a process is run in a child.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import soundfile
from media_files import amplitudes, encode_sound, grey_film, in_child, sines
from test_media import picture, read_video

from omni.processing.audio_file import load_audio
from omni.training.data.sound import read_speech

# ---- scripts: files that make FFmpeg open something else ----

SCRIPTS = {
    "concat": "ffconcat version 1.0\nfile '{secret}'\n",
    "concat without its first line": "file '{secret}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "hls that never ends": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n",
    "hls of addresses": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "hls master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{secret}.m3u8\n",
    "hls with a key": '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXT-X-KEY:METHOD=AES-128,URI="{secret}"\n#EXTINF:1,\n'
    "{secret}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 40404 RTP/AVP 0\n"
    "a=rtpmap:0 PCMU/8000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="audio/wav"><Representation id="0" '
    'bandwidth="1"><BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>\n',
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
    "</CompositionPlaylist>\n",
    "subtitles": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
    "metadata": ";FFMETADATA1\ntitle=a\n",
    "text": "hello there, all of you\n" * 400,
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{secret}"/></svg>\n' * 9,
}

_READ_SCRIPTS = """
from pathlib import Path
from omni.processing.audio_file import load_audio
from test_media import read_video
for path in map(Path, sys.argv[1:]):
    for value in (path, path.read_bytes()):
        for read in (load_audio, read_video):
            try:
                say([path.name, read.__name__, "opened", ""])
                read(value)
            except (ValueError, OSError) as error:
                say([path.name, read.__name__, type(error).__name__, str(error)])
"""


def test_scripts_open_nothing(tmp_path: Path) -> None:
    """A file that names other files, addresses or ports is no medium, by path, as bytes, as sound and as film."""
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, sines(1), 48000)
    paths = []
    for name, text in SCRIPTS.items():
        for suffix in ("txt", "m3u8", "sdp", "wav"):
            paths.append(tmp_path / f"{name}.{suffix}")
            paths[-1].write_text(text.replace("{secret}", str(secret)))
    said = in_child(_READ_SCRIPTS, *map(str, paths), timeout_s=60)
    outcomes = said[1::2]
    assert len(outcomes) == 4 * len(paths) and all(outcome[2] == "ValueError" for outcome in outcomes), outcomes
    assert all(outcome[0] in outcome[3] or "bytes>" in outcome[3] for outcome in outcomes), outcomes


def test_a_data_uri_is_no_way_around(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, sines(1), 48000)
    script = SCRIPTS["concat"].replace("{secret}", str(secret)).encode()
    uri = "data:audio/wav;base64," + base64.b64encode(script).decode()
    for read in (load_audio, read_video, lambda value: read_speech(value, 16000)):
        with pytest.raises(ValueError, match=r"cannot be decoded|no picture"):
            read(uri)


def test_a_pattern_in_a_name_reads_no_sequence(tmp_path: Path) -> None:
    """ "s%d.png" names one file, not s1.png, s2.png and so on."""
    for number in (1, 2, 3):
        picture().save(tmp_path / f"s{number}.png")
    picture().resize((32, 24)).save(tmp_path / "s%d.png")
    clip = read_video(tmp_path / "s%d.png")
    assert clip.frames.shape == (1, 3, 24, 32)


def test_a_film_that_points_elsewhere(tmp_path: Path) -> None:
    """A reference inside mp4 to the samples of another file is not followed."""
    film = bytearray(grey_film("mp4", "mpeg4", [0, 40, 80, 120]))
    (tmp_path / "a.mp4").write_bytes(film)
    assert len(read_video(tmp_path / "a.mp4").frames) == 4
    place = film.index(b"url \x00\x00\x00\x01")
    film[place + 7] = 0  # the samples are not in this file
    assert len(read_video(bytes(film)).frames) == 4  # and still nothing but these bytes is read


# ---- every good container ----

SOUNDS = [
    ("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("w64", "pcm_s16le"), ("aiff", "pcm_s16be"), ("au", "pcm_s16be"),
    ("caf", "pcm_s16le"), ("flac", "flac"), ("ogg", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame"),
    ("adts", "aac"), ("ipod", "aac"), ("mp4", "aac"), ("mov", "pcm_s16le"), ("matroska", "pcm_s16le"),
    ("webm", "libopus"), ("avi", "pcm_s16le"), ("flv", "aac"), ("mpegts", "aac"), ("mpegts", "mp2"), ("mpeg", "mp2"),
    ("asf", "ac3"), ("ac3", "ac3"), ("eac3", "eac3"), ("tta", "tta"), ("wv", "wavpack"), ("3gp", "aac"),
    ("nut", "pcm_s16le"), ("mp2", "mp2"), ("dts", "dca"), ("amr", "libopencore_amrnb"),
    ("ipod", "alac"), ("truehd", "truehd"), ("latm", "aac"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), SOUNDS)
def test_sound_containers(tmp_path: Path, container: str, codec: str) -> None:
    rate = 8000 if container == "amr" else 48000
    data = encode_sound(container, codec, sines(1, rate=rate, hz=440), rate)
    (tmp_path / "sound").write_bytes(data)
    for value in (tmp_path / "sound", data):
        samples = load_audio(value).numpy()
        assert abs(len(samples) - 16000) < 2000
        assert amplitudes(samples, [440])[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("form", ["NIST", "IRCAM", "AVR", "PVF", "VOC", "SVX"])
def test_sound_formats_of_speech_collections(form: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, sines(1, rate=16000, hz=440), 16000, format=form, subtype="PCM_16")
    samples = load_audio(file.getvalue()).numpy()
    assert abs(len(samples) - 16000) < 200
    assert amplitudes(samples, [440])[0] == pytest.approx(0.5, abs=0.02)


FILMS = [
    ("mp4", "libx264"), ("mp4", "mpeg4"), ("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"),
    ("webm", "libvpx"), ("avi", "mpeg4"), ("flv", "libx264"), ("mpegts", "libx264"), ("mpeg", "mpeg1video"),
    ("3gp", "libx264"), ("nut", "mpeg4"), ("matroska", "libx265"), ("mp4", "libsvtav1"),
    ("gif", "gif"), ("apng", "apng"),
    ("ogg", "theora"), ("ivf", "libvpx"), ("asf", "msmpeg4"),
    ("yuv4mpegpipe", "wrapped_avframe"), ("wtv", "mpeg2video"),
    ("h264", "libx264"), ("hevc", "libx265"), ("m4v", "mpeg4"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), FILMS)
def test_film_containers(tmp_path: Path, container: str, codec: str) -> None:
    if codec in ("gif", "apng"):
        file = io.BytesIO()
        frames = [picture().point(lambda _, level=20 + 2 * i: level) for i in range(50)]
        kind = "GIF" if codec == "gif" else "PNG"
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=40)
        data = file.getvalue()
    else:
        data = grey_film(container, codec, [40 * i for i in range(50)])
    (tmp_path / "film").write_bytes(data)
    for value in (tmp_path / "film", data):
        clip = read_video(value)
        assert len(clip.frames) == 4
        levels = clip.frames.float().mean(dim=(1, 2, 3))
        assert levels.tolist() == pytest.approx([20 + 50 * t for t in (0.0, 0.5, 1.0, 1.5)], abs=9)


def test_pictures_as_films() -> None:
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        file = io.BytesIO()
        picture().save(file, kind)
        assert read_video(file.getvalue()).frames.shape == (1, 3, 48, 64)


# ---- any number of channels ----

LAYOUTS = [
    "mono", "stereo", "2.1", "quad", "5.1", "5.1(side)", "6.1", "7.1", "7.1(wide)", "5.1.2", "7.1.2", "7.1.4", "22.2",
]  # fmt: skip
CODINGS = [
    ("mp4", "aac"), ("matroska", "flac"), ("matroska", "libopus"), ("matroska", "pcm_s16le"),
    ("mov", "pcm_s16le"), ("caf", "pcm_s16le"), ("avi", "pcm_s16le"), ("mp4", "alac"),
    ("matroska", "wavpack"), ("matroska", "ac3"), ("matroska", "eac3"), ("matroska", "vorbis"),
]  # fmt: skip

_READ_CHANNELS = """
from pathlib import Path
from omni.processing.audio_file import load_audio
from media_files import amplitudes
for path in sorted(map(Path, sys.argv[1:])):
    say([path.name, "opened"])
    hz = range(40, 40 + 10 * int(path.name.split(" ")[2]), 10)
    say([path.name, amplitudes(load_audio(path).numpy(), hz)])
"""


def _channel_files(folder: Path) -> list[Path]:
    import av

    paths = []
    for container, codec in CODINGS:
        for layout in LAYOUTS:
            channels = av.AudioLayout(layout).nb_channels
            path = folder / f"{codec} {container} {channels} {layout}"
            try:
                if codec == "vorbis":
                    path.write_bytes(_vorbis_in_matroska(channels))
                else:
                    path.write_bytes(encode_sound(container, codec, sines(channels, 0.7), layout=layout))
                paths.append(path)
            except (av.FFmpegError, ValueError, soundfile.LibsndfileError):
                path.unlink(missing_ok=True)  # the encoder does not take that layout
    return paths


def _vorbis_in_matroska(channels: int) -> bytes:
    """FFmpeg's own encoder knows two channels: what soundfile writes, put into another container."""
    import av

    if channels > 8:
        raise ValueError("Vorbis defines up to 8 channels")
    ogg, out = io.BytesIO(), io.BytesIO()
    soundfile.write(ogg, sines(channels, 0.7), 48000, format="OGG", subtype="VORBIS")
    with av.open(io.BytesIO(ogg.getvalue())) as source, av.open(out, "w", format="matroska") as target:
        track = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = track
                target.mux(packet)
    return out.getvalue()


def test_any_number_of_channels(tmp_path: Path) -> None:
    """Every layout in every coding is the mean of its channels: each sine at its part of the amplitude."""
    paths = _channel_files(tmp_path)
    kinds = {path.name.split(" ")[0] for path in paths}
    assert len(paths) > 70 and {"aac", "flac", "libopus", "pcm_s16le", "vorbis"} <= kinds
    said = in_child(_READ_CHANNELS, *map(str, paths), timeout_s=120)
    assert said[-1][1] != "opened", said[-1]
    found = {name: values for name, values in said if values != "opened"}
    for path in paths:
        codec, _, channels, _ = path.name.split(" ", 3)
        exact = codec in ("flac", "alac", "wavpack") or codec.startswith("pcm")
        expected = [0.5 / int(channels)] * int(channels)
        assert found[path.name] == pytest.approx(expected, rel=0.01 if exact else 0.35), path.name


def test_channels_as_the_same_samples_in_a_wav(tmp_path: Path) -> None:
    names = []
    for codec, channels, layout in (("flac", 8, "7.1"), ("pcm_s16le", 8, "7.1"), ("pcm_s16le", 12, "7.1.4")):
        names.append(str(tmp_path / f"{codec} {layout}"))
        soundfile.write(f"{names[-1]}.wav", sines(channels), 48000, subtype="PCM_16")
        Path(f"{names[-1]}.mkv").write_bytes(encode_sound("matroska", codec, sines(channels), layout=layout))
    code = """
from omni.processing.audio_file import load_audio
for name in sys.argv[1:]:
    wav, other = load_audio(name + ".wav"), load_audio(name + ".mkv")
    say([name, len(wav) == len(other), float((wav - other).abs().max())])
"""
    said = in_child(code, *names)
    assert len(said) == 3 and all(same and distance < 1e-4 for _, same, distance in said), said
