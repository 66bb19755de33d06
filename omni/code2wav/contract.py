"""What all codec decoders say of themselves; `omni.generation.sound` lists what they have to do."""

from __future__ import annotations

from typing import Any

from torch import nn

SAMPLE_RATE_HZ = 24000  # of both released families; not part of their configs


class CodecDecoder(nn.Module):
    """Base of the parts that turn codes into sound. config: has `hop_length`, samples a frame of codes."""

    config: Any

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return SAMPLE_RATE_HZ

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        hop: int = self.config.hop_length
        return hop

    @property
    def frame_rate(self) -> float:
        """Frames a second (released: 12.5, Qwen2.5-Omni's 50)."""
        return self.sample_rate / self.hop_length
