"""Makes the lines that omni-nano's voices learn to say: hibari's `heart`, and `oak`, a larger person of the same voice.

    python recipes/nano/voice_data.py data [--lines 30000] [--jobs 2]

Half of the lines are English sentences, with their marks or without, the rest answers and questions of the larger
world, phrases, words and numbers; some have figures where a number is said. oak is heart played slower, at 24 kHz like
it, so that pitch and formants are lower, and spoken so much faster (DistillMOS of five sentences: heart 4.5, oak 3.7,
Kokoro-82M's five styles in English 1.7 to 2.3). Lines come in files, see `clip_files`: a run that is interrupted goes
on.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import talk
from clip_files import Made, files, make_files, rows_of, write_rows
from engines import Manner, heart
from english import sentences, words_of
from speakers import heard_between
from talk.numerals import NUMBERS
from voices import to_rate

KIND = "lines"
LINES = 30_000
RATE_HZ = 24_000
SHARES = {"heart": 0.7, "oak": 0.3}
_SIZES = {"heart": 1.0, "oak": 0.85}  # factors of pitch and formants
_LONGEST = 14  # words
_PEAK = 0.6
_FIGURES = {word: str(number) for number, word in enumerate(NUMBERS) if " " not in word}
_OFFERED = 40  # texts of the larger world drawn at once


def draw_line(rng: random.Random) -> tuple[str, str]:
    """A text as it is written, and as an engine is to say it."""
    said = _said(rng)
    written = said if rng.random() < 0.5 else " ".join(words_of(said))
    if rng.random() < 0.08:
        written = " ".join(_FIGURES.get(word, word) for word in written.split())
    if rng.random() < 0.3:
        written = written.capitalize() + rng.choice((".", "", "!", ".") if not re.search(r"\W$", written) else ("",))
    return written, said


def _said(rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.45:
        words = rng.choice(sentences()).split()
        return " ".join(words[:_LONGEST])
    if chance < 0.6:  # a part of one: no word is known by its place
        words = words_of(rng.choice(sentences()))
        first = rng.randrange(len(words))
        return " ".join(words[first : first + rng.randint(1, 5)])
    if chance < 0.66:
        return " ".join(rng.choices(NUMBERS, k=rng.choice((1, 1, 2, 3))))
    if chance < 0.85:
        return rng.choice(_answers()) if rng.random() < 0.6 else _turn(rng).answer
    return talk.spoken(turn, rng) if (turn := _turn(rng)).question else turn.answer


def _turn(rng: random.Random) -> talk.Turn:
    return rng.choice(talk.conversation(rng, media=False, sentences=("the tea is cold",)).turns)


@cache
def _answers() -> list[str]:
    return talk.all_answers()


def said(voice: str, text: str) -> np.ndarray:
    """A text in a voice, trimmed, its highest peak at 0.6; empty where the engine says nothing."""
    size = _SIZES[voice]
    samples, rate_hz, *_ = heart(text, Manner(speed=1 / size))
    samples = to_rate(np.ascontiguousarray(samples, dtype=np.float32), round(rate_hz * size), RATE_HZ)
    start, end = heard_between(samples, RATE_HZ)
    samples = samples[start:end]
    highest = float(np.abs(samples).max(initial=0.0))
    return samples * (_PEAK / highest) if highest > 1e-4 else samples[:0]


def line(voice: str, number: int, folder: Path) -> Made:
    """A line's sound, its text as it is written, and the voice."""
    text, spoken = draw_line(random.Random(f"line {voice} {number}"))
    return Made(said(voice, spoken), text, voice)


def make_lines(folder: Path, lines: int = LINES, jobs: int = 2, only: Sequence[str] = ()) -> None:
    """All files that are missing, and the manifests `lines_<voice>.jsonl`. only: voices whose files are made now."""
    wanted = [one for one in files(lines, SHARES) if not only or one[0] in only]
    make_files(folder, KIND, wanted, line, RATE_HZ, "flac", jobs)
    for voice, rows in rows_of(folder, KIND, files(lines, SHARES)).items():
        write_rows(folder / f"lines_{voice}.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lines", type=int, default=LINES, help=f"how many (default {LINES})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--only", nargs="+", default=(), choices=list(SHARES), help="voices")
    args = parser.parse_args()
    make_lines(args.folder, args.lines, args.jobs, args.only)


if __name__ == "__main__":
    main()
