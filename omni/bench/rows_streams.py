"""Rows on running sessions: real-time streams side by side (p8), and the memory of a long one (p10)."""

from __future__ import annotations

import dataclasses
import threading
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.bench.footprint import cache_bytes_per_token
from omni.bench.result import Growth, Row, Verdict
from omni.bench.sides import FRAME_BY_FRAME
from omni.bench.timing import percentile
from omni.bench.workbench import Workbench
from omni.generation.events import AudioChunk
from omni.generation.streaming_config import StreamingConfig
from omni.layers.cache import KVCache
from omni.model import OmniModel
from omni.packaged.toy import toy_processor
from omni.session.engine import EngineSession, OmniEngine
from omni.session.session import OmniSession

FRAME_S = 0.08
_MOST_SESSIONS = {"cpu": 64, "cuda": 512}


class Load(NamedTuple):
    """How one number of sessions went: gaps between frames in seconds, sessions that ran dry, sound a second."""

    p99_s: float
    underruns: int
    audio_per_s: float

    @property
    def sustained(self) -> bool:
        """Every stream kept up with its own playing."""
        return self.p99_s < FRAME_S and not self.underruns


def run_sessions(model: OmniModel, sessions: int, frames: int) -> Load:
    """`sessions` sessions of one engine that all speak `frames` frames at once, each chunk one frame.

    Nobody paces them: the gaps between frames show what is possible, and playback that starts with a session's first
    frame runs dry if a later one comes after its turn.
    """
    arrivals: list[list[float]] = [[] for _ in range(sessions)]
    processor = toy_processor()
    with OmniEngine(model, processor, max_sessions=sessions, streaming=FRAME_BY_FRAME) as engine:
        talks = [engine.session() for _ in range(sessions)]
        for i, talk in enumerate(talks):
            talk.push_text(f"Question {i}: what is new?")

        def listen(talk: EngineSession, times: list[float]) -> None:
            for event in talk.respond(max_new_tokens=4, max_frames=frames, seed=0):
                if isinstance(event, AudioChunk):
                    times.append(time.perf_counter())

        threads = [threading.Thread(target=listen, args=pair) for pair in zip(talks, arrivals)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    everyone = max(times[0] for times in arrivals)  # from here on all are speaking
    last = max(times[-1] for times in arrivals)
    gaps = [b - a for times in arrivals for a, b in pairwise(times) if a >= everyone]
    dry = [any(t > times[0] + i * FRAME_S for i, t in enumerate(times)) for times in arrivals]
    total = sum(map(len, arrivals)) * FRAME_S
    return Load(percentile(gaps, 0.99) if gaps else last - start, sum(dry), total / (last - start))


def streams(bench: Workbench) -> Row:
    """p8: the most sessions whose frames all come in time."""
    bench.need_frames()
    row = Row("p8", "Real-time streams")
    frames = 6 if bench.options.quick else 40
    most = 2 if bench.options.quick else _MOST_SESSIONS[bench.device.type]
    model = bench.compiled or bench.ours
    run_sessions(model, 1, 4)  # warm-up
    loads: dict[int, Load] = {}
    count, good, bad = 1, 0, most + 1
    while count <= most and bad - good > 1:
        bench.say(f"{count} sessions")
        if bench.compiled is not None:
            run_sessions(model, count, 4)  # each batch size is compiled on its own
        loads[count] = run_sessions(model, count, frames)
        if loads[count].sustained:
            good = count
        else:
            bad = count
        # double until it is too much, then halve the distance as far as an eighth
        count = good * 2 if bad > most else (good + bad) // 2
        if bad <= most and bad - good <= max(1, good // 8):
            break
        count = min(count, most) if count not in loads else most + 1
    x = [float(n) for n in sorted(loads)]
    ordered = [loads[int(n)] for n in x]
    labels = bench.labels(frames=frames, side="compiled" if bench.compiled else "eager")
    row.growths = [
        Growth("p99 time between frames", "sessions", "s", labels, x, {"omni": [load.p99_s for load in ordered]}),
        Growth("sound a second", "sessions", "x", labels, x, {"omni": [load.audio_per_s for load in ordered]}),
    ]
    row.remarks.append(
        f"{good} sessions sustained: p99 time between frames below 80 ms and no playback that ran dry. All sessions "
        "start together and none is paced."
    )
    if bench.device.type == "cuda":
        row.verdicts.append(Verdict("streams sustained", good, ">=", 150, "streams"))
    return row


def tensors_of(root: Any, skip: tuple[type, ...]) -> tuple[int, list[KVCache]]:
    """What an object holds: bytes of all tensors outside key-value caches, and the caches.

    Objects of the types `skip` (the model, the processor) are not entered.
    """
    seen: set[int] = set()
    caches: list[KVCache] = []
    storages: dict[int, int] = {}
    waiting: list[Any] = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (*skip, type, str, bytes, int, float)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, KVCache):
            caches.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif dataclasses.is_dataclass(value) or type(value).__module__.startswith("omni."):
            waiting += vars(value).values() if hasattr(value, "__dict__") else []
    return sum(storages.values()), caches


def long_session(bench: Workbench) -> Row:
    """p10: what a session holds while it listens for minutes."""
    row = Row("p10", "Memory of a long session")
    model, processor = bench.ours, bench.processor
    session = OmniSession(model, processor, streaming=StreamingConfig(audio_window_s=1.0))
    generator = torch.Generator().manual_seed(0)
    step_s, steps = (2, 2) if bench.options.quick else (20, 6)
    x, other, used, formula = [], [], [], []
    text = bench.config.thinker.text_config
    talker = bench.config.talker_config
    assert talker is not None
    size = bench.dtype.itemsize
    speech = talker.text_config
    per_token = cache_bytes_per_token(bench.config, size) + 2 * size * (
        speech.num_hidden_layers * speech.num_key_value_heads * speech.head_size
    )
    for i in range(steps):
        bench.say(f"listening: {(i + 1) * step_s} of {steps * step_s} s")
        for _ in range(step_s):
            session.push_audio(0.1 * torch.randn(16000, generator=generator), 16000)
        bytes_held, caches = tensors_of(session, (OmniModel, type(processor), torch.nn.Module))
        long_lived = [c for c in caches if c.keys.shape[0] in (text.num_hidden_layers, speech.num_hidden_layers)]
        grown = [c for c in long_lived if max(c.lengths) > 0]
        x.append(float((i + 1) * step_s))
        other.append(float(bytes_held))
        used.append(float(sum(max(c.lengths) * c.keys[:, :, :, :1].numel() * 2 * size for c in grown)))
        formula.append(float(per_token * len(session.ids)))
    labels = bench.labels(window="1 s", positions=text.max_position_embeddings)
    curves: dict[str, list[float | None]] = {
        "caches, in use": [*used], "formula: bytes a token x tokens": [*formula], "everything else": [*other]
    }  # fmt: skip
    row.growths.append(Growth("one session", "seconds heard", "B", labels, x, curves))
    row.verdicts.append(Verdict("everything else, last over first", other[-1] / max(1.0, other[0]), "<=", 1.1))
    row.verdicts.append(Verdict("caches in use over the formula", used[-1] / formula[-1], "<=", 1.0))
    row.remarks.append(
        f"{per_token} bytes a token in both caches together; the Talker's holds the user's turns "
        "alone. One hour of it is tested in `tests/test_session_hour.py`."
    )
    return row
