"""The processor's budgets: pixels of a whole video, where features are computed, patches straight to their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from build import TOY_DATA, chat, speckle

from omni.processing.processor import OmniProcessor
from omni.processing.vision import VIDEO_MAX_PIXELS, VIDEO_MIN_PIXELS, PixelBudget

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)


def film(frames: int, height: int = 512, width: int = 640) -> np.ndarray:
    return speckle(frames, height, width)


# ---- pixels of a whole video ----


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_long_video_gets_smaller_frames(frames: int) -> None:
    total = 2 * 512 * 640
    inputs = PROCESSOR(chat([{"video": film(frames)}]), total_pixels=total)
    steps, height, width = inputs.video_grid_thw[0].tolist()
    assert steps == frames // 2
    pixels = steps * height * width * 256
    assert pixels <= total and (frames > 4) == (height * width * 256 < 512 * 640)
    assert pixels > 0.8 * min(total, steps * 512 * 640)  # the budget is used
    free = PROCESSOR(chat([{"video": film(frames)}]))
    assert free.video_grid_thw[0].tolist() == [steps, 32, 40]  # by default, no limit, as in the reference


def test_the_items_own_budget_wins_and_frames_keep_a_least_size() -> None:
    small = PROCESSOR(chat([{"video": film(8), "total_pixels": 1}]), total_pixels=10**9).video_grid_thw[0]
    assert 0.9 * VIDEO_MIN_PIXELS <= int(small[1] * small[2]) * 256 <= 1.05 * VIDEO_MIN_PIXELS  # sides in steps of 32


def test_limits_of_a_frame() -> None:
    assert PixelBudget().of_frame(768, 2) == (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS)
    recipe = PixelBudget(total_pixels=int(128000 * 32 * 32 * 0.9))
    assert recipe.of_frame(4, 2)[1] == VIDEO_MAX_PIXELS
    assert recipe.of_frame(768, 2)[1] == int(128000 * 32 * 32 * 0.9) * 2 // 768
    assert PixelBudget(1000, 5000, 1).of_frame(10, 2) == (1000, 1050)
    assert PixelBudget(1000, 1000, 1).of_frame(10, 2) == (1000, 1000)  # max_pixels is never exceeded
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="total_pixels must be a positive integer"):
            PixelBudget(total_pixels=wrong)  # type: ignore[arg-type]


def test_a_misspelt_budget_is_named() -> None:
    with pytest.raises(ValueError, match="total_pixels"):
        PROCESSOR(chat([{"video": film(2), "total_pixel": 1}]))


# ---- patches ----


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_patches_equal_the_video_processors(frames: int) -> None:
    """Written one grid step at a time, an odd last frame twice."""
    pixels = torch.from_numpy(film(frames, 64, 96)).permute(0, 3, 1, 2)
    ours, grid = PROCESSOR.vision._patches(pixels)
    out = PROCESSOR.vision.video_processor(
        videos=[pixels], do_resize=False, do_sample_frames=False, return_tensors="pt", cap_pixels_per_frame=False
    )
    assert grid == out["video_grid_thw"][0].tolist()
    torch.testing.assert_close(ours, out["pixel_values_videos"], atol=1e-6, rtol=0)


# ---- devices ----


def test_the_device_of_features_and_inputs() -> None:
    waves = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (4000, 9000)]
    content = [
        {"audio": waves[0], "sampling_rate": 24000},
        {"audio": waves[1]},
        {"image": film(1)[0]},
        {"video": film(3, 64, 64)},
    ]
    messages = [{"role": "user", "content": content}]
    usual, placed = PROCESSOR(messages).to_dict(), PROCESSOR(messages, device="cpu").to_dict()
    assert usual.keys() == placed.keys()
    for name, value in usual.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, placed[name]), name


@pytest.mark.parametrize("device", ["meta", "cuda:99", "tpu"])
def test_devices_that_are_not_here(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        PROCESSOR(chat([{"image": film(1)[0]}]), device=device)
