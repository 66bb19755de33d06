"""The arguments of a turn, resolved to one value a row: an argument left None means the release's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from omni.generation.sampling import SamplingConfig
from omni.parts import ModelParts
from omni.talker.layout import turn_layout

if TYPE_CHECKING:
    from omni.code2wav.voices import Voice

PerRow = Any  # a value, or a list with one value a row


@dataclass
class TurnArguments:
    """Checked arguments of one batch of turns.

    speakers: ids of the voices, None without speech; voices: what the codec needs of each, None where it needs nothing.
    """

    max_new_tokens: int
    max_frames: int
    text: list[SamplingConfig]
    codes: list[SamplingConfig]
    residual: list[SamplingConfig]
    speakers: list[int] | None
    voices: list[Voice | None]
    seeds: list[int]
    stop_ids: frozenset[int]


def resolve(
    model: ModelParts,
    rows: int,
    *,
    max_new_tokens: int,
    max_frames: int,
    text_sampling: PerRow,
    return_audio: bool | None,
    speaker: PerRow,
    audio_sampling: PerRow,
    residual_sampling: PerRow,
    seed: PerRow,
) -> TurnArguments:
    """Check and complete the arguments of `generate`. Raises ValueError or TypeError."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("max_frames", max_frames, 0)):
        if not _whole(value) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    speakers: list[int] | None = None
    voices: list[Voice | None] = [None] * rows
    if wants_audio(model, return_audio):
        names = [speaker_name(model, v) for v in per_row(speaker, rows, "speaker")]
        speakers, voices = [speaker_ids(model)[name] for name in names], [_voice(model, name) for name in names]
        _check_text_ids(model, dict(zip(names, speakers)))
    return TurnArguments(
        max_new_tokens,
        max_frames,
        _samplings(text_sampling, default_text(model), rows, "text_sampling"),
        _samplings(audio_sampling, default_codes(model), rows, "audio_sampling"),
        _samplings(residual_sampling, default_residual(model), rows, "residual_sampling"),
        speakers,
        voices,
        _seeds(seed, rows),
        stop_ids(model),
    )


def wants_audio(model: ModelParts, return_audio: bool | None) -> bool:
    """Whether the turn speaks; None means: if the model can. Raises ValueError if it was asked to and cannot."""
    if return_audio is not None and not isinstance(return_audio, bool):
        raise TypeError(f"return_audio must be True, False or None, got {return_audio!r}")
    if return_audio is None:
        return_audio = model.talker is not None
    if return_audio:
        model.require("talker")
    return return_audio


def _check_text_ids(model: ModelParts, speakers: dict[str, int]) -> None:
    """Speech needs the text ids that pad and frame it, and those that stand for a voice where there are such."""
    vocabulary = model.config.thinker.text_config.vocab_size
    for name in ("tts_pad_token_id", "tts_bos_token_id", "tts_eos_token_id"):
        value = getattr(model.config, name)
        if not 0 <= value < vocabulary:
            raise ValueError(f"{name} {value} lies outside the vocabulary of {vocabulary}; set it in config.json")
    voice_by_code = turn_layout(model.config).voice_by_code
    for name, value in speakers.items():
        if not voice_by_code and value >= vocabulary:
            raise ValueError(
                f"the voice {name!r} begins with the text token {value}, outside the vocabulary of {vocabulary}; it "
                "belongs to another model"
            )


def per_row(value: PerRow, rows: int, name: str) -> list[Any]:
    """One value a row from a value or a list of them."""
    if isinstance(value, (list, tuple)):
        if len(value) != rows:
            raise ValueError(f"{name} is a list of {len(value)} for a batch of {rows}; give one value or {rows}")
        return list(value)
    return [value] * rows


