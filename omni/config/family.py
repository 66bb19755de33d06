"""What makes a family of models: one object of plain data, read by everyone and branched on by no one.

A family's `Family` stands in its own config file. What must be imported is a dotted name, `package.module:Name`, that
resolves on first use, so a family costs nothing until a checkpoint of it is opened.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omni.config.names import import_name
from omni.config.positions import PositionRule
from omni.config.reading import Config, kinds_of

RELEASED = Path(__file__).resolve().parents[1] / "processing" / "released"  # preprocessor values of the releases
GROUP = "omni.families"  # entry points of installed packages, each naming a Family
_OWN = ("omni.config.qwen3_omni:QWEN3_OMNI", "omni.config.qwen2_5_omni:QWEN2_5_OMNI")


@dataclass(frozen=True)
class KeyNames:
    """How the files of a family name the weights.

    `renames` pairs a prefix of ours with the Hub's, at least one a part; the longest match wins, in either direction.
    `also_read` pairs ours with prefixes that other writers use. Keys that end in `derived` are tables some writers
    store and the model computes. `parts` are the Hub's first name components in the order of the released files. Keys
    that begin with `own` are known to omni alone and lie in a file beside those that every library reads.
    """

    renames: tuple[tuple[str, str], ...]
    also_read: tuple[tuple[str, str], ...] = ()
    derived: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The facts of one family. Fields marked "name" are dotted names.

    The model:
        model_type: of config.json. config: name of the whole model's config class. parts: part of `OmniModel` -> name
        of what builds it from its own config (a Thinker also takes the layer that the Talker reads). keys: how the
        weights are called in files. turn_layout: name of the class that lays out a spoken turn.
    Media:
        processor_class: of preprocessor files. tokens: attribute of the tokenizer -> the token's usual spelling. rule:
        positions, with the released rate. n_window: half the mel frames of a chunk of the audio encoder. chunk_step:
        mel frames of which a shorter chunk that is chosen is a multiple (None: there is one chunk). clip_end: what the
        mel front end hears behind a clip's last sample (`omni.encoders.mel.ENDS`). audio_tokens: name of the function
        (mel frames, chunk_frames) -> audio tokens. frame_pixels: fewest and most of a video frame. preprocessor:
        released values, for folders without preprocessor files.
    Speech:
        speech_system: the system text without which speech is out of what the model was trained on (None: any will do).
        default_speaker: the voice where none is asked for. code_sampling, residual_sampling: how the release draws
        codebook 0 and the residual codes, as fields of `SamplingConfig`. schedule_in_words: name of a function of the
        codec decoder's config, for decoders that draw sound by windows: how long those make a listener wait.
    """

    model_type: str
    config: str
    parts: Mapping[str, str]
    keys: KeyNames
    turn_layout: str
    processor_class: str
    tokens: Mapping[str, str]
    rule: PositionRule
    n_window: int
    clip_end: str
    audio_tokens: str
    frame_pixels: tuple[int, int]
    preprocessor: Path
    chunk_step: int | None = None
    speech_system: str | None = None
    default_speaker: str = ""
    code_sampling: Mapping[str, float] = field(default_factory=dict)
    residual_sampling: Mapping[str, float] = field(default_factory=dict)
    schedule_in_words: str | None = None

    @property
    def config_class(self) -> type[Any]:
        """The class of the whole model's config."""
        return import_name(self.config)

    def builder(self, part: str) -> Callable[..., Any]:
        """What builds a part of the model."""
        return import_name(self.parts[part])

    def token_counter(self, chunk_frames: int) -> Callable[..., int]:
        """What counts the audio tokens of a clip of so many mel frames, in chunks of `chunk_frames`, also a keyword."""
        return partial(import_name(self.audio_tokens), chunk_frames=chunk_frames)

    def dotted_names(self) -> list[str]:
        """Every dotted name of this family."""
        more = (self.schedule_in_words,) if self.schedule_in_words else ()
        return [self.config, *self.parts.values(), self.turn_layout, self.audio_tokens, *more]


_DOTTED = re.compile(r"[\w.]+:\w+")
_PARTS = ("audio_encoder", "vision_encoder", "thinker", "talker", "code2wav")
_registered: dict[str, Family] = {}  # from outside, by model_type


