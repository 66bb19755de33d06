"""Losses on tokens, routers, codes and teachers: known values, and gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

from omni.training.data.samples import IGNORED
from omni.training.objectives import losses
from omni.training.objectives.losses import Loss

N, D, V = 7, 5, 11
TEACHERS = ("logits", "top-k")
DIRECTIONS = ("forward", "reverse")


def mean(loss: Loss) -> float:
    return (loss.total / loss.count).item()


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, V, (N,))
    labels[[0, 3]] = IGNORED
    return labels


# Cross-entropy and log-probabilities


def test_cross_entropy_is_that_of_the_labelled_tokens(labels: Tensor) -> None:
    logits = randn(N, V)
    kept = labels != IGNORED
    loss = losses.cross_entropy(logits, labels)
    expected = -logits.softmax(-1)[kept, labels[kept]].log().sum()
    assert loss.count.item() == int(kept.sum()) and not loss.count.requires_grad
    torch.testing.assert_close(loss.total, expected, atol=1e-12, rtol=0)
    assert gradcheck(lambda x: losses.cross_entropy(x, labels).total, (logits,))


def test_uniform_logits_cost_the_log_of_the_vocabulary(labels: Tensor) -> None:
    assert mean(losses.cross_entropy(torch.zeros(N, V), labels)) == pytest.approx(math.log(V), abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_linear_cross_entropy_has_right_gradients(labels: Tensor, chunk: int) -> None:
    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return 0.7 * losses.linear_cross_entropy(hidden, weight, labels, chunk).total

    hidden, weight = randn(N, D), randn(V, D)
    assert gradcheck(total, (hidden, weight))
    assert gradcheck(lambda h: total(h, weight.detach()), (hidden,))  # the head is not trained
    assert gradcheck(lambda w: total(hidden.detach(), w), (weight,))  # or nothing but the head


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_linear_log_probs_have_right_gradients(labels: Tensor, chunk: int) -> None:
    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        return losses.linear_token_log_probs(hidden, weight, labels, chunk)

    hidden, weight = randn(N, D), randn(V, D)
    assert gradcheck(log_probs, (hidden, weight))
    assert gradcheck(lambda h: log_probs(h, weight.detach()), (hidden,))
    assert gradcheck(lambda w: log_probs(hidden.detach(), w), (weight,))


def linear_and_plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Loss, log-probabilities and their gradients by hidden and weight: without and with whole logits."""
    scale = torch.linspace(-1, 1, len(labels), dtype=hidden.dtype)
    leaves = (hidden, weight)
    out = []
    for ce, lp in (
        (losses.linear_cross_entropy(*leaves, labels, chunk).total,
         losses.linear_token_log_probs(*leaves, labels, chunk)),
        (losses.cross_entropy(hidden @ weight.T, labels).total, losses.token_log_probs(hidden @ weight.T, labels)),
    ):  # fmt: skip
        grads = torch.autograd.grad(ce, leaves) + torch.autograd.grad((scale * lp).sum(), leaves)
        out.append((ce, lp, *grads))
    return out[0], out[1]


def test_the_linear_losses_equal_the_plain_ones_in_float32() -> None:
    hidden, weight = randn(40, 16, dtype=torch.float32), randn(64, 16, dtype=torch.float32)
    labels = torch.randint(0, 64, (40,)).masked_fill(torch.rand(40) < 0.3, IGNORED)
    for got, expected in zip(*linear_and_plain(hidden, weight, labels, chunk=9)):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_without_labels_the_loss_is_zero_and_still_reaches_what_it_trains(grad: bool) -> None:
    hidden, weight, labels = randn(N, D), randn(V, D, grad=grad), torch.full((N,), IGNORED)
    loss = losses.linear_cross_entropy(hidden, weight, labels)
    log_probs = losses.linear_token_log_probs(hidden, weight, labels)
    assert loss.total.item() == loss.count.item() == 0 and not log_probs.any()
    (loss.total + log_probs.sum()).backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert (weight.grad is not None) == grad and (weight.grad is None or not weight.grad.any())


