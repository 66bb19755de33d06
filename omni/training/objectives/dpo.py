"""Direct preference optimisation of written and spoken answers (DPO, Rafailov et al., 2023): the objective of pairs.

    text_preference    over the tokens of the replies         (Thinker and encoders)
    speech_preference  over the codes of the spoken turns     (Talker)

What two answers share, earlier turns of their conversation included, cancels out.

Shapes: P pairs as 2 P rows (`omni.training.data.batches.collate`): every chosen answer, then every rejected one;
N tokens of all rows, F frames of all spoken turns, S turns, K codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni.model import OmniModel
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.ema import EMA, forget_copies
from omni.training.objectives.losses import Loss, linear_token_log_probs, token_log_probs
from omni.training.objectives.passes import TalkerPass, ThinkerPass, talker_pass, thinker_pass
from omni.training.objectives.preference_losses import dpo_loss, dpo_rewards, preference_accuracy, speech_log_prob
from omni.training.parallel.parallelise import full_weight
from omni.training.parallel.processes import process_count


class InitialWeights:
    """The trainable parameters as they are now, to compute with them again while training moves them.

    Frozen parameters are not copied: they are the same then. With LoRA this is the model without its updates. Make it
    when the model has its final shape (LoRA added, spread over processes) and before a run is resumed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = EMA(model.named_parameters(), decay=0.0)  # an average that is never updated

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has these weights; afterwards, bit for bit, those from before."""
        try:
            with self._kept.applied():
                forget_copies(model)
                yield
        finally:
            forget_copies(model)


@dataclass
class PreferenceBatch:
    """2 P rows and the reference's log-probabilities of their answers [2 P], of "text" and of "speech"."""

    batch: TrainingBatch
    reference: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.batch.tokens


