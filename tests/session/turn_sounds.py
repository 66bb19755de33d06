"""Sounds for the tests of turn taking: bursts with known edges, rooms, packaged recordings; and a plain detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from omni.layers.state import State
from omni.packaged.nano import DEMO
from omni.session.turn_events import TurnEvent
from omni.session.turns import TurnTaking

RATE_HZ = 16000


@dataclass
class NoState(State):
    """Of a detector that looks at one frame."""


class LoudDetector:
    """Speech is what is louder than -40 dB: decisions can be foretold to the frame."""

    def init_state(self) -> NoState:
        return NoState()

    def step(self, frame: Tensor, state: Any) -> float:
        return float(float(frame.square().mean()) > 1e-4)


def bursts(*parts: tuple[int, bool], rate_hz: int = RATE_HZ, seed: int = 0) -> Tensor:
    """Noise of -20 dB or nearly silence: (milliseconds, loud?) one after the other."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(rate_hz * ms // 1000, generator=generator) * (0.1 if loud else 1e-4) for ms, loud in parts]
    return torch.cat((torch.zeros(0), *pieces))


def recording(name: str) -> Tensor:
    """A packaged recording at 16 kHz."""
    samples, rate_hz = soundfile.read(DEMO / name, dtype="float32")
    assert rate_hz == RATE_HZ
    return torch.from_numpy(samples)


def edges_ms(samples: Tensor, *, share: float = 0.02) -> tuple[float, float]:
    """Where speech begins and ends: the first and last sample over 2 % (or another share) of the largest."""
    loud = np.flatnonzero(samples.abs().numpy() > share * float(samples.abs().max()))
    return loud[0] / 16, (loud[-1] + 1) / 16


def in_noise(speech: Tensor, snr_db: float | None, *, lead: int = RATE_HZ, seed: int = 0) -> Tensor:
    """Speech between `lead` samples and 1.2 s of silence, in white noise; None: noise as quiet as the recordings' own,
    and around the speech only."""
    level = 1.4e-3 if snr_db is None else float(speech.square().mean().sqrt()) * 10 ** (-snr_db / 20)
    noise = torch.randn(lead + len(speech) + 19_200, generator=torch.Generator().manual_seed(seed)) * level
    if snr_db is None:
        noise[lead : lead + len(speech)] = 0
    noise[lead : lead + len(speech)] += speech
    return noise


def echo(
    sent: Tensor, delay_ms: int, gain_db: float, *, low_hz: int = 200, high_hz: int = 6000, seed: int = 0
) -> Tensor:
    """Sent sound as a microphone hears it: late, weak, in a room of 0.3 s, through a small loudspeaker."""
    generator = torch.Generator().manual_seed(seed)
    taps = 4800
    room = torch.randn(taps, generator=generator) * 10 ** (-3 * torch.arange(taps) / taps) * 0.3
    room[0] = 1
    lines = torch.linspace(0, 8000, (len(sent) + taps) // 2 + 1)
    speaker = (1 / (1 + (low_hz / (lines + 1)) ** 4) / (1 + (lines / high_hz) ** 4)).sqrt()
    heard = torch.fft.irfft(
        torch.fft.rfft(sent, len(sent) + taps) * torch.fft.rfft(room / room.norm(), len(sent) + taps) * speaker,
        len(sent) + taps,
    )
    return torch.cat((torch.zeros(delay_ms * 16), heard))[: len(sent)] * 10 ** (gain_db / 20)


def overheard(turns: TurnTaking, microphone: Tensor, sent: Tensor, from_ms: int = 0) -> list[TurnEvent]:
    """Events while a reply is sent as it is played, from a position on; it is not sent any more once interrupted."""
    events: list[TurnEvent] = []
    begins = from_ms * 16
    for place in range(0, len(microphone), 1600):
        if begins <= place < begins + len(sent):
            if place < begins + 1600:
                turns.reply_started()
            turns.reply_sent(sent[place - begins : place - begins + 1600], RATE_HZ)
            if place + 1600 >= begins + len(sent):
                turns.reply_ended()
        events += turns.push(microphone[place : place + 1600], RATE_HZ)
        if turns.state.playback is not None and turns.state.playback.paused:
            sent = sent[:0]
    return events
