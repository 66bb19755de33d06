"""Causal convolutions of a whole signal, or with a state of consecutive pieces of it.

A layer's state is the end of its input so far, which is all that its next output needs: it stands in front of the new
piece where a whole signal has zeros. Hence pieces of any length, joined, equal the whole. States are updated in place,
and rows of a batch may stand still: `active` bool [B, 1, 1] is False where a row's state must not change (None: none).

A piece of one frame is only a few steps long in the wide layers. There the convolutions are written as matrix products
on the parameters themselves: torch's CPU convolutions of such sizes are up to 10 times slower. Transposed convolutions
are products at every length: as fast or faster there too.
Sources: ConvNeXt (Liu et al., 2022); the dilated residual units of the SoundStream decoder (Zeghidour et al., 2021).
Shapes: B rows, C channels, T steps in time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.snake import SnakeBeta
from omni.layers.state import State

_SMALL_SIGNAL = 32768  # values; from here on torch's convolution is as fast as the matrix product or faster
_FEW_COLUMNS = 64  # rows * steps; below it the product with the transposed weight

S = TypeVar("S", bound=State)


@dataclass
class ConvState(State):
    """past [B, C, context]: the last inputs; `skip`: leading outputs still to be dropped."""

    past: Tensor
    skip: int = 0

    def extend(self, x: Tensor, active: Tensor | None) -> Tensor:
        """The past followed by x [B, C, T]; remembers its end for the next piece."""
        if self.past.shape[-1] == 0:
            return x
        x = torch.cat((self.past, x), dim=-1)
        end = x[..., x.shape[-1] - self.past.shape[-1] :]
        self.past.copy_(end if active is None else torch.where(active, end, self.past))
        return x


@dataclass
class ChainState(State):
    """One state for each layer of a `StreamingChain`."""

    layers: list[State]


class StreamingLayer(nn.Module, Generic[S]):
    """A causal map of [B, C, T] to [B, C', T'] with a state of kind S."""

    @abstractmethod
    def init_state(self, batch_size: int) -> S:
        """The state before the first piece, in the dtype and on the device of the parameters."""

    @abstractmethod
    def forward(self, x: Tensor, state: S | None = None, active: Tensor | None = None) -> Tensor:
        """A whole signal x [B, C, T], or with a state its next piece, T >= 0; updates `state` in place."""


class StreamingChain(nn.ModuleList):
    """Streaming layers one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)

    def init_state(self, batch_size: int) -> ChainState:
        """The state before the first piece."""
        return ChainState([cast(StreamingLayer[Any], layer).init_state(batch_size) for layer in self])

    def forward(self, x: Tensor, state: ChainState | None = None, active: Tensor | None = None) -> Tensor:
        """x [B, C, T] through all layers, as `StreamingLayer.forward`."""
        states: list[Any] = [None] * len(self) if state is None else state.layers
        for layer, own in zip(self, states):
            x = layer(x, own, active)
        return x


