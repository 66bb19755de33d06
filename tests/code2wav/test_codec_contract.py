"""The defaults of a codec decoder's contract, and what a decoder of one's own may add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from omni import OmniModel, StreamingConfig
from omni.code2wav.contract import CodecDecoder, CodecState
from omni.generation.graphs import GraphPool, Outputs, Replay
from omni.generation.rows import Rows

GREEDY: dict[str, Any] = {
    "audio_sampling": {"temperature": 0, "repetition_penalty": 1.3},
    "residual_sampling": {"temperature": 0},
    "max_new_tokens": 5,
    "max_frames": 7,
}


@dataclass
class Sum(CodecState):
    """The sum of all first codes so far, fp64 [B]."""

    total: Tensor

    @property
    def started(self) -> bool:
        return True

    def write_row(self, row: int, one: Any) -> None:
        self.total[row] = one.total[0]


class Steps(CodecDecoder):
    """Each frame is a level: the running sum of code 0."""

    sample_rate, hop_length, num_codebooks, lookahead = 16000, 100, 16, 0

    def init_state(self, batch_size: int) -> Any:
        return Sum(torch.zeros(batch_size, dtype=torch.float64))

    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Tensor:
        heard = codes[:, 0].double() if active is None else codes[:, 0].double() * active[:, None]
        levels = heard.cumsum(1) + state.total[:, None]
        state.total.copy_(levels[:, -1])
        return (levels / 1e6).float().repeat_interleave(self.hop_length, dim=1)


class Held(Steps):
    """Gives everything a frame late."""

    def init_state(self, batch_size: int) -> Any:
        return [super().init_state(batch_size), torch.zeros(batch_size, 0)]

    def step(self, codes: Tensor, state: Any, active: Tensor | None = None) -> Tensor:
        wave = torch.cat((state[1], super().step(codes, state[0])), dim=1)
        state[1] = wave[:, -self.hop_length :]
        return wave[:, : -self.hop_length]

    def finish(self, state: Any) -> Tensor:
        return state[1]


class Static(Steps):
    static_step = True


CODES = torch.randint(0, 100, (2, 16, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", [Steps(), Held()])
def test_the_whole_is_the_steps_and_the_end(codec: CodecDecoder) -> None:
    whole = codec(CODES)
    assert whole.shape == (2, 900) and torch.equal(whole, Steps()(CODES))
    state = codec.init_state(2)
    pieces = [codec.step(piece, state) for piece in CODES.split([1, 3, 5], dim=2)]
    torch.testing.assert_close(torch.cat([*pieces, codec.finish(state).expand(2, -1)], dim=1), whole)


def test_the_numbers_that_follow_from_others() -> None:
    codec = Steps()
    assert codec.frame_rate == 160.0 and codec.missing_samples == 0 and not codec.needs_voice and not codec.static_step
    assert CodecState().received == 0 and not CodecState().started
    with pytest.raises(NotImplementedError, match="CodecState has no write_row"):
        CodecState().write_row(0, CodecState())


class Recorder:
    """Stands in for a CUDA graph on a CPU."""

    captured = 0

    def __call__(self, step: Callable[[], Outputs]) -> Replay:
        self.captured += 1
        step()
        return step


@pytest.mark.parametrize("kind", [Steps, Held, Static])
@pytest.mark.parametrize("captured", [False, True])
def test_rows_sound_as_they_would_alone(model: OmniModel, kind: type[CodecDecoder], captured: bool) -> None:
    """In a batch and in a stream; with captured steps, where a decoder says so its frames are decoded inside them."""
    before, model.code2wav = model.code2wav, kind()
    try:
        batch = model.processor([[{"role": "user", "content": text}] for text in ("hi", "a longer question", "three")])
        plain = model.generate(batch, **GREEDY)
        for row in range(3):
            expected = Steps()(plain.codes[row][None])[0]
            assert torch.equal(plain.audio[row], expected)
        model.graphs = GraphPool(capture=Recorder()) if captured else None
        assert Rows(model, 3).runner.decodes_sound == (captured and kind is Static)
        sound: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        for event in model.stream(batch, streaming=StreamingConfig(chunk_frames=(1, 2)), **GREEDY):
            if hasattr(event, "samples"):
                sound[event.row].append(event.samples)
        for row in range(3):
            assert torch.equal(torch.cat(sound[row]), plain.audio[row])
    finally:
        model.graphs, model.code2wav = None, before
