"""Qwen2.5-Omni: the configuration of its parts, how its `config.json` spells them, and the facts of the family.

A field is named as in the first family, so that the rest of the library reads either; `_spellings` gives the file's
key where that differs. Defaults are what the reference assumes when a key is absent, not the released values
(`configs/qwen2_5_omni_7b.json` and `qwen2_5_omni_3b.json` have those: the vision encoder's hidden_size is 1280, and
the encoders' output_dim and out_hidden_size are the width of the Thinker, 3584 or 2048). Token2Wav has a file of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omni.config.decoder import LanguageConfig, SpeechRules
from omni.config.encoders import AudioTransformerConfig, VisionTransformerConfig
from omni.config.family import RELEASED, Family, KeyNames
from omni.config.model import OmniConfig, ThinkerConfig
from omni.config.positions import PositionRule
from omni.config.reading import extra_field, optional, positive, require
from omni.config.token2wav import Token2WavConfig

# Voices of the released checkpoints: the Thinker id that opens the reply. A folder's spk_dict.pt wins (FACTS 3.8).
RELEASED_SPEAKERS = {"chelsie": 151872, "ethan": 151870}
_MEDIA_KEYS = {f"{kind}_token_id": f"{kind}_token_index" for kind in ("audio", "image", "video")}
# The reference reads these as other names of the fields; a file may hold both.
_AUDIO_SYNONYMS = {
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "hidden_size": "d_model",
}


@dataclass(frozen=True)
class WhisperAudioEncoderConfig(AudioTransformerConfig):
    """The Whisper-shaped audio encoder. `n_window` counts mel frames: half a block, which is convolved and attended to
    by itself (released: a block of 2 s)."""

    model_type: str = "qwen2_5_omni_audio_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _passive = AudioTransformerConfig._passive | _AUDIO_SYNONYMS.keys()

    def validate(self, where: str) -> None:
        super().validate(where)
        for key, name in _AUDIO_SYNONYMS.items():
            require(
                self.extra.get(key) in (None, getattr(self, name)),
                f"{where}.{key} = {self.extra.get(key)!r} contradicts its other spelling {name} = "
                f"{getattr(self, name)!r}; write {name} alone",
            )
        require(
            self.n_window % 2 == 0,
            f"{where}.n_window {self.n_window} must be even: pairs of a block's n_window positions become one token",
        )


@dataclass(frozen=True)
class WindowVisionEncoderConfig(VisionTransformerConfig):
    """The vision encoder with window attention: ViT and merger, as in Qwen2.5-VL.

    `window_size` counts pixels. Blocks named in `fullatt_block_indexes` see a whole grid step instead of a window;
    an index without a block is without effect.
    """

    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = optional()
    model_type: str = "qwen2_5_omni_vision_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def window_tokens(self) -> int:
        """Side of a window in merged tokens (released: 4)."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def in_words(self) -> str:
        whole = ", ".join(map(str, self.fullatt_block_indexes)) or "none"
        return f"{super().in_words()}, windows of {self.window_size} pixels but in layers {whole}"

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "window_size")
        kind = (self.rope_parameters or {}).get("rope_type", "axial")
        require(
            kind in ("axial", "default"),
            f"{where}.rope_parameters.rope_type {kind!r} is not supported; it must be 'axial'",
        )
        require(
            self.window_tokens >= 1,
            f"{where}.window_size {self.window_size} is smaller than one token of spatial_merge_size * patch_size = "
            f"{self.spatial_merge_size * self.patch_size} pixels",
        )
        require(
            min((0, *self.fullatt_block_indexes)) == 0,
            f"{where}.fullatt_block_indexes {list(self.fullatt_block_indexes)} must not be negative",
        )
        require(self.hidden_act == "silu", f"{where}.hidden_act must be 'silu', got {self.hidden_act!r}")


@dataclass(frozen=True)
class DenseConfig(LanguageConfig):
    """A dense decoder with biases on queries, keys and values, without their norms, rotary axes in blocks."""

    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    sliding_window: int | None = 32768
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

    text_config: DenseTextConfig = field(default_factory=DenseTextConfig)
    audio_config: WhisperAudioEncoderConfig | None = None
    vision_config: WindowVisionEncoderConfig | None = None
    seconds_per_chunk: float = 2
    model_type: str = "qwen2_5_omni_thinker"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _spellings: ClassVar[Mapping[str, str]] = _MEDIA_KEYS
    _passive: ClassVar[frozenset[str]] = frozenset(("vision_token_id",))

    @property
    def position_rule(self) -> PositionRule:
        return joint_rule(self.position_id_per_seconds, self.seconds_per_chunk)

    def validate(self, where: str) -> None:
        super().validate(where)
        require(self.seconds_per_chunk > 0, f"{where}.seconds_per_chunk must be positive")


