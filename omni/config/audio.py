"""What the configurations of the audio encoders of both families share."""

from __future__ import annotations

from dataclasses import dataclass

from omni.config.reading import Config, not_negative, positive, require


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

    @property
    def chunk_frames(self) -> int:
        """Mel frames that are convolved together (released: 100, one second; Qwen2.5-Omni's: 200)."""
        return 2 * self.n_window

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
