"""Video with sound pushed live, where it is laid out by chunks of time: ids and positions are the offline ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import (
    FAST,
    SIZES,
    config_values,
    fixed,
    make_token2wav,
    make_voice,
    seeded,
    speckle,
    widen,
    write_processor,
)
from test_session_file import as_format

from omni import AudioChunk, OmniConfig, OmniInputs, OmniModel, OmniProcessor, OmniSession, StreamingConfig
from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.processing import vision
from omni.processing.video_file import VideoClip
from omni.rope.positions import Audio, AudioVideo, Text, Video, placeholder_ids, prompt_positions

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
SIDE = 56  # pixels of a frame, made larger by the processor unless its limits are small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """A tiny model of the family with both encoders, its processor and a voice."""
    values = config_values(3, audio={"n_window": 20}, vision={}, vocabulary=512)  # the toy's
    values |= {"system_token_id": 276, "token2wav_config": SIZES}
    with fixed(), torch.no_grad():
        model = widen(OmniModel(OmniConfig.from_dict(values)), 10)
        model.talker.codec_head.weight[[80, 82]] = 0  # greedy speech goes on to its limit
    model.code2wav = make_token2wav()
    model.voices = {"eve": make_voice(1), "bob": make_voice(2)}
    model.processor = OmniProcessor.from_pretrained(write_processor(tmp_path_factory.mktemp("files")))
    model.processor.vision.frame_pixels = (SIDE * SIDE, SIDE * SIDE)
    return model


class Pushed:
    """A session, and the positions at which its Thinker has read each token."""

    def __init__(self, model: OmniModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.session = OmniSession(model, use_audio_in_video=True, **options)
        self.positions: list[torch.Tensor] = []
        rows = self.session._reader.rows
        read = rows.prefill_thinker

        def note(row: int, ids: Any, embeds: Any, positions: torch.Tensor, taps: Any) -> Any:
            self.positions.append(positions.cpu())
            return read(row, ids, embeds, positions, taps)

        monkeypatch.setattr(rows, "prefill_thinker", note)

    def close(self) -> tuple[list[int], torch.Tensor]:
        """The ids of the user's turn so far and their positions, after the end of all media."""
        assert self.session._conversation.open is not None
        self.session._conversation.open.close_media()
        self.session._run(lambda: self.session._reader.read(self.session._conversation.entries))
        return self.session.ids, torch.cat(self.positions, dim=1)


def push_in_order(session: OmniSession, rng: random.Random, times: list[float], sound: torch.Tensor) -> None:
    """The first frame, then frames and pieces of sound, either track at times far ahead of the other."""
    frames = [np.full((SIDE, SIDE, 3), 3 * i % 256, np.uint8) for i in range(len(times))]
    session.push_video_frame(frames[0], times[0])
    waiting, heard, eager = 1, 0, rng.random()
    while waiting < len(times) or heard < len(sound):
        if heard == len(sound) or (waiting < len(times) and rng.random() < eager):
            session.push_video_frame(frames[waiting], times[waiting])
            waiting += 1
        else:
            piece = rng.randint(200, 24000)
            session.push_audio(sound[heard : heard + piece])
            heard += piece


