"""The configuration of Token2Wav, Qwen2.5-Omni's codec decoder, in the Hub's own keys.

As in `omni.config.qwen3_omni`, a default is what the reference assumes when the key is absent. The released files name
three sizes of the DiT differently (`dim`, `depth`, `heads`) and carry a few
switches that have one supported value each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omni.config.decoder import CodecRules
from omni.config.reading import (
    Config,
    check_theta,
    extra_field,
    not_negative,
    optional,
    positive,
    require,
)


@dataclass(frozen=True)
class DiTConfig(Config):
    """The diffusion transformer over mel frames (`hidden_size` .. `repeats`) and its speaker encoder (`enc_*`).

    `block_size` counts mel frames of one attention block; the layers in `look_backward_layers` also see the block
    before their own, those in `look_ahead_layers` the one after it. Each code lasts `repeats` mel frames.
    """

    _also_read: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
    }

    hidden_size: int = 1024
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    head_dim: int = 64
    ff_mult: int = 2
    emb_dim: int = 512
    num_embeds: int = 8193
    repeats: int = 2
    block_size: int = 24
    look_ahead_layers: tuple[int, ...] = (10,)
    look_backward_layers: tuple[int, ...] = (0, 20)
    max_position_embeddings: int = 32768
    mel_dim: int = 80
    dropout: float = 0.1
    rope_parameters: dict[str, Any] | None = optional()
    rope_theta: float | None = optional()  # where older files keep it
    enc_emb_dim: int = 192
    enc_dim: int = 128
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2
    enc_se_channels: int = 64
    enc_lin_neurons: int | None = optional()  # in the released files; nothing uses it
    enc_global_context: bool | None = optional()
    long_skip_connection: bool | None = optional()
    model_type: str = "qwen2_5_omni_dit"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies (released: 10000)."""
        return float((self.rope_parameters or {}).get("rope_theta", self.rope_theta or 10000.0))

    @property
    def block_codes(self) -> int:
        """Codes of one attention block (released: 12, 0.24 s)."""
        return self.block_size // self.repeats

    def validate(self, where: str) -> None:
        positive(self, where, "hidden_size", "num_attention_heads", "head_dim", "ff_mult", "emb_dim", "num_embeds")
        positive(self, where, "repeats", "block_size", "max_position_embeddings", "mel_dim", "enc_emb_dim", "enc_dim")
        positive(self, where, "enc_attention_channels", "enc_res2net_scale", "enc_se_channels")
        not_negative(self, where, "num_hidden_layers", "dropout")
        require(self.dropout < 1, f"{where}.dropout must be below 1, got {self.dropout}")
        require(self.head_dim % 2 == 0, f"{where}.head_dim {self.head_dim} must be even")
        require(
            self.block_size % self.repeats == 0,
            f"{where}.block_size {self.block_size} frames must hold whole codes of {self.repeats} frames",
        )
        check_theta((self.rope_parameters or {}).get("rope_theta"), f"{where}.rope_parameters.rope_theta")
        check_theta(self.rope_theta, f"{where}.rope_theta")
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        require(kind == "default", f"{where}.rope_parameters.rope_type {kind!r} is not supported; use 'default'")
        require(self.enc_global_context is not False, f"{where}.enc_global_context false is not supported")
        require(not self.long_skip_connection, f"{where}.long_skip_connection true is not supported")
        self._validate_encoder(where)

    def _validate_encoder(self, where: str) -> None:
        """The speaker encoder: first layer, equally wide Res2Net layers, and a layer over all of these joined."""
        channels = self.enc_channels
        sizes = {len(channels), len(self.enc_kernel_sizes), len(self.enc_dilations)}
        require(
            len(sizes) == 1 and len(channels) >= 3,
            f"{where}: enc_channels, enc_kernel_sizes and enc_dilations must be equally long and at least 3, got "
            f"{len(channels)}, {len(self.enc_kernel_sizes)} and {len(self.enc_dilations)}",
        )
        require(
            min(*channels, *self.enc_kernel_sizes, *self.enc_dilations) > 0,
            f"{where}: enc_channels, enc_kernel_sizes and enc_dilations must be positive",
        )
        inner = channels[:-1]
        require(len(set(inner)) == 1, f"{where}.enc_channels {list(channels)}: all but the last must be equal")
        require(
            sum(inner[1:]) == channels[-1],
            f"{where}.enc_channels: the last, {channels[-1]}, must be the sum of the layers before it but the first, "
            f"{sum(inner[1:])}",
        )
        require(
            inner[0] % self.enc_res2net_scale == 0,
            f"{where}.enc_channels {inner[0]} is not a multiple of enc_res2net_scale {self.enc_res2net_scale}",
        )


