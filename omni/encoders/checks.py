"""What the streaming encoders refuse, in the same words for a whole clip and for a piece of one."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_SAMPLE = 1e15  # the squares that a spectrum adds up must stay within fp32


def check_samples(samples: Tensor, first: int = 0) -> Tensor:
    """Samples [n] in fp32, after checking that they are floating, one-dimensional, finite and not absurdly large.

    `first` is the place of the first one in its clip, for the message. Raises TypeError or ValueError.
    """
    if not torch.is_floating_point(samples):
        raise TypeError(f"audio samples must be floating point in -1 .. 1, got {samples.dtype}; divide by full scale")
    if samples.dim() != 1:
        raise ValueError(f"audio must be one channel of samples [n], got shape {list(samples.shape)}; mix it down")
    samples = samples.float()
    if bool((samples.abs() <= _MAX_SAMPLE).all()):  # the one time that the host waits for the device
        return samples
    if not torch.isfinite(samples).all():
        bad = int((~torch.isfinite(samples)).nonzero()[0])
        raise ValueError(
            f"audio sample {first + bad} is {samples[bad].item()}; NaN and infinite samples cannot be encoded"
        )
    raise ValueError(f"audio samples reach {samples.abs().max():g}; scale them to -1 .. 1")


def check_open(finished: bool) -> None:
    """Raise ValueError for a clip whose end has been taken."""
    if finished:
        raise ValueError("this clip is finished and takes no more input; start the next one with init_state()")
