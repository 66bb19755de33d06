"""Causal convolutions that run on a whole signal (`forward`) or on consecutive pieces of it (`step`).

A layer's state is the end of its input so far, which is all that its next output needs: `step` puts it in front of the
new piece where `forward` puts zeros. Hence pieces of any length, joined, equal the whole.
Sources: Snake (Ziyin et al., 2020) with a separate magnitude (BigVGAN, Lee et al., 2022); ConvNeXt (Liu et al., 2022);
the dilated residual units of the SoundStream decoder (Zeghidour et al., 2021).
Shapes: B rows, C channels, T steps in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.layers.state import State


@dataclass
class ConvState(State):
    """past [B, C, context]: the last inputs; `skip`: leading outputs still to be dropped."""

    past: Tensor
    skip: int = 0

    def extend(self, x: Tensor) -> Tensor:
        """The past followed by x [B, C, T]; remembers its end for the next piece."""
        x = torch.cat((self.past, x), dim=-1)
        self.past.copy_(x[..., x.shape[-1] - self.past.shape[-1] :])
        return x


@dataclass
class ChainState(State):
    """One state for each layer of a `StreamingChain`."""

    layers: list[State]


class StreamingLayer(nn.Module):
    """A causal map of [B, C, T]. This base suits layers that look at one step in time only: they keep no state."""

    def init_state(self, batch_size: int) -> State:
        """The state before the first piece, in the dtype and on the device of the parameters."""
        return State()

    def step(self, x: Tensor, state: State) -> Tensor:
        """The next piece x [B, C, T] of a signal, T >= 0 -> its outputs; updates `state` in place."""
        return self(x)


class StreamingChain(nn.ModuleList):
    """Streaming layers one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T] through all layers."""
        for layer in self:
            x = layer(x)
        return x

    def init_state(self, batch_size: int) -> State:
        """The state before the first piece."""
        return ChainState([cast(StreamingLayer, layer).init_state(batch_size) for layer in self])

    def step(self, x: Tensor, state: State) -> Tensor:
        """The next piece x [B, C, T] of a signal -> its outputs; updates `state` in place."""
        for layer, own in zip(self, cast(ChainState, state).layers):
            x = cast(StreamingLayer, layer).step(x, own)
        return x


class CausalConv1d(StreamingLayer):
    """Convolution whose output t sees inputs up to t: `context` zeros in front, none behind."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation, groups=groups)
        self.context = (kernel_size - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(F.pad(x, (self.context, 0)))

    def init_state(self, batch_size: int) -> State:
        return ConvState(self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.context))

    def step(self, x: Tensor, state: State) -> Tensor:
        return self._convolve(cast(ConvState, state).extend(x))

    def _convolve(self, x: Tensor) -> Tensor:
        if x.shape[-1] <= self.context:  # nothing but context
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        return self.conv(x)


class CausalConvTranspose1d(StreamingLayer):
    """Upsampling by `stride`: T inputs give stride * T outputs, less `overlap` at the start if `trim_start`.

    Each input adds kernel_size outputs, of which the last `overlap = kernel_size - stride` lie under the next input's.
    Those beyond the last input are cut off. The released weights are trained with as many cut off at the start of the
    signal, so that every sample looks `overlap` samples ahead; without `trim_start` the layer is strictly causal.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, *, trim_start: bool = True) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel_size, stride=stride)
        self.stride = stride
        overlap = kernel_size - stride
        self.context = -(-overlap // stride)  # inputs whose outputs reach under the next input's
        self.trim = overlap if trim_start else 0

    def forward(self, x: Tensor) -> Tensor:
        return self._upsample(x, 0)[..., self.trim :]

    def init_state(self, batch_size: int) -> State:
        past = self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.context)
        return ConvState(past, skip=self.trim)

    def step(self, x: Tensor, state: State) -> Tensor:
        state = cast(ConvState, state)
        y = self._upsample(state.extend(x), self.context)
        drop = min(state.skip, y.shape[-1])  # nothing after the first piece
        state.skip -= drop
        return y[..., drop:]

    def _upsample(self, x: Tensor, context: int) -> Tensor:
        """Outputs of the inputs x [B, C, context + T] after the first `context`: [B, C, stride * T]."""
        if x.shape[-1] <= context:
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        return self.conv(x)[..., context * self.stride : x.shape[-1] * self.stride]


class SnakeBeta(StreamingLayer):
    """x + sin^2(a x) / b, with a and b per channel, kept as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def initialise(self, std: float) -> None:
        """a = b = 1."""
        nn.init.zeros_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (x * a).sin().square() / (b + 1e-9)


class ConvNeXtBlock(StreamingLayer):
    """Residual block: depthwise causal convolution, then a feed-forward layer on each step, scaled by gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = CausalConv1d(channels, channels, kernel_size=7, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def initialise(self, std: float) -> None:
        """gamma = 1e-6, as in the paper: the block starts as the identity."""
        nn.init.constant_(self.gamma, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._pointwise(self.dwconv(x))

    def init_state(self, batch_size: int) -> State:
        return self.dwconv.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> Tensor:
        return x + self._pointwise(self.dwconv.step(x, state))

    def _pointwise(self, x: Tensor) -> Tensor:
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(x.transpose(1, 2)))))
        return (self.gamma * y).transpose(1, 2)


class ResidualUnit(StreamingLayer):
    """x + pointwise(snake(dilated convolution(snake(x))))."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv1d(channels, channels, kernel_size=7, dilation=dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))

    def init_state(self, batch_size: int) -> State:
        return self.conv1.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> Tensor:
        return x + self.conv2(self.act2(self.conv1.step(self.act1(x), state)))


class DecoderBlock(StreamingLayer):
    """Upsampling by `rate` and halving of the channels, then three residual units of growing dilation."""

    def __init__(self, inputs: int, outputs: int, rate: int, *, trim_start: bool) -> None:
        super().__init__()
        self.block = StreamingChain(
            [
                SnakeBeta(inputs),
                CausalConvTranspose1d(inputs, outputs, kernel_size=2 * rate, stride=rate, trim_start=trim_start),
                *(ResidualUnit(outputs, dilation) for dilation in (1, 3, 9)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def init_state(self, batch_size: int) -> State:
        return self.block.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> Tensor:
        return self.block.step(x, state)
