"""The subwords of the next omni-nano and their vectors: what all its parts rely on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import talk
import tokens
from english import words_of
from talk.numerals import NUMBERS
from talk.order import DAYS, MONTHS
from tokenizers import Tokenizer

from omni.packaged.toy import TOY_DATA

FILE = json.loads(tokens.FILE.read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.from_str(json.dumps(FILE))
ENGLISH = (
    "she sells sea shells by the sea shore", "the motorboat's wake capsized the canoe", "use care on the stairs",
    "he rides his bicycle to work every day", "a committee of teachers considered the question in may",
)  # fmt: skip


def test_ids_are_without_gaps_and_the_special_ones_are_the_toy_s() -> None:
    vocabulary = FILE["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tokens.SIZE))
    toy = json.loads((TOY_DATA / "tokenizer.json").read_text(encoding="utf-8"))
    assert {token: id for token, id in toy["model"]["vocab"].items() if id < 280}.items() <= vocabulary.items()
    assert FILE["added_tokens"] == toy["added_tokens"]
    for left, right in FILE["model"]["merges"]:
        assert left + right in vocabulary


@pytest.mark.parametrize("words", [NUMBERS, talk.COLORS, talk.SHAPES, talk.PLACES, talk.DIRECTIONS, DAYS, MONTHS])
def test_words_of_the_core_are_tokens_of_their_own(words: tuple[str, ...]) -> None:
    for word in {word for text in words for word in text.split()}:
        assert len(TOKENIZER.encode(f" {word}").ids) == 1, word


@pytest.mark.parametrize("text", [*ENGLISH, "Hello, World!", "café — naïve", "12 + 7 = 19", "日本", "what's up?\n"])
def test_any_text_comes_back_in_small_letters(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text.lower()


def test_roles_are_tokens_of_their_own() -> None:
    assert [TOKENIZER.encode(role).ids for role in ("system", "user", "assistant")] == [[276], [277], [278]]


def test_english_falls_into_long_subwords() -> None:
    """A second of speech has up to eighteen letters, and the encoder twelve tokens: two letters each are enough."""
    texts = [" " + " ".join(words_of(text)) for text in ENGLISH]
    counts = [len(TOKENIZER.encode(text).ids) for text in texts]
    assert sum(map(len, texts)) / sum(counts) > 2.8
    assert all(len(text) / count > 2 for text, count in zip(texts, counts))


def test_vectors_are_always_the_same_and_far_apart() -> None:
    vectors = tokens.vectors()
    assert vectors.shape == (tokens.SIZE, tokens.WIDTH) and vectors.dtype == torch.float32
    assert torch.equal(vectors, tokens.vectors())
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(tokens.SIZE))
    cosines = vectors @ vectors.t() - torch.eye(tokens.SIZE)
    assert float(cosines.abs().max()) < 0.35  # of 2 million pairs: six standard deviations of 1 / sqrt(320)
    assert vectors[0, :3].tolist() == pytest.approx([-0.0590, 0.0519, -0.0739], abs=1e-4)
