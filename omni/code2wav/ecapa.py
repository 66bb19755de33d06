"""ECAPA-TDNN: one vector for the voice heard in a mel spectrogram.

Source: Desplanques et al., "ECAPA-TDNN" (2020): time-delay layers, Res2Net (Gao et al., 2019) with squeeze-excitation
(Hu et al., 2018), and pooling by attention over mean and deviation.
Shapes: B voices, C channels, F mel frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omni.config.token2wav import DiTConfig

_LEAST_VARIANCE = 1e-12  # keeps the square root's slope finite where a channel does not vary


def _conv(inputs: int, outputs: int, kernel_size: int = 1, dilation: int = 1) -> nn.Conv1d:
    """A convolution that keeps the number of frames; the signal is mirrored at its ends."""
    return nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation, padding="same", padding_mode="reflect")


class TimeDelayLayer(nn.Module):
    """Convolution and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, kernel_size, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Res2Net(nn.Module):
    """Channels in `scale` groups: the first passes, every other goes through a layer after adding the one before it."""

    def __init__(self, channels: int, scale: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList([TimeDelayLayer(width, width, kernel_size, dilation) for _ in range(scale - 1)])

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(len(self.blocks) + 1, dim=1)
        done = [first]
        for i, (layer, part) in enumerate(zip(self.blocks, rest)):
            done.append(layer(part if i == 0 else part + done[-1]))
        return torch.cat(done, dim=1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that sees the mean of all channels over time."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, squeezed)
        self.conv2 = _conv(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.mean(2, keepdim=True)).relu()).sigmoid()


class SERes2NetBlock(nn.Module):
    """Residual block: pointwise layer, Res2Net, pointwise layer, squeeze-excitation."""

    def __init__(self, channels: int, scale: int, squeezed: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.tdnn1 = TimeDelayLayer(channels, channels)
        self.res2net_block = Res2Net(channels, scale, kernel_size, dilation)
        self.tdnn2 = TimeDelayLayer(channels, channels)
        self.se_block = SqueezeExcitation(channels, squeezed)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


def mean_and_deviation(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted statistics over time of x [B, C, F], weights summing to one over F: two tensors [B, C, 1]."""
    mean = (weights * x).sum(2, keepdim=True)
    variance = (weights * (x - mean).square()).sum(2, keepdim=True)
    return mean, variance.clamp(min=_LEAST_VARIANCE).sqrt()


class AttentiveStatistics(nn.Module):
    """x [B, C, F] -> mean and deviation over time [B, 2C, 1], each channel with its own attention over the frames.

    The attention sees each frame beside the plain mean and deviation of the whole.
    """

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.tdnn = TimeDelayLayer(3 * channels, attention_channels)
        self.conv = _conv(attention_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        uniform = x.new_full((1, 1, x.shape[2]), 1 / x.shape[2])
        seen = torch.cat((x, *(s.expand_as(x) for s in mean_and_deviation(x, uniform))), dim=1)
        weights = self.conv(self.tdnn(seen).tanh()).softmax(2)
        return torch.cat(mean_and_deviation(x, weights), dim=1)


class ECAPA(nn.Module):
    """The speaker encoder: mel [B, F, mel_dim] -> [B, enc_dim]. Raises ValueError for a mel that is too short."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        channels, kernels, dilations = config.enc_channels, config.enc_kernel_sizes, config.enc_dilations
        self.blocks = nn.ModuleList([TimeDelayLayer(config.mel_dim, channels[0], kernels[0], dilations[0])])
        for width, kernel, dilation in zip(channels[1:-1], kernels[1:-1], dilations[1:-1]):
            self.blocks.append(
                SERes2NetBlock(width, config.enc_res2net_scale, config.enc_se_channels, kernel, dilation)
            )
        self.mfa = TimeDelayLayer(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = AttentiveStatistics(channels[-1], config.enc_attention_channels)
        self.fc = _conv(2 * channels[-1], config.enc_dim)
        # a mirrored border must be shorter than the signal
        self.min_frames = 1 + max(
            (kernel - 1) * dilation - (kernel - 1) * dilation // 2 for kernel, dilation in zip(kernels, dilations)
        )

    def forward(self, mel: Tensor) -> Tensor:
        if mel.shape[1] < self.min_frames:
            raise ValueError(
                f"a reference mel needs at least {self.min_frames} frames, got {mel.shape[1]}; use a longer recording"
            )
        x = self.blocks[0](mel.transpose(1, 2))
        levels = []
        for block in list(self.blocks)[1:]:
            x = block(x)
            levels.append(x)
        return self.fc(self.asp(self.mfa(torch.cat(levels, dim=1))))[:, :, 0]
