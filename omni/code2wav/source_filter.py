"""A source and a filter: speech as a pulse train and noise, each through a filter that changes every few milliseconds.

Convolutions that write samples have to learn first that a voice is a series of harmonics, which takes days of training
against discriminators. Here that is given: the network says pitch, voicing and two spectral envelopes (`Controls`) two
hundred times a second, and what follows has no weights. It learns in an hour, and costs half as much a frame.

The pulse train is the sum of all harmonics, in closed form. A filter is the minimum-phase one of its envelope, found by
its cepstrum, so that nothing looks ahead. Between two moments the sound of both filters is faded over.

Sources: Fant, 1960 (source and filter); Oppenheim and Schafer, 1975 (minimum phase by the cepstrum); Engel et al., 2020
(learning through such a synthesiser); Appleby's MurmurHash3 (the noise).
Shapes: B rows, D width, T frames, M periods, P samples a period, C bands of an envelope, n samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.conv import CausalConvTranspose1d, ChainState, ConvNeXtBlock, StreamingChain
from omni.config.qwen3_omni import SourceFilterConfig
from omni.layers.state import State

USUAL_HZ = 200.0  # pitch is octaves from here: so near to 0 that sums of many periods are exact
_OCTAVES, _FARTHEST = 0.3, 2.0  # of a unit of the network's output; limit
_STEEP = 4.0
_QUIETEST, _LOUDEST = -12.0, 6.0  # natural logarithms of magnitudes
_LEVELS = 2.0  # of a unit of the network's output
_START = (-5.0, -6.0)  # of the two envelopes, before anything is learnt
_AT_ZERO = 1e-4  # of a sine: nearer to zero its quotient is the limit


class Controls(NamedTuple):
    """What sounds at the end of each period. pitch: octaves from USUAL_HZ [B, M]; voiced: logits [B, M], above 0 the
    pulse train sounds; tone, noise: envelopes of pulse train and noise [B, M, C], natural logarithms of magnitudes."""

    pitch: Tensor
    voiced: Tensor
    tone: Tensor
    noise: Tensor

    def joined(self) -> Tensor:
        """As one tensor, fp32 [B, M, 2 + 2C]; voicing from 0 to 1, steep but with no jump that rounding could flip."""
        voiced = (_STEEP * self.voiced).sigmoid()
        return torch.cat((self.pitch[..., None], voiced[..., None], self.tone, self.noise), 2)


@dataclass
class SynthesisState(State):
    """Where the sound is: controls fp32 [B, 2 + 2C] at the end of the last period; phase fp32 [B] of the pulse train in
    cycles; tail fp32 [B, k, P], what filters still give to the next k periods; position int64 [B], samples so far."""

    controls: Tensor
    phase: Tensor
    tail: Tensor
    position: Tensor


@dataclass
class SourceFilterState(State):
    """What the network and the synthesis remember."""

    layers: ChainState
    sound: SynthesisState


class SourceFilter(nn.Module):
    """Frames of features to samples."""

    def __init__(self, config: SourceFilterConfig, inputs: int, hop_length: int, sample_rate: int) -> None:
        """inputs: D; hop_length: samples a frame, a whole number of periods."""
        super().__init__()
        self.config, self.sample_rate = config, sample_rate
        width, steps = config.width, hop_length // (config.period * config.settings_a_step)
        upsample = CausalConvTranspose1d(inputs, width, kernel_size=steps, stride=steps)
        self.layers = StreamingChain([upsample, *(ConvNeXtBlock(width) for _ in range(config.num_layers))])
        self.controls_proj = nn.Linear(width, config.settings_a_step * (2 + 2 * config.num_bands))
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # filled before a step is traced
        self.blocks = -(-(config.period + config.n_fft - 1) // config.period)  # periods that one period's sound takes

    def init_state(self, batch_size: int) -> SourceFilterState:
        """The state before the first frame."""
        weight = self.controls_proj.weight
        self.tables(weight.device)
        numbers = [(2 + 2 * self.config.num_bands,), (), (self.blocks - 1, self.config.period)]
        controls, phase, tail = (
            torch.zeros(batch_size, *shape, dtype=torch.float32, device=weight.device) for shape in numbers
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return SourceFilterState(self.layers.init_state(batch_size), SynthesisState(controls, phase, tail, position))

    def forward(self, x: Tensor, state: SourceFilterState | None = None, active: Tensor | None = None) -> Tensor:
        """A whole signal x [B, D, T], or with a state its next frames -> samples [B, n], not yet limited; updates
        `state` in place, but for rows that are False in `active`, bool [B, 1, 1] (None: every row moves)."""
        return self.sound(self.controls(x, state, active), None if state is None else state.sound, active)

    def controls(self, x: Tensor, state: SourceFilterState | None = None, active: Tensor | None = None) -> Controls:
        """What sounds, by the network: x [B, D, T] -> M = T * periods moments."""
        said = self.controls_proj(self.layers(x, None if state is None else state.layers, active).transpose(1, 2))
        said = said.view(len(said), -1, 2 + 2 * self.config.num_bands)
        pitch, voiced, envelopes = said.float().split((1, 1, 2 * self.config.num_bands), dim=2)
        tone, noise = envelopes.chunk(2, dim=2)
        return Controls(
            (_OCTAVES * pitch[..., 0]).clamp(-_FARTHEST, _FARTHEST),
            voiced[..., 0],
            _START[0] + _LEVELS * tone,
            _START[1] + _LEVELS * noise,
        )

    def sound(self, said: Controls, state: SynthesisState | None = None, active: Tensor | None = None) -> Tensor:
        """Controls of M periods -> samples fp32 [B, M * P]. Gradients reach the envelopes alone."""
        period, bands = self.config.period, self.config.num_bands
        now = said.joined()
        rows, periods, _ = now.shape
        if state is None:
            before, position = now[:, :1], now.new_zeros(rows, dtype=torch.int64)
            phase, tail = now.new_zeros(rows), now.new_zeros(rows, self.blocks - 1, period)
        else:
            phase, tail, position = state.phase, state.tail, state.position
            before = torch.where((position > 0)[:, None], state.controls, now[:, 0])[:, None]  # it begins as it is
        every = torch.cat((before, now), dim=1)  # [B, M + 1, .]
        rising = torch.arange(1, period + 1, device=now.device) / period

        pitch, voiced = (_lines(every[..., number].detach(), rising) for number in (0, 1))
        hz = USUAL_HZ * pitch.exp2()
        cycles = phase.double()[:, None] + (hz.double() / self.sample_rate).flatten(1).cumsum(1)
        pulses = voiced * _pulses(_around_zero(cycles).view_as(hz), hz, self.sample_rate)
        samples = position[:, None] + torch.arange(periods * period, device=now.device)
        hiss = white_noise(samples).view_as(hz)

        size = self.blocks * period
        tone, noise = (self._filter(every[..., 2 + k * bands : 2 + (k + 1) * bands], size) for k in (0, 1))
        waves = torch.fft.irfft(_faded(pulses, tone, rising, size) + _faded(hiss, noise, rising, size), size)
        parts = waves.view(rows, periods, self.blocks, period)
        joined = sum(F.pad(parts[:, :, k], (0, 0, k, self.blocks - 1 - k)) for k in range(self.blocks))
        joined = joined + F.pad(tail, (0, 0, 0, periods))
        if state is not None:
            _keep(state.controls, now[:, -1], active)
            _keep(state.phase, _around_zero(cycles[:, -1]), active)
            _keep(state.tail, joined[:, periods:], active)
            _keep(state.position, position + periods * period, active)
        return joined[:, :periods].flatten(1)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How much each frequency takes of the bands around it [C, n_fft / 2 + 1]; what folds a cepstrum onto its
        causal half [n_fft]."""
        if device not in self._tables:
            bands = _band_weights(self.config.num_bands, self.config.n_fft, self.sample_rate)
            self._tables[device] = bands.to(device), _causal(self.config.n_fft).to(device)
        return self._tables[device]

    def _filter(self, envelope: Tensor, size: int) -> Tensor:
        """Envelopes [B, M, C] -> spectra of their minimum-phase filters, complex [B, M, size / 2 + 1]."""
        bands, causal = self.tables(envelope.device)
        bins = envelope.clamp(_QUIETEST, _LOUDEST) @ bands
        cepstrum = torch.fft.irfft(bins, self.config.n_fft)
        return torch.fft.rfft(cepstrum * causal, size).exp()