@dataclass
class DPO:
    """Makes chosen answers likelier than rejected ones, measured against a fixed reference.

    text, speech: what of the answers is compared; each has its own loss. beta, label_smoothing as in `dpo_loss`;
    residual_weight: of the residual codebooks in a spoken answer's log-probability (`speech_log_prob`). detach: the
    Talker's loss does not reach the Thinker (None: unless both are trained at once). reference: a model or its folder;
    None is `model` as it is when the objective is made. given: weights of the losses, by default 1.

    Reported beside the losses: "reward_margin", the reward that DPO implies of the chosen answer over the rejected
    one's (text and speech together), and "preference_accuracy", the share of pairs where it is positive.
    """

    model: OmniModel
    text: bool = True
    speech: bool = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    residual_weight: float = 1.0
    detach: bool | None = None
    reference: OmniModel | str | Path | None = None
    given: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.model.require("thinker")
        if self.speech:
            self.model.require("talker")
        if not (self.text or self.speech):
            raise ValueError("DPO compares nothing; set text or speech in [objective]")
        if not self.residual_weight >= 0:
            raise ValueError(f"residual_weight {self.residual_weight} must not be below 0")
        none = torch.zeros(1)
        dpo_loss(none, none, none, none, self.beta, self.label_smoothing)  # its checks of both
        kinds = [kind for kind, wanted in (("text", self.text), ("speech", self.speech)) if wanted]
        self.weights = {f"{kind}_preference": 1.0 for kind in kinds}
        unknown = sorted(set(self.given) - set(self.weights))
        if unknown:
            raise ValueError(f"[loss] has {unknown}, but this objective's losses are {sorted(self.weights)}")
        self.weights |= self.given
        if isinstance(self.reference, (str, Path)):
            self.reference = OmniModel.from_pretrained(self.reference, device=self.model.device)
        if self.reference is self.model:
            raise ValueError("the reference must not change with the model; leave it out, or pass another model")
        self._before = InitialWeights(self.model) if self.reference is None else None
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()

    def counts(self, batch: PreferenceBatch) -> dict[str, float]:
        """Pairs."""
        return {name: len(batch.batch.labels) / 2 for name in self.weights}

    @torch.no_grad()
    def prepare(self, model: OmniModel, batch: TrainingBatch) -> PreferenceBatch:
        """Add the reference's log-probabilities. Raises ValueError for a row without the answer that is compared."""
        self._check(batch)
        if self._before is None:
            assert isinstance(self.reference, OmniModel)
            return PreferenceBatch(batch, self._log_probs(self.reference, batch))
        with self._before.applied(model):
            return PreferenceBatch(batch, self._log_probs(model, batch))

    def losses(self, model: Any, batch: PreferenceBatch) -> dict[str, Loss]:
        """The losses of P pairs, gradients attached, and what is reported."""
        losses: dict[str, Loss] = {}
        rewards = torch.zeros(2, len(batch.batch.labels) // 2, device=model.device)
        for kind, policy in self._log_probs(model, batch.batch).items():
            answers, reference = policy.unflatten(0, (2, -1)), batch.reference[kind].unflatten(0, (2, -1))
            losses[f"{kind}_preference"] = dpo_loss(
                answers[0], answers[1], reference[0], reference[1], self.beta, self.label_smoothing
            )
            rewards = rewards + dpo_rewards(answers, reference, self.beta)
        chosen, rejected = rewards
        losses["reward_margin"] = Loss((chosen - rejected).sum(), rewards.new_tensor(float(len(chosen))))
        losses["preference_accuracy"] = preference_accuracy(chosen, rejected)
        return losses

    def _log_probs(self, model: OmniModel, batch: TrainingBatch) -> dict[str, Tensor]:
        """Log-probability of each row's answer [2 P], of "text" and of "speech"."""
        detach = self.detach if self.detach is not None else not self.text
        found: dict[str, Tensor] = {}
        with nullcontext() if self.text or not detach else torch.no_grad():
            # other processes may wait for this one inside the Thinker's layers
            thought = thinker_pass(model, batch, needed=self.text or process_count() > 1)
        if self.text:
            found["text"] = text_log_probs(model, thought)
        if self.speech:
            spoken = talker_pass(model, batch, thought, detach=detach)
            rows = torch.tensor([row for row, _ in batch.speech], device=spoken.logits.device)
            turns = speech_log_probs(spoken, self.residual_weight)
            found["speech"] = turns.new_zeros(len(batch.labels)).index_add(0, rows, turns)
        return found

    def _check(self, batch: TrainingBatch) -> None:
        rows = len(batch.labels)
        if rows % 2 or not batch.paired:
            raise ValueError(f"a batch of {rows} rows is not one of pairs; give rows a chosen and a rejected answer")
        spoken = {row for row, _ in batch.speech}
        for row, (name, labels) in enumerate(zip(batch.names, batch.labels)):
            answer = "chosen" if row < rows // 2 else "rejected"
            if self.text and not bool((labels[1:] != IGNORED).any()):
                raise ValueError(f"the {answer} answer of {name} has no text to learn; leave the row out")
            if self.speech and row not in spoken:
                raise ValueError(f"the {answer} answer of {name} has no speech; add it, or set speech = false")


def text_log_probs(model: OmniModel, thought: ThinkerPass) -> Tensor:
    """Log-probability of the labelled tokens of each conversation: [rows], differentiable."""
    tokens = linear_token_log_probs(thought.final, full_weight(model.require("thinker").lm_head.weight), thought.labels)
    lengths = [stop - start for start, stop in zip(thought.starts, thought.starts[1:])]
    return torch.stack([own.sum() for own in tokens.split(lengths)])


def speech_log_probs(spoken: TalkerPass, residual_weight: float = 1.0) -> Tensor:
    """`speech_log_prob` of each spoken turn, its end included: [S], differentiable."""
    first = token_log_probs(spoken.logits, spoken.codes).split([frames + 1 for frames in spoken.turns])
    codes = spoken.residual_codes
    rest = token_log_probs(spoken.residual_logits.flatten(0, 1), codes.flatten()).view(codes.shape).split(spoken.turns)
    return torch.stack([speech_log_prob(c0, ck, residual_weight) for c0, ck in zip(first, rest)])
