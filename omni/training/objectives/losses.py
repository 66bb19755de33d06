"""Losses as pure functions of tensors, computed in float32 (float64 stays float64) whatever the inputs' dtype.

Distillation on a teacher's text is `cross_entropy` with that text as the labels; on a teacher's probabilities it is
`kl_to_teacher`. The `linear_` functions take hidden states and the head's weight in place of logits: they never hold
the logits of more than `chunk` tokens, and skip tokens without a label.
Shapes: N tokens, D width, V vocabulary, L layers, E experts, F frames with their end, K codebooks, W codes a residual
codebook, k entries of a teacher's top-k.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from omni.layers.moe import load_balancing_loss
from omni.training.data.samples import IGNORED

CHUNK = 1024  # tokens; 0.6 GB of float32 logits at the release's vocabulary
DIRECTIONS = ("forward", "reverse")


class Loss(NamedTuple):
    """A sum over items and how many they are (0-dim tensors): means over micro-batches and processes are then exact.

    The loss is total / count. Gradients flow through `total`; `count` is detached.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy summed over the labelled tokens: logits [N, V], labels int64 [N], `IGNORED` ones left out.

    Raises ValueError if the shapes do not belong together.
    """
    log_probs = token_log_probs(logits, labels)
    return Loss(-log_probs.sum(), _labelled(labels, log_probs))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Loss:
    """`cross_entropy` of `hidden @ weight.T`: hidden [N, D], weight [V, D], labels int64 [N].

    The gradients are made chunk by chunk in the forward pass, where the logits are (Hsu et al., 2024, "Liger
    Kernel"); the weight's gradient is summed in float32. Under autocast the products run in its dtype.
    Raises ValueError for shapes that do not belong together or a chunk below 1, TypeError for two dtypes outside
    autocast.
    """
    dtype = _check_linear(hidden, weight, labels, chunk)
    kept = labels != IGNORED
    recording = torch.is_grad_enabled()
    total = _LinearCrossEntropy.apply(hidden[kept], weight, labels[kept], chunk, dtype, recording)
    return Loss(total, _labelled(labels, total))


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label: logits [N, V], labels int64 [N] -> [N], 0 at `IGNORED`. Raises ValueError as above."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not belong together; "
            "they must be [N, V] and [N]"
        )
    return -F.cross_entropy(widen(logits), labels, ignore_index=IGNORED, reduction="none")


def linear_token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """`token_log_probs` of `hidden @ weight.T`: hidden [N, D], weight [V, D], labels int64 [N] -> [N].

    The backward pass computes the logits a second time. Errors, autocast and the sum of the weight's gradient as in
    `linear_cross_entropy`.
    """
    dtype = _check_linear(hidden, weight, labels, chunk)
    kept = labels != IGNORED
    log_probs = _LinearLogProbs.apply(hidden[kept], weight, labels[kept], chunk, dtype)
    return log_probs.new_zeros(labels.shape).masked_scatter(kept, log_probs)


def router_balance(router_logits: list[Tensor], k: int, mask: Tensor | None = None) -> Loss:
    """The routers' load-balancing loss (`omni.layers.moe.load_balancing_loss`), weighted by tokens.

    router_logits: one [N, E] a sparse layer, as the Thinker and the Talker return them; k experts a token; mask bool
    [N], False for padding. total is the loss times the tokens counted. A micro-batch without tokens adds nothing.
    Raises ValueError without layers, or if k is not between 1 and E.
    """
    if not router_logits:
        raise ValueError("there are no router logits; the model has no sparse layer, or was not asked for them")
    tokens, experts = router_logits[0].shape
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k} experts a token is impossible; it must be between 1 and {experts}")
    counted = torch.ones(tokens, dtype=torch.bool, device=router_logits[0].device) if mask is None else mask.bool()
    count = counted.sum()
    counted = counted | (count == 0)  # a mean over nothing is not a number, and stays so when multiplied by zero
    if tokens == 0:
        return Loss(torch.stack(router_logits).float().sum(), count.float())
    return Loss(load_balancing_loss(router_logits, k, counted) * count, count.float())


def speech_cross_entropy(
    logits0: Tensor, codes0: Tensor, residual_logits: Tensor, residual_codes: Tensor, residual_weight: float = 0.3
) -> dict[str, Loss]:
    """The Talker's loss on frames of codes: CE(codebook 0) + residual_weight * mean of CE(codebooks 1 .. K - 1).

    logits0 [F, V], codes0 int64 [F]: codebook 0, the ends of speech included; residual_logits [N, K - 1, W],
    residual_codes int64 [N, K - 1]: from one teacher-forced pass of the residual-code head over all frames. `IGNORED`
    codes are left out. Returns "codebook_0" and "residual": the loss is the sum of both means, the weight lies within
    "residual"'s total. The weight is that of Qwen3-TTS's released training code.
    """
    residual = cross_entropy(residual_logits.flatten(0, 1), residual_codes.flatten())
    return {
        "codebook_0": cross_entropy(logits0, codes0),
        "residual": Loss(residual_weight * residual.total, residual.count),
    }


def codebook_cross_entropies(
    logits0: Tensor, codes0: Tensor, residual_logits: Tensor, residual_codes: Tensor
) -> list[Loss]:
    """The unweighted cross-entropy of each of the K codebooks, detached, for logs; arguments as above."""
    with torch.no_grad():
        residual = (cross_entropy(residual_logits[:, i], residual_codes[:, i]) for i in range(residual_codes.shape[1]))
        return [cross_entropy(logits0, codes0), *residual]


def kl_to_teacher(
    student_logits: Tensor,
    teacher: Tensor | tuple[Tensor, Tensor],
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    mask: Tensor | None = None,
) -> Loss:
    """Kullback-Leibler divergence between a student's and a teacher's next-token distributions.

    student_logits [N, V]. teacher: its logits [N, V], or its top-k (log-probabilities [N, k], ids int64 [N, k]), k < V,
    taken at the same temperature. With a top-k the k ids and all the rest as one event are compared, a lower bound of
    the full divergence. "forward" is KL(teacher || student), which covers the teacher's mass; "reverse" is
    KL(student || teacher), as in on-policy distillation (Agarwal et al., 2024, "GKD"). mask bool [N]: tokens that
    count. Both distributions are softened by `temperature` and the result is multiplied by its square, which keeps the
    gradient's size (Hinton et al., 2015, section 2). The teacher gets no gradient.
    Raises ValueError for an unknown direction, a temperature not above 0, and shapes that do not belong together.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is not one of {', '.join(map(repr, DIRECTIONS))}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature} cannot soften a distribution; it must be above 0")
    logits = widen(student_logits) / temperature
    if isinstance(teacher, Tensor):
        if teacher.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits are {list(teacher.shape)}, the student's {list(logits.shape)}; "
                "both must share tokens and vocabulary"
            )
        log_p = (teacher.detach().to(logits.dtype) / temperature).log_softmax(-1)
        log_q = logits.log_softmax(-1)
    else:
        log_p, log_q = _top_k_and_rest(logits, *teacher)
    divergence = _kl(log_p, log_q) if direction == "forward" else _kl(log_q, log_p)
    counted = torch.ones_like(divergence) if mask is None else mask.to(divergence.dtype)
    # Not a product: a token that does not count may hold anything.
    return Loss(divergence.masked_fill(counted == 0, 0).sum() * temperature**2, counted.sum())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, [N, V] -> [N]; impossible events of p add nothing, neither here nor to a gradient."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def _top_k_and_rest(logits: Tensor, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities [N, k + 1] of the teacher's top k and of all other ids together."""
    if values.dim() != 2 or values.shape != ids.shape or len(ids) != len(logits) or ids.shape[1] >= logits.shape[1]:
        raise ValueError(
            f"the teacher's top-k has values {list(values.shape)} and ids {list(ids.shape)} for logits "
            f"{list(logits.shape)}; both must be [N, k], k below the vocabulary, or pass the teacher's whole logits"
        )
    values = values.detach().to(logits.dtype)
    covered = values.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(values.dtype).eps)  # rounding may exceed 1
    log_p = torch.cat((values, (-covered.expm1()).log()), dim=-1)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat((logits.gather(-1, ids), rest), dim=-1) - logits.logsumexp(-1, keepdim=True)
    return log_p, log_q


