"""GSPO: groups of answers from one reading of their prompt, their log-probabilities, rewards, and the objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import picture_item, sound_item
from torch import Tensor

from omni import OmniInputs, OmniModel, SamplingConfig
from omni.generation.prompt import encode_prompt
from omni.packaged.toy import toy_model
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import answer_spans
from omni.training.data.samples import IGNORED, Sample, TrainingBatch
from omni.training.objectives.distillation import batch_of_replies, split_answers
from omni.training.objectives.gspo import GSPO, REWARDS, Sampled, generate_group, make_reward, token_log_probs
from omni.training.objectives.losses import Loss
from omni.training.run.train_config import TrainConfig
from omni.training.run.trainer import Trainer

NEUTRAL = SamplingConfig()


PICTURE = picture_item()
QUESTIONS: list[list[Any]] = [["Name a river."], [PICTURE, "and", sound_item(0.7), "Well?"], [sound_item(0.4)]]


def conversations(model: OmniModel, questions: list[list[Any]], answer: str = "The Elbe.") -> TrainingBatch:
    assert model.processor is not None
    samples = []
    for number, question in enumerate(questions):
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in question]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        inputs = model.processor(messages, add_generation_prompt=False)
        labels = torch.full_like(inputs.input_ids[0], IGNORED)
        ((start, stop),) = answer_spans(inputs.input_ids[0].tolist(), model.config)
        labels[start:stop] = inputs.input_ids[0, start:stop]
        samples.append(Sample(inputs, labels, name=f"row {number}"))
    return collate(samples)


def prompts_of(model: OmniModel, questions: list[list[Any]]) -> OmniInputs:
    return split_answers(conversations(model, questions), model.config)[0]


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


# groups


def test_answers_share_one_reading_and_equal_single_ones(model: OmniModel) -> None:
    read: list[int] = []
    hook = model.thinker.register_forward_hook(lambda module, args, out: read.append(len(args[0])))
    settings: dict[str, Any] = {"max_new_tokens": 5, "return_audio": True, "max_frames": 4}
    groups = generate_group(model, prompts_of(model, QUESTIONS), 2, seed=1, **settings)
    hook.remove()
    assert read == [len(QUESTIONS)]  # every prompt once, in one pass
    assert [len(group) for group in groups] == [2] * len(QUESTIONS)
    for question, group in zip(QUESTIONS, groups):
        assert len({sample.seed for sample in group}) == 2 and len({tuple(sample.ids) for sample in group}) > 1
        for sample in group:
            out = model.generate(prompts_of(model, [question]), text_sampling=NEUTRAL, seed=sample.seed, **settings)
            assert out.audio is not None and out.text is not None and sample.audio is not None
            assert out.replies == [sample.ids] and out.text == [sample.text] and out.reason == [sample.reason]
            torch.testing.assert_close(sample.audio, out.audio[0], atol=1e-4, rtol=1e-4)
            assert sample.sample_rate == out.sample_rate
            assert sample.prompt_text.endswith("assistant\n")


def test_groups_are_seeded(model: OmniModel) -> None:
    prompts = prompts_of(model, QUESTIONS[:1])

    def ids(**options: Any) -> list[list[int]]:
        return [sample.ids for sample in generate_group(model, prompts, 4, max_new_tokens=4, **options)[0]]

    assert ids(seed=2) == ids(seed=2) != ids(seed=3)
    torch.manual_seed(5)
    first = ids()
    second = ids()
    torch.manual_seed(5)
    assert first == ids() != second
    assert len({tuple(x) for x in ids(sampling={"temperature": 0.0})}) == 1
    with pytest.raises(ValueError, match="a group of 0"):
        generate_group(model, prompts, 0)


# log-probabilities


def one_by_one(model: OmniModel, prompt: OmniInputs, reply: list[int]) -> Tensor:
    """log p of each id of a reply, from decoding steps."""
    read = encode_prompt(model, prompt)
    state = model.thinker.init_state(1)
    out = model.thinker(read.embeds, read.positions, state, taps=read.taps, logits="last")
    state.next_position.copy_(read.next_position)
    logits, found = out.logits[:, 0], []
    for token in reply:
        found.append(logits[0].log_softmax(-1)[token])
        logits = model.thinker.step(torch.tensor([token]), state)
    return torch.stack(found)


@torch.no_grad()
def test_log_probs_of_a_packed_batch_are_those_of_decoding(model: OmniModel) -> None:
    """Several answers to several prompts, with media, which are given once and belong to all answers."""
    replies = [[5, 6, 7], [8], [9, 10], [11, 12], [13, 14, 15, 16], [258]]
    batch = batch_of_replies(prompts_of(model, QUESTIONS), replies, model.config, ["a", "b", "c"])
    found = token_log_probs(model, batch).split([len(reply) for reply in replies])
    for row, (reply, own) in enumerate(zip(replies, found)):
        expected = one_by_one(model, prompts_of(model, [QUESTIONS[row % 3]]), reply)
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)


# the objective


def share_of(*tokens: int) -> Any:
    return lambda sample: sum(token in tokens for token in sample.ids) / len(sample.ids)


def test_at_ratio_1_the_gradient_is_the_weighted_mean_of_log_probs() -> None:
    """Against logits of the model's plain forward pass, in float64 (Zheng et al., 2025, eq. 10)."""
    model = toy_model(seed=0).double()
    low = range(320)
    objective = GSPO(model, share_of(*low), group_size=4, max_new_tokens=5)
    rollout = objective.prepare(model, conversations(model, [["Name a river."], [sound_item(0.4)]]))
    assert rollout.advantages.abs().sum() > 0 and objective.counts(rollout) == {"policy": 8.0}
    losses = objective.losses(model, rollout)
    names = [name for name, _ in model.thinker.named_parameters()]
    own = torch.autograd.grad(losses["policy"].total, list(model.thinker.parameters()), allow_unused=True)
    assert mean(losses["clipped"]) == 0 and mean(losses["reward"]) == pytest.approx(float(rollout.rewards.mean()))

    logits = model.forward(rollout.batch.inputs).logits.log_softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for row, labels in enumerate(rollout.batch.labels):
        n = int((labels != IGNORED).sum())
        taken = logits[row, -n - 1 : -1].gather(-1, labels[-n:, None])  # rows are padded on the left
        expected = expected - rollout.advantages[row] * taken.mean()
    wanted = torch.autograd.grad(expected, list(model.thinker.parameters()), allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in wanted)
    for name, a, b in zip(names, own, wanted):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_reward_is_learnt() -> None:
    model = toy_model(seed=0)
    objective = GSPO(model, share_of(*range(320)), group_size=16, max_new_tokens=2)
    given = conversations(model, [["Name a river."]])
    optimizer = torch.optim.AdamW(model.thinker.parameters(), 0.1, weight_decay=0)
    rewards = []
    for _ in range(15):
        losses = objective.losses(model, objective.prepare(model, given))
        rewards.append(mean(losses["reward"]))
        (losses["policy"].total / losses["policy"].count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(rewards[:3]) / 3 < 0.7 and sum(rewards[-3:]) / 3 > 0.9, rewards


def test_a_rollout_may_be_used_again_until_it_is_clipped() -> None:
    model = toy_model(seed=0)
    objective = GSPO(model, share_of(*range(320)), group_size=8, max_new_tokens=3, reusable=True)
    rollout = objective.prepare(model, conversations(model, QUESTIONS[:1]))
    optimizer = torch.optim.SGD(model.thinker.parameters(), 1.0)
    shares = []
    for _ in range(3):
        losses = objective.losses(model, rollout)
        shares.append(mean(losses["clipped"]))
        losses["policy"].total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shares[0] == 0 < shares[-1]


def test_equal_rewards_teach_nothing() -> None:
    model = toy_model(seed=0)
    objective = GSPO(model, lambda sample: 0.5, group_size=3, max_new_tokens=3)
    losses = objective.losses(model, objective.prepare(model, conversations(model, QUESTIONS[:1])))
    losses["policy"].total.backward()
    assert mean(losses["reward"]) == 0.5
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_kl_is_measured_from_the_model_as_it_began() -> None:
    model = toy_model(seed=0)
    shorter = {"name": "length", "limit": 2}
    objective = GSPO(model, shorter, group_size=2, max_new_tokens=3, kl_weight=0.1)
    given = conversations(model, QUESTIONS[:1])
    losses = objective.losses(model, objective.prepare(model, given))
    assert objective.weights == {"policy": 1.0, "kl": 0.1} and float(losses["kl"].total.detach()) == 0
    with torch.no_grad():
        model.thinker.lm_head.weight.mul_(3)
    before = model.thinker.lm_head.weight.clone()
    rollout = objective.prepare(model, given)
    losses = objective.losses(model, rollout)
    assert torch.equal(before, model.thinker.lm_head.weight)
    assert float(losses["kl"].count) == objective.counts(rollout)["kl"] and mean(losses["kl"]) > 1e-4
    model.thinker.requires_grad_(True)
    assert torch.autograd.grad(losses["kl"].total, model.thinker.lm_head.weight)[0].any()


class Forever:
    """One batch, again and again."""

    def __init__(self, batch: TrainingBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[TrainingBatch]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_in_the_trainer_and_repeats(precision: str) -> None:
    """Answers are drawn from torch's generator, so a run with one seed is one run."""
    curves = []
    for _ in range(2):
        model = toy_model(seed=0)
        model.requires_grad_(False).thinker.requires_grad_(True)
        objective = GSPO(model, share_of(*range(300)), group_size=4, max_new_tokens=3, kl_weight=0.01)
        table = {"objective": "gspo", "steps": 2, "accumulate": 2, "precision": precision, "seed": 4}
        config = TrainConfig.from_dict({"train": table, "model": {"config": "tiny"}, "log": {"progress": False}})
        trainer = Trainer(model, objective, Forever(conversations(model, QUESTIONS[:1])), config)
        torch.manual_seed(0)
        curves.append([trainer.step().losses for _ in range(2)])
    assert curves[0] == curves[1]
    assert len({step["reward"] for step in curves[0]}) > 1


# rewards


def answer(text: str, reference: str | None = "The Elbe.", **known: Any) -> Sampled:
    return Sampled(
        [1], "Name a river.", known.pop("ids", [1, 2, 3]), text, None, "stop", 0, reference=reference, **known
    )


def reward(given: Any, sample: Sampled) -> float:
    return make_reward(given)[1](sample)


def test_rule_based_rewards() -> None:
    assert reward("exact_answer", answer("the elbe")) == 1 and reward("exact_answer", answer("The Elbe river")) == 0
    assert reward({"name": "exact_answer", "language": None}, answer("the elbe")) == 0
    assert (
        reward("contains", answer("It is the Elbe, of course.")) == 1 and reward("contains", answer("the elbes")) == 0
    )
    boxed = {"name": "format", "pattern": r"Answer: \d+"}
    assert reward(boxed, answer(" Answer: 42\n")) == 1 and reward(boxed, answer("Answer: 42, I think")) == 0
    short = {"name": "length", "limit": 2, "slack": 2}
    assert [reward(short, answer("", ids=[0] * n)) for n in (1, 2, 3, 4, 9)] == [0, 0, -0.5, -1, -1]


def test_rewards_that_listen_and_judge() -> None:
    heard = answer("one two three four", audio=torch.ones(8), sample_rate=24000)
    spoken = {"name": "spoken_words", "transcribe": lambda audio, rate: "one two nine four" if rate == 24000 else ""}
    assert reward(spoken, heard) == 0.75
    assert reward({**spoken, "against": "reference"}, heard) == 0
    with pytest.raises(ValueError, match="audio = true"):
        reward(spoken, answer("one"))
    ask = {
        "name": "judge",
        "score": lambda question, text, wanted: float(question == "Name a river." and text == wanted),
    }
    assert reward(ask, answer("The Elbe.")) == 1 and reward(ask, answer("Elbe")) == 0


def own_reward(sample: Sampled, bonus: float = 0.0) -> float:
    return len(sample.text) + bonus


def test_rewards_are_named_in_tables_or_imported() -> None:
    weight, function = make_reward({"name": "contains", "weight": 0.5})
    assert weight == 0.5 and function(answer("The Elbe.")) == 1
    assert reward(f"{__name__}:own_reward", answer("abc")) == 3
    assert reward({"name": f"{__name__}:own_reward", "bonus": 2}, answer("abc")) == 5
    assert reward(own_reward, answer("abc")) == 3
    for wrong, message in (
        ("exact_anser", "did you mean 'exact_answer'"),
        ({"name": "length"}, "missing a required argument"),
        ({"name": "format", "patern": "a"}, "did you mean 'pattern'"),
        ("nowhere.at_all:f", "cannot be imported"),
        (f"{__name__}:NEUTRAL", "not a function"),
    ):
        with pytest.raises(ValueError, match=message):
            make_reward(wrong)
    assert set(REWARDS) == {"exact_answer", "contains", "format", "length", "spoken_words", "judge"}


def test_wrong_settings_are_refused() -> None:
    model = toy_model(seed=0)
    with pytest.raises(ValueError, match="group_size 1"):
        GSPO(model, "contains", group_size=1)
    with pytest.raises(ValueError, match="there is no reward"):
        GSPO(model, [])
    with pytest.raises(ValueError, match=r"\['polcy'\]"):
        GSPO(model, "contains", given={"polcy": 1.0})
    with pytest.raises(ValueError, match="must not be below 0"):
        GSPO(model, "contains", clip_low=-1)
    with pytest.raises(ValueError, match="NaN"):
        GSPO(model, lambda sample: float("nan"), group_size=2, max_new_tokens=2).prepare(
            model, conversations(model, QUESTIONS[:1])
        )
