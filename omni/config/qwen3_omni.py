"""Qwen3-Omni: the configuration of every part in the Hub's own keys, and the facts of the family.

A field is named as its key. Its default is what the reference assumes when the key is absent from the file; these are
NOT the released values (see `configs/qwen3_omni_30b_a3b.json` for those). Keys that this library does not know are
kept in `extra` and written back unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omni.config.decoder import CodecRules, DecoderConfig, MoEConfig, SpeechRules
from omni.config.encoders import AudioTransformerConfig, VisionTransformerConfig
from omni.config.family import RELEASED, Family, KeyNames
from omni.config.model import OmniConfig, ThinkerConfig
from omni.config.positions import PositionRule
from omni.config.reading import Config, extra_field, optional, positive, require


@dataclass(frozen=True)
class ThinkerTextConfig(MoEConfig):
    """The Thinker's decoder."""

    hidden_size: int = 2048
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    model_type: str = "qwen3_omni_moe_text"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _default_theta = 1000000.0


@dataclass(frozen=True)
class AudioEncoderConfig(AudioTransformerConfig):
    """AuT, the audio encoder.

    `n_window` and `n_window_infer` count mel frames: half a conv chunk, and one attention window.
    """

    n_window: int = 50
    n_window_infer: int = 800
    downsample_hidden_size: int = 480
    model_type: str = "qwen3_omni_moe_audio_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def attention_frames(self) -> int:
        return self.n_window_infer

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "downsample_hidden_size")
        require(
            self.n_window_infer >= self.chunk_frames,
            f"{where}: n_window_infer {self.n_window_infer} is shorter than one chunk of 2 * n_window = "
            f"{self.chunk_frames} mel frames",
        )


@dataclass(frozen=True)
class VisionEncoderConfig(VisionTransformerConfig):
    """The vision encoder: ViT, merger and DeepStack taps."""

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    patch_size: int = 16
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = optional()
    model_type: str = "qwen3_omni_moe_vision_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def num_taps(self) -> int:  # type: ignore[override]
        return len(self.deepstack_visual_indexes)

    def in_words(self) -> str:
        return f"{super().in_words()}, taps after layers {', '.join(map(str, self.deepstack_visual_indexes)) or 'none'}"

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "num_position_embeddings")
        require(
            int(self.num_position_embeddings**0.5) ** 2 == self.num_position_embeddings,
            f"{where}.num_position_embeddings {self.num_position_embeddings} must be a square",
        )
        taps = self.deepstack_visual_indexes
        require(
            all(0 <= i < self.depth for i in taps) and list(taps) == sorted(set(taps)),
            f"{where}.deepstack_visual_indexes {list(taps)} must rise within 0..depth - 1 = {self.depth - 1}",
        )
        require(
            self.hidden_act in ("gelu_pytorch_tanh", "gelu"), f"{where}.hidden_act {self.hidden_act!r} is not supported"
        )


@dataclass(frozen=True)
class Qwen3ThinkerConfig(ThinkerConfig):
    """The Thinker: a decoder of experts, AuT, and the vision encoder with its taps."""

    text_config: ThinkerTextConfig = field(default_factory=ThinkerTextConfig)
    audio_config: AudioEncoderConfig | None = None
    vision_config: VisionEncoderConfig | None = None
    model_type: str = "qwen3_omni_moe_thinker"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()


@dataclass(frozen=True)
class TalkerTextConfig(MoEConfig):
    """The Talker's decoder: experts plus one shared expert. `vocab_size` counts codec ids."""

    vocab_size: int = 3072
    num_hidden_layers: int = 20
    num_key_value_heads: int = 2
    moe_intermediate_size: int = 384
    shared_expert_intermediate_size: int = 768
    norm_topk_prob: bool = False
    model_type: str = "qwen3_omni_moe_talker_text"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    def is_sparse(self, layer: int) -> bool:
        return True  # all layers of the reference's Talker hold experts, whatever the file says


@dataclass(frozen=True)
class MTPConfig(DecoderConfig):
    """The residual-code head, called code predictor in the checkpoint."""

    vocab_size: int = 2048
    num_hidden_layers: int = 5
    num_key_value_heads: int = 8
    head_dim: int | None = 128
    intermediate_size: int = 3072
    num_code_groups: int = 32
    tie_word_embeddings: bool = False
    model_type: str = "qwen3_omni_moe_talker_code_predictor"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    def in_words(self) -> str:
        return f"{super().in_words()}, {self.num_code_groups - 1} of {self.num_code_groups} codes"

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "vocab_size")
        layers = self.extra.get("layer_types")
        sliding = isinstance(layers, list) and "sliding_attention" in layers
        require(
            not sliding or self.sliding_window is None or self.sliding_window >= self.num_code_groups,
            f"{where}: a sliding_window of {self.sliding_window} over {self.num_code_groups} codes is not supported; "
            "every residual code sees the ones before it, so use 'full_attention' in layer_types",
        )


