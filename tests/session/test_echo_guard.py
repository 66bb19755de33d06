"""The reply's own sound does not interrupt it, at any delay, gain and colour; a person does, also at the same time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from turn_sounds import echo, overheard, recording

from omni.session.echo_guard import EchoState, band_powers, best_delay, decibels
from omni.session.turn_events import Backchannel, Interrupt, ResumeReply, TurnConfig
from omni.session.turns import TurnTaking
from omni.session.voice_activity import EnergyDetector, SileroDetector

DELAYS_MS = (0, 40, 130, 310, 600)


@pytest.fixture(scope="module")
def reply() -> Tensor:
    """Five and a half seconds of speech at -20 dB."""
    sound = torch.cat([recording(name) for name in ("request.wav", "question.wav")])
    return sound / sound.square().mean().sqrt() * 0.1


@pytest.fixture(scope="module")
def person() -> Tensor:
    """Another voice's two seconds: the recording played slower, deeper."""
    sound = recording("request.wav")[:32_000]
    slower = torch.nn.functional.interpolate(sound[None, None], scale_factor=1.25, mode="linear")[0, 0]
    return slower / slower.square().mean().sqrt() * 0.1


def quiet(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 1e-3


def interruptions(microphone: Tensor, sent: Tensor, *, guarded: bool = True, detector: object = None) -> list[int]:
    turns = TurnTaking(TurnConfig(echo_guard=guarded), detector or SileroDetector())  # type: ignore[arg-type]
    return [event.at_ms for event in overheard(turns, microphone, sent, 800) if isinstance(event, Interrupt)]


@pytest.mark.parametrize("gain_db", [0, -12, -24])
@pytest.mark.parametrize("delay_ms", DELAYS_MS)
def test_an_echo_is_no_speech(reply: Tensor, delay_ms: int, gain_db: float) -> None:
    microphone = quiet(12_800 + len(reply) + 12_800)
    microphone[12_800:] += echo(torch.cat((reply, torch.zeros(12_800))), delay_ms, gain_db, seed=delay_ms)
    assert interruptions(microphone, reply) == []


def test_without_the_guard_the_echo_interrupts(reply: Tensor) -> None:
    microphone = quiet(12_800 + len(reply))
    microphone[12_800:] += echo(reply, 130, -12)
    assert interruptions(microphone, reply, guarded=False)


@pytest.mark.parametrize("low_hz, high_hz", [(50, 7500), (300, 3400), (600, 2500)])
def test_nor_is_one_through_a_telephone(reply: Tensor, low_hz: int, high_hz: int) -> None:
    microphone = quiet(12_800 + len(reply))
    microphone[12_800:] += echo(reply, 200, -6, low_hz=low_hz, high_hz=high_hz)
    for detector in (SileroDetector(), EnergyDetector()):
        assert interruptions(microphone, reply, detector=detector) == []


@pytest.mark.parametrize("over_echo_db, within_ms", [(12, 1000), (6, 1000), (0, 1400)])
@pytest.mark.parametrize("delay_ms", [40, 310])
def test_a_person_is_heard_through_the_echo(
    reply: Tensor, person: Tensor, delay_ms: int, over_echo_db: float, within_ms: int
) -> None:
    microphone = quiet(12_800 + len(reply))
    heard = echo(reply, delay_ms, -12)
    microphone[12_800:] += heard
    begins = 12_800 + 16 * 2400
    loudness = 10 ** (over_echo_db / 20) * float(heard.square().mean().sqrt()) / 0.1
    end = min(begins + len(person), len(microphone))
    microphone[begins:end] += person[: end - begins] * loudness
    (first, *_) = interruptions(microphone, reply)
    assert 600 <= first - begins / 16 <= within_ms


@pytest.mark.parametrize("after_ms", [0, 500, 2000])
def test_with_headphones_a_person_is_heard_from_the_first_second_on(
    reply: Tensor, person: Tensor, after_ms: int
) -> None:
    microphone = quiet(12_800 + len(reply))
    begins = 12_800 + 16 * after_ms
    end = min(begins + len(person), len(microphone))
    microphone[begins:end] += person[: end - begins]
    (first, *_) = interruptions(microphone, reply)
    assert 600 <= first - begins / 16 <= (1400 if after_ms < 600 else 900)


def test_what_was_learnt_serves_the_next_reply(reply: Tensor, person: Tensor) -> None:
    """In a second reply a person can interrupt sooner than in the first, where the echo is unknown."""
    sent = reply[:48_000]
    heard = echo(torch.cat((sent, torch.zeros(32_000))), 130, -12)
    turns = TurnTaking(TurnConfig(), SileroDetector())
    events = overheard(turns, quiet(12_800 + len(heard)) + torch.cat((torch.zeros(12_800), heard)), sent, 800)
    assert not any(isinstance(event, (Interrupt, ResumeReply)) for event in events)
    microphone = quiet(len(heard)) + heard
    microphone[: len(person)] += person * 0.5
    begins = turns.position_ms
    first = next(event for event in overheard(turns, microphone, sent) if isinstance(event, Interrupt))
    assert 600 <= first.at_ms - begins <= 900


def test_a_hum_over_the_echo_of_a_reply_is_a_backchannel(reply: Tensor) -> None:
    """'mhm': 0.4 s of voice, at the echo's level."""
    time = torch.arange(16 * 400) / 16000
    hum = sum(torch.sin(2 * torch.pi * 140 * k * time) / k**2 for k in range(1, 8)) * torch.hann_window(16 * 400)
    microphone = quiet(12_800 + len(reply))
    microphone[12_800:] += echo(reply, 130, -20)
    microphone[51_200 : 51_200 + len(hum)] += hum * 0.1
    turns = TurnTaking(TurnConfig(), EnergyDetector())
    events = overheard(turns, microphone, reply, 800)
    assert {type(event) for event in events} <= {Backchannel}


@pytest.mark.parametrize("steps", [0, 1, 5, 37, 64])
def test_the_delay_is_found(steps: int) -> None:
    far = torch.randn(64 + 120, 16) * 8
    near = far[64 - steps : 64 - steps + 120] - 20 + torch.randn(120, 16)
    assert best_delay(near, far) == steps


def test_bands_hold_the_power() -> None:
    noise = torch.randn(256 * 400) * 0.1
    levels = decibels(band_powers(noise).mean(0))
    assert (levels - levels.mean()).abs().max() < 0.5 and abs(float(levels.mean()) + 20) < 0.5


def test_nothing_sent_explains_nothing() -> None:
    state = EchoState()
    for _ in range(100):
        assert state.step(torch.randn(512), torch.zeros(2, 16))
    assert len(state.near) == 0  # and costs nothing
