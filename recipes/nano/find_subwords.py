"""When is which subword said? Found in the clips of all voices by the phones that the audio encoder names.

    python recipes/nano/find_subwords.py PHONES data/heard_*.jsonl        # PHONES: a folder of timed_hearing.py

flite says how each word is pronounced; the likeliest path through those phones, pauses between words allowed, says when
each word and each part of it ends (Viterbi, 1967). For `heard_x.jsonl` there is then `timed_x.jsonl` beside it, with
"phones" and "subwords" in each row; a clip that is too short for its text is left out.

Shapes: M moments of 0.02 s, P phones, K phones and pauses of a text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_files import write_rows
from engines import PAUSE, PHONES, phone_named
from timed_clips import RATE_HZ, TOKEN_S, Ends, Heard, read, said_at
from timed_hearing import SLOTS, hear, phone_head
from torch import Tensor
from tqdm import tqdm

from omni import OmniModel
from omni.encoders.mel import LogMel

MOMENT_S = TOKEN_S / SLOTS
_CHUNK_S = 0.96  # whole tokens, so that moments follow each other evenly
_TOGETHER = 16  # clips
_SURE = 0.9  # of the phone that flite or festival says
_LISTED = "pronunciations.json"


def pronunciations(words: Iterable[str], file: Path) -> dict[str, list[str]]:
    """The phones of each word, without pauses, as flite says them; kept in a file, since each takes a call.

    Raises FileNotFoundError where flite is not there and a word is not in the file.
    """
    known: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = sorted(set(words) - set(known))
    if missing:
        with ThreadPoolExecutor(4) as pool:
            known |= zip(missing, pool.map(_said_by_flite, missing))
        file.write_text(json.dumps(known), encoding="utf-8")
    return known


def _said_by_flite(word: str) -> list[str]:
    try:
        told = subprocess.run(
            ["flite", "-voice", "kal16", "-ps", "-t", word, "none"], check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise FileNotFoundError("flite: not installed; on Debian: apt-get install flite") from error
    return [phone for name in told.stdout.split() if (phone := phone_named(name)) != PAUSE]


def likely_ends(likely: np.ndarray, phones: Sequence[int], optional: Sequence[bool]) -> np.ndarray | None:
    """Where each of K phones ends, int [K] of moments, on the likeliest path through log probabilities [M, P]; one that
    is optional may be skipped, and ends where the one before it ends. None where M is too small."""
    may = np.array(optional)
    least = int((~may).sum())
    if len(likely) < least:
        return None
    count = len(phones)
    skips = np.zeros(count, dtype=bool)  # may be entered from two before
    skips[2:] = may[1:-1]
    said = likely[:, list(phones)]
    score = np.full(count, -np.inf)
    score[0] = said[0, 0]
    if may[0] and count > 1:
        score[1] = said[0, 1]
    came = np.zeros(said.shape, dtype=np.int8)
    for moment in range(1, len(said)):
        from_one = np.concatenate(([-np.inf], score[:-1]))
        from_two = np.where(skips, np.concatenate(([-np.inf, -np.inf], score[:-2]))[:count], -np.inf)
        choices = np.stack((score, from_one, from_two))
        came[moment] = choices.argmax(0)
        score = choices.max(0) + said[moment]
    state = count - 1 if not may[-1] or count == 1 or score[-1] >= score[-2] else count - 2
    ends = np.zeros(count, dtype=int)
    ends[state:] = len(said)
    for moment in range(len(said) - 1, 0, -1):
        step = int(came[moment, state])
        ends[state - step : state] = moment
        state -= step
    return ends


def ends_of(
    text: str, pieces: Sequence[tuple[int, str]], said_as: dict[str, list[str]], likely: np.ndarray
) -> tuple[Ends, Ends] | None:
    """The phones and the subwords of a text with the second in which each ends.

    pieces: subwords' ids and spelling, a space in front of each word's first but the text's. None where no path fits.
    """
    names, optional, last_of = [PAUSE], [True], []
    for word in text.split():
        names += said_as[word]
        optional += [False] * len(said_as[word])
        last_of.append((len(names) - len(said_as[word]), len(names)))
        names.append(PAUSE)
        optional.append(True)
    found = likely_ends(likely, [PHONES.index(name) for name in names], optional)
    if found is None:
        return None
    subwords: Ends = []
    words, place, letters = text.split(), -1, 0
    for label, spelling in pieces:
        if spelling.startswith(" ") or place < 0:
            place, letters = place + 1, 0
        letters += _letters(spelling)
        first, end = last_of[place]
        share = letters / max(1, _letters(words[place]))
        last = first + max(0, round(share * (end - first)) - 1)
        subwords.append((label, round(float(found[last]) * MOMENT_S, 3)))
    starts = np.concatenate(([0], found[:-1]))
    phones = [(name, round(float(end) * MOMENT_S, 3)) for name, end, start in zip(names, found, starts) if end > start]
    return phones, subwords


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)


def of_told(phones: Sequence[Sequence[Any]], seconds: float) -> np.ndarray:
    """Log probabilities [M, P] of phones that the voice itself tells."""
    moments = (np.arange(max(1, round(seconds / MOMENT_S))) + 0.5) * MOMENT_S
    told = [PHONES.index(name) for name in said_at(moments, [(name, end) for name, end in phones], PAUSE)]
    likely = np.full((len(moments), len(PHONES)), np.log((1 - _SURE) / (len(PHONES) - 1)))
    likely[np.arange(len(moments)), told] = np.log(_SURE)
    return likely


@torch.no_grad()
def of_heard(encoder: Any, head: torch.nn.Module, mel: LogMel, sounds: Sequence[Tensor]) -> list[np.ndarray]:
    """Log probabilities [M, P] of the phones that are heard in each clip."""
    out, _ = hear(encoder, mel, [Heard(sound, [], [], "") for sound in sounds], _CHUNK_S)
    return [one.flatten(0, 1).numpy() for one in head(out.embeds).log_softmax(-1).split(out.lengths)]


def find(model: OmniModel, head: torch.nn.Module, manifest: Path, opening: str = " ") -> int:
    """Write `timed_x.jsonl` beside `heard_x.jsonl` or `x.jsonl`; returns how many clips could be timed.

    opening: what stands in front of a text. What is heard is written like the middle of a sentence.
    """
    processor, encoder = model.processor, model.audio_encoder
    assert processor is not None and encoder is not None
    mel = LogMel(num_mels=encoder.config.num_mel_bins)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    words = {word for row in rows for word in row["text"].split()}
    said_as = pronunciations(words, manifest.parent / _LISTED)
    rows = [row for row in rows if all(said_as[word] for word in row["text"].split())]
    timed = []
    for first in tqdm(range(0, len(rows), _TOGETHER), manifest.stem):
        some = rows[first : first + _TOGETHER]
        sounds = [read(row | {"folder": str(manifest.parent)}) for row in some]
        if all("phones" in row for row in some):
            likely = [of_told(row["phones"], len(sound) / RATE_HZ) for row, sound in zip(some, sounds)]
        else:
            likely = of_heard(encoder, head, mel, sounds)
        for row, one in zip(some, likely):
            ids = processor.encode_text(f"{opening}{row['text']}" if row["text"] else "")
            pieces = [(label, processor.decode([label])) for label in ids]
            if (ends := ends_of(row["text"], pieces, said_as, one)) is not None:
                phones, subwords = ends
                timed.append(row | {"phones": row.get("phones", phones), "subwords": subwords})
    write_rows(manifest.with_name(f"timed_{manifest.name.removeprefix('heard_')}"), timed)
    return len(timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phones", type=Path, help="a folder of timed_hearing.py")
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--answers", action="store_true", help="texts begin as the model's answers do, without a space")
    args = parser.parse_args()
    model = OmniModel.from_pretrained(args.phones / "model", parts=["thinker"], dtype="float32", device="cpu")
    head = phone_head(args.phones, model.audio_encoder)
    for manifest in args.manifests:
        print(f"{manifest.stem}: {find(model, head, manifest, '' if args.answers else ' ')} clips")


if __name__ == "__main__":
    main()
