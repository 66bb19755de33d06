"""The arguments of a turn, resolved to one value a row: an argument left None means the release's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from omni.generation.sampling import SamplingConfig

if TYPE_CHECKING:
    from omni.model import OmniModel

RELEASED_CODES = SamplingConfig(temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
RELEASED_RESIDUAL = SamplingConfig(temperature=1.0, top_k=50, top_p=0.8)  # hard-coded in the reference

PerRow = Any  # a value, or a list with one value a row


@dataclass
class TurnArguments:
    """Checked arguments of one batch of turns. speakers are codec ids, None without speech."""

    max_new_tokens: int
    max_frames: int
    text: list[SamplingConfig]
    codes: list[SamplingConfig]
    residual: list[SamplingConfig]
    speakers: list[int] | None
    seeds: list[int]
    stop_ids: frozenset[int]


def resolve(
    model: OmniModel,
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
    speaks = wants_audio(model, return_audio)
    if speaks:
        _check_tts_ids(model)
    return TurnArguments(
        max_new_tokens,
        max_frames,
        _samplings(text_sampling, default_text(model), rows, "text_sampling"),
        _samplings(audio_sampling, default_codes(model), rows, "audio_sampling"),
        _samplings(residual_sampling, default_residual(model), rows, "residual_sampling"),
        [speaker_id(model, v) for v in per_row(speaker, rows, "speaker")] if speaks else None,
        _seeds(seed, rows),
        stop_ids(model),
    )


def wants_audio(model: OmniModel, return_audio: bool | None) -> bool:
    """Whether the turn speaks; None means: if the model can. Raises ValueError if it was asked to and cannot."""
    if return_audio is not None and not isinstance(return_audio, bool):
        raise TypeError(f"return_audio must be True, False or None, got {return_audio!r}")
    if return_audio is None:
        return_audio = model.talker is not None
    if return_audio:
        model.require("talker")
        if getattr(model.talker, "reads_replies", False):
            raise ValueError(
                "this family answers in text only so far: its Talker needs hidden states of the reply, which are not "
                "handed on yet; pass return_audio=False, or load parts=['thinker']"
            )
    return return_audio


def _check_tts_ids(model: OmniModel) -> None:
    """Speech needs the text ids that pad and frame it."""
    vocabulary = model.config.thinker_config.text_config.vocab_size
    for name in ("tts_pad_token_id", "tts_bos_token_id", "tts_eos_token_id"):
        value = getattr(model.config, name)
        if not 0 <= value < vocabulary:
            raise ValueError(f"{name} {value} lies outside the vocabulary of {vocabulary}; set it in config.json")


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


def default_text(model: OmniModel) -> SamplingConfig:
    """Text sampling as the checkpoint's generation_config.json says (released: greedy)."""
    g = model.generation_config
    penalty = float(g.get("repetition_penalty") or 1.0)
    if not g.get("do_sample"):
        return SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    values = {"temperature": g.get("temperature"), "top_k": g.get("top_k"), "top_p": g.get("top_p")}
    return SamplingConfig(repetition_penalty=penalty, **{k: v for k, v in values.items() if v is not None})


def default_codes(model: OmniModel) -> SamplingConfig:
    """Codebook-0 sampling: the talker_* values of generation_config.json, which the release sets to these defaults."""
    return _speech_sampling(model, "talker", RELEASED_CODES)


def default_residual(model: OmniModel) -> SamplingConfig:
    """Sampling of the residual codebooks: the code_predictor_* values of generation_config.json. The release has none;
    a checkpoint that is to speak greedily sets `code_predictor_do_sample` to false."""
    return _speech_sampling(model, "code_predictor", RELEASED_RESIDUAL)


def _speech_sampling(model: OmniModel, prefix: str, released: SamplingConfig) -> SamplingConfig:
    g = model.generation_config
    values = {}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        given = g.get(f"{prefix}_{name}")
        values[name] = getattr(released, name) if given is None else given
    if g.get(f"{prefix}_do_sample") is False:
        values["temperature"] = 0.0
    return SamplingConfig(**values)


def speaker_id(model: OmniModel, name: str | None) -> int:
    """The codec id of a voice; names are case-insensitive. Raises ValueError that lists the voices."""
    talker = model.config.talker_config
    voices = {key.lower(): value for key, value in ((talker and talker.speaker_id) or {}).items()}
    if not voices:
        raise ValueError("the checkpoint names no speakers (talker_config.speaker_id is empty); it cannot speak")
    if name is None:
        return voices.get("ethan", next(iter(voices.values())))  # the reference's default voice
    if not isinstance(name, str) or name.lower() not in voices:
        raise ValueError(f"unknown speaker {name!r}; this checkpoint has {', '.join(sorted(voices))}")
    return voices[name.lower()]


def stop_ids(model: OmniModel) -> frozenset[int]:
    """The ids that end a reply: `im_end_token_id` and generation_config's eos_token_id."""
    eos = model.generation_config.get("eos_token_id")
    more = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    return frozenset((model.config.im_end_token_id, *more))


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
