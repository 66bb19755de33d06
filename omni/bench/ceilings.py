"""What this machine can do at best: bytes a second and multiplications a second.

Buffers hold random values and rotate through more memory than any cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from omni.bench.timing import seconds_of

_BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_BUFFERS = 6
_WIDTH = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """copy_bytes_s counts what a copy reads and writes, read_bytes_s what a sum reads; flops_s: a matrix product."""

    copy_bytes_s: float
    read_bytes_s: float
    flops_s: float

    @property
    def bytes_s(self) -> float:
        """The bandwidth that shares of the roofline refer to: the higher of the two."""
        return max(self.copy_bytes_s, self.read_bytes_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype, size_bytes: int | None = None) -> Ceilings:
    """Copy and read bandwidth in bytes a second, and the matrix rate of `dtype`; the best of several passes each."""
    generator = torch.Generator().manual_seed(0)
    values = (size_bytes or _BUFFER_BYTES[device.type]) // 4
    grain = torch.rand(min(values, 1 << 20), generator=generator).to(device)
    buffers = [grain.repeat(-(-values // len(grain)))[:values].clone() for _ in range(_BUFFERS)]
    total = sum(b.numel() * b.element_size() for b in buffers)
    copied, summed = _fastest(partial(_copy_all, buffers), device), _fastest(partial(_sum_all, buffers), device)
    del buffers
    width = _WIDTH[device.type] if size_bytes is None else 64
    matrices = [(torch.rand(width, width, generator=generator) - 0.5).to(device, dtype) for _ in range(_BUFFERS)]
    product = _fastest(partial(_multiply_all, matrices), device) / (len(matrices) - 1)
    return Ceilings(2 * total / copied, total / summed, 2 * width**3 / product)


def _copy_all(buffers: list[Tensor]) -> None:
    for source, target in zip(buffers, buffers[1:] + buffers[:1]):
        target.copy_(source)


def _sum_all(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        buffer.sum()


def _multiply_all(matrices: list[Tensor]) -> None:
    for a, b in pairwise(matrices):
        torch.mm(a, b)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the best of several passes, after one that does not count."""
    work()
    return min(seconds_of(work, device) for _ in range(5))
