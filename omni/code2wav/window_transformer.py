"""The codec decoder's transformer: causal attention over the last `window` frames, whole or piece by piece.

Shapes: B rows, T frames, D width, H heads, Hkv key-value heads, hd head width, W window (72 frames, released config).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.attention_backends import attention
from omni.layers.decoder_layer import SelfAttention
from omni.layers.norm import RMSNorm
from omni.layers.state import State
from omni.layers.swiglu import SwiGLU
from omni.rope.rotary import Rotary

_FRAMES_AT_ONCE = 256  # bounds the mask: 256 x (256 + W) entries however long the signal


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each query over its own key and the window - 1 keys before it, a block of queries at a time.

    q [B, H, T, hd]; k, v [B, Hkv, T, hd]. Returns [B, H, T, hd].
    """
    frames = q.shape[2]
    done = []
    for start in range(0, frames, _FRAMES_AT_ONCE):
        stop = min(start + _FRAMES_AT_ONCE, frames)
        first = max(0, start - window + 1)
        age = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (age >= 0) & (age < window)
        done.append(attention(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], visible))
    return torch.cat(done, dim=2)


class LayerRing(NamedTuple):
    """What one layer's attention reads and writes in one step of T frames: views of the state, what all layers share.

    keys, values [B, Hkv, W, hd]; places int64 [B, Hkv, min(T, W), hd] of the last new frames; visible bool
    [B, 1, T, W] over the ring as it is after writing (T = 1), or [B, 1, T, W + T] over the ring before it and the new
    frames; active bool [B, 1, 1, 1] or None.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    visible: Tensor
    active: Tensor | None

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new frames, q [B, H, T, hd] and k, v [B, Hkv, T, hd] -> [B, H, T, hd]; keeps k and v."""
        if q.shape[2] == 1:  # the frame that it overwrites has just left the window, also in rows that stand still
            self._write(k, v, None)
            return attention(q, self.keys, self.values, self.visible)
        keys, values = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self._write(k, v, self.active)
        return attention(q, keys, values, self.visible)

    def _write(self, k: Tensor, v: Tensor, active: Tensor | None) -> None:
        for ring, new in ((self.keys, k), (self.values, v)):
            if new.shape[2] > ring.shape[2]:  # only the last are kept
                new = new[:, :, -ring.shape[2] :]
            new = new.to(ring.dtype)  # autocast may give another dtype
            if active is not None:
                new = torch.where(active, new, ring.gather(2, self.places))
            ring.scatter_(2, self.places, new)


@dataclass
class WindowState(State):
    """A ring of the last W keys and values of every layer [L, B, Hkv, W, hd], and each row's frame count int64 [B].

    Frame f of a row lies in place f % W, hence nothing moves when a frame comes; places that hold no frame yet and
    frames that have left the window are masked by age.
    """

    row_dims: ClassVar[dict[str, int]] = {"keys": 1, "values": 1}

    keys: Tensor
    values: Tensor
    frames: Tensor

    def layers(self, positions: Tensor, active: Tensor | None) -> list[LayerRing]:
        """Each layer's view for a step of frames at `positions` int64 [B, T]; active bool [B, 1, 1] or None."""
        window, steps = self.keys.shape[3], positions.shape[1]
        places = torch.arange(window, device=positions.device)
        first = positions[:, :1]
        if steps == 1:
            age = (first - places) % window  # [B, W], 0 for the new frame
            visible = (age <= first)[:, None, None]
        else:
            index = torch.arange(steps, device=positions.device)
            age = (first - 1 - places) % window + 1  # [B, W], of the held frames at the first new one
            held = (age <= first)[:, None] & (age[:, None] + index[:, None] < window)  # [B, T, W]
            behind = index[:, None] - index
            fresh = ((behind >= 0) & (behind < window)).expand(len(positions), -1, -1)  # [B, T, T]
            visible = torch.cat((held, fresh), dim=2)[:, None]
        _, rows, heads, _, dim = self.keys.shape
        filled = (positions[:, -window:] % window)[:, None, :, None].expand(rows, heads, -1, dim)
        active = None if active is None else active[..., None]
        return [LayerRing(k, v, filled, visible, active) for k, v in zip(self.keys.unbind(), self.values.unbind())]


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))
        self.start = start

    def initialise(self, std: float) -> None:
        """The config's small start value: each layer begins near the identity."""
        nn.init.constant_(self.scale, self.start)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, self.scale, branch)


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

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], window: int, ring: LayerRing | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]: a whole signal, or with a ring the next frames of one."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), tables)
        y = windowed_attention(q, k, v, window) if ring is None else ring.attention(q, k, v)
        x = self.self_attn_layer_scale(x, self.self_attn.output(y))
        return self.mlp_layer_scale(x, self.mlp(self.post_attention_layernorm(x)))


class WindowTransformer(nn.Module):
    """Layers of windowed attention with rotary positions, and a final norm."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WindowLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_size, config.theta)
        self.window = config.sliding_window or config.max_position_embeddings  # null: every frame before
        self.ring_shape = (config.num_key_value_heads, self.window, config.head_size)

    def init_state(self, batch_size: int) -> WindowState:
        """The state before the first frame."""
        weight = self.norm.weight
        keys, values = (weight.new_zeros(len(self.layers), batch_size, *self.ring_shape) for _ in range(2))
        return WindowState(keys, values, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """A whole signal x [B, T, D] -> [B, T, D]."""
        tables = self.rotary(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))
        for layer in self.layers:
            x = layer(x, tables, self.window, None)
        return self.norm(x)

    def step(self, x: Tensor, state: WindowState, active: Tensor | None = None) -> Tensor:
        """The next frames x [B, T, D] of a signal -> [B, T, D]; updates `state` in place, but for rows not in `active`.

        active bool [B, 1, 1] (None: every row).
        """
        if x.shape[1] > _FRAMES_AT_ONCE:
            return torch.cat([self.step(piece, state, active) for piece in x.split(_FRAMES_AT_ONCE, dim=1)], dim=1)
        positions = state.frames[:, None] + torch.arange(x.shape[1], device=x.device)
        tables = self.rotary(positions)
        for layer, ring in zip(self.layers, state.layers(positions, active)):
            x = layer(x, tables, self.window, ring)
        state.frames.add_(x.shape[1] if active is None else active[:, 0, 0] * x.shape[1])
        return self.norm(x)
