"""Batches of samples within a token budget, in an order that a restart repeats, and their tensors side by side.

Shapes: B rows, T tokens; A clips of M mel bins and at most F frames; media stacked in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Union

import torch
from torch import Tensor

from omni.processing.audio_file import join_clips
from omni.processing.inputs import OmniInputs
from omni.training.data.conversation_samples import BEYOND, SkipRow
from omni.training.data.failures import RunError, reason
from omni.training.data.manifest import Row
from omni.training.data.mixture import Draw, Mixture, random_number
from omni.training.data.samples import Pair, Sample, SpokenTurn, TrainingBatch
from omni.training.data.tally import Tallied, Tally, describe_counts

Made = Union[Sample, Pair]
_FRUITLESS = 1000  # unusable rows, beyond all there are, after which the search for a good one ends
_ORDER = 2  # what a random number is for, beside the mixture's own


@dataclass
class _Outcome:
    """What became of one draw: a sample, or the reason why there is none (bad: something is wrong with the row)."""

    name: str
    sample: Made | None = None
    reason: str = ""
    kind: str = ""
    bad: bool = False


@dataclass
class _Bucket:
    """Rows that are read together. before, after: the mixture's state around its draws; tally: what was counted before
    it."""

    number: int
    before: dict[str, Any]
    after: dict[str, Any]
    work: Sequence[tuple[Draw, int] | Future[_Outcome]]
    tally: dict[str, Any] = field(default_factory=dict)
    batches: list[list[Made]] = field(default_factory=list)
    given: int = 0


class Batches(Tallied):
    """An endless iterator of batches, each a list of samples (or pairs) that fit into `max_tokens` together.

    `bucket_size` rows are read at a time and cut into batches, which come in a seeded order. Where batches are padded
    they are sorted by length first; packed rows stay as they were drawn, so that each batch is a sample of the mixture.
    What is counted is Thinker tokens and frames of speech, padding included. Rows that cannot be read are named by a
    warning, kept in `skipped` (name -> reason) and passed over; those too long for a batch, or that `make_sample`
    raises SkipRow for, are counted by reason in `tally`, and the first of each reason is named.

    Args:
        mixture: which rows, in which order; it belongs to this object from now on.
        make_sample: row -> sample; it has to give the same sample each time for a restart to repeat its batches.
        max_tokens: the most that a batch holds.
        bucket_size: rows read at a time, all in memory; padded batches of many are more alike in length.
        seed: of the order of batches within a bucket.
        skip_limit: how many different rows may be bad before a ValueError names the first.
        workers: threads that read ahead by one bucket (0: the calling one reads). They change nothing in what comes.
        padded: False counts batches without padding, for packed rows.
    """

    def __init__(
        self,
        mixture: Mixture,
        make_sample: Callable[[Row], Made],
        *,
        max_tokens: int,
        bucket_size: int = 64,
        seed: int = 0,
        skip_limit: int = 100,
        workers: int = 0,
        padded: bool = True,
    ) -> None:
        for name, value, least in (
            ("max_tokens", max_tokens, 1), ("bucket_size", bucket_size, 1), ("skip_limit", skip_limit, 0),
            ("workers", workers, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.mixture, self.make_sample = mixture, make_sample
        self.max_tokens, self.bucket_size, self.seed, self.padded = max_tokens, bucket_size, seed, padded
        self.tally = Tally(skip_limit)
        self._pool = ThreadPoolExecutor(workers, "read-ahead") if workers else None
        self._bucket: _Bucket | None = None
        self._ahead: _Bucket | None = None

    def __iter__(self) -> Iterator[list[Made]]:
        return self

    def __next__(self) -> list[Made]:
        fruitless = 0
        while self._bucket is None or self._bucket.given == len(self._bucket.batches):
            self._fill(self._next_bucket())
            assert self._bucket is not None
            fruitless += 0 if self._bucket.batches else self.bucket_size
            if fruitless > len(self.mixture) + _FRUITLESS:
                raise ValueError(f"none of the last {fruitless} rows can be used: {self._told()}")
        bucket = self._bucket
        batch, bucket.batches[bucket.given] = bucket.batches[bucket.given], []  # no longer held here
        bucket.given += 1
        return batch

    def _told(self) -> str:
        """What became of the rows, and the remedy."""
        counts = describe_counts(self.counts())
        name, reason = next(iter(self.skipped.items()), ("", ""))
        if name:
            return f"{counts}; the first bad one is {name}: {reason}"
        if set(self.tally.left_out) == {BEYOND}:
            return f"{counts}; shorten them, or take fewer or smaller frames of their media"
        return f"{counts}; raise max_tokens (now {self.max_tokens}) or check the rows"

    def _next_bucket(self) -> _Bucket:
        """The bucket that was read ahead, or a new one; with workers the one after it is begun."""
        number = 0 if self._bucket is None else self._bucket.number + 1
        bucket = self._ahead or self._begin(number)
        self._ahead = self._begin(number + 1) if self._pool is not None else None
        return bucket

    def _begin(self, number: int) -> _Bucket:
        before = self.mixture.state_dict()
        draws = [(next(self.mixture), self.mixture.draws) for _ in range(self.bucket_size)]
        work = draws if self._pool is None else [self._pool.submit(self._make, *draw) for draw in draws]
        return _Bucket(number, before, self.mixture.state_dict(), work)

    def _fill(self, bucket: _Bucket) -> None:
        """Finish a bucket's samples, account for those left out, and cut the rest into batches."""
        bucket.tally = self.tally.state_dict()
        outcomes = [self._make(*item) if isinstance(item, tuple) else item.result() for item in bucket.work]
        bucket.work = ()
        for outcome in outcomes:
            if outcome.bad:
                self.tally.pass_over(outcome.name, outcome.reason)
            elif outcome.sample is None:
                self.tally.leave_out(outcome.name, outcome.reason, outcome.kind)
        samples = [outcome.sample for outcome in outcomes if outcome.sample is not None]
        packs = pack(samples, self.max_tokens, padded=self.padded)
        order = sorted(range(len(packs)), key=lambda i: random_number(self.seed, _ORDER, bucket.number, i))
        bucket.batches = [packs[i] for i in order]
        self._bucket = bucket

    def _make(self, draw: Draw, number: int) -> _Outcome:
        try:
            sample = self.make_sample(replace(draw.read(), number=number))
        except SkipRow as skipped:
            return _Outcome(draw.name, reason=str(skipped), kind=skipped.kind)
        except RunError:
            raise
        except Exception as error:  # whatever a decoder makes of a damaged file costs the row, not the run
            return _Outcome(draw.name, reason=reason(error), bad=True)
        if size([sample], padded=self.padded) > self.max_tokens:
            beyond = f"more than {self.max_tokens} tokens and frames, the most of a batch"
            return _Outcome(draw.name, reason=beyond, kind=beyond)
        return _Outcome(draw.name, sample)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the batch that was given last; what was read ahead is read again."""
        bucket = self._bucket
        position: dict[str, Any] = {"mixture": self.mixture.state_dict(), "bucket": 0, "batch": 0}
        if bucket is not None and bucket.given < len(bucket.batches):
            position = {"mixture": bucket.before, "bucket": bucket.number, "batch": bucket.given}
        elif bucket is not None:
            position = {"mixture": bucket.after, "bucket": bucket.number + 1, "batch": 0}
        within = bucket is not None and position["batch"] > 0
        tally = bucket.tally if within and bucket is not None else self.tally.state_dict()
        return {
            **position,
            "bucket_size": self.bucket_size,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "padded": self.padded,
            **tally,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands: the batches that follow are those that would have followed.

        Raises ValueError where the batches are cut differently in this run.
        """
        for key in ("bucket_size", "max_tokens", "seed", "padded"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"the saved data position has {key} {state[key]}, this run {getattr(self, key)}; resume with the "
                    "same values, or start the data afresh"
                )
        self._drop_ahead()
        self.mixture.load_state_dict(state["mixture"])
        self.tally.load_state_dict(state)
        start = self.mixture.state_dict()
        self._bucket = _Bucket(state["bucket"] - 1, start, start, ())
        if state["batch"]:
            self._fill(self._next_bucket())
            self._bucket.given = state["batch"]

    def close(self) -> None:
        """End the reading ahead; the object is of no further use."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _drop_ahead(self) -> None:
        """Forget what was read ahead."""
        for item in self._ahead.work if self._ahead is not None else ():
            if isinstance(item, Future):
                item.cancel()
        self._ahead = None


def size(samples: Sequence[Made], *, padded: bool = True) -> int:
    """Thinker tokens and frames of samples in one batch; a pair is two rows."""
    rows = [sample for made in samples for sample in _rows(made)]
    if not padded:
        return sum(row.tokens + row.frames for row in rows)
    return len(rows) * (max(row.tokens for row in rows) + max(row.frames for row in rows))


def pack(samples: Sequence[Made], max_tokens: int, *, padded: bool = True) -> list[list[Made]]:
    """Samples cut, in their order or, padded, in that of their lengths, into batches of at most `max_tokens`.

    A remainder less than half as large as the batch before it is shared with that one: no row stands alone because it
    happened to be left over.
    """
    batches: list[list[Made]] = []
    for sample in sorted(samples, key=lambda made: made.tokens + made.frames) if padded else samples:
        if batches and size([*batches[-1], sample], padded=padded) <= max_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    if len(batches) > 1 and 2 * size(batches[-1], padded=padded) < size(batches[-2], padded=padded):
        both = [*batches[-2], *batches[-1]]
        cuts = ((both[:i], both[i:]) for i in range(1, len(both)))
        fair = min(cuts, key=lambda cut: max(size(part, padded=padded) for part in cut))
        batches[-2:] = map(list, fair)
    return batches


def _rows(made: Made) -> tuple[Sample, ...]:
    return (made.chosen, made.rejected) if isinstance(made, Pair) else (made,)


def collate(samples: Sequence[Made], pad_token_id: int = 0) -> TrainingBatch:
    """Samples side by side, as `OmniProcessor` makes a batch of their conversations: rows padded on the left.

    B pairs become 2 B rows: every chosen answer, then every rejected one. Raises ValueError for no samples, or samples
    and pairs together.
    """
    pairs = [made for made in samples if isinstance(made, Pair)]
    if not samples or 0 < len(pairs) < len(samples):
        raise ValueError(f"collate takes samples or pairs, got {len(pairs)} pairs among {len(samples)}")
    rows = [made for made in samples if isinstance(made, Sample)]
    rows = rows or [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    spoken: list[tuple[int, SpokenTurn]] = [(row, turn) for row, sample in enumerate(rows) for turn in sample.speech]
    inputs = _join_inputs([sample.inputs for sample in rows], pad_token_id)
    labels, names = [sample.labels for sample in rows], [sample.name for sample in rows]
    return TrainingBatch(inputs, labels, spoken, names, bool(pairs))


class Collated:
    """Lists of samples as training batches; saving and resuming are the list's."""

    def __init__(self, batches: Batches, pad_token_id: int) -> None:
        self.batches = batches
        self.pad_token_id = pad_token_id

    def __iter__(self) -> Iterator[TrainingBatch]:
        return (collate(samples, self.pad_token_id) for samples in self.batches)

    def counts(self) -> dict[str, Any]:
        return self.batches.counts()

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


