"""The sizes that preprocessor files ask for, in either spelling, and the model that knows one size alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import TOY_DATA, chat, speckle
from test_media import picture
from transformers import AutoImageProcessor

from omni.processing.processor import OmniProcessor
from omni.processing.vision import _MAX_FRAMES, _MIN_FRAMES, VisionProcessor

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)


def with_sizes(folder: Path, pictures: dict[str, Any], frames: dict[str, Any] | None = None) -> OmniProcessor:
    """The toy's processor with other values for the sizes of pictures and of video frames."""
    folder.mkdir()
    PROCESSOR.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text())
    rest = {name: value for name, value in values.items() if name not in ("min_pixels", "max_pixels", "size")}
    path.write_text(json.dumps(rest | pictures))
    if frames is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(rest | frames))
    return OmniProcessor.from_pretrained(folder)


EDGES = {"shortest_edge": 4096, "longest_edge": 8192}


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 4096, "max_pixels": 8192},
        {"size": EDGES},
        {"size": {"shortest_edge": 1024, "longest_edge": 1 << 20}, "min_pixels": 4096, "max_pixels": 8192},
        {"size": EDGES, "min_pixels": None, "max_pixels": None},
        {"size": {"longest_edge": 8192}, "min_pixels": 4096},
    ],
    ids=["pixels", "size", "both", "size, nulls", "one of each"],
)
def test_limits_in_either_spelling(limits: dict[str, Any], tmp_path: Path) -> None:
    """The same pictures come out, and those of transformers."""
    processor = with_sizes(tmp_path / "own", limits)
    same = with_sizes(tmp_path / "same", {"min_pixels": 4096, "max_pixels": 8192})
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "own")
    for side in ((8, 8), (70, 70), (100, 40), (300, 20), (500, 500)):
        shown = picture().resize(side)
        ours, other = (each(chat([{"image": shown}])) for each in (processor, same))
        reference = theirs([shown], return_tensors="pt")
        assert ours.image_grid_thw.tolist() == other.image_grid_thw.tolist() == reference["image_grid_thw"].tolist()
        assert torch.equal(ours.pixel_values, other.pixel_values)
        assert torch.equal(ours.pixel_values, reference["pixel_values"])
    processor.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert {name: written.get(name) for name in limits} == limits


def test_limits_that_are_not_said_are_those_of_transformers(tmp_path: Path) -> None:
    """Nor need their processors be imported to know them."""
    vision = VisionProcessor({}, {})
    image, video = vision.image_processor, vision.video_processor
    assert vision._image_limits == (image.size["shortest_edge"], image.size["longest_edge"])
    assert (vision.merge_size, vision.temporal_patch_size) == (image.merge_size, video.temporal_patch_size)
    assert vision.factor == video.patch_size * video.merge_size == image.patch_size * image.merge_size
    assert (video.min_frames, video.max_frames) == (_MIN_FRAMES, _MAX_FRAMES)


@pytest.mark.parametrize("size", [5, [4096, 8192], {"height": 64, "width": 64}, {"longest_edge": 8192}])
def test_sizes_without_limits_are_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size in the preprocessor files"):
        with_sizes(tmp_path / "own", {"size": size})


def test_a_model_that_knows_one_size(tmp_path: Path) -> None:
    """Every picture and every frame gets it, whatever its size and shape; a call's own limits and sizes win."""
    processor = with_sizes(
        tmp_path / "own",
        {"resized_height": 64, "resized_width": 96},
        {"resized_height": 96, "resized_width": 128},
    )
    for height, width in ((1, 1), (64, 96), (500, 500), (10, 1900), (1900, 10)):
        inputs = processor(chat([{"image": speckle(height, width)}, {"video": speckle(4, height, width), "fps": 2.0}]))
        assert inputs.image_grid_thw.tolist() == [[1, 4, 6]] and inputs.video_grid_thw.tolist() == [[2, 6, 8]]
        assert processor.vision.frame(speckle(height, width)).shape == (3, 96, 128)
    items = [{"image": speckle(256, 256)}, {"video": speckle(4, 256, 256), "fps": 2.0}]
    for options, grid in (({"max_pixels": 4096}, [4, 4]), ({"resized_height": 32, "resized_width": 64}, [2, 4])):
        inputs = processor(chat([item | options for item in items]))
        assert inputs.image_grid_thw.tolist() == [[1, *grid]] and inputs.video_grid_thw.tolist() == [[2, *grid]]
    whole = processor(chat(items), total_pixels=2 * 128 * 128)  # of videos alone
    assert whole.image_grid_thw.tolist() == [[1, 4, 6]] and whole.video_grid_thw.tolist() != [[2, 6, 8]]


@pytest.mark.parametrize("sides", [{"resized_height": 64}, {"resized_height": 0, "resized_width": 64}])
def test_a_wrong_size_of_the_files_is_refused(sides: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preprocessor files cannot be followed: resized_height and resized_width"):
        with_sizes(tmp_path / "own", sides)
