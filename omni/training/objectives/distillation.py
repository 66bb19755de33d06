"""Distillation from a teacher: on the text of a data set, then on what the student itself writes (R. Agarwal et al.,
2024, "GKD"; the Qwen3 technical report, section 4.5, calls both phases strong-to-weak distillation).

    kl       divergence of the student's next-token distributions from the teacher's
    text     cross-entropy of the data's replies, for a teacher's written answers   (off-policy, if weighted)
    balance  load balancing of the student's routers                                (if weighted)

No probabilities of a whole batch are ever held: of the teacher the states before its head are kept (or its top k), and
logits are made chunk by chunk where they are compared.

Shapes: n labelled tokens, D width, Dt teacher width, V vocabulary, k entries of the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from omni.config.model import OmniConfig
from omni.generation.sampling import SamplingConfig
from omni.model import OmniModel
from omni.processing.inputs import OmniInputs
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.losses import CHUNK, Loss, kl_to_teacher, widen
from omni.training.objectives.passes import thinker_pass
from omni.training.objectives.supervised import text_count, text_losses
from omni.training.parallel.parallelise import full_weight
from omni.training.parallel.processes import process_count


class TeacherStates(NamedTuple):
    """What makes a teacher's distributions: hidden [n, Dt] behind its final norm, weight [V, Dt] of its head."""

    hidden: Tensor
    weight: Tensor


class TopK(NamedTuple):
    """The likeliest k of each of a teacher's distributions: log-probabilities [n, k], ids int64 [n, k]."""

    values: Tensor
    ids: Tensor


Teacher = Union[TeacherStates, TopK]


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    chunk: int = CHUNK,
) -> Loss:
    """`kl_to_teacher` of `hidden @ weight.T`: hidden [n, D], weight [V, D], summed over the n tokens.

    teacher: of the same tokens; a `TopK` must have been taken at `temperature`. The logits of both are made for `chunk`
    tokens at a time, in the forward pass and once more in the backward pass. Errors as in `kl_to_teacher`; ValueError
    also for a chunk below 1 and another number of tokens.
    """
    if chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens is empty; it must be at least 1")
    own = teacher.hidden if isinstance(teacher, TeacherStates) else teacher.values
    if len(own) != len(hidden):
        raise ValueError(f"the teacher has {len(own)} tokens, the student {len(hidden)}; both must read the same")

    def divergence(states: Tensor, head: Tensor, part: Teacher) -> Tensor:
        if isinstance(part, TopK):
            given: Tensor | tuple[Tensor, Tensor] = (part.values, part.ids)
        else:
            with torch.no_grad():
                given = F.linear(part.hidden, part.weight)
        return kl_to_teacher(F.linear(states, head), given, temperature=temperature, direction=direction).total

    total: Tensor | float = 0.0
    for start in range(0, max(len(hidden), 1), chunk):  # an empty chunk keeps hidden and weight in the graph
        rows = slice(start, start + chunk)
        part: Teacher
        if isinstance(teacher, TopK):
            part = TopK(teacher.values[rows], teacher.ids[rows])
        else:
            part = TeacherStates(teacher.hidden[rows], teacher.weight)
        total = total + checkpoint(
            divergence, hidden[rows], weight, part, use_reentrant=False, preserve_rng_state=False
        )
    assert isinstance(total, Tensor)
    return Loss(total, total.new_tensor(float(len(hidden))).detach())


def top_k_of(states: TeacherStates, k: int, temperature: float = 1.0, chunk: int = CHUNK) -> TopK:
    """The likeliest k tokens of distributions softened by `temperature`, `chunk` of them at a time."""
    values, ids = [], []
    for part in states.hidden.split(chunk):
        log_p = (widen(F.linear(part, states.weight)) / temperature).log_softmax(-1)
        top = log_p.topk(k, dim=-1)
        values.append(top.values)
        ids.append(top.indices)
    return TopK(torch.cat(values), torch.cat(ids))


