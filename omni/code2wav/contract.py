"""What a codec decoder has to do: codes -> sound, frame by frame.

A decoder of one's own gives `init_state`, `step` and four numbers. The rest has defaults: nothing is left at the end,
the first call may lack `lookahead` samples, and the whole is the steps joined.

Shapes: B rows, K codebooks, n frames in a step, T frames in all.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omni.layers.state import State

SAMPLE_RATE_HZ = 24000  # of both released families; not part of their configs


@dataclass
class CodecState(State):
    """What a decoder remembers of the frames so far.

    Rows of a batch are decoded together where their states can be joined: they derive from this class, agree in all
    that is not a tensor, and have `received` the same. Any other object serves too; its row is then decoded alone.
    """

    @property
    def received(self) -> int:
        """Codes that have come, where rows can only be decoded together at the same one (0: at any)."""
        return 0

    @property
    def started(self) -> bool:
        """Whether steps of one frame are alike from now on, so that one may be compiled or captured. No device wait."""
        return False

    def write_row(self, row: int, one: Any) -> None:
        """Overwrite a row with a started state of one row, in place (for a decoder with `static_step`)."""
        raise NotImplementedError(f"{type(self).__name__} has no write_row(row, one), which a static_step needs")


class CodecDecoder(nn.Module):
    """A part that turns codes into sound.

    sample_rate: samples a second. hop_length: samples a frame. num_codebooks: codes a frame. lookahead: samples of the
    future that a sample depends on.
    needs_voice: it draws the sound of a recorded voice, and `init_state` takes (batch_size, voice, seed=, schedule=,
    ode=) as that of `Token2Wav`, with the turn's `codec_schedule` and `codec_ode`.
    static_step: a started step has a fixed shape, reads nothing back from the device and leaves the tensors of its
    state where they are, so that a whole speech frame can be captured. It then takes a third argument, active bool [B]
    (rows that are False stand still), its state has `write_row`, and nothing is left for `finish`.
    """

    keep_together = True  # on one device: `step` does not pass through the hooks of `forward`
    needs_voice = False
    static_step = False

    sample_rate: int
    hop_length: int
    num_codebooks: int
    lookahead: int
    least: ClassVar[dict[str, int]] = {"sample_rate": 1, "hop_length": 1, "num_codebooks": 1, "lookahead": 0}

    @property
    def frame_rate(self) -> float:
        """Frames a second (released: 12.5, Qwen2.5-Omni's 50)."""
        return self.sample_rate / self.hop_length

    @property
    def missing_samples(self) -> int:
        """Samples that all sound lacks of `hop_length` a frame."""
        return self.lookahead

    @abstractmethod
    def init_state(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """The state before the first frame, a fresh one for each turn; best a `CodecState`."""

    @abstractmethod
    def step(self, codes: Tensor, state: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The next n >= 1 frames, codes int64 [B, K, n] -> the samples that they complete [B, m] in -1 .. 1, m >= 0.

        Updates `state` in place. The samples of all steps and of `finish`, joined, do not depend on how codes were cut.
        """

    def finish(self, state: Any) -> Tensor:
        """The samples that are left once all codes have come [B, m]; none [1, 0] where steps give all there is."""
        return torch.zeros(1, 0)

    def forward(self, codes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All frames at once, codes int64 [B, K, T] -> samples [B, m]; the further arguments are `init_state`'s."""
        state = self.init_state(codes.shape[0], *args, **kwargs)
        wave = self.step(codes, state)
        return torch.cat((wave, self.finish(state).to(wave).expand(len(wave), -1)), dim=1)
