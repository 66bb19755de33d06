"""Scores of a model on a manifest: its own greedy answers and their speech, and how it reads the reference answers.

The last assistant message of a row is the reference, everything before it the prompt. A metric gives sums and counts
for each row, so that rates are over all references together; batches change nothing in them.

Shapes: B rows of a batch, N tokens of all, K codebooks, F frames of one answer, n samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from omni.config.names import import_name
from omni.evaluation.row_metrics import METRICS, Evidence, Need, Record, check_language, combine, find_metrics
from omni.generation.arguments import speaker_id
from omni.generation.sampling import SamplingConfig
from omni.model import OmniModel
from omni.processing.messages import read_conversation
from omni.processing.processor import OmniProcessor
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import SampleMaker, SkipRow, check_codes, read_codes
from omni.training.data.failures import RunError, reason
from omni.training.data.manifest import Manifest, Row, Voice
from omni.training.data.samples import IGNORED, Sample
from omni.training.data.sound import read_speech
from omni.training.objectives.teacher_forced import score_samples
from omni.training.parallel.parallelise import gathered

Transcribe = Callable[[Tensor, int], str]  # samples float32 [n] on the CPU and their rate in Hz -> what is said
GREEDY = SamplingConfig(temperature=0)
_WINDOW = 8  # batches whose rows are read at a time, to be sorted by length
_NAMED = 5  # bad rows that an error lists


class Rows(Protocol):
    """A manifest, or a list of rows; reading one that is bad raises ValueError, TypeError or OSError."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class EvalOptions:
    """How answers are made and scored.

    batch_size: rows side by side. max_new_tokens, max_frames: where an answer is cut. limit: only the first rows, 0:
    all. speaker: whose voice speaks (None: the row's, else the checkpoint's default). language: a tag such as "en" or
    "zh", by whose rules texts are compared (None: as they are). seed: of the codes; text is greedy, speech is drawn the
    release's way. skip_limit: rows that cannot be used before it is an error. progress: True shows a bar at once,
    None after two seconds, False none.
    """

    batch_size: int = 8
    max_new_tokens: int = 256
    max_frames: int = 1500  # two minutes in the release
    limit: int = 0
    speaker: str | None = None
    language: str | None = "en"
    seed: int = 0
    skip_limit: int = 100
    progress: bool | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "max_new_tokens": 1, "max_frames": 1, "limit": 0, "skip_limit": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        check_language(self.language)


@dataclass
class EvalResult:
    """numbers by name over all rows, and by category where rows have one; records in the manifest's order; counted:
    rows behind each number; skipped: name and reason of the rows that could not be used; missing: metrics that found in
    no row what they compare."""

    numbers: dict[str, float]
    categories: dict[str, dict[str, float]]
    records: list[Record]
    counted: dict[str, int]
    skipped: dict[str, str]
    missing: tuple[str, ...]


def evaluate_rows(
    model: OmniModel,
    rows: Rows,
    metrics: Sequence[str],
    options: EvalOptions | None = None,
    *,
    transcribe: Transcribe | None = None,
    codes: Callable[[Any], Tensor] | None = None,
    processor: OmniProcessor | None = None,
) -> EvalResult:
    """Score `model` on `rows` by metrics of `METRICS`. The same call gives the same numbers.

    transcribe: hears speech for the metrics of transcripts. codes: encodes recorded answers to codes int64 [K, F]; not
    needed where rows hold codes. processor: in place of the model's own. Rows that cannot be used are named by a
    warning and kept in `skipped`. The model is in eval mode while this runs and as before afterwards. Raises ValueError
    for an unknown metric, one that lacks what it needs, no usable row, or more unusable ones than `skip_limit`.
    """
    options = options or EvalOptions()
    processor = processor or model.processor
    evaluation = _Evaluation(model, rows, metrics, options, transcribe, codes, processor)
    whole = gathered(model) if Need.ANSWER in evaluation.needs else nullcontext()
    with _answering(model, evaluation.processor), whole:
        evaluation.run()
    return evaluation.result()


