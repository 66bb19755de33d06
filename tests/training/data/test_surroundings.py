"""What surroundings do to recordings, measured: levels, bands, echoes, silence, and that a seed means one sound."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from build import write_rows

from omni.training.data.augmentation import SpeechAugmentation
from omni.training.data.surroundings import Surroundings, in_band, in_room, recorded_noise, with_noise

RATE = 16000
EVERYTHING = Surroundings(
    noise=0.7, room=0.5, telephone=0.3, overload=0.3, equaliser=0.5, gain_db=(-60, 0), silence_s=(0, 0.5)
)


def tone(hz: float = 440.0, seconds: float = 1.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(int(RATE * seconds)) / RATE)


def level_db(samples: torch.Tensor) -> float:
    return 10 * math.log10(float(samples.square().mean()))


@pytest.mark.parametrize("snr_db", [0.0, 12.0, 30.0])
@pytest.mark.parametrize("silence", [0, 48000])
def test_noise_lies_so_far_below_the_speech_whatever_the_silence_around_it(snr_db: float, silence: int) -> None:
    speech = torch.nn.functional.pad(tone(), (silence, silence))
    hiss = torch.randn(len(speech), generator=torch.Generator().manual_seed(1))
    added = with_noise(speech, hiss, snr_db) - speech
    # of a sine, 0.6 % of the samples lie below the hundredth of its peak that counts as silent: 0.03 dB
    assert level_db(tone()) - level_db(added) == pytest.approx(snr_db, abs=0.1)


def test_noise_on_silence_is_finite() -> None:
    out = with_noise(torch.zeros(100), torch.ones(100), 10.0)
    assert bool(out.isfinite().all()) and float(out.abs().max()) > 0
    assert torch.equal(with_noise(tone(), torch.zeros(RATE), 0.0), tone())


@pytest.mark.parametrize(("hz", "heard"), [(60, False), (1000, True), (2500, True), (7000, False)])
def test_a_telephone_lets_the_middle_through(hz: float, heard: bool) -> None:
    lost = level_db(tone(hz)) - level_db(in_band(tone(hz), RATE, 300.0, 3400.0))
    assert lost < 1 if heard else lost > 25


@pytest.mark.parametrize("decay_s", [0.1, 0.5])
def test_an_echo_falls_by_60_db_in_its_time(decay_s: float) -> None:
    click = torch.zeros(RATE)
    click[0] = 1.0
    echo = in_room(click, RATE, decay_s, torch.Generator().manual_seed(0))
    assert float(echo[0]) == pytest.approx(1.0, abs=1e-5)
    size = int(decay_s * RATE)
    assert float(echo[size + 1 :].abs().max()) < 1e-5  # the transform's rounding
    first, last = (level_db(part) for part in (echo[1 : size // 10], echo[size - size // 10 : size]))
    assert first - last == pytest.approx(54, abs=3)  # nine tenths of 60 dB; a tenth of noise has so few samples


@pytest.mark.parametrize("span", [(-60.0, -60.0), (-20.0, -3.0), (0.0, 0.0)])
def test_the_highest_peak_has_the_level_that_was_asked_for(span: tuple[float, float]) -> None:
    for seed in range(10):
        out = Surroundings(gain_db=span)(tone(), RATE, random.Random(seed))
        peak_db = 20 * math.log10(float(out.abs().max()))
        assert span[0] - 0.01 <= peak_db <= span[1] + 0.01


def test_silence_is_added_at_both_ends() -> None:
    out = Surroundings(silence_s=(0.25, 0.25))(tone(), RATE, random.Random(0))
    assert torch.equal(out, torch.nn.functional.pad(tone(), (4000, 4000)))
    lengths = {len(Surroundings(silence_s=(0, 10))(tone(), RATE, random.Random(seed))) for seed in range(20)}
    assert len(lengths) > 15 and RATE <= min(lengths) <= max(lengths) <= 21 * RATE


def test_overload_cuts_peaks_off() -> None:
    out = Surroundings(overload=1)(tone(), RATE, random.Random(0))
    at_most = out == out.max()
    assert 0.07 <= float(out.max()) <= 0.3 and int(at_most.sum()) > RATE // 10


def test_noises_come_from_recordings_and_are_repeated(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", tone(50, 0.1).numpy(), RATE, subtype="FLOAT")
    draw = recorded_noise([str(write_rows(tmp_path / "noises.jsonl", [{"audio": "short.wav"}]))])
    drawn = draw(random.Random(0), RATE, RATE)
    assert len(drawn) == RATE
    assert torch.allclose(drawn[:-1600], drawn[1600:])
    assert float(drawn.abs().max()) == pytest.approx(0.5, abs=1e-3)
    assert not torch.equal(drawn, draw(random.Random(1), RATE, RATE))  # another place to start from
    with pytest.raises(FileNotFoundError):
        recorded_noise([str(tmp_path / "nowhere")])


def test_nothing_is_changed_that_was_not_asked_for() -> None:
    assert torch.equal(Surroundings()(tone(), RATE, random.Random(0)), tone())


def test_a_number_means_the_same_sound_each_time() -> None:
    changed = SpeechAugmentation(surroundings=EVERYTHING, seed=3)
    sounds = [changed.sound(tone(), RATE, number) for number in range(12)]
    for number, sound in enumerate(sounds):
        assert torch.equal(sound, changed.sound(tone(), RATE, number))
        assert bool(sound.isfinite().all())
    assert len({float(sound.sum()) for sound in sounds}) == 12
    other = replace(changed, seed=4)
    assert not torch.equal(other.sound(tone(), RATE, 0)[:RATE], sounds[0][:RATE])


@pytest.mark.parametrize("empty", [0, 1])
def test_the_shortest_recordings_pass(empty: int) -> None:
    for seed in range(20):
        assert len(replace(EVERYTHING, silence_s=None)(torch.zeros(empty), RATE, random.Random(seed))) == empty


@pytest.mark.parametrize(
    "wrong",
    [{"noise": 1.5}, {"room": -0.1}, {"noise_db": (5, 3)}, {"gain_db": (-10, 3)}, {"silence_s": (-1, 2)},
     {"room_s": (0.0, 0.5)}, {"noise_db": (1,)}],
)  # fmt: skip
def test_impossible_surroundings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Surroundings(**wrong)
