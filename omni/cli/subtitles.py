"""Subtitles of a spoken text: an .srt file with an entry for each word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omni.config.writing import check_can_write

if TYPE_CHECKING:
    from torch import Tensor


class Entry(NamedTuple):
    """What is shown from one time to another, in milliseconds from the beginning of the sound."""

    begin_ms: float
    end_ms: float
    text: str


def check_srt_path(path: Path, out: Path) -> None:
    """Fail before the model is loaded; out: the sound file. Raises OSError or ValueError."""
    if path.suffix.lower() != ".srt":
        raise ValueError(f"--srt {path} must end in .srt")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it or choose another --srt")
    if path.is_dir():
        raise ValueError(f"--srt {path} is a folder; name a file in it, such as {path / 'out.srt'}")
    if path.resolve() == out.resolve():
        raise ValueError(f"--srt and --out both name {path}; choose two files")
    check_can_write(path)


def word_entries(text: str, samples: Tensor, sample_rate: int, *, complete: bool) -> list[Entry]:
    """Each word of a text, when it is spoken in samples [n]; complete: all of the text is spoken in them.

    A word that was not reached has no entry.
    """
    from omni.generation.speech_times import SpeechTimes

    times = SpeechTimes(text)
    times.end_text()
    times.hear(samples.float().cpu().numpy(), sample_rate)
    length_ms, entries = 1000 * len(samples) / sample_rate, list[Entry]()
    for word, (begin, end) in zip(times.words, times.word_spans_ms(sound_over=complete)):
        begin = max(begin, entries[-1].end_ms if entries else 0.0)
        if begin < length_ms:
            entries.append(Entry(begin, min(max(begin, end), length_ms), _line(text[word.start : word.stop])))
    return entries


def _line(text: str) -> str:
    """One line, and nothing that an .srt file means something by."""
    return " ".join(text.split()).replace("-->", "->")


def srt(entries: Sequence[Entry]) -> str:
    """The entries as SubRip: a number, its times, its text, and an empty line."""
    blocks = (
        f"{number}\n{_clock(entry.begin_ms)} --> {_clock(entry.end_ms)}\n{entry.text}\n"
        for number, entry in enumerate(entries, 1)
    )
    return "\n".join(blocks)


def _clock(time_ms: float) -> str:
    seconds, thousandths = divmod(round(time_ms), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{thousandths:03}"


def write_srt(path: Path, entries: Sequence[Entry]) -> None:
    """Write an .srt file; an old one stays until the new one is complete. Raises OSError when it cannot be written."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(srt(entries), encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
