"""Group sequence policy optimisation (GSPO, Zheng et al., 2025): answers to one prompt are rewarded against each other.

    policy   the clipped sequence-level objective over all answers
    kl       distance of the answers' tokens from the model as it began   (if weighted)

A batch of conversations gives prompts (all before the last labelled turn) and reference answers (that turn). Each
prompt is read once and answered n times; a reward is any function of a `Sampled`.

Shapes: P prompts, n answers each, S = n P of them: the first to each prompt, then the second to each, and so on; N
labelled tokens, T tokens of the longest answer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Union

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omni.config.keywords import nearest
from omni.config.names import import_name
from omni.generation.sampling import SamplingConfig
from omni.metrics.scores import word_error_rate
from omni.metrics.text_normaliser import normalise
from omni.model import OmniModel
from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.training.data.conversation_samples import spoken_ids
from omni.training.data.samples import IGNORED, TrainingBatch
from omni.training.objectives.distillation import answering, batch_of_replies, check_sampling, row_ids, split_answers
from omni.training.objectives.dpo import InitialWeights
from omni.training.objectives.losses import Loss, linear_token_log_probs
from omni.training.objectives.passes import thinker_pass
from omni.training.objectives.preference_losses import (
    CLIP_HIGH,
    CLIP_LOW,
    clipped_samples,
    group_advantages,
    gspo_loss,
    sequence_ratio,
)
from omni.training.parallel.parallelise import full_weight

# Answers of a model


@dataclass
class Sampled:
    """One answer of the model, as a reward sees it.

    prompt: its ids; prompt_text: the same as text, media left out. ids: the reply's, the stop id included; text: the
    answer without reasoning; texts are empty where the model has no processor. reason as in `OmniOutput`; seed: with
    it `model.generate` gives the same answer. audio float32 [samples] at sample_rate, if sound was asked for.
    reference: the data's answer to the prompt, None where there is none.
    """

    prompt: list[int]
    prompt_text: str
    ids: list[int]
    text: str
    reasoning: str | None
    reason: str
    seed: int
    audio: Tensor | None = None
    sample_rate: int | None = None
    reference: str | None = None


@torch.no_grad()
def generate_group(
    model: OmniModel,
    inputs: OmniInputs,
    n: int,
    *,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    max_new_tokens: int = 256,
    return_audio: bool = False,
    max_frames: int = 4095,
) -> list[list[Sampled]]:
    """n answers to each of P prompts, which are encoded and read once: P lists of n.

    An answer is what `model.generate` gives for its prompt and its seed. sampling: of text (None: from the model's own
    distribution). seed: makes the seeds of all answers reproducible; None draws them from torch's global generator.
    Raises ValueError for impossible requests, and where weights are spread over processes that would wait for each
    other.
    """
    if n < 1:
        raise ValueError(f"a group of {n} answers is empty; ask for at least 1")
    processor, count = model.processor, len(inputs) * n
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    with answering(model):
        out = model.generate(
            inputs, max_new_tokens, SamplingConfig() if sampling is None else sampling, return_audio,
            max_frames=max_frames, seed=seeds, n=n,
        )  # fmt: skip
    answers = []
    for row in range(count):
        prompt_ids = row_ids(inputs, row // n)
        answers.append(
            Sampled(
                prompt=prompt_ids,
                prompt_text="" if processor is None else processor.decode(prompt_ids),
                ids=out.replies[row],
                text="" if out.text is None else out.text[row],
                reasoning=out.reasoning[row],
                reason=out.reason[row],
                seed=seeds[row],
                audio=None if out.audio is None else out.audio[row],
                sample_rate=None if out.audio is None else out.sample_rate,
            )
        )
    return [answers[first : first + n] for first in range(0, len(answers), n)]


def token_log_probs(model: OmniModel, batch: TrainingBatch) -> Tensor:
    """log p of each labelled token given all before it: [N], row after row, differentiable.

    What decoding the same ids step by step computes, from one packed pass. A label that nothing comes before is none.
    """
    thought = thinker_pass(model, batch)
    kept = thought.labels != IGNORED
    head = full_weight(model.require("thinker").lm_head.weight)
    return linear_token_log_probs(thought.final[kept], head, thought.labels[kept])


# Rewards

Reward = Callable[[Sampled], float]


def _reference(sample: Sampled) -> str:
    if sample.reference is None:
        raise ValueError("this reward compares with the data's answer; the model needs a processor to read it")
    return sample.reference


def exact_answer(language: str | None = "en") -> Reward:
    """1 for the reference answer, normalised for `language` (None: character by character), else 0."""

    def reward(sample: Sampled) -> float:
        return float(_normal(sample.text, language) == _normal(_reference(sample), language))

    return reward


def contains(language: str | None = "en") -> Reward:
    """1 where the reference, normalised, is a part of the answer, whole words, else 0."""

    def reward(sample: Sampled) -> float:
        return float(f" {_normal(_reference(sample), language)} " in f" {_normal(sample.text, language)} ")

    return reward


def answer_format(pattern: str) -> Reward:
    """1 where the whole answer, without blanks at its ends, matches a regular expression (`.` is any character)."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda sample: float(compiled.fullmatch(sample.text.strip()) is not None)


