"""What `OmniModel.compile` does: choose how steps are run, and run each once so that no turn has to wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from tqdm import tqdm

from omni.generation.arguments import default_codes, default_residual, default_text
from omni.generation.graphs import GraphPool
from omni.generation.rows import Rows
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, TEXT_STREAM, RowSampling, SamplingConfig
from omni.generation.steps import Steps, compiled_steps
from omni.generation.turn_request import GREEDY
from omni.parts import ModelParts

MODES = ("eager", "inductor", "graphs")


def compile_steps(model: ModelParts, mode: str | None, batch_sizes: Sequence[int]) -> None:
    """See `OmniModel.compile`."""
    if mode is None:
        mode = "graphs" if model.device.type == "cuda" else "inductor"
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "graphs" and model.device.type != "cuda":
        raise ValueError(f"mode 'graphs' needs a model on a GPU, this one is on {model.device}; use mode='inductor'")
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes must be whole numbers of at least 1, got {batch_sizes!r}")
    model.require("thinker")
    model.steps = compiled_steps() if mode == "inductor" else Steps()
    model.graphs = GraphPool() if mode == "graphs" else None
    if mode != "eager":
        warm_up(model, sizes)


@torch.no_grad()
def warm_up(model: ModelParts, batch_sizes: Sequence[int]) -> None:
    """Run every step of a turn for each number of rows: greedy, and as a turn samples by default."""
    kinds = [(GREEDY,) * 3, (default_text(model), default_codes(model), default_residual(model))]
    work = [(rows, kind) for rows in batch_sizes for kind in kinds]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lru_cache")  # a table is cached when run as written; that is all
        for rows, kind in tqdm(work, desc="compiling", unit="variant", delay=2, leave=False):
            _run_once(model, rows, kind)


def _run_once(model: ModelParts, rows: int, kind: Sequence[SamplingConfig]) -> None:
    runner = Rows(model, rows).runner
    seeds = torch.zeros(rows, dtype=torch.int64, device=model.device)
    streams = (TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM)
    text, codes, residual = (RowSampling.of([c] * rows, seeds, s) for c, s in zip(kind, streams))
    everyone, nobody = [True] * rows, [False] * rows
    speech = runner.speech if model.code2wav is None or model.talker is not None else None
    for tokens in (0, 100):  # two lengths of the cache, so that the length becomes a variable of the compiled step
        for state in (runner.text, speech):
            if state is not None:
                state.decoder.cache.lengths[:] = [tokens] * rows
                state.decoder.cache.length.fill_(tokens)
        runner.draw_token(text, everyone)
        runner.read_token(everyone)
        if speech is not None:
            runner.frame([0] * rows, everyone, everyone, nobody, (codes, residual))
    if speech is None or model.code2wav is None or model.code2wav.needs_voice:
        return  # a codec that draws whole windows is not compiled
    for size in sorted({1, rows}):
        sound = torch.zeros((size, model.code2wav.num_codebooks, 1), dtype=torch.int64, device=model.device)
        state = model.code2wav.init_state(size)
        for _ in range(4):  # the first frames of a turn have shapes of their own
            runner.decode(sound, state)
        if runner.decodes_sound and size == 1:
            for row in range(rows):
                runner.adopt_sound(row, state)
    if runner.decodes_sound:
        runner.frame([0] * rows, everyone, everyone, everyone, (codes, residual))
