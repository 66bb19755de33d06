"""Small files that unpack to much: memory is bounded while they are decoded, by a budget that callers can set."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from build import TOY_DATA, chat
from media_files import encode_sound, grey_film, in_child, sines
from test_media import picture, read_video, tone

from omni.processing.audio_file import load_audio
from omni.processing.image_file import load_image
from omni.processing.processor import OmniProcessor


def blank_png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """One colour, a few kB however large: colour 0 is grey, 2 RGB, 6 RGBA."""
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    packer, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    body = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PEAK = """
import gc
from pathlib import Path
from build import TOY_DATA, chat
from omni.processing.processor import OmniProcessor
from omni.processing.audio_file import load_audio
processor = OmniProcessor.from_pretrained(TOY_DATA)
read = {
    "image": lambda path: processor(chat([{"image": path}]), allow_long=True),
    "audio": load_audio,
    "video": lambda path: processor(chat([{"video": path, "fps": 100.0}]), allow_long=True),
}
for folder in map(Path, sys.argv[1:]):
    kind = folder.name.split(" ")[0]
    read[kind](folder / "small")  # libraries are loaded
    gc.collect()
    forget_peak()
    before = memory_mb("VmRSS")
    read[kind](folder / "large")
    say([folder.name, memory_mb("VmHWM") - before])
