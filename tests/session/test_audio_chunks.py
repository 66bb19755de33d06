"""Sound in chunks that are chosen: sessions and the processor lay out, encode and place it alike in every chunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import config_values, once, seeded, speckle, tiny_model, write_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from omni import OmniConfig, OmniEngine, OmniInputs, OmniModel, OmniProcessor, OmniSession, StreamingConfig
from omni.encoders.contract import EncoderOutput
from omni.generation.prompt import encode_prompt
from omni.processing import vision
from omni.processing.video_file import VideoClip

# seconds of a chunk -> its mel frames and tokens; None is the checkpoint's own
CHUNKS = {None: (100, 13), 0.08: (8, 1), 0.48: (48, 6), 0.72: (72, 9), 0.96: (96, 12), 1.0: (100, 13)}
HALF = StreamingConfig(audio_chunk_s=0.48, audio_window_s=0.96)
SILENT: dict[str, Any] = {"max_new_tokens": 4, "return_audio": False}
fuzz = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
model = once(tiny_model)


def wave(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise that grows louder, so that the level of each chunk is its own."""
    return torch.linspace(0.01, 0.3, samples) * torch.randn(samples, generator=seeded(seed))


def tokens_of(samples: int, chunk_s: float | None) -> int:
    """Tokens of a clip: 8 mel frames each, in whole chunks those of the table."""
    (chunk, tokens), frames = CHUNKS[chunk_s], samples // 160
    return frames // chunk * tokens + -(-(frames % chunk) // 8)


