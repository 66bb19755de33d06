"""BigVGAN: mel frames to samples, the whole signal or piece by piece.

No layer is causal, but each sees a bounded stretch of its input, so that every sample depends on a bounded number of
mel frames to either side: `reach`, computed from the layers. A piece is decoded inside its frames of context, which
makes it equal to the same stretch of the whole.
Source: Lee et al., "BigVGAN" (2023). Shapes: B rows, F mel frames, M mel bins, C channels, T steps in time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni.code2wav.antialias import REACH, FilteredSnake
from omni.config.token2wav import BigVGANConfig
from omni.layers.state import State

_EDGE_KERNEL = 7  # of the first and the last convolution
_FRAMES_AT_ONCE = 512  # bounds the memory of decoding without gradients (5 s, released config)
_DB_RANGE, _DB_REFERENCE = 115.0, 20.0  # the mel's level: from -115 dB to 0 dB, where 20 dB is full scale


@dataclass
class BigVGANState(State):
    """The frames [B, f, M] that samples still to come depend on. `first` is the index of the oldest of these, `done`
    the frames whose samples are out; all rows are at the same frame."""

    mel: Tensor
    lookahead: int
    first: int = 0
    done: int = 0
    finished: bool = False


class AMPBlock(nn.Module):
    """Three residual pairs of convolutions, dilated and plain, each after a filtered Snake: [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList([_same(channels, channels, kernel_size, d) for d in dilations])
        self.convs2 = nn.ModuleList([_same(channels, channels, kernel_size) for _ in dilations])
        self.activations = nn.ModuleList([FilteredSnake(channels) for _ in range(2 * len(dilations))])

    def forward(self, x: Tensor) -> Tensor:
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2)):
            y = dilated(self.activations[2 * i](x))
            x = x + plain(self.activations[2 * i + 1](y))
        return x


def _same(inputs: int, outputs: int, kernel_size: int, dilation: int = 1, bias: bool = True) -> nn.Conv1d:
    """A convolution of odd kernel that keeps the length, zeros around the signal."""
    return nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation, padding=dilation * (kernel_size // 2), bias=bias)


class BigVGAN(nn.Module):
    """Log-amplitude mel [B, F, M] -> samples in -1 .. 1 [B, hop_length * F]."""

    def __init__(self, config: BigVGANConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.upsample_initial_channel
        self.conv_pre = _same(config.mel_dim, channels, _EDGE_KERNEL)
        ups, blocks = [], []
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes):
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            ups.append(nn.Sequential(up))
            channels //= 2
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes):
                blocks.append(AMPBlock(channels, size, dilations))
        self.ups, self.resblocks = nn.ModuleList(ups), nn.ModuleList(blocks)
        self.activation_post = FilteredSnake(channels)
        self.conv_post = _same(channels, 1, _EDGE_KERNEL, bias=False)

    @property
    def hop_length(self) -> int:
        """Samples a mel frame."""
        return self.config.hop_length

    @property
    def reach(self) -> tuple[int, int]:
        """Mel frames before and after a frame that its samples depend on (released: 34 and 34)."""
        return frame_reach(self.config)

    def forward(self, mel: Tensor) -> Tensor:
        """Raises ValueError for another number of mel bins. Without gradients a long signal is decoded in pieces."""
        self._check(mel)
        if mel.shape[1] > _FRAMES_AT_ONCE and not torch.is_grad_enabled():
            state = self.init_state(mel.shape[0])
            pieces = list(mel.split(_FRAMES_AT_ONCE, dim=1))
            return torch.cat([self.step(x, state, last=i + 1 == len(pieces)) for i, x in enumerate(pieces)], dim=1)
        if mel.shape[1] == 0:
            return mel.new_zeros(mel.shape[0], 0)
        return self._decode(mel)

    def init_state(self, batch_size: int, lookahead: int | None = None) -> BigVGANState:
        """The state before the first frame.

        lookahead: frames of the future that a sample waits for. None is all that it depends on, which makes the pieces
        equal the whole; fewer are an approximation, heard earlier.
        """
        after = self.reach[1] if lookahead is None else lookahead
        if after < 0:
            raise ValueError(f"lookahead must not be negative, got {lookahead}")
        return BigVGANState(self.conv_pre.weight.new_zeros(batch_size, 0, self.config.mel_dim), after)

    @torch.no_grad()
    def step(self, mel: Tensor, state: BigVGANState, last: bool = False) -> Tensor:
        """The next n >= 0 frames mel [B, n, M] -> the samples that are now certain [B, m]; updates `state` in place.

        A frame's samples come once `lookahead` frames after it are there; `last` gives all that are left.
        """
        self._check(mel)
        if state.finished:
            raise ValueError("this signal has ended; make a fresh state for the next one")
        state.mel = torch.cat((state.mel, mel), dim=1)
        frames = state.first + state.mel.shape[1]
        ready = frames if last else max(state.done, frames - state.lookahead)
        samples = mel.new_zeros(mel.shape[0], 0)
        if ready > state.done:
            offset = state.done - state.first
            samples = self._decode(state.mel)[:, offset * self.hop_length : (ready - state.first) * self.hop_length]
        state.done, state.finished = ready, last
        forget = max(0, state.done - self.reach[0] - state.first)
        state.mel, state.first = state.mel[:, forget:], state.first + forget
        return samples

    def _decode(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(normalise_level(mel).transpose(1, 2))
        size = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(x)
            total = self.resblocks[i * size](x)
            for block in list(self.resblocks)[i * size + 1 : (i + 1) * size]:
                total = total + block(x)
            x = total / size
        return self.conv_post(self.activation_post(x)).clamp(-1, 1)[:, 0]

    def _check(self, mel: Tensor) -> None:
        if mel.dim() != 3 or mel.shape[2] != self.config.mel_dim:
            raise ValueError(f"a mel must have shape [rows, frames, {self.config.mel_dim} bins], got {list(mel.shape)}")


def normalise_level(mel: Tensor) -> Tensor:
    """Natural-log amplitudes to decibels, and -115 .. 0 dB of these to -1 .. 1."""
    decibels = 20 / math.log(10) * mel - _DB_REFERENCE
    return (2 * (decibels + _DB_RANGE) / _DB_RANGE - 1).clamp(-1, 1)


def frame_reach(config: BigVGANConfig) -> tuple[int, int]:
    """Mel frames before and after a frame that its samples depend on.

    Follows the first and last sample of frame 0 back through the layers to the steps that they read.
    """
    block = max(
        sum((kernel // 2) * (dilation + 1) + 2 * REACH for dilation in dilations)
        for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
    )
    first, last = 0, config.hop_length - 1
    first, last = first - _EDGE_KERNEL // 2 - REACH, last + _EDGE_KERNEL // 2 + REACH
    for rate, kernel in reversed(list(zip(config.upsample_rates, config.upsample_kernel_sizes))):
        first, last = first - block, last + block
        padding = (
            kernel - rate
        ) // 2  # input i makes the outputs rate * i - padding .. rate * i - padding + kernel - 1
        first, last = -(-(first + padding - kernel + 1) // rate), (last + padding) // rate
    return -(first - _EDGE_KERNEL // 2), last + _EDGE_KERNEL // 2
