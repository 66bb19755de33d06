"""Change of sample rate by windowed sinc, for whole clips and for streams that arrive in pieces of any size.

Output j lies at input position j * source / target. It is a weighted sum of the inputs around it, and the weights
depend on the fraction of that position alone, of which there are only `target / gcd` different ones: one short filter
for each. Many outputs at once are a matrix product: all outputs of a period are the same sums of its inputs. A whole
clip is one piece of a stream, so that pieces, joined, equal the whole.
Source: Smith, "Digital Audio Resampling" (2002), with the width, roll-off and Hann window of torchaudio's default; the
filters are computed in double precision and rounded once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.encoders.checks import check_open, check_samples
from omni.layers.state import State

MIN_RATE_HZ, MAX_RATE_HZ = 1000, 768_000
_ZERO_CROSSINGS = 6  # of the sinc on either side
_ROLLOFF = 0.99  # cut-off, as a share of half the lower rate
_PRODUCTS_AT_ONCE = 1 << 20  # bounds the memory that a long piece needs
_LEAST_COLUMNS = 64  # of the matrix of a period: shorter periods are taken together
_MOST_WEIGHTS = 1 << 19  # of that matrix, mostly zeros: the rates that sound comes in stay below


@dataclass
class ResamplerState(State):
    """past [p]: the inputs that the next output still needs, p < 2 * reach; counts of samples in and out."""

    past: Tensor
    received: int = 0
    emitted: int = 0
    finished: bool = False


class StreamingResampler:
    """Mono samples at `source_hz` -> samples at `target_hz`; n samples give ceil(n * target / source).

    Holds filters only, so one object serves any number of streams. An output waits for `reach` inputs behind it
    (0.4 ms from 44.1 kHz to 16 kHz). Equal rates pass through unchanged.
    """

    def __init__(self, source_hz: int, target_hz: int = 16000) -> None:
        """Raises TypeError for rates that are not whole numbers, ValueError for rates outside 1 to 768 kHz."""
        for rate in (source_hz, target_hz):
            if isinstance(rate, bool) or not isinstance(rate, int):
                raise TypeError(f"a sample rate must be a whole number of Hz, got {rate!r}; round it")
            if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
                raise ValueError(f"a sample rate must lie in {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz, got {rate} Hz")
        self.source_hz = source_hz
        self.target_hz = target_hz
        common = math.gcd(source_hz, target_hz)
        self.source, self.target = source_hz // common, target_hz // common
        cutoff = min(self.source, self.target) * _ROLLOFF / self.source  # zero crossings per input sample
        self.reach = 0 if self.source == self.target else math.ceil(_ZERO_CROSSINGS / cutoff)
        self.filters = sinc_filters(self.target, self.reach, cutoff)
        self._copies: dict[tuple[torch.device, bool], Tensor] = {}
        self.periods = -(-_LEAST_COLUMNS // self.target)
        weights = self.periods * self.target * (self.periods * self.source + 2 * self.reach)
        self.matrix: Tensor | None = None
        if self.reach and weights <= _MOST_WEIGHTS:
            self.matrix = period_matrix(self.target, self.reach, cutoff, self.source, self.periods)

    def num_samples(self, samples: int) -> int:
        """Output samples of that many input samples."""
        return -(-samples * self.target // self.source)

    def __call__(self, samples: Tensor) -> Tensor:
        """A whole clip [n] -> fp32 [ceil(n * target / source)]. Raises as `step` does."""
        state = self.init_state(samples.device)
        return torch.cat((self.step(samples, state), self.finish(state)))

    def init_state(self, device: torch.device | str | None = None) -> ResamplerState:
        """The state before the first sample: silence."""
        return ResamplerState(torch.zeros(max(0, self.reach - 1), device=device))

    def step(self, samples: Tensor, state: ResamplerState) -> Tensor:
        """The next samples [n], n >= 0 -> the outputs [m] that they complete; updates `state` in place.

        Raises TypeError for integer samples, ValueError for samples that `check_samples` refuses and for a
        stream that is finished; the state is then as it was.
        """
        check_open(state.finished)
        return self._advance(check_samples(samples, state.received), state)

    def finish(self, state: ResamplerState) -> Tensor:
        """The outputs [m] at the end of the stream, where silence follows. The state takes no further samples."""
        check_open(state.finished)
        received = state.received
        last = self._advance(state.past.new_zeros(self.reach), state)
        state.received, state.finished = received, True
        return last

    def _advance(self, samples: Tensor, state: ResamplerState) -> Tensor:
        state.received += samples.numel()
        if self.reach == 0:
            state.emitted = state.received
            return samples
        inputs = torch.cat((state.past, samples.to(state.past)))
        ready = max(state.emitted, self.num_samples(state.received - self.reach))
        out = self._interpolate(inputs, state.emitted, ready)
        passed = ready * self.source // self.target - state.emitted * self.source // self.target
        state.past, state.emitted = inputs[passed:].clone(), ready
        return out

    def _interpolate(self, inputs: Tensor, first: int, end: int) -> Tensor:
        """Outputs `first` .. `end` - 1; `inputs` starts with the leftmost sample that output `first` needs."""
        if first == end:
            return inputs.new_zeros(0)
        origin = first * self.source // self.target
        columns = self.periods * self.target
        start, stop = -(-first // columns) * columns, end // columns * columns
        if self.matrix is None or stop <= start:
            return self._one_by_one(inputs, origin, first, end)
        return torch.cat(
            (
                self._one_by_one(inputs, origin, first, start),
                self._by_periods(inputs[start // self.target * self.source - origin :], (stop - start) // columns),
                self._one_by_one(inputs, origin, stop, end),
            )
        )

    def _on(self, device: torch.device, weights: Tensor) -> Tensor:
        """Filters or matrix on a device, copied there once."""
        key = (device, weights is self.matrix)
        if key not in self._copies:
            self._copies[key] = weights.to(device)
        return self._copies[key]

    def _by_periods(self, inputs: Tensor, blocks: int) -> Tensor:
        """`blocks` times as many outputs as the matrix has columns; `inputs` starts where the first block does."""
        assert self.matrix is not None
        matrix = self._on(inputs.device, self.matrix)
        rows = inputs.unfold(0, len(matrix), self.periods * self.source)[:blocks]
        return torch.cat([part @ matrix for part in rows.split(max(1, _PRODUCTS_AT_ONCE // len(matrix)))]).flatten()

    def _one_by_one(self, inputs: Tensor, origin: int, first: int, end: int) -> Tensor:
        """Outputs `first` .. `end` - 1; `inputs` starts with input `origin`, counted from the first that is needed."""
        filters = self._on(inputs.device, self.filters)
        taps = filters.shape[1]
        surroundings = inputs.unfold(0, taps, 1)  # a view [inputs - taps + 1, taps]
        parts = []
        for outputs in torch.arange(first, end, device=inputs.device).split(max(1, _PRODUCTS_AT_ONCE // taps)):
            position = outputs * self.source  # in units of 1 / target input samples
            near = surroundings[position // self.target - origin]
            parts.append((near * filters[position % self.target]).sum(1))
        return torch.cat(parts)


@functools.lru_cache(maxsize=8)
def sinc_filters(fractions: int, reach: int, cutoff: float) -> Tensor:
    """Low-pass filters fp32 [fractions, 2 * reach] for the positions f / fractions between two inputs.

    Tap k weighs the input k - reach + 1 samples from the one at or before the position; `cutoff` is in zero crossings
    of the sinc per input sample.
    """
    offsets = torch.arange(1 - reach, reach + 1, dtype=torch.float64)
    places = torch.arange(fractions, dtype=torch.float64)[:, None] / fractions
    crossings = ((offsets - places) * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    hann = (crossings * math.pi / (2 * _ZERO_CROSSINGS)).cos().square()
    return (crossings.sinc() * hann * cutoff).float()


@functools.lru_cache(maxsize=8)
def period_matrix(fractions: int, reach: int, cutoff: float, source: int, periods: int) -> Tensor:
    """What turns the inputs around `periods` periods into their outputs: fp32 [inputs, periods * fractions].

    A period has `source` inputs and `fractions` outputs; output j begins at input j * source // fractions.
    """
    position = torch.arange(periods * fractions) * source
    index = position // fractions + torch.arange(2 * reach)[:, None]  # [taps, outputs]
    filters = sinc_filters(fractions, reach, cutoff)
    last = (periods * fractions - 1) * source // fractions + 2 * reach
    matrix = filters.new_zeros(last, periods * fractions)
    return matrix.scatter_(0, index, filters[position % fractions].T)
