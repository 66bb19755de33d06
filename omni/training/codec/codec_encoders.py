"""What turns a waveform into the latents of a codec, which its quantiser then codes: an encoder of samples, Code2Wav
mirrored, and one of what a source and a filter would be told, which is small and quick to train.

Shapes: B rows, n samples, T frames, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.code2wav import Code2Wav
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
from omni.code2wav.source_filter import Controls
from omni.code2wav.window_transformer import WindowState, WindowTransformer
from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.init import initialise
from omni.layers.state import State
from omni.training.codec.decoding import controls_of

_QUIET_START = 0.1
_MIDDLE, _SPREAD = -5.0, 2.0  # of envelopes of speech
_KERNEL = 5  # frames


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
        if wave.shape[1] == 0 or wave.shape[1] % self.hop_length:
            raise ValueError(f"step takes whole frames of {self.hop_length} samples, got {wave.shape[1]} samples")
        return self._encode(wave, state)

    def _encode(self, wave: Tensor, state: CodecEncoderState | None = None) -> Tensor:
        """Whole frames of samples, of a whole signal or with a state the next of it."""
        convolved, mixed = (None, None) if state is None else (state.convolutions, state.transformer)
        x = self.transformer(self.convolutions(wave[:, None], convolved).transpose(1, 2), mixed)
        return self.to_latents(x).transpose(1, 2)


class ControlsEncoder(nn.Module):
    """What a source and a filter would have to be told to sound like the recording, and convolutions over frames.

    It knows nothing of phase, nor of what in a spectrum belongs to the pitch, so codes hold what is to be said and
    little else. It looks some frames ahead and hears a recording as a whole. Latents are of one size: codebooks could
    not follow them if they grew. width: channels; layers: convolutions, each over `_KERNEL` frames.
    """

    kind = "controls"

    def __init__(self, code2wav: Code2Wav, width: int | None = None, *, layers: int = 2) -> None:
        """width: None is Code2Wav's own. Raises ValueError for a Code2Wav that has no source and filter."""
        super().__init__()
        source = code2wav.source_filter
        if source is None:
            raise ValueError("an encoder of controls needs a Code2Wav that has a source and a filter")
        self.config, self.source = code2wav.config, [source]  # in a list: no part of this module
        width = self.config.hidden_size if width is None else width
        self.settings = {"width": width, "layers": layers}
        sound = source.config
        self.together = sound.settings_a_step
        inputs = self.hop_length // (sound.period * self.together) * (2 + sound.num_bands)
        self.first = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(_Mixing(width) for _ in range(layers))
        self.to_latents = nn.Linear(width, self.config.hidden_size)
        draw_weights(self)

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.config.hop_length

    def forward(self, wave: Tensor, told: Controls | None = None) -> Tensor:
        """wave [B, n], n >= 1 -> latents [B, D, ceil(n / hop_length)]; silence is added behind the last sample.

        told: what `controls_of` gives for it, where that is known.
        """
        if told is None:
            told = controls_of(self.source[0], F.pad(wave, (0, -wave.shape[1] % self.hop_length)))
        voiced = (told.voiced > 0).to(told.pitch)
        heard = torch.stack((told.pitch * voiced, voiced), dim=2)
        seen = torch.cat((heard, (told.tone - _MIDDLE) / _SPREAD), dim=2).unflatten(1, (-1, self.together)).mean(2)
        steps = self.first.in_features // seen.shape[2]
        x = self.first(seen.unflatten(1, (-1, steps)).flatten(2).to(self.first.weight))
        for layer in self.layers:
            x = layer(x)
        latents = self.to_latents(x)
        return F.layer_norm(latents, latents.shape[2:]).transpose(1, 2)


class _Mixing(nn.Module):
    """A residual block over frames [B, T, D]: depthwise convolution, then a feed-forward layer on each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.down(F.gelu(self.up(mixed)))


ENCODERS: dict[str, type[CodecEncoder] | type[ControlsEncoder]] = {
    CodecEncoder.kind: CodecEncoder,
    ControlsEncoder.kind: ControlsEncoder,
}


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
