"""What a model says of its parts: what one lacks, what one is for, and what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni import OmniConfig, OmniModel
from omni.code2wav.contract import CodecDecoder
from omni.encoders.contract import AudioEncoderContract, EncoderOutput, VisionEncoderContract
from omni.parts import CONTRACTS, check_part
from omni.talker.talker import Talker

ROOT = Path(__file__).parents[1]
CONFIG = OmniConfig.from_pretrained(ROOT / "configs" / "tiny.json")


class Forward(nn.Module):
    """A module that can be called, and nothing more."""

    def forward(self, features: Tensor, lengths: Tensor) -> EncoderOutput:
        return EncoderOutput(torch.zeros(0, 32), [], [])


class Counts(Forward):
    def num_tokens(self, length: int) -> int:
        return length


class HalfCodec(nn.Module):
    sample_rate, hop_length = 24000, 1920

    def step(self, codes: Tensor, state: Any) -> Tensor:
        return codes[:, 0].float()


class HalfStream(AudioEncoderContract):
    """Has a `step` and leaves the state and the end to others."""

    num_tokens = Counts.num_tokens
    forward = Forward.forward

    def step(self, features: Tensor, state: Any) -> Tensor:
        return features


@pytest.mark.parametrize(
    ("part", "module", "lacking"),
    [
        ("audio_encoder", Forward(), ["num_tokens"]),
        ("audio_encoder", nn.Module(), ["forward", "num_tokens"]),
        ("audio_encoder", AudioEncoderContract(), ["forward", "num_tokens"]),
        ("audio_encoder", HalfStream(), ["init_state", "finish"]),
        ("vision_encoder", VisionEncoderContract(), ["forward"]),
        ("code2wav", HalfCodec(), ["num_codebooks", "lookahead", "init_state"]),
        ("thinker", nn.Linear(2, 2), ["embed_tokens", "lm_head", "init_state", "decode"]),
        ("talker", nn.Identity(), ["codec_embedding", "mtp", "suppressed"]),
    ],
)
def test_a_part_that_lacks_something_is_refused_in_one_sentence(part: str, module: nn.Module, lacking: list[str]):
    with pytest.raises(ValueError) as told:
        check_part(module, part)
    contract = CONTRACTS[part]
    sentence = str(told.value)
    assert sentence.startswith(f"{type(module).__name__} cannot be the {part}, it lacks ")
    assert sentence.endswith(f"; write what is missing as {contract.__module__}.{contract.__name__} describes it")
    named = sentence.partition("it lacks ")[2].partition(";")[0].split(", ")
    assert set(lacking) <= set(named) and (part == "talker" or named == lacking)
    with pytest.raises(ValueError, match="cannot be the"):
        OmniModel(CONFIG, **{part: module})


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"audio_encoder must be a torch\.nn\.Module, got the class Counts, which"):
        OmniModel(CONFIG, audio_encoder=Counts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a part must be a torch\.nn\.Module, got 3"):
        check_part(3)
    with pytest.raises(ValueError, match="part must be one of audio_encoder, vision_encoder, thinker, talker, "):
        check_part(Counts(), "encoder")


def test_what_a_module_is_for_is_worked_out_where_it_can_be() -> None:
    model = OmniModel(CONFIG)
    for part in CONTRACTS:
        check_part(getattr(model, part))
        check_part(getattr(model, part), part)
    check_part(Counts())  # keeps the contract of one part only
    with pytest.raises(ValueError, match="Counts cannot be the code2wav, it lacks sample_rate"):
        check_part(Counts(), "code2wav")
    for module in (Forward(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"derives from no contract and keeps none.*; name the part: audio"):
            check_part(module)
    with pytest.raises(ValueError, match="cannot be the code2wav, it lacks sample_rate, hop_length"):
        check_part(CodecDecoder())


def test_a_bare_module_gets_the_defaults_that_it_lacks_and_nothing_else() -> None:
    class Own(Counts):
        keep_together = False

    bare = Own()
    model = OmniModel(CONFIG, audio_encoder=bare)
    assert model.audio_encoder is bare and isinstance(bare, Own) and type(bare).__name__ == "Own"
    assert bare.keep_together is False and bare.num_tokens(7) == 7
    assert bare.init_state().frames == 0  # type: ignore[operator]
    assert not hasattr(Own(), "init_state"), "only the one that was given is changed"
    kinds = type(bare)
    model.audio_encoder = bare  # a second time
    assert type(bare) is kinds


def test_a_compiled_module_passes_for_what_it_compiles() -> None:
    encoder = OmniModel(CONFIG).audio_encoder
    model = OmniModel(CONFIG, audio_encoder=torch.compile(encoder, backend="eager"))
    assert model.audio_encoder.num_tokens(100) == 13 and model.audio_encoder.init_state().frames == 0
    with pytest.raises(ValueError, match="lacks num_tokens"):
        check_part(torch.compile(Forward(), backend="eager"), "audio_encoder")


def test_a_released_part_and_a_subclass_stay_what_they_are() -> None:
    class Mine(Talker):
        pass

    mine = Mine(CONFIG.talker_config)
    model = OmniModel(CONFIG, talker=mine)
    assert type(model.talker) is Mine and type(model.thinker).__name__ == "Thinker"


def test_parts_are_checked_whenever_they_are_replaced() -> None:
    model = OmniModel(CONFIG)
    before = model.code2wav
    with pytest.raises(ValueError, match="HalfCodec cannot be the code2wav"):
        model.code2wav = HalfCodec()  # type: ignore[assignment]
    assert model.code2wav is before
    model.code2wav = None
    assert model.code2wav is None


def test_require_gives_the_part_or_says_what_to_do() -> None:
    model = OmniModel(CONFIG, parts=("thinker",))
    assert model.require("thinker") is model.thinker
    with pytest.raises(ValueError, match="the talker was not loaded; add 'talker' to parts="):
        model.require("talker")
    model.audio_encoder = model.vision_encoder = None
    with pytest.raises(ValueError, match="this model has no audio encoder; it cannot listen"):
        model.require("audio_encoder")
    with pytest.raises(ValueError, match="this model has no vision encoder; it cannot see"):
        model.require("vision_encoder")
    silent = OmniModel(CONFIG.replace(enable_audio_output=False))
    with pytest.raises(ValueError, match="this variant has no code2wav: it answers in text only"):
        silent.require("code2wav")
