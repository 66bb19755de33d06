"""Supervised training of Thinker and Talker: how a batch of conversations becomes losses.

    text        cross-entropy of the replies                         (Thinker and encoders)
    balance     load balancing of the Thinker's routers
    codebook_0  cross-entropy of codebook 0 and the end of speech    (Talker)
    residual    that of the residual codebooks, one teacher-forced pass of the head, where there are any
    talker_balance  load balancing of the Talker's routers, where it has any

Shapes: N tokens of all conversations, F frames of all spoken turns, K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni.model import OmniModel
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.losses import Loss, linear_cross_entropy, router_balance, speech_cross_entropy
from omni.training.objectives.passes import TalkerPass, ThinkerPass, residual_frame_count, talker_pass, thinker_pass
from omni.training.parallel.parallelise import full_weight

RESIDUAL_WEIGHT = 0.3  # of the mean residual cross-entropy, as in Qwen3-TTS's released training code


def text_losses(model: OmniModel, thought: ThinkerPass) -> dict[str, Loss]:
    """The Thinker's losses: "text" over the labelled tokens, and "balance" over all N where the Thinker has experts."""
    weight = full_weight(model.require("thinker").lm_head.weight)
    losses = {"text": linear_cross_entropy(thought.final, weight, thought.labels)}
    if thought.router_logits:
        text: Any = model.config.thinker.text_config
        losses["balance"] = router_balance(thought.router_logits, text.num_experts_per_tok)
    return losses


def speech_losses(model: OmniModel, spoken: TalkerPass, residual_weight: float = RESIDUAL_WEIGHT) -> dict[str, Loss]:
    """The Talker's losses: "codebook_0" over frames and ends, "residual" over R (K - 1) codes, "talker_balance" by the
    same frames and ends; "codebook_0_accuracy" and "residual_accuracy", shares of right choices, are for the log."""
    losses = speech_cross_entropy(
        spoken.logits, spoken.codes, spoken.residual_logits, spoken.residual_codes, residual_weight
    )
    heard = losses["codebook_0"].count
    if spoken.router_logits:
        assert model.config.talker_config is not None
        k = model.config.talker_config.text_config.num_experts_per_tok
        balance = router_balance(spoken.router_logits, k)
        losses["talker_balance"] = Loss(balance.total / balance.count * heard, heard)
    losses["codebook_0_accuracy"] = _right(spoken.logits, spoken.codes)
    losses["residual_accuracy"] = _right(spoken.residual_logits, spoken.residual_codes)
    return losses


def _right(logits: Tensor, wanted: Tensor) -> Loss:
    counted = wanted != IGNORED
    right = (logits.argmax(-1) == wanted) & counted
    return Loss(right.sum().float(), counted.sum().float())


def text_count(batch: TrainingBatch) -> int:
    """Tokens that "text" is summed over: those with a label that something comes before."""
    return sum(int((labels[1:] != IGNORED).sum()) for labels in batch.labels)


def frame_count(batch: TrainingBatch) -> int:
    """F, the frames of all spoken turns."""
    return sum(turn.codes.shape[1] for _, turn in batch.speech)


@dataclass
class Supervised:
    """The objective of supervised stages: `text` trains the Thinker's replies, `speech` the Talker's codes.

    detach: the Talker's losses do not reach the Thinker (None: unless both are trained at once). residual_share: of the
    frames on which the residual codebooks are trained (`talker_pass`), above 0 and at most 1. weights: of the losses
    above; the defaults are 1, and the config's `router_aux_loss_coef` for the routers. Where nothing of Thinker and
    encoders requires a gradient, they run without recording one; they do not run at all where neither a loss nor the
    Talker looks at them.
    """

    model: OmniModel
    text: bool = True
    speech: bool = False
    detach: bool | None = None
    residual_weight: float = RESIDUAL_WEIGHT
    residual_share: float = 1.0
    given: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        c = self.model.config
        if not 0 < self.residual_share <= 1:
            raise ValueError(f"residual_share {self.residual_share} must be above 0 and at most 1")
        self.weights = {}
        if self.text:
            self.model.require("thinker")
            self.weights["text"] = 1.0
            read: Any = c.thinker.text_config
            if any(read.is_sparse(i) for i in range(read.num_hidden_layers)):
                self.weights["balance"] = read.router_aux_loss_coef
        if self.speech:
            self.model.require("talker")
            assert c.talker_config is not None
            text = c.talker_config.text_config
            self.weights["codebook_0"] = 1.0
            if c.talker_config.num_code_groups > 1:
                self.weights["residual"] = 1.0
            if any(text.is_sparse(i) for i in range(text.num_hidden_layers)):
                self.weights["talker_balance"] = text.router_aux_loss_coef
        unknown = sorted(set(self.given) - set(self.weights))
        if unknown:
            raise ValueError(f"[loss] has {unknown}, but this objective's losses are {sorted(self.weights)}")
        self.weights |= self.given

    def counts(self, batch: TrainingBatch) -> dict[str, float]:
        """Items of each loss."""
        frames, ends = frame_count(batch), len(batch.speech)
        read = residual_frame_count(frames, self.residual_share) if frames else 0
        books = batch.speech[0][1].codes.shape[0] if batch.speech else 1
        every = {
            "text": text_count(batch),
            "balance": batch.tokens,
            "codebook_0": frames + ends,
            "residual": read * (books - 1),
            "talker_balance": frames + ends,
        }
        return {name: float(every[name]) for name in self.weights}

    def losses(self, model: Any, batch: TrainingBatch) -> dict[str, Loss]:
        """All losses of one batch, gradients attached."""
        recorded = self.text or (self.detach is False and _trains_perception(model))
        with nullcontext() if recorded else torch.no_grad():
            thought = thinker_pass(model, batch, needed=self.text or _shared())
        losses = text_losses(model, thought) if self.text else {}
        if self.speech:
            detach = self.detach if self.detach is not None else not self.text
            spoken = talker_pass(model, batch, thought, detach=detach, residual_share=self.residual_share)
            losses |= speech_losses(model, spoken, self.residual_weight)
        return losses


def _trains_perception(model: OmniModel) -> bool:
    parts = (model.audio_encoder, model.vision_encoder, model.thinker)
    return any(p.requires_grad for part in parts if part is not None for p in part.parameters())


def _shared() -> bool:
    """Whether other processes may wait for this one inside the Thinker's layers."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