def length(limit: int, slack: int = 0) -> Reward:
    """0 up to `limit` reply ids, then falling evenly to -1 after `slack` more (Yu et al., 2025, "DAPO", eq. 13)."""
    return lambda sample: -min(1.0, max(0, len(sample.ids) - limit) / max(slack, 1))


def spoken_words(
    transcribe: Callable[[Tensor, int], str] | str, language: str | None = "en", against: str = "text"
) -> Reward:
    """1 less the word error rate, at least 0, of what a transcriber hears: transcribe(audio [samples], sample_rate).

    against: the answer's own "text", which asks for clear speech, or the "reference".
    """
    if against not in ("text", "reference"):
        raise ValueError(f"against {against!r} is neither 'text' nor 'reference'")
    listen = _callable(transcribe)

    def reward(sample: Sampled) -> float:
        if sample.audio is None or sample.sample_rate is None:
            raise ValueError("this reward listens to the answer; set audio = true in [objective]")
        wanted = sample.text if against == "text" else _reference(sample)
        heard = listen(sample.audio, sample.sample_rate) if sample.audio.numel() else ""
        return 1.0 - min(1.0, word_error_rate([wanted], [heard], language))

    return reward


def judge(score: Callable[[str, str, str | None], float] | str) -> Reward:
    """What a judge says, such as another model: score(prompt_text, text, reference)."""
    ask = _callable(score)
    return lambda sample: float(ask(sample.prompt_text, sample.text, sample.reference))


REWARDS: dict[str, Callable[..., Reward]] = {
    "exact_answer": exact_answer,
    "contains": contains,
    "format": answer_format,
    "length": length,
    "spoken_words": spoken_words,
    "judge": judge,
}

RewardLike = Union[str, Mapping[str, Any], Reward]


def make_reward(given: RewardLike) -> tuple[float, Reward]:
    """(weight, reward) of a function, a name of `REWARDS`, "module:function", or a table {name, weight, its options}.

    Raises ValueError for an unknown name and for options that the reward does not have.
    """
    if callable(given):
        return 1.0, given
    options = {"name": given} if isinstance(given, str) else dict(given)
    name, weight = str(options.pop("name", "")), float(options.pop("weight", 1.0))
    if ":" in name:
        return weight, partial(_callable(name), **options)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; {nearest(name, REWARDS)}, or 'module:function'")
    signature = inspect.signature(REWARDS[name])
    for option in options:
        if option not in signature.parameters:
            raise ValueError(f"reward {name!r} has no option {option!r}; {nearest(option, signature.parameters)}")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    return weight, REWARDS[name](**options)


def _callable(value: Any) -> Callable[..., Any]:
    """A function, given as such or as "module:function"."""
    if callable(value):
        return value
    found = import_name(str(value))
    if not callable(found):
        raise ValueError(f"{value!r} is not a function")
    result: Callable[..., Any] = found
    return result


def _normal(text: str, language: str | None) -> str:
    return text if language is None else normalise(text, language)


# The objective


