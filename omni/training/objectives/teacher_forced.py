"""How likely a model finds given answers: log-probabilities of their tokens and codes, each after all before it.

Shapes: K codebooks, F frames of one answer, V codec vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.model import OmniModel
from omni.training.data.batches import collate
from omni.training.data.samples import IGNORED, Sample, TrainingBatch
from omni.training.objectives.losses import linear_token_log_probs, token_log_probs
from omni.training.objectives.passes import ThinkerPass, talker_pass, thinker_pass
from omni.training.parallel.parallelise import full_weight


@dataclass
class SpokenTurnScores:
    """One spoken turn. log_probs: of each codebook's codes float64 [F], codebook 0 with the end of speech [F + 1];
    right bool [K, F]: whether the likeliest code that may be drawn is the turn's."""

    log_probs: list[Tensor]
    right: Tensor


@dataclass
class SampleScores:
    """One sample, on the CPU. text: log-probabilities float64 of its labels; speech: one entry a spoken turn."""

    text: Tensor
    speech: list[SpokenTurnScores]


@torch.no_grad()
def score_samples(model: OmniModel, samples: Sequence[Sample], *, text: bool = True) -> list[SampleScores]:
    """Read samples side by side. text=False leaves the text's log-probabilities empty, and the Thinker's layers out
    where the Talker does not look at them. Raises ValueError as the passes do."""
    batch = collate(samples)
    thought = thinker_pass(model, batch, needed=text)
    speech = _speech_scores(model, batch, thought) if batch.speech else []
    if text:
        weight = full_weight(model.require("thinker").lm_head.weight)
        final, labels = thought.final.to(weight.device), thought.labels.to(weight.device)  # with device_map elsewhere
        log_probs = linear_token_log_probs(final, weight, labels)
    scores = []
    for row, (start, stop) in enumerate(zip(thought.starts, thought.starts[1:])):
        own = torch.zeros(0, dtype=torch.float64)
        if text:
            own = log_probs[start:stop][labels[start:stop] != IGNORED].double().cpu()
        turns = [turn for (where, _), turn in zip(batch.speech, speech) if where == row]
        scores.append(SampleScores(own, turns))
    return scores


def _speech_scores(model: OmniModel, batch: TrainingBatch, thought: ThinkerPass) -> list[SpokenTurnScores]:
    """Scores of all spoken turns of a batch, in its order."""
    spoken = talker_pass(model, batch, thought)
    first = token_log_probs(spoken.logits, spoken.codes)
    rest = token_log_probs(spoken.residual_logits.flatten(0, 1), spoken.residual_codes.flatten())
    rest = rest.view(spoken.residual_codes.shape)  # [all frames, K - 1]
    drawn = spoken.logits.masked_fill(model.require("talker").suppressed(), -torch.inf).argmax(-1)
    with_end = [frames + 1 for frames in spoken.turns]
    parts = zip(
        first.split(with_end),
        rest.split(spoken.turns),
        (drawn == spoken.codes).split(with_end),
        (spoken.residual_logits.argmax(-1) == spoken.residual_codes).split(spoken.turns),
    )
    return [
        SpokenTurnScores(
            [log_probs.double().cpu() for log_probs in (own_first, *own_rest.T)],
            torch.cat((first_right[None, :-1], rest_right.T)).cpu(),
        )
        for own_first, own_rest, first_right, rest_right in parts
    ]
