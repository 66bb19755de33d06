"""What turns a waveform into the latents of a codec, which its quantiser then codes: one encoder of samples, Code2Wav
mirrored, and one of spectra, which is small and quick to train but learns no more than mel spectra hold.

Both are causal: frame t depends on samples up to hop_length * (t + 1) - 1, so it is known as soon as it is over.
Shapes: B rows, n samples, T frames, D width, P spectra a frame, M mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.contract import SAMPLE_RATE_HZ
from omni.code2wav.conv import (
    CausalConv1d,
    ChainState,
    ConvNeXtBlock,
    ConvState,
    ResidualUnit,
    StreamingChain,
    StreamingLayer,
    StreamingSnake,
)
from omni.code2wav.window_transformer import WindowState, WindowTransformer
from omni.config.qwen3_omni import Code2WavConfig
from omni.encoders.mel import mel_filter_bank
from omni.layers.init import initialise
from omni.layers.state import State

_QUIET_START = 0.1
_QUIET = 1e-4  # of mel powers: far below quiet speech
_MIDDLE, _SPREAD = -1.0, 1.3  # of log10 mel powers in speech


class CausalDownsample1d(StreamingLayer[ConvState]):
    """Strided convolution: T inputs, a multiple of `stride`, give T / stride outputs, each after its last input."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel_size, stride=stride)
        self.context = kernel_size - stride

    def init_state(self, batch_size: int) -> ConvState:
        return ConvState(self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.context))

    def forward(self, x: Tensor, state: ConvState | None = None, active: Tensor | None = None) -> Tensor:
        return self.conv(F.pad(x, (self.context, 0)) if state is None else state.extend(x, active))


@dataclass
class CodecEncoderState(State):
    """What encoding remembers of the samples so far."""

    convolutions: ChainState
    transformer: WindowState


class CodecEncoder(nn.Module):
    """Code2Wav mirrored: causal strided convolutions, then a windowed transformer over frames.

    Frame t depends on samples up to hop_length * (t + 1) - 1: it is known as soon as it is over. width: channels at the
    sample rate, doubled by each of `upsample_rates`; by default what Code2Wav ends with. `draw_weights` is applied.
    """

    kind = "waves"

    def __init__(self, config: Code2WavConfig, width: int | None = None) -> None:
        super().__init__()
        channels = config.decoder_dim // 2 ** len(config.upsample_rates) if width is None else width
        if channels < 1:
            raise ValueError(f"a codec encoder of width {channels} has no channels; width must be at least 1")
        self.config, self.settings, dim = config, {"width": channels}, config.hidden_size
        layers: list[nn.Module] = [CausalConv1d(1, channels, kernel_size=7)]
        for rate in reversed(config.upsample_rates):
            layers += [ResidualUnit(channels, dilation) for dilation in (1, 3, 9)]
            layers += [StreamingSnake(channels), CausalDownsample1d(channels, 2 * channels, 2 * rate, rate)]
            channels *= 2
        layers += [StreamingSnake(channels), CausalConv1d(channels, dim, kernel_size=7)]
        for ratio in reversed(config.upsampling_ratios):
            layers += [ConvNeXtBlock(dim), CausalDownsample1d(dim, dim, ratio, ratio)]
        self.convolutions = StreamingChain(layers)
        self.transformer = WindowTransformer(config)
        self.to_latents = nn.Linear(dim, dim)
        draw_weights(self)

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.config.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """wave [B, n], n >= 1 -> latents [B, D, ceil(n / hop_length)]; silence is added behind the last sample."""
        return self._encode(F.pad(wave, (0, -wave.shape[1] % self.hop_length)))

    def init_state(self, batch_size: int) -> CodecEncoderState:
        """The state before the first sample."""
        return CodecEncoderState(self.convolutions.init_state(batch_size), self.transformer.init_state(batch_size))

    @torch.no_grad()
    def step(self, wave: Tensor, state: CodecEncoderState) -> Tensor:
        """The next samples [B, n], n >= 1 a multiple of hop_length -> latents [B, D, n / hop_length]; updates `state`.

        Joined, the latents of all calls equal one `forward`. Raises ValueError for a part of a frame.
        """
        _check_frames(wave, self.hop_length)
        return self._encode(wave, state)

    def _encode(self, wave: Tensor, state: CodecEncoderState | None = None) -> Tensor:
        """Whole frames of samples, of a whole signal or with a state the next of it."""
        convolved, mixed = (None, None) if state is None else (state.convolutions, state.transformer)
        x = self.transformer(self.convolutions(wave[:, None], convolved).transpose(1, 2), mixed)
        return self.to_latents(x).transpose(1, 2)


@dataclass
class MelEncoderState(State):
    """What encoding by spectra remembers: the end of the samples so far [B, n_fft - hop], and of each layer's input."""

    past: Tensor
    layers: ChainState


