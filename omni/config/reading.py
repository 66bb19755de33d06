"""Strict reading and faithful writing of `config.json` mappings: the base class of every part's configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from omni.config.keywords import is_misspelt, nearest

# Keys that other writers put in the file and that change nothing here: kept and written back without a warning.
PASSIVE_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _experts_implementation _name_or_path activation_dropout
    adapter_state add_cross_attention apply_vit_abs_pos_embed architectures attention_dropout
    attention_probs_dropout_prob audio_bos_token_id audio_end_token_id audio_eos_token_id auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout codebook_dim conv_chunksize
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    enable_talker encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id fullatt_block_indexes id2label ignore_index image_size init_std
    initializer_factor interleaved is_decoder is_encoder_decoder label2id layer_types length_penalty max_length
    max_source_positions max_window_layers min_length mrope_interleaved no_repeat_ngram_size num_beam_groups
    num_beams num_hidden_layers_override num_return_sequences num_semantic_quantizers output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type pruned_heads qkv_bias
    quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate scale_embedding
    seconds_per_chunk semantic_codebook_size sep_token_id spatial_patch_size suppress_tokens task_specific_params
    temperature temporal_style tf_legacy_loss tie_encoder_decoder tokenizer_class tokens_per_second top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_qk_norm use_sliding_window
    vector_quantization_hidden_dimension vision_bos_token_id vision_end_token_id vision_eos_token_id vocab_map
    window_size
    """.split()  # noqa: SIM905
)
# The same of parts that have no such field: other writers give these to every part.
_OF_OTHER_PARTS = frozenset(("tie_word_embeddings", "use_mrope"))
_ALIASES = {"num_local_experts": "num_experts"}  # both spellings exist in the wild; those read are written back
USUAL_STD = 0.02  # of random weights, where a part names no initializer_range
_warned: set[str] = set()

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Base of all part configs: strict reading, faithful writing.

    A family whose files spell a field otherwise names it in `_spellings` (field -> key). Fields that its files do not
    have go to `_not_in_files`: they are read if given, and written only where they differ from their default.
    `_also_read` (key -> field) are further spellings found in released files; those read are written back, both where a
    file has both. What a value must be is read from the field's annotation.
    """

    _spellings: ClassVar[Mapping[str, str]] = {}
    _also_read: ClassVar[Mapping[str, str]] = {}
    _not_in_files: ClassVar[frozenset[str]] = frozenset()
    _passive: ClassVar[frozenset[str]] = frozenset()  # PASSIVE_KEYS of this part alone

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
        """Build from a `config.json` mapping. Raises ValueError on misspelt keys, wrong types or contradictions."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{where or 'config'} must be a JSON object, got {type(values).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if not known.pop("extra", None) or not known.pop("aliases", None):
            raise TypeError(f"{cls.__name__} cannot be read from a file: it needs the fields extra and aliases")
        kinds = kinds_of(cls)  # type: ignore[arg-type]  # a class can be hashed
        kept: dict[str, Any] = {}
        spelled: dict[str, list[str]] = {}
        extra: dict[str, Any] = {}
        names = cls._names()
        for key, value in values.items():
            if not isinstance(key, str):
                raise ValueError(f"{where or 'config'} has the key {key!r}; keys must be text")
            name = names.get(key, key)
            path = f"{where}.{key}" if where else key
            if name in known:
                if name in kept and kept[name] != value:
                    raise ValueError(f"{path} = {value!r} contradicts its other spelling {name} = {kept[name]!r}")
                spelled.setdefault(name, []).append(key)
                if value is None and known[name].metadata.get("omit_none"):
                    extra[key] = None  # written back as it was
                    continue
                kept[name] = _coerce(*kinds[name], value, path)
            else:
                if key not in PASSIVE_KEYS | _OF_OTHER_PARTS | cls._passive:
                    _check_unknown(key, path, [cls._spellings.get(name, name) for name in known])
                extra[key] = value
        usual = {name: [cls._spellings.get(name, name)] for name in spelled}
        aliases = {key: name for name, keys in spelled.items() if keys != usual[name] for key in keys}
        config = cls(**kept, extra=extra, aliases=aliases)  # type: ignore[call-arg]
        config.validate(where or cls.__name__)
        return config

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Fields by the spellings that files use instead of their names."""
        return {**_ALIASES, **cls._also_read, **{spelling: name for name, spelling in cls._spellings.items()}}

    @classmethod
    def by_field(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """A file's mapping with its keys as fields are named, also in the configs inside it. Nothing is checked."""
        names, kinds = cls._names(), kinds_of(cls)  # type: ignore[arg-type]  # a class can be hashed
        out = {names.get(key, key): value for key, value in values.items()}
        for name in out.keys() & kinds.keys():
            kind = kinds[name][0]
            if isinstance(out[name], Mapping) and issubclass(kind, Config):
                out[name] = kind.by_field(out[name])
        return out

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` mapping, unknown keys included; keys that are None and were never set are left out."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            if f.name in ("extra", "aliases"):
                continue
            value = getattr(self, f.name)
            if value is None and f.metadata.get("omit_none"):
                continue
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in self._not_in_files and value == default:
                continue
            if isinstance(value, Config):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            read = [key for key, name in self.aliases.items() if name == f.name]  # type: ignore[attr-defined]
            for key in read or [self._spellings.get(f.name, f.name)]:
                out[key] = value
        return {**self.extra, **out}  # type: ignore[attr-defined]

    def validate(self, where: str) -> None:
        """Raise ValueError when values contradict each other."""

    @property
    def weights_std(self) -> float:
        """Deviation of a new part's random weights: its `initializer_range`, if it has one."""
        return getattr(self, "initializer_range", USUAL_STD)

    def in_words(self) -> str:
        """The part in a line, as `omni info` prints it."""
        return type(self).__name__

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed, validated again."""
        known = [f.name for f in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                hint = nearest(key, known, "")
                raise ValueError(f"{type(self).__name__} has no field {key!r}{hint and '; ' + hint}")
        config = dataclasses.replace(self, **changes)
        config.validate(type(self).__name__)
        return config


def _check_unknown(key: str, path: str, known: list[str]) -> None:
    """Refuse a likely misspelling; warn once about anything else."""
    for name in known:
        if is_misspelt(key, name):
            raise ValueError(f"unknown key {path!r} in config.json; did you mean {name!r}?")
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"config key {path!r} is not known to omni; it is kept and written back", stacklevel=4)


@cache
def kinds_of(cls: type[Config]) -> dict[str, tuple[Any, bool]]:
    """What a config class says of each of its fields by its annotation: the type, and whether None may stand there."""
    hints = get_type_hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        options = get_args(hint) if type(None) in get_args(hint) else (hint,)
        kind = next(option for option in options if option is not type(None))
        out[f.name] = (get_origin(kind) or kind, len(options) > 1)
    return out


def _coerce(kind: Any, nullable: bool, value: Any, path: str) -> Any:
    """Check a value against its field's kind and build nested configs."""
    if kind is Any or (value is None and nullable):
        return value
    if issubclass(kind, Config):
        return kind.from_dict(value, path)
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(v) is int for v in value):
            raise ValueError(f"{path} must be a list of integers, got {value!r}")
        return tuple(value)
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} must be a finite number, got {value!r}")
        return value  # kept as written: 10000 stays 10000 in the file
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ValueError(f"{path} must be of type {kind.__name__}, got {value!r}")
    return value


def optional() -> Any:
    """A field that is None where the file lacks it, and then is not written either."""
    return field(default=None, metadata={"omit_none": True})


def extra_field() -> Any:
    """What a file holds beyond the fields: `extra`, unknown keys; `aliases`, the fields by their
    spellings there, where these are not the usual ones alone."""
    return field(default_factory=dict, repr=False)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def positive(config: Config, where: str, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, f"{where}.{name} must be positive, got {getattr(config, name)}")


def not_negative(config: Config, where: str, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= 0, f"{where}.{name} must not be negative, got {getattr(config, name)}")


def check_theta(value: Any, path: str) -> None:
    """A rotary base, where it is given, is a positive number."""
    ok = value is None or (type(value) in (int, float) and 0 < value < math.inf)
    require(ok, f"{path} must be a positive number, got {value!r}")


def warn_user(message: str) -> None:
    """A UserWarning that points to the line outside omni that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "omni":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