def _samplings(value: PerRow, default: SamplingConfig, rows: int, name: str) -> list[SamplingConfig]:
    return [default if v is None else SamplingConfig.of(v) for v in per_row(value, rows, name)]


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def default_text(model: ModelParts) -> SamplingConfig:
    """Text sampling as the checkpoint's generation_config.json says (released: greedy)."""
    g = model.generation_config
    penalty = float(g.get("repetition_penalty") or 1.0)
    if not g.get("do_sample"):
        return SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    values = {"temperature": g.get("temperature"), "top_k": g.get("top_k"), "top_p": g.get("top_p")}
    return SamplingConfig(repetition_penalty=penalty, **{k: v for k, v in values.items() if v is not None})


def default_codes(model: ModelParts) -> SamplingConfig:
    """Codebook-0 sampling: the talker_* values of generation_config.json, else the family's released ones."""
    return _speech_sampling(model, "talker", SamplingConfig.of(model.config.family.code_sampling))


def default_residual(model: ModelParts) -> SamplingConfig:
    """Sampling of the residual codebooks: the code_predictor_* values of generation_config.json. The release has none;
    a checkpoint that is to speak greedily sets `code_predictor_do_sample` to false."""
    return _speech_sampling(model, "code_predictor", SamplingConfig.of(model.config.family.residual_sampling))


def _speech_sampling(model: ModelParts, prefix: str, released: SamplingConfig) -> SamplingConfig:
    g = model.generation_config
    values = {}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        given = g.get(f"{prefix}_{name}")
        values[name] = getattr(released, name) if given is None else given
    if g.get(f"{prefix}_do_sample") is False:
        values["temperature"] = 0.0
    return SamplingConfig(**values)


def speaker_ids(model: ModelParts) -> dict[str, int]:
    """The ids of the voices by their names in lower case; where the model has voice files, of these.

    Raises ValueError if there are none.
    """
    talker = model.config.talker_config
    ids = {key.lower(): value for key, value in ((talker and talker.speaker_id) or {}).items()}
    ids |= {key.lower(): voice.bos_token for key, voice in model.voices.items() if voice.bos_token is not None}
    if model.voices:
        ids = {name: ids[name] for name in map(str.lower, model.voices) if name in ids}
    if not ids:
        raise ValueError("the checkpoint names no speakers (talker_config.speaker_id is empty); it cannot speak")
    return ids


def speaker_name(model: ModelParts, name: str | None) -> str:
    """The lower-case name of a voice given in any case; None is the default. Raises ValueError that lists them."""
    ids = speaker_ids(model)
    if name is None:
        usual = model.config.family.default_speaker
        return usual if usual in ids else next(iter(ids))
    if not isinstance(name, str) or name.lower() not in ids:
        raise ValueError(f"unknown speaker {name!r}; this checkpoint has {', '.join(sorted(ids))}")
    return name.lower()


def speaker_id(model: ModelParts, name: str | None) -> int:
    """The id of a voice: a codec id, or the text token that it begins with. Raises as `speaker_name`."""
    return speaker_ids(model)[speaker_name(model, name)]


def _voice(model: ModelParts, name: str) -> Voice | None:
    """What the codec decoder needs of a voice. Raises ValueError if it is not there."""
    if model.code2wav is None or not model.code2wav.needs_voice:
        return None
    if not model.voices:
        raise ValueError(
            "the codec decoder needs recordings of voices, and the model has none; read them with "
            "omni.code2wav.voices.load_voices(path) into model.voices, or pass return_audio=False"
        )
    return next(voice for key, voice in model.voices.items() if key.lower() == name)


def stop_ids(model: ModelParts) -> frozenset[int]:
    """The ids that end a reply: `im_end_token_id` and generation_config's eos_token_id."""
    eos = model.generation_config.get("eos_token_id")
    more = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    return frozenset((model.config.im_end_token_id, *map(int, more)))


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One a row; without a seed they are drawn from torch's global generator."""
    seeds = per_row(seed, rows, "seed")
    drawn = [0] * rows
    for row, value in enumerate(seeds):
        if value is None:
            drawn[row] = int(torch.randint(2**62, ()))
            continue
        if not _whole(value) or not -(2**63) <= value < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {value!r}")
        drawn[row] = int(value)
    return drawn
