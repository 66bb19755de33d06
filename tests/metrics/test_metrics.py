"""Metrics on cases that can be counted by hand, and the text rule that they share."""

# ruff: noqa: RUF001  (look-alike characters are what the text rule is about)

from __future__ import annotations

import math

import pytest
import torch
from build import seeded
from hypothesis import given
from hypothesis import strategies as st

from omni.metrics.scores import (
    EditCounts,
    accuracy,
    bleu,
    character_error_rate,
    code_accuracy,
    edit_counts,
    exact_match,
    mel_distance,
    speaker_similarity,
    tokenise_13a,
    word_edits,
    word_error_rate,
)
from omni.metrics.text_normaliser import LARGEST, normalise, spell_number

LETTERS = st.text("abc", max_size=7)


# Error rates


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("a b c d", "a b c d", (0, 0, 0)),
        ("a b c d", "a x c d", (1, 0, 0)),
        ("a b c d", "a b c", (0, 0, 1)),
        ("a b c d", "a b b c d e", (0, 2, 0)),
        ("a b c d", "", (0, 0, 4)),
        ("", "a b", (0, 2, 0)),
        ("a b", "b a", (0, 1, 1)),  # as dear as two substitutions, and keeps one word
        ("a b c d e", "x b d e f", (1, 1, 1)),
    ],
)
def test_edits_by_hand(reference: str, hypothesis: str, edits: tuple[int, int, int]) -> None:
    length = len(reference.split())
    assert edit_counts(reference.split(), hypothesis.split()) == EditCounts(*edits, length)
    assert word_edits([reference], [hypothesis]) == EditCounts(*edits, length)


