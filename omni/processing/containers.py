"""Files through FFmpeg (PyAV): one way to open them, their tracks from the best on, frames decoded past damage."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from omni.processing.sources import Source, first_bytes

if TYPE_CHECKING:
    from av.container import InputContainer

# The demuxers that may be tried: those whose files hold media themselves. Scripts that name other files, addresses,
# ports or sequences (concat, hls, dash, sdp, image2, …) and text shown as a film are not among them.
FORMATS = (
    *("aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "au", "caf", "dsf", "dts", "dtshd", "eac3", "flac", "gsm"),
    *("loas", "mp3", "mpc", "mpc8", "oma", "qcp", "sox", "tak", "truehd", "tta", "voc", "w64", "wav", "wv", "xwma"),
    *("avr", "ircam", "mlp", "nistsphere", "pvf", "sds"),
    *("asf", "avi", "dv", "flv", "ivf", "matroska", "mov", "mpeg", "mpegts", "mxf", "nut", "obu", "ogg", "rm", "webm"),
    *("swf", "wtv", "yuv4mpegpipe"),
    *("cavsvideo", "dirac", "h261", "h263", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "vc1", "vvc", "apng", "gif"),
    *("bmp_pipe", "gif_pipe", "jpeg_pipe", "png_pipe", "tiff_pipe", "webp_pipe"),
)
_PLANES = 8  # PyAV reads past the list of planes where there are this many or more; packed samples are one plane
_RESTART_S = 0.1  # a clock that steps back further has begun anew (FFmpeg's own limit for joined files)
# Containers whose sound tracks may order their channels as they like.
_ANY_ORDER = frozenset(("aiff", "caf", "mov,mp4,m4a,3gp,3g2,mj2"))


@contextmanager
def open_container(source: Source) -> Iterator[InputContainer]:
    """A file, by its own bytes alone: nothing that it names is opened.

    Raises FFmpeg's errors where it is none of the formats, and OSError where it cannot be read.
    """
    import av

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with (
        io.BytesIO(source) if isinstance(source, bytes) else _nameless(source) as file,
        av.open(file, container_options=options, metadata_errors="replace", io_open=_refuse) as container,
    ):
        yield container


def _nameless(path: Path) -> BinaryIO:
    """An open file without its name, from which FFmpeg would conclude what it holds ("s%d.png": a sequence)."""
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")


def _refuse(address: str, flags: int, options: dict[str, str]) -> Any:
    raise OSError(f"the file refers to {address!r}, which is not opened")


def tracks(container: InputContainer, kind: str) -> list[Any]:
    """The tracks of a kind ("audio", "video") that can be decoded, the best first.

    Covers and stills come last, then commentaries and the like; the track marked as default comes first, then the
    largest picture, then the order of the file.
    """
    from av.stream import Disposition as Mark

    still = Mark.attached_pic | Mark.timed_thumbnails | Mark.still_image
    aside = Mark.comment | Mark.hearing_impaired | Mark.visual_impaired | Mark.karaoke | Mark.clean_effects

    def rank(track: Any) -> tuple[bool, bool, bool, int]:
        marks = Mark(track.disposition)
        size = track.codec_context.width * track.codec_context.height if kind == "video" else 0
        return bool(marks & still), bool(marks & aside), not marks & Mark.default, -size

    return sorted((track for track in getattr(container.streams, kind) if track.codec_context is not None), key=rank)


def open_channels(container: InputContainer, track: Any) -> None:
    """Make a sound track safe to decode, before anything of it is.

    PyAV frees the list of channels of an unusual order twice, which ends the process. The decoder is told the number
    of channels instead, which is all that a mean over them needs.
    """
    context = track.codec_context
    layout = context.layout
    if " channels (" in layout.name or (container.format.name in _ANY_ORDER and layout.nb_channels > 2):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))  # never freed: its list belongs to the decoder
        context.options = {**context.options, "ch_layout": f"{layout.nb_channels} channels"}


@dataclass
class Damage:
    """What a file has lost: packets that could not be read or decoded, and why the last one could not.

    joined: whether its clocks began anew somewhere.
    """

    packets: int = 0
    reason: str = ""
    joined: bool = False

    def add(self, error: BaseException) -> None:
        self.packets += 1
        self.reason = reason_of(error)

    def warn(self, name: str) -> None:
        """Say it, where something was lost and the rest is used."""
        if self.packets:
            warnings.warn(
                f"{name} is damaged: {self.packets} of its packets could not be decoded ({self.reason}) and are left "
                "out",
                stacklevel=2,
            )


def reason_of(error: BaseException) -> str:
    """An error of FFmpeg in its own words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_packets(container: InputContainer, wanted: Sequence[Any], damage: Damage) -> Iterator[Any]:
    """The packets of some tracks in the order of the file, up to where it cannot be read on; none of them is empty.

    Where joined files start their clocks again, stamps go on from the last one.
    """
    import av

    clocks = {track.index: _Clock(float(track.time_base or 1)) for track in wanted}
    packets = container.demux(list(wanted))
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            damage.add(error)
            return
        except IndexError:  # PyAV at the end of a file in which a track has appeared later
            return
        if packet is None:
            return
        if packet.size:
            damage.joined |= clocks[packet.stream_index].go_on(packet)
            yield packet


