"""The subwords of the next omni-nano, and their vectors, which all its parts share and none of them trains.

    python recipes/nano/tokens.py            # writes recipes/nano/tokenizer.json anew

Hearing learns to say these vectors, seeing too, the Thinker reads them, the Talker speaks them: as they follow from a
seed and the ids from a file, every part can be trained by itself, in any order. Numbers, colours, shapes, places, days
and months are tokens of their own behind a space; any other English falls into subwords of more than three letters on
average, so that the audio encoder's twelve or thirteen tokens a second are enough to spell it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import talk
import torch
from english import sentences, words_of
from talk.numerals import NUMBERS
from talk.order import DAYS, MONTHS
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from torch.nn import functional as F

from omni.packaged.toy import TOY_DATA

FILE = Path(__file__).resolve().parent / "tokenizer.json"
SIZE = 2048
WIDTH = 320  # of the Thinker, and so of a vector
_FIRST_SUBWORD = 280  # below are bytes, special tokens and the names of roles
_BYTES = 256
_SPOKEN = 40_000  # texts of the small world in the corpus
_CORE_COUNT, _OPENING_COUNT = 200, 5  # how often words of the core count besides, and words that open an answer
_SEED = 2
_WHOLE = {"ignore_merges": True}  # names of roles, which no merge makes, are tokens of their own


def vectors() -> Tensor:
    """fp32 [SIZE, WIDTH], of length 1, in directions that are nearly at right angles."""
    return F.normalize(torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(_SEED)), dim=1)


def corpus() -> Iterator[str]:
    """What subwords are counted in. Raises FileNotFoundError where WordNet is not there."""
    for text in sentences():
        yield " " + " ".join(words_of(text))
    yield from (f" {text}" for text in islice(talk.spoken_texts(random.Random("tokens")), _SPOKEN))
    for text in (*NUMBERS, *talk.COLORS, *talk.SHAPES, *talk.PLACES, *talk.DIRECTIONS, *DAYS, *MONTHS):
        yield from (f" {text}" for _ in range(_CORE_COUNT))
    for answer in talk.all_answers():
        yield from (answer.split()[0] for _ in range(_OPENING_COUNT))


def make_tokenizer() -> dict[str, Any]:
    """tokenizer.json: byte-level subwords (Sennrich et al., 2016) of small letters, behind the packaged toy's special
    tokens."""
    toy = json.loads((TOY_DATA / "tokenizer.json").read_text(encoding="utf-8"))
    kept = {token: id for token, id in toy["model"]["vocab"].items() if id < _FIRST_SUBWORD}
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = Tokenizer.from_str(json.dumps(toy)).pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTES + SIZE - _FIRST_SUBWORD,
        initial_alphabet=[token for token, id in kept.items() if id < _BYTES],
        show_progress=False,
    )
    learnt.train_from_iterator(corpus(), trainer)
    model = json.loads(learnt.to_str())["model"]
    subwords = [token for token, _ in sorted(model["vocab"].items(), key=lambda one: one[1]) if token not in kept]
    vocabulary = kept | {token: _FIRST_SUBWORD + place for place, token in enumerate(subwords)}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    return toy | {"normalizer": normalizer, "model": toy["model"] | {"vocab": vocabulary, "merges": merges, **_WHOLE}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    FILE.write_text(json.dumps(make_tokenizer(), ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
