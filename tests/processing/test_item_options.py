"""Options of one item: a part of a sound, a number of frames, a size in pixels, as in qwen-omni-utils."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from build import TOY_DATA, chat, speckle
from media_files import encode_sound, grey_film, sines
from test_media import picture

from omni.processing.audio_file import load_audio
from omni.processing.processor import OmniProcessor

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)
FILM = [40 * i for i in range(100)]


def rising(seconds: float, rate: int) -> np.ndarray:
    """fp32 [n, 1] from 0 to 0.9: the value tells the moment."""
    return np.linspace(0, 0.9, round(seconds * rate), dtype=np.float32)[:, None]


# ---- a part of a sound ----


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), (None, 0.7), (1.2, None), (0.0, 9.0), (0.25, 0.250625)])
@pytest.mark.parametrize("form", ["wav", "flac", "matroska", "array", "8 kHz"])
def test_a_part_of_a_sound(form: str, start: float | None, end: float | None) -> None:
    rate = 8000 if form == "8 kHz" else 16000
    samples = rising(2.0, rate)
    codec = {"wav": "pcm_s16le", "flac": "flac", "matroska": "pcm_s16le"}.get(form)
    value: Any = (samples[:, 0], rate) if codec is None else encode_sound(form, codec, samples, rate)
    first, last = round((start or 0.0) * rate), round(min(end or 2.0, 2.0) * rate)
    expected = load_audio((samples[first:last, 0], rate))
    found = load_audio(value, start_s=start or 0.0, end_s=end)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if len(expected) > 1000:
        item = {"audio": value, **({} if start is None else {"audio_start": start})}
        inputs = PROCESSOR(chat([{**item, **({} if end is None else {"audio_end": end})}]))
        whole = PROCESSOR(chat([{"audio": (expected.numpy(), 16000)}]))
        assert torch.equal(inputs.input_ids, whole.input_ids)


def test_a_part_of_a_long_sound_may_be_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.processing import audio_file

    monkeypatch.setattr(audio_file, "MAX_CLIP_S", 0.6)
    for value in ((rising(2.0, 16000)[:, 0], 16000), encode_sound("flac", "flac", rising(2.0, 16000), 16000),
                  encode_sound("adts", "aac", sines(1, 2.0))):  # fmt: skip
        assert abs(len(load_audio(value, start_s=1.0, end_s=1.5)) - 8000) < 2
        with pytest.raises(ValueError, match="longer than the limit"):
            load_audio(value, start_s=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"audio_start": -1.0}, "audio_start"),
        ({"audio_start": 1.0, "audio_end": 1.0}, "audio_start < audio_end"),
        ({"audio_start": float("nan")}, "audio_start"),
        ({"audio_end": float("nan")}, "audio_end"),
        ({"audio_start": "1"}, "audio_start"),
        ({"audio_start": 5.0}, "nothing lies|no samples"),
        ({"audio_strat": 1.0}, "'audio_start'"),
    ],
)
def test_wrong_parts_of_a_sound(options: dict[str, Any], words: str) -> None:
    for value in (rising(2.0, 16000)[:, 0], encode_sound("wav", "pcm_s16le", rising(2.0, 16000), 16000)):
        with pytest.raises((ValueError, TypeError), match=words):
            PROCESSOR(chat([{"audio": value, **options}]))


# ---- a number of frames ----


@pytest.mark.parametrize(("nframes", "taken"), [(8, 8), (7, 8), (2, 2), (1, 2), (100, 100), (1000, 100), (6.0, 6)])
def test_a_number_of_frames(nframes: float, taken: int) -> None:
    """Rounded to pairs, at most those of the film; whatever fps and the limits say."""
    film = grey_film("matroska", "mpeg4", FILM, [50] * 100)
    for value, length in ((film, 4.0), (np.full((100, 32, 32, 3), 50, np.uint8), 50.0)):
        inputs = PROCESSOR(chat([{"video": value, "nframes": nframes, "max_pixels": 1024}]))
        times = inputs.video_grid_times[0]
        assert len(times) == taken // 2
        expected = [2 * step * length / taken for step in range(taken // 2)]
        assert times.tolist() == pytest.approx(expected, abs=0.03 * length)


@pytest.mark.parametrize("nframes", [0, -2, "4", True, float("nan"), 2.5])
def test_wrong_numbers_of_frames(nframes: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="nframes"):
        PROCESSOR(chat([{"video": grey_film("matroska", "mpeg4", FILM[:10]), "nframes": nframes}]))


def test_a_rate_and_a_number_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"nframes.*fps|fps.*nframes"):
        PROCESSOR(chat([{"video": grey_film("matroska", "mpeg4", FILM[:10]), "nframes": 4, "fps": 2.0}]))
    film = chat([{"video": grey_film("matroska", "mpeg4", FILM[:10]), "nframes": 4}])
    assert PROCESSOR(film, fps=1.0).video_grid_thw[0, 0] == 2  # the item's own option wins over the call's


# ---- a size ----


@pytest.mark.parametrize(("height", "width"), [(64, 96), (70, 100), (1, 33), (320, 32), (31.0, 64)])
def test_a_size_in_pixels(height: float, width: float) -> None:
    """Rounded to whole tokens of 32 pixels; limits on pixels do not touch it."""
    wanted = [max(1, round(side / 32)) * 2 for side in (height, width)]
    size = {"resized_height": height, "resized_width": width}
    inputs = PROCESSOR(chat([{"image": picture(), **size}, {"video": speckle(4, 48, 64), **size}]), max_pixels=1024)
    assert inputs.image_grid_thw[0].tolist() == [1, *wanted]
    assert inputs.video_grid_thw[0].tolist() == [2, *wanted]
    other = PROCESSOR(chat([{"image": picture().resize((wanted[1] * 16, wanted[0] * 16), 3)}]), min_pixels=1024)
    assert other.pixel_values.shape == inputs.pixel_values.shape
    assert (other.pixel_values - inputs.pixel_values).abs().mean() < 0.1


@pytest.mark.parametrize(
    "size",
    [
        {"resized_height": 64},
        {"resized_width": 64},
        {"resized_height": 0, "resized_width": 64},
        {"resized_height": "64", "resized_width": 64},
        {"resized_height": 64, "resized_width": 10**9},
        {"resized_height": 64, "resized_width": float("nan")},
    ],
)
def test_wrong_sizes(size: dict[str, Any]) -> None:
    for item in ({"image": picture()}, {"video": speckle(4, 48, 64)}):
        with pytest.raises((ValueError, TypeError), match=r"resized_height|resized_width"):
            PROCESSOR(chat([{**item, **size}]))
