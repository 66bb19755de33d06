"""`omni bench growth`: how time and memory grow with context, batch, length of sound and number of sessions."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from omni.bench import units
from omni.bench.checkpoint import random_model
from omni.bench.result import Growth, Row
from omni.bench.rows_streams import run_sessions
from omni.bench.timing import peak_memory, seconds_of
from omni.bench.workbench import Workbench
from omni.config.model import OmniConfig

_LAYERS = 4  # of the Thinker: growth is the same in every layer
_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (1, 4, 15, 60, 240, 900, 1800)
_SESSIONS = (1, 2, 4, 8, 16)


def growth(bench: Workbench) -> Row:
    """All four tables, at the config's widths."""
    bench.need_frames()
    quick = bench.options.quick
    row = Row("growth", "How cost grows")
    with torch.no_grad():
        row.growths += context_growth(bench, _CONTEXTS[:2] if quick else _CONTEXTS)
        row.growths.append(batch_growth(bench, _BATCHES[:2] if quick else _BATCHES))
        row.growths += audio_growth(bench, _SECONDS[:2] if quick else _SECONDS)
    row.growths.append(session_growth(bench, _SESSIONS[:2] if quick else _SESSIONS))
    row.remarks.append(
        "The exponent p of cost ~ x^p is fitted over the upper half of the points: 1 is proportional, 0 is flat."
    )
    return row


def _shallow(config: OmniConfig) -> OmniConfig:
    """The config with a Thinker of a few layers, as many as DeepStack needs."""
    values = config.to_dict()
    text, taps = values["thinker_config"]["text_config"], config.thinker.num_taps
    text["num_hidden_layers"] = min(text["num_hidden_layers"], max(_LAYERS, taps))
    values["talker_config"]["accept_hidden_layer"] = 1
    return OmniConfig.from_dict(values)


def context_growth(bench: Workbench, contexts: tuple[int, ...]) -> list[Growth]:
    """Prefill in pieces of 512, its last piece, one decoded token, and memory, after each number of positions."""
    config = _shallow(bench.config)
    text = config.thinker.text_config
    contexts = tuple(n for n in contexts if n <= text.max_position_embeddings)
    thinker: Any = random_model(config, bench.device, bench.dtype).thinker
    state = thinker.init_state(1, 256)
    ids = torch.full((1,), 30, device=bench.device)
    times: dict[str, list[float | None]] = {"prefill, all so far": [], "one token": []}
    memory: dict[str, list[float | None]] = {"cache": [], "prefill's peak over the cache": []}
    spent = 0.0
    for context in contexts:
        bench.say(f"context {context}")
        held = state.cache.keys.numel() * 2 * state.cache.keys.element_size()
        with peak_memory(bench.device) as peak:
            spent += seconds_of(partial(units.fill, thinker, state, 1, context), bench.device)
        size = state.cache.keys.numel() * 2 * state.cache.keys.element_size()
        steps = [seconds_of(lambda: thinker.step(ids, state), bench.device) for _ in range(3 + bench.repeats)]
        times["prefill, all so far"].append(spent)
        times["one token"].append(statistics.median(steps[3:]))
        memory["cache"].append(float(size))
        memory["prefill's peak over the cache"].append(
            None if peak.peak is None else max(0.0, peak.peak - (size - held))
        )
    labels = bench.labels(layers=text.num_hidden_layers, width=text.hidden_size, batch=1)
    x = list(map(float, contexts))
    return [
        Growth("Thinker, time", "positions", "s", labels, x, times),
        Growth("Thinker, memory", "positions", "B", labels, x, memory),
    ]


def batch_growth(bench: Workbench, batches: tuple[int, ...]) -> Growth:
    """A Thinker step and the three parts of a speech frame for a batch of rows with 64 positions each."""
    model = bench.ours
    names = ("Thinker step", "Talker step", "residual codes", "codec frame")
    curves: dict[str, list[float | None]] = {name: [] for name in names}
    for batch in batches:
        steps = (
            units.thinker_step(model, batch, 64),
            units.talker_step(model, batch, 64),
            units.residual_codes(model, batch),
            units.codec_frame(model, batch),
        )
        for name, step in zip(names, steps):
            bench.say(f"batch {batch}: {name}")
            step()
            samples = [seconds_of(step, bench.device) for _ in range(bench.repeats)]
            curves[name].append(statistics.median(samples))
    return Growth("steps", "rows", "s", bench.labels(context=64), list(map(float, batches)), curves)


def audio_growth(bench: Workbench, seconds: tuple[int, ...]) -> list[Growth]:
    """The audio encoder on clips of growing length, in one call."""
    times: list[float | None] = []
    memory: list[float | None] = []
    for length in seconds:
        bench.say(f"audio of {length} s")
        step = units.audio_encoding(bench.ours, length)
        if length == seconds[0]:
            step()
        with peak_memory(bench.device) as peak:
            once = seconds_of(step, bench.device)
        again = [seconds_of(step, bench.device) for _ in range(bench.repeats if once < 2 else 1)]
        times.append(statistics.median([once, *again]))
        memory.append(None if not peak.peak else float(peak.peak))
    labels, x = bench.labels(batch=1), list(map(float, seconds))
    return [
        Growth("audio encoder, time", "seconds of audio", "s", labels, x, {"encode": times}),
        Growth("audio encoder, memory", "seconds of audio", "B", labels, x, {"peak": memory}),
    ]


def session_growth(bench: Workbench, sessions: tuple[int, ...]) -> Growth:
    """The 99th percentile of the time between frames, for sessions of one engine that all speak."""
    run_sessions(bench.ours, 1, 4)  # warm-up
    values: list[float | None] = []
    for count in sessions:
        bench.say(f"{count} sessions")
        values.append(run_sessions(bench.ours, count, 6 if bench.options.quick else 20).p99_s)
    x = list(map(float, sessions))
    return Growth("p99 time between frames", "sessions", "s", bench.labels(), x, {"omni": values})