@dataclass
class DistillationBatch:
    """Conversations with labels where the student is compared, and the teacher's distributions there."""

    batch: TrainingBatch
    teacher: Teacher

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return self.batch.tokens


@dataclass
class Distillation:
    """Teaches a model another model's next-token distributions.

    teacher: a model or its folder, with the student's vocabulary. on_policy: the student answers each conversation's
    last labelled turn itself (text, `max_new_tokens` at most, drawn as `sampling`, fields of `SamplingConfig`, says),
    and is compared there; otherwise on all labels of the data. top_k: compare only the teacher's likeliest tokens and
    all the rest as one (0: the whole vocabulary). temperature and direction as in `kl_to_teacher`; direction None is
    "reverse" on-policy and "forward" off-policy. given: weights of the losses; `kl` is 1 and the others are left out
    unless they are named.
    """

    model: OmniModel
    teacher: OmniModel | str | Path
    on_policy: bool = False
    top_k: int = 0
    temperature: float = 1.0
    direction: str | None = None
    max_new_tokens: int = 64
    sampling: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.model.require("thinker")
        if self.teacher is self.model:
            raise ValueError("the teacher must not change with the student; pass another model or a folder")
        if not isinstance(self.teacher, OmniModel):
            self.teacher = OmniModel.from_pretrained(self.teacher, device=self.model.device, parts=("thinker",))
        self.teacher.require("thinker")
        self.teacher.requires_grad_(False).eval()
        sizes = [m.config.thinker.text_config.vocab_size for m in (self.model, self.teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the teacher's vocabulary has {sizes[1]} ids, the student's {sizes[0]}; they must agree")
        if not 0 <= self.top_k < sizes[0]:
            raise ValueError(f"top_k {self.top_k} must lie in 0 (all) .. {sizes[0] - 1}")
        self.direction = self.direction or ("reverse" if self.on_policy else "forward")
        one = torch.zeros(1, 2)
        kl_to_teacher(one, one, temperature=self.temperature, direction=self.direction)  # its checks of both
        self._sampling = check_sampling(self.sampling, self.max_new_tokens)
        text = self.model.config.thinker.text_config
        sparse = any(text.is_sparse(i) for i in range(text.num_hidden_layers))
        known = {"kl"} | ({"balance"} if sparse else set()) | (set() if self.on_policy else {"text"})
        unknown = sorted(set(self.given) - known)
        if unknown:
            raise ValueError(f"[loss] has {unknown}, but this objective's losses are {sorted(known)}")
        self.weights = {"kl": 1.0, **self.given}

    def counts(self, batch: DistillationBatch) -> dict[str, float]:
        """Items of each loss: labelled tokens, and all tokens for "balance"."""
        return {name: float(batch.tokens if name == "balance" else text_count(batch.batch)) for name in self.weights}

    @torch.no_grad()
    def prepare(self, model: OmniModel, batch: TrainingBatch) -> DistillationBatch:
        """Let the student answer (on-policy), and the teacher read the conversations."""
        assert isinstance(self.teacher, OmniModel)
        if self.on_policy:
            prompts, _ = split_answers(batch, model.config)
            with answering(model):
                out = model.generate(
                    prompts, self.max_new_tokens, text_sampling=self._sampling, return_audio=False
                )  # seeded from torch's generator, which a checkpoint keeps
            batch = batch_of_replies(prompts, out.replies, model.config, batch.names)
        thought = thinker_pass(self.teacher, batch)
        weight = self.teacher.require("thinker").lm_head.weight
        states = TeacherStates(thought.final[thought.labels != IGNORED], full_weight(weight))
        return DistillationBatch(batch, top_k_of(states, self.top_k, self.temperature) if self.top_k else states)

    def losses(self, model: Any, batch: DistillationBatch) -> dict[str, Loss]:
        """The losses of one batch, gradients attached."""
        thought = thinker_pass(model, batch.batch)
        own = text_losses(model, thought) if len(self.weights) > 1 else {}
        hidden, head = thought.final[thought.labels != IGNORED], full_weight(model.require("thinker").lm_head.weight)
        assert self.direction is not None
        own["kl"] = linear_kl(hidden, head, batch.teacher, temperature=self.temperature, direction=self.direction)
        return {name: own[name] for name in self.weights}


# What the student writes, as conversations


def split_answers(batch: TrainingBatch, config: OmniConfig) -> tuple[OmniInputs, list[list[int]]]:
    """The prompts before each conversation's last labelled turn, and the ids of those turns.

    Raises ValueError for a conversation without one, or with media after it.
    """
    media = _media_ids(config)
    prompts, answers = [], []
    for row, (labels, name) in enumerate(zip(batch.labels, batch.names)):
        ids, learnt = row_ids(batch.inputs, row), (labels != IGNORED).tolist()
        stop = max((i + 1 for i, is_learnt in enumerate(learnt) if is_learnt), default=0)
        begin = max((i + 1 for i, is_learnt in enumerate(learnt[:stop]) if not is_learnt), default=0)
        if begin == 0:
            raise ValueError(f"{name} has no prompt with a labelled answer behind it; leave the row out")
        if media.intersection(ids[stop:]):
            raise ValueError(f"{name} has media after its last answer; end the row with the answer")
        prompts.append(ids[:begin])
        answers.append(ids[begin:stop])
    return OmniInputs(**{**batch.inputs.to_dict(), **_left_padded(prompts)}), answers


def batch_of_replies(
    prompts: OmniInputs, replies: Sequence[Sequence[int]], config: OmniConfig, names: Sequence[str]
) -> TrainingBatch:
    """Prompts with replies as conversations whose labels are the replies.

    prompts: P rows, with their names; replies: S = n P of them, one to each prompt, then a second one to each, and so
    on. A reply that holds the id of a medium's placeholder ends there: as a label it is like any other, but a row with
    placeholders that belong to no medium cannot be read.
    """
    media, rows = _media_ids(config), [row_ids(prompts, row) for row in range(len(prompts))]
    copies = len(replies) // len(rows)
    assert copies * len(rows) == len(replies) > 0
    ids, labels = [], []
    for number, reply in enumerate(replies):
        prompt = rows[number % len(rows)]
        stop = next((i for i, token in enumerate(reply) if token in media), None)
        written = list(reply) if stop is None else list(reply[: stop + 1])
        labels.append(torch.tensor([IGNORED] * len(prompt) + written))
        ids.append([*prompt, *(written if stop is None else [*written[:-1], config.im_end_token_id])])
    fields = {name: _tiled(value, copies) for name, value in prompts.to_dict().items()}
    return TrainingBatch(OmniInputs(**{**fields, **_left_padded(ids)}), labels, [], list(names) * copies)


def row_ids(inputs: OmniInputs, row: int) -> list[int]:
    """The ids of one row without padding."""
    ids: list[int] = inputs.input_ids[row][inputs.attention_mask[row].bool()].tolist()
    return ids


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Inside the block the model answers: in eval mode, without dropout.

    Raises ValueError where its weights are spread over processes: they would wait for each other, and answers are not
    equally long.
    """
    if process_count() > 1:
        from omni.training.parallel.expert_parallel import ParallelExperts

        if any(isinstance(module, ParallelExperts) or hasattr(module, "unshard") for module in model.modules()):
            raise ValueError(
                "a model whose weights are spread over processes cannot answer while it is trained; set [parallel] "
                "shard = false and expert = 1"
            )
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_sampling(sampling: Mapping[str, Any], max_new_tokens: int) -> SamplingConfig:
    """How the model's own answers are drawn. Raises ValueError or TypeError."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves no answer; it must be at least 1")
    return SamplingConfig.of(sampling)


def _media_ids(config: OmniConfig) -> set[int]:
    c = config.thinker
    return {c.audio_token_id, c.image_token_id, c.video_token_id}


def _tiled(value: Any, copies: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(copies, *[1] * (value.dim() - 1))
    return value * copies if isinstance(value, list) else value


def _left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
