"""The row on the mixture-of-experts block (p5): router and experts, one token to thousands, forward and backward."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omni.bench.checkpoint import read_config
from omni.bench.result import Growth, Row, Verdict
from omni.bench.sides import EXPERTS, peer_class
from omni.bench.timing import enough_calls, seconds_of, take_turns
from omni.bench.workbench import Workbench, first_line
from omni.config.decoder import MoEConfig
from omni.layers.init import initialise
from omni.layers.moe import MoE

_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_INPUTS = 8  # rotated, so that one token's experts do not stay in the cache
_HOPELESS = 8.0  # times the fastest: not measured at more tokens


def experts(bench: Workbench) -> Row:
    """p5: the block against every experts implementation of transformers that runs here."""
    row = Row("p5", "Mixture-of-experts block")
    bench.drop_models()
    config: Any = read_config(bench.options.config).thinker.text_config
    wide = config.replace(hidden_size=512, moe_intermediate_size=256, num_experts=128, num_experts_per_tok=8)
    sizes = {bench.options.config.stem: config} | ({} if bench.options.quick else {"128 experts of 256": wide})
    for name, c in sizes.items():
        for backward in (False, True):
            row.growths.append(_curve(bench, row, name, c, backward))
    for growth in row.growths:
        worst = min(_lead(growth))
        row.verdicts.append(Verdict(f"{growth.title}: fastest of transformers' over ours, worst", worst, ">=", 0.95))
    row.remarks.append(
        "Medians of runs in turns; results and gradients agree before they are timed. What takes over "
        f"{_HOPELESS:.0f} times the fastest is not measured at more tokens."
    )
    return row


def _lead(growth: Growth) -> list[float]:
    """At each number of tokens, the fastest of the others over ours."""
    others = [values for name, values in growth.curves.items() if name != "omni"]
    out = []
    for i, own in enumerate(growth.curves["omni"]):
        best = min((v for values in others if (v := values[i]) is not None), default=None)
        if best is not None and own:
            out.append(best / own)
    return out


def _peers(config: MoEConfig, block: MoE) -> dict[str, Any]:
    """transformers' block once for each implementation, all on our block's own tensors."""
    peer_class("qwen3_omni_moe")
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as theirs
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

    out = {}
    for name in EXPERTS:
        values: Any = Qwen3OmniMoeTextConfig()
        for key in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"):
            setattr(values, key, getattr(config, key))
        values._experts_implementation = name
        with torch.device("meta"):
            peer = theirs.Qwen3OmniMoeThinkerTextSparseMoeBlock(values)
        peer.load_state_dict(block.state_dict(), assign=True)
        out[name] = peer
    return out


def _pass(module: Any, inputs: list[Tensor], weight: Tensor, backward: bool) -> Callable[[], Any]:
    """One pass over the next of the inputs; with `backward` the gradients of the input and of all parameters."""
    parameters = [p.requires_grad_() for _, p in sorted(module.named_parameters())]
    turn = itertools.cycle(inputs)

    def run() -> Any:
        x = next(turn)
        if not backward:
            with torch.no_grad():
                return module(x)
        y = (module(x.requires_grad_()) * weight).sum()
        return torch.autograd.grad(y, [x, *parameters])

    return run


def _curve(bench: Workbench, row: Row, name: str, config: MoEConfig, backward: bool) -> Growth:
    torch.manual_seed(0)
    block = MoE(config).to(bench.device, bench.dtype)
    initialise(block, lambda _: 0.05)
    blocks: dict[str, Any] = {"omni": block, **_peers(config, block)}
    tokens = _TOKENS[:3] if bench.options.quick else _TOKENS
    curves: dict[str, list[float | None]] = {side: [] for side in blocks}
    for count in tokens:
        shape = (_INPUTS, 1, count, config.hidden_size)
        inputs = list(torch.randn(shape).to(bench.device, bench.dtype).unbind(0))
        weight = torch.randn_like(inputs[0])
        expected = _pass(block, inputs, weight, backward)()
        runs: dict[str, Any] = {}
        for side, module in list(blocks.items()):
            once = _pass(module, inputs, weight, backward)
            try:
                got = once()
            except Exception as error:  # an implementation that does not run here
                row.remarks.append(f"{side} does not run here: {first_line(error)}")
                del blocks[side]
                continue
            _check_equal(got, expected, bench.dtype)
            runs[side] = partial(seconds_of, once, bench.device, enough_calls(once, bench.device))
        rounds = take_turns(runs, bench.repeats, progress=bench.say)
        medians = {side: statistics.median(s for one in samples for s in one) for side, samples in rounds.items()}
        for side, values in curves.items():
            values.append(medians.get(side))
        fastest = min(medians.values())
        blocks = {s: m for s, m in blocks.items() if s == "omni" or (s in medians and medians[s] < _HOPELESS * fastest)}
    title = f"{name}, {'forward and backward' if backward else 'forward'}"
    labels = bench.labels(
        width=config.hidden_size, experts=config.num_experts, chosen=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
    )  # fmt: skip
    return Growth(title, "tokens", "s", labels, list(map(float, tokens)), {k: v for k, v in curves.items() if any(v)})


def _check_equal(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Results of both sides agree in float32. Raises AssertionError."""
    if dtype == torch.float32:
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected))):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
