"""A whole Qwen2.5-Omni Thinker with both encoders, read from the reference's files, answers as the reference does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import SPECIAL, config_values, once
from oracle import assert_close, randomise
from safetensors.torch import load_file, save_file

from omni import OmniInputs, OmniModel
from omni.encoders.whisper_audio import num_whisper_tokens

SEEDS = range(6)


def whole_values(seed: int) -> dict[str, Any]:
    """config.json with tiny encoders that fit the Thinker's width."""
    vision = {"patch_size": 14, "window_size": 56 * (1 + seed % 2)}
    return config_values(seed, audio={"n_window": 20 if seed % 2 else 100}, vision=vision)


@once
def reference(seed: int) -> Any:
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    config = Qwen2_5OmniThinkerConfig(**whole_values(seed)["thinker_config"])
    model = modeling.Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomise(model.float().eval(), seed)
    return model


def read(seed: int, folder: Path) -> OmniModel:
    """The reference's weights in the release's layout, read by omni."""
    reference(seed).save_pretrained(folder / "theirs")
    weights: dict[str, torch.Tensor] = {}
    for path in (folder / "theirs").glob("*.safetensors"):
        weights |= load_file(path)
    save_file({f"thinker.{key}": value for key, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(whole_values(seed)))
    return OmniModel.from_pretrained(folder, parts=["thinker"], dtype="float32", device="cpu")


def prompts(seed: int) -> dict[str, torch.Tensor]:
    """Two rows, the shorter one padded on the left: text, a sound, a picture and a video."""
    torch.manual_seed(100 + seed)
    frames, image, video = 130 + 57 * seed, [1, 4, 6 + 2 * (seed % 2)], [2, 4, 4]

    def text(count: int) -> list[int]:
        return torch.randint(1, 250, (count,)).tolist()

    audio = [269, *[SPECIAL["audio_token_index"]] * num_whisper_tokens(frames), 270]
    pictures = [[262, *[SPECIAL[name]] * (t * h * w // 4), 263]
                for name, (t, h, w) in (("image_token_index", image), ("video_token_index", video))]  # fmt: skip
    rows = [text(5) + audio + text(3) + pictures[0] + text(2), text(4) + pictures[1] + text(6)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    size = 3 * 2 * 14 * 14
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "input_features": torch.randn(1, 128, frames),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.int64),
        "pixel_values": torch.randn(image[1] * image[2], size),
        "image_grid_thw": torch.tensor([image]),
        "pixel_values_videos": torch.randn(video[0] * video[1] * video[2], size),
        "video_grid_thw": torch.tensor([video]),
        "video_second_per_grid": torch.tensor([1.0]),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_greedy_replies(seed: int, tmp_path: Path) -> None:
    theirs, ours, inputs = reference(seed), read(seed, tmp_path), prompts(seed)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        found = ours(OmniInputs(**inputs)).logits
    valid = inputs["attention_mask"].bool()
    assert_close(found[valid], expected[valid])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        reply = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = ours.generate(OmniInputs(**inputs), max_new_tokens=8, return_audio=False)
    stop = ours.config.im_end_token_id
    for row, own in enumerate(out.replies):
        given = reply[row, length:].tolist()
        given = given[: given.index(stop) + 1] if stop in given else given
        assert own[: len(given)] == given[: len(own)] and len(own) >= len(given) - 1


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    """What omni writes has the names that it read, and the reference's values."""
    model = read(0, tmp_path)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(after) <= set(before) and len(after) >= len(before) - 2  # tables that are computed are left out
    assert all(torch.equal(before[key], after[key]) for key in after)
    again = OmniModel.from_pretrained(tmp_path / "again", parts=["thinker"], dtype="float32", device="cpu")
    inputs = OmniInputs(**prompts(0))
    assert torch.equal(again(inputs).logits, model(inputs).logits)