def _faded(source: Tensor, filters: Tensor, rising: Tensor, size: int) -> Tensor:
    """Spectra of the source's periods [B, M, P], each from the filter before it to the one at its end."""
    falling, growing = torch.fft.rfft(source * (1 - rising), size), torch.fft.rfft(source * rising, size)
    return falling * filters[:, :-1] + growing * filters[:, 1:]


def _lines(values: Tensor, rising: Tensor) -> Tensor:
    """Values [B, M + 1] with straight lines between them: [B, M, P]."""
    return values[:, :-1, None] + (values[:, 1:] - values[:, :-1])[..., None] * rising


def _around_zero(cycles: Tensor) -> Tensor:
    """fp64 cycles to fp32 within a cycle, -0.5 .. 0.5: near a pulse, where it matters, nothing is rounded off."""
    return (cycles - cycles.round()).float()


def _pulses(phase: Tensor, hz: Tensor, sample_rate: int) -> Tensor:
    """The sum of the cosines of all harmonics below the highest frequency, of mean power 1: phase, in cycles around 0,
    and hz of one shape."""
    most = 0.49 * sample_rate / hz
    count = most.floor()
    below, angle = torch.sin(math.pi * phase), 2 * math.pi * phase
    at_zero = below.abs() < _AT_ZERO
    quotient = torch.sin((count + 0.5) * angle) / torch.where(at_zero, 1.0, below)
    whole = torch.where(at_zero, count, (quotient - 1) / 2)
    highest = (most - count) * torch.cos((count + 1) * angle)  # comes and goes slowly as pitch moves
    return (whole + highest) * (2 / most).sqrt()


