"""Distillation: the divergence in chunks, a teacher that is the student, and one that is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from build import widen
from torch import Tensor

from omni import OmniModel
from omni.packaged.toy import toy_model
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import answer_spans
from omni.training.data.samples import IGNORED, Sample, TrainingBatch
from omni.training.objectives import distillation
from omni.training.objectives.distillation import (
    Distillation,
    Teacher,
    TeacherStates,
    TopK,
    batch_of_replies,
    linear_kl,
    row_ids,
    split_answers,
    top_k_of,
)
from omni.training.objectives.losses import kl_to_teacher
from omni.training.objectives.passes import thinker_pass
from omni.training.objectives.supervised import Supervised

N, D, V, K = 7, 5, 11, 4


def conversation(model: OmniModel, *texts: str) -> Sample:
    """User and assistant in turn; every answer has labels."""
    assert model.processor is not None
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    inputs = model.processor(messages, add_generation_prompt=False)
    labels = torch.full_like(inputs.input_ids[0], IGNORED)
    for start, stop in answer_spans(inputs.input_ids[0].tolist(), model.config):
        labels[start:stop] = inputs.input_ids[0, start:stop]
    return Sample(inputs, labels, name=texts[0])


def batch_of(model: OmniModel) -> TrainingBatch:
    return collate(
        [conversation(model, "Name a river.", "The Elbe."), conversation(model, "One?", "Yes.", "And two?", "No way.")]
    )


@pytest.fixture
def tiny() -> OmniModel:
    return toy_model(seed=0)


# the divergence


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["states", "top-k"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_in_chunks_it_is_the_divergence_of_whole_logits(direction: str, kind: str, chunk: int) -> None:
    hidden, weight = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (N, V))
    states = TeacherStates(torch.randn(N, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64))
    logits = states.hidden @ states.weight.T
    teacher: Teacher = states
    whole: Any = logits
    if kind == "top-k":
        teacher = top_k_of(states, K, temperature=2.0, chunk=chunk)
        top = (logits / 2).log_softmax(-1).topk(K)
        assert torch.allclose(teacher.values, top.values) and torch.equal(teacher.ids, top.indices)
        whole = (top.values, top.indices)
    options: dict[str, Any] = {"temperature": 2.0, "direction": direction}
    loss = linear_kl(hidden, weight, teacher, chunk=chunk, **options)
    expected = kl_to_teacher(hidden @ weight.T, whole, **options)
    torch.testing.assert_close(loss.total, expected.total)
    assert float(loss.count) == float(expected.count) == N
    for own, wanted in zip(*(torch.autograd.grad(x.total, (hidden, weight)) for x in (loss, expected))):
        torch.testing.assert_close(own, wanted)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(logits: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(logits))
        return kl_to_teacher(logits, *args, **options)

    monkeypatch.setattr(distillation, "kl_to_teacher", watched)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    linear_kl(hidden, weight, TeacherStates(torch.randn(N, D), weight.detach()), chunk=3).total.backward()
    assert sizes == [3, 3, 1, 1, 3, 3]  # forward, then each once more in the backward pass


@pytest.mark.parametrize("k", [0, K])
def test_nothing_to_compare_still_reaches_the_weights(k: int) -> None:
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    states = TeacherStates(torch.zeros(0, D), weight.detach())
    loss = linear_kl(hidden, weight, top_k_of(states, k) if k else states)
    assert float(loss.total.detach()) == 0 == float(loss.count)
    (grad,) = torch.autograd.grad(loss.total, weight)
    assert not grad.any()


def test_impossible_divergences_are_refused() -> None:
    hidden, weight = torch.zeros(N, D), torch.zeros(V, D)
    with pytest.raises(ValueError, match="a chunk of 0 tokens"):
        linear_kl(hidden, weight, TeacherStates(hidden, weight), chunk=0)
    with pytest.raises(ValueError, match=f"teacher has 2 tokens, the student {N}"):
        linear_kl(hidden, weight, TopK(torch.zeros(2, K), torch.zeros(2, K, dtype=torch.int64)))


# the objective


@pytest.mark.parametrize("options", [{}, {"on_policy": True, "max_new_tokens": 4}, {"top_k": 5}])
def test_an_identical_teacher_teaches_nothing(tiny: OmniModel, options: dict[str, Any]) -> None:
    tiny = widen(tiny, 5).double()
    objective = Distillation(tiny, copy.deepcopy(tiny), **options)
    batch = objective.prepare(tiny, batch_of(tiny))
    loss = objective.losses(tiny, batch)["kl"]
    loss.total.backward()
    assert float(loss.count) == objective.counts(batch)["kl"] > 0
    assert abs(loss.total.item()) < 1e-12
    gradients = [p.grad for p in tiny.thinker.parameters() if p.grad is not None]
    assert gradients and max(float(grad.abs().max()) for grad in gradients) < 1e-10


@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"on_policy": True, "max_new_tokens": 4}])
def test_the_student_comes_closer_to_its_teacher(tiny: OmniModel, options: dict[str, Any]) -> None:
    teacher = widen(toy_model(seed=1), 5)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    objective, given = Distillation(tiny, teacher, **options), batch_of(tiny)
    optimizer = torch.optim.AdamW(tiny.thinker.parameters(), 3e-3, weight_decay=0)
    values = []
    for _ in range(15):
        loss = objective.losses(tiny, objective.prepare(tiny, given))["kl"]
        values.append(float(loss.total.detach() / loss.count))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(values[-3:]) < 0.7 * sum(values[:3]), values
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in teacher.named_parameters())


def test_on_policy_compares_what_the_student_writes(tiny: OmniModel) -> None:
    """Drawn from torch's generator: a run that is resumed draws the same again."""
    model, given = widen(tiny, 5), batch_of(tiny)
    objective = Distillation(model, toy_model(seed=1), on_policy=True, max_new_tokens=5)
    prompts, _ = split_answers(given, model.config)
    torch.manual_seed(3)
    out = model.generate(prompts, 5, text_sampling={"temperature": 1.0}, return_audio=False)
    model.train()
    for _ in range(2):
        torch.manual_seed(3)
        batch = objective.prepare(model, given).batch
        assert [labels[labels != IGNORED].tolist() for labels in batch.labels] == out.replies
        assert model.training
    for row, reply in enumerate(out.replies):
        assert row_ids(batch.inputs, row) == row_ids(prompts, row) + reply


