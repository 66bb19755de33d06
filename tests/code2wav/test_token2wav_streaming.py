"""Token2Wav while codes arrive: the vocoder's exact reach, chunks whatever the cuts, delay and distance."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from build import FAST, SIZES, draw_token2wav, make_token2wav, make_voice, once, seeded
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_token2wav import draw

from omni.code2wav.bigvgan import BigVGAN, frame_reach
from omni.code2wav.chunk_schedule import ChunkSchedule, first_audio
from omni.code2wav.ode_sampler import ODEConfig
from omni.code2wav.schedule_report import report_schedule
from omni.code2wav.token2wav import Token2Wav
from omni.config.token2wav import BigVGANConfig, Token2WavConfig

QUICK = settings(deadline=None, max_examples=6, phases=(Phase.explicit, Phase.generate))
SCHEDULE = ChunkSchedule(chunk_codes=4, left_codes=2, lookahead_codes=2)
EARLY = ChunkSchedule(chunk_codes=2, left_codes=4, lookahead_codes=2, vocoder_lookahead_frames=1)
VOCODERS = [
    {},
    {"upsample_rates": [5, 3], "upsample_kernel_sizes": [11, 7]},
    {"resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 1, 1], [1, 2, 1]]},
    {"upsample_rates": [2], "upsample_kernel_sizes": [2], "resblock_dilation_sizes": [[5, 3, 1]]},
]
model = once(make_token2wav)


@once
def vocoder(number: int) -> BigVGAN:
    made = BigVGAN(BigVGANConfig.from_dict({**SIZES["bigvgan_config"], **VOCODERS[number]}))
    return draw_token2wav(made.eval(), gain=0.5)


def cut(total: int, cuts: list[int]) -> list[int]:
    """Sizes of pieces, some of which may be empty."""
    places = [0, *sorted(c % (total + 1) for c in cuts), total]
    return [b - a for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("number", range(len(VOCODERS)))
def test_the_vocoders_reach_is_exact(number: int) -> None:
    """A frame's samples depend on `reach` frames around it, to the last, and on none beyond.

    By slopes: far frames change a sample by less than its rounding, but their slope is not zero.
    """
    decoder = copy.deepcopy(vocoder(number)).double()
    before, after = decoder.reach
    mel = torch.full((1, before + after + 7, 5), -4.0, dtype=torch.float64, requires_grad=True)
    samples = decoder(mel).view(-1, decoder.hop_length)[before + 3]
    (samples * torch.randn_like(samples)).sum().backward()
    assert mel.grad is not None
    touched = mel.grad[0].abs().amax(1).nonzero()[:, 0].tolist()
    assert touched == list(range(3, before + after + 4))


def test_reach_of_the_release() -> None:
    assert frame_reach(BigVGANConfig()) == (34, 34)


@QUICK
@given(st.integers(0, len(VOCODERS) - 1), st.lists(st.integers(0, 1000), max_size=6))
def test_streamed_vocoder_equals_offline(number: int, cuts: list[int]) -> None:
    decoder = vocoder(number)
    mel = torch.randn(2, 45, 5, generator=seeded(1)) - 4
    state = decoder.init_state(2)
    sizes = cut(45, cuts)
    pieces = [decoder.step(x, state, last=i + 1 == len(sizes)) for i, x in enumerate(mel.split(sizes, dim=1))]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces, 1), decoder(mel), atol=5e-6, rtol=0)
    first = next((i for i in range(len(pieces)) if pieces[i].shape[1]), 0)
    assert sum(sizes[: first + 1]) > decoder.reach[1] or first + 1 == len(sizes), "no sample comes before it is certain"
    with pytest.raises(ValueError, match="ended"):
        decoder.step(mel, state)


@torch.no_grad()
def test_long_mels_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.code2wav import bigvgan

    decoder, mel = vocoder(0), torch.randn(1, 70, 5) - 4
    whole = decoder(mel)
    monkeypatch.setattr(bigvgan, "_FRAMES_AT_ONCE", 16)
    torch.testing.assert_close(decoder(mel), whole, atol=5e-6, rtol=0)


@QUICK
@given(st.integers(0, 21), st.sampled_from([SCHEDULE, EARLY]), st.lists(st.integers(0, 1000), max_size=5))
def test_streamed_codes_give_what_chunked_decoding_gives(total: int, schedule: ChunkSchedule, cuts: list[int]) -> None:
    decoder, voices, codes = model(), [make_voice(1), make_voice(2)], draw(total, rows=2)
    expected = decoder.decode_chunked(codes, voices, schedule, seed=[1, 2], ode=FAST)
    assert expected.shape == (2, total * decoder.hop_length)
    pieces = codes.split(cut(total, cuts), dim=2)
    out = list(decoder.stream(pieces, voices, schedule=schedule, seed=[1, 2], ode=FAST))
    torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_window_over_everything_is_the_full_sampler() -> None:
    decoder, voice, codes = model(), make_voice(), draw(11)
    whole = decoder(codes, voice, ode=FAST)
    wide = ChunkSchedule(chunk_codes=12, left_codes=0, lookahead_codes=0)
    assert torch.equal(decoder.decode_chunked(codes, voice, wide, ode=FAST), whole)
    mel = decoder.sample_mel(codes[:, 0], voice, ode=FAST)
    chunked = decoder.sample_mel_chunked(codes, voice, SCHEDULE, ode=FAST)
    assert torch.equal(decoder.sample_mel(codes[:, 0, :6], voice, ode=FAST)[:, :8], chunked[:, :8])
    assert (mel - chunked).abs().max() > 1e-4, "a window is an approximation"


@torch.no_grad()
def test_one_evaluation_inside_its_field_is_exact() -> None:
    """One Euler step reads two blocks back and one ahead: with such a window chunks equal the whole."""
    decoder, voice, codes = model(), make_voice(), draw(30)
    ode = ODEConfig(num_steps=2, solver="euler")
    schedule = ChunkSchedule(chunk_codes=4, left_codes=4, lookahead_codes=2)
    chunked = decoder.sample_mel_chunked(codes, voice, schedule, ode=ode)
    torch.testing.assert_close(chunked, decoder.sample_mel(codes[:, 0], voice, ode=ode), atol=1e-5, rtol=0)


@torch.no_grad()
def test_states_are_independent_and_can_be_cloned() -> None:
    decoder, voice, codes = model(), make_voice(), draw(20)
    state = decoder.init_state(1, voice, schedule=SCHEDULE, ode=FAST)
    begin = decoder.step(codes[:, :, :13], state)
    other = state.clone()
    ends = [torch.cat((begin, decoder.step(codes[:, :, 13:], s), decoder.finish(s)), 1) for s in (state, other)]
    assert torch.equal(*ends)
    assert state.codes.shape[1] <= SCHEDULE.left_codes + SCHEDULE.chunk_codes + SCHEDULE.lookahead_codes
    with pytest.raises(ValueError, match="fresh state"):
        decoder.step(codes, state)
    with pytest.raises(ValueError, match="1 rows"):
        decoder.step(draw(2, rows=2), decoder.init_state(1, voice, schedule=SCHEDULE))


@torch.no_grad()
@pytest.mark.parametrize("schedule", [SCHEDULE, EARLY])
def test_the_first_sound_comes_when_the_schedule_says(schedule: ChunkSchedule) -> None:
    decoder = model()
    first = first_audio(decoder.config, schedule)
    state = decoder.init_state(1, make_voice(), schedule=schedule, ode=FAST)
    codes, samples = 0, torch.zeros(1, 0)
    while samples.shape[1] == 0:
        codes, samples = codes + 1, decoder.step(draw(1), state)
    assert codes == first.codes and samples.shape[1] == round(first.audio_ms * 24)
    assert first.wait_ms == pytest.approx(codes * decoder.hop_length / 24)


def test_delay_of_the_release() -> None:
    config = Token2WavConfig()
    assert first_audio(config, ChunkSchedule()) == (36, 720.0, 140.0)
    assert ChunkSchedule.usual(config) == ChunkSchedule()
    early = ChunkSchedule(chunk_codes=12, left_codes=24, lookahead_codes=12, vocoder_lookahead_frames=6)
    assert first_audio(config, early) == (24, 480.0, 180.0)


@pytest.mark.parametrize("block", [2, 10, 14, 24])
def test_the_usual_schedule_fits_every_block(block: int) -> None:
    config = Token2WavConfig.from_dict({"dit_config": {"block_size": block}})
    usual = ChunkSchedule.usual(config)
    assert usual.chunk_codes == block and first_audio(config, usual).audio_ms > 0


def test_schedules_fit_the_blocks() -> None:
    for changes in ({"chunk_codes": 0}, {"chunk_codes": 18}, {"left_codes": 5}, {"lookahead_codes": -12}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}.*12 codes"):
            ChunkSchedule(**changes).check(Token2WavConfig())
    with pytest.raises(ValueError, match="vocoder_lookahead_frames"):
        ChunkSchedule(vocoder_lookahead_frames=-1).check(Token2WavConfig())


@torch.no_grad()
def test_report_of_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    """More context is nearer to the whole; the figures are those of random weights (`pytest -rP` shows them)."""
    decoder, voice, codes = model(), make_voice(), draw(20)
    contexts = [(0, 0), (2, 2), (4, 2), (20, 20)]
    reports = [
        report_schedule(decoder, codes, voice, ChunkSchedule(4, left, ahead), ode=ODEConfig(num_steps=2))
        for left, ahead in contexts
    ]
    for (left, ahead), report in zip(contexts, reports):
        print(f"left {left:2} ahead {ahead:2}: {report}")
    assert reports[-1].mel_rms_db < 1e-4 < reports[2].mel_rms_db < reports[0].mel_rms_db
    assert reports[0].work == 1 < reports[2].work and reports[0].first_codes < reports[-1].first_codes
    assert isinstance(decoder, Token2Wav)
