"""Perception against transformers: audio encoder, vision encoder, processor; and attention to a cache, T = 1.

Encoders: both sides have the same random weights and inputs, give the same values (checked first) and take turns.
`bench` is configs/bench.json (narrow), `wide` half the released width with few layers. Processor: four turns, each
with sound and a picture, in one batch. Printed: medians in ms, the ratio (above 1: omni is faster), and the memory
that a call takes beyond what was there, in MB (on Linux). Attention: `cached_attention` against
torch's own grouped-query call with the same mask, and against the plain formulation.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py
    OMP_NUM_THREADS=1 python benchmarks/encoders.py --parts audio vision --sizes wide --runs 5
    OMP_NUM_THREADS=1 python benchmarks/encoders.py --parts attention --dtype bfloat16
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from omni.config.qwen3_omni import AudioEncoderConfig, VisionEncoderConfig
from omni.encoders.audio import AudioEncoder
from omni.encoders.vision import VisionEncoder
from omni.layers.attention_backends import cached_attention
from omni.processing.processor import OmniProcessor

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("audio", "vision", "processor", "attention")
WIDE_AUDIO = {"d_model": 640, "encoder_ffn_dim": 2560, "encoder_attention_heads": 10, "downsample_hidden_size": 240}
WIDE_VISION = {"hidden_size": 576, "intermediate_size": 2152, "num_heads": 8, "out_hidden_size": 1024, "depth": 4}
CLIPS_S = {"30 s": [30], "5 min": [300], "16 clips of 1 to 15 s": [1 + 14 * i // 15 for i in range(16)]}
PICTURES = {
    "image 256x256": [(1, 16, 16)],
    "image 1024x1024": [(1, 64, 64)],
    "video of 64 frames 448x320": [(32, 20, 28)],
    "8 mixed images": [(1, h, w) for h, w in zip((16, 24, 16, 32, 16, 40, 16, 24), (16, 16, 16, 20, 16, 24, 24, 24))],
}
Row = dict[str, Any]


def reset_peak() -> float | None:
    """Start a new peak of resident memory, in MB now; None where the system has no such figure."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def memory(call: Callable[[], Any]) -> float | None:
    """MB of resident memory at the call's peak beyond what was there."""
    before = reset_peak()
    call()
    return None if before is None else resident("VmHWM") - before


def compare(part: str, case: str, runs: int, sides: dict[str, Callable[[], Any]]) -> Row:
    """Median ms of every side, taking turns; the ratio of the best other side to omni.

    A side that takes less than a second is called once untimed before each timed call: the one before it may have left
    the cache cold.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first: dict[str, float] = {}
    for name, call in sides.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
    for _ in range(runs):
        for name, call in sides.items():
            if first[name] < 1:
                call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratio = min(value for name, value in ms.items() if name != "omni") / ms["omni"]
    return {"part": part, "case": case, "ms": ms, "ratio": ratio, "mb": {name: memory(f) for name, f in sides.items()}}


def same(ours: Tensor, theirs: Tensor) -> None:
    """Raise AssertionError unless both sides computed the same (loosely in half precision)."""
    torch.testing.assert_close(ours.float(), theirs.float(), **tolerance(ours.dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}


def sizes(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the audio and vision encoder's configs."""
    thinker = json.loads((ROOT / "configs" / "bench.json").read_text())["thinker_config"]
    audio, vision = thinker["audio_config"], thinker["vision_config"]
    if name == "wide":
        audio |= WIDE_AUDIO | {"encoder_layers": 4}
        vision |= WIDE_VISION | {"deepstack_visual_indexes": [0, 1, 2]}
    return audio, vision


@torch.no_grad()
def measure_audio(size: str, runs: int, dtype: torch.dtype) -> Iterator[Row]:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

    values = sizes(size)[0]
    reference = Qwen3OmniMoeAudioEncoder(Qwen3OmniMoeAudioEncoderConfig(**values)).eval().to(dtype)
    ours = AudioEncoder(AudioEncoderConfig.from_dict(values)).eval().to(dtype)
    ours.load_state_dict(reference.state_dict())
    for case, seconds in CLIPS_S.items():
        frames = [100 * s for s in seconds]
        features = torch.randn(len(frames), 128, max(frames), dtype=dtype)
        joined = torch.cat([clip[:, :n] for clip, n in zip(features, frames)], dim=1)
        lengths = torch.tensor(frames)
        sides = {
            "omni": lambda f=features, n=frames: ours(f, n).embeds,
            "transformers": lambda f=joined, n=lengths: reference(f, feature_lens=n).last_hidden_state,
        }
        same(sides["omni"](), sides["transformers"]())
        yield compare("audio encoder", f"{size}, {case}", runs, sides)


