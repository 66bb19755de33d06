"""TM-RoPE positions and placeholder counts equal the reference's on random layouts."""

from __future__ import annotations

import random

import pytest
import torch
from oracle import reference_model

from omni.encoders.audio import num_audio_tokens
from omni.rope.positions import (
    Audio,
    AudioVideo,
    Image,
    MediaTokens,
    Segment,
    Text,
    Video,
    parse_segments,
    placeholder_ids,
    prompt_positions,
    reply_position,
)

RATE = 13
TOKENS = MediaTokens(audio=275, image=265, video=266, audio_start=269, vision_start=262)
AUDIO_END, VISION_END = 270, 263


class Layout:
    """One random row: ids, segments and the reference's arguments."""

    def __init__(self, rng: random.Random, with_sound: bool) -> None:
        self.ids: list[int] = []
        self.segments: list[Segment] = []
        self.images: list[list[int]] = []
        self.videos: list[list[int]] = []
        self.seconds: list[float] = []
        self.mel_frames: list[int] = []
        self.text(rng.randint(0, 6))
        for _ in range(rng.randint(0, 4)):
            # the reference knows one flag for all videos: with sound or without, never mixed
            kind = rng.choice(["image", "audio", "av" if with_sound else "video"])
            getattr(self, kind)(rng)
            self.text(rng.randint(0, 5))
        while len(self.ids) < 2:  # of a padded row with one token the reference reads the position of the padding
            self.text(1)

    def text(self, length: int) -> None:
        self.ids += [random.Random(len(self.ids)).randint(0, 200) for _ in range(length)]
        if length:
            self.segments.append(Text(length))

    def media(self, segment: Segment, begin: list[int], end: list[int]) -> None:
        self.ids += [*begin, *placeholder_ids(segment, TOKENS, RATE), *end]
        self.segments += [Text(len(begin)), segment, Text(len(end))]

    def grid(self, rng: random.Random, steps: int) -> tuple[list[int], tuple[int, int]]:
        height, width = rng.randint(1, 6), rng.randint(1, 6)
        return [steps, 2 * height, 2 * width], (height, width)

    def new_audio(self, rng: random.Random) -> Audio:
        self.mel_frames.append(rng.randint(1, 700))
        return Audio(num_audio_tokens(self.mel_frames[-1], 100))

    def new_video(self, rng: random.Random) -> Video:
        grid, (height, width) = self.grid(rng, rng.randint(1, 5))
        self.videos.append(grid)
        self.seconds.append(rng.choice([0.25, 0.5, 1.0, 1.5, 2.0]))  # exactly representable, and so are the ids
        return Video(tuple(i * self.seconds[-1] for i in range(grid[0])), height, width)

    def image(self, rng: random.Random) -> None:
        grid, (height, width) = self.grid(rng, 1)
        self.images.append(grid)
        self.media(Image(height, width), [262], [VISION_END])

    def audio(self, rng: random.Random) -> None:
        self.media(self.new_audio(rng), [269], [AUDIO_END])

    def video(self, rng: random.Random) -> None:
        self.media(self.new_video(rng), [262], [VISION_END])

    def av(self, rng: random.Random) -> None:
        video = self.new_video(rng)
        self.media(AudioVideo(video, self.new_audio(rng)), [262, 269], [AUDIO_END, VISION_END])


def _reference(rows: list[Layout], with_sound: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(r.ids) for r in rows)
    ids = torch.tensor([[256] * (width - len(r.ids)) + r.ids for r in rows])
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows])

    def gather(name: str) -> torch.Tensor | None:
        values = [value for r in rows for value in getattr(r, name)]
        return torch.tensor(values) if values else None

    positions, delta = reference_model().thinker.model.get_rope_index(
        ids,
        image_grid_thw=gather("images"),
        video_grid_thw=gather("videos"),
        attention_mask=mask,
        use_audio_in_video=with_sound,
        audio_seqlens=gather("mel_frames"),
        second_per_grids=gather("seconds"),
    )
    return positions, delta, mask


@pytest.mark.parametrize("seed", range(10))
def test_positions_equal_the_reference_on_50_layouts(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        with_sound = rng.random() < 0.5
        rows = [Layout(rng, with_sound) for _ in range(2)]
        expected, delta, mask = _reference(rows, with_sound)
        for i, row in enumerate(rows):
            positions, _ = prompt_positions(row.segments, RATE)
            assert positions.shape[1] == len(row.ids)
            assert torch.equal(positions, expected[:, i, mask[i] == 1].float())
            assert reply_position(positions) == delta[i].item() + len(row.ids)  # where the reference's decoding goes on


@pytest.mark.parametrize("seed", range(4))
def test_segments_read_back_from_ids(seed: int) -> None:
    rng = random.Random(100 + seed)
    for _ in range(25):
        row = Layout(rng, rng.random() < 0.5)
        grids = iter([Image(g[1] // 2, g[2] // 2) for g in row.images])
        videos = iter(
            [Video(tuple(i * s for i in range(g[0])), g[1] // 2, g[2] // 2) for g, s in zip(row.videos, row.seconds)]
        )
        audios = iter([Audio(num_audio_tokens(n, 100)) for n in row.mel_frames])
        segments = parse_segments(row.ids, TOKENS, grids, videos, audios)
        assert sum(s.length for s in segments) == len(row.ids)
        assert torch.equal(prompt_positions(segments, RATE)[0], prompt_positions(row.segments, RATE)[0])


def test_reference_loses_the_sound_of_a_video_beside_a_silent_one() -> None:
    """With one flag for all videos the reference reads a silent video beside one with sound as text; ours does not."""
    rng = random.Random(1)
    row = Layout.__new__(Layout)
    row.ids, row.segments, row.images, row.videos, row.seconds, row.mel_frames = [], [], [], [], [], []
    row.text(2)
    row.av(rng)
    row.video(rng)
    expected, _, _ = _reference([row], with_sound=True)
    ours, _ = prompt_positions(row.segments, RATE)
    first = sum(s.length for s in row.segments[:4])
    assert torch.equal(ours[:, :first], expected[:, 0, :first].float())
    silent = row.segments[-2]
    assert isinstance(silent, Video)
    start = len(row.ids) - 1 - silent.length
    assert torch.equal(expected[0, 0, start:-1].diff(), torch.ones(silent.length - 1))  # a text run in the reference
    assert ours[1, start:-1].max() - ours[1, start:-1].min() == silent.height - 1
