"""The diffusion transformer: the velocity at which noise flows to a mel spectrogram, given speech codes and a voice.

Source: DiT with adaptive layer norm (Peebles and Xie, 2023) in the form of F5-TTS (Chen et al., 2024), with attention
inside blocks of frames (Qwen2.5-Omni report, 2025).
Shapes: B rows, T codes, N = repeats * T mel frames, F frames of the reference mel, D width, H heads, hd head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.block_attention import block_attention
from omni.code2wav.ecapa import ECAPA
from omni.config.token2wav import DiTConfig
from omni.rope.rotary import Rotary, apply_rotary

_TIME_WAVES = 128  # sine and cosine of each: 256 inputs of the time layers
_TIME_SCALE = 1000.0  # times lie in 0 .. 1, the waves were made for 0 .. 1000 steps
_NORM_EPS = 1e-6


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it gates or shifts starts as the identity (AdaLN-zero)."""

    def initialise(self, std: float) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class TimeEmbedding(nn.Module):
    """Flow time [R] in 0 .. 1 -> [R, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(2 * _TIME_WAVES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        index = torch.arange(_TIME_WAVES, device=time.device).float()
        frequencies = (index * -(math.log(10000.0) / (_TIME_WAVES - 1))).exp()
        angles = (_TIME_SCALE * time.float())[:, None] * frequencies
        return self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=1).to(time.dtype))


class AdaLayerNorm(nn.Module):
    """What a layer draws from the time: `pieces` vectors a row, each [R, 1, D], that scale, shift and gate."""

    def __init__(self, dim: int, pieces: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(dim, pieces * dim)
        self.pieces = pieces

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """time [R, D] after SiLU; R is B, or 1 where all rows are at the same time."""
        return self.linear(time)[:, None].chunk(self.pieces, dim=2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of x [B, N, D] without weights of its own, then scale and shift [R, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS), 1 + scale)


class BlockSelfAttention(nn.Module):
    """Multi-head attention inside blocks of frames.

    Rotary positions turn the first head only, as the released weights were trained; its pairs of channels lie side by
    side in the weights.
    """

    def __init__(self, config: DiTConfig, back: int, ahead: int) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.to_q = nn.Linear(config.hidden_size, inner)
        self.to_k = nn.Linear(config.hidden_size, inner)
        self.to_v = nn.Linear(config.hidden_size, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, config.hidden_size), nn.Dropout(config.dropout))
        self.heads, self.block, self.back, self.ahead = config.num_attention_heads, config.block_size, back, ahead

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = _turn_first_head(q, tables), _turn_first_head(k, tables)
        y = block_attention(q, k, v, block=self.block, back=self.back, ahead=self.ahead, lengths=lengths)
        return self.to_out(y.transpose(1, 2).flatten(2))


def _turn_first_head(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, N, hd]: head 0 with its even channels before its odd ones, turned; products stay the same."""
    first = torch.cat((x[:, :1, :, 0::2], x[:, :1, :, 1::2]), dim=-1)
    return torch.cat((apply_rotary(first, *tables), x[:, 1:]), dim=1)


class FeedForward(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_size, config.hidden_size * config.ff_mult
        self.ff = nn.Sequential(
            nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Dropout(config.dropout), nn.Linear(inner, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class DiTBlock(nn.Module):
    """Attention and feed-forward layer, each scaled, shifted and gated by the time."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        self.attn_norm = AdaLayerNorm(config.hidden_size, pieces=6)
        back, ahead = int(index in config.look_backward_layers), int(index in config.look_ahead_layers)
        self.attn = BlockSelfAttention(config, back, ahead)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, time: Tensor, tables: tuple[Tensor, Tensor], lengths: Tensor | None) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.attn_norm(time)
        x = torch.addcmul(x, gate, self.attn(modulate(x, scale, shift), tables, lengths))
        return torch.addcmul(x, ff_gate, self.ff(modulate(x, ff_scale, ff_shift)))


class DiT(nn.Module):
    """Velocity of a noisy mel. What does not change along the flow is computed once, by the first two methods."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbedding(config.hidden_size)
        self.code_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)
        self.speaker_encoder = ECAPA(config)
        self.input_sizes = (config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim)
        self.input_proj = nn.Linear(sum(self.input_sizes), config.hidden_size)
        self.blocks = nn.ModuleList([DiTBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm_out = AdaLayerNorm(config.hidden_size, pieces=2)
        self.proj_out = ZeroLinear(config.hidden_size, config.mel_dim)
        self.rotary = Rotary(config.head_dim, config.theta)

    def encode_reference(self, mel: Tensor) -> Tensor:
        """The sound of a voice: reference mel [B, F, mel_dim] -> [B, enc_dim]."""
        return self.speaker_encoder(mel)

    def condition(self, codes: Tensor, speaker: Tensor, reference: Tensor) -> Tensor:
        """What steers the flow, projected: codes int64 [B, T], speaker [B, enc_emb_dim], reference [B, enc_dim].

        Returns [B, N, D]. Without a condition (for guidance) codes and speaker are zeros, and the reference is the
        encoding of a mel of zeros.
        """
        _, reference_weight, code_weight, speaker_weight = self.input_proj.weight.split(self.input_sizes, dim=1)
        voice = F.linear(reference, reference_weight, self.input_proj.bias) + F.linear(speaker, speaker_weight)
        steered = F.linear(self.code_embed(codes), code_weight) + voice[:, None]
        return steered.repeat_interleave(self.config.repeats, dim=1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Noisy mel x [B, N, mel_dim], time [B] or [1] (0 noise, 1 mel), condition [B, N, D] -> velocity like x.

        Rows may be padded: `lengths` int64 [B] counts their frames.
        """
        weight = self.input_proj.weight[:, : self.config.mel_dim]
        h = F.linear(x, weight) + condition
        moment = F.silu(self.time_embed(time))
        tables = self.rotary(torch.arange(x.shape[1], device=x.device)[None])
        for block in self.blocks:
            h = block(h, moment, tables, lengths)
        scale, shift = self.norm_out(moment)
        return self.proj_out(modulate(h, scale, shift))