class Read:
    """What a session's Thinker has read: embeds [T, D] and positions [3, T], in parts."""

    def __init__(self, session: OmniSession, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.parts = session, []
        rows = session._reader.rows
        read = rows.prefill_thinker

        def note(row: int, ids: Any, embeds: torch.Tensor, positions: torch.Tensor, taps: Any) -> Any:
            self.parts.append((embeds.flatten(0, -2).cpu(), positions.flatten(1).cpu()))
            return read(row, ids, embeds, positions, taps)

        monkeypatch.setattr(rows, "prefill_thinker", note)

    def assert_is(self, inputs: OmniInputs, seen: list[int]) -> None:
        """The first tokens of the session are those of a fresh run on these inputs."""
        prompt = encode_prompt(self.session.model, inputs)
        length = prompt.lengths[0]
        assert seen[:length] == prompt.row_ids(0)
        embeds = torch.cat([part[0] for part in self.parts])[:length]
        positions = torch.cat([part[1] for part in self.parts], dim=1)[:, :length]
        torch.testing.assert_close(embeds, prompt.embeds[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(positions, prompt.positions[:, 0], atol=1e-4, rtol=0)


@fuzz
@given(
    st.integers(1000, 60000), st.sampled_from(list(CHUNKS)), st.sampled_from([None, 1, 2, 3]),
    st.lists(st.floats(0, 1), max_size=6),
)  # fmt: skip
def test_streamed_equals_offline(samples: int, chunk_s: float | None, windows: int | None, places: list[float]) -> None:
    own, clip = chunk_s or 1.0, wave(samples)
    window_s = None if windows is None else round(windows * own, 2)
    session = OmniSession(model(), streaming=StreamingConfig(audio_chunk_s=chunk_s, audio_window_s=window_s))
    with pytest.MonkeyPatch.context() as patch:
        read = Read(session, patch)
        ends = sorted(round(place * samples) for place in places)
        for piece in clip.tensor_split(ends):
            session.push_audio(piece)
        session.push_text("what was it?")
        events = list(session.respond(**SILENT))
        content = [{"type": "audio", "audio": clip}, {"type": "text", "text": "what was it?"}]
        inputs = model().processor(
            [{"role": "user", "content": content}],
            mel_level="causal",
            audio_chunk_s=chunk_s,
            audio_window_s=window_s,
        )
        read.assert_is(inputs, session.ids)
    written = inputs.input_ids[0].tolist().count(model().processor.tokens.audio)
    assert written == tokens_of(samples, chunk_s)
    fresh = model().generate(inputs, **SILENT)
    assert [token for e in events if hasattr(e, "token_ids") for token in e.token_ids] == fresh.replies[0]
    streamed = model().stream(inputs, **SILENT, streaming=StreamingConfig(audio_chunk_s=chunk_s))
    assert [token for e in streamed if hasattr(e, "token_ids") for token in e.token_ids] == fresh.replies[0]


@pytest.mark.parametrize("chunk_s", CHUNKS)
def test_a_video_and_its_sound(chunk_s: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, frames = wave(16000 * 6 + 1234), [speckle(32, 32, seed=i) for i in range(12)]
    session = OmniSession(model(), use_audio_in_video=True, streaming=StreamingConfig(audio_chunk_s=chunk_s))
    read = Read(session, monkeypatch)
    session.push_video_frame(frames[0], 0.0)
    for i, piece in enumerate(sound.split(9000)):
        session.push_audio(piece)
        if i < 11:
            session.push_video_frame(frames[i + 1], 0.5 * (i + 1))
    session.push_text("and?")
    list(session.respond(**SILENT))
    load = vision.load_video
    monkeypatch.setattr(
        vision, "load_video", lambda *given: VideoClip(load(*given).frames, load(*given).times_s, sound)
    )
    inputs = model().processor(
        [{"role": "user", "content": [{"video": frames, "fps": 2}, "and?"]}],
        use_audio_in_video=True,
        mel_level="causal",
        audio_chunk_s=chunk_s,
    )
    read.assert_is(inputs, session.ids)
    prompt = encode_prompt(model(), inputs)
    ids, times = prompt.ids[0], prompt.positions[0, 0]
    heard, shown = (times[ids == token] for token in (model().processor.tokens.audio, model().processor.tokens.video))
    assert torch.equal(heard.diff(), torch.ones(len(heard) - 1))  # a token is a position
    assert len(heard) == tokens_of(len(sound), chunk_s)
    rate = 13 if chunk_s in (None, 1.0) else 12.5  # and a second of pictures has as many as one of sound
    assert shown.unique().tolist() == [float(heard[0]) + rate * step for step in range(6)]
    assert times[ids == model().processor.tokens.video][0] == heard[0]


def test_a_silent_video_keeps_the_rate_of_the_release() -> None:
    frames = [speckle(32, 32, seed=i) for i in range(8)]
    messages = [{"role": "user", "content": [{"video": frames, "fps": 2}, {"audio": wave(9000)}]}]
    halves, usual = (model().processor(messages, audio_chunk_s=chunk_s) for chunk_s in (0.48, None))
    length = int((usual.input_ids[0] == model().processor.tokens.audio).nonzero()[0])
    a, b = (encode_prompt(model(), inputs).positions[:, 0, :length] for inputs in (halves, usual))
    assert torch.equal(a, b)


def test_chunks_of_clips_may_differ_in_a_batch() -> None:
    processor, clips = model().processor, [wave(20000, 1), wave(31000, 2)]
    rows = [[{"role": "user", "content": [{"audio": clip}]}] for clip in clips]
    one, other = (processor(row, audio_chunk_s=s, audio_window_s=2 * s) for row, s in zip(rows, (0.48, 1.0)))
    width = max(one.input_ids.shape[1], other.input_ids.shape[1])
    pad = [torch.nn.functional.pad(x.input_ids, (width - x.input_ids.shape[1], 0)) for x in (one, other)]
    mask = [torch.nn.functional.pad(x.attention_mask, (width - x.input_ids.shape[1], 0)) for x in (one, other)]
    frames = other.input_features.shape[2]
    mels = [torch.nn.functional.pad(x.input_features, (0, frames - x.input_features.shape[2])) for x in (one, other)]
    masks = [
        torch.nn.functional.pad(x.feature_attention_mask, (0, frames - x.input_features.shape[2])) for x in (one, other)
    ]
    both = OmniInputs(
        torch.cat(pad), torch.cat(mask), input_features=torch.cat(mels), feature_attention_mask=torch.cat(masks),
        audio_chunk_s=[0.48, 1.0], audio_window_s=[0.96, 2.0],
    )  # fmt: skip
    together = encode_prompt(model(), both)
    for row, alone in enumerate(encode_prompt(model(), inputs) for inputs in (one, other)):
        found = together.embeds[row, : alone.lengths[0]]
        torch.testing.assert_close(found, alone.embeds[0], atol=1e-5, rtol=1e-4)


def test_half_a_chunk_is_read_before_a_second_is_over() -> None:
    """Level, chunk and window are all of 0.48 s: nothing waits for the end of a second."""
    session = OmniSession(model(), streaming=StreamingConfig(audio_chunk_s=0.48, audio_window_s=0.48))
    before = len(session.ids)
    session.push_audio(wave(8000))  # 500 ms
    assert session.ids[before:].count(model().processor.tokens.audio) == 6


@pytest.mark.parametrize("how", ["fork", "save", "engine"])
def test_an_open_clip_is_copied_and_saved(how: str, tmp_path: Path) -> None:
    session, sound = OmniSession(model(), streaming=HALF), wave(50000)
    session.push_audio(sound[:21000])
    if how == "fork":
        other: Any = session.fork()
    else:
        session.save(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "session.json").read_text())
        assert saved["streaming"]["audio_chunk_s"] == 0.48
    if how == "save":
        other = OmniSession.load(tmp_path / "saved", model())
        assert other.streaming == HALF
    elif how == "engine":
        other = OmniEngine(model(), max_sessions=1).load(tmp_path / "saved")
    ids = []
    for one in (session, other):
        one.push_audio(sound[21000:])
        one.push_text("?")
        list(one.respond(**SILENT))
        ids.append(one.ids)
    assert ids[0] == ids[1] and ids[0].count(model().processor.tokens.audio) == tokens_of(50000, 0.48)
    if how == "engine":
        other.close()


def test_a_session_without_a_chunk_is_saved_as_ever(tmp_path: Path) -> None:
    session = OmniSession(model())
    session.push_audio(wave(21000))
    session.save(tmp_path)
    assert "audio_chunk_s" not in json.loads((tmp_path / "session.json").read_text())["streaming"]
    assert OmniSession.load(tmp_path, model()).streaming.audio_chunk_s is None


def test_what_is_refused() -> None:
    processor, content = model().processor, [{"role": "user", "content": [{"audio": wave(9000)}]}]
    for bad, error, words in (
        (0.5, ValueError, r"audio_chunk_s of 0.5 s is not possible: .* multiple of 0.08 s up to 0.96 s, or .* own 1 s"),
        (0, ValueError, "audio_chunk_s must be a positive number of seconds or None, got 0"),
        ("1", TypeError, "audio_chunk_s is a number of seconds"),
    ):
        with pytest.raises(error, match=words):
            processor(content, audio_chunk_s=bad)
    with pytest.raises(ValueError, match=r"audio_chunk_s of 2 s is not possible"):
        OmniSession(model(), streaming=StreamingConfig(audio_chunk_s=2.0))
    with pytest.raises(ValueError, match=r"window of 1 s must be a positive multiple of one chunk of 0.48 s"):
        OmniSession(model(), streaming=StreamingConfig(audio_chunk_s=0.48, audio_window_s=1.0))
    with pytest.raises(ValueError, match=r"window of 1 s must be a positive multiple of one chunk of 0.48 s"):
        model().generate(processor(content, audio_chunk_s=0.48, audio_window_s=1.0), **SILENT)
    for inputs in (processor(content), processor(content, audio_chunk_s=0.96)):
        with pytest.raises(ValueError, match=r"make them with processor\(..., audio_chunk_s=0.48\)"):
            model().stream(inputs, **SILENT, streaming=HALF)
    list(model().stream(processor([{"role": "user", "content": "text alone"}]), **SILENT, streaming=HALF))
    usual = processor([{"role": "user", "content": [{"audio": wave(20000)}]}]).to_dict()
    with pytest.raises(ValueError, match="placeholder"):
        model().generate(OmniInputs(**usual, audio_chunk_s=0.08), **SILENT)
    for name in ("audio_chunk_s", "audio_window_s"):
        with pytest.raises(ValueError, match=f"{name} must be one number, or one for each of 1 clips"):
            OmniInputs(**usual, **{name: [1.0, 1.0]})
        with pytest.raises(ValueError, match=f"{name} must be positive numbers of seconds"):
            OmniInputs(**usual, **{name: -1.0})


@pytest.mark.filterwarnings("ignore:the conversation does not begin")
def test_a_family_with_one_chunk_refuses_another(tmp_path: Path) -> None:
    values = config_values(3, audio={}, vocabulary=512)
    second = OmniModel(OmniConfig.from_dict(values), ("thinker",))
    second.processor = OmniProcessor.from_pretrained(write_processor(tmp_path))
    content = [{"role": "user", "content": [{"audio": wave(9000)}]}]
    for use in (
        lambda: OmniSession(second, streaming=StreamingConfig(audio_chunk_s=0.48)),
        lambda: second.processor(content, audio_chunk_s=0.48),
    ):
        with pytest.raises(ValueError, match=r"chunk_s of 0.48 s is not possible: .* chunks of 2 s; leave it out"):
            use()
    named = second.generate(second.processor(content, audio_chunk_s=2.0, audio_window_s=2.0), **SILENT)
    assert named.replies == second.generate(second.processor(content), **SILENT).replies


def test_an_encoder_without_chunks_refuses_them_and_works_as_ever() -> None:
    class Means(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.proj = nn.Linear(128, width)

        def num_tokens(self, length: int) -> int:
            return -(-length // 20)

        def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> EncoderOutput:
            clips = [clip[:, :n].T.split(20) for clip, n in zip(features, lengths.tolist())]
            means = torch.stack([frames.mean(0) for clip in clips for frames in clip])
            return EncoderOutput(self.proj(means), [len(clip) for clip in clips], [])

    own, content = tiny_model(), [{"role": "user", "content": [{"audio": wave(9000)}]}]
    before = own.processor(content, audio_chunk_s=0.48)
    own.audio_encoder = Means(own.config.thinker.text_config.hidden_size)
    assert own.processor(content).input_ids[0].tolist().count(own.processor.tokens.audio) == 3
    own.generate(own.processor(content), **SILENT)
    for use in (
        lambda: own.processor(content, audio_chunk_s=0.48),
        lambda: OmniSession(own, streaming=StreamingConfig(audio_chunk_s=0.48)),
        lambda: own.generate(before, **SILENT),
    ):
        with pytest.raises(ValueError, match=r"chunk_s of 0.48 s is not possible: Means has no chunks to be chosen"):
            use()