@dataclass(frozen=True)
class TalkerConfig(SpeechRules, Config):
    """The Talker: decoder, residual-code head, codec control ids and voices."""

    voice_rows = True
    text_config: TalkerTextConfig = field(default_factory=TalkerTextConfig)
    code_predictor_config: MTPConfig = field(default_factory=MTPConfig)
    num_code_groups: int = 32
    thinker_hidden_size: int = 2048
    accept_hidden_layer: int = 18
    codec_eos_token_id: int = 4198
    codec_nothink_id: int = 4203
    codec_think_bos_id: int = 4204
    codec_think_eos_id: int = 4205
    codec_pad_id: int = 4196
    codec_bos_id: int = 4197
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    audio_start_token_id: int = 151669
    position_id_per_seconds: float = 25
    spatial_merge_size: int = 2
    speaker_id: dict[str, int] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_type: str = ""
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def num_codes(self) -> int:
        """Size of codebook 0; codec ids from here on are control ids (the last 1024 of the vocabulary)."""
        return self.text_config.vocab_size - 1024

    @property
    def position_rule(self) -> PositionRule:
        """How positions follow time."""
        return PositionRule(self.position_id_per_seconds)

    @property
    def weights_std(self) -> float:
        return self.text_config.weights_std

    def in_words(self) -> str:
        return f"{self.text_config.in_words()}, reads layer {self.accept_hidden_layer} of the Thinker"

    def validate(self, where: str) -> None:
        vocab = self.text_config.vocab_size
        require(self.position_id_per_seconds > 0, f"{where}.position_id_per_seconds must be positive")
        require(
            self.num_code_groups == self.code_predictor_config.num_code_groups and self.num_code_groups >= 2,
            f"{where}.num_code_groups {self.num_code_groups} must equal code_predictor_config.num_code_groups "
            f"{self.code_predictor_config.num_code_groups} and be at least 2",
        )
        require(
            self.code_predictor_config.hidden_size == self.text_config.hidden_size,
            f"{where}: code_predictor_config.hidden_size {self.code_predictor_config.hidden_size} must equal "
            f"text_config.hidden_size {self.text_config.hidden_size}",
        )
        require(vocab > 1024, f"{where}.text_config.vocab_size {vocab} leaves no codes below its 1024 control ids")
        names = ("eos_token", "nothink", "think_bos", "think_eos", "pad", "bos")
        ids = {f"codec_{name}_id": getattr(self, f"codec_{name}_id") for name in names}
        for name, value in {**ids, **{f"speaker_id[{k!r}]": v for k, v in (self.speaker_id or {}).items()}}.items():
            require(
                type(value) is int and 0 <= value < vocab,
                f"{where}.{name} {value!r} lies outside the codec vocabulary of {vocab}",
            )


@dataclass(frozen=True)
class SourceFilterConfig(Config):
    """A codec decoder's other way to sound, omni's own: see `omni.code2wav.source_filter`.

    width and num_layers: of its network; num_bands: of an envelope; period: samples between two settings of the
    filters, of which a step of the network makes `settings_a_step`; n_fft: of the cepstrum, about as long as a filter
    sounds.
    """

    width: int = 192
    num_layers: int = 5
    num_bands: int = 80
    period: int = 120
    settings_a_step: int = 2
    n_fft: int = 1024
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    def validate(self, where: str) -> None:
        positive(self, where, "width", "num_layers", "period", "settings_a_step", "n_fft")
        require(self.num_bands >= 2, f"{where}.num_bands must be at least 2, got {self.num_bands}")
        require(self.n_fft % 2 == 0, f"{where}.n_fft must be even, got {self.n_fft}")


@dataclass(frozen=True)
class Code2WavConfig(CodecRules, DecoderConfig):
    """The codec decoder. `hidden_size` .. `sliding_window` describe its transformer.

    source_filter: omni then sounds codes by it, and by convolutions where it is absent, as every other library does.
    """

    codebook_size: int = 2048
    num_quantizers: int = 16
    num_hidden_layers: int = 8
    intermediate_size: int = 3072
    max_position_embeddings: int = 8000
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 72
    layer_scale_initial_scale: float = 0.01
    decoder_dim: int = 1536
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    upsampling_ratios: tuple[int, ...] = (2, 2)
    source_filter: SourceFilterConfig | None = optional()
    model_type: str = ""
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def hop_length(self) -> int:
        """Samples a frame (released: 1920)."""
        return math.prod((*self.upsampling_ratios, *self.upsample_rates))

    @property
    def num_codes(self) -> int:
        """Codes of a codebook that can be decoded."""
        return self.codebook_size

    def in_words(self) -> str:
        return (
            f"{self.num_quantizers} codebooks of {self.codebook_size}, {self.num_hidden_layers} layers of "
            f"{self.hidden_size}, {self.hop_length} samples a frame"
        )

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "codebook_size", "num_quantizers", "decoder_dim")
        require(
            self.decoder_dim % 2 ** len(self.upsample_rates) == 0,
            f"{where}.decoder_dim {self.decoder_dim} must be divisible by 2 for each of "
            f"{len(self.upsample_rates)} upsample_rates",
        )
        require(min((1, *self.upsample_rates, *self.upsampling_ratios)) > 0, f"{where}: rates must be positive")
        require(self.sliding_window is None or self.sliding_window > 0, f"{where}.sliding_window must be positive")
        source = self.source_filter
        require(
            source is None or self.hop_length % (source.period * source.settings_a_step) == 0,
            f"{where}.source_filter: period {source and source.period} times settings_a_step "
            f"{source and source.settings_a_step} must divide {self.hop_length}, a frame's samples",
        )


