"""The detectors: Silero's network is the package's own, levels know the noise."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from turn_sounds import bursts, in_noise, recording

from omni.session import voice_activity
from omni.session.voice_activity import EnergyDetector, SileroDetector, VoiceDetector, default_detector, silero_weights


def probabilities(detector: VoiceDetector, samples: torch.Tensor) -> torch.Tensor:
    state = detector.init_state()
    return torch.tensor([detector.step(frame, state) for frame in samples[: len(samples) // 512 * 512].view(-1, 512)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_silero_is_the_network_of_its_package() -> None:
    """Against the package's own TorchScript of that network, given the same weights."""
    with torch.no_grad():
        network = torch.jit.load(str(silero_weights().parent / "silero_vad.jit"))
        detector = SileroDetector()
        parts = {f"encoder.{i}.reparam_conv": f"conv{i + 1}" for i in range(4)} | {"decoder.decoder.2": "final_conv"}
        names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in parts.items() for kind in ("weight", "bias")}
        names["stft.forward_basis_buffer"] = "stft_conv.weight"
        for name, value in network.state_dict().items():
            if name.startswith("_model."):
                inner = name.removeprefix("_model.")
                new = names.get(inner, inner.replace("decoder.rnn", "lstm_cell"))
                assert detector.weights[new].shape == value.shape
                detector.weights[new] = value.clone()
        sound = in_noise(recording("question.wav"), 20)[: 512 * 80]
        expected = torch.tensor([float(network(frame, 16000)) for frame in sound.view(-1, 512)])
    assert (probabilities(detector, sound) - expected).abs().max() < 1e-4
    assert expected.max() > 0.9 > 0.1 > expected.min()


def test_silero_hears_speech_and_not_noise() -> None:
    sound = in_noise(recording("request.wav"), 20)
    found = probabilities(SileroDetector(), sound)
    assert found[:30].max() < 0.5 and found[40:125].mean() > 0.95 and found[-20:].max() < 0.35


def test_loading_silero_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        SileroDetector()
        assert torch.get_num_threads() == before + 1  # importing the package would have set one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_package_or_its_weights(installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find(name: str, package: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not installed:
            return None
        found = importlib.machinery.ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations = [str(tmp_path)]
        return found

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(FileNotFoundError, match=r"silero-vad (is not installed|has no .*6\.2).*thinker-talker\[vad\]"):
        SileroDetector()
    assert isinstance(default_detector(), EnergyDetector)


def test_where_silero_is_it_is_used() -> None:
    assert isinstance(default_detector(), SileroDetector)


@pytest.mark.parametrize("detector", [SileroDetector, EnergyDetector])
def test_a_state_can_be_copied(detector: Any) -> None:
    heard, sound = detector(), recording("question.wav")[: 512 * 40].view(-1, 512)
    state = heard.init_state()
    for frame in sound[:20]:
        heard.step(frame, state)
    copy = state.clone()
    expected = [heard.step(frame, state) for frame in sound[20:]]
    assert [heard.step(frame, copy) for frame in sound[20:]] == expected


def test_levels_get_used_to_a_noise() -> None:
    found = probabilities(EnergyDetector(), bursts((1600, False), (4000, True), (1000, False)))
    assert found[:8].max() == 0  # the floor is not known yet
    assert found[8:49].max() < 0.2
    assert found[52:100].min() > 0.9  # it may be speech
    assert found[120:170].max() < 0.2  # after two seconds it is noise


def test_silence_is_no_speech_at_any_level() -> None:
    for amplitude in (0.0, 1e-5, 1e-4, 3e-4):
        sound = torch.zeros(16000)
        sound[8000:] = torch.randn(8000) * amplitude
        assert probabilities(EnergyDetector(), sound).max() < 0.5
    assert voice_activity.FRAME_MS * 16 == voice_activity.FRAME
