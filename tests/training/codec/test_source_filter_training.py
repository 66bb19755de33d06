"""Learning by a source and a filter: the pitch that it is told, spectra as latents, late codebooks, files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from build import fixed, seeded, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_stage import HOP, RATE, SCALES, Given, config, crops, voices
from torch import Tensor

from omni import OmniModel
from omni.code2wav.source_filter import USUAL_HZ, Controls, SourceFilter
from omni.config.qwen3_omni import SourceFilterConfig
from omni.training.codec.codec import Codec
from omni.training.codec.codec_encoders import ControlsEncoder
from omni.training.codec.codec_stage import CodecObjective, DecoderObjective, evaluate_codec, make_codec
from omni.training.codec.decoding import controls_of, decoded, left_alone
from omni.training.codec.pitch import track_pitch
from omni.training.codec.speech_codes import load_codec_encoder
from omni.training.run.trainer import Trainer

SOURCE = {"width": 24, "num_layers": 1, "num_bands": 24, "period": 60, "n_fft": 512}


def model_with_both() -> OmniModel:
    values = tiny_config().to_dict()
    sizes = {"num_hidden_layers": 1, "upsample_rates": [5, 4, 3], "source_filter": SOURCE}
    values["code2wav_config"] = {**values["code2wav_config"], **sizes}
    with fixed():
        return OmniModel(type(tiny_config()).from_dict(values))


def codec_of(model: OmniModel, **options: Any) -> Codec:
    with fixed(1):
        return make_codec(model.code2wav, encoder="controls", fresh=True, **options)


def voice(hz: Tensor, level: float = 0.1) -> Tensor:
    """A voice-like tone whose pitch is hz [n]: harmonics that fall off, [1, n]."""
    phase = (hz.double() / RATE).cumsum(0) * 2 * torch.pi
    return (level * sum((number * phase).cos() / number**0.7 for number in range(1, 9))).float()[None]


# ---- pitch


@settings(max_examples=20, deadline=None)
@given(start=st.floats(75, 400), octaves=st.floats(-0.7, 0.7), level=st.floats(0.01, 0.3))
def test_pitch_is_found_while_it_glides(start: float, octaves: float, level: float) -> None:
    n = 24000
    hz = start * 2 ** (octaves * torch.linspace(0, 1, n).double())
    hz = hz.clamp(70, 450)
    found = track_pitch(voice(hz, level), RATE, 240)
    at = torch.arange(1, 101) * 240 - 1
    inside = slice(5, 95)
    assert found.voiced[0, inside].all()
    wrong = (found.hz[0, inside].double().log2() - hz[at][inside].log2()).abs()
    assert wrong.max() < 0.03  # a third of a semitone


def test_noise_and_silence_have_no_voice() -> None:
    noise = 0.1 * torch.randn(1, 24000, generator=seeded(0))
    assert track_pitch(noise, RATE, 240).voiced.float().mean() < 0.1
    assert not track_pitch(torch.zeros(1, 2400), RATE, 240).voiced.any()


def test_rows_do_not_feel_each_other() -> None:
    waves = torch.cat([voice(torch.full((12000,), hz)) for hz in (90.0, 300.0)])
    both, alone = track_pitch(waves, RATE, 240), track_pitch(waves[1:], RATE, 240)
    torch.testing.assert_close(both.hz[1:], alone.hz)


@pytest.mark.parametrize("shape", [(2400,), (1, 250), (1, 0)])
def test_pitch_of_parts_of_periods_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 240"):
        track_pitch(torch.zeros(shape), RATE, 240)


@pytest.mark.parametrize("hz", [80.0, 150.0, 300.0])
def test_an_envelope_is_found_whatever_the_pitch(hz: float) -> None:
    """What a filter's envelope sounds like is analysed as this envelope, between harmonics too."""
    source = SourceFilter(SourceFilterConfig(width=8, num_layers=1, num_bands=40, period=120), 4, 1920, RATE)
    moments = 200
    bands = torch.linspace(0, 40, 40)
    envelope = -3 + bands.div(3).cos() - bands / 40
    said = Controls(torch.full((1, moments), hz / USUAL_HZ).log2(), torch.full((1, moments), 5.0),
                    envelope.expand(1, moments, -1), torch.full((1, moments, 40), -12.0))  # fmt: skip
    found = controls_of(source, source.sound(said))
    inside = slice(20, -20)
    assert (found.voiced[:, inside] > 0).all()
    wrong = (found.tone - said.tone)[:, inside, 2:30]  # below 8 kHz, where hardly anything is taken for breath
    assert wrong.abs().mean() < 0.35 and wrong.mean().abs() < 0.3


