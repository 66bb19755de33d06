"""Weights at low precision: time of a product, of a layer of experts and of Thinker and Talker steps, memory, and
quality, against the same at full precision.

speed: products and experts at the released Thinker's width (2048, expert width 768, 8 experts a token; 32 experts, so
that the weights exceed the caches but not the memory). steps and quality: a model of --config with random weights,
its matrices wide enough that greedy choices differ between prompts; quality is the KL divergence of next-token
distributions and the share of equal choices, in text and in each codebook, when both models read the same turn.

    OMP_NUM_THREADS=2 python benchmarks/quantization.py
    OMP_NUM_THREADS=2 python benchmarks/quantization.py --rows quality --kind int4 --parts thinker talker mtp
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni import OmniConfig, OmniModel
from omni.layers.moe import Experts
from omni.layers.packed_weight import KINDS, PackedWeight
from omni.layers.quantized import DEFAULT_PARTS, QuantizedExperts, QuantizedLinear, quantize
from omni.metrics.agreement import agreement
from omni.packaged.toy import toy_processor

ROOT = Path(__file__).resolve().parent.parent
WIDTH, OUTPUTS, EXPERT_WIDTH, EXPERTS, CHOSEN = 2048, 4096, 768, 32, 8
QUESTIONS = ("Tell me about the river that runs through your town.", "What is the weather like?", "Count to ten.")
ROWS = ("speed", "steps", "quality")


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that all meet the same machine."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compared(row: str, dtype: torch.dtype, tokens: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of results; ratio is full precision over low precision."""
    label = str(dtype).removeprefix("torch.")
    return [
        {
            "row": row,
            "dtype": label,
            "tokens": tokens,
            "kind": kind,
            "ms": 1000 * value,
            "ratio": seconds["full"] / value,
        }
        for kind, value in seconds.items()
    ]


@torch.no_grad()
def speed(kinds: Sequence[str], dtypes: Sequence[torch.dtype], repeats: int) -> list[dict[str, Any]]:
    """A linear layer and a layer of experts at the released width."""
    rows = []
    for dtype in dtypes:
        torch.manual_seed(0)
        linear = nn.Linear(WIDTH, OUTPUTS, bias=False, dtype=dtype)
        experts = Experts(EXPERTS, WIDTH, EXPERT_WIDTH).to(dtype)
        experts.initialise(0.02)
        layers: dict[str, tuple[nn.Module, nn.Module]] = {"full": (linear, experts)}
        for kind in kinds:
            packed = QuantizedExperts()
            packed.gate_up = PackedWeight.pack(experts.gate_up_proj, kind)
            packed.down = PackedWeight.pack(experts.down_proj, kind)
            layers[kind] = QuantizedLinear(PackedWeight.pack(linear.weight, kind)), packed
        for tokens in (1, 4, 64):
            x = torch.randn(tokens, WIDTH, dtype=dtype)
            runs = {kind: (lambda layer=layer, x=x: layer(x)) for kind, (layer, _) in layers.items()}
            rows += compared("linear 2048 -> 4096", dtype, tokens, medians(runs, repeats))
            turns = [  # other experts each time: their weights are not in a cache
                (torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)]),) for _ in range(8)
            ]
            weights = torch.full((tokens, CHOSEN), 1 / CHOSEN, dtype=dtype)

            def all_turns(layer: nn.Module, x: torch.Tensor = x, turns: Any = turns, w: torch.Tensor = weights) -> None:
                for (ids,) in turns:
                    layer(x, ids, w)

            runs = {kind: (lambda layer=layer: all_turns(layer)) for kind, (_, layer) in layers.items()}
            seconds = medians(runs, max(3, repeats // 3))
            rows += compared("8 of 32 experts", dtype, tokens, {k: s / len(turns) for k, s in seconds.items()})
    return rows


def build(config: Path, dtype: torch.dtype) -> OmniModel:
    """A random model with the packaged processor."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("code2wav"):
                parameter.mul_(3)
    model.processor = toy_processor()
    return model.to(dtype)


def nbytes(model: nn.Module) -> int:
    """Of all weights."""
    return sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())


@torch.no_grad()
def steps(
    kinds: Sequence[str], dtypes: Sequence[torch.dtype], config: Path, repeats: int, parts: Sequence[str]
) -> list[dict[str, Any]]:
    """One Thinker step and one Talker step of a whole model after 64 tokens, and the bytes of Thinker and Talker."""
    rows = []
    for dtype in dtypes:
        models = {"full": build(config, dtype)}
        for kind in kinds:
            models[kind] = copy.deepcopy(models["full"])
            quantize(models[kind], kind, parts)
        for part in ("thinker", "talker"):
            width = getattr(models["full"].config, f"{part}_config").text_config.hidden_size
            runs = {}
            for kind, model in models.items():
                module = getattr(model, part)
                state = module.init_state(1, 256)
                module(torch.randn(1, 64, width, dtype=dtype), torch.arange(64.0).expand(3, 1, 64), state)
                step = torch.tensor([5]) if part == "thinker" else torch.randn(1, width, dtype=dtype)
                runs[kind] = lambda module=module, step=step, state=state: module.step(step, state)
            found = compared(f"{part} step", dtype, 1, medians(runs, repeats))
            for row in found:
                row["weights_mb"] = nbytes(getattr(models[row["kind"]], part)) / 1e6
            rows += found
    return rows


def quality(kinds: Sequence[str], dtype: torch.dtype, config: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement of each kind, and of plain bf16, with the model at `dtype`."""
    reference = build(config, dtype)
    assert reference.processor is not None
    inputs = reference.processor([[{"role": "user", "content": text}] for text in QUESTIONS])
    rows = []
    for kind in ("bfloat16", *kinds):
        model = copy.deepcopy(reference)
        if kind == "bfloat16":
            model.to(torch.bfloat16)
        else:
            quantize(model, kind, parts)
        found = agreement(model, reference, inputs, max_new_tokens=24, max_frames=40)
        rows.append({"row": "quality", "kind": kind, "parts": list(parts), **vars(found), "table": found.table()})
    return rows


def measure(
    rows: Sequence[str] = ROWS,
    kinds: Sequence[str] = KINDS,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    config: Path = ROOT / "configs" / "bench.json",
    parts: Sequence[str] = DEFAULT_PARTS,
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """All rows asked for."""
    found: list[dict[str, Any]] = []
    if "speed" in rows:
        found += speed(kinds, dtypes, repeats)
    if "steps" in rows:
        found += steps(kinds, dtypes, config, repeats, parts)
    if "quality" in rows:
        found += quality(kinds, dtypes[0], config, parts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "bench.json")
    parser.add_argument("--parts", nargs="+", default=list(DEFAULT_PARTS), help="default: thinker talker")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="F", help="also write the rows to a file")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), batch 1")
    dtypes = [getattr(torch, name) for name in args.dtype]
    rows = measure(args.rows, args.kind, dtypes, args.config, args.parts, args.repeats)
    for row in rows:
        if row["row"] == "quality":
            print(f"\n{row['kind']} ({', '.join(row['parts'])}) against {args.dtype[0]}\n{row['table']}")
            continue
        size = f"{row['weights_mb']:>9.0f} MB" if "weights_mb" in row else ""
        label = f"{row['row']:<21}{row['dtype']:<10}{row['tokens']:>4} token(s)  {row['kind']:<6}"
        print(f"{label}{row['ms']:>9.3f} ms{row['ratio']:>7.2f}x{size}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
