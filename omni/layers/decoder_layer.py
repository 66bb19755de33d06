"""The causal decoder layer of the Thinker, the Talker and the residual-code head, with its self-attention.

Shapes: B rows, T tokens, D width, H heads, Hkv key-value heads, hd head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from omni.config.decoder import DecoderConfig
from omni.layers.attention_backends import attention, cached_attention, packed_attention
from omni.layers.cache import LayerCache
from omni.layers.norm import RMSNorm
from omni.layers.packing import PackedBlocks
from omni.rope.rotary import apply_rotary

Tables = tuple[Tensor, Tensor]


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

    def output(self, y: Tensor) -> Tensor:
        """y [B, H, T, hd] -> [B, T, D]."""
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, tables: Tables, cache: LayerCache | PackedBlocks | None = None) -> Tensor:
        """Causal attention over the new tokens and, with a cache, over what it holds of the row.

        With blocks instead of a cache, the one row x [1, T, D] holds several sequences, and each sees itself alone.
        """
        q, k, v = self.project(x, tables)
        if isinstance(cache, PackedBlocks):
            q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
            return self.output(packed_attention(q, k, v, cache).transpose(0, 1)[None])
        if cache is not None:
            cache.write(k, v)
        if cache is None or cache.fresh:
            return self.output(attention(q, k, v, causal=True))
        if x.shape[1] == 1:
            return self.output(attention(q, cache.keys, cache.values, cache.visible))
        return self.output(cached_attention(q, cache.keys, cache.values, cache.slots))


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
        cache: LayerCache | PackedBlocks | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `cache`: this layer's view of the key-value cache, or a packed row's blocks."""
        x = x + self.self_attn(self.input_layernorm(x), tables, cache)
        y = self.post_attention_layernorm(x)
        return x + (self.mlp(y) if router_logits is None else self.mlp(y, router_logits))


def run_layer(layer: nn.Module, x: Tensor, tables: Tables, cache: LayerCache) -> Tensor:
    """One step of one layer; the function that compiled decoding puts in its place runs them all."""
    y: Tensor = layer(x, tables, cache)
    return y