def test_white_noise_has_a_flat_envelope() -> None:
    source = SourceFilter(SourceFilterConfig(width=8, num_layers=1, num_bands=40), 4, 1920, RATE)
    noise = 0.1 * torch.randn(1, 48000, generator=seeded(3))
    found = controls_of(source, noise).noise.mean(1)[0, 6:]  # windows of 6 ms hold nothing slower
    torch.testing.assert_close(found, torch.full_like(found, math.log(0.1)), atol=0.35, rtol=0)


# ---- controls as latents


def test_controls_know_nothing_of_phase() -> None:
    encoder = codec_of(model_with_both()).encoder
    wave = voice(torch.full((4800,), 200.0))
    torch.testing.assert_close(encoder(-wave), encoder(wave))


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 5 * HOP])
def test_latents_are_one_a_frame_and_of_one_size(samples: int) -> None:
    encoder = codec_of(model_with_both()).encoder
    assert isinstance(encoder, ControlsEncoder)
    wave = 0.1 * torch.randn(2, samples, generator=seeded(samples))
    latents = encoder(wave)
    assert latents.shape == (2, encoder.config.hidden_size, -(-samples // HOP))
    torch.testing.assert_close(latents.square().mean(1), torch.ones(2, latents.shape[2]), atol=1e-3, rtol=0)
    whole = torch.nn.functional.pad(wave, (0, -samples % HOP))
    torch.testing.assert_close(encoder(wave, controls_of(encoder.source[0], whole)), latents)


def test_wrong_encoders_are_named() -> None:
    model = model_with_both()
    with pytest.raises(ValueError, match="did you mean 'controls'"):
        make_codec(model.code2wav, encoder="control")
    with pytest.raises(ValueError, match="has a source and a filter"):
        make_codec(OmniModel(tiny_config()).code2wav, encoder="controls")


# ---- training


def test_harmonics_are_compared_where_they_are() -> None:
    """What is learnt from is sounded at the recording's own pitch, whatever the network says, and that learns too."""
    codec = codec_of(model_with_both())
    with torch.no_grad():
        codec.code2wav.source_filter.controls_proj.weight.mul_(0.05)  # or envelopes outdo the pitch
    wave = voice(torch.full((4800,), 190.0))
    embeds = torch.randn(1, 20, codec.code2wav.config.hidden_size, generator=seeded(2), requires_grad=True)
    sound, losses = decoded(codec.code2wav, embeds, wave)
    heard = track_pitch(sound.detach(), RATE, 120)
    torch.testing.assert_close(heard.hz[:, 8:-8], torch.full_like(heard.hz[:, 8:-8], 190.0), rtol=0.01, atol=0)
    assert set(losses) == {"pitch", "voicing", "envelope"} and all(loss.total > 0 for loss in losses.values())
    unheard = decoded(codec.code2wav, embeds, wave, heard=False)
    assert not unheard.wave.any() and torch.equal(unheard.losses["envelope"].total, losses["envelope"].total)
    for loss in losses.values():
        (grad,) = torch.autograd.grad(loss.total, embeds, retain_graph=True)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("convolutions", [False, True])
def test_one_way_to_sound_learns_at_a_time(convolutions: bool) -> None:
    code2wav = model_with_both().code2wav
    code2wav.by_convolutions = convolutions
    still = left_alone(code2wav)
    names = {name for name, module in code2wav.named_children() if module in still}
    both = {"source_filter", "pre_transformer", "code_embedding"}
    assert names == (both if convolutions else {"upsample", "decoder"})
    plain = OmniModel(tiny_config()).code2wav
    assert left_alone(plain) == ()


def train(objective: Any, codec: Codec, steps: int, batch: Any, lr: float = 5e-3) -> list[dict[str, float]]:
    for part in left_alone(codec.code2wav):
        part.requires_grad_(False)
    trainer = Trainer(codec, objective, Given([batch]), config(steps, lr=lr))
    return [trainer.step().losses for _ in range(steps)]


def test_it_learns_to_speak_and_codebooks_begin_late(tmp_path: Path) -> None:
    """Two spoken samples, codes from step 40 on: spectra, pitch and voicing are learnt, and files keep all of it."""
    model = model_with_both()
    codec = codec_of(model)
    waves = torch.stack(voices(0.25))[:2]
    objective = CodecObjective(
        codec, {"stft": 0.0, "mel": 0.0}, mel_scales=SCALES[:1], quantise_from=40, restart_every=5
    )
    assert not objective.heard
    table = codec.code2wav.code_embedding.weight
    start = table.detach().clone()
    before = evaluate_codec(codec, [crops(waves)])
    losses = train(objective, codec, 40, crops(waves))
    assert torch.equal(table, start) and losses[-1]["codebook"] == losses[-1]["commitment"] == 0
    losses += train(objective, codec, 80, crops(waves))
    assert not torch.equal(table, start) and losses[-1]["codebook"] > 0
    after = evaluate_codec(codec, [crops(waves)])
    assert losses[-1]["envelope"] < 0.4 * losses[0]["envelope"] and after["mel_db"] < 0.5 * before["mel_db"]
    assert losses[-1]["pitch"] < 0.5 * losses[0]["pitch"] and losses[-1]["voicing"] < 0.8 * losses[0]["voicing"]

    codec.save(tmp_path / "whole")
    codec.save(tmp_path / "encoder", decoder=False)
    codes = codec.encode(waves)
    assert torch.equal(Codec.load(tmp_path / "whole").decode(codes), codec.decode(codes))
    sizes = [(tmp_path / name / "codec.safetensors").stat().st_size for name in ("whole", "encoder")]
    assert sizes[1] < 0.7 * sizes[0]
    alone = load_codec_encoder("omni", tmp_path / "encoder", code2wav=model.code2wav)
    assert torch.equal(alone(waves[0]), codes[0])
    codec.half().save(tmp_path / "half", decoder=False)
    assert (tmp_path / "half" / "codec.safetensors").stat().st_size < 0.6 * sizes[1]
    half = load_codec_encoder("omni", tmp_path / "half")(waves[0])
    codec.float()
    assert half.shape == codes[0].shape and (half == codes[0]).float().mean() > 0.9
    around = Codec.load(tmp_path / "encoder", model.code2wav)
    assert torch.equal(around.decode(codes), codec.decode(codes))


def test_a_run_that_is_resumed_before_there_are_codebooks_goes_on_exactly() -> None:
    """Latents that the codebooks are to begin with are part of the state; silence behind an end is none of them."""

    def begun(seconds: float) -> tuple[CodecObjective, Codec]:
        codec = codec_of(model_with_both())
        objective = CodecObjective(codec, {"stft": 0.0, "mel": 0.0}, quantise_from=3)
        batch = crops(torch.stack(voices(0.1))[:2])
        batch = dataclasses.replace(batch, lengths=torch.full_like(batch.lengths, int(seconds * RATE)))
        for _ in range(3):
            objective.prepare(codec, batch)
            objective.losses(codec, batch)
        return objective, codec

    objective, codec = begun(0.1)
    other = CodecObjective(codec, {"stft": 0.0, "mel": 0.0}, quantise_from=3)
    other.load_state_dict(objective.state_dict())
    batch = crops(torch.stack(voices(0.1))[:2])
    tables = []
    for one in (objective, other):
        with torch.no_grad():
            codec.code2wav.code_embedding.weight.zero_()
        one.prepare(codec, batch)
        tables.append(codec.code2wav.code_embedding.weight.detach().clone())
    assert torch.equal(*tables) and tables[0].any()
    kept = [latents.shape[2] for latents in begun(0.05)[0].state_dict()["latents"]]
    assert kept == [2 * 5] * 3


def test_convolutions_learn_the_same_codes() -> None:
    """What other libraries hear: only the convolutions move, and what omni hears stays."""
    model = model_with_both()
    codec = codec_of(model)
    waves = torch.stack(voices(0.1))
    codes = torch.randint(64, (4, 4, 10), generator=seeded(0))
    before = codec.code2wav(codes)
    codec.code2wav.by_convolutions = True
    objective = DecoderObjective(codec.code2wav, {"stft": 0.0}, mel_scales=SCALES[:1])
    codec.requires_grad_(False)
    codec.code2wav.requires_grad_(True)
    losses = train(objective, codec, 30, crops(waves, codes=codes))
    assert losses[-1]["mel"] < 0.7 * losses[0]["mel"] and "pitch" not in losses[-1]
    codec.code2wav.by_convolutions = False
    assert torch.equal(codec.code2wav(codes), before)
