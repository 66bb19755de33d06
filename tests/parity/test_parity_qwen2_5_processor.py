"""OmniProcessor against transformers' Qwen2_5OmniProcessor, on files as in the release and as transformers 5."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import chat, config_values, noise, speckle, write_processor
from oracle_qwen2_5 import rope_reference

from omni.config.model import OmniConfig
from omni.processing import vision
from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.processing.video_file import VideoClip
from omni.rope.positions import AudioVideo, prompt_positions, reply_position

WORDS = ["the", "voice", "of time,", "and then?\n", "what is this:", "你好", "thère"]


pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def ours(released: Path) -> OmniProcessor:
    return OmniProcessor.from_pretrained(released)


@pytest.fixture(scope="module")
def theirs(released: Path) -> Any:
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.from_pretrained(str(released))


def thinker_config() -> Any:
    values = config_values(0)
    width = values["thinker_config"]["text_config"]["hidden_size"]
    values["thinker_config"] |= {
        "audio_config": {"output_dim": width, "d_model": 32, "encoder_attention_heads": 4, "n_window": 100},
        "vision_config": {"out_hidden_size": width, "hidden_size": 32, "num_heads": 4},
    }
    return OmniConfig.from_dict(values).thinker_config


@dataclass
class Talk:
    """A conversation, and its media as the reference takes them.

    slots: for each of `audio` the video that it belongs to, if any; tracks: the sound of each video.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    videos: list[np.ndarray] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)
    slots: list[int | None] = field(default_factory=list)
    tracks: list[np.ndarray] = field(default_factory=list)


class Drawn(Talk):
    """A random conversation."""

    def __init__(self, rng: random.Random, with_sound: bool) -> None:
        super().__init__()
        self.rng, self.with_sound = rng, with_sound
        if self.rng.random() < 0.5:
            self.messages.append({"role": "system", "content": self.text()})
        for turn in range(self.rng.choice((1, 3))):
            if turn % 2:
                self.messages.append({"role": "assistant", "content": self.text()})
            else:
                items = [getattr(self, self.rng.choice(("words", "image", "sound", "video")))() for _ in range(3)]
                self.messages.append({"role": "user", "content": items})

    def text(self) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, 6)))

    def words(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text()}

    def image(self) -> dict[str, Any]:
        self.images.append(speckle(self.rng.randint(20, 90), self.rng.randint(20, 90), seed=self.rng.randint(0, 99)))
        return {"type": "image", "image": self.images[-1]}

    def wave(self, slot: int | None) -> np.ndarray:
        self.audio.append(noise(self.rng.randint(400, 80000), self.rng.randint(0, 99)).numpy())
        self.slots.append(slot)
        return self.audio[-1]

    def sound(self) -> dict[str, Any]:
        return {"type": "audio", "audio": self.wave(None)}

    def video(self) -> dict[str, Any]:
        self.videos.append(speckle(self.rng.randint(1, 9), 30, self.rng.choice((30, 60)), seed=self.rng.randint(0, 99)))
        if self.with_sound:
            self.tracks.append(self.wave(len(self.videos) - 1))
        return {"type": "video", "video": self.videos[-1]}


def heard(wave: np.ndarray) -> Talk:
    """A conversation about one clip."""
    return Talk([{"role": "user", "content": [{"type": "audio", "audio": wave}]}], audio=[wave], slots=[None])


def give_sound(monkeypatch: pytest.MonkeyPatch, tracks: list[np.ndarray]) -> None:
    """Frame arrays carry no sound: add tracks to what the video reader returns."""
    read, following = vision.load_video, iter(tracks)

    def with_sound(*arguments: Any) -> VideoClip:
        silent = read(*arguments)
        return VideoClip(silent.frames, silent.times_s, torch.from_numpy(next(following)))

    if tracks:
        monkeypatch.setattr(vision, "load_video", with_sound)


