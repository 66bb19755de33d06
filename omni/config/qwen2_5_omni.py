"""Configuration of the second family, Qwen2.5-Omni: dense Thinker and Talker, and how its `config.json` spells them.

A field is named as in the first family, so that the rest of the library reads either; `_spellings` gives the file's
key where that differs. Defaults are what the reference assumes, not the released values (`configs/qwen2_5_omni_7b.json`
and `qwen2_5_omni_3b.json` have those).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omni.config.decoder import LanguageConfig, SpeechRules
from omni.config.positions import PositionRule
from omni.config.qwen2_5_encoders import WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.config.qwen3_omni import OmniConfig, ThinkerConfig
from omni.config.reading import extra_field, nested, require
from omni.config.token2wav import Token2WavConfig

# Voices of the released checkpoints: the Thinker id that opens the reply. A folder's spk_dict.pt wins (FACTS 3.8).
RELEASED_SPEAKERS = {"chelsie": 151872, "ethan": 151870}
_MEDIA_KEYS = {f"{kind}_token_id": f"{kind}_token_index" for kind in ("audio", "image", "video")}


@dataclass(frozen=True)
class DenseConfig(LanguageConfig):
    """A dense decoder with biases on queries, keys and values, without their norms, rotary axes in blocks."""

    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    sliding_window: int | None = field(default=32768, metadata={"kind": int})
    use_sliding_window: bool = False

    qk_norm = False
    qkv_bias = True
    output_bias = False
    mrope_interleaved = False
    _default_theta = 1000000.0
    _default_sections = (16, 24, 24)
    _not_in_files: ClassVar[frozenset[str]] = frozenset(("attention_bias",))

    def validate(self, where: str) -> None:
        super().validate(where)
        require(not self.use_sliding_window, f"{where}.use_sliding_window is not supported; every layer sees all")


@dataclass(frozen=True)
class DenseTextConfig(DenseConfig):
    """The Thinker's decoder."""

    vocab_size: int = 152064
    tie_word_embeddings: bool = True  # without effect: the Thinker's own flag decides
    model_type: str = "qwen2_5_omni_text"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()


@dataclass(frozen=True)
class DenseThinkerConfig(ThinkerConfig):
    """Encoders and decoder of the Thinker."""

    text_config: DenseTextConfig = nested(DenseTextConfig)  # type: ignore[assignment]  # shares LanguageConfig
    audio_config: WhisperAudioEncoderConfig | None = nested(WhisperAudioEncoderConfig, optional=True)  # type: ignore[assignment]
    vision_config: WindowVisionEncoderConfig | None = nested(WindowVisionEncoderConfig, optional=True)  # type: ignore[assignment]
    seconds_per_chunk: float = field(default=2, metadata={"kind": float})
    model_type: str = "qwen2_5_omni_thinker"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _spellings: ClassVar[Mapping[str, str]] = _MEDIA_KEYS

    num_taps = 0  # no DeepStack

    @property
    def position_rule(self) -> PositionRule:
        return joint_rule(self.position_id_per_seconds, self.seconds_per_chunk)

    def validate(self, where: str) -> None:
        self.validate_ids(where)
        require(self.seconds_per_chunk > 0, f"{where}.seconds_per_chunk must be positive")
        for name, key in (("audio_config", "output_dim"), ("vision_config", "out_hidden_size")):
            width = getattr(getattr(self, name), key, None)
            require(
                width in (None, self.text_config.hidden_size),
                f"{where}: {name}.{key} {width} must equal text_config.hidden_size {self.text_config.hidden_size}",
            )


