"""DPO through the model: pairs of answers, written and spoken, against the model as it began."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from build import seeded
from torch import Tensor

from omni import OmniModel
from omni.packaged.toy import toy_model
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import answer_spans, spoken_ids
from omni.training.data.samples import IGNORED, Pair, Sample, SpokenTurn, TrainingBatch
from omni.training.objectives.dpo import DPO, InitialWeights, speech_log_probs, text_log_probs
from omni.training.objectives.losses import Loss
from omni.training.objectives.passes import talker_pass, thinker_pass


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


def sample(model: OmniModel, question: str, answer: str, seed: int | None = None) -> Sample:
    """A question and its answer, spoken with random codes where there is a seed."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert model.processor is not None
    inputs = model.processor(messages, add_generation_prompt=False)
    ids = inputs.input_ids[0].tolist()
    ((start, stop),) = answer_spans(ids, model.config)
    labels = torch.full((len(ids),), IGNORED)
    labels[start:stop] = inputs.input_ids[0, start:stop]
    speech = []
    if seed is not None:
        generator = seeded(seed)
        codes = torch.randint(60, (model.talker.config.num_code_groups, 3 + seed), generator=generator)
        speech = [SpokenTurn(start - 3, spoken_ids(ids[start : stop - 1], model.processor), codes)]
    return Sample(inputs, labels, speech, question)


ANSWERS = {"Name a river.": ("The Elbe.", "No."), "2 + 2?": ("4", "It is five.")}


def pairs(model: OmniModel, spoken: bool = True) -> TrainingBatch:
    """Two questions; chosen and rejected answers are spoken with codes of the seeds 0, 1 and 2, 3."""
    seeds = iter(range(4)) if spoken else iter([None] * 4)
    return collate(
        [Pair(*(sample(model, question, text, next(seeds)) for text in both)) for question, both in ANSWERS.items()]
    )


@pytest.fixture
def tiny() -> OmniModel:
    return toy_model(seed=0)