def test_text_may_be_learnt_at_once(tiny: OmniModel) -> None:
    objective = Distillation(tiny, toy_model(seed=1), given={"text": 0.5, "balance": 0.1})
    given = batch_of(tiny)
    losses = objective.losses(tiny, objective.prepare(tiny, given))
    supervised = Supervised(tiny).losses(tiny, given)
    assert objective.weights == {"kl": 1.0, "text": 0.5, "balance": 0.1}
    for name in ("text", "balance"):
        assert torch.equal(losses[name].total, supervised[name].total)
        assert float(losses[name].count) == Supervised(tiny).counts(given)[name]


def test_wrong_settings_are_refused(tiny: OmniModel) -> None:
    teacher = toy_model(seed=1)
    with pytest.raises(ValueError, match="must not change with the student"):
        Distillation(tiny, tiny)
    with pytest.raises(ValueError, match=r"\['text'\]"):
        Distillation(tiny, teacher, on_policy=True, given={"text": 1.0})
    with pytest.raises(ValueError, match="'sideways'"):
        Distillation(tiny, teacher, direction="sideways")
    with pytest.raises(ValueError, match="top_k 640"):
        Distillation(tiny, teacher, top_k=640)
    with pytest.raises(ValueError, match="no field 'temprature'"):
        Distillation(tiny, teacher, sampling={"temprature": 1.0})


# prompts and replies


def test_the_last_answer_is_split_off(tiny: OmniModel) -> None:
    assert tiny.processor is not None
    given = batch_of(tiny)
    prompts, answers = split_answers(given, tiny.config)
    decoded = [tiny.processor.decode(answer) for answer in answers]
    assert decoded == ["The Elbe.", "No way."]
    for row, answer in enumerate(answers):
        whole = row_ids(given.inputs, row)
        assert row_ids(prompts, row) + answer == whole[: len(row_ids(prompts, row)) + len(answer)]
    given.labels[1][:] = IGNORED
    with pytest.raises(ValueError, match=r"One\? has no prompt with a labelled answer"):
        split_answers(given, tiny.config)


def test_a_reply_with_a_placeholder_ends_there(tiny: OmniModel) -> None:
    """The id is learnt as any other, and the row can be read."""
    prompts, _ = split_answers(batch_of(tiny), tiny.config)
    image = tiny.config.thinker_config.image_token_id
    batch = batch_of_replies(prompts, [[5, image, 6], [7, 8, 9]], tiny.config, ["a", "b"])
    assert [labels[labels != IGNORED].tolist() for labels in batch.labels] == [[5, image], [7, 8, 9]]
    thought = thinker_pass(tiny, batch)
    assert thought.labels[thought.labels != IGNORED].tolist() == [5, image, 7, 8, 9]