def random_times(rng: random.Random) -> list[float]:
    """Times of frames from 0 on: regular, or with gaps of several chunks."""
    count, step = rng.randint(1, 12), rng.choice((0.1, 0.25, 0.5, 0.9))
    gaps = [rng.choice((0.0, 0.0, 0.0, 1.7, 5.3)) if step > 0.3 else 0.0 for _ in range(count)]
    return [sum(gaps[: i + 1]) - gaps[0] + i * step for i in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_live_pushes_equal_the_offline_layout(model: OmniModel, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    times, samples = random_times(rng), rng.choice((400, 16000, 64000, 120000)) + rng.randint(0, 9999)
    pushed = Pushed(model, monkeypatch)
    pushed.session.push_text("what?")
    push_in_order(pushed.session, rng, times, 0.1 * torch.randn(samples, generator=seeded(seed)))
    ids, positions = pushed.close()

    processor, rule = model.processor, model.config.thinker_config.position_rule
    video = Video(tuple(times[::2]), SIDE // 28, SIDE // 28)
    segment = AudioVideo(video, Audio(processor.audio_tokens(processor.log_mel.num_frames(samples))))
    marks = [processor.tokens.vision_start, processor.tokens.audio_start]
    begin = ids.index(marks[0])
    expected = [
        *marks,
        *placeholder_ids(segment, processor.tokens, rule),
        processor.audio_end_id,
        processor.vision_end_id,
    ]
    assert ids[begin:] == expected
    want, following = prompt_positions([Text(begin), Text(2, joint=True), segment, Text(2, joint=True)], rule)
    assert torch.equal(positions, want)
    assert pushed.session._reader.thinker.start == following


def test_the_session_s_ids_are_the_processor_s_prompt(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header, marks, chunks and what follows; and the reply is that of a fresh run on the offline inputs."""
    processor, sound = model.processor, 0.1 * torch.randn(72000, generator=seeded(1))
    frames = [np.full((SIDE, SIDE, 3), 20 * i, np.uint8) for i in range(9)]
    times = [0.5 * i for i in range(9)]
    session = OmniSession(model, use_audio_in_video=True, system=processor.speech_system)
    for i in range(9):
        session.push_video_frame(frames[i], times[i])
        session.push_audio(sound[8000 * i : 8000 * (i + 1)])
    session.push_text("and now?")
    events = list(session.respond(max_new_tokens=6, return_audio=False))
    read = vision.load_video
    monkeypatch.setattr(
        vision, "load_video", lambda *given: VideoClip(read(*given).frames, read(*given).times_s, sound)
    )
    messages = [
        {"role": "system", "content": processor.speech_system},
        {"role": "user", "content": [{"video": frames, "fps": 2}, "and now?"]},
    ]
    inputs = processor(messages, use_audio_in_video=True, mel_level="causal")
    prompt = inputs.input_ids[0].tolist()
    assert session.ids[: len(prompt)] == prompt and events[-1].usage["prompt_tokens"] == len(prompt)
    fresh = model.generate(inputs, max_new_tokens=6, return_audio=False)
    assert session.ids[len(prompt) :][: len(fresh.replies[0])] == fresh.replies[0]


def test_a_spoken_reply_to_sound_and_a_picture_is_that_of_a_fresh_stream(model: OmniModel) -> None:
    """In the second turn too, where the first reply and its media have been heard."""
    processor, sound = model.processor, 0.1 * torch.randn(30000, generator=seeded(1))
    picture = speckle(112, 84)
    greedy = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "seed": 3, "speaker": "bob"}
    asked: dict[str, Any] = {**greedy, "max_new_tokens": 5, "max_frames": 18}
    windows = StreamingConfig(codec_schedule=ChunkSchedule(4, 2, 2), codec_ode=FAST, silence_s=None)
    messages: list[Any] = [{"role": "system", "content": processor.speech_system}]
    session = OmniSession(model, system=processor.speech_system, streaming=windows)
    for question in ("what is it?", "and now?"):
        session.push_image(picture)
        for piece in sound.split(7000):
            session.push_audio(piece)
        session.push_text(question)
        events = list(session.respond(**asked))
        messages.append({"role": "user", "content": [{"image": picture}, {"audio": sound}, question]})
        prompt = session.ids[: events[-1].usage["prompt_tokens"]]
        inputs = processor(messages, mel_level="causal")
        if question == "what is it?":
            assert inputs.input_ids[0].tolist() == prompt
        media = {**inputs.to_dict(), "input_ids": [prompt], "attention_mask": None}  # random ids are no text
        fresh = list(model.stream(OmniInputs(**media), streaming=windows, **asked))
        assert events[-1].usage == fresh[-1].usage and events[-1].usage["frames"] > 8
        assert events[-1].text == fresh[-1].text
        mine, theirs = (torch.cat([e.samples for e in run if isinstance(e, AudioChunk)]) for run in (events, fresh))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        messages.append({"role": "assistant", "content": "..."})


def test_chunks_are_read_while_the_user_speaks(model: OmniModel) -> None:
    """A chunk's sound is in the cache as soon as a frame beyond the chunk has come."""
    session = OmniSession(model, use_audio_in_video=True)
    for i in range(6):
        session.push_video_frame(np.zeros((SIDE, SIDE, 3), np.uint8), 0.5 * i)
    before = len(session.ids)
    session.push_audio(torch.randn(48000))
    assert session.ids[before:].count(model.processor.tokens.audio) >= 50


def test_a_sound_that_never_came(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = Pushed(model, monkeypatch)
    for i in range(6):
        pushed.session.push_video_frame(np.zeros((SIDE, SIDE, 3), np.uint8), 0.9 * i)
    ids, positions = pushed.close()
    grid = torch.tensor([[3, SIDE // 14, SIDE // 14]])
    inputs = OmniInputs(
        [ids], pixel_values_videos=torch.zeros(int(grid.prod()), 1176), video_grid_thw=grid,
        video_grid_times=[[0.0, 1.8, 3.6]],
    )  # fmt: skip
    config = model.config.thinker_config
    assert torch.equal(positions, prompt_positions(inputs.segments(config)[0], config.position_rule)[0])


@pytest.mark.parametrize("how", ["fork", "save", "save in format 1"])
def test_an_open_video_is_copied_and_saved(model: OmniModel, how: str, tmp_path: Path) -> None:
    def push(session: OmniSession, first: int, last: int) -> None:
        for i in range(first, last):
            session.push_video_frame(np.full((SIDE, SIDE, 3), i, np.uint8), 0.7 * i)
            session.push_audio(torch.full((9000,), 0.01 * i))

    session = OmniSession(model, use_audio_in_video=True)
    push(session, 0, 5)
    if how == "fork":
        other = session.fork()
    else:
        session.save(tmp_path / "saved")
        if how == "save in format 1":
            as_format(tmp_path / "saved", 1)
        other = OmniSession.load(tmp_path / "saved", model)
    for one in (session, other):
        push(one, 5, 9)
        one.push_text("?")
    replies = []
    for one in (session, other):
        events = one.respond(max_new_tokens=4, return_audio=False)
        replies.append([e.token_ids for e in events if hasattr(e, "token_ids")])
    assert session.ids == other.ids and replies[0] == replies[1]


def test_media_of_the_past_are_saved_with_an_open_video(model: OmniModel, tmp_path: Path) -> None:
    """After a gap the tokens of one grid step are written one by one, and some still wait: they share memory."""
    session = OmniSession(model, use_audio_in_video=True, keep_media=True)
    for turn in range(2):
        session.push_text("what?")
        for i in range(5):
            session.push_video_frame(np.full((SIDE, SIDE, 3), 9 * i, np.uint8), 3.3 * i)
            session.push_audio(torch.full((9000,), 0.01 * i))
        if turn == 0:
            list(session.respond(max_new_tokens=3, return_audio=False))
    turn = session._conversation.open
    assert turn is not None and turn.video is not None and turn.video.order.done > 0
    session.save(tmp_path)
    loaded = OmniSession.load(tmp_path, model)
    replies = []
    for one in (session, loaded):
        list(one.respond(max_new_tokens=3, return_audio=False))
        freed = one.drop_oldest_turns()
        list(one.respond(max_new_tokens=3, return_audio=False))
        replies.append((freed, one.ids))
    assert replies[0] == replies[1]
