"""Is someone speaking? A probability for every 32 ms of sound at 16 kHz, from Silero's network or from levels alone.

Both detectors hold weights and settings only; what changes between frames is a state that the caller holds.
Source: Silero VAD 6 (Silero Team, github.com/snakers4/silero-vad, MIT), whose weights are in its wheel.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from omni.layers.state import State
from omni.session.loudness import band_powers, decibels

SAMPLE_RATE_HZ = 16000
FRAME = 512  # samples: 32 ms, what Silero's network was trained on
FRAME_MS = 32
_CONTEXT = 64  # samples of the frame before, read again
_MIRRORED = 64  # samples at the end of a frame
_HOP = 128  # of its spectra: four in a frame
_BINS = 129
_HIDDEN = 128
_CONVOLUTIONS = ((1, 1), (2, 2), (3, 2), (4, 1))  # number and stride
_WEIGHTS = "silero_vad_16k.safetensors"

_FLOOR_FRAMES = 64  # two seconds: speech falls to the noise more often than that
_FIRST_FRAMES = 8  # a quarter of a second, from which the floor is first known
_ABOVE_FLOOR_DB = 6.0  # of speech as likely as not
_SLOPE_DB = 1.5  # per unit of the logistic curve
_SILENT_DB = -60.0  # below this nothing is speech, whatever the floor


class VoiceDetector(Protocol):
    """What turn taking asks of a detector. The state is of its own kind and has `clone()`."""

    def init_state(self) -> Any:
        """The state before the first frame."""

    def step(self, frame: Tensor, state: Any) -> float:
        """The next frame, float32 [512] at 16 kHz -> the probability, 0 .. 1, that it holds speech; updates state."""


@dataclass
class SileroState(State):
    """context [64]: the end of the last frame; hidden, cell [1, 128] of the recurrent layer."""

    context: Tensor
    hidden: Tensor
    cell: Tensor


class SileroDetector:
    """Silero's network: spectra of a frame, four convolutions over them, an LSTM cell over the frames.

    Only the weights are taken from the package, which is not imported: that would set PyTorch's number of threads.
    """

    def __init__(self) -> None:
        """Raises FileNotFoundError where the package silero-vad or its weights are missing."""
        self.weights: dict[str, Tensor] = load_file(silero_weights())

    def init_state(self) -> SileroState:
        """Silence."""
        return SileroState(torch.zeros(_CONTEXT), torch.zeros(1, _HIDDEN), torch.zeros(1, _HIDDEN))

    @torch.no_grad()
    def step(self, frame: Tensor, state: SileroState) -> float:
        """See VoiceDetector."""
        w = self.weights
        samples = F.pad(torch.cat((state.context, frame))[None, None], (0, _MIRRORED), mode="reflect")
        parts = F.conv1d(samples, w["stft_conv.weight"], stride=_HOP)  # real above imaginary [1, 258, 4]
        x = (parts[:, :_BINS].square() + parts[:, _BINS:].square()).sqrt()
        for number, stride in _CONVOLUTIONS:
            x = F.conv1d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], stride=stride, padding=1).relu()
        state.hidden, state.cell = torch.lstm_cell(
            x[:, :, 0],
            (state.hidden, state.cell),
            *(w[f"lstm_cell.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        )
        state.context = frame[-_CONTEXT:].clone()
        logit = F.linear(state.hidden.relu(), w["final_conv.weight"][:, :, 0], w["final_conv.bias"])
        return float(logit.sigmoid())


def silero_weights() -> Path:
    """The file of weights in the installed package. Raises FileNotFoundError."""
    found = importlib.util.find_spec("silero_vad")
    for folder in () if found is None else found.submodule_search_locations or ():
        if (path := Path(folder) / "data" / _WEIGHTS).is_file():
            return path
    state = "is not installed" if found is None else f"has no {_WEIGHTS} (it came with version 6.2)"
    raise FileNotFoundError(
        f"the package silero-vad {state}; install 'thinker-talker[vad]' or use EnergyDetector(), which has none"
    )


@dataclass
class EnergyState(State):
    """levels: of the last two seconds in dB, a value for each frame."""

    levels: tuple[float, ...] = ()


class EnergyDetector:
    """Levels alone: a frame is speech as far as it is louder than the noise, the quietest frame of two seconds.

    Needs nothing, and hears any sound above the noise as speech: music, steps and keys too. The first quarter of a
    second is never speech. Noise that begins, or grows by 6 dB, is speech for two seconds, then the floor.
    """

    def init_state(self) -> EnergyState:
        """No frame yet."""
        return EnergyState()

    def step(self, frame: Tensor, state: EnergyState) -> float:
        """See VoiceDetector."""
        powers = band_powers(frame).sum(1)
        state.levels = (*state.levels, float(decibels(powers.mean())))[-_FLOOR_FRAMES:]
        if len(state.levels) <= _FIRST_FRAMES:
            return 0.0
        middle = max(min(state.levels) + _ABOVE_FLOOR_DB, _SILENT_DB)
        return 1 / (1 + math.exp(min((middle - float(decibels(powers.max()))) / _SLOPE_DB, 700)))


def default_detector() -> VoiceDetector:
    """Silero's network where the package is installed, else levels alone."""
    try:
        return SileroDetector()
    except FileNotFoundError:
        return EnergyDetector()
