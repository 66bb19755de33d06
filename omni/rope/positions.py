"""Segments: what lies where in a prompt, and the TM-RoPE positions that follow (Qwen3-Omni and Qwen2.5-Omni, 2.2).

A prompt is a list of segments that cover its tokens without gaps. Begin and end tokens of media are `Text`. Positions
are fp32 [3, T], rows (time, height, width). A `PositionRule` says what the families do differently: by default times of
videos are fractional and never rounded. `rate` is such a rule, or positions a second under the default one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple, Union

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.rope.interleave import Interleave, Run, step_positions


@dataclass(frozen=True)
class Text:
    """`length` ordinary tokens; `joint` ones, the marks around a video with sound, share one position."""

    length: int
    joint: bool = False


@dataclass(frozen=True)
class Audio:
    """A clip of `length` audio tokens.

    rate: tokens a second, where they are other than the positions that the rule gives a second: sound in chunks that
    were chosen. A video takes the rate of its sound, so that both tell the same time.
    """

    length: int
    rate: float | None = None


@dataclass(frozen=True)
class Image:
    """One picture on a merged grid of height x width tokens."""

    height: int
    width: int

    @property
    def length(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Video:
    """One merged grid of height x width tokens for each time in `times` (seconds from the video's start)."""

    times: tuple[float, ...]
    height: int
    width: int

    @property
    def length(self) -> int:
        return len(self.times) * self.height * self.width


@dataclass(frozen=True)
class AudioVideo:
    """A video and its sound, whose tokens take turns.

    `order` says for every token whether it is a video token; None means the order of `interleave`.
    """

    video: Video
    audio: Audio
    order: tuple[bool, ...] | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        return self.video.length + self.audio.length


Segment = Union[Text, Audio, Image, Video, AudioVideo]
Rule = Union[PositionRule, float]


class MediaTokens(NamedTuple):
    """Token ids that mark media in a prompt."""

    audio: int
    image: int
    video: int
    audio_start: int
    vision_start: int


def interleave(segment: AudioVideo, rate: Rule) -> tuple[bool, ...]:
    """Order of the tokens of a video with sound: True for video. One audio token takes one position.

    The segment's own order, or the one that `omni.rope.interleave` decides.
    """
    if segment.order is not None:
        return segment.order
    rule = PositionRule.of(rate).at(segment.audio.rate)
    return tuple(video for run in _runs(segment, rule) for video in [run.video] * run.tokens)


def _runs(segment: AudioVideo, rule: PositionRule) -> Iterator[Run]:
    """The runs of a whole video with sound."""
    order, video = Interleave(rule), segment.video
    order.offer_steps(video.times, video.height * video.width)
    order.offer_sound(segment.audio.length)
    order.close()
    while (run := order.next_run()) is not None:
        yield run
        order.take(run)


def _last_piece(segment: AudioVideo, order: tuple[bool, ...], rule: PositionRule) -> int:
    """Tokens of a video with sound in the last piece of its order."""
    if segment.order is not None and rule.chunk_s is None:  # chunks follow from the times, whatever the ids say
        return len(list(next(groupby(reversed(order)))[1]))
    last = 0
    for run in _runs(segment, rule):
        last = last * run.joins + run.tokens
    return last


def placeholder_ids(segment: Segment, tokens: MediaTokens, rate: Rule) -> list[int]:
    """The token ids that stand for a media segment in the prompt (without begin and end tokens)."""
    if isinstance(segment, Audio):
        return [tokens.audio] * segment.length
    if isinstance(segment, Image):
        return [tokens.image] * segment.length
    if isinstance(segment, Video):
        return [tokens.video] * segment.length
    if isinstance(segment, AudioVideo):
        return [tokens.video if video else tokens.audio for video in interleave(segment, rate)]
    raise TypeError(f"{type(segment).__name__} has no placeholder")


def _grid_positions(times: Tensor, height: int, width: int, start: float) -> Tensor:
    """[3, steps * height * width]: time, row and column of every token, from `start` on."""
    steps = times.shape[0]
    shape = (steps, height, width)
    t = times.view(-1, 1, 1).expand(shape)
    h = torch.arange(height, dtype=torch.float32).view(1, -1, 1).expand(shape)
    w = torch.arange(width, dtype=torch.float32).view(1, 1, -1).expand(shape)
    return torch.stack((t, h, w)).flatten(1) + torch.tensor(start, dtype=torch.float32)


def _run(length: int, start: float) -> Tensor:
    """[3, length]: one position a token, the same on all three axes."""
    return (torch.arange(length, dtype=torch.float32) + torch.tensor(start, dtype=torch.float32)).expand(3, -1)


def segment_positions(segment: Segment, start: float, rate: Rule) -> tuple[Tensor, float]:
    """Positions of one segment that begins at `start`, and the position where the next one begins.

    The next start is the maximum + 1 of the segment's last piece. In a video with sound that piece is what remains of
    one track after the other has ended, or the last chunk's part of the track that comes last, so a tall frame early on
    does not push what follows (as released).
    """
    rule = PositionRule.of(rate)
    if segment.length == 0:
        return torch.zeros(3, 0), start
    if isinstance(segment, Text) and segment.joint:
        positions = _run(1, start).expand(3, segment.length)
    elif isinstance(segment, (Text, Audio)):
        positions = _run(segment.length, start)
    elif isinstance(segment, Image):
        positions = _grid_positions(torch.zeros(1), segment.height, segment.width, start)
    elif isinstance(segment, Video):
        positions = _grid_positions(step_positions(segment.times, rule), segment.height, segment.width, start)
    else:
        rule = rule.at(segment.audio.rate)
        taken = interleave(segment, rule)
        order = torch.tensor(taken)
        video, _ = segment_positions(segment.video, start, rule)
        positions = torch.empty(3, segment.length)
        positions[:, order] = video
        positions[:, ~order] = _run(segment.audio.length, start)
        return positions, float(positions[:, -_last_piece(segment, taken, rule) :].max()) + 1
    return positions, float(positions.max()) + 1


def prompt_positions(segments: Sequence[Segment], rate: Rule, start: float = 0.0) -> tuple[Tensor, float]:
    """Positions fp32 [3, T] of a prompt and where a further segment of it would begin.

    A reply begins elsewhere: see `reply_position`.
    """
    pieces = [torch.zeros(3, 0)]
    for segment in segments:
        piece, start = segment_positions(segment, start, rate)
        pieces.append(piece)
    return torch.cat(pieces, dim=1), start


def reply_position(positions: Tensor) -> float:
    """Where the first generated token stands: after the largest of all positions [3, T] of the prompt (as released)."""
    return float(positions.max()) + 1 if positions.numel() else 0.0


def slice_segments(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The segments of tokens start .. stop - 1; text is cut, media must lie wholly inside or outside."""
    kept: list[Segment] = []
    offset = 0
    for segment in segments:
        first, last = max(start, offset), min(stop, offset + segment.length)
        if first < last:
            if isinstance(segment, Text):
                kept.append(replace(segment, length=last - first))
            elif last - first == segment.length:
                kept.append(segment)
            else:
                raise ValueError(f"a {type(segment).__name__} of {segment.length} tokens is cut at token {first}")
        offset += segment.length
    return kept


def parse_segments(
    ids: Sequence[int],
    tokens: MediaTokens,
    images: Iterator[Image],
    videos: Iterator[Video],
    audios: Iterator[Audio],
    joint_marks: bool = False,
) -> list[Segment]:
    """Read the segments back from one row of prompt ids (padding removed).

    The iterators yield the media in the order in which they stand in the batch. A video is one with sound where its
    content follows `vision_start, audio_start`; its order is then taken from the ids. joint_marks: the two tokens
    before and the two after such a video share their position (see `PositionRule`). Raises ValueError where the ids and
    the media disagree.
    """
    segments: list[Segment] = []
    media = {tokens.audio, tokens.image, tokens.video}
    i = text_from = 0
    while i < len(ids):
        if ids[i] not in media:
            i += 1
            continue
        segment: Segment
        with_sound = ids[max(i - 2, 0) : i] == [tokens.vision_start, tokens.audio_start]
        if ids[i] == tokens.image:
            segment, wanted = _next(images, "image", i), [tokens.image]
        elif with_sound and {tokens.video, tokens.audio} <= _media_run(ids, i, media):
            video, audio = _next(videos, "video", i), _next(audios, "audio", i)
            segment, wanted = AudioVideo(video, audio), [tokens.video, tokens.audio]
        elif with_sound and joint_marks and ids[i] == tokens.video:  # marked for a sound that never came
            segment, wanted = AudioVideo(_next(videos, "video", i), Audio(0)), [tokens.video]
        elif ids[i] == tokens.video:
            segment, wanted = _next(videos, "video", i), [tokens.video]
        else:
            segment, wanted = _next(audios, "audio", i), [tokens.audio]
        content = ids[i : i + segment.length]
        if len(content) < segment.length or any(token not in wanted for token in content):
            raise ValueError(
                f"the prompt has fewer placeholder tokens at token {i} than its {type(segment).__name__} needs "
                f"({segment.length}); the ids and the media features do not belong together"
            )
        if isinstance(segment, AudioVideo):
            order = tuple(token == tokens.video for token in content)
            if sum(order) != segment.video.length:
                raise ValueError(
                    f"a video with sound at token {i} has {sum(order)} video placeholders, its grid needs "
                    f"{segment.video.length}"
                )
            segment = AudioVideo(segment.video, segment.audio, order)
        opens = joint_marks and isinstance(segment, AudioVideo)
        segments += [*_text_run(i - text_from, segments, opens, joint_marks), segment]
        i += segment.length
        text_from = i
        if i < len(ids) and ids[i] in wanted:
            raise ValueError(
                f"the prompt has more placeholder tokens at token {i} than its {type(segment).__name__} needs "
                f"({segment.length}); the ids and the media features do not belong together"
            )
    return segments + _text_run(len(ids) - text_from, segments, False, joint_marks)


def _text_run(length: int, before: Sequence[Segment], opens: bool, joint_marks: bool) -> list[Text]:
    """A run of text after the segments `before`, which may close one video with sound and open another."""
    closes = joint_marks and bool(before) and isinstance(before[-1], AudioVideo)
    end = min(2, length) if closes else 0
    begin = min(2, length - end) if opens else 0
    runs = (Text(end, joint=True), Text(length - end - begin), Text(begin, joint=True))
    return [run for run in runs if run.length]


def _media_run(ids: Sequence[int], start: int, media: set[int]) -> set[int]:
    """The media tokens that follow each other from `start` on."""
    seen: set[int] = set()
    for token in ids[start:]:
        if token not in media:
            break
        seen.add(token)
    return seen


def _next(source: Iterator, kind: str, token: int):  # type: ignore[no-untyped-def, type-arg]
    """The next medium of the batch, or an error that says which one is missing."""
    try:
        return next(source)
    except StopIteration:
        raise ValueError(f"the prompt asks for one more {kind} at token {token} than the inputs hold") from None