def test_the_weight_gradient_of_many_chunks_is_summed_in_float32() -> None:
    """In bfloat16 a sum of 256 equal parts would stop growing halfway."""
    n = 256
    hidden = torch.full((n, 4), 0.75, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(3, 4, dtype=torch.bfloat16).requires_grad_()
    labels = torch.zeros(n, dtype=torch.int64)
    expected = n * 0.75 * (torch.tensor([0.0, 1, 1]) / 3 - torch.tensor([2 / 3, 0, 0]))
    losses.linear_cross_entropy(hidden, weight, labels, 1).total.backward()
    once = weight.grad.clone()
    weight.grad = None
    (-losses.linear_token_log_probs(hidden, weight, labels, 1)).sum().backward()
    for grad in (once, weight.grad):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad[:, 0].float(), expected, atol=0, rtol=1e-2)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_token_log_probs"])
def test_autocast_decides_the_product_and_nothing_else(name: str, labels: Tensor) -> None:
    hidden, weight = randn(N, D, dtype=torch.float32), randn(V, D, dtype=torch.float32)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        out = getattr(losses, name)(hidden, weight, labels, 2)
        return (out.total if isinstance(out, Loss) else out).sum()

    with torch.autocast("cpu", torch.bfloat16):
        got = run(hidden, weight)
    by_cast = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = run(*by_cast)
    assert got.dtype == torch.float32 and got.item() == expected.item()
    grads, wanted = torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, by_cast)
    for a, b in zip(grads, wanted):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):  # never lowered, as by PyTorch
        assert run(hidden.double(), weight.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="autocast"):
        run(hidden.bfloat16(), weight)


class Largest(TorchFunctionMode):
    """The numbers in the largest tensor made."""

    numel = 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,))
                                        if isinstance(x, Tensor))])  # fmt: skip
        return out


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_token_log_probs"])
def test_the_logits_are_never_whole(name: str) -> None:
    hidden, weight, labels = randn(64, 4), randn(100, 4), torch.randint(0, 100, (64,))
    with Largest() as largest:
        out = getattr(losses, name)(hidden, weight, labels, 8)
        (out.total if isinstance(out, Loss) else out).sum().backward()
    assert largest.numel == 8 * 100


def test_no_gradient_is_made_where_none_is_recorded(labels: Tensor) -> None:
    """An evaluation pays for the product alone."""

    class Products(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.__name__ in ("matmul", "__matmul__")
            return func(*args, **(kwargs or {}))

    hidden, weight = randn(N, D), randn(V, D)
    with torch.no_grad(), Products() as products:
        loss = losses.linear_cross_entropy(hidden, weight, labels)
    assert products.count == 1 and not loss.total.requires_grad


def test_bfloat16_logits_are_scored_in_float32(labels: Tensor) -> None:
    logits = randn(N, V, dtype=torch.bfloat16)
    loss = losses.cross_entropy(logits, labels)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, losses.cross_entropy(logits.float(), labels).total)


