"""Decoding on a GPU without launching kernels one by one: every step is captured once as a CUDA graph and replayed.

A whole speech frame is one graph: the Talker reads the waiting frame, codebook 0 and the residual codes are drawn, and
the codec turns them into samples. There is one graph for each number of rows (1, 2, 4, ... up to all), span of the
cache and kind of sampling; all of them work on the same states. Before a graph runs, its inputs are copied to places
that it knows; the only wait is for what the host has to see (ids, code 0, samples).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.code2wav.contract import CodecState
from omni.generation.decode import draw_frame, draw_token, read_frame, read_token
from omni.generation.runner import Frame, Runner
from omni.generation.sampling import RowSampling
from omni.layers.cache import KVCache
from omni.parts import ModelParts

Outputs = tuple[Tensor, ...]
Replay = Callable[[], Outputs]
Capture = Callable[[Callable[[], Outputs]], Replay]
_CAPACITY = 1024  # tokens a row at first: a cache that grows moves, and its graphs are captured again


def cuda_graph(step: Callable[[], Outputs]) -> Replay:
    """Capture a step on the current device. It runs twice first, so that its kernels are loaded and tuned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


class FrameInputs(NamedTuple):
    """What a frame is told, views of one int64 tensor [4, B]: text ids, rows that read, that draw, that sound.

    Where text enters by hidden states too, its vectors come in a tensor of their own instead of ids.
    """

    following: Tensor
    reads: Tensor
    draws: Tensor
    sounds: Tensor


