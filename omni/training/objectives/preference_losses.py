"""Losses on preferences and rewards: DPO over pairs, GSPO over groups of samples.

Shapes: P pairs or prompts, n samples a prompt, S = P * n samples, T tokens of a sample (padded), F frames, K codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.training.objectives.losses import Loss, widen

CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4  # Zheng et al., 2025, section 5.1: left and right of 1


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7), summed over pairs; log 2 for equal answers.

    Each argument [P]: log-probabilities of whole answers, of text (`token_log_probs`, summed) or speech
    (`speech_log_prob`), under the policy and under the fixed reference. beta: how dear it is to leave the reference.
    label_smoothing: the share of pairs believed to be the wrong way round (Mitchell, 2023, "cDPO").
    Raises ValueError for a beta not above 0, a smoothing outside [0, 0.5) and unequal shapes.
    """
    if not beta > 0:
        raise ValueError(f"beta {beta} gives no preference; it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label smoothing {label_smoothing} is not below one half; it must be in [0, 0.5)")
    chosen = _rewards(policy_chosen, reference_chosen, beta)
    rejected = _rewards(policy_rejected, reference_rejected, beta)
    _check_same(chosen, rejected, "chosen and rejected answers")
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return Loss(losses.sum(), losses.new_tensor(float(losses.numel())))


def dpo_rewards(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """The reward of each answer that DPO implies, beta * log(policy / reference), for logs: [P], detached."""
    return _rewards(policy, reference, beta).detach()


def preference_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Loss:
    """How many pairs [P] have the chosen answer's reward above the rejected one's; equal ones do not count as right."""
    _check_same(chosen_rewards, rejected_rewards, "rewards of chosen and rejected answers")
    right = (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype)
    return Loss(right.sum(), right.new_tensor(float(right.numel())))


def speech_log_prob(log_p0: Tensor, log_pk: Tensor, residual_weight: float = 1.0) -> Tensor:
    """log-probability of one spoken answer: sum over frames of log p(c0) + residual_weight * sum of log p(ck) -> [].

    log_p0 [F]: codebook 0, its end of speech included or not; log_pk [frames, K - 1]: residual codes. At weight 1 it
    is the log-probability of the frames; a smaller one lets codebook 0, which carries the words, decide.
    """
    return log_p0.sum() + residual_weight * log_pk.sum()


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards of n samples a prompt, less the group's mean, over its (population) standard deviation: [P, n] -> [P, n].

    A group whose rewards are all equal teaches nothing: 0. Source: Zheng et al., 2025, eq. 6. Raises ValueError for
    rewards that are not a table or not finite.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards have shape {list(rewards.shape)}; they must be [prompts, samples a prompt]")
    if not rewards.isfinite().all():
        raise ValueError("a reward is NaN or infinite; give such an answer the lowest reward instead")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    deviation = rewards.std(-1, correction=0, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # their deviation may be a rounding error
    return torch.where(equal, 0.0, (rewards - rewards.mean(-1, keepdim=True)) / deviation.masked_fill(equal, 1.0))


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """exp(mean over tokens of log p - log p_old) of each sample: [S, T] -> [S]; 1 for a sample without tokens.

    log_probs: under the policy; old_log_probs: under the policy that wrote the samples; mask bool [S, T]: its tokens.
    Source: Zheng et al., 2025, "Group Sequence Policy Optimization", eq. 7.
    """
    _check_same(log_probs, old_log_probs, "new and old log-probabilities")
    _check_same(log_probs, mask, "log-probabilities and mask")
    difference = widen(log_probs) - widen(old_log_probs.detach())
    # Not a product: padding may hold anything.
    return (difference.masked_fill(~mask.bool(), 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).exp()


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
) -> Loss:
    """Group sequence policy optimisation: -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), summed over samples.

    log_probs, old_log_probs, mask [S, T] as in `sequence_ratio`, whose value s is; advantages A [S]
    (`group_advantages`, flattened). Samples without tokens are not counted. Source: Zheng et al., 2025, eq. 5; at s = 1
    its gradient is minus the advantage times the mean gradient of the tokens' log-probabilities (eq. 10).
    Raises ValueError for unequal shapes and a clip range that is negative.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip range ({clip_low}, {clip_high}) excludes a ratio of 1; neither may be below 0")
    ratio = sequence_ratio(log_probs, old_log_probs, mask)
    _check_same(ratio, advantages, "samples and advantages")
    advantages = advantages.detach().to(ratio.dtype)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    counted = mask.bool().any(-1)
    return Loss(-gain.masked_fill(~counted, 0.0).sum(), counted.sum().to(gain.dtype))


def clipped_samples(
    ratio: Tensor, advantages: Tensor, clip_low: float = CLIP_LOW, clip_high: float = CLIP_HIGH
) -> Loss:
    """How many samples [S] the clip range takes out of GSPO's gradient, for logs: total / count is their share."""
    _check_same(ratio, advantages, "samples and advantages")
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    return Loss(clipped.sum().to(ratio.dtype), ratio.new_tensor(float(ratio.numel())))


def _rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    _check_same(policy, reference, "policy's and reference's log-probabilities")
    return beta * (widen(policy) - widen(reference.detach()))


def _check_same(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what} have shapes {list(a.shape)} and {list(b.shape)}; they must be equal")