def white_noise(samples: Tensor) -> Tensor:
    """Noise of mean power 1 at sample numbers int64 of any shape: the same number gives the same value, always."""
    mixed = samples & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)).float() / 2**31 - 1) * math.sqrt(3)


def _keep(old: Tensor, new: Tensor, active: Tensor | None) -> None:
    old.copy_(new if active is None else torch.where(active.view(-1, *[1] * (old.dim() - 1)), new, old))


def _causal(n_fft: int) -> Tensor:
    """What folds a cepstrum [n_fft] onto its causal half."""
    weights = torch.zeros(n_fft)
    weights[0] = weights[n_fft // 2] = 1
    weights[1 : n_fft // 2] = 2
    return weights


def _band_weights(num_bands: int, n_fft: int, sample_rate: int) -> Tensor:
    """[C, n_fft / 2 + 1]: each frequency lies between two bands, which are spaced as mel is from 0 to the highest."""
    top = sample_rate / 2
    mels = torch.linspace(0, 2595 * math.log10(1 + top / 700), num_bands, dtype=torch.float64)
    bands = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.linspace(0, top, n_fft // 2 + 1, dtype=torch.float64)
    upper = torch.searchsorted(bands, bins, right=True).clamp(1, num_bands - 1)
    share = ((bins - bands[upper - 1]) / (bands[upper] - bands[upper - 1])).clamp(0, 1)
    places = torch.arange(len(bins))
    weights = torch.zeros(num_bands, len(bins), dtype=torch.float64)
    weights[upper - 1, places] = 1 - share
    weights[upper, places] += share
    return weights.float()