class MelEncoder(nn.Module):
    """Log-mel spectra of a frame, side by side, then causal ConvNeXt blocks over frames.

    Latents are of one size: codebooks could not follow them if they grew. The encoder knows nothing of phase, so the
    same sound gives nearly the same codes wherever a frame begins; a source and a filter need no more
    (`omni.code2wav.source_filter`). width: channels of its blocks; spectra: P, evenly spaced.
    """

    kind = "mel"

    def __init__(
        self, config: Code2WavConfig, width: int | None = None, *, layers: int = 2, spectra: int = 8, num_mels: int = 80
    ) -> None:
        """width: None is Code2Wav's own. Raises ValueError for spectra that do not divide a frame evenly."""
        super().__init__()
        self.config, self.width = config, config.hidden_size if width is None else width
        if self.width < 1 or spectra < 1 or config.hop_length % spectra:
            raise ValueError(
                f"a width of {self.width} and {spectra} spectra do not fit frames of {config.hop_length} samples"
            )
        self.settings: dict[str, Any] = {
            "width": self.width, "layers": layers, "spectra": spectra, "num_mels": num_mels,
        }  # fmt: skip
        self.step_length = config.hop_length // spectra
        self.n_fft = 2 ** math.ceil(math.log2(4 * self.step_length))
        blocks = (ConvNeXtBlock(self.width) for _ in range(layers))
        self.layers = StreamingChain([CausalConv1d(spectra * num_mels, self.width, kernel_size=1), *blocks])
        self.to_latents = nn.Linear(self.width, config.hidden_size)
        draw_weights(self)

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.config.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """wave [B, n], n >= 1 -> latents [B, D, ceil(n / hop_length)]; silence is added behind the last sample."""
        return self._encode(F.pad(wave, (self.n_fft - self.step_length, -wave.shape[1] % self.hop_length)))

    def init_state(self, batch_size: int) -> MelEncoderState:
        """The state before the first sample."""
        past = self.to_latents.weight.new_zeros(batch_size, self.n_fft - self.step_length)
        return MelEncoderState(past, self.layers.init_state(batch_size))

    @torch.no_grad()
    def step(self, wave: Tensor, state: MelEncoderState) -> Tensor:
        """The next samples [B, n], n >= 1 a multiple of hop_length -> latents [B, D, n / hop_length]; updates `state`.

        Joined, the latents of all calls equal one `forward`. Raises ValueError for a part of a frame.
        """
        _check_frames(wave, self.hop_length)
        heard = torch.cat((state.past, wave), dim=1)
        state.past = heard[:, heard.shape[1] - state.past.shape[1] :]
        return self._encode(heard, state.layers)

    def _encode(self, heard: Tensor, state: ChainState | None = None) -> Tensor:
        """Samples with those before them that the first window sees."""
        num_mels, spectra = self.settings["num_mels"], self.settings["spectra"]
        with torch.autocast(heard.device.type, enabled=False):  # no spectra of narrow types
            heard = heard.to(torch.promote_types(heard.dtype, torch.float32))
            filters = _filters(num_mels, self.n_fft, heard.device).to(heard.dtype)
            window = torch.hann_window(self.n_fft, dtype=heard.dtype, device=heard.device)
            power = torch.fft.rfft(heard.unfold(1, self.n_fft, self.step_length) * window).abs().square()
            levels = ((power @ filters).clamp(min=_QUIET).log10() - _MIDDLE) / _SPREAD
        patches = levels.unflatten(1, (-1, spectra)).flatten(2).transpose(1, 2)  # [B, P * M, T]
        mixed = self.layers(patches.to(self.to_latents.weight.dtype), state)
        latents = self.to_latents(mixed.transpose(1, 2))
        return F.layer_norm(latents, latents.shape[2:]).transpose(1, 2)


ENCODERS: dict[str, type[CodecEncoder] | type[MelEncoder]] = {
    CodecEncoder.kind: CodecEncoder,
    MelEncoder.kind: MelEncoder,
}


def _check_frames(wave: Tensor, hop_length: int) -> None:
    if wave.shape[1] == 0 or wave.shape[1] % hop_length:
        raise ValueError(f"step takes whole frames of {hop_length} samples, got {wave.shape[1]} samples")


@lru_cache(maxsize=8)
def _filters(num_mels: int, n_fft: int, device: torch.device) -> Tensor:
    """Mel filters [n_fft / 2 + 1, M]."""
    return mel_filter_bank(num_mels, n_fft, SAMPLE_RATE_HZ).t().to(device)


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Draw all weights for training from nothing: normal with standard deviation 1 / sqrt(fan-in), biases zero.

    Residual units and the convolution to samples start at a tenth of that, so that depth does not add up to noise that
    clips. A new model's own 0.02 suits wide layers; at small widths a codec would begin almost silent.
    """

    def std_of(name: str) -> float:
        layer = module.get_submodule(name)
        if isinstance(layer, nn.ConvTranspose1d):  # an output lies under kernel / stride inputs
            return math.sqrt(layer.stride[0] / (layer.in_channels * layer.kernel_size[0]))
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dim() < 2:  # these have rules of their own
            return 0.0
        to_samples = isinstance(layer, nn.Conv1d) and layer.out_channels == 1
        return (_QUIET_START if to_samples else 1.0) / math.sqrt(weight[0].numel())

    initialise(module, std_of)
    for unit in module.modules():
        if isinstance(unit, ResidualUnit):
            unit.conv2.conv.weight.mul_(_QUIET_START)
