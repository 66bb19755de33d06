"""Live media: whatever arrives in whatever pieces, the conversation gets the ids and positions of the whole clip."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from video_layouts import random_layout, random_rule

from omni import OmniModel, OmniSession
from omni.config.positions import PositionRule
from omni.processing.audio_file import load_audio
from omni.rope.positions import AudioVideo, segment_positions
from omni.session.live_media import AudioFrontEnd, GridStep, OpenVideo

TOKENS: Any = SimpleNamespace(audio=1, video=2, vision_start=3, audio_start=4)


class Written:
    """A conversation that keeps what is written into it, unless it is full."""

    full = False

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.offsets: list[torch.Tensor] = []
        self.embeds: list[float] = []
        self.text: list[int] = []
        self.moves: list[float] = []

    def write_text(self, ids: list[int]) -> None:
        self.text += ids

    def write_at(self, ids: list[int], offsets: Any, embeds: torch.Tensor, taps: torch.Tensor | None = None) -> None:
        if self.full:
            raise ValueError("the session is full")
        assert len(ids) == offsets.shape[1] == len(embeds) and (taps is None or torch.equal(taps[0], embeds))
        self.ids += ids
        self.offsets.append(offsets)
        self.embeds += embeds[:, 0].tolist()

    def move_on(self, length: float) -> None:
        self.moves.append(length)


class SlowEncoder:
    """A front end that gives the vectors it is told, each some pieces late."""

    rate = None  # as the position rule says

    def __init__(self, tokens: int, rng: random.Random) -> None:
        self.left, self.rng = -torch.arange(1.0, tokens + 1)[:, None], rng

    def push(self, samples: torch.Tensor, rate_hz: int) -> torch.Tensor:
        ready, self.left = self.left.split([cut := self.rng.randint(0, len(self.left)), len(self.left) - cut])
        return ready

    def finish(self) -> torch.Tensor:
        return self.left

    def clone(self) -> SlowEncoder:
        return copy.copy(self)


def show(rng: random.Random, segment: AudioVideo, rule: PositionRule, with_sound: bool) -> Written:
    """The video pushed live, with frames that wait for a partner; at times there is no room, or a copy takes over."""
    written: Any = Written()
    times, height, width = segment.video.times, segment.video.height, segment.video.width
    front_end: Any = SlowEncoder(segment.audio.length, rng) if with_sound else None
    video = OpenVideo.open(0.0, front_end, rule)
    video.begin(written, TOKENS)
    vectors = torch.arange(1.0, segment.video.length + 1)[:, None].split(height * width)
    for time_s, embeds in zip(times, vectors):
        video.frames, video.last_s = [(time_s, embeds)], time_s  # it may wait for a second one
        video.write(written, TOKENS)
        for _ in range(rng.randint(0, 2)):
            if with_sound:
                video.push(written, embeds, 16000, TOKENS)
        video.frames, video.last_s = [], time_s + rng.choice((0.0, 0.01))
        written.full = rng.random() < 0.2
        video.add_step(GridStep(time_s, embeds, embeds[None] if rng.random() < 0.5 else None, height, width))
        with suppress(ValueError):
            video.write(written, TOKENS)
        written.full = False  # after room was made, nothing is missing
        video = video.clone() if rng.random() < 0.2 else video
    video.close(written, TOKENS, [5, 6])
    return written


@pytest.mark.parametrize("with_sound", [True, False])
def test_random_videos_are_written_as_the_whole_clip_lies(with_sound: bool) -> None:
    rng = random.Random(8)
    for _ in range(200):
        segment, rule = random_layout(rng), random_rule(rng)
        whole = segment if with_sound else segment.video
        written = show(rng, segment, rule, with_sound)
        positions, following = segment_positions(whole, 0.0, rule)
        assert torch.equal(torch.cat(written.offsets, dim=1), positions)
        joint = [-1] * (rule.joint_marks and with_sound)
        assert written.moves == [*joint, following, *joint]
        assert [v for v in written.embeds if v > 0] == [*range(1, segment.video.length + 1)]
        assert [-v for v in written.embeds if v < 0] == [*range(1, segment.audio.length * with_sound + 1)]
        assert written.ids == [TOKENS.video if vector > 0 else TOKENS.audio for vector in written.embeds]
        assert written.text == ([3, 4, 5, 6] if with_sound else [3, 6])


# samples

SOUND = 0.2 * np.random.default_rng(0).standard_normal((4000, 2)).astype(np.float32).clip(-4, 4)
PCM = (SOUND * 2**15).astype(np.int16)


def refused(call: Any) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "samples",
    [
        SOUND[:, 0].tolist(),
        PCM[:, 0].tolist(),
        *(SOUND[:, 0].astype(kind) for kind in ("float16", "float32", "float64", ">f4")),
        *((SOUND[:, 0] * 2.0**bits).astype(f"int{bits + 1}") for bits in (7, 15, 31)),
        PCM[:, 0].astype(np.int64),
        PCM[:, 0].astype(">i2"),
        (128 + SOUND[:, 0] * 128).astype(np.uint8),
        SOUND,
        SOUND.T,
        PCM,
        PCM.T.astype(np.int32) << 16,
        SOUND[:2],  # as many samples as channels: [channels, n]
        SOUND[:, :1],
        *(torch.tensor(SOUND[:, 0]).to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64)),
        *(torch.tensor(PCM).to(kind) for kind in (torch.int16, torch.int64)),
        torch.tensor(SOUND, requires_grad=True),
    ],
    ids=lambda samples: f"{type(samples).__name__} {getattr(samples, 'dtype', '')} {list(np.shape(samples))}",
)
def test_a_session_reads_samples_as_the_processor_does(
    model: OmniModel, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    read = []
    monkeypatch.setattr(AudioFrontEnd, "push", lambda _, wave, rate_hz: read.append(wave) or torch.zeros(0, 1))
    OmniSession(model).push_audio(samples)
    assert read[0].dtype == torch.float32 and not read[0].requires_grad
    assert torch.equal(read[0], load_audio(samples))


@pytest.mark.parametrize(
    "samples",
    [
        np.array([True, False]),
        torch.tensor([True, False]),
        SOUND[:, 0].astype(np.complex64),
        np.array([1, 2], np.uint16),
        [0, 40000],
        np.zeros((2, 2, 2)),
        np.float32(0.5),
        [0.1, float("nan")],
        torch.tensor([0.1, float("-inf")]),
    ],
    ids=repr,
)
def test_what_the_processor_refuses_a_session_refuses_in_the_same_words(model: OmniModel, samples: Any) -> None:
    session = OmniSession(model)
    assert refused(lambda: session.push_audio(samples)) == refused(lambda: load_audio(samples))
    assert session.ids == []


def test_what_is_no_array_is_refused(model: OmniModel) -> None:
    session = OmniSession(model)
    for samples in ("song.wav", None, [[1.0], [2.0, 3.0]], {"array": [0.0]}):
        kind, words = refused(lambda samples=samples: session.push_audio(samples))
        assert kind is TypeError and words.startswith("audio must be an array, tensor or list of samples, got ")


def test_a_piece_may_be_empty(model: OmniModel) -> None:
    sessions = [OmniSession(model), OmniSession(model)]
    for number, session in enumerate(sessions):
        for piece in np.split(SOUND[:, 0], (1000, 1000 + 1000 * number, 3000)):
            session.push_audio(piece)
        session.push_audio([])
        session.push_text("?")
    assert sessions[0].ids == sessions[1].ids and model.processor.tokens.audio in sessions[0].ids