@dataclass
class _Clock:
    """Decoding stamps of one track that never step far back."""

    base_s: float
    last: int | None = None
    step: int = 0
    offset: int = 0

    def go_on(self, packet: Any) -> bool:
        """Put the packet after those before it; whether the clock has ever begun anew."""
        if packet.dts is None:
            return False
        stamp = packet.dts + self.offset
        if self.last is not None:
            if (self.last - stamp) * self.base_s > _RESTART_S:
                self.offset += self.last + (packet.duration or self.step) - stamp
                stamp = packet.dts + self.offset
            self.step = max(stamp - self.last, 0)
        self.last = stamp
        if self.offset:
            packet.dts += self.offset
            packet.pts = None if packet.pts is None else packet.pts + self.offset
        return self.offset != 0


def decode(packets: Iterator[Any], track: Any, damage: Damage) -> Iterator[Any]:
    """The frames of a track's packets; what cannot be decoded is counted and left out."""
    import av

    for packet in packets:
        try:
            yield from packet.decode()
        except MemoryError:
            raise
        except av.FFmpegError as error:
            damage.add(error)
    try:
        yield from track.codec_context.decode(None)
    except EOFError:
        pass
    except av.FFmpegError as error:
        damage.add(error)


class Downmix:
    """Decoded frames of any sample format, rate and number of channels -> the mean of the channels, fp32 [n]."""

    def __init__(self) -> None:
        self.source: tuple[str, str, int] | None = None
        self.converter: Any = None

    def __call__(self, frame: Any) -> Iterator[Tensor]:
        import av

        channels = frame.layout.nb_channels
        planar = channels < _PLANES
        source = frame.format.name, frame.layout.name, frame.sample_rate
        if source != self.source:
            self.source, self.converter = source, av.AudioResampler(format="fltp" if planar else "flt")
        for part in self.converter.resample(frame):
            samples = torch.from_numpy(part.to_ndarray())
            yield samples.mean(dim=0) if planar else samples.view(-1, channels).mean(dim=1)


def ogg_links(source: Source) -> list[Source]:
    """The parts of a chained Ogg file, each a file of its own (soundfile ends with the first); or the file itself."""
    if first_bytes(source, 4) != b"OggS":
        return [source]
    if isinstance(source, bytes):
        starts = _link_starts(source)
        return [source[a:b] for a, b in zip(starts, [*starts[1:], len(source)])]
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts = _link_starts(data)
        return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])] if len(starts) > 1 else [source]


def lost_pages(source: Source) -> int:
    """How many numbers are missing among an Ogg file's pages of sound; a recording of a broadcast begins with any."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    lost, place, last = 0, 0, dict[bytes, int]()
    while 0 <= (place := data.find(b"OggS\0", place)) < len(data) - 27:
        serial, number = data[place + 14 : place + 18], int.from_bytes(data[place + 18 : place + 22], "little")
        if any(data[place + 6 : place + 14]):  # the time in samples, 0 in headers
            lost += max(number - last.get(serial, number) - 1, 0)
            last[serial] = number
        place += 5
    return lost


def _link_starts(data: bytes | mmap.mmap) -> list[int]:
    """Where pages that begin a stream (flag 2) follow pages that do not."""
    starts, place, inside = [0], 0, False
    while 0 <= (place := data.find(b"OggS\0", place)) < len(data) - 5:
        begins = bool(data[place + 5] & 2)
        if begins and inside:
            starts.append(place)
        inside = not begins
        place += 5
    return starts
