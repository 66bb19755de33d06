"""A checkpoint's processor files on disk: found, read in both layouts, written back.

Released layout: preprocessor_config.json (audio and images in one mapping) and chat_template.json. Layout of
transformers 5: processor_config.json (one mapping for each part) and chat_template.jinja. Both have tokenizer files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omni.config.family import Family, find_family
from omni.config.locate import PROCESSOR_FILES, locate
from omni.config.model import whole_config
from omni.config.positions import PositionRule
from omni.config.reading import read_json
from omni.processing.settings import check_audio, check_pixels

_JSON_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of further ones, each by its name

# What the image and video processors are built from; anything else in a shared file belongs to another part.
_PIXEL_KEYS = (
    *("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "rescale_factor"),
    *("max_pixels", "merge_size", "min_pixels", "patch_size", "resample", "resized_height", "resized_width"),
    *("size", "temporal_patch_size"),
)
_FRAME_KEYS = ("min_frames", "max_frames")


@dataclass(frozen=True)
class ProcessorFiles:
    """What the files of a folder say.

    `json_files` are the preprocessor files as read, by name; they are written back unchanged. `model` is the Thinker's
    part of config.json where the folder has one. `family`: what the files leave unsaid.
    """

    folder: Path
    json_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    chat_template: str | None = None
    tool_template: str | None = None  # for conversations with tools, where that is another one
    model: dict[str, Any] = field(default_factory=dict)
    family: Family = field(default_factory=find_family)

    @property
    def settings(self) -> dict[str, Any]:
        """Values of the processor itself (position_id_per_seconds, seconds_per_chunk, n_window)."""
        return self.json_files.get("processor_config.json", {})

    @property
    def position_rule(self) -> PositionRule:
        """How positions follow time, and in which order the tokens of a video with sound stand."""
        rule = self.family.rule
        rate = self._positive("position_id_per_seconds", self._value("position_id_per_seconds", rule.rate))
        if rule.chunk_s is not None:
            chunk_s = self._positive("seconds_per_chunk", self._value("seconds_per_chunk", rule.chunk_s))
            rule = replace(rule, chunk_s=float(chunk_s))
        return replace(rule, rate=float(rate))

    def _value(self, name: str, usual: float) -> Any:
        return self.settings.get(name, self.model.get(name, usual))

    @property
    def n_window(self) -> int:
        """Half the mel frames of one chunk of the audio encoder (released: Qwen3 50, Qwen2.5 100)."""
        audio, usual = self.model.get("audio_config"), self.family.n_window
        own = audio.get("n_window", usual) if isinstance(audio, Mapping) else usual
        return int(self._positive("n_window", self.settings.get("n_window", own)))

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for, if config.json is there and says it."""
        text = self.model.get("text_config")
        value = text.get("max_position_embeddings") if isinstance(text, Mapping) else None
        return value if type(value) is int and value > 0 else None

    def _positive(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{self.folder}: {name} must be a positive number, got {value!r}")
        return value

    @property
    def _where(self) -> str:
        return f"the preprocessor files of {self.folder}"

    @property
    def audio_settings(self) -> dict[str, Any]:
        """Values of the mel front end. Raises ValueError for those that cannot be followed."""
        values = self._part("feature_extractor")
        check_audio(values, self._where, own="feature_extractor" in self.settings)
        return values

    @property
    def image_settings(self) -> dict[str, Any]:
        """Arguments of the image processor."""
        return self._pixel_settings(self._part("image_processor"), _PIXEL_KEYS)

    @property
    def video_settings(self) -> dict[str, Any]:
        """Arguments of the video processor; the released layout has none of its own and shares the images'."""
        own = self.json_files.get("video_preprocessor_config.json")
        own = self._part("video_processor") if own is None else own
        return self._pixel_settings(own, (*_PIXEL_KEYS, *_FRAME_KEYS))

    def _pixel_settings(self, values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
        """Those of the values that pictures are prepared by. Raises ValueError for what cannot be followed."""
        check_pixels(values, self._where)
        return {key: values[key] for key in keys if values.get(key) is not None}

    def _part(self, name: str) -> dict[str, Any]:
        part = self.settings.get(name)
        if part is None:
            return self.json_files.get("preprocessor_config.json", {})
        if not isinstance(part, Mapping):
            raise ValueError(f"{self.folder / 'processor_config.json'}: {name} must be a JSON object")
        return dict(part)

    def save(self, folder: Path, chat_template: str, tool_template: str | None = None) -> None:
        """Write the preprocessor files and the chat templates into an existing folder, as transformers does."""
        for name, values in self.json_files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if tool_template is not None:
            (folder / _MORE_TEMPLATES).mkdir(exist_ok=True)
            (folder / _MORE_TEMPLATES / "tool_use.jinja").write_text(tool_template, encoding="utf-8")


def load_files(folder_or_hub_id: str | Path, **hub_options: Any) -> ProcessorFiles:
    """Find and read the processor files of a folder or Hub id.

    Raises FileNotFoundError naming what is missing, ValueError for malformed files, OSError for a failed download.
    """
    folder = locate(folder_or_hub_id, files=PROCESSOR_FILES, **hub_options)
    has_vocabulary = (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    missing = [] if has_vocabulary else ["tokenizer.json (or vocab.json and merges.txt)"]
    if not (folder / "tokenizer_config.json").is_file():
        missing.append("tokenizer_config.json")
    json_files = {name: read_json(folder / name) for name in _JSON_FILES if (folder / name).is_file()}
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; copy the tokenizer and preprocessor files of the release there"
        )
    config = whole_config(read_json(folder / "config.json") if (folder / "config.json").is_file() else {})
    classes = [values.get("processor_class") for values in json_files.values()]
    classes.append(read_json(folder / "tokenizer_config.json").get("processor_class"))
    family = find_family(config.get("model_type"), classes)
    nested = "image_processor" in json_files.get("processor_config.json", {})
    if "preprocessor_config.json" not in json_files and not nested:  # trainers often leave it out
        json_files["preprocessor_config.json"] = read_json(family.preprocessor)
    thinker = family.config_class.by_field(config).get("thinker_config")
    model = dict(thinker) if isinstance(thinker, Mapping) else {}
    return ProcessorFiles(folder, json_files, *_read_templates(folder), model, family)


def _read_templates(folder: Path) -> tuple[str | None, str | None]:
    """The checkpoint's chat template, if it has a file of its own, and the one for conversations with tools."""
    jinja, legacy = (folder / name for name in _TEMPLATE_FILES)
    if jinja.is_file():
        more = folder / _MORE_TEMPLATES / "tool_use.jinja"
        return _read_text(jinja), _read_text(more) if more.is_file() else None
    if legacy.is_file():
        return choose_templates(read_json(legacy).get("chat_template"), f"{legacy}, key 'chat_template',")
    return None, None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def choose_templates(found: Any, where: str) -> tuple[str, str | None]:
    """The template for conversations and the one for those with tools (None: the same), of one or of several by name.

    Several are a mapping or a list of {"name", "template"}: those called default and tool_use count. Raises ValueError
    where there is neither one template nor a default.
    """
    if isinstance(found, list) and all(isinstance(one, Mapping) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    named = dict(found) if isinstance(found, Mapping) else {"default": found}
    if len(named) == 1:
        named = {"default": next(iter(named.values()))}
    usual, tools = named.get("default"), named.get("tool_use")
    if not isinstance(usual, str) or not (tools is None or isinstance(tools, str)):
        names = ", ".join(map(str, named)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{where} must hold a template, or several by name with one called 'default'; got {names}")
    return usual, tools


def build_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer (transformers). Raises ValueError where its files are malformed."""
    from transformers import AutoTokenizer, PretrainedConfig, logging

    verbosity = logging.get_verbosity()
    options: dict[str, Any] = {}
    logging.set_verbosity_error()  # it also reads config.json, and remarks on keys that concern other parts
    if (folder / "config.json").is_file() and read_json(folder / "tokenizer_config.json").get("tokenizer_class"):
        options["config"] = PretrainedConfig()  # all that it needs of the file is the family
        options["config"].model_type = str(read_json(folder / "config.json").get("model_type", ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # the library and its Rust backend raise many classes
        raise ValueError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer in {folder} is a {type(tokenizer).__name__}; a fast (BPE) tokenizer is needed")
    return tokenizer