@dataclass(frozen=True)
class BigVGANConfig(Config):
    """The vocoder: one upsampling stage for each rate, each with one block for each resblock kernel."""

    mel_dim: int = 80
    upsample_initial_channel: int = 1536
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: list[list[int]] = field(default_factory=lambda: [[1, 3, 5], [1, 3, 5], [1, 3, 5]])
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)
    use_bias_at_final: bool | None = optional()
    model_type: str = "qwen2_5_omni_bigvgan"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def hop_length(self) -> int:
        """Samples a mel frame (released: 240)."""
        return math.prod(self.upsample_rates)

    def validate(self, where: str) -> None:
        positive(self, where, "mel_dim", "upsample_initial_channel")
        stages = list(zip(self.upsample_rates, self.upsample_kernel_sizes))
        require(
            len(self.upsample_rates) == len(self.upsample_kernel_sizes),
            f"{where}: {len(self.upsample_rates)} upsample_rates need as many upsample_kernel_sizes, got "
            f"{len(self.upsample_kernel_sizes)}",
        )
        for rate, kernel in stages:
            require(
                0 < rate <= kernel and (kernel - rate) % 2 == 0,
                f"{where}: an upsampling kernel must exceed its rate by an even number, got {kernel} and {rate}",
            )
        require(
            self.upsample_initial_channel % 2 ** len(stages) == 0,
            f"{where}.upsample_initial_channel {self.upsample_initial_channel} must be divisible by 2 for each of "
            f"{len(stages)} upsample_rates",
        )
        kernels, dilations = self.resblock_kernel_sizes, self.resblock_dilation_sizes
        require(
            len(kernels) > 0 and len(kernels) == len(dilations),
            f"{where}: resblock_kernel_sizes and resblock_dilation_sizes must be equally long, got {len(kernels)} and "
            f"{len(dilations)}",
        )
        require(all(k > 0 and k % 2 == 1 for k in kernels), f"{where}.resblock_kernel_sizes must be odd, got {kernels}")
        # the reference builds three pairs of convolutions a block, whatever the list's length
        require(
            all(
                isinstance(d, (list, tuple)) and len(d) == 3 and all(type(n) is int and n > 0 for n in d)
                for d in dilations
            ),
            f"{where}.resblock_dilation_sizes must hold three positive integers a block, got {dilations}",
        )
        require(not self.use_bias_at_final, f"{where}.use_bias_at_final true is not supported")


@dataclass(frozen=True)
class Token2WavConfig(CodecRules, Config):
    """The codec decoder of the Qwen2.5-Omni family."""

    by_frames = False
    dit_config: DiTConfig = field(default_factory=DiTConfig)
    bigvgan_config: BigVGANConfig = field(default_factory=BigVGANConfig)
    model_type: str = "qwen2_5_omni_token2wav"
    extra: dict[str, Any] = extra_field()
    aliases: dict[str, str] = extra_field()

    @property
    def num_codes(self) -> int:
        """Codes that can be decoded (released: 8194)."""
        return self.dit_config.num_embeds + 1

    @property
    def hop_length(self) -> int:
        """Samples a code (released: 480, 20 ms)."""
        return self.dit_config.repeats * self.bigvgan_config.hop_length

    def in_words(self) -> str:
        dit, channels = self.dit_config, self.bigvgan_config.upsample_initial_channel
        return (
            f"DiT of {dit.num_hidden_layers} layers of {dit.hidden_size}, {dit.num_attention_heads} heads; BigVGAN "
            f"from {channels} channels; {self.hop_length} samples a code"
        )

    def validate(self, where: str) -> None:
        require(
            self.dit_config.mel_dim == self.bigvgan_config.mel_dim,
            f"{where}: dit_config.mel_dim {self.dit_config.mel_dim} must equal bigvgan_config.mel_dim "
            f"{self.bigvgan_config.mel_dim}",
        )
