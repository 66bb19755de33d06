"""OmniInputs: what it accepts, what it refuses, and the segments it reads back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from build import tiny_config

from omni.config.model import ThinkerConfig
from omni.processing.inputs import OmniInputs
from omni.rope.positions import Audio, AudioVideo, Image, Text, Video

CONFIG = tiny_config().thinker_config
AUDIO, IMAGE, VIDEO = CONFIG.audio_token_id, CONFIG.image_token_id, CONFIG.video_token_id
AUDIO_START, VISION_START = CONFIG.audio_start_token_id, CONFIG.vision_start_token_id
AUDIO_END, VISION_END = 270, 263


def audio(*frames: int) -> dict[str, Any]:
    mask = torch.zeros(len(frames), max(frames), dtype=torch.long)
    for row, count in enumerate(frames):
        mask[row, :count] = 1
    return {"input_features": torch.zeros(len(frames), 128, max(frames)), "feature_attention_mask": mask}


def image(*grids: tuple[int, int]) -> dict[str, Any]:
    grid = torch.tensor([[1, h, w] for h, w in grids])
    return {"pixel_values": torch.zeros(int(grid.prod(-1).sum()), 1536), "image_grid_thw": grid}


def video(*grids: tuple[int, int, int], seconds: float = 1.0) -> dict[str, Any]:
    grid = torch.tensor(grids)
    pixels = torch.zeros(int(grid.prod(-1).sum()), 1536)
    return {
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
        "video_second_per_grid": torch.full((len(grids),), seconds),
    }


def test_lists_and_arrays_become_tensors() -> None:
    inputs = OmniInputs(
        input_ids=[[1, 2], [3, 4]],
        attention_mask=np.array([[True, True], [False, True]]),
        pixel_values=np.zeros((4, 8), np.float64),
        image_grid_thw=[[1, 2, 2]],
        num_audio_tokens=[3],
    )
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == torch.int64
    assert len(inputs) == inputs.batch_size == 2
    assert OmniInputs([[1]]).attention_mask.tolist() == [[1]]
    assert OmniInputs(torch.ones(1, 2, dtype=torch.int32)).input_ids.dtype == torch.int64


def test_a_misspelt_field_names_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"'pixel_value'.*'pixel_values'"):
        OmniInputs([[1]], pixel_value=torch.zeros(1))
    with pytest.raises(TypeError, match=r"no field 'zzz'.*input_features"):
        OmniInputs([[1]], zzz=1)


def test_to_casts_features_only() -> None:
    fields = {**audio(100), **image((2, 2)), **video((2, 2, 2), seconds=1 / 3)}
    inputs = OmniInputs([[1, 2]], **fields, video_grid_times=[[0.1, 1 / 3]])
    half = inputs.to("cpu", dtype=torch.bfloat16)
    for name in ("input_features", "pixel_values", "pixel_values_videos"):
        assert getattr(half, name).dtype == torch.bfloat16
        assert getattr(inputs, name).dtype == torch.float32
    assert half.video_second_per_grid.dtype == torch.float32
    assert half.video_times(0) == (0.1, 1 / 3)
    assert half.input_ids.dtype == half.video_grid_thw.dtype == torch.int64
    assert set(OmniInputs(**half.to_dict()).to_dict()) == set(inputs.to_dict())
    with pytest.raises(TypeError, match="dtype="):
        inputs.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": [1, 2]}, "input_ids must be"),
        ({"input_ids": [[]]}, "input_ids must be"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "input_ids must be"),
        ({"input_ids": None}, "input_ids must be"),
        ({"input_ids": [[1.5]]}, "must hold integers"),
        ({"input_ids": [[1, 2], [3]]}, "padded"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "must have the shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 of attention_mask is empty"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "has gaps"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[0, 1, 0]]}, "has gaps"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "only 0 and 1"),
        ({"feature_attention_mask": [[1]]}, "without input_features"),
        ({"input_features": torch.zeros(128, 3)}, "clips, mel bins, frames"),
        ({**audio(3), "feature_attention_mask": [[1, 1]]}, "feature_attention_mask"),
        ({**audio(3), "feature_attention_mask": [[0, 1, 1]]}, "padded on the right"),
        ({**audio(3), "feature_attention_mask": [[0, 0, 0]]}, "without frames"),
        ({**audio(3), "input_features": torch.full((1, 128, 3), float("nan"))}, "NaN"),
        ({"pixel_values": torch.zeros(4, 8)}, "given together"),
        ({"pixel_values": torch.zeros(5, 8), "image_grid_thw": [[1, 2, 2]]}, "4 rows"),
        ({"pixel_values": torch.zeros(8, 8), "image_grid_thw": [[2, 2, 2]]}, "time 1"),
        ({"pixel_values": torch.zeros(4, 8), "image_grid_thw": [[2, 2]]}, r"\[count, 3\]"),
        ({**video((2, 2, 2)), "video_second_per_grid": None}, "videos need their times"),
        ({**video((2, 2, 2)), "video_second_per_grid": [1.0, 1.0]}, "1 positive numbers"),
        ({**video((2, 2, 2)), "video_second_per_grid": [0.0]}, "positive"),
        ({**video((2, 2, 2)), "video_grid_times": [[0.0]]}, "must hold 2 times"),
        ({**video((2, 2, 2)), "video_grid_times": []}, "each of 1 videos"),
        ({**video((2, 2, 2)), "video_grid_times": [[1.0, 0.5]]}, "must not fall"),
        ({**video((2, 2, 2)), "video_grid_times": [[1.0, float("inf")]]}, "NaN or infinity"),
        ({"video_second_per_grid": [1.0]}, "without video_grid_thw"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OmniInputs(**{"input_ids": [[1, 2]], **fields})
    with pytest.raises(TypeError, match="True or False"):
        OmniInputs([[1]], use_audio_in_video="yes")


def test_segments_of_padded_rows() -> None:
    first = [5, VISION_START, *[IMAGE] * 6, VISION_END, AUDIO_START, *[AUDIO] * 13, AUDIO_END, 7]
    second = [8, AUDIO_START, *[AUDIO] * 7, AUDIO_END]
    width = len(first)
    pad = width - len(second)
    inputs = OmniInputs(
        input_ids=[first, [256] * pad + second],
        attention_mask=[[1] * width, [0] * pad + [1] * len(second)],
        **image((4, 6)),
        **audio(100, 50),
    )
    assert inputs.segments(CONFIG) == [
        [Text(2), Image(2, 3), Text(2), Audio(13), Text(2)],
        [Text(2), Audio(7), Text(1)],
    ]
    right = OmniInputs(input_ids=[second + [256] * 3], attention_mask=[[1] * len(second) + [0] * 3], **audio(50))
    assert right.segments(CONFIG) == [[Text(2), Audio(7), Text(1)]]


def sounding() -> dict[str, Any]:
    """One video of two grid steps with one second of sound, and one silent video."""
    order = [VIDEO] + [AUDIO] * 13 + [VIDEO]
    ids = [VISION_START, AUDIO_START, *order, AUDIO_END, VISION_END, VISION_START, VIDEO, VISION_END]
    return {"input_ids": [ids], **video((2, 2, 2), (1, 2, 2)), **audio(100)}


def test_sound_is_read_from_the_ids() -> None:
    segments = OmniInputs(**sounding()).segments(CONFIG)[0]
    assert segments[1] == AudioVideo(Video((0.0, 1.0), 1, 1), Audio(13), (True, *[False] * 13, True))
    assert segments[3] == Video((0.0,), 1, 1)
    assert OmniInputs(**sounding(), use_audio_in_video=True).segments(CONFIG)[0] == segments
    with pytest.raises(ValueError, match="is False but the ids hold 1"):
        OmniInputs(**sounding(), use_audio_in_video=False).segments(CONFIG)
    silent = OmniInputs([[VISION_START, VIDEO, VISION_END]], **video((1, 2, 2)), use_audio_in_video=True)
    with pytest.raises(ValueError, match="no video in the ids has sound"):
        silent.segments(CONFIG)


def test_real_times_win() -> None:
    inputs = OmniInputs(**sounding(), video_grid_times=[[0.0, 0.7], [0.25]])
    segments = inputs.segments(CONFIG)[0]
    assert segments[1].video.times == (0.0, 0.7)
    assert segments[3].times == (0.25,)


def test_ids_and_media_must_agree() -> None:
    ids = [[1, *[AUDIO] * 13]]
    for fields in (audio(100, 100), audio(200), audio(50), {}, {**audio(100), **image((2, 2))}):
        with pytest.raises(ValueError, match=r"placeholder|one more|hold 1 more"):
            OmniInputs(ids, **fields).segments(CONFIG)


def test_a_model_without_the_encoder_says_so() -> None:
    def without(part: str) -> ThinkerConfig:
        return replace(CONFIG, **{part: None})

    with pytest.raises(ValueError, match="no audio encoder"):
        OmniInputs([[1, *[AUDIO] * 13]], **audio(100)).segments(without("audio_config"))
    with pytest.raises(ValueError, match="no vision encoder"):
        OmniInputs([[1, IMAGE]], **image((2, 2))).segments(without("vision_config"))
