"""Time and memory of loading a checkpoint folder: `OmniModel.from_pretrained` against transformers' own.

Every run is a process of its own. It first loads a small checkpoint, so that lazy imports do not count, then the one
that is measured, with its files in the page cache. `load s` is that second call without a processor, `process s` all of
the process from its start, imports included; `peak` is the growth of the process's anonymous memory (RssAnon: mapped
files are not in it) while loading, in bytes of the weights kept.

    OMP_NUM_THREADS=2 python benchmarks/loading.py --checkpoint bench --checkpoint deep --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("omni", "transformers")
# Changes to configs/bench.json's Thinker. deep: the release's 48 layers of 128 experts, 18,432 tensors, 2.4 GB in bf16;
# wide: expert matrices of the release's size (2048 x 768), 4 layers of 64 experts, 2.4 GB.
CHECKPOINTS: dict[str, dict[str, int]] = {
    "bench": {},
    "deep": {"num_experts": 128, "hidden_size": 512, "moe_intermediate_size": 128},
    "wide": {"num_experts": 64, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 4},
}


def write_checkpoint(folder: Path, kind: str, dtype: str, max_shard_size: str) -> None:
    """A folder with random weights, one tensor an expert as the release has it."""
    import torch

    from omni import OmniConfig, OmniModel

    values = json.loads((ROOT / "configs" / ("tiny.json" if kind == "tiny" else "bench.json")).read_text())
    thinker = values["thinker_config"]
    thinker["text_config"].update(CHECKPOINTS.get(kind, {}))
    width = thinker["text_config"]["hidden_size"]
    thinker["audio_config"]["output_dim"] = thinker["vision_config"]["out_hidden_size"] = width
    depth = thinker["text_config"]["num_hidden_layers"]
    talker = values["talker_config"]
    talker["thinker_hidden_size"] = width
    talker["accept_hidden_layer"] = min(talker["accept_hidden_layer"], depth)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = OmniModel(OmniConfig.from_dict(values))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """(what `work` returns, its seconds, the most its anonymous memory grew)."""
    peaks, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return result, seconds, max(*peaks, anonymous_bytes()) - peaks[0]


def run_side(side: str, small: str, folder: str, dtype: str) -> None:
    """The child process: load both folders, print one line of JSON."""
    load: Callable[[str], Any]
    if side == "omni":
        from omni import OmniModel

        def load(name: str) -> Any:
            return OmniModel.from_pretrained(name, device="cpu", dtype=dtype)
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

        def load(name: str) -> Any:
            return transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(name, dtype=dtype).eval()

    _, first_s, _ = watched(lambda: load(small))
    model, load_s, peak = watched(lambda: load(folder))
    kept = sum(t.nbytes for t in {t.data_ptr(): t for t in model.parameters()}.values())
    print(json.dumps({"load_s": load_s, "first_s": first_s, "peak": peak, "kept": kept}))


def run(side: str, small: Path, folder: Path, dtype: str) -> dict[str, float]:
    """One child process's figures."""
    arguments = ["--side", side, str(small), str(folder), "--dtype", dtype]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"loading with {side} failed: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": time.perf_counter() - start}


def measure(
    checkpoints: Sequence[str] = ("bench",),
    saved: str = "bfloat16",
    dtypes: Sequence[str] = ("auto",),
    max_shard_size: str = "5GB",
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """One row a checkpoint, dtype asked for, and side: medians of load_s and process_s, largest peak, bytes kept."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "tiny"
        write_checkpoint(small, "tiny", saved, max_shard_size)
        for kind in checkpoints:
            folder = Path(name) / kind
            write_checkpoint(folder, kind, saved, max_shard_size)
            shards = sorted(folder.glob("*.safetensors"))
            for shard in shards:  # into the page cache
                with shard.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            for dtype in dtypes:
                runs = [{side: run(side, small, folder, dtype) for side in SIDES} for _ in range(repeats)]  # in turn
                for side in SIDES:
                    own = [r[side] for r in runs]
                    rows.append(
                        {
                            "checkpoint": kind,
                            "saved": saved,
                            "dtype": dtype,
                            "shards": len(shards),
                            "side": side,
                            "load_s": statistics.median(r["load_s"] for r in own),
                            "process_s": statistics.median(r["process_s"] for r in own),
                            "peak_bytes": max(r["peak"] for r in own),
                            "kept_bytes": own[0]["kept"],
                        }
                    )
            shutil.rmtree(folder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", choices=sorted(CHECKPOINTS), help="default: bench")
    parser.add_argument("--saved", default="bfloat16", help="dtype of the files (default: bfloat16)")
    parser.add_argument("--dtype", action="append", help="dtype asked for (default: auto); may be repeated")
    parser.add_argument("--max-shard-size", default="5GB", help="default: 5GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="F", help="also write the rows to a file")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "SMALL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(*args.side, dtype=args.dtype[0])
        return
    rows = measure(args.checkpoint or ["bench"], args.saved, args.dtype or ["auto"], args.max_shard_size, args.repeats)
    import torch
    import transformers

    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), files in the page cache")
    print(
        f"{'checkpoint':<11}{'saved':<10}{'dtype':<10}{'shards':>6}  {'side':<13}{'load s':>8}{'process s':>11}", end=""
    )
    print(f"{'kept MB':>9}{'peak':>8}")
    for r in rows:
        print(
            f"{r['checkpoint']:<11}{r['saved']:<10}{r['dtype']:<10}{r['shards']:>6}  {r['side']:<13}{r['load_s']:>8.2f}"
            f"{r['process_s']:>11.2f}{r['kept_bytes'] / 1e6:>9.0f}{r['peak_bytes'] / r['kept_bytes']:>7.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
