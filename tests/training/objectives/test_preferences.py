"""DPO and GSPO: known values, and gradients in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from omni.training.objectives import preference_losses as preferences
from omni.training.objectives.losses import Loss


def mean(loss: Loss) -> float:
    return (loss.total / loss.count).item()


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


# DPO


def test_dpo_of_equal_pairs_is_log_2() -> None:
    policy, reference = randn(4), randn(4)
    for smoothing in (0.0, 0.1):
        loss = preferences.dpo_loss(policy, policy, reference, reference, label_smoothing=smoothing)
        assert mean(loss) == pytest.approx(math.log(2), abs=1e-15) and loss.count.item() == 4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_has_right_gradients_and_none_for_the_reference(smoothing: float) -> None:
    pc, pr, rc, rr = (randn(4) for _ in range(4))
    loss = preferences.dpo_loss(pc, pr, rc, rr, 0.5, smoothing)
    p = (0.5 * ((pc - rc) - (pr - rr))).sigmoid().detach()
    torch.testing.assert_close(loss.total, (-(1 - smoothing) * p.log() - smoothing * (1 - p).log()).sum())
    assert gradcheck(lambda a, b: preferences.dpo_loss(a, b, rc, rr, 0.5, smoothing).total, (pc, pr))
    loss.total.backward()
    assert rc.grad is None and rr.grad is None


def test_a_step_of_dpo_raises_the_preference() -> None:
    policy = torch.zeros(3, 2, requires_grad=True)
    reference = torch.zeros(3, 2)
    preferences.dpo_loss(*policy.T, *reference.T).total.backward()
    after = (policy - policy.grad).detach()
    chosen, rejected = (preferences.dpo_rewards(after[:, i], reference[:, i]) for i in range(2))
    assert mean(preferences.preference_accuracy(chosen, rejected)) == 1
    assert mean(preferences.preference_accuracy(chosen, chosen)) == 0
    assert float(preferences.dpo_loss(*after.T, *reference.T).total) < 3 * math.log(2)


def test_speech_log_prob_weighs_the_residual_codes() -> None:
    log_p0, log_pk = randn(5), randn(4, 3)
    expected = sum(log_p0.tolist()) + 0.25 * sum(map(sum, log_pk.tolist()))
    assert preferences.speech_log_prob(log_p0, log_pk, 0.25).item() == pytest.approx(expected, abs=1e-12)
    assert gradcheck(lambda a, b: preferences.speech_log_prob(a, b, 0.25), (log_p0, log_pk))


def test_dpo_refuses_impossible_settings() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="above 0"):
        preferences.dpo_loss(x, x, x, x, beta=0)
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        preferences.dpo_loss(x, x, x, x, label_smoothing=0.5)
    with pytest.raises(ValueError, match="must be equal"):
        preferences.dpo_loss(x, x[:1], x, x[:1])


# GSPO


def test_advantages_are_normalised_in_each_group() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]])
    advantages = preferences.group_advantages(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5)
    assert not advantages[1].any()  # equal rewards, though their mean is rounded
    torch.testing.assert_close(advantages.mean(-1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages[[0, 2]].square().mean(-1), torch.ones(2))
    assert not preferences.group_advantages(torch.tensor([[5.0]])).any()
    with pytest.raises(ValueError, match="samples a prompt"):
        preferences.group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="NaN"):
        preferences.group_advantages(torch.tensor([[1.0, math.nan]]))


@pytest.fixture
def samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-probabilities new and old [3, 5], mask with samples of 5, 3 and 1 tokens, advantages."""
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    old = randn(3, 5, grad=False)
    return (old + 0.01 * randn(3, 5)).detach().requires_grad_(), old, mask, torch.tensor([1.5, -0.5, -1.0]).double()


def test_the_ratio_is_that_of_the_geometric_means(samples: tuple[Tensor, ...]) -> None:
    new, old, mask, _ = samples
    ratio = preferences.sequence_ratio(new, old, mask)
    for i, n in enumerate((5, 3, 1)):
        expected = math.exp((new[i, :n].sum() - old[i, :n].sum()).item() / n)
        assert ratio[i].item() == pytest.approx(expected, abs=1e-12)
    padded = new.detach().masked_fill(~mask, math.nan)
    assert torch.equal(preferences.sequence_ratio(padded, old, mask), ratio.detach())
    assert gradcheck(lambda x: preferences.sequence_ratio(x, old, mask), (new,))


def test_at_ratio_1_gspo_is_the_advantage_weighted_mean_log_prob(samples: tuple[Tensor, ...]) -> None:
    _, old, mask, advantages = samples
    leaf = old.clone().requires_grad_()
    loss = preferences.gspo_loss(leaf, old, mask, advantages)
    (grad,) = torch.autograd.grad(loss.total, leaf)
    surrogate = -(advantages * (leaf * mask).sum(-1) / mask.sum(-1)).sum()
    (expected,) = torch.autograd.grad(surrogate, leaf)
    torch.testing.assert_close(grad, expected, atol=1e-15, rtol=0)
    assert loss.count.item() == 3 and loss.total.item() == pytest.approx(-float(advantages.sum()), abs=1e-15)


def test_gspo_within_the_range_has_right_gradients(samples: tuple[Tensor, ...]) -> None:
    new, old, mask, advantages = samples
    assert gradcheck(lambda x: preferences.gspo_loss(x, old, mask, advantages, 0.5, 0.5).total, (new,))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.3, 1, True), (1.3, -1, False), (0.8, 1, False), (0.8, -1, True), (1.15, 1, False), (0.95, -1, False)],
)
def test_gspo_stops_where_the_ratio_has_gone_far_enough(ratio: float, advantage: float, clipped: bool) -> None:
    """Range (0.9, 1.2), wider on the right: min(s A, clip(s) A)."""
    old, mask = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    new = torch.full_like(old, math.log(ratio)).requires_grad_()
    loss = preferences.gspo_loss(new, old, mask, torch.tensor([float(advantage)]), 0.1, 0.2)
    (grad,) = torch.autograd.grad(loss.total, new)
    expected = min(ratio * advantage, min(max(ratio, 0.9), 1.2) * advantage)
    assert loss.total.item() == pytest.approx(-expected, abs=1e-12)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.0 if clipped else -ratio * advantage / 4))
    share = preferences.clipped_samples(torch.tensor([ratio]), torch.tensor([float(advantage)]), 0.1, 0.2)
    assert mean(share) == clipped


def test_samples_without_tokens_are_not_counted(samples: tuple[Tensor, ...]) -> None:
    new, old, mask, advantages = samples
    empty = mask & torch.tensor([True, True, False])[:, None]
    loss = preferences.gspo_loss(new, old, empty, advantages)
    kept = preferences.gspo_loss(new[:2], old[:2], mask[:2], advantages[:2])
    assert loss.count.item() == 2 and torch.equal(loss.total, kept.total)
    with pytest.raises(ValueError, match="below 0"):
        preferences.gspo_loss(new, old, mask, advantages, -0.1)
