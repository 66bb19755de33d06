"""OmniProcessor against transformers' processor, both built from the demo tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import TOY_DATA, noise, speckle, tiny_config
from transformers import AutoTokenizer, Qwen3OmniMoeProcessor

from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.rope.positions import AudioVideo

ROOT = Path(__file__).parents[2]
SIZES = {"small": (20, 30), "wide": (64, 200), "odd": (75, 133)}


@pytest.fixture(scope="module")
def ours() -> OmniProcessor:
    return OmniProcessor.from_pretrained(TOY_DATA)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference's processor on the same files, written out in full (here the released values are a default)."""
    folder = tmp_path_factory.mktemp("processor")
    OmniProcessor.from_pretrained(TOY_DATA).save_pretrained(folder)
    return Qwen3OmniMoeProcessor.from_pretrained(str(folder))


def reference(theirs: Any, messages: Any, **media: Any) -> OmniInputs:
    """The transformers way: render the template, then process text and media."""
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = theirs(text=text, return_tensors="pt", padding=True, **media)
    return OmniInputs(**batch)


def assert_same(got: OmniInputs, want: OmniInputs) -> None:
    for name in ("input_ids", "attention_mask", "feature_attention_mask", "image_grid_thw", "video_grid_thw"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    for name in ("input_features", "pixel_values", "pixel_values_videos", "video_second_per_grid"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("samples", [1000, 7999, 15999, 16000, 16160, 40000])
def test_audio_alone(ours: OmniProcessor, theirs: Any, samples: int) -> None:
    wave = noise(samples).numpy()
    messages = [{"role": "user", "content": [{"type": "audio", "audio": wave}, {"type": "text", "text": "What?"}]}]
    assert_same(ours(messages), reference(theirs, messages, audio=[wave]))


@pytest.mark.parametrize("size", SIZES)
def test_image_alone(ours: OmniProcessor, theirs: Any, size: str) -> None:
    pixels = speckle(*SIZES[size])
    messages = [{"role": "user", "content": [{"type": "image", "image": pixels}]}]
    assert_same(ours(messages), reference(theirs, messages, images=[pixels]))


@pytest.mark.parametrize(("frames", "fps"), [(4, 2.0), (5, 1.5), (1, 1.0), (7, 4.0)])
def test_video_frames_alone(ours: OmniProcessor, theirs: Any, frames: int, fps: float) -> None:
    pixels = speckle(frames, 40, 60)
    messages = [{"role": "user", "content": [{"type": "video", "video": pixels}, {"type": "text", "text": "see"}]}]
    assert_same(ours(messages, fps=fps), reference(theirs, messages, videos=[pixels], fps=fps))


@pytest.mark.parametrize(("samples", "fps"), [(16000, 2.0), (64000, 2.0), (20000, 1.0)])
def test_video_with_sound(
    ours: OmniProcessor, theirs: Any, samples: int, fps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, wave = speckle(6, 40, 60), noise(samples).numpy()
    _give_sound(monkeypatch, wave)
    messages = [{"role": "user", "content": [{"type": "video", "video": pixels}, {"type": "text", "text": "see"}]}]
    got = ours(messages, fps=fps, use_audio_in_video=True)
    want = reference(
        theirs,
        messages,
        videos=[pixels],
        audio=[wave],
        fps=fps,
        load_audio_from_video=True,
        audio_from_video_indices=[0],
    )
    assert_same(got, want)
    config = tiny_config().thinker_config
    assert got.segments(config) == want.segments(config)
    assert any(isinstance(segment, AudioVideo) for segment in got.segments(config)[0])


def _give_sound(monkeypatch: pytest.MonkeyPatch, wave: np.ndarray) -> None:
    """Frame arrays carry no sound: add a track to what the video reader returns."""
    from omni.processing import vision
    from omni.processing.video_file import VideoClip

    read = vision.load_video

    def with_sound(*arguments: Any) -> VideoClip:
        silent = read(*arguments)
        return VideoClip(silent.frames, silent.times_s, torch.from_numpy(wave))

    monkeypatch.setattr(vision, "load_video", with_sound)


def test_several_turns_and_media(ours: OmniProcessor, theirs: Any) -> None:
    images, waves = [speckle(40, 40), speckle(33, 90, seed=1)], [noise(30000).numpy(), noise(30000, 1).numpy()]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": images[0]},
                {"type": "audio", "audio": waves[0]},
                {"type": "text", "text": "What is this?\n\nTell me."},
            ],
        },
        {"role": "assistant", "content": "A picture, and a sound."},
        {"role": "user", "content": [{"type": "audio", "audio": waves[1]}, {"type": "image", "image": images[1]}]},
    ]
    assert_same(ours(messages), reference(theirs, messages, images=images, audio=waves))


