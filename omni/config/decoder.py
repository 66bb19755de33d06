"""What the causal transformers share in their configuration: rotary values, sizes, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from omni.config.reading import Config, check_theta, not_negative, optional, positive, require


@dataclass(frozen=True)
class RopeConfig(Config):
    """Mixin: rotary values in either spelling (`rope_parameters`, or `rope_theta` with `rope_scaling`)."""

    rope_theta: float | None = optional()
    rope_scaling: dict[str, Any] | None = optional()
    rope_parameters: dict[str, Any] | None = optional()

    _default_theta = 10000.0
    _default_sections = (24, 20, 20)
    mrope_interleaved = True  # rotary pairs take turns between the axes, else in blocks; the file's key is not read

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies."""
        sources: tuple[dict[str, Any] | None, ...] = (
            self.rope_parameters,
            {"rope_theta": self.rope_theta},
            self.rope_scaling,
        )
        for source in sources:
            if source and source.get("rope_theta") is not None:
                return float(source["rope_theta"])
        return self._default_theta

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """Rotary pairs for (time, height, width); released: (24, 20, 20)."""
        for source in (self.rope_parameters, self.rope_scaling):
            if source and source.get("mrope_section") is not None:
                return tuple(source["mrope_section"])
        return self._default_sections

    def validate_rope(self, where: str) -> None:
        check_theta(self.rope_theta, f"{where}.rope_theta")
        for name in ("rope_parameters", "rope_scaling"):
            values = getattr(self, name) or {}
            kind = values.get("rope_type", values.get("type", "default"))
            if kind not in ("default", "mrope", "axial"):
                raise ValueError(f"{where}: rope type {kind!r} is not supported; use 'default'")
            check_theta(values.get("rope_theta"), f"{where}.{name}.rope_theta")
            section = values.get("mrope_section")
            require(
                section is None or (isinstance(section, (list, tuple)) and all(type(n) is int for n in section)),
                f"{where}.{name}.mrope_section must be a list of integers, got {section!r}",
            )


@dataclass(frozen=True)
class DecoderConfig(RopeConfig):
    """What every causal transformer of this library has (Thinker, Talker, MTP, Code2Wav's transformer)."""

    hidden_size: int = 1024
    num_hidden_layers: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int | None = optional()
    intermediate_size: int = 2048
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    sliding_window: int | None = None

    qk_norm = True  # queries and keys are normalised per head; a family's own, as are the next two

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the projection out of attention has one."""
        return self.attention_bias

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts."""
        return False

    def in_words(self) -> str:
        heads = f"{self.num_attention_heads} heads over {self.num_key_value_heads} of {self.head_size}"
        return f"{self.num_hidden_layers} layers of {self.hidden_size}, {heads}"

    @property
    def head_size(self) -> int:
        """Width of one attention head; an absent `head_dim` means hidden_size / heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def validate(self, where: str) -> None:
        positive(self, where, "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        positive(self, where, "intermediate_size")
        not_negative(self, where, "num_hidden_layers", "rms_norm_eps", "initializer_range")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"{where}: {self.num_attention_heads} attention heads are not a multiple of "
            f"num_key_value_heads = {self.num_key_value_heads}",
        )
        if self.head_dim is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"{where}: hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads "
                "and head_dim is absent",
            )
        require(self.head_size > 0 and self.head_size % 2 == 0, f"{where}: head_dim {self.head_size} must be even")
        require(self.hidden_act == "silu", f"{where}.hidden_act {self.hidden_act!r} is not supported; use 'silu'")
        self.validate_rope(where)


@dataclass(frozen=True)
class LanguageConfig(DecoderConfig):
    """A decoder over a vocabulary whose positions have three axes (time, height, width). Its layers are dense."""

    vocab_size: int = 3584

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "vocab_size")
        section, pairs = self.mrope_section, self.head_size // 2
        require(
            len(section) == 3 and sum(section) == pairs and min(section) >= 0,
            f"{where}: mrope_section {list(section)} must be three numbers that sum to head_dim / 2 = {pairs}",
        )
        require(
            not self.mrope_interleaved or max(section[1], section[2]) * 3 <= pairs + 2,
            f"{where}: mrope_section {list(section)} does not fit when interleaved over {pairs} pairs",
        )


@dataclass(frozen=True)
class MoEConfig(LanguageConfig):
    """A decoder whose layers may hold experts; layers in `mlp_only_layers` are dense.

    router: how experts are chosen, a name of `omni.layers.moe.ROUTERS` (None: as released). No released file has it.
    """

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = ()
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    router: str | None = optional()

    def is_sparse(self, layer: int) -> bool:
        dense = layer in (self.mlp_only_layers or ())
        return not dense and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0

    def in_words(self) -> str:
        return f"{super().in_words()}, {self.num_experts_per_tok} of {self.num_experts} experts"

    def validate(self, where: str) -> None:
        super().validate(where)
        positive(self, where, "moe_intermediate_size", "decoder_sparse_step")
        not_negative(self, where, "shared_expert_intermediate_size")
        require(
            0 < self.num_experts_per_tok <= max(self.num_experts, 1),
            f"{where}: num_experts_per_tok {self.num_experts_per_tok} must lie in 1..num_experts = {self.num_experts}",
        )


class SpeechRules:
    """Mixin of a Talker's config: what no file says. voice_rows: a voice is a row of the codec embedding (else a text
    token beside a recording)."""

    voice_rows: ClassVar[bool] = False
    codec_eos_token_id: int

    @property
    def codec_stop_ids(self) -> frozenset[int]:
        """Codec ids that end speech."""
        return frozenset((self.codec_eos_token_id,))


class CodecRules:
    """Mixin of a codec decoder's config. by_frames: sound comes frame by frame (else by windows of codes)."""

    by_frames: ClassVar[bool] = True
