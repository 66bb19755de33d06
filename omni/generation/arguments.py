"""The arguments of a turn, resolved to one value a row: an argument left None means the release's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from omni.config.keywords import check_flags
from omni.generation.sampling import SamplingConfig
from omni.generation.text_options import Stop, TextOptions, read_stops
from omni.layers.splitmix import signed
from omni.parts import ModelParts
from omni.talker.layout import turn_layout

if TYPE_CHECKING:
    from omni.code2wav.voices import Voice

PerRow = Any  # a value, or a list with one value a row, or one a prompt
_MOST_ROWS = 65536  # of one batch; more is a slip, and would fill the memory before anything is drawn


@dataclass
class TurnArguments:
    """Checked arguments of one batch of turns.

    speakers: ids of the voices, None without speech; voices: what the codec needs of each, None where it needs nothing.
    options: of the texts; answers: rows a prompt; allow_long, speak_prefill: as in `generate`; tools: calls of tools in
    the replies are told from their text; warned: that positions beyond the model's may be reached.
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
    options: list[TextOptions]
    answers: int = 1
    allow_long: bool = False
    speak_prefill: bool = False
    tools: bool = False
    warned: bool = False


def resolve(
    model: ModelParts,
    prompts: int,
    *,
    max_new_tokens: int,
    max_frames: int,
    text_sampling: PerRow,
    return_audio: bool | None,
    speaker: PerRow,
    audio_sampling: PerRow,
    residual_sampling: PerRow,
    seed: PerRow,
    stop: Stop = None,
    logprobs: int | None = None,
    n: int = 1,
    min_new_tokens: PerRow = 0,
    logits_processor: PerRow = None,
    allow_long: bool = False,
    speak_prefill: bool = False,
    tools: bool = False,
) -> TurnArguments:
    """Check and complete the arguments of `generate` for n answers a prompt. Raises ValueError or TypeError."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("max_frames", max_frames, 0), ("n", n, 1)):
        if not _whole(value) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    check_flags(allow_long=allow_long, speak_prefill=speak_prefill, tools=tools)
    rows = prompts * n
    if rows > _MOST_ROWS:
        raise ValueError(
            f"n {n} makes {rows} answers to {prompts} prompts in one batch, over the limit of {_MOST_ROWS}; ask for "
            "fewer, with another seed each time"
        )
    each = partial(per_row, rows=prompts, answers=n)
    options = _options(model, rows, each, stop, logprobs, min_new_tokens, logits_processor, max_new_tokens)
    speakers: list[int] | None = None
    voices: list[Voice | None] = [None] * rows
    if wants_audio(model, return_audio):
        names = [speaker_name(model, v) for v in each(speaker, name="speaker")]
        speakers, voices = [speaker_ids(model)[name] for name in names], [_voice(model, name) for name in names]
        _check_text_ids(model, dict(zip(names, speakers)))
    return TurnArguments(
        max_new_tokens,
        max_frames,
        _samplings(each(text_sampling, name="text_sampling"), default_text(model)),
        _samplings(each(audio_sampling, name="audio_sampling"), default_codes(model)),
        _samplings(each(residual_sampling, name="residual_sampling"), default_residual(model)),
        speakers,
        voices,
        _seeds(seed, prompts, n),
        stop_ids(model),
        options,
        n,
        allow_long,
        speak_prefill,
        tools,
    )


def _options(
    model: ModelParts,
    rows: int,
    each: Callable[..., list[Any]],
    stop: Stop,
    logprobs: int | None,
    min_new_tokens: PerRow,
    logits_processor: PerRow,
    max_new_tokens: int,
) -> list[TextOptions]:
    """What each row asks of its text."""
    if logprobs is not None and not (_whole(logprobs) and 0 <= logprobs <= model.config.thinker.text_config.vocab_size):
        raise ValueError(
            f"logprobs {logprobs!r} must be None or a whole number from 0 (the drawn token alone) to the vocabulary's "
            f"{model.config.thinker.text_config.vocab_size}"
        )
    usual = model.generation_config.get("min_new_tokens") or 0
    lengths, functions = each(min_new_tokens, name="min_new_tokens"), each(logits_processor, name="logits_processor")
    for least in (*lengths, usual):
        if not _whole(least) or least < 0:
            raise ValueError(f"min_new_tokens must be a whole number of at least 0, got {least!r}")
    for least, function in zip(lengths, functions):
        if least > max_new_tokens:
            raise ValueError(f"min_new_tokens {least} is more than max_new_tokens {max_new_tokens}")
        if function is not None and not callable(function):
            raise TypeError(f"logits_processor must be a function of ids and logits, got {function!r}")
    stops = read_stops(stop, rows, lambda value, name: each(value, name=name))
    found = zip(stops, lengths, functions)
    return [TextOptions(own, logprobs, int(least or usual), function) for own, least, function in found]


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


def per_row(value: PerRow, rows: int, name: str, answers: int = 1) -> list[Any]:
    """One value for each of so many answers to each of the prompts, of which there are `rows`.

    value: one for all, a list with one a prompt, or a list with one an answer.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * (rows * answers)
    if len(value) == rows * answers:
        return list(value)
    if len(value) == rows:
        return [own for own in value for _ in range(answers)]
    lists = f"one value or {rows}" if answers == 1 else f"one value, {rows} or {rows * answers}"
    raise ValueError(f"{name} is a list of {len(value)} for a batch of {rows}; give {lists}")


def _samplings(values: list[Any], default: SamplingConfig) -> list[SamplingConfig]:
    return [default if value is None else SamplingConfig.of(value) for value in values]


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


def _seeds(seed: int | Sequence[int] | None, prompts: int, answers: int) -> list[int]:
    """One an answer: a prompt's seed plus 0, 1, ..., unless each has its own.

    Without a seed they are drawn from torch's global generator.
    """
    own = isinstance(seed, (list, tuple)) and len(seed) == prompts * answers
    drawn: list[int] = []
    for row, value in enumerate(per_row(seed, prompts, "seed", answers)):
        if row % answers and not own:
            drawn.append(signed(drawn[-1] + 1))
        elif value is None:
            drawn.append(int(torch.randint(2**62, ())))
        elif not _whole(value) or not -(2**63) <= value < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {value!r}")
        else:
            drawn.append(int(value))
    return drawn
