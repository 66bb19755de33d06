"""Rotary embeddings and the rules of segments that need no reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.rope.positions import (
    Audio,
    AudioVideo,
    Image,
    MediaTokens,
    Text,
    Video,
    interleave,
    parse_segments,
    prompt_positions,
    reply_position,
    slice_segments,
)
from omni.rope.rotary import Rotary, apply_rotary
from omni.rope.tm_rope import TMRope

TOKENS = MediaTokens(audio=1, image=2, video=3, audio_start=4, vision_start=5)


def test_released_frequencies_interleave_time_height_width() -> None:
    axis = TMRope(128, 1e6, (24, 20, 20)).axis
    assert [axis.count(a) for a in range(3)] == [24, 20, 20]
    assert axis[:60] == (0, 1, 2) * 20 and axis[60:] == (0,) * 4


def test_equal_axes_are_ordinary_rotary_embedding() -> None:
    positions = torch.arange(50.0)[None] * 3.5
    plain = Rotary(16, 1e4)(positions)
    timed = TMRope(16, 1e4, (4, 2, 2))(positions.expand(3, 1, -1))
    for a, b in zip(plain, timed):
        assert torch.equal(a, b)


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    rope = Rotary(16, 1e4)

    def score(m: float, n: float) -> torch.Tensor:
        a = apply_rotary(q, *rope(torch.tensor([[m]])))
        return (a * apply_rotary(k, *rope(torch.tensor([[n]])))).sum()

    torch.testing.assert_close(score(7, 2.5), score(107, 102.5), atol=1e-4, rtol=1e-4)
    assert (score(7, 2.5) - score(7, 3.5)).abs() > 1e-3


def test_audio_and_video_tokens_follow_time_and_video_comes_first_on_a_tie() -> None:
    video = Video((0.0, 1.0, 2.0), 1, 2)
    order = interleave(AudioVideo(video, Audio(30)), rate=13)
    assert order == (True,) * 2 + (False,) * 13 + (True,) * 2 + (False,) * 13 + (True,) * 2 + (False,) * 4


def test_a_tall_frame_does_not_push_what_follows_a_video_with_sound() -> None:
    segments = [Text(2), AudioVideo(Video((0.0,), 30, 1), Audio(5)), Text(2)]
    positions, following = prompt_positions(segments, rate=13)
    assert positions[:, 2:32].max() == 2 + 29
    assert positions[0, -2:].tolist() == [7, 8] and following == 9  # from the audio tail, as released
    assert reply_position(positions) == 32  # but the reply starts after the largest position of all


def test_video_times_are_never_rounded() -> None:
    a = prompt_positions([Video((0.0, 0.3, 0.6), 1, 1)], rate=13)[0][0]
    torch.testing.assert_close(a, torch.tensor([0.0, 3.9, 7.8]))


@given(st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=6), st.sampled_from([1, 2]))
def test_equal_seconds_are_equal_positions_at_any_frame_rate(times: list[float], size: int) -> None:
    """The same instants, sampled more or less densely, keep their temporal positions."""
    dense = sorted({*times, *(t + 0.5 for t in times)})
    sparse = sorted(set(times))
    p_dense = prompt_positions([Video(tuple(dense), size, size)], 13)[0][0].view(-1, size * size)[:, 0]
    p_sparse = prompt_positions([Video(tuple(sparse), size, size)], 13)[0][0].view(-1, size * size)[:, 0]
    for t, p in zip(sparse, p_sparse):
        assert p_dense[dense.index(t)] == p


segments_strategy = st.lists(
    st.one_of(
        st.builds(Text, st.integers(1, 9)),
        st.builds(Audio, st.integers(1, 9)),
        st.builds(Image, st.integers(1, 4), st.integers(1, 4)),
    ),
    max_size=6,
)


@settings(max_examples=50)
@given(segments_strategy, st.data())
def test_text_can_be_cut_anywhere_and_positions_continue(segments: list, data: st.DataObject) -> None:  # type: ignore[type-arg]
    whole, _ = prompt_positions(segments, 13)
    boundary = data.draw(st.integers(0, len(segments)))
    tokens = sum(s.length for s in segments[:boundary])
    total = sum(s.length for s in segments)
    first, start = prompt_positions(slice_segments(segments, 0, tokens), 13)
    second, _ = prompt_positions(slice_segments(segments, tokens, total), 13, start)
    assert torch.equal(torch.cat((first, second), 1), whole)


def test_media_are_not_cut() -> None:
    with pytest.raises(ValueError, match="Audio of 5 tokens"):
        slice_segments([Text(2), Audio(5)], 0, 4)


def parse(ids: list[int], images: list = (), videos: list = (), audios: list = ()) -> list:  # type: ignore[assignment,type-arg]
    return parse_segments(ids, TOKENS, iter(images), iter(videos), iter(audios))


def test_order_of_a_video_with_sound_is_read_from_the_ids() -> None:
    ids = [5, 4, 3, 1, 1, 3, 1, 9, 9]
    segments = parse(ids, videos=[Video((0.0, 9.0), 1, 1)], audios=[Audio(3)])
    assert segments[1].order == (True, False, False, True, False)
    positions, _ = prompt_positions(segments, 13)
    assert positions[0].tolist() == [0, 1, 2, 2, 3, 2 + 117, 4, 5, 6]


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([9, 1, 1, 9], {}, "one more audio"),
        ([9, 2, 2, 9], {"images": [Image(2, 2)]}, "fewer placeholder"),
        ([9, 2, 2, 2, 9], {"images": [Image(1, 2)]}, "more placeholder"),
        ([5, 4, 3, 3, 1, 9], {"videos": [Video((0.0,), 1, 1)], "audios": [Audio(2)]}, "video placeholders"),
    ],
)
def test_ids_and_media_that_disagree(ids: list[int], kwargs: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        parse(ids, **kwargs)
