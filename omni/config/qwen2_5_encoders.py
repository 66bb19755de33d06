"""The configuration of Qwen2.5-Omni's parts, read from and written to the Hub's `config.json` in its own keys.

As in `omni.config.qwen3_omni`, a default is what the reference assumes when the key is absent, NOT the released one.
Released 7B and 3B: the vision encoder's hidden_size is 1280 (default 3584), and the encoders' output_dim and
out_hidden_size are the width of the Thinker (7B: 3584, 3B: 2048).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni.config.audio import AudioTransformerConfig
from omni.config.reading import Config, check_theta, extra_field, not_negative, optional, positive, require

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

    _passive = frozenset({*_AUDIO_SYNONYMS, "init_std"})

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
class WindowVisionEncoderConfig(Config):
    """The vision encoder with window attention: ViT and merger, as in Qwen2.5-VL.

    `window_size` counts pixels. Blocks named in `fullatt_block_indexes` see a whole grid step instead of a window;
    an index without a block is without effect.
    """

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = optional(dict)
    model_type: str = "qwen2_5_omni_vision_encoder"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    _passive = frozenset({"embed_dim", "in_chans", "init_std"})  # written by the release, read by nothing

    @property
    def theta(self) -> float:
        """Base of the axial rotary frequencies (released: 10000)."""
        return float((self.rope_parameters or {}).get("rope_theta", 10000.0))

    @property
    def window_tokens(self) -> int:
        """Side of a window in merged tokens (released: 4)."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def validate(self, where: str) -> None:
        positive(self, where, "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
        positive(self, where, "in_channels", "intermediate_size", "out_hidden_size", "window_size")
        not_negative(self, where, "depth", "initializer_range")
        rope = self.rope_parameters or {}
        check_theta(rope.get("rope_theta"), f"{where}.rope_parameters.rope_theta")
        require(
            rope.get("rope_type", "axial") in ("axial", "default"),
            f"{where}.rope_parameters.rope_type {rope.get('rope_type')!r} is not supported; it must be 'axial'",
        )
        require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 4 == 0,
            f"{where}: hidden_size / num_heads = {self.hidden_size}/{self.num_heads} must be a multiple of 4",
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