@torch.no_grad()
def measure_vision(size: str, runs: int, dtype: torch.dtype) -> Iterator[Row]:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

    values = sizes(size)[1]
    reference = Qwen3OmniMoeVisionEncoder(Qwen3OmniMoeVisionEncoderConfig(**values)).eval().to(dtype)
    ours = VisionEncoder(VisionEncoderConfig.from_dict(values)).eval().to(dtype)
    ours.load_state_dict(reference.state_dict())
    for case, grids in PICTURES.items():
        grid = torch.tensor(grids)
        pixels = torch.randn(int(grid.prod(1).sum()), 1536, dtype=dtype)
        sides = {
            "omni": lambda p=pixels, g=grid: ours(p, g).embeds,
            "transformers": lambda p=pixels, g=grid: reference(p, g).pooler_output,
        }
        same(sides["omni"](), sides["transformers"]())
        yield compare("vision encoder", f"{size}, {case}", runs, sides)


def measure_processor(runs: int) -> Iterator[Row]:
    folder = ROOT / "omni" / "packaged" / "toy_data"
    ours = OmniProcessor.from_pretrained(folder)
    theirs: Any = transformers.Qwen3OmniMoeProcessor.from_pretrained(str(folder))
    generator = np.random.default_rng(0)
    waves = [generator.normal(0, 0.1, 16000 * s).astype(np.float32) for s in (4, 10, 30, 7)]
    shapes = ((480, 640), (768, 1024), (512, 512), (360, 640))
    pictures = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    messages = [
        [{"role": "user", "content": [{"type": "audio", "audio": w}, {"type": "image", "image": p}]}]
        for w, p in zip(waves, pictures)
    ]

    def reference() -> Any:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return theirs(text=text, audio=waves, images=pictures, return_tensors="pt", padding=True)

    same(ours(messages).pixel_values, reference()["pixel_values"])
    yield compare(
        "processor", "4 x (sound, picture)", runs, {"omni": lambda: ours(messages), "transformers": reference}
    )


@torch.no_grad()
def measure_attention(runs: int, dtype: torch.dtype) -> Iterator[Row]:
    """One new token, 8 heads on 2 key heads of 32 and 32 on 4 of 128."""
    for heads, kv_heads, dim in ((8, 2, 32), (32, 4, 128)):
        for keys in (64, 512, 4096, 32768):
            q = torch.randn(1, heads, 1, dim, dtype=dtype)
            k, v = (torch.randn(1, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
            slots = torch.tensor([[keys - 1]])

            def grouped(q: Tensor = q, k: Tensor = k, v: Tensor = v, slots: Tensor = slots) -> Tensor:
                mask = torch.arange(k.shape[2]) <= slots[:, None, :, None]
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

            sides = {
                "omni": lambda x=(q, k, v, slots): cached_attention(*x),
                "sdpa, grouped": grouped,
                "plain": lambda x=(q, k, v, slots): cached_attention(*x, backend="plain"),
            }
            same(sides["omni"](), grouped())
            case = f"{heads} heads on {kv_heads} x {dim}, {keys} keys"
            yield compare("attention, one token", case, runs * (20 if keys < 10_000 else 3), sides)


def measure(
    parts: tuple[str, ...] = PARTS,
    names: tuple[str, ...] = ("bench", "wide"),
    runs: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Row]:
    """Rows {part, case, ms: {side: median}, ratio, mb: {side: MB or None}}, as they are measured."""
    torch.manual_seed(0)
    for size in names:
        if "audio" in parts:
            yield from measure_audio(size, runs, dtype)
        if "vision" in parts:
            yield from measure_vision(size, runs, dtype)
    if "processor" in parts:
        yield from measure_processor(runs)
    if "attention" in parts:
        yield from measure_attention(runs, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", choices=("bench", "wide"), default=("bench", "wide"))
    parser.add_argument("--runs", type=int, default=3, help="timed calls of each side (default 3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} thread(s)"
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}, {threads}")
    print(f"{args.dtype}\n\n| part | case | ms | ratio | MB |\n|---|---|---|---|---|")
    rows = []
    for row in measure(tuple(args.parts), tuple(args.sizes), args.runs, getattr(torch, args.dtype)):
        ms = ", ".join(f"{name} {value:.4g}" for name, value in row["ms"].items())
        mb = ", ".join("-" if value is None else f"{value:.0f}" for value in row["mb"].values())
        print(f"| {row['part']} | {row['case']} | {ms} | {row['ratio']:.2f} | {mb} |", flush=True)
        rows.append(row)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
