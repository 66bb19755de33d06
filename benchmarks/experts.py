"""The mixture-of-experts block (router and experts) at 1 to 4096 tokens: each backend of omni and of transformers.

Both sides have the same weights and inputs and take turns. Printed for each number of tokens: the milliseconds of omni
as it chooses, its backend, the fastest of transformers, the ratio of the two (above 1: omni is faster), and all others.
A backend that takes a quarter of a second and four times the fastest is not measured at more tokens. The thresholds in
`omni/layers/experts_backends.py` are the crossings in these tables.

    OMP_NUM_THREADS=1 python benchmarks/experts.py
    OMP_NUM_THREADS=1 python benchmarks/experts.py --sizes full --tokens 1 2 4 8 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextSparseMoeBlock

from omni import OmniConfig
from omni.config.decoder import MoEConfig
from omni.layers.experts_backends import EXPERTS, choose_experts
from omni.layers.init import initialise
from omni.layers.moe import MoE, set_experts_backend

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [2**i for i in range(13)]
REFERENCES = ("eager", "batched_mm", "grouped_mm")
HOPELESS, HOPELESS_S = 4.0, 0.25  # times the fastest, seconds
INPUTS = 8  # rotated, so that one token's experts do not stay in the cache


class Timing(NamedTuple):
    """Median seconds of each side at one number of tokens; `chosen` is the backend of the side "omni"."""

    tokens: int
    chosen: str
    seconds: dict[str, float]

    @property
    def fastest_reference(self) -> str:
        return min((s for s in self.seconds if s in REFERENCES), key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """The fastest of transformers over omni."""
        return self.seconds[self.fastest_reference] / self.seconds["omni"]


def sizes(name: str) -> MoEConfig:
    """`bench`: the Thinker of configs/bench.json; `wide`: 128 experts of 512 x 256; `full`: the released sizes."""
    config = OmniConfig.from_pretrained(ROOT / "configs" / "bench.json").thinker_config.text_config
    if name == "bench":
        return config
    width, hidden = {"wide": (512, 256), "full": (2048, 768)}[name]
    return config.replace(hidden_size=width, moe_intermediate_size=hidden, num_experts=128, num_experts_per_tok=8)


def blocks(config: MoEConfig, device: torch.device, dtype: torch.dtype, every: bool) -> dict[str, Any]:
    """omni as it chooses, omni's other backends if `every`, transformers' implementations; one set of weights."""
    torch.manual_seed(0)
    with device:
        block = MoE(config).to(dtype)
    initialise(block, lambda _: 0.05)
    sides: dict[str, Any] = {"omni": block}
    values = {
        name: getattr(config, name)
        for name in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")
    }
    for name in REFERENCES:
        own = Qwen3OmniMoeTextConfig(**values)
        own._experts_implementation = name
        with torch.device("meta"):
            sides[name] = Qwen3OmniMoeThinkerTextSparseMoeBlock(own)
        sides[name].load_state_dict(block.state_dict(), assign=True)
    portable = [name for name in EXPERTS if device.type == "cuda" or not name.startswith("triton")]
    for name in portable if every else ():
        with torch.device("meta"):
            sides[f"omni {name}"] = MoE(config)
        sides[f"omni {name}"].load_state_dict(block.state_dict(), assign=True)
        set_experts_backend(sides[f"omni {name}"], name)
    return sides


def seconds_of(run: Callable[[], object], device: torch.device, calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call, the mean over `calls` in a row."""
    start = clock()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / calls


def step(block: Any, inputs: list[torch.Tensor], grad: torch.Tensor, backward: bool) -> Callable[[], Any]:
    """One pass over the next of the inputs."""
    turn = 0

    def run() -> Any:
        nonlocal turn
        turn += 1
        x = inputs[turn % len(inputs)]
        with torch.set_grad_enabled(backward):
            y = block(x)
            return torch.autograd.grad(y, [x, *block.parameters()], grad) if backward else y

    return run


def measure(
    config: MoEConfig,
    device: torch.device,
    dtype: torch.dtype,
    tokens: list[int],
    *,
    backward: bool,
    every: bool = False,
    rounds: int = 7,
    least_s: float = 0.005,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Median seconds of all sides for each number of tokens; prints each as it comes.

    `every` also times omni's backends one by one; a round of one side lasts at least `least_s` seconds of `clock`.
    """
    sides, out = blocks(config, device, dtype, every), []
    for count in tokens:
        inputs = [torch.randn(1, count, config.hidden_size).to(device, dtype) for _ in range(INPUTS)]
        grad = torch.randn_like(inputs[0])
        for x in inputs:
            x.requires_grad_(backward)
        runs = {name: step(block, inputs, grad, backward) for name, block in sides.items()}
        for run in runs.values():
            run()
        calls = {
            name: max(1, int(least_s / max(seconds_of(run, device, 1, clock), 1e-7))) for name, run in runs.items()
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(seconds_of(run, device, calls[name], clock))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        out.append(Timing(count, _chosen(sides["omni"], inputs[0], backward), medians))
        print(line(out[-1]), flush=True)
        limit = max(HOPELESS * min(medians.values()), HOPELESS_S)
        sides = {name: block for name, block in sides.items() if medians[name] <= limit}
    return out


def _chosen(block: MoE, x: torch.Tensor, backward: bool) -> str:
    with torch.set_grad_enabled(backward):
        flat = x.flatten(0, 1)
        routing = block.gate(flat)
        return choose_experts(flat, routing.ids, routing.weights, block.experts.gate_up_proj, block.experts.down_proj)


def line(timing: Timing) -> str:
    best = timing.fastest_reference
    ms = {name: f"{1e3 * s:.3f}" for name, s in timing.seconds.items()}
    others = ", ".join(f"{name} {ms[name]}" for name in ms if name not in ("omni", best))
    head = f"{timing.tokens:5d}  omni {ms['omni']} ({timing.chosen})  {best} {ms[best]}"
    return f"{head}  ratio {timing.ratio:.2f}" + (f"  [{others}]" if others else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("bench", "wide", "full"), default=["bench", "wide"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", action="store_true", help="also time omni's backends one by one")
    parser.add_argument("--busy", action="store_true", help="the thread's own time: for one thread on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{device}, {options.dtype}, {torch.get_num_threads()} thread(s); milliseconds, medians of {options.rounds}")
    results: dict[str, Any] = {}
    for name in options.sizes:
        for what in options.passes:
            config = sizes(name)
            title = f"{name}: D={config.hidden_size} I={config.moe_intermediate_size} E={config.num_experts}, {what}"
            print(title)
            timings = measure(
                config,
                device,
                dtype,
                options.tokens,
                backward=what == "backward",
                every=options.every,
                rounds=options.rounds,
                clock=time.thread_time if options.busy else time.perf_counter,
            )
            print(f"  worst ratio {min(t.ratio for t in timings):.2f}")
            results[title] = [t._asdict() for t in timings]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
