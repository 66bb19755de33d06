"""The defaults of the audio encoder's contract: a clip that comes in pieces is encoded as a whole at its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omni.encoders.contract import AudioEncoderContract, EncoderOutput, chosen_cuts


class Means(AudioEncoderContract):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)

    def num_tokens(self, length: int) -> int:
        return -(-length // 7)

    def forward(self, features: Tensor, lengths: Tensor) -> EncoderOutput:
        clips = [clip[:, :n].T.split(7) for clip, n in zip(features, lengths.tolist())]
        means = torch.stack([frames.mean(0) for clip in clips for frames in clip])
        return EncoderOutput(self.proj(means), [len(clip) for clip in clips], [])


def clip(frames: int) -> Tensor:
    return torch.randn(6, frames, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [0, 3, 0, 47], [20, 30, 0], [7, 1, 2, 40]])
def test_pieces_equal_the_whole_bit_for_bit(sizes: list[int]) -> None:
    encoder, features = Means(), clip(sum(sizes))
    state = encoder.init_state()
    for piece in features.split(sizes, dim=1):
        assert len(encoder.step(piece, state)) == 0
    embeds = encoder.finish(state)
    assert torch.equal(embeds, encoder(features[None], torch.tensor([50])).embeds)
    assert not embeds.requires_grad
    for late in (lambda: encoder.step(features, state), lambda: encoder.finish(state)):
        with pytest.raises(ValueError, match="this clip is finished"):
            late()


def test_a_clone_goes_on_independently() -> None:
    encoder, features = Means(), clip(40)
    state = encoder.init_state()
    encoder.step(features[:, :10], state)
    twin = state.clone()
    encoder.step(features[:, 10:], state)
    encoder.step(features[:, 20:], twin)
    assert torch.equal(encoder.finish(state), encoder(features[None], torch.tensor([40])).embeds)
    other = torch.cat((features[:, :10], features[:, 20:]), dim=1)
    assert torch.equal(encoder.finish(twin), encoder(other[None], torch.tensor([30])).embeds)


def test_many_pieces_do_not_copy_the_clip_each_time() -> None:
    encoder, state, moved = Means(), Means().init_state(), set()
    for _ in range(1000):
        encoder.step(clip(1), state)
        moved.add(state.features.data_ptr())
    assert state.frames == 1000 and len(moved) <= 11


def test_what_it_refuses() -> None:
    encoder = Means()
    with pytest.raises(ValueError, match="0 mel frames"):
        encoder.finish(encoder.init_state())
    with pytest.raises(ValueError, match="window of 1 s is not possible: Means encodes whole clips; leave"):
        encoder.window_frames(1.0)
    with pytest.raises(TypeError, match="number of seconds"):
        encoder.window_frames("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no window of 100 frames"):
        encoder.init_state(100)
    with pytest.raises(ValueError, match=r"audio_chunk_s of 0.48 s is not possible: Means has no chunks to be chosen"):
        chosen_cuts(encoder, 0.48, None)
    with pytest.raises(TypeError, match="number of seconds"):
        encoder.chunk_frames("1")  # type: ignore[arg-type]
    assert chosen_cuts(encoder, None, None) == {}
    with pytest.raises(ValueError, match="without its chunks of 14 frames; give it init_state, step and finish"):
        encoder.init_state(chunk_frames=14)


def test_a_state_has_the_type_and_the_place_of_the_parameters() -> None:
    assert Means().bfloat16().init_state().features.dtype == torch.bfloat16