class CausalConv1d(StreamingLayer[ConvState]):
    """Convolution whose output t sees inputs up to t: `context` zeros in front, none behind."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation, groups=groups)
        self.context = (kernel_size - 1) * dilation

    def init_state(self, batch_size: int) -> ConvState:
        return ConvState(self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.context))

    def forward(self, x: Tensor, state: ConvState | None = None, active: Tensor | None = None) -> Tensor:
        return self._convolve(F.pad(x, (self.context, 0)) if state is None else state.extend(x, active))

    def _convolve(self, x: Tensor) -> Tensor:
        if x.shape[-1] <= self.context:  # nothing but context
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        if x.numel() > _SMALL_SIGNAL:
            return self.conv(x)
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        seen = x.unfold(2, self.context + 1, 1)[
            ..., :: self.conv.dilation[0]
        ]  # what each output sees [B, C, T, kernel]
        if self.conv.groups > 1:  # depthwise
            return (seen * weight).sum(-1) + bias[:, None]
        rows, _, steps, _ = seen.shape
        columns = seen.permute(1, 3, 0, 2).reshape(weight[0].numel(), rows * steps)
        if rows * steps < _FEW_COLUMNS:  # reads a wide weight faster
            y = torch.addmm(bias, columns.t(), weight.flatten(1).t())
            return y.view(rows, steps, -1).transpose(1, 2)
        y = torch.addmm(bias[:, None], weight.flatten(1), columns)
        return y.view(-1, rows, steps).transpose(0, 1)


class CausalConvTranspose1d(StreamingLayer[ConvState]):
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

    def init_state(self, batch_size: int) -> ConvState:
        past = self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.context)
        return ConvState(past, skip=self.trim)

    def forward(self, x: Tensor, state: ConvState | None = None, active: Tensor | None = None) -> Tensor:
        if state is None:
            return self._upsample(x, 0)[..., self.trim :]
        y = self._upsample(state.extend(x, active), self.context)
        if state.skip == 0:  # always after the first piece
            return y
        drop = min(state.skip, y.shape[-1])
        state.skip -= drop
        return y[..., drop:]

    def _upsample(self, x: Tensor, context: int) -> Tensor:
        """Outputs of the inputs x [B, C, context + T] after the first `context`: [B, C, stride * T]."""
        rows, _, steps = x.shape
        if steps <= context:
            return x.new_zeros(rows, self.conv.out_channels, 0)
        pieces, rest = divmod(self.conv.kernel_size[0], self.stride)
        if rest or context != pieces - 1:
            return self.conv(x)[..., context * self.stride : steps * self.stride]
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        spread = (x.transpose(1, 2) @ weight.flatten(1)).view(rows, steps, -1, pieces, self.stride)
        y = spread[:, context:, :, 0]  # [B, T, C, stride]; piece i of an input lies under the i-th input after it
        for i in range(1, pieces):
            y = y + spread[:, context - i : steps - i, :, i]
        return (y.transpose(1, 2) + bias[:, None, None]).flatten(2)


class StreamingSnake(SnakeBeta, StreamingLayer[State]):
    """Snake among streaming layers: it looks at one step in time only, and so keeps nothing."""

    def init_state(self, batch_size: int) -> State:
        return State()

    def forward(self, x: Tensor, state: State | None = None, active: Tensor | None = None) -> Tensor:
        return super().forward(x)


class ConvNeXtBlock(StreamingLayer[ConvState]):
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

    def init_state(self, batch_size: int) -> ConvState:
        return self.dwconv.init_state(batch_size)

    def forward(self, x: Tensor, state: ConvState | None = None, active: Tensor | None = None) -> Tensor:
        mixed = self.dwconv(x, state, active)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(mixed.transpose(1, 2)))))
        return torch.addcmul(x, self.gamma[:, None], y.transpose(1, 2))


class ResidualUnit(StreamingLayer[ConvState]):
    """x + pointwise(snake(dilated convolution(snake(x))))."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv1d(channels, channels, kernel_size=7, dilation=dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv1d(channels, channels, kernel_size=1)

    def init_state(self, batch_size: int) -> ConvState:
        return self.conv1.init_state(batch_size)

    def forward(self, x: Tensor, state: ConvState | None = None, active: Tensor | None = None) -> Tensor:
        return x + self.conv2(self.act2(self.conv1(self.act1(x), state, active)))


class DecoderBlock(StreamingLayer[ChainState]):
    """Upsampling by `rate` and halving of the channels, then three residual units of growing dilation."""

    def __init__(self, inputs: int, outputs: int, rate: int, *, trim_start: bool) -> None:
        super().__init__()
        self.block = StreamingChain(
            [
                StreamingSnake(inputs),
                CausalConvTranspose1d(inputs, outputs, kernel_size=2 * rate, stride=rate, trim_start=trim_start),
                *(ResidualUnit(outputs, dilation) for dilation in (1, 3, 9)),
            ]
        )

    def init_state(self, batch_size: int) -> ChainState:
        return self.block.init_state(batch_size)

    def forward(self, x: Tensor, state: ChainState | None = None, active: Tensor | None = None) -> Tensor:
        return self.block(x, state, active)