@dataclass
class Rollout:
    """S answers as a batch; lengths: labelled tokens of each; log-probabilities [N] under the model that wrote them
    (None: the model is still the same) and under the reference; rewards and advantages [S]."""

    batch: TrainingBatch
    lengths: list[int]
    old: Tensor | None
    reference: Tensor | None
    rewards: Tensor
    advantages: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of all answers with their prompts."""
        return self.batch.tokens


@dataclass
class GSPO:
    """Makes answers likelier that are rewarded above others to the same prompt.

    rewards: what `make_reward` takes; their weighted sum counts. group_size: n; clip_low, clip_high as in `gspo_loss`;
    max_new_tokens and sampling (fields of `SamplingConfig`) of the answers; audio: they are spoken as well, for rewards
    that listen. kl_weight: of "kl" (Schulman's estimator of the divergence from the model as it was when the objective
    was made); 0 leaves it out. given: weights by name of the losses.

    A batch of P prompts becomes one of n P answers with their prompts, which must fit into memory together. The trainer
    uses it for one step: the ratio is then exactly 1, and nothing is clipped. reusable: a loop of one's own may use a
    rollout for several steps; the log-probabilities that the ratio starts from are computed with it.

    Reported beside the losses: "reward", "reply_tokens" and "clipped", the share of answers that the clip range takes
    out.
    """

    model: OmniModel
    rewards: Sequence[RewardLike] | RewardLike
    group_size: int = 8
    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    kl_weight: float = 0.0
    max_new_tokens: int = 256
    sampling: Mapping[str, Any] = field(default_factory=dict)
    audio: bool = False
    reusable: bool = False
    given: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.model.require("thinker")
        if self.audio:
            self.model.require("code2wav")
        if self.group_size < 2:
            raise ValueError(f"group_size {self.group_size} leaves nothing to compare; it must be at least 2")
        if self.clip_low < 0 or self.clip_high < 0 or self.kl_weight < 0:
            raise ValueError("clip_low, clip_high and kl_weight must not be below 0")
        one = callable(self.rewards) or isinstance(self.rewards, (str, Mapping))
        rewards: Any = [self.rewards] if one else self.rewards
        self._rewards = [make_reward(reward) for reward in rewards]
        if not self._rewards:
            raise ValueError(f"there is no reward; name some of {', '.join(REWARDS)}, or 'module:function'")
        self._sampling = check_sampling(self.sampling, self.max_new_tokens)
        self.weights = {"policy": 1.0, "kl": self.kl_weight}
        unknown = sorted(set(self.given) - set(self.weights))
        if unknown:
            raise ValueError(f"[loss] has {unknown}, but this objective's losses are {sorted(self.weights)}")
        self.weights |= self.given
        if not self.weights["kl"]:
            del self.weights["kl"]
        self._before = InitialWeights(self.model) if "kl" in self.weights else None

    def counts(self, batch: Rollout) -> dict[str, float]:
        """Answers for "policy", their tokens for "kl"."""
        every = {"policy": len(batch.lengths), "kl": sum(batch.lengths)}
        return {name: float(every[name]) for name in self.weights}

    @torch.no_grad()
    def prepare(self, model: OmniModel, batch: TrainingBatch) -> Rollout:
        """Answer every prompt n times, in eval mode, and reward the answers."""
        prompts, wanted = split_answers(batch, model.config)
        references = [_answer_text(ids, model) for ids in wanted]
        with answering(model):
            groups = generate_group(
                model, prompts, self.group_size, sampling=self._sampling, max_new_tokens=self.max_new_tokens,
                return_audio=self.audio,
            )  # fmt: skip
            replies = [group[i].ids for i in range(self.group_size) for group in groups]
            rolled = batch_of_replies(prompts, replies, model.config, batch.names)
            old = token_log_probs(model, rolled) if self.reusable else None
            reference = None
            if self._before is not None:
                with self._before.applied(model):
                    reference = token_log_probs(model, rolled)
        rewards = torch.tensor(
            [[self._reward(replace(s, reference=text)) for s in group] for group, text in zip(groups, references)]
        )  # [P, n]
        advantages = group_advantages(rewards)
        lengths = [int((labels[1:] != IGNORED).sum()) for labels in rolled.labels]
        by_answer = [values.T.flatten().to(model.device) for values in (rewards, advantages)]
        return Rollout(rolled, lengths, old, reference, *by_answer)

    def _reward(self, sample: Sampled) -> float:
        return sum(weight * float(reward(sample)) for weight, reward in self._rewards)

    def losses(self, model: Any, batch: Rollout) -> dict[str, Loss]:
        """The losses of S answers, gradients attached, and what is reported."""
        new = token_log_probs(model, batch.batch)
        old = new.detach() if batch.old is None else batch.old
        padded, old = (pad_sequence(list(x.split(batch.lengths)), batch_first=True) for x in (new, old))
        lengths = torch.tensor(batch.lengths, device=new.device)
        mask = torch.arange(padded.shape[1], device=new.device) < lengths[:, None]  # [S, T]
        losses = {"policy": gspo_loss(padded, old, mask, batch.advantages, self.clip_low, self.clip_high)}
        if batch.reference is not None:
            above = batch.reference - new
            losses["kl"] = Loss((above.exp() - above - 1).sum(), new.new_tensor(float(len(new))))
        answers = new.new_tensor(float(len(batch.lengths)))
        ratio = sequence_ratio(padded.detach(), old, mask)
        losses["clipped"] = clipped_samples(ratio, batch.advantages, self.clip_low, self.clip_high)
        losses["reward"] = Loss(batch.rewards.sum(), answers)
        losses["reply_tokens"] = Loss(lengths.sum().to(new.dtype), answers)
        return losses


def _answer_text(ids: list[int], model: OmniModel) -> str | None:
    """The answer of a labelled turn, reasoning and end left out; None without a processor."""
    processor: OmniProcessor | None = model.processor
    if processor is None:
        return None
    reply = ids[:-1] if ids[-1] == model.config.im_end_token_id else ids
    return str(processor.decode(spoken_ids(reply, processor)))
