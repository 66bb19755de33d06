"""What a part or a family of one's own may have wrong: it is said at once, or when it first matters, and in words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni import OmniModel, OmniProcessor, OmniSession
from omni.config import register_family
from omni.config.decoder import LanguageConfig
from omni.config.family import Family, families
from omni.config.model import ThinkerConfig
from omni.config.reading import Config, extra_field
from omni.encoders.contract import AudioEncoderContract, EncoderOutput, VisionEncoderContract
from omni.packaged.toy import TOY_DATA
from omni.parts import check_part
from tests.build import chat, noise, picture_item, sound_item, tiny_config, tiny_model
from tests.code2wav.test_codec_contract import Steps

WIDTH = tiny_config().thinker.text_config.hidden_size
SHORT: dict[str, Any] = {"max_new_tokens": 3, "max_frames": 2, "seed": 0}


@pytest.fixture(scope="module")
def processor() -> OmniProcessor:
    return OmniProcessor.from_pretrained(TOY_DATA)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hop_length", 0),
        ("hop_length", 1.5),
        ("sample_rate", 0),
        ("sample_rate", "24k"),
        ("sample_rate", math.inf),
        ("num_codebooks", None),
        ("num_codebooks", True),
        ("lookahead", None),
        ("lookahead", -1),
    ],
)
def test_numbers_of_a_codec_decoder_are_checked(name: str, value: Any) -> None:
    codec = Steps()
    setattr(codec, name, value)
    with pytest.raises(ValueError, match=rf"Steps\.{name} must be a whole number of at least [01], got {value!r}"):
        check_part(codec, "code2wav")
    with pytest.raises(ValueError, match=name):
        OmniModel(tiny_config(), code2wav=codec)


def test_whole_numbers_of_any_type_are_numbers() -> None:
    codec = Steps()
    codec.sample_rate, codec.hop_length = 24000.0, torch.tensor(100).item()  # type: ignore[assignment]
    check_part(codec, "code2wav")


class Flat(Steps):
    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Tensor:
        return super().step(codes, state, active)[0]


class Channels(Steps):
    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Tensor:
        return super().step(codes, state, active)[:, None]


class Nothing(Steps):
    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Any:
        return None


class Tall(Steps):
    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Tensor:
        return super().step(codes, state, active).repeat(2, 1)


@pytest.mark.parametrize("kind", [Flat, Channels, Nothing, Tall])
def test_what_a_codec_decoder_returns_is_checked(kind: type[Steps]) -> None:
    model = tiny_model()
    model.code2wav = kind()
    with pytest.raises((TypeError, ValueError), match=rf"{kind.__name__}\.step must return samples \[1, m\], got"):
        model.generate(_ids(), **SHORT)


@pytest.mark.parametrize("part", [3, ("talker",), ["code2wav"], {"a": 1}])
def test_the_name_of_a_part_is_a_text(part: Any) -> None:
    with pytest.raises(ValueError, match="part must be one of audio_encoder"):
        check_part(nn.Linear(2, 2), part)


@pytest.mark.parametrize(
    ("word", "meant"), [("audio_encode", "audio_encoder"), ("code2vec", "code2wav"), ("part", "parts")]
)
def test_a_misspelt_part_of_a_model_names_the_right_one(word: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"OmniModel has no argument '{word}'; did you mean '{meant}'"):
        OmniModel(tiny_config(), **{word: None})


def test_an_unknown_argument_of_a_model_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"OmniModel has no argument 'xyz'; it takes config, parts, audio_encoder"):
        OmniModel(tiny_config(), xyz=None)  # type: ignore[call-arg]


class Ear(AudioEncoderContract):
    """A token for each 100 frames, and `more` that nobody has asked for, moved between clips by `shift`."""

    def __init__(self, more: int = 0, shift: int = 0) -> None:
        super().__init__()
        self.scale, self.more, self.shift = nn.Parameter(torch.ones(1)), more, shift

    def num_tokens(self, length: int) -> int:
        return -(-int(length) // 100)

    def forward(self, features: Tensor, lengths: Tensor) -> EncoderOutput:
        counts = [self.num_tokens(int(n)) for n in lengths]
        counts[0] += self.more + self.shift
        counts[-1] -= self.shift
        return EncoderOutput(self.scale * torch.ones(sum(counts), WIDTH), counts, [])


class Eye(VisionEncoderContract):
    """As many tokens as asked for; `taps` of them, `shift` tokens moved from the last picture to the first."""

    def __init__(self, taps: int = 0, shift: int = 0) -> None:
        super().__init__()
        self.scale, self.taps, self.shift = nn.Parameter(torch.ones(1)), taps, shift

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> EncoderOutput:
        counts = (grid_thw.prod(1) // 4).tolist()
        counts[0] += self.shift
        counts[-1] -= self.shift
        one = self.scale * torch.ones(sum(counts), WIDTH)
        return EncoderOutput(one, counts, [one] * self.taps)


@pytest.mark.parametrize(("more", "shift"), [(1, 0), (-1, 0), (0, 1)])
def test_an_audio_encoder_gives_each_clip_the_tokens_that_it_counts(
    processor: OmniProcessor, more: int, shift: int
) -> None:
    model = tiny_model()
    model.audio_encoder, model.processor = Ear(more, shift), processor
    inputs = model.processor(chat([sound_item(3.0), sound_item(2.0)]))
    with pytest.raises(
        ValueError, match=r"Ear gives \[\d+, \d+\] tokens for clips of .* its num_tokens says \[\d+, \d+\]"
    ):
        model.generate(inputs, **SHORT)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_vision_encoder_gives_each_picture_the_tokens_of_its_grid(processor: OmniProcessor, shift: int) -> None:
    model = tiny_model()
    model.vision_encoder = Eye(shift=shift)
    inputs = processor(chat([picture_item(), picture_item(96)]))
    with pytest.raises(ValueError, match=r"Eye gives \[\d+, \d+\] tokens for pictures that have \[\d+, \d+\]"):
        model.generate(inputs, **SHORT)


@pytest.mark.parametrize("live", [False, True])
def test_more_taps_than_the_decoder_has_layers_are_refused(processor: OmniProcessor, live: bool) -> None:
    model = tiny_model()
    layers = model.config.thinker.text_config.num_hidden_layers
    for taps in (0, layers):
        model.vision_encoder = Eye(taps)
        model.generate(processor(chat([picture_item()])), **SHORT)
    model.vision_encoder = Eye(layers + 1)
    with pytest.raises(
        ValueError, match=rf"Eye gives {layers + 1} taps; the Thinker has {layers} layers to add them to"
    ):
        if live:
            OmniSession(model, processor).push_image(picture_item()["image"])
        else:
            model.generate(processor(chat([picture_item()])), **SHORT)


def _ids() -> Any:
    return {"input_ids": torch.tensor([[5, 6, 7, 8]])}


# families


@pytest.fixture
def forget() -> Any:
    """Families that a test registers are forgotten."""
    from omni.config import family as registry

    known = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(known)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", Config),
        ("config", "mine.config"),
        ("parts", {"thinker": 3}),
        ("parts", {"talker": "omni.talker.talker"}),
        ("keys", {"renames": ()}),
        ("turn_layout", None),
        ("rule", None),
        ("tokens", {"audio": 3}),
        ("n_window", "50"),
        ("frame_pixels", 3),
        ("frame_pixels", (1, 2, 3)),
        ("preprocessor", 5),
        ("code_sampling", [0.9]),
        ("speech_system", 1),
        ("schedule_in_words", "words"),
    ],
)
def test_a_field_of_a_family_of_the_wrong_kind_is_refused_when_it_is_registered(
    forget: Any, field: str, value: Any
) -> None:
    family = dataclasses.replace(families()[0], model_type="mine", **{field: value})
    with pytest.raises((TypeError, ValueError), match=rf"Family\.{field} must be "):
        register_family(family)
    assert "mine" not in [known.model_type for known in families()]


def test_a_folder_may_be_given_as_text(forget: Any, tmp_path: Path) -> None:
    family = dataclasses.replace(families()[0], model_type="mine", preprocessor=str(tmp_path))  # type: ignore[arg-type]
    register_family(family)
    assert isinstance(family, Family)


@dataclasses.dataclass(frozen=True)
class Free(Config):
    """A config with a field of any kind."""

    anything: Any = None
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()


@pytest.mark.parametrize("value", [None, 3, "text", [1, "a"], {"key": 1.5}])
def test_a_field_annotated_any_takes_anything(value: Any) -> None:
    assert Free.from_dict({"anything": value}).to_dict() == {"anything": value}


@dataclasses.dataclass(frozen=True)
class Closed(Config):
    """A config without the two fields that hold what a file has beyond it."""

    width: int = 3


@pytest.mark.parametrize("kind", [Closed, LanguageConfig])
def test_a_config_without_extra_says_what_it_lacks(kind: type[Config]) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} cannot be read from a file: it needs the fields extra"):
        kind.from_dict({})
    if kind is LanguageConfig:
        with pytest.raises(TypeError, match="LanguageConfig cannot be read from a file"):
            ThinkerConfig.from_dict({"text_config": {}})


def test_these_parts_serve_where_they_are_right(processor: OmniProcessor) -> None:
    model = tiny_model()
    model.audio_encoder, model.vision_encoder, model.code2wav = Ear(), Eye(), Steps()
    model.processor = processor
    out = model.generate(model.processor(chat([sound_item(3.0), picture_item(), sound_item(1.0)])), **SHORT)
    assert out.audio is not None and out.audio[0].numel() == 200
    session = OmniSession(model)
    session.push_audio(noise(16000))
    assert list(session.respond(**SHORT))
