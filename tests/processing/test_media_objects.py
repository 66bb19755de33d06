"""What libraries hand out: more picture formats, dicts and decoders of `datasets`; and errors that say where."""

from __future__ import annotations

import io
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import TOY_DATA, chat
from media_files import grey_film, sines
from PIL import Image, features
from test_media import picture, read_video, tone

from omni.processing.audio_file import load_audio
from omni.processing.image_file import load_image
from omni.processing.processor import OmniProcessor
from omni.training.data.sound import read_speech

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)


def saved(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture().save(file, form, **options)
    return file.getvalue()


# ---- picture formats ----


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "MPO", "TIFF", "BMP", "GIF", "PPM"])
def test_more_picture_formats(tmp_path: Path, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if form == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    data = saved(form)
    (tmp_path / "picture").write_bytes(data)
    for value in (data, tmp_path / "picture"):
        read = load_image(value)
        assert read.mode == "RGB" and read.size == (64, 48)
        assert np.abs(np.asarray(read).astype(int) - np.asarray(picture())).mean() < 60


def test_heic_where_its_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """pillow_heif is asked to register its reader when such a file comes, and named where it is not there."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        load_image(heic)
    from PIL import Image as pil

    def register() -> None:
        pil.register_open("HEIF", lambda file, _: Stand(file), lambda prefix: prefix[4:8] == b"ftyp")

    class Stand(Image.Image):
        def __init__(self, file: Any) -> None:
            super().__init__()
            ready = picture()
            self.im, self._mode, self._size = ready.im, ready.mode, ready.size

    stand_in = types.ModuleType("pillow_heif")
    stand_in.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    monkeypatch.setattr(pil, "OPEN", dict(pil.OPEN))
    monkeypatch.setattr(pil, "ID", list(pil.ID))
    assert load_image(heic).size == (64, 48)


# ---- objects of `datasets` ----


def test_dicts_of_bytes_and_paths(tmp_path: Path) -> None:
    film = grey_film("matroska", "mpeg4", [40 * i for i in range(50)])
    for data, suffix, read in ((saved("PNG"), "png", load_image), (film, "mkv", read_video)):
        (tmp_path / f"a.{suffix}").write_bytes(data)
        plain = read(data)
        for value in (
            {"bytes": data, "path": None},
            {"bytes": data, "path": "gone.bin"},
            {"bytes": None, "path": str(tmp_path / f"a.{suffix}")},
            {"path": tmp_path / f"a.{suffix}"},
        ):
            found = read(value)
            if isinstance(plain, Image.Image):
                assert found.tobytes() == plain.tobytes()
            else:
                assert torch.equal(found.frames, plain.frames)
        with pytest.raises(ValueError, match="'bytes'"):
            read({"bytes": None, "path": None})
        with pytest.raises(ValueError, match=r"'byte'|'bytes'"):
            read({"byte": data})
    inputs = PROCESSOR(
        chat([{"type": "image", "image": {"bytes": saved("PNG"), "path": None}}, {"video": {"bytes": film}}])
    )
    assert inputs.image_grid_thw.shape == (1, 3) and inputs.video_grid_thw.shape == (1, 3)


@dataclass
class Samples:
    data: torch.Tensor
    sample_rate: int


class AudioDecoder:
    """What torchcodec's has, and `datasets` hands out."""

    def __init__(self, data: torch.Tensor, rate: int) -> None:
        self.samples = Samples(data, rate)

    def get_all_samples(self) -> Samples:
        return self.samples


@dataclass
class Frame:
    data: torch.Tensor
    pts_seconds: float


@dataclass
class Metadata:
    begin_stream_seconds: float
    end_stream_seconds: float
    num_frames: int


class VideoDecoder:
    def __init__(self, stamps: list[float], end: float, levels: list[int]) -> None:
        self.stamps, self.levels = stamps, levels
        self.metadata = Metadata(stamps[0], end, len(stamps))

    def __len__(self) -> int:
        return len(self.stamps)

    def get_frame_played_at(self, seconds: float) -> Frame:
        assert self.stamps[0] <= seconds < self.metadata.end_stream_seconds
        place = max(i for i, stamp in enumerate(self.stamps) if stamp <= seconds + 1e-9)
        return Frame(torch.full((3, 48, 64), self.levels[place], dtype=torch.uint8), self.stamps[place])


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_audio_decoders(channels: int) -> None:
    samples = torch.from_numpy(sines(channels, 0.5, hz=440)).T
    decoder = AudioDecoder(samples, 48000)
    expected = load_audio((samples.numpy(), 48000))
    assert torch.equal(load_audio(decoder), expected)
    assert torch.equal(read_speech(decoder, 16000), expected)
    assert PROCESSOR(chat([{"audio": decoder}])).input_features is not None


def test_video_decoders() -> None:
    steady = VideoDecoder([0.04 * i for i in range(50)], 2.0, [20 + 4 * i for i in range(50)])
    clip = read_video(steady)
    assert clip.times_s == pytest.approx((0.0, 0.5, 1.0, 1.5), abs=1e-6) and clip.sound is None
    assert clip.frames[:, 0, 0, 0].tolist() == [20, 68, 120, 168]
    part = read_video(steady, start_s=1.0, end_s=1.5, fps=8.0)
    assert part.times_s[0] == 0.0 and part.frames[0, 0, 0, 0] == 120 and len(part.frames) == 4
    late = VideoDecoder([3.0, 3.5, 58.0], 63.0, [20, 60, 100])
    assert read_video(late).frames[:, 0, 0, 0].tolist() == [20, 60]
    assert read_video(late, want_sound=True).times_s == (0.0, 30.0)
    with pytest.raises(ValueError, match="no frame lies"):
        read_video(steady, start_s=5.0)
    assert PROCESSOR(chat([{"video": steady}])).video_grid_thw[0, 0] == 2


class Failing:
    """Any decoder, whose file turns out to be damaged."""

    metadata = types.SimpleNamespace(begin_stream_seconds=0.0, end_stream_seconds=2.0)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 50

    def get_frame_played_at(self, seconds: float) -> Frame:
        raise self.error

    def get_all_samples(self) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("Could not push packet"), IndexError("no frame"), AssertionError()])