@dataclass(frozen=True)
class Qwen3OmniConfig(OmniConfig):
    """The whole model."""

    thinker_config: Qwen3ThinkerConfig | None = optional()
    talker_config: TalkerConfig | None = optional()
    code2wav_config: Code2WavConfig | None = optional()
    model_type: str = "qwen3_omni_moe"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _architecture = "Qwen3OmniMoeForConditionalGeneration"

    def describe(self) -> dict[str, str]:
        out = super().describe()
        if "talker" in self.parts and self.talker_config is not None:
            out["talker, residual codes"] = self.talker_config.code_predictor_config.in_words()
        return out

    def validate_parts(self, where: str) -> None:
        talker, code2wav, text = self.talker_config, self.code2wav_config, self.thinker.text_config
        assert talker is not None and code2wav is not None
        require(
            talker.thinker_hidden_size == text.hidden_size,
            f"talker_config.thinker_hidden_size {talker.thinker_hidden_size} must equal "
            f"thinker_config.text_config.hidden_size {text.hidden_size}",
        )
        require(
            0 <= talker.accept_hidden_layer <= text.num_hidden_layers,
            f"talker_config.accept_hidden_layer {talker.accept_hidden_layer} must lie in "
            f"0..thinker layers = {text.num_hidden_layers}",
        )
        require(
            talker.num_code_groups == code2wav.num_quantizers,
            f"talker_config.num_code_groups {talker.num_code_groups} must equal "
            f"code2wav_config.num_quantizers {code2wav.num_quantizers}",
        )
        require(
            max(talker.num_codes, talker.code_predictor_config.vocab_size) <= code2wav.codebook_size,
            f"the Talker writes codes up to {max(talker.num_codes, talker.code_predictor_config.vocab_size)} but "
            f"code2wav_config.codebook_size is {code2wav.codebook_size}",
        )


_MERGED = 32 * 32  # pixels of a visual token
QWEN3_OMNI = Family(
    model_type="qwen3_omni_moe",
    config="omni.config.qwen3_omni:Qwen3OmniConfig",
    parts={
        "audio_encoder": "omni.encoders.audio:AudioEncoder",
        "vision_encoder": "omni.encoders.vision:VisionEncoder",
        "thinker": "omni.thinker.thinker:Thinker",
        "talker": "omni.talker.talker:Talker",
        "code2wav": "omni.code2wav.code2wav:Code2Wav",
    },
    keys=KeyNames(
        renames=(
            ("audio_encoder.", "thinker.audio_tower."),
            ("vision_encoder.", "thinker.visual."),
            ("thinker.lm_head.", "thinker.lm_head."),
            ("thinker.", "thinker.model."),
            ("talker.text_projection.", "talker.text_projection."),
            ("talker.hidden_projection.", "talker.hidden_projection."),
            ("talker.codec_head.", "talker.codec_head."),
            ("talker.mtp.lm_head.", "talker.code_predictor.lm_head."),
            ("talker.mtp.", "talker.code_predictor.model."),
            ("talker.", "talker.model."),
            ("code2wav.", "code2wav."),
        ),
        # the names that transformers 5 uses in memory, and writes with save_original_format=False
        also_read=(
            ("audio_encoder.", "thinker.model.audio_tower."),
            ("vision_encoder.", "thinker.model.visual."),
            ("thinker.", "thinker.model.language_model."),
        ),
        derived=(".inv_freq", ".positional_embedding.positional_embedding"),
        parts=("thinker", "talker", "code2wav"),
        own=("code2wav.source_filter.",),
    ),
    turn_layout="omni.talker.layout:UserTurnsLayout",
    processor_class="Qwen3OmniMoeProcessor",
    tokens={
        "audio_token": "<|audio_pad|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    rule=PositionRule(13.0),
    n_window=50,
    chunk_step=8,  # 3 stride-2 convs
    clip_end="mirror",
    audio_tokens="omni.encoders.audio:num_audio_tokens",
    frame_pixels=(128 * _MERGED, 768 * _MERGED),
    preprocessor=RELEASED / "qwen3_omni_moe.json",
    default_speaker="ethan",
    # neither stands in a released file; the reference writes them into its code
    code_sampling={"temperature": 0.9, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.05},
    residual_sampling={"temperature": 1.0, "top_k": 50, "top_p": 0.8},
)
