"""The loss of an evaluation: that of the run's own objective, on rows that are held out.

Shapes are the objective's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from omni.training.data.batches import Batches, Made, collate, pack
from omni.training.data.conversation_samples import SkipRow
from omni.training.data.manifest import Manifest
from omni.training.data.row_forms import NotUnderstood
from omni.training.data.samples import TrainingBatch

Hook = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class ObjectiveLosses:
    """Means of an objective's losses over the rows of a manifest, at most `limit` (0: all), and "loss", their weighted
    sum. Rows are made into samples and batches as `batches` makes those that are learnt from."""

    objective: Any
    batches: Batches
    manifest: Manifest
    limit: int = 0
    pad_token_id: int = 0

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        """Raises ValueError where no row can be used."""
        sums: dict[str, tuple[float, float]] = {}
        prepare = getattr(self.objective, "prepare", lambda module, batch: batch)
        for batch in self._read():
            for name, (total, count) in self.objective.losses(module, prepare(module, batch)).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + float(total), before[1] + float(count)
        if not sums:
            raise ValueError(f"no row of {self.manifest.path} can be used for an evaluation; look at its rows")
        means = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        return {"loss": sum(weight * means[name] for name, weight in self.objective.weights.items()), **means}

    def _read(self) -> Iterator[TrainingBatch]:
        rows = range(min(len(self.manifest), self.limit or len(self.manifest)))
        for start in rows[:: self.batches.bucket_size]:
            bucket = rows[start : start + self.batches.bucket_size]
            samples = [sample for row in bucket if (sample := self._make(row)) is not None]
            for packed in pack(samples, self.batches.max_tokens, padded=self.batches.padded):
                yield collate(packed, self.pad_token_id)

    def _make(self, row: int) -> Made | None:
        try:
            return self.batches.make_sample(self.manifest[row])
        except SkipRow:
            return None
        except NotUnderstood:
            raise
        except (ValueError, TypeError, OSError) as error:
            warnings.warn(f"{self.manifest.name(row)} is skipped: {error}", stacklevel=4)
            return None


def merged(*hooks: Sequence[Hook]) -> Hook:
    """One hook with the numbers of all."""
    every = [hook for some in hooks for hook in some]
    return lambda module, step: {name: value for hook in every for name, value in hook(module, step).items()}
