"""The causal decoder layer of the Thinker, the Talker and the residual-code head, with its self-attention.

Shapes: B rows, T tokens, D width, H heads, Hkv key-value heads, hd head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from omni.config.decoder import DecoderConfig
from omni.layers.attention_backends import attention
from omni.layers.moe import MoE, RouterLog
from omni.layers.norm import RMSNorm
from omni.rope.rotary import apply_rotary

Tables = tuple[Tensor, Tensor]


class Context(Protocol):
    """What new tokens see beside themselves: a cache, a ring of the last frames, the other tokens of a packed row."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of the new tokens, q [B, H, T, hd] and k, v [B, Hkv, T, hd] -> [B, H, T, hd]; a cache keeps k and v."""


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary embedding; queries and keys normalised per head if `qk_norm`."""

    def __init__(self, config: DecoderConfig, qk_norm: bool) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.qkv_bias
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
        )
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, dim, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def project(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> q [B, H, T, hd], k and v [B, Hkv, T, hd], rotated."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return apply_rotary(q, *tables), apply_rotary(k, *tables), v

    def forward(self, x: Tensor, tables: Tables, context: Context | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; without a context the tokens are a whole sequence and see those before them."""
        q, k, v = self.project(x, tables)
        y = attention(q, k, v, causal=True) if context is None else context.attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm residual layer around self-attention and any feed-forward module (`SwiGLU` or `MoE`)."""

    keep_together = True  # on one device: what it adds to its input must lie there

    def __init__(self, config: DecoderConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, config.qk_norm)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        tables: Tables,
        context: Context | None = None,
        router_logits: RouterLog | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]. To `router_logits` a sparse layer appends those of its router, [B * T, E]."""
        x = x + self.self_attn(self.input_layernorm(x), tables, context)
        y = self.post_attention_layernorm(x)
        routed = router_logits is not None and isinstance(self.mlp, MoE)
        return x + (self.mlp(y, router_logits) if routed else self.mlp(y))


def run_layer(
    layer: nn.Module, x: Tensor, tables: Tables, context: Context | None, router_logits: RouterLog | None = None
) -> Tensor:
    """One step of one layer; the function that compiled decoding puts in its place runs them all."""
    y: Tensor = layer(x, tables, context, router_logits)
    return y
