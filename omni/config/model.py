"""The configuration of a whole model, of any family: its parts, the ids of its chat, and `config.json` on disk.

A family's own classes (`omni.config.qwen3_omni`, `omni.config.qwen2_5_omni`, or one from outside) build on these two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omni.config.decoder import LanguageConfig
from omni.config.encoders import AudioTransformerConfig, VisionTransformerConfig
from omni.config.family import Family, families, find_family
from omni.config.keywords import names_keywords
from omni.config.locate import CONFIG_FILES, locate
from omni.config.positions import PositionRule
from omni.config.reading import Config, extra_field, kinds_of, not_negative, optional, read_json, require
from omni.config.writing import atomic_folder


@dataclass(frozen=True)
class ThinkerConfig(Config):
    """Encoders and decoder of a Thinker, and the ids that mark media in its prompt.

    A null `audio_config` or `vision_config` builds a Thinker without that encoder.
    """

    text_config: LanguageConfig = field(default_factory=LanguageConfig)
    audio_config: AudioTransformerConfig | None = None
    vision_config: VisionTransformerConfig | None = None
    position_id_per_seconds: float = 25
    audio_start_token_id: int = 151647
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    user_token_id: int = 872
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_type: str = ""
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def num_taps(self) -> int:
        """DeepStack taps that the first decoder layers receive."""
        return self.vision_config.num_taps if self.vision_config else 0

    @property
    def position_rule(self) -> PositionRule:
        """How positions follow time."""
        return PositionRule(self.position_id_per_seconds)

    @property
    def weights_std(self) -> float:
        return self.text_config.weights_std

    def in_words(self) -> str:
        return self.text_config.in_words()

    def validate(self, where: str) -> None:
        require(self.position_id_per_seconds > 0, f"{where}.position_id_per_seconds must be positive")
        names = ("audio_token_id", "image_token_id", "video_token_id")
        not_negative(self, where, *names)
        kinds = ("audio", "image", "video", "audio_start", "vision_start")
        check_ids(self, where, self.text_config.vocab_size, *kinds)
        ids = [getattr(self, name) for name in names]
        require(len(set(ids)) == 3, f"{where}: {', '.join(names)} must differ from each other, got {ids}")
        text = self.text_config
        for name, key in (("audio_config", "output_dim"), ("vision_config", "out_hidden_size")):
            width = getattr(getattr(self, name), key, None)
            require(
                width in (None, text.hidden_size),
                f"{where}: {name}.{key} {width} must equal text_config.hidden_size {text.hidden_size}",
            )
        require(
            self.num_taps <= text.num_hidden_layers,
            f"{where}: {self.num_taps} DeepStack taps need as many decoder layers, got {text.num_hidden_layers}",
        )


@dataclass(frozen=True)
class OmniConfig(Config):
    """The whole model; `from_dict` and `from_pretrained` yield the class of the family that `model_type` names.

    A part whose config is None is not there. Without `talker_config` and `code2wav_config` (Thinking, Captioner) a
    model answers in text only; without `thinker_config` the config describes its parts alone.
    """

    thinker_config: ThinkerConfig | None = optional()
    talker_config: Any = optional()  # each family's own class, like the next one, or None
    code2wav_config: Any = optional()
    enable_audio_output: bool = True
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645
    tts_pad_token_id: int = 151671
    tts_bos_token_id: int = 151672
    tts_eos_token_id: int = 151673
    system_token_id: int = 8948
    user_token_id: int = 872
    assistant_token_id: int = 77091
    initializer_range: float | None = field(default=0.02, metadata={"omit_none": True})
    model_type: str = ""
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _architecture: ClassVar[str] = ""

    @property
    def family(self) -> Family:
        """The facts of this model's family."""
        return find_family(self.model_type)

    @property
    def thinker(self) -> ThinkerConfig:
        """The Thinker's values. Raises ValueError where there is no Thinker."""
        if self.thinker_config is None:
            raise ValueError(f"this model has no thinker: its config describes {' and '.join(self.parts)} alone")
        return self.thinker_config

    @property
    def vocabulary(self) -> int:
        """Text ids that the Thinker knows."""
        return self.thinker.text_config.vocab_size

    @property
    def has_talker(self) -> bool:
        """Whether this variant answers in speech."""
        return self.enable_audio_output and self.thinker_config is not None

    @property
    def parts(self) -> dict[str, Config]:
        """The configs of the parts that a model of this config has, by the names that they have in `OmniModel`."""
        found: dict[str, Config | None] = {}
        if self.thinker_config is not None:
            found["audio_encoder"] = self.thinker_config.audio_config
            found["vision_encoder"] = self.thinker_config.vision_config
            found["thinker"] = self.thinker_config
        if self.has_talker or self.thinker_config is None:
            found |= {"talker": self.talker_config, "code2wav": self.code2wav_config}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def dtype(self) -> str | None:
        """The name of the checkpoint's dtype (`dtype`, or `torch_dtype` in older files), if one is written."""
        written = (self.extra.get(key) for key in ("dtype", "torch_dtype"))
        return next((str(value).removeprefix("torch.") for value in written if value not in (None, "", "auto")), None)

    def describe(self) -> dict[str, str]:
        """What `omni info` says of each part, in a line."""
        return {name.replace("_", " "): part.in_words() for name, part in self.parts.items()}

    def validate(self, where: str) -> None:
        known = families()
        own = any(f.model_type == self.model_type and isinstance(self, f.config_class) for f in known)
        *names, last = (repr(f.model_type) for f in known)
        require(own, f"model_type {self.model_type!r} is not supported; omni loads {', '.join(names)} and {last}")
        # a part that is absent has no key; null for what every released checkpoint has is a broken file
        require(self.extra.get("thinker_config", ()) is not None, "thinker_config must be a JSON object, got NoneType")
        if self.thinker_config is None:
            require(bool(self.parts), "config.json describes no part: it has no thinker_config, talker_config or codec")
        else:
            check_ids(self, where, self.vocabulary, "im_start", "im_end", "system", "user", "assistant")
        if self.thinker_config is not None and self.enable_audio_output:
            require(
                self.talker_config is not None and self.code2wav_config is not None,
                "enable_audio_output is true but talker_config or code2wav_config is absent; "
                "set enable_audio_output to false for a text-only variant",
            )
            self.validate_parts(where)

    def validate_parts(self, where: str) -> None:
        """Raise ValueError where Thinker, Talker and codec decoder, which are all there, do not fit together."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> OmniConfig:
        """The config of the family that `model_type` names; see `Config.from_dict`."""
        if cls is not OmniConfig:
            values, unread = cls._without_what_is_absent(values)
            config = super().from_dict(values, where)
            return dataclasses.replace(config, extra={**config.extra, **unread}) if unread else config
        values = whole_config(values) if isinstance(values, Mapping) else values
        model_type = values.get("model_type") if isinstance(values, Mapping) else None
        return find_family(model_type).config_class.from_dict(values, where)

    @classmethod
    def _without_what_is_absent(cls, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The values, and apart from them the parts that a model without speech does not have and that cannot be read:
        other writers put the defaults of their classes there, which need not fit each other."""
        unread = {}
        if isinstance(values, Mapping) and values.get("enable_audio_output") is False and "thinker_config" in values:
            for name in ("talker_config", "code2wav_config"):
                key, kind = cls._spellings.get(name, name), kinds_of(cls)[name][0]  # type: ignore[arg-type]
                try:
                    if values.get(key) is not None:
                        kind.from_dict(values[key], key)
                except ValueError:
                    unread[key] = values[key]
        return {key: value for key, value in values.items() if key not in unread} if unread else values, unread

    @classmethod
    @names_keywords
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> OmniConfig:
        """Read `config.json` of a folder, a Hub id or a packaged checkpoint, or any JSON file.

        Raises FileNotFoundError, OSError or ValueError.
        """
        path = locate(
            folder_or_hub_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            files=CONFIG_FILES,
        )
        return cls.from_dict(read_json(path / "config.json" if path.is_dir() else path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` into an existing or new folder, whole or not at all. Raises OSError."""
        with atomic_folder(folder) as fresh:
            (fresh / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": [self._architecture], **super().to_dict()}


def check_ids(config: Config, where: str, vocabulary: int, *names: str) -> None:
    """Raise ValueError for token ids outside the vocabulary; a default stands for an id that the file does not give."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in (f"{name}_token_id" for name in names):
        value = getattr(config, name)
        require(
            value == defaults[name] or 0 <= value < vocabulary,
            f"{where}: {config._spellings.get(name, name)} {value} lies outside the vocabulary of {vocabulary}",
        )


def whole_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json holds; around the config of a Thinker that was saved alone, that of a model that answers in
    text."""
    for family in families():
        kind = kinds_of(family.config_class).get("thinker_config", (None,))[0]  # type: ignore[arg-type]
        if values.get("model_type") and values["model_type"] == getattr(kind, "model_type", None):
            break
    else:
        return values
    shared = ("dtype", "torch_dtype", "transformers_version", "quantization_config")
    outer = {key: values[key] for key in shared if key in values}
    inner = {key: value for key, value in values.items() if key not in (*shared, "architectures")}
    if "user_token_id" in values:
        outer["user_token_id"] = values["user_token_id"]
    return {"model_type": family.model_type, "enable_audio_output": False, **outer, "thinker_config": inner}