"""

# what it is -> the most MB that it may take
PEAKS = {
    # 49 million pixels are 147 MB as RGB, which may be there twice (opacity and 16 bits beside it); or else there are
    # 12.8 million pixels in fp32 and their patches: 154 and 308 MB, and what holds them
    **{f"image {kind}": 640 for kind in ("1 0", "8 2", "8 6", "16 0")},
    # 36 million samples of silence: what is kept at 16 kHz, and a piece of 34 MB a few times
    "audio FLAC 1 192000": 200,
    "audio FLAC 8 96000": 60,
    "audio WAV 16 48000": 60,
    "audio matroska": 200,
    # 24 frames of 12 million pixels, of which 24 of 786,432 pixels are kept: 57 MB, their patches in fp32 226 MB; some
    # frames of 36 MB while they are decoded and shrunk
    "video": 57 + 226 + 15 * 36,
}


def peak_file(name: str) -> bytes:
    kind, *what = name.split(" ")
    if kind == "image":
        return blank_png(7000, 7000, int(what[0]), int(what[1]))
    if kind == "video":
        return grey_film("mp4", "mpeg4", [40 * i for i in range(24)], [90] * 24, (4000, 3000))
    if what == ["matroska"]:
        return encode_sound("matroska", "flac", np.zeros((36_000_000, 1), np.float32), 192000)
    file, channels = io.BytesIO(), int(what[1])
    soundfile.write(file, np.zeros((36_000_000 // channels, channels), np.int16), int(what[2]), format=what[0])
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux")
def test_memory_while_decoding(tmp_path: Path) -> None:
    small = {
        "image": blank_png(80, 100),
        "audio": encode_sound("wav", "pcm_s16le", sines(1)),
        "video": grey_film("mp4", "mpeg4", [0, 40]),
    }
    for name in PEAKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "small").write_bytes(small[name.split(" ")[0]])
        (tmp_path / name / "large").write_bytes(peak_file(name))
    found = dict(in_child(PEAK, *(str(tmp_path / name) for name in PEAKS), timeout_s=300))
    too_much = {name: (found[name], most) for name, most in PEAKS.items() if found[name] > most}
    assert not too_much, (too_much, found)
    assert len(found) == len(PEAKS)


# ---- limits ----


def test_a_budget_is_an_argument() -> None:
    from omni.processing.media_budget import MediaBudget

    processor = OmniProcessor.from_pretrained(TOY_DATA)
    film = grey_film("mp4", "mpeg4", [40 * i for i in range(50)])
    for budget, item, words in (
        (MediaBudget(seconds=0.4), {"audio": tone(16000)}, "longer than the limit"),
        (MediaBudget(seconds=0.4), {"audio": encode_sound("adts", "aac", sines(1))}, "longer than the limit"),
        (MediaBudget(seconds=0.4), {"audio": encode_sound("flac", "flac", sines(1))}, "longer than the limit"),
        (
            MediaBudget(samples=90_000),
            {"audio": encode_sound("wav", "pcm_s16le", sines(2), layout="stereo")},
            "samples",
        ),
        (MediaBudget(samples=90_000), {"audio": encode_sound("adts", "aac", sines(2), layout="stereo")}, "samples"),
        (MediaBudget(pixels=3000), {"image": picture()}, "limit of 3,000"),
        (MediaBudget(pixels=3000), {"video": film}, "limit of 3,000"),
        (MediaBudget(film_pixels=5000), {"video": film}, "pixels"),
        (MediaBudget(kept_bytes=100_000), {"video": film}, "bytes"),
    ):
        with pytest.raises(ValueError, match=rf"{words}.*"):
            processor(chat([item]), media_budget=budget)
        assert processor(chat([item])).batch_size == 1
        processor.media_budget = budget
        with pytest.raises(ValueError, match=rf"{words}.*"):
            processor(chat([item]))
        processor.media_budget = MediaBudget()


def test_a_larger_budget_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.processing import audio_file, image_file
    from omni.processing.media_budget import MediaBudget

    monkeypatch.setattr(audio_file, "MAX_CLIP_S", 0.4)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 1000)
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    items: list[dict[str, Any]] = [{"audio": tone(16000)}, {"image": picture()}]
    for item in items:
        with pytest.raises(ValueError, match="limit"):
            processor(chat([item]))
        assert processor(chat([item]), media_budget=MediaBudget(seconds=2.0, pixels=4000)).batch_size == 1


@pytest.mark.parametrize("name", ["seconds", "samples", "pixels", "film_pixels", "kept_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "many", True])
def test_a_budget_is_of_positive_numbers(name: str, value: Any) -> None:
    from omni.processing.media_budget import MediaBudget

    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        MediaBudget(**{name: value})


def test_a_large_picture_gives_what_the_image_processor_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.processing import vision

    processor = OmniProcessor.from_pretrained(TOY_DATA)
    for size in ((300, 200), (64, 48), (97, 401)):
        messages = chat([{"image": picture().resize(size), "max_pixels": 128 * 128}])
        usual = processor(messages).pixel_values
        with monkeypatch.context() as patched:
            patched.setattr(vision, "_LARGE_PIXELS", 10)
            assert torch.equal(processor(messages).pixel_values, usual)


def test_a_budget_is_nothing_else() -> None:
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    for wrong in (5, 0, "large", {"pixels": 5}):
        with pytest.raises(TypeError, match="media_budget"):
            processor(chat("a"), media_budget=wrong)


def test_length_is_counted_while_decoding() -> None:
    """Headers that say nothing, or too little, do not help."""
    from omni.processing.media_budget import MediaBudget

    budget = MediaBudget(seconds=0.5)
    for data in (
        encode_sound("adts", "aac", sines(1)),
        encode_sound("mpegts", "aac", sines(1)),
        encode_sound("matroska", "pcm_s16le", sines(1), live="1"),
    ):
        with pytest.raises(ValueError, match="longer than the limit"):
            load_audio(data, budget=budget)


def test_defaults_take_what_people_have() -> None:
    """A photograph of 48 million pixels, an hour of sound, a film of 4K."""
    from omni.processing.media_budget import MediaBudget

    budget = MediaBudget()
    for limit, amount in (
        ("pixels", 8000 * 6000),
        ("seconds", 3600.0),
        ("samples", 3600 * 48000 * 8),
        ("film_pixels", 2 * 3600 * 30 * 3840 * 2160),
    ):
        budget.check(limit, amount, "a medium", "is larger")
    assert load_image(picture()).size == (64, 48) and av.__version__
    assert len(read_video(grey_film("mp4", "mpeg4", [0, 40])).frames) == 2
