"""A source and a filter: pitch and level of what sounds, streaming equals offline, rows, files, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import SEED, fixed, seeded, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_code2wav import SIZES, draw, randomise
from torch import Tensor

from omni import OmniConfig, OmniModel
from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.source_filter import USUAL_HZ, Controls, SourceFilter, white_noise
from omni.config.qwen3_omni import Code2WavConfig, SourceFilterConfig
from omni.training.codec.pitch import track_pitch

SOURCE = {"width": 12, "num_layers": 2, "num_bands": 10, "period": 12, "n_fft": 64}
# Pitch is wrong by some 1e-7 octaves a period, which adds up to a few 1e-5 cycles in the runs below; a pulse of twenty
# harmonics rises from 0 to its height of 6 within a fortieth of a cycle.
CLOSE = {"atol": 5e-3, "rtol": 0.0}
VOICE = SourceFilterConfig(width=8, num_layers=1, num_bands=40, period=240, n_fft=1024)


def make_decoder(**changes: Any) -> Code2Wav:
    with fixed():
        decoder = Code2Wav(Code2WavConfig.from_dict({**SIZES, "source_filter": {**SOURCE, **changes}}))
        randomise(decoder)
    return decoder.eval()


def said(hz: Tensor, tone: float = -2.0, noise: float = -12.0, voiced: float = 5.0) -> Controls:
    """The same envelopes all the time: hz [B, M]."""
    flat = torch.ones(*hz.shape, VOICE.num_bands)
    return Controls((hz / USUAL_HZ).log2(), torch.full(hz.shape, voiced), tone * flat, noise * flat)


def voice() -> SourceFilter:
    return SourceFilter(VOICE, 4, 1920, 24000)


@pytest.mark.parametrize("hz", [70.0, 123.4, 200.0, 380.0])
def test_its_pitch_is_what_was_asked_for(hz: float) -> None:
    sound = voice().sound(said(torch.full((1, 100), hz)))
    heard = track_pitch(sound, 24000, 240)
    middle = slice(20, 80)
    assert heard.voiced[:, middle].all()
    torch.testing.assert_close(heard.hz[:, middle], torch.full((1, 60), hz), rtol=3e-3, atol=0)


def test_a_glide_keeps_its_phase() -> None:
    """Pulses come when the sum of the pitch says: from 120 to 240 Hz, each a little sooner than the one before."""
    sound = voice().sound(said(torch.linspace(120, 240, 60)[None]))[0]
    peaks = (sound[1:-1] > sound[:-2]) & (sound[1:-1] >= sound[2:]) & (sound[1:-1] > 0.4 * sound.max())
    at = peaks.nonzero()[:, 0]
    assert abs(len(at) - 180 * 0.6) <= 1
    apart = at.diff()[1:].float()
    assert (apart.diff() <= 1).all() and apart[0] > 190 and apart[-1] < 105


@pytest.mark.parametrize("hz", [90.0, 300.0])
def test_levels_are_those_of_the_envelopes(hz: float) -> None:
    """A source of mean power 1 through a flat filter: the level does not depend on pitch."""
    tone = voice().sound(said(torch.full((1, 100), hz), tone=-1.0))[0, 4800:]
    torch.testing.assert_close(tone.square().mean().sqrt().log(), torch.tensor(-1.0), atol=0.05, rtol=0)
    hiss = voice().sound(said(torch.full((1, 100), hz), tone=-12.0, noise=-1.0))[0, 4800:]
    torch.testing.assert_close(hiss.square().mean().sqrt().log(), torch.tensor(-1.0), atol=0.05, rtol=0)
    silent = voice().sound(said(torch.full((1, 100), hz), voiced=-5.0))
    assert silent.abs().max() < 1e-3  # what is left is noise of exp(-12)


def test_an_envelope_shapes_the_spectrum() -> None:
    flat = said(torch.full((1, 100), 100.0))
    bands = torch.linspace(0, -6, VOICE.num_bands).expand_as(flat.tone)
    spectra = [
        torch.stft(voice().sound(c)[0, 9600:], 4096, window=torch.hann_window(4096), return_complex=True).abs().mean(1)
        for c in (flat, flat._replace(tone=bands))
    ]
    mels = 2595 * torch.log10(1 + torch.linspace(0, 12000, 2049) / 700)
    wanted = -6 * mels / mels[-1] + 2
    got = (spectra[1] / spectra[0]).log()
    loud = spectra[0] > 0.2 * spectra[0].max()
    assert loud.sum() > 100  # harmonics
    torch.testing.assert_close(got[loud], wanted[loud], atol=0.4, rtol=0)  # straight in Hz between two bands


def test_noise_is_white_and_the_same_every_time() -> None:
    noise = white_noise(torch.arange(1 << 16))
    assert abs(noise.mean()) < 0.02 and abs(noise.square().mean() - 1) < 0.02
    for lag in (1, 2, 7, 240):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 0.02
    assert torch.equal(white_noise(torch.tensor([5, 77])), noise[[5, 77]])


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_streamed_equals_offline(cuts: list[int], seed: int) -> None:
    decoder = make_decoder()
    codes = torch.randint(0, 32, (2, 3, sum(cuts)), generator=seeded(seed))
    state = decoder.init_state(2)
    pieces = [decoder.step(piece, state) for piece in codes.split(cuts, dim=2)]
    assert [piece.shape[1] for piece in pieces] == [24 * cut for cut in cuts]
    torch.testing.assert_close(torch.cat(pieces, dim=1), decoder(codes), **CLOSE)


def test_nothing_looks_ahead() -> None:
    decoder, codes = make_decoder(), draw(9)
    other = codes.clone()
    other[:, :, 6:] = (other[:, :, 6:] + 1) % 32
    assert decoder.lookahead == 0
    torch.testing.assert_close(decoder(other)[:, : 6 * 24], decoder(codes)[:, : 6 * 24], **CLOSE)
    assert not torch.allclose(decoder(other)[:, 6 * 24 :], decoder(codes)[:, 6 * 24 :], **CLOSE)


def test_rows_stand_still_and_are_exchanged() -> None:
    decoder, codes = make_decoder(), draw(8)
    state = decoder.init_state(2)
    alone = decoder.init_state(1)
    decoder.step(codes[:, :, :3], state)
    before = state.read_row(1)
    decoder.step(codes[:, :, 3:5], state, torch.tensor([True, False]))
    for name in ("controls", "phase", "tail", "position"):
        assert torch.equal(getattr(state.decoder.sound, name)[1:], getattr(before.decoder.sound, name))
    decoder.step(codes[1:, :, :4], alone)
    state.write_row(1, alone)
    heard = decoder.step(codes[:, :, [5, 4]].roll(0), state)  # any frames: row 1 goes on from `alone`
    expected = decoder.step(codes[1:, :, [5, 4]], alone)
    torch.testing.assert_close(heard[1:], expected, **CLOSE)


def model_with_both() -> OmniModel:
    small = {"width": 16, "num_layers": 1, "num_bands": 12, "period": 240, "n_fft": 512}
    config = tiny_config().to_dict()
    config["code2wav_config"] = {**config["code2wav_config"], "source_filter": small}
    with fixed(SEED):
        return OmniModel(OmniConfig.from_dict(config))


def test_files_hold_it_apart(tmp_path: Path) -> None:
    """Other libraries read `model.safetensors`, in which everything is as a release has it."""
    model = model_with_both()
    model.save_pretrained(tmp_path)
    names, others = (set(load_file(tmp_path / f"{name}.safetensors")) for name in ("model", "omni"))
    assert others and all(name.startswith("code2wav.source_filter.") for name in others)
    assert not names & others and any(name.startswith("code2wav.decoder.") for name in names)
    again = OmniModel.from_pretrained(tmp_path, dtype="float32", device="cpu")
    codes = torch.randint(0, 32, (1, again.code2wav.num_codebooks, 4), generator=seeded(1))
    assert torch.equal(again.code2wav(codes), model.code2wav(codes))
    again.code2wav.by_convolutions = True
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["code2wav_config"]["source_filter"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "omni.safetensors").unlink()
    plain = OmniModel.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert plain.code2wav.source_filter is None and plain.code2wav.lookahead > 0
    assert torch.equal(plain.code2wav(codes), again.code2wav(codes))


def test_a_tensor_in_both_files_is_refused(tmp_path: Path) -> None:
    model_with_both().save_pretrained(tmp_path)
    (tmp_path / "omni.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="and so does model"):
        OmniModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"period": 7}, "must divide 24"),
        ({"num_bands": 1}, "at least 2"),
        ({"n_fft": 63}, "must be even"),
        ({"width": 0}, "width must be positive"),
        ({"num_layer": 3}, "did you mean 'num_layers'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder(**changes)


def test_a_step_is_one_graph() -> None:
    decoder, codes = make_decoder(num_layers=1), draw(6)
    step = torch.compile(decoder.step, fullgraph=True, backend="aot_eager")
    eager, traced = decoder.init_state(2), decoder.init_state(2)
    active = torch.tensor([True, False])
    for state in (eager, traced):
        decoder.step(codes[..., :1], state)
    for t in range(1, 6):
        one = codes[..., t : t + 1]
        torch.testing.assert_close(step(one, traced, active), decoder.step(one, eager, active), **CLOSE)
    assert traced.transformer.frames.tolist() == [6, 1]
    assert traced.decoder.sound.position.tolist() == [6 * 24, 24]
