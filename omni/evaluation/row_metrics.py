"""The metrics of `omni eval`: what each one needs to know of a row, and how it scores it.

A metric gives each row sums and counts; a number over many rows is the sum of the sums over the sum of the counts. Add
an entry to `METRICS` for one of your own.

Shapes: K codebooks, F frames of one answer, n samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from omni.config.keywords import nearest
from omni.metrics import scores as formulas
from omni.metrics.scores import EditCounts
from omni.metrics.text_normaliser import characters, normalise


class Need(Enum):
    """What a metric may need to know of a row."""

    LABELS = "the reference answer's text, read teacher-forced"
    CODES = "the reference answer's codes, read teacher-forced"
    ANSWER = "the model's own answer"
    SPEECH = "how its own answer sounds"
    TRANSCRIPT = "what a transcriber hears in that"
    RECORDING = "how the reference answer sounds"
    CODEC = "the recording coded and decoded again"


_BY_CHARACTER = ("zh", "ja", "yue", "th")  # written without spaces: BLEU counts characters


class Score(NamedTuple):
    """A sum over `items`, both added up over rows."""

    total: float
    items: float

    @property
    def mean(self) -> float:
        """Without items: 0 for no sum, else infinite."""
        return self.total / self.items if self.items else math.inf if self.total else 0.0


@dataclass
class Record:
    """What is kept of one row. reason: why the model's own answer ended; frames: of its speech."""

    name: str
    category: str | None
    reference: str
    answer: str | None = None
    reason: str | None = None
    frames: int | None = None
    transcript: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass
class Evidence:
    """What is known of one row when it is scored; what no metric needs, or the row does not have, is None.

    language: by whose rules texts are compared; waves float32 [n] at `sample_rate` Hz on the CPU; reconstruction: the
    recording coded and decoded again; text_log_probs [tokens] of the reference and its end; code_log_probs: of each
    codebook [F], codebook 0 with the end of speech [F + 1]; codes_right bool [K, F].
    """

    record: Record
    language: str | None
    sample_rate: int = 0
    speech: Tensor | None = None
    recording: Tensor | None = None
    reconstruction: Tensor | None = None
    text_log_probs: Tensor | None = None
    code_log_probs: list[Tensor] | None = None
    codes_right: Tensor | None = None


def _no_scores(evidence: Evidence) -> dict[str, Score]:
    return {}


@dataclass(frozen=True)
class Metric:
    """needs: what it looks at. score: sums and counts of one row by the names of the numbers, empty where the
    row lacks what it takes. corpus: numbers that no sum of rows gives, from all records, and the language."""

    needs: tuple[Need, ...]
    score: Callable[[Evidence], dict[str, Score]] = _no_scores
    corpus: Callable[[Sequence[Record], str | None], dict[str, float]] | None = None


def check_language(language: str | None) -> None:
    """ValueError if it is no language tag; None is right."""
    if language is not None:
        normalise("", language)


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics by name; ValueError, with the nearest name, for an unknown one, and for none at all."""
    if isinstance(names, str) or not names:
        raise ValueError(f"metrics must be a list with some of {', '.join(METRICS)}; got {names!r}")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; {nearest(str(name), METRICS)}")
    return {name: METRICS[name] for name in names}


def combine(
    records: Sequence[Record], names: Sequence[str], language: str | None
) -> tuple[dict[str, float], dict[str, int]]:
    """Numbers by name over records, and how many records stand behind each."""
    sums: dict[str, Score] = {}
    counted: dict[str, int] = {}
    for record in records:
        for name, score in record.scores.items():
            before = sums.get(name, Score(0.0, 0.0))
            sums[name] = Score(before.total + score.total, before.items + score.items)
            counted[name] = counted.get(name, 0) + 1
    numbers = {name: score.mean for name, score in sums.items()}
    for metric in find_metrics(names).values():
        for name, value in (metric.corpus(records, language) if metric.corpus and records else {}).items():
            numbers[name], counted[name] = value, len(records)
    return numbers, counted


# ---- text ----


def _loss(evidence: Evidence) -> dict[str, Score]:
    """Mean negative log-probability of the reference's tokens, its end included, in nats."""
    if evidence.text_log_probs is None:
        return {}
    return {"loss": Score(-float(evidence.text_log_probs.sum()), len(evidence.text_log_probs))}


def _perplexity(records: Sequence[Record], language: str | None) -> dict[str, float]:
    scores = [record.scores["loss"] for record in records if "loss" in record.scores]
    if not scores:
        return {}
    loss = sum(score.total for score in scores) / max(sum(score.items for score in scores), 1)
    return {"perplexity": math.exp(loss) if loss < 700 else math.inf}  # e^710 is past float64


Edits = Callable[[Sequence[str], Sequence[str], "str | None"], EditCounts]


def _error_rate(name: str, edits: Edits, *, spoken: bool = False) -> Callable[[Evidence], dict[str, Score]]:
    """Errors of the answer against the reference, or, `spoken`, of what is heard against the text that was to be said:
    the model's own answer."""

    def score(evidence: Evidence) -> dict[str, Score]:
        record = evidence.record
        wanted, given = (record.answer, record.transcript) if spoken else (record.reference, record.answer)
        counts = edits([wanted or ""], [given or ""], evidence.language)
        return {name: Score(counts.errors, counts.length)}

    return score