@dataclass(frozen=True)
class DenseTalkerConfig(SpeechRules, DenseConfig):
    """The Talker: a decoder over one codebook, whose values lie beside the codec and text ids of its prompt.

    `thinker_hidden_size` is the width of the Thinker's states and of the codec embedding alike.
    """

    vocab_size: int = 8448
    thinker_hidden_size: int = 3584
    head_dim: int | None = field(default=128, metadata={"kind": int})
    codec_bos_id: int = 8293
    codec_eos_token_id: int = 8294
    codec_pad_id: int = 8292
    codec_mask_id: int = 8296
    tts_text_start_token_id: int = 151860
    tts_text_end_token_id: int = 151861
    tts_text_pad_token_id: int = 151859
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    audio_start_token_id: int = 151647
    position_id_per_seconds: float = field(default=25, metadata={"kind": float})
    seconds_per_chunk: float = field(default=2, metadata={"kind": float})
    spatial_merge_size: int = 2
    speaker_id: dict[str, int] = field(default_factory=lambda: dict(RELEASED_SPEAKERS), metadata={"kind": dict})
    tie_word_embeddings: bool = False
    model_type: str = "qwen2_5_omni_talker"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _spellings: ClassVar[Mapping[str, str]] = {
        **_MEDIA_KEYS,
        "thinker_hidden_size": "embedding_size",
        "codec_bos_id": "tts_codec_start_token_id",
        "codec_eos_token_id": "tts_codec_end_token_id",
        "codec_pad_id": "tts_codec_pad_token_id",
        "codec_mask_id": "tts_codec_mask_token_id",
    }
    _not_in_files: ClassVar[frozenset[str]] = frozenset(("attention_bias", "speaker_id"))

    num_code_groups = 1
    accept_hidden_layer: ClassVar[None] = None  # it hears the Thinker's states after the final norm
    default_speaker: ClassVar[str] = "chelsie"
    code_sampling: ClassVar[Mapping[str, float]] = {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    }

    @property
    def text_config(self) -> DenseTalkerConfig:
        """The decoder's values, which this family writes without a level of their own."""
        return self

    @property
    def num_codes(self) -> int:
        """Codec ids below the control ids."""
        return min(self.codec_bos_id, self.codec_eos_token_id, self.codec_pad_id, self.codec_mask_id)

    @property
    def codec_stop_ids(self) -> frozenset[int]:
        """Codec ids that end speech: the end itself, and padding (as released)."""
        return frozenset((self.codec_eos_token_id, self.codec_pad_id))

    @property
    def position_rule(self) -> PositionRule:
        """How positions follow time."""
        return joint_rule(self.position_id_per_seconds, self.seconds_per_chunk)

    def validate(self, where: str) -> None:
        super().validate(where)
        for name in ("position_id_per_seconds", "seconds_per_chunk", "thinker_hidden_size"):
            require(getattr(self, name) > 0, f"{where}.{name} must be positive")
        for name in ("codec_bos_id", "codec_eos_token_id", "codec_pad_id", "codec_mask_id"):
            value = getattr(self, name)
            require(
                0 <= value < self.vocab_size,
                f"{where}.{self._spellings[name]} {value} lies outside the codec vocabulary of {self.vocab_size}",
            )
        for voice, value in self.speaker_id.items():
            require(type(value) is int and value >= 0, f"{where}.speaker_id[{voice!r}] {value!r} is not a token id")


@dataclass(frozen=True)
class Qwen2_5OmniConfig(OmniConfig):
    """The whole model. `OmniConfig.from_dict` yields it for files of `model_type` qwen2_5_omni.

    Chat ids are not in its files but in its vocabulary, the text ids of speech in its Talker's values.
    """

    thinker_config: DenseThinkerConfig = nested(DenseThinkerConfig)
    talker_config: DenseTalkerConfig | None = field(  # type: ignore[assignment]  # read by the same names
        default=None, metadata={"kind": DenseTalkerConfig, "omit_none": True}
    )
    code2wav_config: Token2WavConfig | None = field(  # type: ignore[assignment]
        default=None, metadata={"kind": Token2WavConfig, "omit_none": True}
    )
    model_type: str = "qwen2_5_omni"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _model_type = "qwen2_5_omni"
    _architecture = "Qwen2_5OmniForConditionalGeneration"
    _spellings: ClassVar[Mapping[str, str]] = {"code2wav_config": "token2wav_config"}
    _text_ids: ClassVar[Mapping[str, str]] = {
        "tts_pad_token_id": "tts_text_pad_token_id",
        "tts_bos_token_id": "tts_text_start_token_id",
        "tts_eos_token_id": "tts_text_end_token_id",
    }
    _not_in_files: ClassVar[frozenset[str]] = frozenset(
        f"{name}_token_id" for name in ("im_start", "im_end", "system", "user", "assistant")
    ) | {"initializer_range"}

    def __post_init__(self) -> None:
        if self.talker_config is not None:
            for name, key in self._text_ids.items():
                object.__setattr__(self, name, getattr(self.talker_config, key))

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in self._text_ids}

    def validate_parts(self, where: str) -> None:
        talker, text = self.talker_config, self.thinker_config.text_config
        assert talker is not None
        require(
            talker.thinker_hidden_size == text.hidden_size,
            f"talker_config.embedding_size {talker.thinker_hidden_size} must equal "
            f"thinker_config.text_config.hidden_size {text.hidden_size}",
        )


def joint_rule(rate: float, chunk_s: float) -> PositionRule:
    """Whole positions, a video with its sound in chunks of time between shared marks (Qwen2.5-Omni, section 2.2)."""
    return PositionRule(rate, whole=True, chunk_s=chunk_s, joint_marks=True)
