"""The codec decoder's transformer: causal attention over the last `window` frames, whole or piece by piece.

Shapes: B rows, T frames, D width, H heads, Hkv key-value heads, hd head width, W window (72 frames, released config).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from omni.config import Code2WavConfig
from omni.layers.attention_backends import attention
from omni.layers.decoder_layer import SelfAttention
from omni.layers.norm import RMSNorm
from omni.layers.state import State
from omni.layers.swiglu import SwiGLU
from omni.rope.rotary import Rotary

_QUERIES_AT_ONCE = 256  # bounds the mask: 256 x (256 + W - 1) entries however long the signal


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Attention of each query over its own key and the window - 1 keys before it.

    q [B, H, T, hd]; k, v [B, Hkv, P + T, hd], the last T of which belong to the queries; `valid` bool [B, P + T] is
    False for keys that do not exist (yet). Returns [B, H, T, hd].
    """
    queries, keys = q.shape[2], k.shape[2]
    past = keys - queries
    done = []
    for start in range(past, keys, _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, keys)
        first = max(0, start - window + 1)
        age = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (age >= 0) & (age < window)
        if valid is not None:
            visible = visible & valid[:, None, None, first:stop]
        block = q[:, :, start - past : stop - past]
        done.append(attention(block, k[:, :, first:stop], v[:, :, first:stop], visible))
    return torch.cat(done, dim=2)


@dataclass
class WindowState(State):
    """The last W - 1 keys and values of every layer [L, B, Hkv, W - 1, hd], newest last, and each row's frame count.

    frames int64 [B]: of the W - 1 places of a row, the last min(frames, W - 1) are filled.
    """

    row_dims: ClassVar[dict[str, int]] = {"keys": 1, "values": 1}

    keys: Tensor
    values: Tensor
    frames: Tensor

    def positions(self, frames: int) -> Tensor:
        """int64 [B, T]: positions of the next `frames` frames."""
        return self.frames[:, None] + torch.arange(frames, device=self.frames.device)

    def valid(self, frames: int) -> Tensor:
        """bool [B, W - 1 + T]: which places hold a frame once `frames` more have come."""
        places = torch.arange(-self.keys.shape[3], frames, device=self.frames.device)
        return places >= -self.frames[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Past and new keys and values of one layer [B, Hkv, W - 1 + T, hd]; remembers their end."""
        whole = []
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            joined = torch.cat((held, new), dim=2)
            held.copy_(joined[:, :, joined.shape[2] - held.shape[2] :])
            whole.append(joined)
        return whole[0], whole[1]


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))
        self.start = start

    def initialise(self, std: float) -> None:
        """The config's small start value: each layer begins near the identity."""
        nn.init.constant_(self.scale, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class WindowLayer(nn.Module):
    """Pre-norm layer of windowed self-attention (without query and key norms) and SwiGLU, both scaled per channel."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.self_attn = SelfAttention(config, qk_norm=False)
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.input_layernorm = RMSNorm(dim, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(dim, config.rms_norm_eps)
        self.self_attn_layer_scale = LayerScale(dim, config.layer_scale_initial_scale)
        self.mlp_layer_scale = LayerScale(dim, config.layer_scale_initial_scale)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        window: int,
        layer: int,
        state: WindowState | None,
        valid: Tensor | None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `layer` is this layer's place in the state."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), tables)
        if state is not None:
            k, v = state.extend(layer, k, v)
        y = self.self_attn.output(windowed_attention(q, k, v, window, valid))
        x = x + self.self_attn_layer_scale(y)
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class WindowTransformer(nn.Module):
    """Layers of windowed attention with rotary positions, and a final norm."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WindowLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_size, config.theta)
        self.window = config.sliding_window or config.max_position_embeddings  # null: every frame before
        self.state_shape = (config.num_key_value_heads, self.window - 1, config.head_size)

    def init_state(self, batch_size: int) -> WindowState:
        """The state before the first frame."""
        weight = self.norm.weight
        keys, values = (weight.new_zeros(len(self.layers), batch_size, *self.state_shape) for _ in range(2))
        return WindowState(keys, values, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def forward(self, x: Tensor, state: WindowState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]: a whole signal, or with a state the next frames of one."""
        frames = x.shape[1]
        if state is None:
            positions, valid = torch.arange(frames, device=x.device).expand(x.shape[0], -1), None
        else:
            positions, valid = state.positions(frames), state.valid(frames)
        tables = self.rotary(positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, tables, self.window, i, state, valid)
        if state is not None:
            state.frames += frames
        return self.norm(x)
