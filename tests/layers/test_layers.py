"""Shared layers: norm, attention backends, caches, experts, initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from omni.code2wav.conv import ConvState
from omni.config.decoder import MoEConfig
from omni.layers.attention_backends import ATTENTION, attention, packed_attention
from omni.layers.cache import KVCache
from omni.layers.init import initialise
from omni.layers.moe import ROUTERS, MoE, load_balancing_loss, topk_softmax
from omni.layers.norm import RMSNorm
from omni.layers.state import join_rows


def test_rms_norm_takes_its_variance_in_fp32() -> None:
    x = torch.randn(4, 64) * 300
    norm = RMSNorm(64)
    expected = x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    half = norm.to(torch.float16)(x.half())  # 300^2 would overflow half precision
    torch.testing.assert_close(half.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", sorted(set(ATTENTION) - {"plain"}))
@pytest.mark.parametrize("case", ["full", "causal", "masked", "causal_chunk", "causal_masked"])
def test_attention_backends_equal_the_plain_one(backend: str, case: str) -> None:
    T, S = (5, 9) if case == "causal_chunk" else (9, 9)
    q = torch.randn(2, 4, T, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, S, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, T, S) > 0.3
    mask[..., 0] = True
    args = {"mask": mask if "masked" in case else None, "causal": "causal" in case}
    grads = []
    for name in ("plain", backend):
        out = attention(q, k, v, backend=name, **args)
        grads.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_packed_attention_equals_each_block_alone() -> None:
    lengths = [3, 5, 3, 1, 0, 5]
    q, k, v = (torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3))
    out = packed_attention(q, k, v, lengths)
    start = 0
    for length in lengths:
        block = [x[start : start + length].transpose(0, 1)[None] for x in (q, k, v)]
        torch.testing.assert_close(out[start : start + length], attention(*block)[0].transpose(0, 1))
        start += length
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_unknown_backends_are_named() -> None:
    x = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="flashy"):
        attention(x, x, x, backend="flashy")


def test_cache_rows_may_be_out_of_step() -> None:
    cache = KVCache.create(1, 2, 1, 2, 4, torch.device("cpu"), torch.float32)
    rows = [torch.randn(5, 4), torch.randn(5, 4)]
    for tokens, lengths in ((3, [3, 1]), (2, [2, 2])):  # row 1 brings one token, then two more
        cache.reserve(tokens)
        starts = cache.length.tolist()
        new = torch.stack([torch.cat((row, row))[s : s + tokens] for row, s in zip(rows, starts)])[:, None]
        cache.prefill(tokens)[0].write(new, new)
        cache.advance(lengths)
    assert cache.length.tolist() == [5, 3]
    for row, length in enumerate(cache.length.tolist()):
        assert torch.equal(cache.keys[0, row, 0, :length], rows[row][:length])


def test_a_cloned_state_goes_its_own_way() -> None:
    cache = KVCache.create(1, 1, 1, 2, 4, torch.device("cpu"), torch.float32)
    copy = cache.clone()
    one = torch.ones(1, 1, 1, 4)
    cache.decode()[0].write(one, one)
    cache.advance([1])
    assert copy.length.item() == 0 and copy.keys.abs().sum() == 0


def test_what_a_pass_is_says_its_caller() -> None:
    cache = KVCache.create(1, 2, 1, 4, 4, torch.device("cpu"), torch.float32)
    for tokens, lengths, prefill, decode in ((1, [1, 0], "first", "first"), (1, [1, 1], "prefill", "decode")):
        assert cache.prefill(tokens)[0].kind == prefill and cache.decode()[0].kind == decode
        cache.advance(lengths)
    assert cache.decode()[0].visible is not None  # rows are out of step
    static = cache.decode(span=4)[0]
    assert (
        static.kind == "decode"
        and static.visible is not None
        and static.visible[:, 0, 0].tolist()
        == [
            [True, True, True, False],
            [True, True, False, False],
        ]
    )


def test_a_cache_refuses_more_than_it_holds() -> None:
    cache = KVCache.create(1, 2, 1, 4, 4, torch.device("cpu"), torch.float32)
    cache.advance([3, 1])
    for row, length in ((0, 4), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match=rf"row {row} of the cache holds {[3, 1][row]} tokens .* cut to {length}"):
            cache.truncate(row, length)
    with pytest.raises(ValueError, match="cache of 4 tokens a row cannot hold 5"):
        cache.grow(0, 5)
    cache.truncate(0, 1)
    assert cache.lengths == cache.length.tolist() == [1, 1]


def test_states_at_different_points_are_not_joined() -> None:
    one, other = (ConvState(torch.zeros(1, 2, 3), skip) for skip in (4, 0))
    with pytest.raises(ValueError, match="cannot be joined: one has 0 where another has 4"):
        join_rows([one, other])
    assert join_rows([one, one.clone()]).past.shape == (2, 2, 3)


def moe_config(**changes: object) -> MoEConfig:
    sizes = {"hidden_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return MoEConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def test_router_renormalises_only_if_asked() -> None:
    logits = torch.randn(5, 6)
    ids, weights = topk_softmax(logits, 2, normalise=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    ids_raw, raw = topk_softmax(logits, 2, normalise=False)
    assert torch.equal(ids, ids_raw)
    torch.testing.assert_close(raw, logits.softmax(-1).gather(-1, ids))


def test_the_config_names_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(logits: torch.Tensor, k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(logits.shape[1] - k, logits.shape[1]).expand(len(logits), -1)
        return ids, torch.full(ids.shape, 1 / k if normalise else 1.0)

    monkeypatch.setitem(ROUTERS, "last", last)
    config = moe_config()
    assert MoE(config).gate.select is topk_softmax and config.router is None
    gate = MoE(replace(config, router="last")).gate
    routing = gate(torch.randn(3, config.hidden_size))
    assert routing.ids[0].tolist() == list(range(config.num_experts))[-config.num_experts_per_tok :]
    with pytest.raises(ValueError, match="router 'lst' is not one of topk_softmax, last; add it to"):
        MoE(replace(config, router="lst"))


def test_no_token_is_dropped_even_if_all_want_one_expert() -> None:
    moe = MoE(moe_config())
    initialise(moe, lambda _: 0.3)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[3] = 5.0
    x = torch.rand(1, 50, 16) + 0.1
    alone = torch.cat([moe(x[:, i : i + 1]) for i in range(50)], dim=1)
    torch.testing.assert_close(moe(x), alone, atol=1e-5, rtol=1e-5)


def test_load_balancing_loss() -> None:
    uniform = torch.zeros(64, 8)
    noise = uniform + 1e-6 * torch.randn(64, 8)  # ties broken at random, probabilities stay uniform
    assert load_balancing_loss([noise, noise], 2).item() == pytest.approx(2, abs=1e-3)
    concentrated = uniform.clone()
    concentrated[:, :2] = 4.0
    assert load_balancing_loss([concentrated], 2).item() > 3
    masked = torch.cat((concentrated, noise))
    mask = torch.arange(128) >= 64
    assert load_balancing_loss([masked], 2, mask).item() == pytest.approx(2, abs=1e-3)


def test_initialise_only_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), RMSNorm(4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    initialise(model, lambda _: 0.5, only={"0.weight"})
    after = model.state_dict()
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["0.bias"], after["0.bias"])


def test_a_module_without_a_rule_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(2))

    with pytest.raises(TypeError, match="Odd"):
        initialise(Odd(), lambda _: 0.02)