def _exact_match(evidence: Evidence) -> dict[str, Score]:
    texts = [evidence.record.reference], [evidence.record.answer or ""]
    return {"exact_match": Score(formulas.exact_match(*texts, evidence.language), 1)}


_LETTER = re.compile(r"\W*([A-Z])\W*")
_FIRST = re.compile(r"\W*([A-Z])(?:[^\w\s'\u2019]|\s*$)")  # "B", "(B) Paris", "**B**", not "A dog"
_NAMED = re.compile(r"(?i:answer)(?i:\s+is\b|\s*:)\W*([A-Z])\b(?!['\u2019])")  # "the answer is (B)"


def chosen_letter(answer: str) -> str | None:
    """The option that an answer chooses: a capital letter that it begins with and sets apart ("B", "(B) Paris"), or
    that follows "answer is" or "answer:" (the last time it is said); None where it chooses none."""
    first = _FIRST.match(answer)
    if first:
        return first[1]
    named = _NAMED.findall(answer)
    return named[-1] if named else None


def _accuracy(evidence: Evidence) -> dict[str, Score]:
    """Whether the right option is chosen where the reference is a letter, else whether the texts are equal."""
    letter, answer = _LETTER.fullmatch(evidence.record.reference), evidence.record.answer or ""
    if letter:
        return {"accuracy": Score(float(chosen_letter(answer) == letter[1]), 1)}
    return {"accuracy": _exact_match(evidence)["exact_match"]}


def _bleu(records: Sequence[Record], language: str | None) -> dict[str, float]:
    answered = [(record.reference, record.answer) for record in records if record.answer is not None]
    if not answered:
        return {}
    by_character = language is not None and re.split("[-_]", language)[0].lower() in _BY_CHARACTER
    references, answers = zip(*answered)
    return {"bleu": formulas.bleu(references, answers, characters if by_character else formulas.tokenise_13a)}


# ---- speech ----


def _codes(evidence: Evidence) -> dict[str, Score]:
    """Teacher-forced: shares of right codes over frames, and the mean loss of a code, the end of speech included."""
    right, log_probs = evidence.codes_right, evidence.code_log_probs
    if right is None or log_probs is None:
        return {}
    scores = {"code_accuracy": Score(int(right.sum()), right.numel())}
    for book, own in enumerate(right):
        scores[f"code_accuracy_{book}"] = Score(int(own.sum()), own.numel())
    scores["code_loss"] = Score(-float(sum(own.sum() for own in log_probs)), sum(own.numel() for own in log_probs))
    return scores


def _mel(evidence: Evidence) -> dict[str, Score]:
    """Decibels between the answer's speech and the reference's; an answer that is not heard counts as silence."""
    if evidence.speech is None or evidence.recording is None:
        return {}
    heard = evidence.speech if evidence.speech.numel() else torch.zeros_like(evidence.recording)
    return {"mel": Score(formulas.mel_distance(heard, evidence.recording, evidence.sample_rate).decibels, 1)}


def _length_ratio(evidence: Evidence) -> dict[str, Score]:
    if evidence.speech is None or evidence.recording is None:
        return {}
    return {"length_ratio": Score(evidence.speech.numel() / evidence.recording.numel(), 1)}


def _codec_mel(evidence: Evidence) -> dict[str, Score]:
    """Decibels between a recording and what the codec makes of it."""
    again, recording = evidence.reconstruction, evidence.recording
    if again is None or recording is None:
        return {}
    return {"codec_mel": Score(formulas.mel_distance(again, recording, evidence.sample_rate).decibels, 1)}


METRICS: dict[str, Metric] = {
    "loss": Metric((Need.LABELS,), _loss, _perplexity),
    "wer": Metric((Need.ANSWER,), _error_rate("wer", formulas.word_edits)),
    "cer": Metric((Need.ANSWER,), _error_rate("cer", formulas.character_edits)),
    "exact_match": Metric((Need.ANSWER,), _exact_match),
    "accuracy": Metric((Need.ANSWER,), _accuracy),
    "bleu": Metric((Need.ANSWER,), corpus=_bleu),
    "codes": Metric((Need.CODES,), _codes),
    "mel": Metric((Need.ANSWER, Need.SPEECH, Need.RECORDING), _mel),
    "length_ratio": Metric((Need.ANSWER, Need.SPEECH, Need.RECORDING), _length_ratio),
    "codec_mel": Metric((Need.RECORDING, Need.CODEC), _codec_mel),
    "spoken_wer": Metric(
        (Need.ANSWER, Need.SPEECH, Need.TRANSCRIPT), _error_rate("spoken_wer", formulas.word_edits, spoken=True)
    ),
    "spoken_cer": Metric(
        (Need.ANSWER, Need.SPEECH, Need.TRANSCRIPT), _error_rate("spoken_cer", formulas.character_edits, spoken=True)
    ),
}
