"""What augmentation does to recordings, and that a number always means the same."""

from __future__ import annotations

import math

import pytest
import torch

from omni.training.data.augmentation import PLAIN, SpeechAugmentation


def tone(hz: float = 440.0, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * hz * torch.arange(int(16000 * seconds)) / 16000)


@pytest.mark.parametrize("speed", [0.8, 0.95, 1.25])
def test_speed_changes_length_and_pitch(speed: float) -> None:
    faster = SpeechAugmentation(speeds=(speed,)).sound(tone(), 16000, 1)
    assert len(faster) == pytest.approx(16000 / speed, abs=2)
    spectrum = torch.fft.rfft(faster).abs()
    assert float(spectrum.argmax()) * 16000 / len(faster) == pytest.approx(440 * speed, abs=2)


def test_masks_stay_small_and_hold_the_mean() -> None:
    mel = torch.rand(128, 200)
    masking = SpeechAugmentation(frequency_masks=1, time_masks=1)
    seen_bands, seen_moments = set(), set()
    for number in range(60):
        masked = masking.features(mel, number)
        changed = masked != mel
        assert bool((masked[changed] == mel.mean()).all())
        bands, moments = changed.all(1), changed.all(0)
        assert int(bands.sum()) <= 27 and int(moments.sum()) <= 10
        assert bool((changed == (bands[:, None] | moments[None])).all())
        seen_bands.add(int(bands.sum()))
        seen_moments.add(int(moments.sum()))
    assert len(seen_bands) > 10 and len(seen_moments) > 5


def test_a_number_means_the_same_each_time_and_another_something_else() -> None:
    augmentation = SpeechAugmentation(speeds=(0.8, 0.9, 1.1, 1.2), frequency_masks=2, time_masks=2, seed=3)
    mel, sound = torch.rand(128, 100), tone()
    for number in range(5):
        assert torch.equal(augmentation.features(mel, number), augmentation.features(mel, number))
        assert torch.equal(augmentation.sound(sound, 16000, number), augmentation.sound(sound, 16000, number))
    assert len({len(augmentation.sound(sound, 16000, number)) for number in range(20)}) == 4
    assert not torch.equal(augmentation.features(mel, 1), augmentation.features(mel, 2))
    assert torch.equal(PLAIN.sound(sound, 16000, 1), sound) and torch.equal(PLAIN.features(mel, 1), mel)


@pytest.mark.parametrize("wrong", [{"speeds": ()}, {"speeds": (3.0,)}, {"time_masks": -1}, {"frequency_masks": -2}])
def test_impossible_changes_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        SpeechAugmentation(**wrong)