def _join_inputs(rows: Sequence[OmniInputs], pad_token_id: int) -> OmniInputs:
    """Batches of one, made one batch."""
    width = max(row.input_ids.shape[1] for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = width - row.input_ids.shape[1]
        ids[number, start:] = row.input_ids[0]
        mask[number, start:] = row.attention_mask[0]
    fields: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if any(row.reply_start is not None for row in rows):
        ends = [row.input_ids.shape[1] for row in rows]  # where the prompt holds no beginning of the reply
        begins = [end if row.reply_start is None else int(row.reply_start[0]) for row, end in zip(rows, ends)]
        fields["reply_start"] = torch.tensor([width - end + begin for begin, end in zip(begins, ends)])
    clips = [clip for row in rows for clip in _clips(row)]
    if clips:
        fields["input_features"], fields["feature_attention_mask"] = join_clips(clips)
        heard = [row for row in rows if row.input_features is not None]
        for name in ("audio_chunk_s", "audio_window_s"):
            values = [getattr(row, name) for row in heard if getattr(row, name) is not None]
            if 0 < len(values) < len(heard):
                raise ValueError(f"{len(values)} of {len(heard)} samples with sound say {name}; let all of them say it")
            fields[name] = torch.cat(values) if values else None
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            fields[name] = torch.cat(values)
    films = [row for row in rows if row.video_grid_thw is not None]
    if films:
        fields["video_grid_times"] = [times for row in films for times in _times(row)]
        seconds = [row.video_second_per_grid for row in films if row.video_second_per_grid is not None]
        if len(seconds) == len(films):
            fields["video_second_per_grid"] = torch.cat(seconds)
    return OmniInputs(**fields)


def _clips(row: OmniInputs) -> list[Tensor]:
    """The mel features [M, F_i] of each clip without padding."""
    if row.input_features is None or row.feature_attention_mask is None:
        return []
    return [clip[:, : int(mask.sum())] for clip, mask in zip(row.input_features, row.feature_attention_mask)]


def _times(row: OmniInputs) -> list[Tensor]:
    assert row.video_grid_thw is not None
    return [torch.tensor(row.video_times(i), dtype=torch.float64) for i in range(len(row.video_grid_thw))]
