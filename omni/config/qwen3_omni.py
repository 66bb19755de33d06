"""The configuration of every part, read from and written to the Hub's `config.json` in its own keys.

A field is named as its key. Its default is what the reference assumes when the key is absent from the file; these are
NOT the released values (see `configs/qwen3_omni_30b_a3b.json` for those). Keys that this library does not know are
kept in `extra` and written back unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config.audio import AudioTransformerConfig
from omni.config.decoder import DecoderConfig, MoEConfig, SpeechRules
from omni.config.positions import PositionRule
from omni.config.reading import (
    Config,
    check_theta,
    extra_field,
    nested,
    not_negative,
    optional,
    positive,
    read_json,
    require,
)

MODEL_TYPE = "qwen3_omni_moe"
ARCHITECTURE = "Qwen3OmniMoeForConditionalGeneration"


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

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "downsample_hidden_size")
        require(
            self.n_window_infer >= self.chunk_frames,
            f"{where}: n_window_infer {self.n_window_infer} is shorter than one chunk of 2 * n_window = "
            f"{self.chunk_frames} mel frames",
        )


@dataclass(frozen=True)
class VisionEncoderConfig(Config):
    """The vision encoder: ViT, merger and DeepStack taps."""

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = optional(dict)
    model_type: str = "qwen3_omni_moe_vision_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def theta(self) -> float:
        """Base of the axial rotary frequencies (released: 10000)."""
        return float((self.rope_parameters or {}).get("rope_theta", 10000.0))

    def validate(self, where: str) -> None:
        positive(self, where, "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
        positive(self, where, "in_channels", "intermediate_size", "out_hidden_size", "num_position_embeddings")
        not_negative(self, where, "depth", "initializer_range")
        check_theta((self.rope_parameters or {}).get("rope_theta"), f"{where}.rope_parameters.rope_theta")
        require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 4 == 0,
            f"{where}: hidden_size / num_heads = {self.hidden_size}/{self.num_heads} must be a multiple of 4",
        )
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
class ThinkerConfig(Config):
    """Encoders and decoder of the Thinker, and the ids that mark media in its prompt.

    A null `audio_config` or `vision_config` builds a Thinker without that encoder.
    """

    text_config: ThinkerTextConfig = nested(ThinkerTextConfig)
    audio_config: AudioEncoderConfig | None = nested(AudioEncoderConfig, optional=True)
    vision_config: VisionEncoderConfig | None = nested(VisionEncoderConfig, optional=True)
    position_id_per_seconds: float = field(default=25, metadata={"kind": float})
    audio_start_token_id: int = 151647
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    user_token_id: int = 872
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_type: str = "qwen3_omni_moe_thinker"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def num_taps(self) -> int:
        """DeepStack taps that the first decoder layers receive."""
        return len(self.vision_config.deepstack_visual_indexes) if self.vision_config else 0

    @property
    def position_rule(self) -> PositionRule:
        """How positions follow time."""
        return PositionRule(self.position_id_per_seconds)

    def validate_ids(self, where: str) -> None:
        """Check positions and media ids."""
        require(self.position_id_per_seconds > 0, f"{where}.position_id_per_seconds must be positive")
        names = ("audio_token_id", "image_token_id", "video_token_id")
        not_negative(self, where, *names)
        ids = [getattr(self, name) for name in names]
        require(len(set(ids)) == 3, f"{where}: {', '.join(names)} must differ from each other, got {ids}")

    def validate(self, where: str) -> None:
        text = self.text_config
        self.validate_ids(where)
        if self.audio_config is not None:
            require(
                self.audio_config.output_dim == text.hidden_size,
                f"{where}: audio_config.output_dim {self.audio_config.output_dim} must equal "
                f"text_config.hidden_size {text.hidden_size}",
            )
        if self.vision_config is not None:
            require(
                self.vision_config.out_hidden_size == text.hidden_size,
                f"{where}: vision_config.out_hidden_size {self.vision_config.out_hidden_size} must equal "
                f"text_config.hidden_size {text.hidden_size}",
            )
            require(
                self.num_taps <= text.num_hidden_layers,
                f"{where}: {self.num_taps} DeepStack taps need as many decoder layers, got {text.num_hidden_layers}",
            )


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


@dataclass(frozen=True)
class MTPConfig(DecoderConfig):
    """The residual-code head, called code predictor in the checkpoint."""

    vocab_size: int = 2048
    num_hidden_layers: int = 5
    num_key_value_heads: int = 8
    head_dim: int | None = field(default=128, metadata={"kind": int})
    intermediate_size: int = 3072
    num_code_groups: int = 32
    tie_word_embeddings: bool = False
    model_type: str = "qwen3_omni_moe_talker_code_predictor"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

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

    text_config: TalkerTextConfig = nested(TalkerTextConfig)
    code_predictor_config: MTPConfig = nested(MTPConfig)
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
    position_id_per_seconds: float = field(default=25, metadata={"kind": float})
    spatial_merge_size: int = 2
    speaker_id: dict[str, int] | None = field(default=None, metadata={"kind": dict})
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
class Code2WavConfig(DecoderConfig):
    """The codec decoder. `hidden_size` .. `sliding_window` describe its transformer."""

    codebook_size: int = 2048
    num_quantizers: int = 16
    num_hidden_layers: int = 8
    intermediate_size: int = 3072
    max_position_embeddings: int = 8000
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = field(default=72, metadata={"kind": int})
    layer_scale_initial_scale: float = 0.01
    decoder_dim: int = 1536
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    upsampling_ratios: tuple[int, ...] = (2, 2)
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


@dataclass(frozen=True)
class OmniConfig(Config):
    """The whole model. Without `talker_config` and `code2wav_config` (Thinking, Captioner) it answers in text only."""

    thinker_config: ThinkerConfig = nested(ThinkerConfig)
    talker_config: TalkerConfig | None = field(default=None, metadata={"kind": TalkerConfig, "omit_none": True})
    code2wav_config: Code2WavConfig | None = field(default=None, metadata={"kind": Code2WavConfig, "omit_none": True})
    enable_audio_output: bool = True
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645
    tts_pad_token_id: int = 151671
    tts_bos_token_id: int = 151672
    tts_eos_token_id: int = 151673
    system_token_id: int = 8948
    user_token_id: int = 872
    assistant_token_id: int = 77091
    initializer_range: float | None = field(default=0.02, metadata={"kind": float, "omit_none": True})
    model_type: str = MODEL_TYPE
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _model_type = MODEL_TYPE
    _architecture = ARCHITECTURE

    @property
    def has_talker(self) -> bool:
        """Whether this variant speaks."""
        return self.enable_audio_output

    @property
    def dtype(self) -> str | None:
        """The checkpoint's dtype as written (`dtype`, or `torch_dtype` in older files), if any."""
        return self.extra.get("dtype") or self.extra.get("torch_dtype")

    def validate(self, where: str) -> None:
        require(
            self.model_type == self._model_type,
            f"model_type {self.model_type!r} is not supported; omni loads {MODEL_TYPE!r} and 'qwen2_5_omni'",
        )
        if not self.enable_audio_output:
            return
        require(
            self.talker_config is not None and self.code2wav_config is not None,
            "enable_audio_output is true but talker_config or code2wav_config is absent; "
            "set enable_audio_output to false for a text-only variant",
        )
        self.validate_parts(where)

    def validate_parts(self, where: str) -> None:
        """Check that Thinker, Talker and codec decoder fit together."""
        talker, code2wav, text = self.talker_config, self.code2wav_config, self.thinker_config.text_config
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> OmniConfig:
        """The config of the family that `model_type` names; see `Config.from_dict`."""
        family: type[OmniConfig] = cls
        if cls is OmniConfig and isinstance(values, Mapping) and values.get("model_type") == "qwen2_5_omni":
            from omni.config.qwen2_5_omni import Qwen2_5OmniConfig  # builds on this file

            family = Qwen2_5OmniConfig
        return super(OmniConfig, family).from_dict(values, where)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> OmniConfig:
        """Read `config.json` from a folder, or any JSON file. Raises FileNotFoundError or ValueError."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` into an existing or new folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": [self._architecture], **super().to_dict()}