def register_family(family: Family) -> None:
    """Let configs of the family's `model_type` be read, built, loaded and described as those of omni's own families.

    Registering an equal family again changes nothing. Raises TypeError for anything else than a Family, ValueError for
    a model_type that another family has. An installed package may name its Family in the entry-point group
    `omni.families` instead.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family takes a Family, got {type(family).__name__}")
    if not isinstance(family.model_type, str) or not family.model_type:
        raise ValueError(f"a family needs a model_type, the text that its config.json has, got {family.model_type!r}")
    if not isinstance(family.parts, Mapping) or not set(family.parts) <= set(_PARTS):
        raise ValueError(f"Family.parts names what builds some of {', '.join(_PARTS)}, got {family.parts!r}")
    _check_kinds(family)
    taken = {known.model_type: known for known in families()}.get(family.model_type)
    if taken not in (None, family):
        raise ValueError(f"model_type {family.model_type!r} belongs to another family; a family needs one of its own")
    _registered[family.model_type] = family


def _check_kinds(family: Family) -> None:
    """Raise TypeError or ValueError for a field that is not what its annotation or its dotted name says."""
    for name, (kind, optional) in kinds_of(Family).items():
        value = getattr(family, name)
        if not (value is None and optional) and not isinstance(value, (kind, str) if kind is Path else kind):
            raise TypeError(f"Family.{name} must be a {kind.__name__}, got {value!r}")
    if len(family.frame_pixels) != 2 or not all(isinstance(pixels, int) for pixels in family.frame_pixels):
        raise ValueError(f"Family.frame_pixels must be the fewest and the most pixels, got {family.frame_pixels!r}")
    named = {"config": family.config, "turn_layout": family.turn_layout, "audio_tokens": family.audio_tokens}
    named |= {"schedule_in_words": family.schedule_in_words or "no:name"}
    named |= {f"parts must be dotted names; parts[{part!r}]": value for part, value in family.parts.items()}
    for name, value in named.items():
        if not isinstance(value, str) or not _DOTTED.fullmatch(value):
            raise ValueError(f"Family.{name} must be a dotted name such as package.module:Name, got {value!r}")
    for token, spelling in family.tokens.items():
        if not isinstance(spelling, str):
            raise TypeError(f"Family.tokens must be a text for each name, got {spelling!r} for {token!r}")


def families() -> tuple[Family, ...]:
    """All families: omni's own, those of installed packages, and those that were registered."""
    return (*_installed(), *(f for f in _registered.values() if f not in _installed()))


@cache
def _installed() -> tuple[Family, ...]:
    """omni's own families, then those that entry points name; one that cannot be had is left out with a warning."""
    found = [import_name(name) for name in _OWN]
    for point in entry_points(group=GROUP):
        try:
            family = point.load()
        except Exception as error:  # whatever another package's import raises
            family, reason = None, f"{type(error).__name__}: {error}"
        else:
            reason = f"it is a {type(family).__name__}, not a Family"
        taken = [known.model_type for known in found]
        if isinstance(family, Family) and family.model_type not in taken:
            found.append(family)
            continue
        reason = f"{family.model_type!r} is taken" if isinstance(family, Family) else reason
        warnings.warn(f"the model family {point.value!r} of an installed package is left out: {reason}", stacklevel=3)
    return tuple(found)


def find_family(model_type: Any = None, processor_classes: Sequence[Any] = ()) -> Family:
    """The family of a checkpoint's files: by the model's type, else by the first processor class that is known, else
    the first family."""
    known = families()
    by_class = {family.processor_class: family for family in reversed(known)}
    for family in known:
        if family.model_type == model_type:
            return family
    return next((by_class[name] for name in processor_classes if name in by_class), known[0])


def family_of(part: Config) -> Family:
    """The family of a part's config: the first whose model has a part of that class. Raises ValueError without one."""
    for family in families():
        if type(part) in _classes_in(family.config_class):  # type: ignore[arg-type]  # a class can be hashed
            return family
    raise ValueError(f"{type(part).__name__} belongs to no family; register one whose config holds it")


@cache
def _classes_in(config: type[Config]) -> frozenset[type[Config]]:
    """The classes of a config and of all configs inside it."""
    kinds = [kind for kind, _ in kinds_of(config).values()]  # type: ignore[arg-type]
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]
    return frozenset((config,)).union(*(_classes_in(kind) for kind in inner))  # type: ignore[arg-type]
