"""A film's frames: which one is shown at each moment asked for, and decoding no more than is needed to have them.

A file is read twice: once without decoding, for the stamp of every frame, then for the chosen frames, from key frame to
key frame where that is cheaper than decoding what lies between.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np

from omni.processing.containers import Damage, decode, open_container, read_packets, tracks
from omni.processing.media_budget import as_number
from omni.processing.sources import Source, read_part

DEFAULT_FPS = 2.0  # frames taken from each second, as the models were trained
_MOST_FPS = 1e9
_USUAL_RATE = 25  # of a stream that does not tell its own, as FFmpeg assumes
_SEEK_PACKETS = 24  # what a seek costs, in packets decoded
_THREADED_PIXELS = 4096 * 2304  # larger frames are decoded one at a time: each thread would hold several


@dataclass(frozen=True)
class Sampling:
    """Which frames to take: `fps` a second, their number kept within the limits and a multiple of `multiple`.

    start_s, end_s: a part of the film, in seconds (None, infinity: to its end). frames: how many to take, rounded to
    that multiple, whatever the rate and the limits (None: by the rate).
    """

    fps: float = DEFAULT_FPS
    min_frames: int = 4
    max_frames: int = 768
    multiple: int = 2
    start_s: float = 0.0
    end_s: float | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        check_rate(self.fps, "the sampling")
        for name in ("min_frames", "max_frames"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or not _is_count(value):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.frames is not None and not _is_count(self.frames):
            raise ValueError(f"nframes must be a positive integer, got {self.frames!r}")
        read_part(self.start_s, self.end_s, "video")

    @property
    def part_s(self) -> tuple[float, float]:
        """The bounds of the part in seconds; without an end it is infinity."""
        return read_part(self.start_s, self.end_s, "video")

    def count(self, frames: int, duration_s: float) -> int:
        """How many of `frames` to take."""
        if self.frames is not None:
            rounded = max(round(int(self.frames) / self.multiple), 1) * self.multiple
            return min(rounded, max(frames // self.multiple * self.multiple, min(frames, self.multiple)))
        most = min(self.max_frames, frames)
        wanted = min(max(duration_s * self.fps, self.min_frames), most)
        return max(math.floor(wanted / self.multiple) * self.multiple, min(most, self.multiple))


def check_rate(rate: Any, name: str) -> None:
    """Raise ValueError for what is no rate of frames."""
    if not 0 < as_number(rate) < _MOST_FPS:
        raise ValueError(f"fps of {name} must be a positive number, got {rate!r}")


def _is_count(value: Any) -> bool:
    """Whether it is a whole number from 1 on; 6.0 is."""
    number = as_number(value)
    return 1 <= number < math.inf and number == int(number)


@dataclass(frozen=True)
class Index:
    """The packets of a picture track in the order of the file.

    track: the track's number in the file. stamps: when each packet's frame is shown, in ticks of `base_s` seconds;
    decoding: its decoding stamp. keys: positions of the packets from which decoding can begin. shown: the stamps of
    the frames that are to be seen, in order. seekable: whether a stamp names one packet, by the file's own clock.
    counted: whether the file has no stamps (a bare stream of a camera), and frames are numbered as they are shown.
    """

    track: int
    stamps: list[int]
    decoding: list[int]
    keys: list[int]
    shown: list[int]
    base_s: float
    seekable: bool
    counted: bool = False

    @property
    def span(self) -> float:
        """Ticks from the first frame to the end of the last one, which lasts as the others do."""
        total = len(self.shown)
        return (self.shown[-1] - self.shown[0]) * total / (total - 1) if total > 1 else 0.0


def read_index(container: Any, name: str, damage: Damage) -> Index:
    """The best picture track that holds frames; nothing is decoded. Raises ValueError where there is none."""
    found = tracks(container, "video")
    if not found:
        coded = "; its codec is unknown here" if container.streams.video else "; give a sound file as an audio item"
        raise ValueError(f"{name} has no picture track{coded}")
    packets: dict[int, list[tuple[int, int, bool, bool]]] = {track.index: [] for track in found}
    unstamped = dict.fromkeys(packets, 0)
    for packet in read_packets(container, found, damage):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:
            unstamped[packet.stream_index] += 1
        else:
            decoding = packet.dts if packet.dts is not None else stamp
            packets[packet.stream_index].append((stamp, decoding, packet.is_keyframe, packet.is_discard))
    if len(found) == 1 and unstamped[found[0].index] and not packets[found[0].index]:
        frames = list(range(unstamped[found[0].index]))
        rate = found[0].average_rate or found[0].base_rate or _USUAL_RATE
        return Index(found[0].index, frames, frames, [0], frames, float(1 / rate), seekable=False, counted=True)
    shown = {number: sorted(row[0] for row in rows if not row[3]) for number, rows in packets.items()}
    filled = [track for track in found if shown[track.index] and track.time_base is not None]
    if not filled:
        raise ValueError(f"{name} has no frames" + (f" ({damage.reason})" if damage.reason else ""))
    # a cover may be a track of its own, of one picture
    number = min(filled, key=lambda track: len(shown[track.index]) == 1).index
    rows = packets[number]
    stamps, keys = [row[0] for row in rows], [place for place, row in enumerate(rows) if row[2]]
    seekable = len(set(stamps)) == len(stamps) and not damage.joined
    base_s = float(container.streams[number].time_base)
    return Index(number, stamps, [row[1] for row in rows], keys, shown[number], base_s, seekable)


@dataclass(frozen=True)
class Choice:
    """Moments of a film in seconds from the part's start, and the stamp of the frame that is shown at each."""

    times_s: list[float]
    stamps: list[int]


