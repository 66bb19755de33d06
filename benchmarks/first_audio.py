"""Time to the first sample of a five-second answer: `OmniModel.stream` against transformers' `generate`.

Both load one checkpoint folder with random weights (`configs/bench.json`: the released depths at small widths) and give
greedy replies of equal length to the same prompt: 20 tokens of text, 63 frames of speech. transformers returns all
sound at the end, so its first sample comes with the last.

    OMP_NUM_THREADS=1 python benchmarks/first_audio.py
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from omni import AudioChunk, OmniConfig, OmniInputs, OmniModel, SamplingConfig, TextDelta
from omni.demo import demo_processor

ROOT = Path(__file__).resolve().parent.parent
FRAMES, TOKENS = 63, 20
SAMPLES = FRAMES * 1920 - 555  # the first frame gives 555 samples fewer
QUESTION = "Tell me about the river that runs through your town."
GREEDY = SamplingConfig(temperature=0)


class Run(NamedTuple):
    """Seconds to the first sound, seconds to the end, and the ids of the reply."""

    first_s: float
    total_s: float
    ids: list[int]


def write_checkpoint(folder: Path) -> None:
    """A random model, its matrices wide enough that greedy replies do not stop early."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "bench.json"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("code2wav"):
                parameter.mul_(5)
    model.processor = demo_processor()
    model.save_pretrained(folder)


def ours(folder: Path, inputs: OmniInputs) -> Callable[[], Run]:
    """Runs one turn of omni."""
    model = OmniModel.from_pretrained(folder, device="cpu")

    def run() -> Run:
        start, first_s, samples, ids = time.perf_counter(), 0.0, 0, list[int]()
        for event in model.stream(
            inputs,
            max_new_tokens=TOKENS,
            max_frames=FRAMES,
            speaker="Ethan",
            audio_sampling=SamplingConfig(temperature=0, repetition_penalty=1.05),
            residual_sampling=GREEDY,
        ):
            if isinstance(event, AudioChunk):
                first_s = first_s or time.perf_counter() - start
                samples += event.samples.numel()
            elif isinstance(event, TextDelta):
                ids += event.token_ids
        assert samples == SAMPLES, f"{samples} samples instead of {SAMPLES}: the answer ended early"
        return Run(first_s, time.perf_counter() - start, ids)

    return run


def theirs(folder: Path, inputs: OmniInputs) -> Callable[[], Run]:
    """The same of transformers."""
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder).eval()
    arguments: dict[str, Any] = {
        "thinker_max_new_tokens": TOKENS,
        "thinker_do_sample": False,
        "thinker_eos_token_id": 258,
        "talker_max_new_tokens": FRAMES + 1,  # it counts the prompt's last token too
        "talker_do_sample": False,
        "speaker": "ethan",
    }

    def run() -> Run:
        start = time.perf_counter()
        sequences, wave = model.generate(
            input_ids=inputs.input_ids, attention_mask=torch.ones_like(inputs.input_ids), **arguments
        )
        seconds = time.perf_counter() - start
        assert wave.numel() == SAMPLES, f"{wave.numel()} samples instead of {SAMPLES}: the answer ended early"
        return Run(seconds, seconds, sequences[0, inputs.input_ids.shape[1] :].tolist())

    return run


def report(name: str, runs: list[Run]) -> float:
    """Print medians -> the median of the seconds to the first sound."""
    first_s, total_s = statistics.median(r.first_s for r in runs), statistics.median(r.total_s for r in runs)
    each = ", ".join(f"{r.first_s:.3f}" for r in runs)
    print(f"{name}: first audio {first_s:.3f} s ({each}), whole answer {total_s:.2f} s")
    return first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), {SAMPLES / 24000:.2f} s of speech")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder)
        inputs = demo_processor()([{"role": "user", "content": QUESTION}])
        both = ours(folder, inputs), theirs(folder, inputs)
        for run in both:  # warm-up
            run()
        runs = [[run() for run in both] for _ in range(repeats)]  # in turn, so that both meet the same machine
    our_runs, their_runs = map(list, zip(*runs))
    assert our_runs[0].ids == their_runs[0].ids and len(our_runs[0].ids) == TOKENS, "the replies differ"
    first_s, reference_s = report("omni stream", our_runs), report("transformers generate", their_runs)
    print(f"ratio: 1/{reference_s / first_s:.0f}")


if __name__ == "__main__":
    main()
