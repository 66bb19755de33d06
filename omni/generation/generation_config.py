"""generation_config.json: read strictly, and what of it is not followed is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omni.config.reading import read_json, warn_user

FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
# What transformers' generation knows and this library's does not, with the values by which it does nothing.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "penalty_alpha"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "min_p", "top_h"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "force_words_ids", "constraints"), ([],)),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers", "max_time"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "max_new_tokens"), ()),
    **dict.fromkeys(("thinker_max_new_tokens", "thinker_do_sample", "thinker_eos_token_id"), ()),
    **{f"thinker_{name}": () for name in _SAMPLING},
    **dict.fromkeys(("renormalize_logits", "token_healing"), (False,)),
    "stop_strings": ([], ""),
    "remove_invalid_values": (False,),
    "max_length": (20,),  # the default of transformers' own class
}


def read_generation_config(folder: Path, vocabulary: int | None = None) -> dict[str, Any]:
    """The values of a checkpoint's file; {} without one. Ids to stop at become whole numbers.

    vocabulary: in which these must lie. Warns once of values that are not followed. Raises ValueError for a broken
    file, for ids and numbers that are none.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    values = read_json(path)
    if values.get("eos_token_id") is not None:
        eos = values["eos_token_id"]
        ids = [_id(one, path, vocabulary) for one in (eos if isinstance(eos, list) else [eos])]
        values["eos_token_id"] = ids if isinstance(eos, list) else ids[0]
    for prefix in ("", "talker_", "code_predictor_"):
        for name in _SAMPLING:
            _check_number(values.get(f"{prefix}{name}"), f"{path}: {prefix}{name}")
        switch = values.get(f"{prefix}do_sample")
        if switch is not None and not isinstance(switch, bool):
            raise ValueError(f"{path}: {prefix}do_sample must be true or false, got {switch!r}")
    words = values.get("speakable_words")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise ValueError(f"{path}: speakable_words must be a list of words, got {words!r}")
    given = [name for name in _NOT_FOLLOWED if values.get(name) is not None]
    ignored = [f"{name} = {values[name]!r}" for name in given if values[name] not in _NOT_FOLLOWED[name]]
    if ignored:
        warn_user(f"{path} holds values that omni does not follow: {', '.join(ignored)}")
    return values


def _id(value: Any, path: Path, vocabulary: int | None) -> int:
    """A token id, also from a text of digits."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: eos_token_id must be token ids, got {value!r}")
    if vocabulary is not None and value >= vocabulary:
        raise ValueError(f"{path}: eos_token_id {value} lies outside the vocabulary of {vocabulary}")
    return value


def _check_number(value: Any, what: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not is_number:
        raise ValueError(f"{what} must be a number, got {value!r}")