def evaluation_hook(
    processor: OmniProcessor,
    manifest: Manifest | str,
    metrics: Sequence[str],
    limit: int = 0,
    codes: Callable[[Any], Tensor] | None = None,
    *,
    transcribe: Transcribe | None = None,
    options: EvalOptions | None = None,
) -> Callable[[nn.Module, int], dict[str, float]]:
    """What `Trainer(evaluate=)` takes: scores of the model as it is, "wer/news" those of the category "news".

    Raises as `evaluate_rows` does, at once where metrics lack what they need. With several processes each computes all
    of it, since all hold a part of the model.
    """
    options = options or EvalOptions()
    chosen = replace(options, limit=limit or options.limit, progress=False)
    rows = manifest if isinstance(manifest, Manifest) else Manifest(manifest)
    check_metrics(metrics, transcribe=transcribe, codes=codes)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        if not isinstance(model, OmniModel):
            raise TypeError(f"answers are evaluated with an OmniModel, got {type(model).__name__}")
        result = evaluate_rows(model, rows, metrics, chosen, transcribe=transcribe, codes=codes, processor=processor)
        numbers = dict(result.numbers)
        for category, own in result.categories.items():
            numbers |= {f"{name}/{category}": value for name, value in own.items()}
        return numbers

    return evaluate


def check_metrics(metrics: Sequence[str], *, transcribe: object, codes: object) -> set[Need]:
    """What the metrics need; ValueError for an unknown one, none at all, and for one that needs what is None."""
    needs = {need for metric in find_metrics(metrics).values() for need in metric.needs}
    if Need.TRANSCRIPT in needs and transcribe is None:
        raise ValueError(
            f"{_needing(metrics, Need.TRANSCRIPT)} needs a transcriber, a function (samples, rate) -> text"
        )
    if Need.CODEC in needs and codes is None:
        raise ValueError(f"{_needing(metrics, Need.CODEC)} needs the codec encoder, which turns recordings into codes")
    return needs


def required_parts(metrics: Sequence[str]) -> tuple[str, ...]:
    """Parts of the model that the metrics need, as `OmniModel.from_pretrained(parts=)` takes them."""
    needs = {need for metric in find_metrics(metrics).values() for need in metric.needs}
    parts = {"talker": {Need.CODES, Need.SPEECH}, "code2wav": {Need.SPEECH, Need.RECORDING}}
    return ("thinker", *(part for part, wanted in parts.items() if needs & wanted))


def load_transcriber(name: str) -> Transcribe:
    """The function that "module:function" names. Raises ValueError where there is none."""
    try:
        found = import_name(name)
    except ValueError as error:
        raise ValueError(f"transcriber {error}") from error
    if not callable(found):
        raise ValueError(f"transcriber {name!r} is not a function but {type(found).__name__}")
    return found


def _needing(metrics: Sequence[str], need: Need) -> str:
    return next(f"metric {name!r}" for name in metrics if need in METRICS[name].needs)


@contextmanager
def _answering(model: OmniModel, processor: OmniProcessor) -> Iterator[None]:
    """The model in eval mode with this processor, without gradients; as it was afterwards."""
    before, training = model.processor, [module for module in model.modules() if module.training]
    model.processor = processor
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.processor = before
        for module in training:
            module.training = True


@dataclass
class _Item:
    """One row on its way: prompt and whole conversation as tensors, where a metric needs them. length: sorts rows."""

    place: int
    evidence: Evidence
    prompt: Sample | None
    sample: Sample | None
    speaker: str | None
    length: int

    @property
    def record(self) -> Record:
        return self.evidence.record


