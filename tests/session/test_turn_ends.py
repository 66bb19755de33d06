"""Where speech begins and ends in recordings, in silence and in noise, against its true edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from turn_sounds import edges_ms, in_noise, recording

from omni.encoders.resample import StreamingResampler
from omni.model import OmniModel
from omni.packaged.nano import nano_model
from omni.session.turn_events import SpeechStarted, SpeechStopped, TurnConfig
from omni.session.turns import TurnTaking
from omni.session.voice_activity import EnergyDetector, SileroDetector, VoiceDetector

FRAME_MS = 32
SILERO, LEVELS = SileroDetector(), EnergyDetector()


@pytest.fixture(scope="module")
def model() -> OmniModel:
    return nano_model()


def found(sound: Tensor, lead: int, snr_db: float | None, detector: VoiceDetector) -> tuple[float, float, float]:
    """Begin, end and stop of the one turn, less the true begin, end, and end with the silence (ms)."""
    first, last = (edge + lead / 16 for edge in edges_ms(sound))
    started, stopped = TurnTaking(TurnConfig(), detector).push(in_noise(sound, snr_db, lead=lead, seed=lead))
    assert isinstance(started, SpeechStarted) and isinstance(stopped, SpeechStopped)
    return started.speech_ms - first, stopped.speech_end_ms - last, stopped.at_ms - last - 500


# How far before its true end speech may be thought to have ended, in ms: weak last sounds ("fish") drown in noise.
EARLY_MS = {
    (SILERO, None): 32,
    (SILERO, 20): 32,
    (SILERO, 10): 80,
    (LEVELS, None): 32,
    (LEVELS, 20): 56,
    (LEVELS, 10): 216,
}


@pytest.mark.parametrize("detector", [SILERO, LEVELS], ids=["silero", "levels"])
@pytest.mark.parametrize("snr_db", [None, 20, 10])
@pytest.mark.parametrize("name", ["request.wav", "question.wav"])
@pytest.mark.parametrize("shift", [0, 171, 400])
def test_recordings(name: str, shift: int, snr_db: float | None, detector: VoiceDetector) -> None:
    sound = recording(name)
    begin, end, stop = found(sound, 16000 + shift, snr_db, detector)
    tail = edges_ms(sound, share=0.01)[1] - edges_ms(sound)[1]  # a breath, which may count as speech
    assert abs(begin) <= FRAME_MS
    assert -EARLY_MS[detector, snr_db] <= end <= tail + FRAME_MS
    assert 0 <= stop - end <= FRAME_MS


@pytest.mark.parametrize("text", ["the old king", "please say my red car", "what is two plus seven"])
def test_speech_of_the_packaged_model(text: str, model: OmniModel) -> None:
    sound = StreamingResampler(24_000)(model.speak(text, audio_sampling={"temperature": 0}))
    first, last = edges_ms(sound)
    sound = sound[int(first * 16) : int(last * 16)]
    for snr_db, early_ms in ((None, 32), (20, 32), (10, 80)):
        begin, end, _ = found(sound, 16000, snr_db, SILERO)
        assert abs(begin) <= (FRAME_MS if snr_db != 10 else 2 * FRAME_MS)
        assert -early_ms <= end <= FRAME_MS


@pytest.mark.parametrize("detector", [SILERO, LEVELS], ids=["silero", "levels"])
def test_other_rates_find_the_same(detector: VoiceDetector) -> None:
    sound = in_noise(recording("question.wav"), 30)
    expected = TurnTaking(detector=detector).push(sound, 16000)
    slow = torch.nn.functional.interpolate(sound[None, None], scale_factor=3, mode="linear")[0, 0]  # 48 kHz
    events = TurnTaking(detector=detector).push(slow, 48_000)
    assert [type(event) for event in events] == [type(event) for event in expected]
    assert max(abs(event.at_ms - other.at_ms) for event, other in zip(events, expected)) <= FRAME_MS


def test_noise_alone_is_no_speech() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(16000 * 10, generator=generator)
    hum = torch.sin(2 * torch.pi * 50 * torch.arange(len(noise)) / 16000)
    for sound in (noise * 0.003, noise * 0.03, noise * 0.1, hum * 0.1, torch.zeros(len(noise))):
        for detector in (SILERO, LEVELS):
            assert TurnTaking(detector=detector).push(sound) == []


def test_speech_from_the_first_sample_on() -> None:
    sound = recording("request.wav")
    first, _ = edges_ms(sound)
    started = TurnTaking(detector=SILERO).push(sound[int(first * 16) :])[0]
    assert isinstance(started, SpeechStarted) and started.start_ms == 0 and started.speech_ms <= FRAME_MS
