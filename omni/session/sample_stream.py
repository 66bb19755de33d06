"""Sound of any sample rate as one stream at 16 kHz whose values do not depend on how it was cut into pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.encoders.resample import ResamplerState, StreamingResampler
from omni.layers.state import State

SAMPLE_RATE_HZ = 16000
_BLOCKS_A_SECOND = 125  # 8 ms: how long a sample may wait for its block


@dataclass
class SampleStream(State):
    """The stream so far: pieces of any rate in, samples at 16 kHz out.

    A resampler's sums come out differently in the last bit when its pieces differ. It is therefore always given blocks
    of the same length, and samples wait until theirs is complete. A change of rate ends the filter of the old one.

    rate_hz: of the newest samples; waiting [n < block]: at that rate; filter: its state, None at 16 kHz; before: 16 kHz
    samples that came at earlier rates; received: samples that came at this one.
    """

    rate_hz: int = SAMPLE_RATE_HZ
    waiting: Tensor = field(default_factory=lambda: torch.zeros(0))
    filter: ResamplerState | None = None
    before: int = 0
    received: int = 0

    @property
    def length(self) -> int:
        """Samples at 16 kHz that what came so far amounts to, those that wait among them."""
        return self.before + -(-self.received * SAMPLE_RATE_HZ // self.rate_hz)

    def push(self, samples: Tensor, rate_hz: int) -> Tensor:
        """The next samples, float32 [n] at `rate_hz` -> those at 16 kHz [m] that are complete."""
        rest = self._change_rate(rate_hz) if rate_hz != self.rate_hz else []
        self.received += len(samples)
        if self.filter is None:
            return torch.cat((*rest, samples))
        resampler, samples = _resampler(self.rate_hz), torch.cat((self.waiting, samples))
        size = max(1, self.rate_hz // _BLOCKS_A_SECOND)
        full = len(samples) // size * size
        self.waiting = samples[full:].clone()
        blocks = (resampler.step(block, self.filter) for block in _blocks(samples[:full], size))
        return torch.cat((samples[:0], *rest, *blocks))

    def _change_rate(self, rate_hz: int) -> list[Tensor]:
        """The end of the samples at the old rate."""
        rest: list[Tensor] = []
        if self.filter is not None:
            old = _resampler(self.rate_hz)
            rest = [old.step(self.waiting, self.filter), old.finish(self.filter)]
        self.before, self.received = self.length, 0
        self.rate_hz, self.waiting = rate_hz, torch.zeros(0)
        self.filter = None if rate_hz == SAMPLE_RATE_HZ else _resampler(rate_hz).init_state()
        return rest


def _blocks(samples: Tensor, size: int) -> Iterator[Tensor]:
    yield from samples.view(-1, size) if len(samples) else ()


@functools.lru_cache(maxsize=8)
def _resampler(rate_hz: int) -> StreamingResampler:
    return StreamingResampler(rate_hz, SAMPLE_RATE_HZ)