def reference(theirs: Any, drawn: list[Talk], fps: float) -> dict[str, Any]:
    """The transformers way: render the template, then process text and media of the batch."""
    text = theirs.apply_chat_template([d.messages for d in drawn], tokenize=False, add_generation_prompt=True)
    videos = 0
    media: dict[str, Any] = {"images": [], "videos": [], "audio": [], "audio_from_video_indices": []}
    for one in drawn:
        for name in ("images", "videos", "audio"):
            media[name] += getattr(one, name)
        media["audio_from_video_indices"] += [slot if slot is None else slot + videos for slot in one.slots]
        videos += len(one.videos)
    if not any(one.tracks for one in drawn):
        del media["audio_from_video_indices"]
    else:
        media["load_audio_from_video"] = True
    given = {name: value for name, value in media.items() if value}
    return dict(theirs(text=text, return_tensors="pt", padding=True, fps=fps, **given))


def assert_same(got: OmniInputs, want: dict[str, Any]) -> None:
    for name in ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw"):
        assert (getattr(got, name) is None) == (want.get(name) is None), name
        assert want.get(name) is None or torch.equal(getattr(got, name), want[name]), name
    for name in ("pixel_values", "pixel_values_videos", "video_second_per_grid"):
        assert (getattr(got, name) is None) == (want.get(name) is None), name
        if want.get(name) is not None:
            torch.testing.assert_close(getattr(got, name), torch.as_tensor(want[name]), rtol=1e-5, atol=2e-5)
    assert (got.input_features is None) == ("input_features" not in want)
    if got.input_features is not None:  # the reference fills up to 300 s
        assert want["feature_attention_mask"].sum(-1).tolist() == got.feature_attention_mask.sum(-1).tolist()
        for own, their, mask in zip(got.input_features, want["input_features"], got.feature_attention_mask):
            frames = int(mask.sum())
            torch.testing.assert_close(own[:, :frames], their[:, :frames], rtol=1e-5, atol=2e-5)


def assert_same_positions(got: OmniInputs, want: dict[str, Any], with_sound: bool) -> None:
    mask = want.get("feature_attention_mask")
    expected, delta = rope_reference().get_rope_index(
        want["input_ids"],
        image_grid_thw=want.get("image_grid_thw"),
        video_grid_thw=want.get("video_grid_thw"),
        attention_mask=want["attention_mask"],
        use_audio_in_video=with_sound,
        audio_seqlens=None if mask is None else mask.sum(-1),
        second_per_grids=None if "video_grid_thw" not in want else torch.as_tensor(want["video_second_per_grid"]),
    )
    config = thinker_config()
    for row, segments in enumerate(got.segments(config)):
        positions, _ = prompt_positions(segments, config.position_rule)
        assert torch.equal(positions.long(), expected[:, row, want["attention_mask"][row] == 1])
        assert reply_position(positions) == int(delta[row]) + positions.shape[1]


