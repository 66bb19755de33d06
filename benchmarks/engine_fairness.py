"""How long a session of an engine waits while others speak, in ticks and milliseconds.

    python benchmarks/engine_fairness.py [--model omni-nano] [--replies 1 4 8] [--trials 20]

For each number of replies that run: what each call of another session waits (median and worst of the trials; a tick is
one step of all replies, at most one frame of each), when the first event of its silent reply comes after its prompt was
read, and the longest time between two chunks of a running reply, undisturbed and while 20 s of sound, a picture of
1920 x 1080 or a long text is pushed at once. All on one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from omni import AudioChunk, OmniEngine, OmniModel, StreamingConfig
from omni.session.engine import EngineSession

SECOND = 16000
LONG = "Tell me a story about the sea, the wind and a little boat. " * 12


class Speakers:
    """Sessions that speak all the time; when each chunk of sound came."""

    def __init__(self, engine: OmniEngine, count: int) -> None:
        self.sessions = [engine.session() for _ in range(count)]
        self.chunks: list[list[float]] = [[] for _ in range(count)]
        self.stop = threading.Event()
        self.began = [threading.Event() for _ in range(count)]
        self.threads = [threading.Thread(target=self.speak, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()
        for began in self.began:
            began.wait()

    def speak(self, number: int) -> None:
        session, told = self.sessions[number], 0
        while not self.stop.is_set():
            session.push_text(f"Say something long about number {number}.")
            told += 1
            for event in session.respond(max_new_tokens=200, seed=told):
                if isinstance(event, AudioChunk):
                    self.chunks[number].append(time.perf_counter())
                    self.began[number].set()
                if self.stop.is_set():
                    break
            else:
                self.chunks[number].append(float("nan"))  # a pause between two replies is no gap
            if told % 4 == 0:
                session.become([])

    def longest_gap(self, since: float) -> float:
        """Of any reply, in milliseconds."""
        gaps = [0.0]
        for times in self.chunks:
            own = [(b - a) * 1000 for a, b in pairwise(times) if b >= since]
            gaps += [gap for gap in own if gap == gap]
        return max(gaps)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        for session in self.sessions:
            session.close()


@contextmanager
def speaking(engine: OmniEngine, count: int) -> Iterator[Speakers]:
    speakers = Speakers(engine, count)
    try:
        yield speakers
    finally:
        speakers.end()


class Waits:
    """What calls waited: ticks that passed meanwhile and milliseconds, by the name of the call."""

    def __init__(self, engine: OmniEngine) -> None:
        self.engine = engine
        self.found: dict[str, list[tuple[int, float]]] = {}
        self.prompt_ticks: list[int] = []  # while the prompt of the silent reply was read

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        ticks, began = self.engine.ticks, time.perf_counter()
        result = call()
        self.found.setdefault(name, []).append((self.engine.ticks - ticks, 1000 * (time.perf_counter() - began)))
        return result

    def print(self) -> None:
        for name, pairs in self.found.items():
            ticks, ms = zip(*pairs)
            print(
                f"  {name:34s} {statistics.median(ticks):5.0f} {max(ticks):5d} "
                f"{statistics.median(ms):9.1f} {max(ms):9.1f}"
            )
        name, read = "silent reply: prompt read after", self.prompt_ticks
        print(f"  {name:34s} {statistics.median(read):5.0f} {max(read):5d}")


def measure_calls(engine: OmniEngine, waits: Waits, trials: int) -> None:
    """Every call of a session that comes and goes while others speak."""
    sound = np.random.default_rng(0).normal(0, 0.05, SECOND // 10).astype(np.float32)
    picture = np.zeros((64, 64, 3), np.uint8)
    for _ in range(trials):
        session: EngineSession = waits.time("session()", engine.session)
        waits.time("push_text", lambda s=session: s.push_text("What is your name?"))
        waits.time("push_audio, 100 ms", lambda s=session: s.push_audio(sound))
        if engine.model.vision_encoder is not None:
            waits.time("push_image, 64 x 64", lambda s=session: s.push_image(picture))
        events = waits.time("respond", lambda s=session: s.respond(max_new_tokens=4, return_audio=False))
        waits.time("first event of a silent reply", lambda e=events: next(e))
        outlet = session._outlet
        assert outlet is not None and outlet.task is not None
        waits.prompt_ticks.append(outlet.task.ended - outlet.task.submitted)
        list(events)
        session.push_text("And a long answer?")
        events = session.respond(max_new_tokens=100)
        waits.time("first event of a spoken reply", lambda e=events: next(e))
        waits.time("interrupt", session.interrupt)
        waits.time("close", session.close)


def measure_gaps(engine: OmniEngine, speakers: Speakers, trials: int) -> None:
    """The longest gap of those that speak, while one session pushes much at once."""
    rng = np.random.default_rng(0)
    pushes: dict[str, Callable[[EngineSession], Any] | None] = {
        "undisturbed": None,
        "a long text": lambda s: s.push_text(LONG),
        "20 s of sound": lambda s: s.push_audio(rng.normal(0, 0.05, 20 * SECOND).astype(np.float32)),
    }
    if engine.model.vision_encoder is not None:
        pushes["a picture of 1920 x 1080"] = lambda s: s.push_image(rng.integers(0, 255, (1080, 1920, 3), np.uint8))
    for name, push in pushes.items():
        gaps = []
        for _ in range(trials):
            since = time.perf_counter()
            if push is None:
                time.sleep(1.0)
            else:
                with engine.session() as session:
                    push(session)
                    next(session.respond(max_new_tokens=1, return_audio=False))
            gaps.append(speakers.longest_gap(since))
        print(f"  longest gap, {name:26s} {statistics.median(gaps):9.1f} {max(gaps):9.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="omni-nano")
    parser.add_argument("--replies", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--prefill-tokens", type=int, default=64, help="the piece: tokens that are read at once")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = OmniModel.from_pretrained(arguments.model, dtype="float32")
    streaming = StreamingConfig(prefill_tokens=arguments.prefill_tokens, loop_frames=None, silence_s=None)
    for replies in arguments.replies:
        engine = OmniEngine(model, max_sessions=replies + 1, streaming=streaming)
        with engine, speaking(engine, replies) as speakers:
            began, ticks = time.perf_counter(), engine.ticks
            waits = Waits(engine)
            measure_calls(engine, waits, arguments.trials)
            tick_ms = 1000 * (time.perf_counter() - began) / max(1, engine.ticks - ticks)
            print(f"{replies} replies run, a tick takes {tick_ms:.1f} ms    ticks: median, worst; ms: median, worst")
            waits.print()
            measure_gaps(engine, speakers, max(3, arguments.trials // 4))


if __name__ == "__main__":
    main()
