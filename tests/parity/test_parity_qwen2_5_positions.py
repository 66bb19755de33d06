"""Positions and placeholder order of the second family equal the reference's on random layouts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from oracle_qwen2_5 import rope_reference

from omni.config.qwen2_5_omni import joint_rule
from omni.rope.positions import (
    Audio,
    AudioVideo,
    Image,
    MediaTokens,
    Segment,
    Text,
    Video,
    interleave,
    parse_segments,
    placeholder_ids,
    prompt_positions,
    reply_position,
    slice_segments,
)

RULE = joint_rule(25, 2)
TOKENS = MediaTokens(audio=275, image=265, video=266, audio_start=269, vision_start=262)
AUDIO_END, VISION_END = 270, 263


def num_tokens(frames: int) -> int:
    """Audio tokens of so many mel frames (FACTS 3.3)."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


class Layout:
    """One random row: ids, segments and the reference's arguments."""

    def __init__(self, rng: random.Random, with_sound: bool, seconds: tuple[float, ...]) -> None:
        self.rng, self.choices = rng, seconds
        self.ids: list[int] = []
        self.segments: list[Segment] = []
        self.images: list[list[int]] = []
        self.videos: list[list[int]] = []
        self.seconds: list[float] = []
        self.mel_frames: list[int] = []
        self.text(rng.randint(0, 6))
        for _ in range(rng.randint(0, 4)):
            # the reference knows one flag for all videos: with sound or without, never mixed
            getattr(self, rng.choice(["image", "audio", "av" if with_sound else "video"]))()
            self.text(rng.randint(0, 5))
        while len(self.ids) < 2:  # of a padded row with one token the reference reads the position of the padding
            self.text(1)

    def text(self, length: int) -> None:
        self.ids += [self.rng.randint(0, 200) for _ in range(length)]
        self.segments += [Text(length)] if length else []

    def media(self, segment: Segment, begin: list[int], end: list[int]) -> None:
        joint = len(begin) == 2
        self.ids += [*begin, *placeholder_ids(segment, TOKENS, RULE), *end]
        self.segments += [Text(len(begin), joint), segment, Text(len(end), joint)]

    def grid(self, steps: int) -> tuple[list[int], tuple[int, int]]:
        height, width = self.rng.randint(1, 6), self.rng.randint(1, 6)
        return [steps, 2 * height, 2 * width], (height, width)

    def new_audio(self) -> Audio:
        self.mel_frames.append(self.rng.randint(3, 1400))  # up to 14 s; the shortest clip with a token
        return Audio(num_tokens(self.mel_frames[-1]))

    def new_video(self) -> Video:
        grid, (height, width) = self.grid(self.rng.randint(1, 7))
        self.videos.append(grid)
        self.seconds.append(float(torch.tensor(self.rng.choice(self.choices))))  # as the reference keeps it
        return Video(tuple(i * self.seconds[-1] for i in range(grid[0])), height, width)

    def image(self) -> None:
        grid, (height, width) = self.grid(1)
        self.images.append(grid)
        self.media(Image(height, width), [262], [VISION_END])

    def audio(self) -> None:
        self.media(self.new_audio(), [269], [AUDIO_END])

    def video(self) -> None:
        self.media(self.new_video(), [262], [VISION_END])

    def av(self) -> None:
        self.media(AudioVideo(self.new_video(), self.new_audio()), [262, 269], [AUDIO_END, VISION_END])


EXACT = (0.25, 0.5, 1.0, 1.5, 2.0)
ANY = (0.08, 0.1, 1 / 3, 0.4, 0.7, 1.1, 1.3333, 1.99, 2.4, 3.7, 5.0)  # also steps that skip whole chunks


