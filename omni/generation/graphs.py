"""Decoding on a GPU without launching kernels one by one: every step is captured once as a CUDA graph and replayed.

A whole speech frame is one graph: the Talker reads the pending frame, codebook 0 and the residual codes are drawn, and
the codec turns them into samples. There is one graph for each number of rows (1, 2, 4, ... up to all), span of the
cache and kind of sampling; all of them work on the same states. Before a graph runs, its inputs are copied into
tensors that it reads; the only wait is for what the host has to see (ids, code 0, samples).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.code2wav.contract import CodecState
from omni.generation.runner import Frame, Runner
from omni.generation.sampling import RowSampling
from omni.layers.cache import KVCache
from omni.parts import ModelParts

Outputs = tuple[Tensor, ...]
Replay = Callable[[], Outputs]
Capture = Callable[[Callable[[], Outputs]], Replay]
_CAPACITY = 1024  # tokens a row at first: a cache that grows moves, and its graphs are captured again


def cuda_graph(step: Callable[[], Outputs]) -> Replay:
    """Capture a step on the current device. It runs twice first, so that its kernels are loaded and tuned.

    Other threads may use the device meanwhile: those of an engine's sessions, in which the encoders run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


class FrameInputs(NamedTuple):
    """The inputs of a frame, views of one int64 tensor [4, B]: text ids, rows that read, that draw, that sound.

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
        pinned = device.type == "cuda"
        self._inputs = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._host_inputs = torch.zeros(4, rows, dtype=torch.int64, pin_memory=pinned)
        self._active = torch.zeros(rows, dtype=torch.bool, device=device)
        self._host_active = torch.zeros(rows, dtype=torch.bool, pin_memory=pinned)
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
        self._addresses: dict[int, int] = {}  # of each cache when its graphs were captured

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
            return (self._draw_token(fixed, self._active[:width]),)

        (ids,) = self._replay(("draw", width, fixed.kind), step, active=active)
        drawn: list[int] = ids.tolist()
        return drawn

    def read_token(self, active: Sequence[bool]) -> None:
        width, cache = self.width(active), self.text.decoder.cache
        span = self.span(cache)

        def step() -> Outputs:
            self._read_token(self._active[:width], span)
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
        assert self.speech is not None
        cache = self.speech.decoder.cache
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
            inputs = FrameInputs(*self._inputs[:, :width])
            if vectors is None:
                text = talker.text_vectors(thinker.embed_tokens(inputs.following))
            else:
                text = vectors[:width]
            self._read_frame(text, inputs.reads.bool(), span)
            drawn = self._draw_frame((codes, residual), inputs.draws.bool())
            if not sounding or codec is None or self._sound is None:
                return (drawn,)
            decodes = inputs.sounds.bool() & inputs.draws.bool()
            for end in ends:
                decodes = decodes & (drawn[:, 0] != end)
            audible = torch.where(decodes[:, None], drawn, 0)[:, :, None]
            return drawn, codec.step(audible, self._sound.rows(0, width), decodes)

        with self.times.stage("frame"):
            key = ("frame", width, span, codes.kind, residual.kind, sounding)
            drawn, *wave = self._replay(key, step, inputs=(following, reads, draws, sounds))
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
        address = cache.keys.data_ptr()
        if self._addresses.setdefault(id(cache), address) != address:  # it has moved, here or while a prompt was read
            self._graphs.clear()
            self._addresses[id(cache)] = address
        return min(cache.capacity, max(128, 1 << cache.longest.bit_length()))

    def _sampling(self, stream: str, sampling: RowSampling) -> RowSampling:
        """The sampling's values in the tensors that graphs of its kind read."""
        key = stream, sampling.kind
        if key not in self._samplings:
            self._samplings[key] = sampling.clone()
        elif self._latest.get(key) is not sampling:
            self._samplings[key].copy_from(sampling)
        self._latest[key] = sampling
        return self._samplings[key]

    def _replay(
        self,
        key: Any,
        step: Callable[[], Outputs],
        active: Sequence[bool] | None = None,
        inputs: tuple[Sequence[Any], ...] | None = None,
    ) -> Outputs:
        """Run a captured step with the given inputs; capture it first if it is new.

        While it is captured no row is active, so that nothing but free slots of the caches changes.
        """
        if key not in self._graphs:
            self._active.zero_()
            self._inputs.zero_()
            self._graphs[key] = self.capture(step)
        if active is not None:
            self._host_active.copy_(torch.tensor(active))
            self._active.copy_(self._host_active, non_blocking=True)
        if inputs is not None:
            self._host_inputs.copy_(torch.tensor(inputs, dtype=torch.int64))
            self._inputs.copy_(self._host_inputs, non_blocking=True)
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