class _Evaluation:
    """One run over rows; arguments as in `evaluate_rows`."""

    def __init__(
        self,
        model: OmniModel,
        rows: Rows,
        metrics: Sequence[str],
        options: EvalOptions,
        transcribe: Transcribe | None,
        codes: Callable[[Any], Tensor] | None,
        processor: OmniProcessor | None,
    ) -> None:
        self.metrics = find_metrics(metrics)
        self.needs = check_metrics(metrics, transcribe=transcribe, codes=codes)
        for part in required_parts(metrics):
            model.require(part)
        if processor is None:
            raise ValueError("the model has no processor, which reads and writes text; pass processor=")
        if options.speaker is not None and Need.SPEECH in self.needs:
            speaker_id(model, options.speaker)
        self.model, self.rows, self.options, self.processor = model, rows, options, processor
        self.transcribe, self.codes = transcribe, codes
        self.make_sample = SampleMaker(processor, model.config, codes, loss_on="last", speech=Need.CODES in self.needs)
        self.done: dict[int, Record] = {}
        self.skipped: dict[str, str] = {}
        self.found: set[str] = set()
        self.bad = 0

    def run(self) -> None:
        """Score all rows: a window of them is read, sorted by length and cut into batches."""
        options = self.options
        count = min(len(self.rows), options.limit or len(self.rows))
        window = _WINDOW * options.batch_size
        delay, off = 0 if options.progress else 2, options.progress is False
        with tqdm(total=count, desc="evaluation", unit="row", delay=delay, disable=off) as bar:
            for start in range(0, count, window):
                places = range(start, min(start + window, count))
                items = [item for place in places if (item := self._prepare(place)) is not None]
                bar.update(len(places) - len(items))
                items.sort(key=lambda item: item.length)
                for first in range(0, len(items), options.batch_size):
                    batch = items[first : first + options.batch_size]
                    self._score(batch)
                    bar.update(len(batch))

    def result(self) -> EvalResult:
        """What came out. Raises ValueError if no row could be used."""
        if not self.done:
            raise ValueError(f"none of {len(self.skipped)} rows can be used:{_listed(self.skipped)}")
        records = [self.done[place] for place in sorted(self.done)]
        names, language = list(self.metrics), self.options.language
        numbers, counted = combine(records, names, language)
        categories = {}
        for category in sorted({record.category for record in records if record.category is not None}):
            own = [record for record in records if record.category == category]
            categories[category] = combine(own, names, language)[0]
        missing = tuple(name for name in names if name not in self.found)
        return EvalResult(numbers, categories, records, counted, self.skipped, missing)

    # reading rows

    def _prepare(self, place: int) -> _Item | None:
        """Read a row and its media; None, and noted, if it cannot be used."""
        name = self.rows.name(place) if isinstance(self.rows, Manifest) else f"row {place}"
        try:
            row = self.rows[place]
            name = row.name or name
            category = self.rows.raw(place).get("category") if isinstance(self.rows, Manifest) else None
            return self._item(place, row, Record(name, None if category is None else str(category), ""))
        except SkipRow as skipped:
            self._skip(name, str(skipped), bad=False)
        except RunError:
            raise
        except Exception as error:  # whatever a decoder makes of a damaged file
            self._skip(name, reason(error))
        return None

    def _item(self, place: int, row: Row, record: Record) -> _Item:
        ends = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if not ends or ends[-1] == 0:
            raise ValueError("messages need an answer of the assistant, and something before it that it answers")
        asked, voice = row.messages[: ends[-1]], row.voices[-1] if row.voices else Voice()
        record.reference = _text(row.messages[ends[-1]])
        evidence = Evidence(record, self.options.language)
        prompt = sample = None
        if Need.ANSWER in self.needs:
            if not record.reference:
                raise ValueError("the last answer has no text to compare with")
            inputs = self.processor(asked, tools=row.tools, use_audio_in_video=row.use_audio_in_video)
            prompt = Sample(inputs, torch.full_like(inputs.input_ids[0], IGNORED), name=record.name)
        if self.needs & {Need.LABELS, Need.CODES}:
            made = self.make_sample(replace(row, messages=row.messages[: ends[-1] + 1], rejected=None))
            assert isinstance(made, Sample)  # there is no rejected answer
            sample = made
        if Need.RECORDING in self.needs:
            self._listen(voice, evidence, sample)
        length = sum(made.tokens + made.frames for made in (prompt, sample) if made is not None)
        speaker = self.options.speaker or voice.speaker
        return _Item(place, evidence, prompt, sample, speaker, length + len(record.reference))

    def _listen(self, voice: Voice, evidence: Evidence, sample: Sample | None) -> None:
        """How the reference sounds: as recorded, else as its codes are decoded."""
        codec, talker = self.model.require("code2wav"), self.model.config.talker_config
        assert talker is not None  # a model with Code2Wav has it
        evidence.sample_rate = int(codec.sample_rate)
        if voice.speech is not None:
            evidence.recording = read_speech(voice.speech, evidence.sample_rate)
            if Need.CODEC in self.needs:
                assert self.codes is not None
                known = sample.speech[-1].codes if sample is not None and sample.speech else self.codes(voice.speech)
                evidence.reconstruction = self._decode(check_codes(known, talker))
        elif voice.codes is not None:
            evidence.recording = self._decode(check_codes(read_codes(voice.codes), talker))

    def _decode(self, codes: Tensor) -> Tensor:
        """codes int64 [K, F] -> float32 samples [n] on the CPU."""
        wave: Tensor = self.model.require("code2wav")(codes.to(self.model.device)[None])
        return wave[0].float().cpu()

    def _skip(self, name: str, reason: str, *, bad: bool = True) -> None:
        """Note a row that is left out. Raises ValueError where too many are bad."""
        self.skipped[name] = reason
        self.bad += bad
        if self.bad > self.options.skip_limit:
            raise ValueError(
                f"{self.bad} rows are bad, more than skip_limit {self.options.skip_limit}:{_listed(self.skipped)}"
            )
        warnings.warn(f"{name} is skipped: {reason}", stacklevel=2)

    # running the model

    def _score(self, batch: list[_Item]) -> None:
        """Scores of a batch; where something is wrong with it, of each row alone."""
        try:
            if Need.ANSWER in self.needs:
                self._answer(batch)
            if self.needs & {Need.LABELS, Need.CODES}:
                self._force(batch)
        except (ValueError, TypeError) as error:
            if len(batch) == 1:
                self._skip(batch[0].record.name, str(error))
            else:
                for item in batch:
                    self._score([item])
            return
        for item in batch:
            if Need.TRANSCRIPT in self.needs:
                self._transcribe(item)
            for name, metric in self.metrics.items():
                scores = metric.score(item.evidence)
                item.record.scores |= scores
                if scores or metric.corpus is not None:
                    self.found.add(name)
            self.done[item.place] = item.record

    def _answer(self, batch: list[_Item]) -> None:
        """The model's own answers, text greedy and codes seeded."""
        options, speaks = self.options, Need.SPEECH in self.needs
        out = self.model.generate(
            collate([item.prompt for item in batch if item.prompt is not None]).inputs,
            max_new_tokens=options.max_new_tokens,
            max_frames=options.max_frames,
            text_sampling=GREEDY,
            return_audio=speaks,
            speaker=[item.speaker for item in batch],
            seed=options.seed,
        )
        assert out.text is not None
        for row, item in enumerate(batch):
            item.record.answer, item.record.reason = out.text[row].strip(), out.reason[row]
            if speaks:
                assert out.audio is not None and out.codes is not None and out.sample_rate is not None
                item.evidence.speech, item.evidence.sample_rate = out.audio[row], out.sample_rate
                item.record.frames = out.codes[row].shape[1]

    def _force(self, batch: list[_Item]) -> None:
        """How the model reads the reference answers."""
        samples = [item.sample for item in batch if item.sample is not None]
        text = Need.LABELS in self.needs
        for item, scores in zip(batch, score_samples(self.model, samples, text=text)):
            item.evidence.text_log_probs = scores.text if text else None
            if scores.speech:
                item.evidence.code_log_probs = scores.speech[-1].log_probs
                item.evidence.codes_right = scores.speech[-1].right

    def _transcribe(self, item: _Item) -> None:
        assert self.transcribe is not None and item.evidence.speech is not None
        speech = item.evidence.speech
        heard = self.transcribe(speech, item.evidence.sample_rate) if speech.numel() else ""
        if not isinstance(heard, str):
            raise TypeError(f"the transcriber must return a text, got {type(heard).__name__}")
        item.record.transcript = heard


def _text(message: Mapping[str, Any]) -> str:
    """What an answer says: its text without reasoning and media."""
    content = read_conversation([message]).messages[0]["content"]
    if not isinstance(content, str):
        content = "".join(item["text"] for item in content if item["type"] == "text")
    return content.rpartition("</think>")[2].strip()


def _listed(skipped: Mapping[str, str]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in list(skipped.items())[:_NAMED])