@pytest.mark.parametrize("seed", range(10))
def test_random_conversations(ours: OmniProcessor, theirs: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, features, pixels, grids and TMRoPE positions; odd seeds have sound in every video."""
    rng = random.Random(seed)
    with_sound, fps = seed % 2 == 1, rng.choice((1.0, 2.0, 2.5, 4.0))
    drawn: list[Talk] = [Drawn(rng, with_sound) for _ in range(1 + seed % 3 // 2)]
    give_sound(monkeypatch, [track for one in drawn for track in one.tracks])
    got = ours([one.messages for one in drawn], fps=fps, use_audio_in_video=any(one.tracks for one in drawn) or None)
    want = reference(theirs, drawn, fps)
    assert_same(got, want)
    assert_same_positions(got, want, with_sound)


def test_a_video_with_sound_takes_turns_by_chunks(
    ours: OmniProcessor, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve frames of 6 s with 5 s of sound: three chunks of 2 s, the pictures of each before its sound."""
    pixels, wave = speckle(12, 30, 30), noise(80000).numpy()
    messages = [{"role": "user", "content": [{"type": "video", "video": pixels}, {"type": "text", "text": "see"}]}]
    one = Talk(messages, videos=[pixels], audio=[wave], slots=[0], tracks=[wave])
    give_sound(monkeypatch, one.tracks)
    got = ours(one.messages, fps=2.0, use_audio_in_video=True)
    assert_same(got, reference(theirs, [one], 2.0))
    (segment,) = [s for s in got.segments(thinker_config())[0] if isinstance(s, AudioVideo)]
    grid = segment.video.height * segment.video.width
    chunk = [True] * 2 * grid + [False] * 50
    assert list(segment.order or ()) == chunk + chunk + [True] * 2 * grid + [False] * 25


@pytest.mark.parametrize("samples", [321, 480, 7999, 16001, 32000, 40000])
def test_lengths_of_clips(ours: OmniProcessor, theirs: Any, samples: int) -> None:
    one = heard(noise(samples).numpy())
    assert_same(ours(one.messages), reference(theirs, [one], 2.0))


def test_a_clip_that_has_no_token_is_refused(ours: OmniProcessor) -> None:
    with pytest.raises(ValueError, match="at least 321"):
        ours([{"role": "user", "content": [{"audio": noise(320).numpy()}]}])


def test_a_loud_end_sets_the_level(ours: OmniProcessor, theirs: Any) -> None:
    """The reference's level is the loudest value also of the frames behind the clip."""
    wave = noise(16000, 1).numpy() * 0.01
    wave[-3:] = 0.9
    one = heard(wave)
    assert_same(ours(one.messages), reference(theirs, [one], 2.0))


def layouts(released: Path, theirs: Any, tmp_path: Path) -> Iterator[OmniProcessor]:
    theirs.save_pretrained(str(tmp_path / "theirs"))
    first = OmniProcessor.from_pretrained(tmp_path / "theirs")
    yield first
    first.save_pretrained(tmp_path / "again")
    yield OmniProcessor.from_pretrained(tmp_path / "again")


def test_both_layouts_and_both_directions(
    released: Path, ours: OmniProcessor, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, video, wave = speckle(50, 50), speckle(4, 30, 60), noise(16000).numpy()
    content = [{"type": "image", "image": image}, {"type": "audio", "audio": wave}, {"type": "video", "video": video}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "hello"}]}]
    one = Talk(messages, images=[image], videos=[video], audio=[wave], slots=[None])
    want = reference(theirs, [one], 2.0)
    for processor in layouts(released, theirs, tmp_path):
        assert_same(processor(one.messages), want)
    ours.save_pretrained(tmp_path / "ours")
    opened = type(theirs).from_pretrained(str(tmp_path / "ours"))
    found = reference(opened, [one], 2.0)
    assert found.keys() == want.keys()
    assert all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(want[k])) for k in want)


def test_files_without_their_own_values_are_the_release_s(released: Path, tmp_path: Path) -> None:
    """What trainers leave out: the preprocessor files and the template, and the names in the tokenizer's."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((released / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (bare / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    found, want = OmniProcessor.from_pretrained(bare), OmniProcessor.from_pretrained(released)
    assert found.tokens == want.tokens and found.position_rule == want.position_rule
    assert found.files.json_files == want.files.json_files
    messages = [{"role": "system", "content": "be brief"}, *chat([{"audio": noise(9000).numpy()}, "hi"])]
    assert torch.equal(found(messages).input_ids, want(messages).input_ids)


def test_speech_wants_its_system_text(released: Path) -> None:
    processor = OmniProcessor.from_pretrained(released)
    assert processor.speech_system is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = {"role": "system", "content": [{"type": "text", "text": processor.speech_system}]}
        processor([said, {"role": "user", "content": "hello"}])
    with pytest.warns(UserWarning, match="speech may fail") as caught:
        processor([{"role": "user", "content": "hello"}])
        processor([{"role": "user", "content": "hello again"}])
    assert len(caught) == 1