@pytest.mark.parametrize("kinds", [{"text": True}, {"text": False, "speech": True}, {"speech": True}])
def test_the_loss_begins_at_log_2(tiny: OmniModel, kinds: dict[str, bool]) -> None:
    objective = DPO(tiny, **kinds)
    batch = objective.prepare(tiny, pairs(tiny))
    losses = objective.losses(tiny, batch)
    for name in objective.weights:
        assert mean(losses[name]) == pytest.approx(math.log(2), abs=1e-6)
        assert float(losses[name].count) == objective.counts(batch)[name] == 2
    assert mean(losses["reward_margin"]) == 0 and mean(losses["preference_accuracy"]) == 0


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_steps_prefer_the_chosen_answers_and_touch_nothing_else(tiny: OmniModel, part: str) -> None:
    for name, p in tiny.named_parameters():
        p.requires_grad_(name.startswith(part + "."))
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    objective = DPO(tiny, text=part == "thinker", speech=part == "talker")
    given = pairs(tiny)
    first = objective.prepare(tiny, given)
    (loss,) = objective.weights
    optimizer = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad], 1e-3, weight_decay=0)
    margins = []
    for _ in range(5):
        losses = objective.losses(tiny, objective.prepare(tiny, given))
        margins.append(mean(losses["reward_margin"]))
        (losses[loss].total / losses[loss].count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sorted(margins) == margins and margins[-1] > 0.1
    assert mean(losses["preference_accuracy"]) == 1 and mean(losses[loss]) < math.log(2)
    for name, p in tiny.named_parameters():
        assert name.startswith(part + ".") or torch.equal(p, before[name]), name
    moved = {name: p.clone() for name, p in tiny.named_parameters()}
    last = objective.prepare(tiny, given)
    assert all(torch.equal(first.reference[kind], last.reference[kind]) for kind in first.reference)
    assert all(torch.equal(p, moved[name]) for name, p in tiny.named_parameters())  # put back after the reference


@torch.no_grad()
def test_log_probs_are_those_of_each_answer_alone(model: OmniModel) -> None:
    batch = pairs(model)
    thought = thinker_pass(model, batch)
    text, spoken = text_log_probs(model, thought), talker_pass(model, batch, thought)
    speech = speech_log_probs(spoken, 0.5)
    rows = [(question, both[i]) for i in range(2) for question, both in ANSWERS.items()]
    for row, ((question, answer), seed) in enumerate(zip(rows, (0, 2, 1, 3))):
        alone = collate([sample(model, question, answer, seed)])
        logits = model.forward(alone.inputs).logits[0].log_softmax(-1)
        labels = alone.labels[0]
        expected = sum(logits[i - 1, labels[i]] for i in range(len(labels)) if labels[i] != IGNORED)
        torch.testing.assert_close(text[row], torch.as_tensor(expected), atol=1e-4, rtol=1e-5)
        one = talker_pass(model, alone, thinker_pass(model, alone))
        log_p0, log_pk = one.logits.log_softmax(-1), one.residual_logits.log_softmax(-1)
        wanted: Any = log_p0.gather(-1, one.codes[:, None]).sum()
        wanted += 0.5 * log_pk.gather(-1, one.residual_codes[..., None]).sum()
        torch.testing.assert_close(speech[row], wanted, atol=1e-4, rtol=1e-5)


def text_of(model: OmniModel, batch: TrainingBatch) -> Tensor:
    return text_log_probs(model, thinker_pass(model, batch))


@torch.no_grad()
def test_initial_weights_come_back_under_autocast_too(tiny: OmniModel) -> None:
    """Neither use leaves casts of the other's weights behind."""
    batch, initial = pairs(tiny, spoken=False), InitialWeights(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        before = text_of(tiny, batch)
    for p in tiny.thinker.parameters():
        p.add_(0.05 * torch.randn_like(p))
    with torch.autocast("cpu", torch.bfloat16):
        now = text_of(tiny, batch)
        with initial.applied(tiny):
            reference = text_of(tiny, batch)
        after = text_of(tiny, batch)
    assert torch.equal(reference, before) and torch.equal(after, now) and not torch.equal(now, before)


def test_another_model_may_be_the_reference(tiny: OmniModel) -> None:
    other = toy_model(seed=1)
    batch = pairs(tiny, spoken=False)
    objective = DPO(tiny, reference=other)
    with torch.no_grad():
        assert torch.equal(objective.prepare(tiny, batch).reference["text"], text_of(other, batch))
    assert not any(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="must not change with the model"):
        DPO(tiny, reference=tiny)


def test_with_lora_the_reference_is_the_model_without_it(tiny: OmniModel) -> None:
    pytest.importorskip("peft")
    from omni.training.run.lora import add_lora

    plain, batch = copy.deepcopy(tiny), pairs(tiny, spoken=False)
    add_lora(tiny, "thinker.layers.*", rank=2)
    objective = DPO(tiny)
    with torch.no_grad():
        for p in tiny.parameters():
            if p.requires_grad:
                p.add_(0.1)
        torch.testing.assert_close(objective.prepare(tiny, batch).reference["text"], text_of(plain, batch))
        assert not torch.allclose(text_of(tiny, batch), text_of(plain, batch))


def test_what_cannot_be_compared_is_named(tiny: OmniModel) -> None:
    silent = pairs(tiny)
    silent.speech = [(row, turn) for row, turn in silent.speech if row != 3]
    with pytest.raises(ValueError, match=r"rejected answer of 2 \+ 2\? has no speech"):
        DPO(tiny, speech=True).prepare(tiny, silent)
    silent.labels[0][:] = IGNORED
    with pytest.raises(ValueError, match=r"chosen answer of Name a river\. has no text"):
        DPO(tiny).prepare(tiny, silent)
    with pytest.raises(ValueError, match="3 rows is not one of pairs"):
        DPO(tiny).prepare(tiny, collate([sample(tiny, "a", "b")] * 3))


def test_wrong_settings_are_refused(tiny: OmniModel) -> None:
    with pytest.raises(ValueError, match=r"\['txt'\]"):
        DPO(tiny, given={"txt": 1.0})
    with pytest.raises(ValueError, match="compares nothing"):
        DPO(tiny, text=False)
    with pytest.raises(ValueError, match="above 0"):
        DPO(tiny, beta=0)
    assert DPO(tiny, given={"text_preference": 0.5}).weights == {"text_preference": 0.5}


def test_answers_to_unlike_questions_are_no_pair(tiny: OmniModel) -> None:
    """An even number of plain rows is not half as many pairs."""
    batch = collate([sample(tiny, question, both[0]) for question, both in ANSWERS.items()])
    assert len(batch.labels) % 2 == 0
    with pytest.raises(ValueError, match="is not one of pairs"):
        DPO(tiny).prepare(tiny, batch)