def test_what_decoders_raise(error: Exception) -> None:
    failing = Failing(error)
    for read in (load_audio, read_video, lambda value: read_speech(value, 24000)):
        with pytest.raises(ValueError, match="<Failing> cannot be decoded"):
            read(failing)
    for kind in ("audio", "video"):
        with pytest.raises(ValueError, match=r"^message 0, item 0: .*cannot be decoded"):
            PROCESSOR(chat([{kind: failing}]))
    with pytest.raises(OSError, match="needs more memory"):
        load_audio(Failing(MemoryError()))


def test_video_decoders_that_do_not_know_their_end() -> None:
    decoder = VideoDecoder([0.04 * i for i in range(50)], 2.0, [20 + 4 * i for i in range(50)])
    known = read_video(decoder)
    facts = types.SimpleNamespace(begin_stream_seconds=None, end_stream_seconds=None, duration_seconds=2.0)
    decoder.get_frame_played_at = lambda seconds: VideoDecoder.get_frame_played_at(steady, seconds)  # type: ignore
    steady = VideoDecoder(decoder.stamps, 2.0, decoder.levels)
    decoder.metadata = facts  # type: ignore[assignment]
    assert torch.equal(read_video(decoder).frames, known.frames)
    facts.duration_seconds = None
    with pytest.raises(ValueError, match="how long"):
        read_video(decoder)


# ---- sound in videos ----


def test_a_mute_video_behaves_alone_as_in_a_batch() -> None:
    mute = grey_film("matroska", "mpeg4", [40 * i for i in range(50)])
    loud = grey_film("matroska", "mpeg4", [40 * i for i in range(50)], sound=sines(1, 2.0))
    alone = PROCESSOR(chat([{"video": mute}]), use_audio_in_video=True)
    assert torch.equal(alone.input_ids, PROCESSOR(chat([{"video": mute}])).input_ids)
    batch = PROCESSOR([chat([{"video": mute}]), chat([{"video": loud}])], use_audio_in_video=True)
    kept = batch.attention_mask[0].bool()
    assert torch.equal(batch.input_ids[0][kept], alone.input_ids[0])
    assert PROCESSOR(chat([{"video": np.zeros((4, 48, 64, 3), np.uint8)}]), use_audio_in_video=True).batch_size == 1


# ---- where an error is ----


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ({"audio": "none.wav"}, FileNotFoundError),
        ({"image": b"no picture"}, ValueError),
        ({"video": b"no film"}, ValueError),
        ({"audio": tone(16000)[:100]}, ValueError),
        ({"audio": 5.0}, (TypeError, ValueError)),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, ValueError),
        ({"imge": b""}, ValueError),
        ({"video": b"", "fps": 0}, ValueError),
    ],
)
def test_errors_name_conversation_message_and_item(item: dict[str, Any], error: Any) -> None:
    good: dict[str, Any] = {"role": "user", "content": ["a", {"image": picture()}]}
    bad: dict[str, Any] = {"role": "user", "content": ["a", "b", item]}
    with pytest.raises(error, match=r"^message 1, item 2\b") as said:
        PROCESSOR([good, bad])
    assert "conversation" not in str(said.value)
    with pytest.raises(error, match=r"^conversation 2, message 1, item 2\b"):
        PROCESSOR([[good], [good], [good, bad], [bad]])