def distance(a: str, b: str) -> int:
    """The textbook's recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


@given(LETTERS, LETTERS)
def test_edits_are_the_fewest_and_consistent(a: str, b: str) -> None:
    edits, back = edit_counts(a, b), edit_counts(b, a)
    assert edits.errors == distance(a, b)
    assert len(b) - len(a) == edits.insertions - edits.deletions and edits.length == len(a)
    assert min(edits.substitutions, edits.insertions, edits.deletions) >= 0
    assert (back.substitutions, back.insertions, back.deletions) == (
        edits.substitutions,
        edits.deletions,
        edits.insertions,
    )


def test_rates_are_over_the_corpus_not_the_mean_of_answers() -> None:
    references, hypotheses = ["one", "a b c d e f g h i"], ["two", "a b c d e f g h i"]
    assert word_error_rate(references, hypotheses) == 1 / 10
    assert character_error_rate(["ab", "cd"], ["ab", "cx"]) == 1 / 4
    assert word_error_rate(["a"], ["a b c"]) == 2
    assert word_error_rate([""], [""]) == 0 and word_error_rate([""], ["a"]) == math.inf


def test_rates_compare_what_is_said() -> None:
    assert word_error_rate(["It’s 21 o'clock."], ["it's TWENTY-ONE o'clock"]) == 0
    assert word_error_rate(["It’s 21."], ["it's twenty one"], language=None) == 3 / 2
    assert character_error_rate(["你好，世界！"], ["你好 世介"], "zh") == 1 / 4
    assert word_error_rate(["你好 world"], ["您好 world"], "zh") == 1 / 3
    assert character_error_rate(["ice cream"], ["icecream"]) == 0
    assert exact_match(["Yes.", "No"], ["yes", "yes"]) == 0.5 and exact_match(["Yes."], ["yes"], None) == 0


def test_lists_must_match() -> None:
    with pytest.raises(ValueError, match="2 references for 1"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="into a list"):
        word_error_rate("a", "b")
    with pytest.raises(ValueError, match="empty"):
        accuracy([], [])


def test_accuracy() -> None:
    assert accuracy([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    assert accuracy(torch.tensor([1, 2]), torch.tensor([1, 2])) == 1


# BLEU


def test_bleu_by_hand() -> None:
    reference = "the cat sat on the mat today"
    assert bleu([reference], [reference]) == pytest.approx(100)
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 quadruples
    expected = 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert bleu([reference], ["the cat sat on the mat yesterday"]) == pytest.approx(expected)
    # all 5 words right, 2 too few
    assert bleu([reference], ["the cat sat on the"]) == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert bleu([reference], ["a b c d e"]) == 0 and bleu([reference], [""]) == 0
    assert bleu([reference], ["the cat sat"]) == 0  # no 4 words


def test_bleu_clips_repeated_words_and_smooths_empty_orders() -> None:
    # 2 of 7 words, then no match: 1/2 of 6, 1/4 of 5, 1/8 of 4
    expected = 100 * (2 / 7 * 0.5 / 6 * 0.25 / 5 * 0.125 / 4) ** 0.25
    assert bleu(["the cat is on the mat now"], ["the the the the the the the"]) == pytest.approx(expected)


def test_bleu_takes_the_best_of_several_references() -> None:
    references = ["a b c d e f g h", "w x y z v"]
    assert bleu([references], ["w x y z v"]) == pytest.approx(100)  # and the length of the closest
    with pytest.raises(ValueError, match="no reference"):
        bleu([[]], ["a"])


def test_bleu_counts_over_the_corpus() -> None:
    """Sums of matches, not a mean of scores: (8 - 1) of 8 words, 5 of 6 pairs, 3 of 4 triples, 1 of 2 quadruples."""
    expected = 100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25
    assert bleu(["a b c d", "e f g h"], ["a b c d", "e f g x"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("It's 1,000.5 or 10-20.", ["It's", "1,000.5", "or", "10", "-", "20", "."]),
        ("well-known U.S. (a/b)", ["well-known", "U", ".", "S", ".", "(", "a", "/", "b", ")"]),
        ("&quot;x&amp;y&quot; $5", ['"', "x", "&", "y", '"', "$", "5"]),
        ("broken-\nword\nhere", ["brokenword", "here"]),
    ],
)
def test_tokens_of_13a(text: str, tokens: list[str]) -> None:
    assert tokenise_13a(text) == tokens


def test_bleu_of_characters() -> None:
    assert bleu(["今天天气很好"], ["今天天气很好"], list) == pytest.approx(100)
    assert bleu(["今天天气很好"], ["今天天气很好"]) == 0  # one word to the western rule


# Codes, spectra, voices


def test_code_accuracy_is_by_codebook_and_counts_missing_frames() -> None:
    reference = torch.arange(12).reshape(3, 4)
    codes = reference.clone()
    codes[1, 2] += 1
    codes[2] += 1
    assert code_accuracy(codes, reference).tolist() == [1, 0.75, 0]
    assert code_accuracy(codes[:, :2], reference).tolist() == [0.5, 0.5, 0]
    assert code_accuracy(torch.cat((codes, codes), 1), reference).tolist() == [0.5, 0.375, 0]
    assert code_accuracy(codes[:, :0], reference).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="one K"):
        code_accuracy(codes, reference[:2])
    with pytest.raises(ValueError, match="neither"):
        code_accuracy(codes[:, :0], reference[:, :0])


def tone(hz: float, seconds: float = 0.5, rate: int = 24000) -> torch.Tensor:
    noise = torch.randn(int(seconds * rate), generator=seeded(0))
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(noise.numel()) / rate) + 0.05 * noise


def test_mel_distance_is_in_decibels_and_grows_with_the_difference() -> None:
    wave = tone(440)
    assert mel_distance(wave, wave, 24000) == (0, 1)
    distance, _ = mel_distance(wave * 10**-0.3, wave, 24000)  # 6 dB in every bin, noise keeps all above the floor
    assert distance == pytest.approx(6, abs=1e-3)
    near, far = (mel_distance(tone(hz), wave, 24000).decibels for hz in (450, 3000))
    assert 0 < near < far


def test_mel_distance_aligns_by_the_shorter() -> None:
    wave = tone(440)
    assert mel_distance(wave[:6000], wave, 24000) == (0, 0.5)
    assert mel_distance(torch.cat((wave, wave)), wave, 24000) == (0, 2)
    assert mel_distance(wave[:10], wave[:10], 24000) == (0, 1)  # shorter than a window
    for bad in (wave[:0], wave[None]):
        with pytest.raises(ValueError, match="at least one"):
            mel_distance(bad, wave, 24000)


def test_speaker_similarity_is_the_cosine() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-2.0, -2.0]])
    assert speaker_similarity(a, b).tolist() == pytest.approx([1, 0, -1])
    assert speaker_similarity(a[0], b[0]).shape == ()
    with pytest.raises(ValueError, match="one shape"):
        speaker_similarity(a, b[:1])


# The text rule


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("Don't 'quote' the dogs' ‘bowl’ — it’s ok", "don't quote the dogs bowl it's ok"),
        ("well-known co­operation", "well known cooperation"),
        ("0 7 13 21 90 100 205", "zero seven thirteen twenty one ninety one hundred two hundred five"),
        ("1,234 and 999999", "one thousand two hundred thirty four and nine hundred ninety nine thousand nine hundred "
                             "ninety nine"),
        ("3.14, 50%, -2 and 3-4", "three point one four fifty percent minus two and three four"),
        ("1st 2nd 3rd 12th 20th 21st", "first second third twelfth twentieth twenty first"),
        ("007 1234567", "zero zero seven one two three four five six seven"),
        ("mp3 b2b", "mp three b two b"),
        ("Ｆｕｌｌ １２", "full twelve"),
        ("ni你好,世界", "ni 你 好 世 界"),
        ("カタカナ한국어", "カ タ カ ナ 한국어"),
        ("हिन्दी café", "हिन्दी café"),
        ("...", ""),
    ],
)  # fmt: skip
def test_normalised_by_hand(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


def test_figures_are_spelt_in_english_only() -> None:
    assert normalise("Es sind 21.", "de") == "es sind 21"
    assert normalise("21", "en-GB") == normalise("21", "EN") == "twenty one"
    with pytest.raises(ValueError, match="language tag"):
        normalise("21", "english")


@given(st.text(max_size=30), st.sampled_from(["en", "zh"]))
def test_normalising_is_idempotent_and_leaves_no_mark(text: str, language: str) -> None:
    once = normalise(text, language)
    assert normalise(once, language) == once
    assert once == once.strip() and "  " not in once and not set(once) & set('.,!?"()-—。，')


@given(st.integers(0, LARGEST))
def test_numbers_are_spelt_so_that_they_can_be_read_back(number: int) -> None:
    small = {spell_number(n): n for n in range(100)}
    total = group = 0
    words = spell_number(number).split()
    while words:
        if words[0] == "thousand":
            total, group = group * 1000, 0
        elif words[0] == "hundred":
            group *= 100
        else:
            group += small[words[0]]
        words = words[1:]
    assert total + group == number


def test_numbers_out_of_range_are_refused() -> None:
    for number in (-1, LARGEST + 1):
        with pytest.raises(ValueError, match="between 0 and 999999"):
            spell_number(number)
    assert normalise("9" * 5000).split() == ["nine"] * 5000