def choose(index: Index, sampling: Sampling, name: str) -> Choice:
    """Moments evenly spread over the part, each with the last frame that came before it.

    Raises ValueError for a part beyond the end.
    """
    shown, base_s, span = index.shown, index.base_s, index.span
    origin = shown[0]
    start_s, end_s = sampling.part_s
    start, end = start_s / base_s, min(end_s / base_s, span)
    if start and start >= max(span, 1):
        raise ValueError(f"{name} lasts {span * base_s:g} s; no frame lies in {start_s:g}..{end_s:g} s")
    # half a tick against rounded stamps
    first = bisect_right(shown, origin + start + 0.5) - 1
    last = bisect_right(shown, origin + end - 0.5) if end < span else len(shown)
    length = end - start
    count = sampling.count(max(last - first, 1), length * base_s)
    moments = [step * length / count for step in range(count)]
    stamps = [shown[max(bisect_right(shown, origin + start + moment + 0.5) - 1, 0)] for moment in moments]
    return Choice([moment * base_s for moment in moments], stamps)


def frames_at(
    source: Source, index: Index, stamps: list[int], check: Callable[[Any], None], damage: Damage
) -> Iterator[Any]:
    """The frame of each stamp, in order; where it is lost, the one before it. Ends where nothing more can be decoded.

    `check` sees every frame that is decoded.
    """
    with _Player(source, index, check, damage) as player:
        held = ahead = None  # the last frame that is not after the moment, and one after it
        for stamp in stamps:
            if ahead is not None and stamp_of(ahead) <= stamp:
                held, ahead = ahead, None
            if ahead is None and (held is None or stamp_of(held) < stamp) and player.seek(stamp):
                held = None
            while ahead is None and (held is None or stamp_of(held) < stamp):
                frame = player.next()
                if frame is None:
                    break
                held, ahead = (frame, None) if stamp_of(frame) <= stamp else (held, frame)
            if held is None:
                held, ahead = ahead, None
            if held is None or (ahead is None and stamp_of(held) < stamp):
                return
            yield held


def stamp_of(frame: Any) -> int:
    """When a frame is shown, in ticks."""
    stamp = frame.pts if frame.pts is not None else frame.dts
    return -1 if stamp is None else int(stamp)


class _Player:
    """Decodes a picture track from the start, and skips to a key frame where that saves more than it costs."""

    def __init__(self, source: Source, index: Index, check: Callable[[Any], None], damage: Damage) -> None:
        self.source, self.index, self.check, self.damage = source, index, check, damage
        self.places = {stamp: place for place, stamp in enumerate(index.stamps)}
        self.seekable = index.seekable
        self.stack = ExitStack()

    def __enter__(self) -> _Player:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _open(self) -> None:
        self.stack.close()
        self.container: Any = self.stack.enter_context(open_container(self.source))
        track: Any = self.container.streams[self.index.track]
        self.track = track
        if track.codec_context.width * track.codec_context.height <= _THREADED_PIXELS:
            track.thread_type = "AUTO"
        self._play(read_packets(self.container, [self.track], self.damage), 0, None)

    def _play(self, packets: Iterator[Any], place: int, entry: int | None) -> None:
        self.place = place  # of the next packet
        self.entry = entry  # the stamp of the key frame that is skipped to, until it is seen
        self.shown = 0  # frames so far, where they are counted
        self.frames = decode(self._counted(packets), self.track, self.damage)

    def _counted(self, packets: Iterator[Any]) -> Iterator[Any]:
        for packet in packets:
            self.place += 1
            yield packet

    def next(self) -> Any:
        """The next frame in the order of showing; None at the end."""
        for frame in self.frames:
            self.check(frame)
            if self.index.counted:
                frame.pts, self.shown = self.shown, self.shown + 1
            if self.entry is None:
                return frame
            if stamp_of(frame) >= self.entry:
                if stamp_of(frame) > self.entry or not frame.key_frame:
                    break
                self.entry = None
                return frame
        if self.entry is None:
            return None
        return self._from_the_start().next()  # decoding cannot begin where the file says that it can

    def _from_the_start(self) -> _Player:
        self.seekable = False
        self._open()
        return self

    def seek(self, stamp: int) -> bool:
        """Skip to the key frame from which this stamp can be decoded, if that is worth it; whether it did."""
        goal = self.places.get(stamp)
        if not self.seekable or goal is None:
            return False
        keys = self.index.keys[: bisect_right(self.index.keys, goal)]
        key = next((place for place in reversed(keys) if self.index.stamps[place] <= stamp), 0)
        if key <= self.place + _SEEK_PACKETS:
            return False
        import av

        entry = self.index.stamps[key]
        for target in (entry, self.index.decoding[key]):
            with suppress(av.FFmpegError):
                self.container.seek(target, stream=self.track)
                packets = read_packets(self.container, [self.track], self.damage)
                first = next(packets, None)
                place = None if first is None else self.places.get(first.dts if first.pts is None else first.pts)
                if first is not None and place is not None and place <= key:
                    self.seekable = place >= self.place
                    self._play(chain([first], packets), place, entry)
                    return True
        self._from_the_start()
        return True


def upright(frame: Any) -> np.ndarray:
    """A frame as RGB uint8 [H, W, 3], turned and mirrored as its display matrix says."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    angle = math.radians(frame.rotation)
    a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    with suppress(KeyError, ValueError):  # no matrix, or side data of a kind that PyAV does not know
        a, b, _, c, d = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)[:5].tolist()
    # (x, y) is shown at (a x + c y, b x + d y); of the eight ways to turn and mirror, the nearest is taken
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