def widen(x: Tensor) -> Tensor:
    """In float32, or float64 where it came so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _labelled(labels: Tensor, like: Tensor) -> Tensor:
    return (labels != IGNORED).sum().to(like.dtype)


def _check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> torch.dtype:
    """The dtype of the products: that of the inputs, or of autocast, which leaves float64 as it is."""
    if hidden.dim() != 2 or weight.dim() != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} do not belong "
            "together; they must be [N, D], [V, D] and [N]"
        )
    if chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens is empty; it must be at least 1")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, weight {weight.dtype}; cast one of them or use torch.autocast")
    return hidden.dtype


def _log_probs_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, scale: Tensor | None, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p of each label [N], and the gradients of sum(scale * log p) by hidden and weight where `wanted`.

    hidden [N, D] and weight [V, D] of one dtype; scale [N]. The gradient by the weight is float32 (float64), that by
    hidden in its dtype. Memory beyond results: the logits of one chunk.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    log_probs = hidden.new_empty(len(labels), dtype=wide)
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            target = labels[part, None]
            logits = (hidden[part] @ weight.T).to(wide)  # [chunk, V]
            norm = logits.logsumexp(-1, keepdim=True)
            log_probs[part] = (logits.gather(-1, target) - norm)[:, 0]
            if scale is None:
                continue
            grad = logits.sub_(norm).exp_().neg_()  # in place: one matrix of this size is enough
            grad.scatter_add_(1, target, torch.ones_like(target, dtype=wide))
            grad = grad.mul_(scale[part, None]).to(weight.dtype)  # by the logits: scale * (one-hot - softmax)
            if by_hidden is not None:
                by_hidden[part] = grad @ weight
            if by_weight is not None:
                by_weight += grad.T @ hidden[part]
    return log_probs, by_hidden, by_weight


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log p over tokens that all have a label. Its gradients are ready when the forward pass is done."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype, recording: bool
    ) -> Tensor:
        wanted = (recording and ctx.needs_input_grad[0], recording and ctx.needs_input_grad[1])
        scale = hidden.new_full((len(labels),), -1.0, dtype=torch.promote_types(dtype, torch.float32))
        log_probs, by_hidden, by_weight = _log_probs_and_gradients(
            hidden.to(dtype), weight.to(dtype), labels, chunk, scale if any(wanted) else None, wanted
        )
        ctx.save_for_backward(
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )
        return -log_probs.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        grad = grads[0]  # 0-dim: the products keep their dtype
        return (
            None if by_hidden is None else by_hidden * grad,
            None if by_weight is None else by_weight * grad,
            None, None, None, None,
        )  # fmt: skip


class _LinearLogProbs(torch.autograd.Function):
    """log p of tokens that all have a label; the backward pass starts again from hidden states and weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk, ctx.dtype = chunk, dtype
        inputs = (hidden.to(dtype), weight.to(dtype), labels)
        return _log_probs_and_gradients(*inputs, chunk, None, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        _, by_hidden, by_weight = _log_probs_and_gradients(
            hidden.to(ctx.dtype), weight.to(ctx.dtype), labels, ctx.chunk, grads[0], wanted
        )
        return (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None, None, None,
        )  # fmt: skip
