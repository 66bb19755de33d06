"""The codec decoder's transformer: causal attention over the last `window` frames, whole or piece by piece.

Shapes: B rows, T frames, D width, H heads, Hkv key-value heads, hd head width, W window (72 frames, released config).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.attention_backends import attention
from omni.layers.decoder_layer import Context, SelfAttention
from omni.layers.norm import RMSNorm
from omni.layers.state import State
from omni.layers.swiglu import SwiGLU
from omni.rope.rotary import Rotary

_FRAMES_AT_ONCE = 256  # bounds the mask: 256 x (256 + W) entries however long the signal


@dataclass(eq=False)
class Window:
    """What the frames of a whole signal see: each itself and the `size` - 1 frames before it."""

    size: int

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, T, hd], k and v [B, Hkv, T, hd] -> [B, H, T, hd], a block of queries at a time."""
        frames = q.shape[2]
        done = []
        for start in range(0, frames, _FRAMES_AT_ONCE):
            stop = min(start + _FRAMES_AT_ONCE, frames)
            first = max(0, start - self.size + 1)
            age = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
            visible = (age >= 0) & (age < self.size)
            done.append(attention(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], visible))
        return torch.cat(done, dim=2)


@dataclass(eq=False)
class LayerRing:
    """What one layer's attention reads and writes for a piece of T frames: views of the state, what all layers share.

    keys, values [B, Hkv, W, hd]; places int64 [B, Hkv, min(T, W), hd] of the last new frames; visible bool
    [B, 1, T, W] over the ring as it is after writing (decode), or [B, 1, T, W + T] over the ring before it and the new
    frames; active bool [B, 1, 1, 1] or None; decode: one frame comes. No tuple, so that hooks leave it as it is.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    visible: Tensor
    active: Tensor | None
    decode: bool

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new frames, q [B, H, T, hd] and k, v [B, Hkv, T, hd] -> [B, H, T, hd]; keeps k and v."""
        if self.decode:  # the frame that it overwrites has just left the window, also in rows that stand still
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

    def layers(self, positions: Tensor, active: Tensor | None, *, decode: bool) -> list[LayerRing]:
        """Each layer's view for the frames at `positions` int64 [B, T]; active bool [B, 1, 1] or None.

        decode: one frame comes (T = 1); it may then be written before the ring is read, which spares a copy of it.
        """
        window, steps = self.keys.shape[3], positions.shape[1]
        places = torch.arange(window, device=positions.device)
        first = positions[:, :1]
        if decode:
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
        each = zip(self.keys.unbind(), self.values.unbind())
        return [LayerRing(k, v, filled, visible, active, decode) for k, v in each]


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(start)))
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

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], context: Context) -> Tensor:
        """x [B, T, D] -> [B, T, D]; context: the `Window` of a whole signal, or the ring that its next frames see."""
        x = self.self_attn_layer_scale(x, self.self_attn(self.input_layernorm(x), tables, context))
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

    def forward(self, x: Tensor, state: WindowState | None = None, active: Tensor | None = None) -> Tensor:
        """A whole signal x [B, T, D], or with a state its next frames -> [B, T, D].

        Updates `state` in place, but for rows that are False in `active`, bool [B, 1, 1] (None: every row moves).
        """
        frames = x.shape[1]
        if state is not None and frames > _FRAMES_AT_ONCE:
            return torch.cat([self(piece, state, active) for piece in x.split(_FRAMES_AT_ONCE, dim=1)], dim=1)
        positions = torch.arange(frames, device=x.device)
        contexts: Sequence[Context]
        if state is None:
            positions, contexts = positions.expand(x.shape[0], -1), [Window(self.window)] * len(self.layers)
        else:
            positions = state.frames[:, None] + positions
            contexts = state.layers(positions, active, decode=frames == 1)
        tables = self.rotary(positions)
        for layer, context in zip(self.layers, contexts):
            x = layer(x, tables, context)
        if state is not None:
            state.frames.add_(frames if active is None else active[:, 0, 0] * frames)
        return self.norm(x)
