"""Code2Wav frame by frame against one-shot decoding of the same codes, with random weights, on the CPU.

Both run in turn in every repeat, so that they meet the same machine; medians are printed. `parameters read`: the time
in which the machine reads the parameters that a frame needs once, below which no single frame can be decoded.

    python benchmarks/codec.py --config bench --threads 1
    python benchmarks/codec.py --config qwen3_omni_30b_a3b --threads 2 --repeats 3
    python benchmarks/codec.py --config bench --threads 1 --compile
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from omni.code2wav.code2wav import Code2Wav, Code2WavState
from omni.config.qwen3_omni import Code2WavConfig

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[Tensor, Code2WavState], Tensor]


@torch.no_grad()
def random_decoder(config: Code2WavConfig) -> Code2Wav:
    """Weights under which the waveform is neither silent nor clipped: a comparison of samples means something."""
    torch.manual_seed(0)
    decoder = Code2Wav(config).eval()
    for name, p in decoder.named_parameters():
        if p.dim() > 1 and "code_embedding" not in name:
            p.normal_(std=0.6 / p[0].numel() ** 0.5)
        elif name.endswith(("alpha", "beta", "bias")):
            p.normal_(std=0.1)
    return decoder


@torch.no_grad()
def measure(
    config: Code2WavConfig, frames: int = 60, rows: int = 1, repeats: int = 5, *, compiled: bool = False
) -> dict[str, float]:
    """Median milliseconds a frame of both ways, the median of their paired ratios, and how far their samples differ."""
    decoder = random_decoder(config)
    codes = torch.randint(config.codebook_size, (rows, config.num_quantizers, frames))
    pieces = [piece.contiguous() for piece in codes.split(1, dim=2)]
    step: Step = torch.compile(decoder.step, fullgraph=True, dynamic=False) if compiled else decoder.step

    def streamed() -> Tensor:
        state = decoder.init_state(rows)
        return torch.cat([decoder.step(pieces[0], state), *(step(piece, state) for piece in pieces[1:])], dim=1)

    start = time.perf_counter()
    wave, whole = streamed(), decoder(codes)
    warm_up_s = time.perf_counter() - start
    shots, streams, reads = [], [], []
    parameters = [p for name, p in decoder.named_parameters() if "code_embedding" not in name]
    for _ in range(repeats):
        shots.append(seconds(lambda: decoder(codes)))
        streams.append(seconds(streamed))
        reads.append(seconds(lambda: [p.sum() for p in parameters]))
    return {
        "one_shot_ms": 1e3 * statistics.median(shots) / frames,
        "streamed_ms": 1e3 * statistics.median(streams) / frames,
        "parameters_read_ms": 1e3 * statistics.median(reads),
        "ratio": statistics.median(b / a for a, b in zip(shots, streams)),
        "largest_difference": float((wave - whole).abs().max()),
        "largest_sample": float(whole.abs().max()),
        "missing_samples": rows * (config.hop_length * frames - decoder.lookahead) - wave.numel(),
        "warm_up_s": warm_up_s,
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="bench", help="a file of configs/, without .json")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (about a minute or two)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    values = json.loads((ROOT / "configs" / f"{args.config}.json").read_text())
    config = Code2WavConfig.from_dict(values["code2wav_config"])
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores, {args}")
    found = measure(config, args.frames, args.rows, args.repeats, compiled=args.compile)
    print(
        f"one shot {found['one_shot_ms']:.2f} ms a frame, frame by frame {found['streamed_ms']:.2f} ms, "
        f"ratio {found['ratio']:.2f}; parameters read {found['parameters_read_ms']:.2f} ms; "
        f"{found['missing_samples']} samples missing, largest difference {found['largest_difference']:.1e} "
        f"of {found['largest_sample']:.2f}; warm-up {found['warm_up_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