def test_token_log_probs_sum_to_one_over_the_vocabulary(labels: Tensor) -> None:
    logits = randn(N, V)
    every = torch.stack([losses.token_log_probs(logits, torch.full((N,), v)) for v in range(V)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(N, dtype=torch.float64))
    got = losses.token_log_probs(logits, labels)
    assert (got == 0).tolist() == (labels == IGNORED).tolist()
    assert gradcheck(lambda x: losses.token_log_probs(x, labels), (logits,))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, V\] and \[N\]"):
        losses.cross_entropy(torch.zeros(3, V), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        losses.linear_cross_entropy(torch.zeros(3, D), torch.zeros(D, V), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1"):
        losses.linear_cross_entropy(torch.zeros(3, D), torch.zeros(V, D), torch.zeros(3, dtype=torch.int64), 0)


# Router


@pytest.mark.parametrize("k", [1, 2, 6])
def test_router_balance_is_k_at_uniform_routing_and_grows_as_it_concentrates(k: int) -> None:
    tokens, experts, layers = 30, 6, 3
    uniform = torch.eye(experts).repeat(tokens // experts, 1) * 1e-3  # each expert first equally often
    uniform = sum((uniform.roll(i, -1) for i in range(k)), torch.zeros_like(uniform))
    loss = losses.router_balance([uniform] * layers, k)
    assert loss.count.item() == tokens and mean(loss) == pytest.approx(k, abs=1e-4)
    favour = torch.arange(experts, 0, -1.0).expand(tokens, -1)
    values = [mean(losses.router_balance([s * favour] * layers, k)) for s in (1e-6, 0.3, 1.0, 3.0)]
    if k < experts:
        assert values == sorted(values) and values[0] == pytest.approx(k, abs=1e-4)
        assert values[-1] > k + 0.9 * (experts - k)
    else:
        assert values == pytest.approx([k] * 4, abs=1e-4)


def test_router_balance_has_the_gradient_of_its_mean_probabilities() -> None:
    tokens, experts, k = 9, 5, 2
    logits = [randn(tokens, experts) for _ in range(2)]
    mask = torch.arange(tokens) < 6
    grads = torch.autograd.grad(losses.router_balance(logits, k, mask).total, logits)
    p = torch.stack(logits).detach().softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0)
    share = chosen[:, mask].mean((0, 1))  # experts * sum of share * mean probability, times 6 tokens
    expected = experts * 6 * p * (share - (share * p).sum(-1, keepdim=True)) / (6 * 2) * mask[None, :, None]
    torch.testing.assert_close(torch.stack(grads), expected, atol=1e-6, rtol=1e-5)


def test_router_balance_ignores_padding_and_survives_its_absence_of_tokens() -> None:
    logits = [randn(8, 4)]
    changed = [torch.cat((logits[0][:5], 100 * randn(3, 4)))]
    mask = torch.arange(8) < 5
    a, b = losses.router_balance(logits, 2, mask), losses.router_balance(changed, 2, mask)
    assert torch.equal(a.total, b.total) and a.count.item() == 5
    for empty in (losses.router_balance(logits, 2, torch.zeros(8)), losses.router_balance([logits[0][:0]], 2)):
        assert empty.total.item() == empty.count.item() == 0
        (grad,) = torch.autograd.grad(empty.total, logits)
        assert torch.equal(grad, torch.zeros_like(grad))
    with pytest.raises(ValueError, match="between 1 and 4"):
        losses.router_balance(logits, 5)
    with pytest.raises(ValueError, match="sparse layer"):
        losses.router_balance([], 1)


# Speech


def test_speech_cross_entropy_is_codebook_0_plus_the_weighted_mean_of_the_residual_ones() -> None:
    frames, residual, width = 4, 3, 6
    logits0, codes0 = randn(frames + 1, V), torch.randint(0, V, (frames + 1,))
    logits, codes = randn(frames, residual, width), torch.randint(0, width, (frames, residual))
    parts = losses.speech_cross_entropy(logits0, codes0, logits, codes, 0.3)
    each = losses.codebook_cross_entropies(logits0, codes0, logits, codes)
    assert list(parts) == ["codebook_0", "residual"] and len(each) == residual + 1
    assert parts["residual"].count.item() == frames * residual
    assert mean(parts["codebook_0"]) == pytest.approx(mean(each[0]), abs=1e-12)
    assert mean(parts["residual"]) == pytest.approx(0.3 * sum(map(mean, each[1:])) / residual, abs=1e-12)
    by_hand = -logits[:, 1].log_softmax(-1)[torch.arange(frames), codes[:, 1]].mean()
    assert mean(each[2]) == pytest.approx(by_hand.item(), abs=1e-12)
    assert not any(loss.total.requires_grad for loss in each)

    def total(a: Tensor, b: Tensor) -> Tensor:
        both = losses.speech_cross_entropy(a, codes0, b, codes)
        return sum((loss.total / loss.count for loss in both.values()), torch.zeros(()))

    assert gradcheck(total, (logits0, logits))


# Distillation


def teacher_of(logits: Tensor, kind: str, k: int = 3, temperature: float = 1.0) -> Any:
    return logits.detach() if kind == "logits" else tuple((logits.detach() / temperature).log_softmax(-1).topk(k))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_identical_teacher_gives_zero_and_no_gradient(kind: str, direction: str, dtype: torch.dtype) -> None:
    logits = (4 * randn(N, V, dtype=dtype)).detach().requires_grad_()
    loss = losses.kl_to_teacher(logits, teacher_of(logits, kind), direction=direction)
    (grad,) = torch.autograd.grad(loss.total / loss.count, logits)
    limit = 4 * math.log(V) * torch.finfo(dtype).eps  # log p and log q each round twice, and p log p adds up to log V
    assert abs(mean(loss)) <= limit and float(grad.abs().max()) <= limit and loss.count.item() == N


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_has_right_value_and_gradient(kind: str, direction: str, temperature: float) -> None:
    student, other = randn(N, V), randn(N, V, grad=False)
    teacher = teacher_of(other, kind, temperature=temperature)
    mask = torch.arange(N) != 2

    def total(x: Tensor) -> Tensor:
        return losses.kl_to_teacher(x, teacher, temperature=temperature, direction=direction, mask=mask).total

    assert gradcheck(total, (student,))
    p, q = (other / temperature).softmax(-1), (student.detach() / temperature).softmax(-1)
    if kind == "top-k":
        ids = teacher[1]
        p, q = (torch.cat((x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)), -1) for x in (p, q))
    p, q = (p, q) if direction == "forward" else (q, p)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)[mask].sum()
    torch.testing.assert_close(total(student).detach(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_top_k_bounds_the_divergence_from_below_and_reaches_it(direction: str) -> None:
    student, other = randn(N, V, grad=False), randn(N, V, grad=False)
    values = [
        mean(losses.kl_to_teacher(student, teacher_of(other, "top-k", k), direction=direction)) for k in range(1, V)
    ]
    full = mean(losses.kl_to_teacher(student, other, direction=direction))
    assert values == sorted(values) and values[0] >= 0 and values[-1] == pytest.approx(full, abs=1e-12)


@pytest.mark.parametrize("kind", TEACHERS)
def test_impossible_tokens_add_nothing(kind: str) -> None:
    """Ids that teacher or student rule out (-inf) give neither NaN in the loss nor in the gradient."""
    student, other = randn(N, V, grad=False), randn(N, V, grad=False)
    other[:, 2] = student[:, 2] = -torch.inf
    for direction in DIRECTIONS:
        leaf = student.clone().requires_grad_()
        loss = losses.kl_to_teacher(leaf, teacher_of(other, kind), direction=direction)
        (grad,) = torch.autograd.grad(loss.total, leaf)
        assert loss.total.isfinite() and grad.isfinite().all() and grad.abs().sum() > 0


def test_kl_refuses_what_it_cannot_compare() -> None:
    logits = torch.zeros(N, V)
    with pytest.raises(ValueError, match="'backward' is not one of"):
        losses.kl_to_teacher(logits, logits, direction="backward")
    with pytest.raises(ValueError, match="above 0"):
        losses.kl_to_teacher(logits, logits, temperature=0)
    with pytest.raises(ValueError, match="vocabulary"):
        losses.kl_to_teacher(logits, logits[:, 1:])
    with pytest.raises(ValueError, match="whole logits"):
        losses.kl_to_teacher(logits, tuple(logits.topk(V)))
