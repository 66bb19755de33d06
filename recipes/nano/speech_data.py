"""Makes the speech that hearing is learnt from: clips of many speakers, noises, and sound in which nothing is said.

    python recipes/nano/speech_data.py data [--clips 30000] [--jobs 2]

Clips come in files, see `clip_files`: a run that is interrupted goes on. A number names a clip: its speaker, text and
tempo follow from it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import noises
import numpy as np
import soundfile
from clip_files import Made, files, make_files, rows_of, write_rows
from engines import PAUSE, Spoken, open_engines
from english import draw_text
from speakers import RATE_HZ, SHARES, Speaker, all_speakers, say

KIND = "heard"
CLIPS = 30_000
NOISES, UNSAID = 400, 1500
CLIP_SHARES = {"kokoro": 0.12, "heart": 0.28, "flite": 0.2, "espeak": 0.15, "festival": 0.25}  # Kokoro takes longest
TEMPO = (0.88, 1.2)
_JOINED = 0.12  # of the clips: each word by itself, as in recorded announcements
_BRIEF_S = 2.2
_GAP_S = (0.0, 0.35)
_NOISE_S = (6.0, 12.0)
_UNSAID_S = (0.3, 8.0)
_PEAK = 0.6


@cache
def _engine(name: str, folder: Path) -> Any:
    return open_engines([name], folder)


@cache
def _speakers() -> dict[str, list[Speaker]]:
    found: dict[str, list[Speaker]] = {name: [] for name in SHARES}
    for speaker in all_speakers():
        found[speaker.engine].append(speaker)
    return found


def clip(engine: str, number: int, folder: Path) -> Made:
    """A clip: its sound, its text, who says it, and its phones where the engine tells them."""
    rng = random.Random(f"heard {engine} {number}")
    speakers = _speakers()[engine]
    who = rng.randrange(len(speakers))
    text, tempo = draw_text(rng), rng.uniform(*TEMPO)
    if rng.random() < _JOINED and len(text.split()) <= 6:
        spoken = joined(engine, text, speakers[who], tempo, rng, folder)
    else:
        spoken = say(_engine(engine, folder), text, speakers[who], tempo)
    phones = [[name, round(end, 3)] for name, end in spoken.phones]
    return Made(spoken.samples, text, f"{engine} {who}", {"phones": phones} if phones else {})


def joined(engine: str, text: str, speaker: Speaker, tempo: float, rng: random.Random, folder: Path) -> Spoken:
    """Every word said by itself, with pauses."""
    parts: list[np.ndarray] = []
    phones: list[tuple[str, float]] = []
    whole = True
    for word in text.split():
        start = sum(map(len, parts)) / RATE_HZ
        spoken = say(_engine(engine, folder), word, speaker, tempo)
        parts += [spoken.samples, np.zeros(int(rng.uniform(*_GAP_S) * RATE_HZ), np.float32)]
        phones += [(name, start + end) for name, end in spoken.phones]
        phones.append((PAUSE, sum(map(len, parts)) / RATE_HZ))
        whole &= bool(spoken.phones)
    return Spoken(np.concatenate(parts[:-1]), RATE_HZ, tuple(phones) if whole else ())


def write_noises(folder: Path) -> None:
    """Noises to be mixed in (`noises.jsonl`), a fifth of them babble, and sound without speech (`unsaid.jsonl`)."""
    sounds = folder / "noise"
    sounds.mkdir(parents=True, exist_ok=True)
    spoken = sorted((folder / "heard").glob("*/*.wav"))
    mixed = []
    for number in range(NOISES):
        rng = np.random.default_rng([1, number])
        count = int(rng.uniform(*_NOISE_S) * RATE_HZ)
        if number % 5 == 0 and spoken:
            samples = noises.babble(count, rng, lambda: soundfile.read(rng.choice(spoken), dtype="float32")[0])  # noqa: B023
        else:
            samples = noises.make(rng.choice(noises.KINDS), count, rng)
        mixed.append({"audio": _write_sound(sounds / f"n{number}.wav", samples)})
    unsaid = []
    for number in range(UNSAID):
        rng = np.random.default_rng([2, number])
        kind = "silence" if number % 10 == 0 else rng.choice(noises.KINDS)
        samples = noises.make(kind, int(rng.uniform(*_UNSAID_S) * RATE_HZ), rng)
        unsaid.append({"audio": _write_sound(sounds / f"u{number}.wav", samples), "text": ""})
    write_rows(folder / "unsaid.jsonl", unsaid)
    write_rows(folder / "noises.jsonl", mixed)


def _write_sound(path: Path, samples: np.ndarray) -> str:
    highest = max(float(np.abs(samples).max()), 1e-6)
    soundfile.write(path, samples * (_PEAK / highest), RATE_HZ, subtype="PCM_16")
    return f"noise/{path.name}"


def make_speech(folder: Path, clips: int = CLIPS, jobs: int = 2, only: Sequence[str] = ()) -> None:
    """All files that are missing, and the manifests: `heard_<engine>.jsonl`, `first.jsonl` (what heart says in little
    time), `unsaid.jsonl` and `noises.jsonl`.

    only: engines whose files are made now; the manifests come with a run of all of them.
    """
    wanted = [one for one in files(clips, CLIP_SHARES) if not only or one[0] in only]
    make_files(folder, KIND, wanted, clip, RATE_HZ, "wav", jobs)
    if not only:
        write_manifests(folder, clips)


def write_manifests(folder: Path, clips: int = CLIPS) -> None:
    """The manifests of the files that are there."""
    if not (folder / "noises.jsonl").exists():
        write_noises(folder)
    rows = rows_of(folder, KIND, files(clips, CLIP_SHARES))
    for engine, heard in rows.items():
        write_rows(folder / f"heard_{engine}.jsonl", heard)
    brief = [row for row in rows["heart"] if soundfile.info(folder / row["audio"]).duration < _BRIEF_S]
    write_rows(folder / "first.jsonl", brief)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"how many (default {CLIPS})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--only", nargs="+", default=(), choices=list(SHARES), help="engines; none of the manifests")
    args = parser.parse_args()
    make_speech(args.folder, args.clips, args.jobs, args.only)


if __name__ == "__main__":
    main()