@dataclass(frozen=True)
class DenseTalkerConfig(SpeechRules, DenseConfig):
    """The Talker: a decoder over one codebook, whose values lie beside the codec and text ids of its prompt.

    `thinker_hidden_size` is the width of the Thinker's states and of the codec embedding alike.
    """

    vocab_size: int = 8448
    thinker_hidden_size: int = 3584
    head_dim: int | None = 128
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
    position_id_per_seconds: float = 25
    seconds_per_chunk: float = 2
    spatial_merge_size: int = 2
    speaker_id: dict[str, int] = field(default_factory=lambda: dict(RELEASED_SPEAKERS))
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

    def in_words(self) -> str:
        return f"{super().in_words()}, reads the last layer of the Thinker"

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
    """The whole model.

    Chat ids are not in its files but in its vocabulary, the text ids of speech in its Talker's values.
    """

    thinker_config: DenseThinkerConfig | None = optional()
    talker_config: DenseTalkerConfig | None = optional()
    code2wav_config: Token2WavConfig | None = optional()
    model_type: str = "qwen2_5_omni"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

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
        talker, text = self.talker_config, self.thinker.text_config
        assert talker is not None
        require(
            talker.thinker_hidden_size == text.hidden_size,
            f"talker_config.embedding_size {talker.thinker_hidden_size} must equal "
            f"thinker_config.text_config.hidden_size {text.hidden_size}",
        )


def joint_rule(rate: float, chunk_s: float) -> PositionRule:
    """Whole positions, a video with its sound in chunks of time between shared marks (Qwen2.5-Omni, section 2.2)."""
    return PositionRule(rate, whole=True, chunk_s=chunk_s, joint_marks=True)


_DIT, _BIGVGAN = "token2wav.code2wav_dit_model.", "token2wav.code2wav_bigvgan_model."
_MERGED = 28 * 28  # pixels of a visual token
QWEN2_5_OMNI = Family(
    model_type="qwen2_5_omni",
    config="omni.config.qwen2_5_omni:Qwen2_5OmniConfig",
    parts={
        "audio_encoder": "omni.encoders.whisper_audio:WhisperAudioEncoder",
        "vision_encoder": "omni.encoders.window_vision:WindowVisionEncoder",
        "thinker": "omni.thinker.thinker:Thinker",
        "talker": "omni.talker.single_codebook:SingleCodebookTalker",
        "code2wav": "omni.code2wav.token2wav:Token2Wav",
    },
    keys=KeyNames(
        renames=(
            ("audio_encoder.", "thinker.audio_tower."),
            ("vision_encoder.", "thinker.visual."),
            ("thinker.lm_head.", "thinker.lm_head."),
            ("thinker.", "thinker.model."),
            ("talker.input_projection.", "talker.thinker_to_talker_proj."),
            ("talker.codec_head.", "talker.codec_head."),
            ("talker.codec_embedding.", "talker.model.embed_tokens."),
            ("talker.", "talker.model."),
            ("code2wav.dit.code_embed.", f"{_DIT}text_embed.codec_embed."),
            ("code2wav.dit.input_proj.", f"{_DIT}input_embed.proj."),
            ("code2wav.dit.speaker_encoder.", f"{_DIT}input_embed.spk_encoder."),
            ("code2wav.dit.blocks.", f"{_DIT}transformer_blocks."),
            ("code2wav.dit.", _DIT),
            ("code2wav.bigvgan.", _BIGVGAN),
        ),
        # the names that transformers 5 uses in memory, and writes with save_original_format=False
        also_read=(
            ("audio_encoder.", "thinker.model.audio_tower."),
            ("vision_encoder.", "thinker.model.visual."),
            ("thinker.", "thinker.model.language_model."),
        ),
        derived=(
            *(".inv_freq", ".positional_embedding.positional_embedding"),
            *(".upsample.filter", ".downsample.filter"),
        ),
        parts=("thinker", "talker", "token2wav"),
    ),
    turn_layout="omni.talker.layout:WholePromptLayout",
    processor_class="Qwen2_5OmniProcessor",
    tokens={
        "audio_token": "<|AUDIO|>",
        "image_token": "<|IMAGE|>",
        "video_token": "<|VIDEO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
    },
    rule=joint_rule(25.0, 2.0),
    n_window=100,
    clip_end="silence",  # the release fills every clip up to 300 s before it looks at the spectrum
    audio_tokens="omni.encoders.whisper_audio:num_whisper_tokens",
    frame_pixels=(128 * _MERGED, 768 * _MERGED),
    preprocessor=RELEASED / "qwen2_5_omni.json",
    speech_system="You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving "
    "auditory and visual inputs, as well as generating text and speech.",  # the model card's
    default_speaker="chelsie",
    code_sampling={"temperature": 0.9, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.05},
    schedule_in_words="omni.code2wav.schedule_report:schedule_in_words",
)
