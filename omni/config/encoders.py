"""What the configurations of the families' encoders share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from omni.config.reading import Config, check_theta, not_negative, positive, require


@dataclass(frozen=True)
class AudioTransformerConfig(Config):
    """A transformer over the mel spectrogram, in Whisper's terms. `n_window` counts mel frames: half a chunk that is
    convolved by itself.
    """

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    activation_function: str = "gelu"
    initializer_range: float = 0.02
    n_window: int = 100
    output_dim: int = 3584

    # written by releases, read by nothing
    _passive: ClassVar[frozenset[str]] = frozenset(("encoder_layerdrop", "init_std", "num_hidden_layers"))

    @property
    def chunk_frames(self) -> int:
        """Mel frames that are convolved together (released: 100, one second; Qwen2.5-Omni's: 200)."""
        return 2 * self.n_window

    @property
    def attention_frames(self) -> int:
        """Mel frames of one attention window."""
        return self.chunk_frames

    def in_words(self) -> str:
        layers = f"{self.encoder_layers} layers of {self.d_model}, {self.encoder_attention_heads} heads"
        return f"{layers}, {self.num_mel_bins} mel bins, window {self.attention_frames / 100:g} s"

    def validate(self, where: str) -> None:
        positive(self, where, "num_mel_bins", "encoder_attention_heads", "d_model", "n_window", "output_dim")
        positive(self, where, "encoder_ffn_dim")
        not_negative(self, where, "encoder_layers", "initializer_range")
        require(
            self.d_model % self.encoder_attention_heads == 0,
            f"{where}: d_model {self.d_model} is not a multiple of {self.encoder_attention_heads} heads",
        )
        require(self.d_model % 2 == 0 and self.d_model > 2, f"{where}.d_model must be even and above 2")
        require(self.activation_function == "gelu", f"{where}.activation_function must be 'gelu'")


@dataclass(frozen=True)
class VisionTransformerConfig(Config):
    """A transformer over patches of pictures and of pairs of video frames, whose merger joins neighbouring patches."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    num_taps = 0  # features of inner layers that the first decoder layers receive
    _passive: ClassVar[frozenset[str]] = frozenset(("embed_dim", "in_chans", "init_std"))  # as above

    @property
    def theta(self) -> float:
        """Base of the axial rotary frequencies (released: 10000)."""
        rope: dict[str, Any] = getattr(self, "rope_parameters", None) or {}
        return float(rope.get("rope_theta", 10000.0))

    def in_words(self) -> str:
        return f"{self.depth} layers of {self.hidden_size}, {self.num_heads} heads, patch {self.patch_size}"

    def validate(self, where: str) -> None:
        positive(self, where, "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
        positive(self, where, "in_channels", "intermediate_size", "out_hidden_size")
        not_negative(self, where, "depth", "initializer_range")
        rope = getattr(self, "rope_parameters", None) or {}
        check_theta(rope.get("rope_theta"), f"{where}.rope_parameters.rope_theta")
        require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 4 == 0,
            f"{where}: hidden_size / num_heads = {self.hidden_size}/{self.num_heads} must be a multiple of 4",
        )
