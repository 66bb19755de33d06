"""The order of pictures and sound: one rule written out plainly, a whole clip, and live arrival in any order."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from video_layouts import random_layout, random_rule

from omni.config.positions import PositionRule
from omni.rope.interleave import Interleave, Run
from omni.rope.positions import Audio, AudioVideo, Video, interleave, segment_positions


def chunks_of(places: list[float], size: int) -> list[int]:
    """The chunk of each token: the next one begins with the first token at or beyond its end, one at a time."""
    chunks, chunk = [], 0
    for place in places:
        chunk += place >= size * (chunk + 1)
        chunks.append(chunk)
    return chunks


def written_out(segment: AudioVideo, rule: PositionRule) -> tuple[list[tuple[bool, int]], int]:
    """The order as (video?, number in its track), and the tokens of its last piece: a sort of all tokens."""
    tokens = segment.video.height * segment.video.width
    seconds, sound = [time for time in segment.video.times for _ in range(tokens)], list(range(segment.audio.length))
    keys: tuple[list[float], list[float]] = ([rule.rate * time for time in seconds], [float(n) for n in sound])
    if rule.chunk_s is not None:
        places = segment_positions(segment.video, 0.0, rule)[0][0].tolist()
        size = int(rule.rate * rule.chunk_s)
        keys = ([*chunks_of(places, size)], [*chunks_of([*map(float, sound)], size)])
    merged = sorted([(key, 0, i) for i, key in enumerate(keys[0])] + [(key, 1, i) for i, key in enumerate(keys[1])])
    pieces = [(track, key if rule.chunk_s is not None else 0) for key, track, _ in merged]
    last = next((n for n, piece in enumerate(reversed(pieces)) if piece != pieces[-1]), len(pieces))
    return [(track == 0, i) for _, track, i in merged], last


def arrive(rng: random.Random, segment: AudioVideo, rule: PositionRule) -> list[Run]:
    """The runs of a video whose steps and sound come in a random order, either far ahead of the other."""
    order, runs, eager = Interleave(rule), [], rng.random()
    times, tokens = list(segment.video.times), segment.video.height * segment.video.width
    seen, heard = 0, 0
    while seen < len(times) or heard < segment.audio.length:
        if heard == segment.audio.length or (seen < len(times) and rng.random() < eager):
            order.offer_steps((times[seen],), tokens)
            seen += 1
        else:
            piece = rng.randint(1, segment.audio.length - heard)
            order.offer_sound(piece)
            heard += piece
        bound = times[seen - 1] if seen else 0.0
        order.expect_steps(rng.uniform(bound, times[seen]) if seen < len(times) else bound + rng.uniform(0, 3))
        runs += drain(order)
        assert not (order.steps and order.sounds)  # where both wait, one of them is next
        if rng.random() < 0.1:
            runs += drain(order.clone())  # a copy has nothing that the original has not
    order.close()
    return runs + drain(order)


def drain(order: Interleave) -> list[Run]:
    runs = []
    while (run := order.next_run()) is not None:
        assert run == order.next_run() and run.tokens > 0
        order.take(run)
        runs.append(run)
    return runs


@pytest.mark.parametrize("layouts", [1000, pytest.param(6000, marks=pytest.mark.slow)])
def test_random_layouts_whole_live_and_written_out(layouts: int) -> None:
    rng = random.Random(layouts)
    for _ in range(layouts):
        segment, rule = random_layout(rng), random_rule(rng)
        expected, last = written_out(segment, rule)
        video, sound, live, last_live = 0, 0, [], 0
        for run in arrive(rng, segment, rule):
            first = video if run.video else sound
            assert run.first == (first % (segment.video.height * segment.video.width) if run.video else first)
            live += [(run.video, first + i) for i in range(run.tokens)]
            video, sound = video + run.tokens * run.video, sound + run.tokens * (not run.video)
            last_live = last_live * run.joins + run.tokens
        assert live == expected and last_live == last
        assert interleave(segment, rule) == tuple(is_video for is_video, _ in expected)


@pytest.mark.parametrize("given", [False, True], ids=["by the rule", "read from the ids"])
def test_what_follows_begins_after_the_last_piece(given: bool) -> None:
    rng = random.Random(3)
    for _ in range(300):
        segment, rule = random_layout(rng), random_rule(rng)
        expected, last = written_out(segment, rule)
        if given:
            segment = replace(segment, order=tuple(video for video, _ in expected))
        start = rng.choice((0.0, 17.0, 100.5))
        positions, following = segment_positions(segment, start, rule)
        order = torch.tensor([video for video, _ in expected])
        assert torch.equal(positions[:, order], segment_positions(segment.video, start, rule)[0])
        assert torch.equal(positions[:, ~order], segment_positions(segment.audio, start, rule)[0])
        assert following == float(positions[:, -last:].max()) + 1


def test_a_token_on_the_edge_of_a_chunk_is_where_rounding_puts_it() -> None:
    """A frame at the very end of a chunk, in exact arithmetic, lies inside it in fp32: its sound must wait for it."""
    rule = PositionRule(13.7, chunk_s=0.6)  # chunks of 8 positions
    edge = 8 / 13.7
    assert edge * 13.7 >= 8 > segment_positions(Video((edge,), 1, 1), 0.0, rule)[0][0].item()
    segment = AudioVideo(Video((0.0, edge), 1, 1), Audio(20))
    order = Interleave(rule)
    order.offer_steps((0.0,), 1)
    order.offer_sound(20)
    order.expect_steps(edge)
    runs = drain(order)
    order.offer_steps((edge,), 1)
    order.close()
    runs += drain(order)
    assert tuple(run.video for run in runs for _ in range(run.tokens)) == interleave(segment, rule)