def test_batch_is_padded_on_the_left(ours: OmniProcessor, theirs: Any) -> None:
    image, wave = speckle(64, 64), noise(24000).numpy()
    batch = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": "the voice of time — thère 你好"}],
        [{"role": "user", "content": [{"type": "audio", "audio": wave}]}],
    ]
    got = ours(batch)
    assert_same(got, reference(theirs, batch, images=[image], audio=[wave]))
    assert got.attention_mask[1, 0] == 0 and bool((got.attention_mask[:, -1] == 1).all())


def test_clips_do_not_change_with_their_neighbours(ours: OmniProcessor, theirs: Any) -> None:
    """The reference pads samples before the transform, so a short clip's last frame depends on the batch."""
    short, long = noise(16000).numpy(), noise(40000, 1).numpy()
    alone = ours([{"role": "user", "content": [{"audio": short}]}]).input_features[0]
    beside = ours([{"role": "user", "content": [{"audio": short}, {"audio": long}]}])
    frames = alone.shape[1]
    assert torch.equal(beside.input_features[0, :, :frames], alone)
    assert int(beside.feature_attention_mask[0].sum()) == frames
    together = theirs.feature_extractor(
        [short, long], sampling_rate=16000, padding=True, truncation=False, return_tensors="pt"
    )["input_features"]
    assert not torch.allclose(together[0, :, :frames], alone, atol=1e-3)


def test_tools_and_thinking(ours: OmniProcessor, theirs: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "<think>\nI should look.\n</think>\n\nLet me see.",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "12:30"},
        {"role": "tool", "content": "sunny"},
    ]
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **options)
        want = theirs.tokenizer(text)["input_ids"]
        assert ours(messages, tools=tools, **options).input_ids[0].tolist() == want


def test_transformers_reads_what_we_save(ours: OmniProcessor, theirs: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "a")
    read = Qwen3OmniMoeProcessor.from_pretrained(str(tmp_path / "a"))
    image, wave, frames = speckle(50, 50), noise(16000).numpy(), speckle(4, 32, 48)
    content = [{"type": "image", "image": image}, {"type": "audio", "audio": wave}, {"type": "video", "video": frames}]
    messages = [{"role": "user", "content": content}]
    media = {"images": [image], "audio": [wave], "videos": [frames], "fps": 2.0}
    assert_same(reference(read, messages, **media), reference(theirs, messages, **media))
    assert_same(OmniProcessor.from_pretrained(tmp_path / "a")(messages), reference(theirs, messages, **media))


def test_we_read_what_transformers_saves(ours: OmniProcessor, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(str(tmp_path))
    assert (tmp_path / "processor_config.json").is_file()
    read = OmniProcessor.from_pretrained(tmp_path)
    content = [{"image": speckle(50, 50)}, {"audio": noise(16000).numpy()}, {"video": speckle(4, 32, 48)}, "hello"]
    messages = [{"role": "user", "content": content}]
    assert_same(read(messages), ours(messages))
    read.save_pretrained(tmp_path / "again")
    assert_same(OmniProcessor.from_pretrained(tmp_path / "again")(messages), ours(messages))


def test_ordinary_text_has_the_usual_ids(ours: OmniProcessor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TOY_DATA))
    for text in ("", " ", "the user said: hello\n\n", "a < b | c > d", "\u00e9 e\u0301 \U0001f600", "x" * 50, "\r\n\t"):
        assert ours.encode_text(text) == tokenizer(text)["input_ids"], text
