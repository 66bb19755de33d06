"""Metrics of answers: error rates of words and characters, BLEU, accuracy, codes, spectra, voices.

Lists hold one entry an answer, references first. Rates are over the corpus: errors of all answers over the length of
all references. Shapes: K codebooks, F frames, n samples, M mel bins, D width of a speaker embedding.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omni.encoders.mel import LogMel, frame_signal
from omni.metrics.text_normaliser import characters, normalise, words

BLEU_ORDER = 4
MEL_BINS = 80
_SCALE = 1 << 31  # one error in the cost of an alignment; substitutions are counted below it


@dataclass(frozen=True)
class EditCounts:
    """Edits that turn references into hypotheses, and `length`, the items of the references. Adds up over answers."""

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors an item of the references; may exceed 1. Without any item: 0 without errors, else infinite."""
        if self.length:
            return self.errors / self.length
        return math.inf if self.errors else 0.0

    def __add__(self, other: EditCounts) -> EditCounts:
        return EditCounts(
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.length + other.length,
        )


def edit_counts(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> EditCounts:
    """The fewest edits from one sequence of items to another (Levenshtein, 1966).

    Where several ways have equally many errors, the one with fewest substitutions is counted, which keeps most of the
    reference. Memory grows with the hypothesis alone.
    """
    ids: dict[Hashable, int] = {}
    wanted = [ids.setdefault(item, len(ids)) for item in reference]
    given = np.array([ids.setdefault(item, len(ids)) for item in hypothesis], dtype=np.int64)
    insertions = np.arange(len(given) + 1, dtype=np.int64) * _SCALE
    cost = insertions.copy()  # of turning the reference so far into each start of the hypothesis
    for item in wanted:
        best = cost + _SCALE  # delete the item
        substituted = cost[:-1] + np.where(given == item, 0, _SCALE + 1)
        best[1:] = np.minimum(best[1:], substituted)
        cost = np.minimum.accumulate(best - insertions) + insertions  # then any run of insertions
    errors, substitutions = divmod(int(cost[-1]), _SCALE)
    surplus = len(given) - len(wanted)  # insertions - deletions
    inserted = (errors - substitutions + surplus) // 2
    return EditCounts(substitutions, inserted, inserted - surplus, len(wanted))


def word_edits(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> EditCounts:
    """Word edits of all answers. Texts are normalised for `language` first; None takes them as they are."""
    return _corpus_edits(references, hypotheses, language, words)


def character_edits(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> EditCounts:
    """Character edits of all answers, spaces left out; normalised as for words."""
    return _corpus_edits(references, hypotheses, language, characters)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> float:
    """WER of the corpus, 0 for perfect; a Han or kana character counts as a word.

    Raises ValueError for lists of unequal length.
    """
    return word_edits(references, hypotheses, language).rate


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> float:
    """CER of the corpus, 0 for perfect. Raises ValueError for lists of unequal length."""
    return character_edits(references, hypotheses, language).rate


def accuracy(references: Sequence[object], predictions: Sequence[object]) -> float:
    """The share of predictions that equal their reference. Raises ValueError for unequal or empty lists."""
    _check_lists(references, predictions)
    if not len(references):
        raise ValueError("there is nothing to compare; the lists are empty")
    return sum(bool(a == b) for a, b in zip(references, predictions)) / len(references)


def exact_match(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> float:
    """The share of answers equal to their reference, normalised for `language` (None: as they are)."""
    return accuracy([_prepare(t, language) for t in references], [_prepare(t, language) for t in hypotheses])


# The parts of the 13a rule (NIST's mteval-v13a, WMT's standard): entities, then what is set apart from words.
_ENTITIES = (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))
_SET_APART = re.compile(r"""([!-&(-+:-@/\[-`{-~])""")  # ASCII punctuation but for ' , - .
_STOP_AFTER_OTHER = re.compile(r"([^0-9])([.,])")
_STOP_BEFORE_OTHER = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")


def tokenise_13a(text: str) -> list[str]:
    """Words and punctuation as WMT's BLEU counts them: "1,000 items." -> ["1,000", "items", "."]. Case stays."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _SET_APART.sub(r" \1 ", f" {text} ")
    text = _STOP_AFTER_OTHER.sub(r"\1 \2 ", text)
    text = _STOP_BEFORE_OTHER.sub(r" \1 \2", text)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text).split()


def bleu(
    references: Sequence[str | Sequence[str]],
    hypotheses: Sequence[str],
    tokenise: Callable[[str], list[str]] = tokenise_13a,
) -> float:
    """Corpus BLEU-4 with brevity penalty, 0 .. 100 (Papineni et al., 2002).

    references: one text, or several, an answer. An order without any match counts as 1 / 2^j of a match, j its number
    among such orders ("exp" smoothing, Post, 2018, "A Call for Clarity in Reporting BLEU Scores"); a corpus without
    any common word, or without 4 words in any answer, scores 0. `tokenise`: text -> tokens; `list` for single
    characters, as Chinese and Japanese need. Raises ValueError for unequal lists and an answer without a reference.
    """
    _check_lists(references, hypotheses)
    matches, totals = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    length = reference_length = 0
    for texts, hypothesis in zip(references, hypotheses):
        given = tokenise(hypothesis)
        wanted = [tokenise(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not wanted:
            raise ValueError(f"the answer {hypothesis!r} has no reference; give it at least one")
        length += len(given)
        reference_length += min((abs(len(r) - len(given)), len(r)) for r in wanted)[1]  # the closest, then the shorter
        for n in range(1, BLEU_ORDER + 1):
            allowed: Counter[tuple[str, ...]] = Counter()
            for reference in wanted:
                allowed |= _ngrams(reference, n)
            matches[n - 1] += (_ngrams(given, n) & allowed).total()
            totals[n - 1] += max(0, len(given) - n + 1)
    if not any(matches) or not all(totals):
        return 0.0
    log_precision, missing = 0.0, 0
    for matched, total in zip(matches, totals):
        missing += matched == 0
        log_precision += math.log((matched or 0.5**missing) / total)
    penalty = min(0.0, 1 - reference_length / length)
    return 100 * math.exp(log_precision / BLEU_ORDER + penalty)


def code_accuracy(codes: Tensor, reference: Tensor) -> Tensor:
    """The share of right codes of each codebook: int64 [K, F] and [K, F'] -> float32 [K].

    Frame i is compared with frame i; a missing or surplus frame is wrong in all codebooks. Raises ValueError for
    unequal numbers of codebooks and if neither side has a frame.
    """
    if codes.dim() != 2 or reference.dim() != 2 or len(codes) != len(reference):
        raise ValueError(
            f"codes {list(codes.shape)} and reference {list(reference.shape)} must both be [K, frames], with one K"
        )
    shorter, longer = sorted((codes.shape[1], reference.shape[1]))
    if not longer:
        raise ValueError("there is nothing to compare; neither side has a frame")
    return (codes[:, :shorter] == reference[:, :shorter]).sum(1).float() / longer


class MelDistance(NamedTuple):
    """decibels: mean absolute difference of log-mel spectra; length_ratio: samples over the reference's."""

    decibels: float
    length_ratio: float


def mel_distance(wave: Tensor, reference: Tensor, sample_rate: int) -> MelDistance:
    """How far a wave's spectrum lies from a reference's, both floating [n] at `sample_rate` Hz; 0 for equal ones.

    80 mel bins, windows of 40 ms every 10 ms, powers floored at -100 dB; no shift is looked for: both start together
    and the longer is cut to the shorter. Raises ValueError for waves that are empty or not one-dimensional.
    """
    for name, x in (("wave", wave), ("reference", reference)):
        if x.dim() != 1 or not x.numel():
            raise ValueError(f"the {name} has shape {list(x.shape)}; it must be [samples], at least one")
    n = min(wave.numel(), reference.numel())
    n_fft, hop = 4 * sample_rate // 100, sample_rate // 100
    mel = LogMel(sample_rate, n_fft, hop, MEL_BINS)
    padded = (F.pad(x[:n].float().cpu(), (0, max(0, n_fft - n))) for x in (wave, reference))
    a, b = (mel.log_mel(frame_signal(x, n_fft, hop)) for x in padded)  # log10 of powers [M, F]
    return MelDistance(10 * float((a - b).abs().mean()), wave.numel() / reference.numel())


def speaker_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two speaker embeddings [..., D] -> float32 [...] in -1 .. 1, by whichever encoder made both.

    Raises ValueError for unequal shapes.
    """
    if a.shape != b.shape or not a.dim():
        raise ValueError(f"embeddings {list(a.shape)} and {list(b.shape)} must have one shape [..., D]")
    return torch.cosine_similarity(a.float(), b.float(), dim=-1)


def _corpus_edits(
    references: Sequence[str], hypotheses: Sequence[str], language: str | None, split: Callable[[str], list[str]]
) -> EditCounts:
    _check_lists(references, hypotheses)
    pairs = zip(references, hypotheses)
    edits = (edit_counts(split(_prepare(r, language)), split(_prepare(h, language))) for r, h in pairs)
    return sum(edits, EditCounts())


def _prepare(text: str, language: str | None) -> str:
    return text if language is None else normalise(text, language)


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _check_lists(references: Sequence[object], hypotheses: Sequence[object]) -> None:
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("references and hypotheses must be lists of texts; put a single text into a list")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"there are {len(references)} references for {len(hypotheses)} hypotheses; each needs the other"
        )