class GraphRunner(Runner):
    """A runner whose steps are captured; `capture` makes a replayable step of a function."""

    def __init__(self, model: ModelParts, rows: int, capacity: int, capture: Capture = cuda_graph) -> None:
        super().__init__(model, rows, max(capacity, _CAPACITY))
        device = model.device
        self.capture = capture
        self._told = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._telling = torch.zeros(4, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._active = torch.zeros(rows, dtype=torch.bool, device=device)
        self._activating = torch.zeros(rows, dtype=torch.bool, pin_memory=device.type == "cuda")
        by_hidden = self.layout is not None and self.layout.text_by_hidden
        self._vectors = torch.zeros_like(self.speech.frame) if by_hidden and self.speech is not None else None
        codec = model.code2wav
        self._sound: CodecState | None = None
        if self.speech is not None and codec is not None and codec.static_step:
            self._sound = codec.init_state(rows)
        self.decodes_sound = self._sound is not None
        self._samplings: dict[Any, RowSampling] = {}
        self._latest: dict[Any, RowSampling] = {}
        self._graphs: dict[Any, Replay] = {}
        self._places: dict[int, int] = {}  # where each cache was when its graphs were captured

    def reset(self) -> None:
        """Forget all rows, for the next user of the memory."""
        for state in (self.text, self.speech):
            if state is not None:
                state.decoder.cache.length.zero_()
                state.decoder.cache.lengths[:] = [0] * len(state.decoder.cache.lengths)
                state.decoder.next_position.zero_()
                state.seen.zero_()
                state.steps.zero_()
        self.times = type(self.times)(self.model.device)

    def draw_token(self, sampling: RowSampling, active: Sequence[bool]) -> list[int]:
        width = self.width(active)
        fixed = self._sampling("text", sampling)

        def step() -> Outputs:
            mask = self._active[:width]
            self._ids[:width] = draw_token(self.steps, self.text.rows(0, width), fixed.rows(0, width), mask)
            return (self._ids[:width],)

        (ids,) = self._replay(("draw", width, fixed.kind), step, active=active)
        drawn: list[int] = ids.tolist()
        return drawn

    def read_token(self, active: Sequence[bool]) -> None:
        width, cache = self.width(active), self.text.decoder.cache
        span = self.span(cache)

        def step() -> Outputs:
            state = self.text.rows(0, width)
            read_token(self.steps, self.model.require("thinker"), state, self._ids[:width], self._active[:width], span)
            return ()

        self._replay(("read", width, span), step, active=active)
        cache.count(active)

    def frame(
        self,
        following: Sequence[int] | Sequence[Tensor],
        reads: Sequence[bool],
        draws: Sequence[bool],
        sounds: Sequence[bool],
        samplings: tuple[RowSampling, RowSampling],
    ) -> Frame | None:
        assert self.speech is not None and self.banned is not None
        speech, banned, cache = self.speech, self.banned, self.speech.decoder.cache
        width = self.width([r or d for r, d in zip(reads, draws)])
        span = self.span(cache)
        codes, residual = self._sampling("codes", samplings[0]), self._sampling("residual", samplings[1])
        thinker, talker, codec = self.model.require("thinker"), self.model.require("talker"), self.model.code2wav
        sounding = any(sounds)
        ends, vectors = sorted(talker.config.codec_stop_ids), self._vectors
        if vectors is not None:
            vectors.copy_(self.text_vectors(following))
            following = [0] * len(following)

        def step() -> Outputs:
            told = FrameInputs(*self._told[:, :width])
            state = speech.rows(0, width)
            if vectors is None:
                text = talker.text_vectors(thinker.embed_tokens(told.following))
            else:
                text = vectors[:width]
            read_frame(self.steps, talker, state, text, told.reads.bool(), span)
            drawn = draw_frame(
                self.steps, talker, state, codes.rows(0, width), residual.rows(0, width), banned, told.draws.bool()
            )
            if not sounding or codec is None or self._sound is None:
                return (drawn,)
            heard = told.sounds.bool() & told.draws.bool()
            for end in ends:
                heard = heard & (drawn[:, 0] != end)
            audible = torch.where(heard[:, None], drawn, 0)[:, :, None]
            return drawn, codec.step(audible, self._sound.rows(0, width), heard)

        with self.times.stage("frame"):
            key = ("frame", width, span, codes.kind, residual.kind, sounding)
            drawn, *wave = self._replay(key, step, told=(following, reads, draws, sounds))
        cache.count(reads)
        if not any(draws):
            return None
        return Frame(drawn.clone(), drawn[:, 0].tolist(), wave[0].float().cpu() if wave else None)

    def adopt_sound(self, row: int, state: CodecState) -> None:
        assert self._sound is not None
        self._sound.write_row(row, state)

    def width(self, active: Sequence[bool]) -> int:
        """The smallest power of two that covers the active rows, or all rows."""
        needed = max(row for row, is_active in enumerate(active) if is_active) + 1
        return min(len(active), 1 << (needed - 1).bit_length())

    def span(self, cache: KVCache) -> int:
        """Make room for one more token of each row; slots that a step looks at: powers of two from 128 on, or all."""
        cache.reserve(1)
        place = cache.keys.data_ptr()
        if self._places.setdefault(id(cache), place) != place:  # it has moved, here or while a prompt was read
            self._graphs.clear()
            self._places[id(cache)] = place
        return min(cache.capacity, max(128, 1 << cache.longest.bit_length()))

    def _sampling(self, stream: str, sampling: RowSampling) -> RowSampling:
        """The sampling's values in the place that graphs of its kind read."""
        place = stream, sampling.kind
        if place not in self._samplings:
            self._samplings[place] = sampling.clone()
        elif self._latest.get(place) is not sampling:
            self._samplings[place].copy_from(sampling)
        self._latest[place] = sampling
        return self._samplings[place]

    def _replay(
        self,
        key: Any,
        step: Callable[[], Outputs],
        active: Sequence[bool] | None = None,
        told: tuple[Sequence[Any], ...] | None = None,
    ) -> Outputs:
        """Run a captured step with the given inputs; capture it first if it is new.

        While it is captured no row is active, so that nothing but free places of the caches changes.
        """
        if key not in self._graphs:
            self._active.zero_()
            self._told.zero_()
            self._graphs[key] = self.capture(step)
        if active is not None:
            self._activating.copy_(torch.tensor(active))
            self._active.copy_(self._activating, non_blocking=True)
        if told is not None:
            self._telling.copy_(torch.tensor(told, dtype=torch.int64))
            self._told.copy_(self._telling, non_blocking=True)
        return self._graphs[key]()


class GraphPool:
    """Graph runners that wait for their next user, so that a turn finds its graphs captured."""

    def __init__(self, capture: Capture = cuda_graph) -> None:
        self.capture = capture
        self._idle: dict[int, list[GraphRunner]] = {}
        self._weights: tuple[int, ...] = ()

    def take(self, user: object, model: ModelParts, rows: int, capacity: int) -> GraphRunner:
        """A runner for `rows` rows; it comes back when `user` is gone."""
        weights = tuple(p.data_ptr() for p in model.parameters())
        if weights != self._weights:  # graphs read the weights where they were when captured
            self._idle, self._weights = {}, weights
        waiting = self._idle.get(rows)
        runner = waiting.pop() if waiting else GraphRunner(model, rows, capacity, self.capture)
        runner.reset()
        weakref.finalize(user, self._give_back, runner, weights)
        return runner

    def _give_back(self, runner: GraphRunner, weights: tuple[int, ...]) -> None:
        if weights == self._weights:
            self._idle.setdefault(len(runner._ids), []).append(runner)
