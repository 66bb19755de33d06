"""Perception as a stream: resampler, log-mel front end, audio and vision encoder, whole against pieces.

Whatever the pieces are, joined they equal the whole; what has come out does not depend on what comes in later; a clone
of a state goes on by itself, and streams that take turns do not feel each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import draw, fixed, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.config.qwen3_omni import AudioEncoderConfig, VisionEncoderConfig
from omni.encoders.audio import AudioEncoder
from omni.encoders.mel import LogMel, compress
from omni.encoders.resample import StreamingResampler
from omni.encoders.vision import VisionEncoder

AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 10,  # chunks of 20 frames
    "n_window_infer": 60,
    "downsample_hidden_size": 3,
    "output_dim": 12,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 12,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
RATES = (8000, 11025, 12345, 22050, 24000, 44100, 44101, 48000)
# Short windows and chunks, so that many of them fit into few samples: the last one has an odd window.
FRONT_ENDS = (LogMel(num_mels=8, chunk_frames=5), LogMel(n_fft=75, hop_length=30, num_mels=4, chunk_frames=3))

fuzz = settings(max_examples=40, deadline=None, derandomize=True)


def make_audio_encoder() -> AudioEncoder:
    with fixed():
        return draw(AudioEncoder(AudioEncoderConfig.from_dict(AUDIO)))


ENCODER = make_audio_encoder()


def cut(length: int, places: list[float]) -> list[int]:
    """Lengths of the pieces of a signal cut at shares of its length; some may be empty."""
    ends = [0, *sorted(round(place * length) for place in places), length]
    return [b - a for a, b in itertools.pairwise(ends)]


cuts = st.lists(st.floats(0, 1), max_size=8)


def noise(samples: int, seed: int = 0) -> Tensor:
    """Noise that swells and fades, so that the loudest part so far changes."""
    generator = seeded(seed)
    swell = torch.sin(torch.arange(samples) * (2 * math.pi / 1500)).abs() ** 4
    return 0.3 * torch.randn(samples, generator=generator) * (swell + 1e-4)


def stream(part: Any, signal: Tensor, pieces: list[int], state: Any = None) -> Tensor:
    """All that a streaming part gives for a signal [..., n] in pieces, frames along the last axis (tokens: first)."""
    state = part.init_state() if state is None else state
    out = [part.step(piece, state) for piece in signal.split(pieces, dim=-1)]
    return torch.cat([*out, part.finish(state)], dim=joint(part))


def joint(part: Any) -> int:
    return 0 if isinstance(part, AudioEncoder) else -1


def encode(clip: Tensor, window_frames: int | None = None, chunk_frames: int | None = None) -> Tensor:
    with torch.no_grad():
        return ENCODER(clip[None], [clip.shape[1]], window_frames, chunk_frames).embeds


def assert_near(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- each part: pieces equal the whole ----


@fuzz
@given(st.sampled_from(RATES), st.integers(0, 3000), cuts)
def test_resampler(rate: int, samples: int, places: list[float]) -> None:
    resampler, signal = StreamingResampler(rate), noise(samples)
    whole = resampler(signal)
    assert len(whole) == math.ceil(samples * 16000 / rate) == resampler.num_samples(samples)
    assert_near(stream(resampler, signal, cut(samples, places)), whole, 1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_resampler_equals_torchaudio_in_double_precision(rate: int) -> None:
    from torchaudio.functional import resample

    signal = torch.randn(rate // 50, generator=seeded(rate))
    if rate == 44101:  # its filters would take 5 GB there; those of 44100 lie on nearly the same times
        signal = torch.sin(torch.arange(882) * (2 * math.pi * 500 / rate))
        out = StreamingResampler(rate)(signal)
        expected = torch.sin(torch.arange(len(out)) * (2 * math.pi * 500 / 16000))
        return assert_near(out[20:-20], expected[20:-20], 2e-3)
    expected = resample(signal.double(), rate, 16000).float()
    assert_near(StreamingResampler(rate)(signal), expected, 2e-6)


@fuzz
@given(st.sampled_from(FRONT_ENDS), st.integers(160, 6000), cuts)
def test_log_mel(front_end: LogMel, samples: int, places: list[float]) -> None:
    signal = noise(samples)
    streamed = stream(front_end, signal, cut(samples, places))
    assert streamed.shape == (front_end.num_mels, front_end.num_frames(samples))
    assert_near(streamed, front_end(signal, "causal"), 1e-6)


@pytest.mark.parametrize("samples", [160, 199, 200, 201, 202, 319, 360, 399, 400, 16000, 16039, 16040, 16200])
def test_log_mel_of_lengths_around_borders(samples: int) -> None:
    front_end, signal = LogMel(), noise(samples)
    whole = front_end(signal, "causal")
    for piece in (samples, 160, 7, 401):
        assert_near(
            stream(front_end, signal, cut(samples, [i / samples for i in range(piece, samples, piece)])), whole, 1e-6
        )
    if samples <= 16000 + 159:  # one chunk: nothing comes later
        assert torch.equal(whole, front_end(signal))


@fuzz
@given(st.integers(1, 200), cuts, st.sampled_from([None, 20, 40, 200]))
def test_audio_encoder(frames: int, places: list[float], window: int | None) -> None:
    clip = torch.randn(16, frames, generator=seeded(frames))
    streamed = stream(ENCODER, clip, cut(frames, places), ENCODER.init_state(window))
    assert streamed.shape == (ENCODER.num_tokens(frames), 12)
    assert_near(streamed, encode(clip, window), 1e-5)


@fuzz
@given(st.integers(1, 200), cuts, st.sampled_from([8, 16, 20]), st.sampled_from([None, 1, 2, 5]))
def test_audio_encoder_in_other_chunks(frames: int, places: list[float], chunk: int, windows: int | None) -> None:
    clip, window = torch.randn(16, frames, generator=seeded(frames)), None if windows is None else windows * chunk
    streamed = stream(ENCODER, clip, cut(frames, places), ENCODER.init_state(window, chunk))
    assert streamed.shape == (ENCODER.num_tokens(frames, chunk), 12)
    assert_near(streamed, encode(clip, window, chunk), 1e-5)


@fuzz
@given(st.sampled_from(RATES), st.integers(1000, 5000), cuts)
def test_the_chain_from_any_rate_to_embeds(rate: int, samples: int, places: list[float]) -> None:
    signal, resampler, front_end = noise(samples), StreamingResampler(rate), LogMel(num_mels=16, chunk_frames=20)
    states = resampler.init_state(), front_end.init_state(), ENCODER.init_state(20)
    embeds = []
    for piece in signal.split(cut(samples, places)):
        embeds.append(ENCODER.step(front_end.step(resampler.step(piece, states[0]), states[1]), states[2]))
    rest = torch.cat((front_end.step(resampler.finish(states[0]), states[1]), front_end.finish(states[1])), dim=1)
    embeds += [ENCODER.step(rest, states[2]), ENCODER.finish(states[2])]
    assert_near(torch.cat(embeds), encode(front_end(resampler(signal), "causal"), 20), 1e-5)


@pytest.mark.parametrize("grid", [(5, 4, 6), (3, 2, 2)])
@torch.no_grad()
def test_vision_encoder_grid_step_by_grid_step(grid: tuple[int, int, int]) -> None:
    """Frames attend to their own grid step only, so that a step can be encoded as soon as its frames are there."""
    encoder = VisionEncoder(VisionEncoderConfig.from_dict(VISION)).eval()
    draw(encoder)
    steps, height, width = grid
    pixels = torch.randn(steps * height * width, 3 * 2 * 4 * 4)
    whole = encoder(pixels, torch.tensor([grid]))
    for count in (1, 2):  # one grid step at a time, then two
        groups = pixels.split(count * height * width)
        parts = [encoder(x, torch.tensor([[len(x) // (height * width), height, width]])) for x in groups]
        assert_near(torch.cat([part.embeds for part in parts]), whole.embeds, 1e-5)
        for i, tap in enumerate(whole.taps):
            assert_near(torch.cat([part.taps[i] for part in parts]), tap, 1e-5)


# ---- when things come out ----


def test_resampler_waits_for_its_reach_only() -> None:
    for rate in RATES:
        resampler = StreamingResampler(rate)
        state = resampler.init_state()
        for received in range(1, 200):
            resampler.step(torch.zeros(1), state)
            assert state.emitted == max(0, resampler.num_samples(received - resampler.reach))
            assert state.past.numel() < 2 * resampler.reach
        assert resampler.reach / rate <= 6.5 / (0.99 * min(rate, 16000)) + 1 / rate  # six zero crossings and a sample


def test_log_mel_gives_a_chunk_as_soon_as_its_last_sample_is_there() -> None:
    front_end = LogMel()
    state = front_end.init_state()
    needed = 99 * 160 + 200  # the last frame of the chunk is centred 160 * 99
    assert front_end.step(noise(needed - 1), state).shape == (128, 0)
    assert front_end.step(noise(1), state).shape == (128, 100)
    assert front_end.step(noise(0), state).shape == (128, 0)
    assert state.tail.numel() <= 400 + 160 and state.chunk.shape == (128, 0)


def test_the_causal_level_is_the_loudest_value_up_to_the_end_of_the_chunk() -> None:
    front_end = LogMel(num_mels=8, chunk_frames=10)
    loudness = torch.tensor([1e-5, 1.0, 1e-4]).repeat_interleave(1600)  # a quiet start, a loud chunk, a quiet end
    signal = torch.randn(4800, generator=seeded(0)) * loudness
    clip, causal = front_end(signal), front_end(signal, "causal")
    assert torch.equal(clip[:, 10:], causal[:, 10:])  # the loudest has come by the end of the second chunk
    assert clip[:, :8].unique().numel() == 1 < causal[:, :8].unique().numel()  # all 80 dB below what comes later
    # The last frame of the first chunk hears 40 samples of the second, which set the level of the first.
    alone = front_end.log_mel(torch.nn.functional.pad(signal, (200, 200)).unfold(0, 400, 160)[1:10])
    level = 4 * causal[:, 9].max() - 4
    assert_near(causal[:, 2:10], compress(alone, level)[:, 1:9], 1e-5)  # frames 0 and 1 see the mirrored start


def test_audio_encoder_gives_a_window_with_its_last_frame() -> None:
    state = ENCODER.init_state(40)
    clip = torch.randn(16, 90)
    sizes = [len(ENCODER.step(frame, state)) for frame in clip.split(1, dim=1)]
    assert [i for i, n in enumerate(sizes) if n] == [39, 79] and sizes[39] == ENCODER.num_tokens(40)
    assert len(ENCODER.finish(state)) == ENCODER.num_tokens(10)
    state = ENCODER.init_state(40)
    assert len(ENCODER.step(clip[:, :80], state)) == ENCODER.num_tokens(80)
    assert ENCODER.finish(state).shape == (0, 12)  # the clip ends with a window


def test_a_short_clip_is_not_padded_and_a_tail_is() -> None:
    clip = torch.randn(16, 33)
    short = stream(ENCODER, clip[:, :13], [5, 8])
    assert_near(short, encode(clip[:, :13]), 1e-5)
    tail = stream(ENCODER, clip, [33], ENCODER.init_state(20))[-2:]
    assert (tail - encode(clip[:, 20:])).abs().max() > 1e-3  # alone, the tail would not be padded


def test_convolutions_run_when_a_chunk_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    convolve = ENCODER._convolve
    monkeypatch.setattr(ENCODER, "_convolve", lambda x: chunks.append(len(x)) or convolve(x))
    state = ENCODER.init_state(60)
    for piece in torch.randn(16, 60).split(10, dim=1):
        ENCODER.step(piece, state)
    assert chunks == [1, 1, 1]


# ---- rules of every streaming part ----

PARTS: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor], int]] = {
    "resampler": (lambda: StreamingResampler(44100), lambda seed: noise(4000, seed), 4000),
    "log_mel": (lambda: FRONT_ENDS[0], lambda seed: noise(4000, seed), 4000),
    "audio": (lambda: ENCODER, lambda seed: torch.randn(16, 150, generator=seeded(seed)), 150),
}
every_part = pytest.mark.parametrize("name", PARTS)


@every_part
def test_the_future_does_not_change_what_came_out(name: str) -> None:
    make, signal_of, length = PARTS[name]
    part, signal = make(), signal_of(0)
    whole = stream(part, signal, [length])
    for kept in (length // 5, length // 2, length - 1):
        changed = signal.clone()
        changed[..., kept:] = 7 * signal_of(1)[..., kept:]
        state = part.init_state()
        early = part.step(changed[..., :kept], state)
        n = early.shape[joint(part)]
        assert_near(early, whole.narrow(joint(part), 0, n), 1e-5)
        late = torch.cat((early, part.step(changed[..., kept:], state), part.finish(state)), dim=joint(part))
        assert (late - whole).abs().max() > 1e-3


def test_the_future_does_not_change_the_causal_level_offline() -> None:
    front_end, signal = FRONT_ENDS[0], noise(4800)
    signal[:1600] *= 1e-3
    before = front_end(signal, "causal")
    changed = signal.clone()
    changed[14 * 160 + 200 :] *= 50  # what the frames of the first three chunks do not see
    after = front_end(changed, "causal")
    assert torch.equal(before[:, :15], after[:, :15]) and not torch.equal(before[:, 15:], after[:, 15:])
    assert not torch.equal(front_end(signal)[:, :15], front_end(changed)[:, :15])  # the clip's level does change


@every_part
def test_a_clone_goes_on_by_itself(name: str) -> None:
    make, signal_of, length = PARTS[name]
    part, first, other = make(), signal_of(0), signal_of(1)
    half = length // 2 + 7
    state = part.init_state()
    head = part.step(first[..., :half], state)
    clone = state.clone()
    branch = torch.cat((head, part.step(other[..., half:], clone), part.finish(clone)), dim=joint(part))
    trunk = torch.cat((head, part.step(first[..., half:], state), part.finish(state)), dim=joint(part))
    assert_near(trunk, stream(part, first, [length]), 1e-5)
    assert_near(branch, stream(part, torch.cat((first[..., :half], other[..., half:]), dim=-1), [length]), 1e-5)


@every_part
def test_streams_that_take_turns_equal_separate_ones(name: str) -> None:
    make, signal_of, length = PARTS[name]
    part = make()
    states, outs = [part.init_state(), part.init_state()], [[], []]
    pieces = cut(length, [0.1, 0.35, 0.4, 0.8])
    for pair in zip(signal_of(0).split(pieces, dim=-1), signal_of(1).split(pieces, dim=-1)):
        for piece, state, out in zip(pair, states, outs):
            out.append(part.step(piece, state))
    for seed, (state, out) in enumerate(zip(states, outs)):
        joined = torch.cat([*out, part.finish(state)], dim=joint(part))
        assert torch.equal(joined, stream(part, signal_of(seed), pieces))


@every_part
def test_a_finished_clip_takes_no_more(name: str) -> None:
    make, signal_of, _ = PARTS[name]
    part, state = make(), make().init_state()
    part.step(signal_of(0), state)
    part.finish(state)
    with pytest.raises(ValueError, match=r"finished .* init_state"):
        part.step(signal_of(0), state)
    with pytest.raises(ValueError, match="finished"):
        part.finish(state)


@every_part
def test_a_long_stream_keeps_a_bounded_state(name: str) -> None:
    make, signal_of, _ = PARTS[name]
    part = make()
    state = part.init_state()
    sizes = []
    for seed in range(12):
        part.step(signal_of(seed), state)
        sizes.append(sum(t.numel() for t in vars(state).values() if isinstance(t, Tensor)))
        held = [t.untyped_storage().nbytes() // 4 for t in vars(state).values() if isinstance(t, Tensor)]
        assert sum(held) == sizes[-1]  # and no view keeps a larger piece alive
    assert max(sizes[6:]) <= max(sizes[:6]) + 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_bad_samples_leave_the_state_as_it_was(bad: float) -> None:
    signal = noise(4000)
    poison = torch.tensor([0.0, bad])
    for part in (StreamingResampler(44100), FRONT_ENDS[0]):
        state = part.init_state()
        early = part.step(signal[:3000], state)
        with pytest.raises(ValueError, match=r"sample 3001 is|reach 1e\+25"):
            part.step(poison, state)
        with pytest.raises(TypeError, match="int16"):
            part.step(torch.zeros(3, dtype=torch.int16), state)
        with pytest.raises(ValueError, match="one channel"):
            part.step(torch.zeros(1, 3), state)
        streamed = torch.cat((early, part.step(signal[3000:], state), part.finish(state)), dim=-1)
        assert_near(streamed, stream(part, signal, [4000]), 1e-6)


def test_bad_features_leave_the_state_as_it_was() -> None:
    clip = torch.randn(16, 50)
    state = ENCODER.init_state(20)
    early = ENCODER.step(clip[:, :30], state)
    for bad in (clip[None], clip[:15], clip[0]):
        with pytest.raises(ValueError, match="16 mel bins"):
            ENCODER.step(bad, state)
    joined = torch.cat((early, ENCODER.step(clip[:, 30:], state), ENCODER.finish(state)))
    assert_near(joined, encode(clip, 20), 1e-5)


def test_clips_without_content() -> None:
    front_end = FRONT_ENDS[0]
    for samples in (0, 159):
        state = front_end.init_state()
        front_end.step(torch.zeros(samples), state)
        with pytest.raises(ValueError, match=f"{samples} samples is too short"):
            front_end.finish(state)
        frames = torch.cat((front_end.step(torch.zeros(1000), state), front_end.finish(state)), dim=1)
        assert frames.shape == (8, (samples + 1000) // 160)  # that was not the end
    with pytest.raises(ValueError, match="0 mel frames"):
        ENCODER.finish(ENCODER.init_state())
    resampler = StreamingResampler(8000)
    assert resampler.finish(resampler.init_state()).shape == (0,)


def test_equal_rates_pass_through() -> None:
    resampler, signal = StreamingResampler(16000), noise(50)
    assert torch.equal(stream(resampler, signal, [20, 0, 30]), signal) and resampler.num_samples(50) == 50
    assert torch.equal(resampler(signal), signal)


@pytest.mark.parametrize(("source", "target"), [(16000, 24000), (48000, 44100), (768000, 1009)])
def test_any_target_rate(source: int, target: int) -> None:
    signal = torch.sin(torch.arange(source // 20) * (2 * math.pi * 100 / source))
    out = StreamingResampler(source, target)(signal)
    expected = torch.sin(torch.arange(len(out)) * (2 * math.pi * 100 / target))
    inner = slice(len(out) // 5, -len(out) // 5)
    assert_near(out[inner], expected[inner], 5e-3)


@pytest.mark.parametrize(
    ("rates", "error", "words"),
    [
        ((44100.0,), TypeError, "whole number of Hz, got 44100.0"),
        ((True,), TypeError, "got True"),
        ((999,), ValueError, "1000..768000 Hz, got 999"),
        ((16000, 768001), ValueError, "got 768001"),
        ((-8000,), ValueError, "got -8000"),
    ],
)
def test_bad_rates(rates: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        StreamingResampler(*rates)
