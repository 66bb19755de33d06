"""What every encoder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EncoderOutput(NamedTuple):
    """The tokens of all items (clips, images, videos), packed in the order of the items.

    embeds [N, D] in the Thinker's width; `lengths` are the tokens of each item, with sum N; `taps` are the DeepStack
    features [N, D], one tensor a tap (none for audio).
    """

    embeds: Tensor
    lengths: list[int]
    taps: list[Tensor]