def layouts(seed: int, count: int) -> list[tuple[list[Layout], bool]]:
    """Pairs of rows, and whether their videos have sound."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        with_sound = rng.random() < 0.6
        drawn.append(([Layout(rng, with_sound, rng.choice((EXACT, ANY))) for _ in range(2)], with_sound))
    return drawn


def gather(rows: list[Layout], name: str) -> torch.Tensor | None:
    """One of the media lists of all rows, as the reference takes it."""
    values = [value for r in rows for value in getattr(r, name)]
    return torch.tensor(values) if values else None


def reference_positions(rows: list[Layout], with_sound: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(r.ids) for r in rows)
    ids = torch.tensor([[256] * (width - len(r.ids)) + r.ids for r in rows])
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows])

    positions, delta = rope_reference().get_rope_index(
        ids,
        image_grid_thw=gather(rows, "images"),
        video_grid_thw=gather(rows, "videos"),
        attention_mask=mask,
        use_audio_in_video=with_sound,
        audio_seqlens=gather(rows, "mel_frames"),
        second_per_grids=gather(rows, "seconds"),
    )
    return positions, delta, mask


@pytest.mark.parametrize("seed", range(4))
def test_positions_equal_the_reference_on_100_layouts(seed: int) -> None:
    for rows, with_sound in layouts(seed, 50):
        expected, delta, mask = reference_positions(rows, with_sound)
        for i, row in enumerate(rows):
            positions, _ = prompt_positions(row.segments, RULE)
            assert positions.shape[1] == len(row.ids)
            assert torch.equal(positions.long(), expected[:, i, mask[i] == 1])
            assert torch.equal(positions, positions.round()), "whole numbers"
            assert reply_position(positions) == delta[i].item() + len(row.ids)  # where the reference's decoding goes on


@pytest.mark.parametrize("seed", range(2))
def test_segments_read_back_from_ids(seed: int) -> None:
    for rows, _ in layouts(100 + seed, 25):
        for row in rows:
            images = iter([Image(g[1] // 2, g[2] // 2) for g in row.images])
            videos = iter(
                Video(tuple(i * s for i in range(g[0])), g[1] // 2, g[2] // 2) for g, s in zip(row.videos, row.seconds)
            )
            audios = iter([Audio(num_tokens(n)) for n in row.mel_frames])
            segments = parse_segments(row.ids, TOKENS, images, videos, audios, joint_marks=True)
            assert sum(s.length for s in segments) == len(row.ids)
            assert torch.equal(prompt_positions(segments, RULE)[0], prompt_positions(row.segments, RULE)[0])


def test_chunks_of_a_clip_of_4_3_seconds() -> None:
    """R7: two chunks of 2 s and a rest, in each the video's tokens first; the other family goes by time."""
    segment = AudioVideo(Video((0.0, 1.0, 2.0, 3.0, 4.0), 1, 2), Audio(107))
    runs = [True] * 4 + [False] * 50 + [True] * 4 + [False] * 50 + [True] * 2 + [False] * 7
    assert list(interleave(segment, RULE)) == runs
    assert list(interleave(segment, 25)) != runs
    positions, following = prompt_positions([Text(2, joint=True), segment, Text(2, joint=True)], RULE)
    assert positions[0, :6].tolist() == [0, 0, 1, 1, 26, 26] and positions[0, 6:56].tolist() == list(range(1, 51))
    assert positions[0, -2:].tolist() == [108, 108] and following == 109


@pytest.mark.parametrize("seed", range(2))
def test_placeholders_stand_in_the_order_of_the_reference_processor(seed: int) -> None:
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

    processor = Qwen2_5OmniProcessor.__new__(Qwen2_5OmniProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2)
    processor.audio_bos_token = processor.audio_eos_token = ""
    processor.video_token, processor.audio_token = "v", "a"
    rng = random.Random(seed)
    for _ in range(40):
        row = Layout(rng, True, EXACT)
        clips = [s for s in row.segments if isinstance(s, AudioVideo)]
        for index, segment in enumerate(clips):
            expected = processor.replace_video_with_audio_token(
                {"video_grid_thw": torch.tensor(row.videos), "video_second_per_grid": row.seconds},
                index,
                {"num_audio_tokens": [clip.audio.length for clip in clips]},
                index,
                position_id_per_seconds=25,
                seconds_per_chunk=2.0,
            )
            assert "".join("v" if video else "a" for video in interleave(segment, RULE)) == expected


def test_marks_stay_joint_where_a_prompt_is_cut() -> None:
    segments = [Text(3), Text(2, joint=True), AudioVideo(Video((0.0,), 1, 1), Audio(2)), Text(2, joint=True)]
    assert slice_segments(segments, 1, 5) == [Text(2), Text(2, joint=True)]


def test_the_first_family_splits_no_marks() -> None:
    ids = [1, 262, 269, 266, 275, 270, 263, 2]
    media = iter([]), iter([Video((0.0,), 1, 1)]), iter([Audio(1)])
    segments = parse_segments(ids, TOKENS, *media)
    assert [s.length for s in segments] == [3, 2, 3] and segments[0] == Text(3)
