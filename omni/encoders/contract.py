"""What an encoder has to do, and what it gets for nothing: the contracts of the audio and the vision encoder.

An audio encoder of one's own needs `forward` and `num_tokens`. Sessions hear it piece by piece all the same: `step` and
`finish` here keep the features of a clip and encode it at its end. An encoder that can answer earlier has its own. One
whose chunks or attention windows may be chosen says which (`chunk_frames`, `window_frames`); they become keywords.

Shapes: C clips, M mel bins, F frames, N tokens of all items (packed), D width of the Thinker.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni.config.decoder import DecoderConfig
from omni.encoders.checks import FRAMES_HZ, check_end, check_open, check_seconds
from omni.layers.state import State


class EncoderOutput(NamedTuple):
    """The tokens of all items (clips, images, videos), packed in the order of the items.

    embeds [N, D] in the Thinker's width; `lengths` are the tokens of each item, with sum N; `taps` are the DeepStack
    features [N, D], one tensor a tap (none for audio).
    """

    embeds: Tensor
    lengths: list[int]
    taps: list[Tensor]


def check_output(encoder: nn.Module, out: Any, decoder: DecoderConfig) -> EncoderOutput:
    """What an encoder returned, if its embeddings and taps suit the decoder. Raises TypeError or ValueError."""
    width, layers = decoder.hidden_size, decoder.num_hidden_layers
    if not isinstance(out, EncoderOutput):
        raise TypeError(f"{type(encoder).__name__} must return an EncoderOutput, got {type(out).__name__}")
    for found in (out.embeds, *out.taps):
        if found.shape != (sum(out.lengths), width):
            raise ValueError(
                f"{type(encoder).__name__} gives {list(found.shape)} for {sum(out.lengths)} tokens; the Thinker reads "
                f"{width} values a token"
            )
    if len(out.taps) > layers:
        raise ValueError(
            f"{type(encoder).__name__} gives {len(out.taps)} taps; the Thinker has {layers} layers to add them to"
        )
    return out


@dataclass
class WholeClipState(State):
    """A clip that is kept until its end: the first `frames` columns of features [M, capacity] are filled."""

    features: Tensor
    frames: int = 0
    finished: bool = False

    def note(self) -> WholeClipState:
        """Shares the frames so far, which nobody writes over."""
        return replace(self)

    def append(self, features: Tensor) -> None:
        """Keep the next frames [M, n]; the room at least doubles, so that many small pieces stay cheap."""
        if not features.shape[1]:
            return
        end = self.frames + features.shape[1]
        if end > self.features.shape[1]:
            grown = features.new_zeros(features.shape[0], max(end, 2 * self.frames))
            if self.frames:
                grown[:, : self.frames] = self.features[:, : self.frames]
            self.features = grown
        self.features[:, self.frames : end] = features
        self.frames = end


def chosen_cuts(encoder: Any, chunk_s: float | None, window_s: float | None) -> dict[str, int]:
    """Chunk and attention window, in seconds (None: the encoder's own), as the keywords `chunk_frames` and
    `window_frames` of an audio encoder's methods, without those that are not chosen.

    Raises TypeError for what is not a number, ValueError for what this encoder cannot have.
    """
    cuts: dict[str, int] = {}
    if chunk_s is not None:
        cuts["chunk_frames"] = encoder.chunk_frames(chunk_s)
    if window_s is not None:
        cuts["window_frames"] = encoder.window_frames(window_s, **cuts)
    return cuts


def count_tokens(encoder: Any, length: int, cuts: Mapping[str, int]) -> int:
    """Tokens of a clip of `length` mel frames, cut as `chosen_cuts` says."""
    chunk = {name: frames for name, frames in cuts.items() if name == "chunk_frames"}
    tokens: int = encoder.num_tokens(length, **chunk)
    return tokens


def joined_cuts(clips: Sequence[Mapping[str, int]]) -> dict[str, int | list[int]]:
    """`chosen_cuts` of each clip as keywords of `forward`: one number where all have it, else a list."""
    lists = {name: [cuts[name] for cuts in clips] for name in (clips[0] if clips else {})}
    return {name: own[0] if len(set(own)) == 1 else own for name, own in lists.items()}


def chosen_rate(num_tokens: Callable[..., int], chunk_frames: int | None, own_frames: int) -> float | None:
    """Tokens a second of sound in chunks that were chosen (48 mel frames: 12.5); None in the encoder's own ones, whose
    positions a second are the release's to say.

    num_tokens: counts as an encoder's method of that name does.
    """
    if chunk_frames is None or chunk_frames == own_frames:
        return None
    return num_tokens(chunk_frames, chunk_frames=chunk_frames) * FRAMES_HZ / chunk_frames


class AudioEncoderContract(nn.Module):
    """Log-mel features of several clips -> packed Thinker embeddings.

    A class of one's own gives the first two methods; the others come as one: with a `step` of its own an encoder has
    `init_state` and `finish`. Where its attention has a window that can be chosen it has `window_frames`, and `forward`
    and `init_state` take a keyword of that name: mel frames, in `forward` of all clips or a list with one a clip. Where
    sound can be cut into other chunks it has `chunk_frames`, likewise a keyword of these two, and of `num_tokens` and
    `window_frames`, which a chunk may change. A keyword is passed only where one was chosen.
    """

    keep_together = True  # on one device: `step` does not pass through the hooks of `forward`
    as_one = ("init_state", "step", "finish")  # an encoder has all of its own, or none

    @abstractmethod
    def forward(self, features: Tensor, lengths: Tensor) -> EncoderOutput:
        """features [C, M, F], right-padded; lengths int64 [C] in mel frames -> embeds [N, D] of all clips.

        What lies beyond a clip's length must not be read, and no clip may change another one's result.
        """

    @abstractmethod
    def num_tokens(self, length: int) -> int:
        """Tokens of a clip of `length` mel frames, which are the embeds that `forward` gives for it."""

    def chunk_frames(self, seconds: float) -> int:
        """Chunks of so many seconds in mel frames, instead of those into which the encoder cuts sound by itself.

        Raises TypeError for what is not a number, ValueError for a chunk that this encoder cannot have.
        """
        check_seconds(seconds, "a chunk of sound")
        raise ValueError(
            f"audio_chunk_s of {seconds:g} s is not possible: {type(self).__name__} has no chunks to be chosen; leave "
            "it out"
        )

    def window_frames(self, seconds: float, chunk_frames: int | None = None) -> int:
        """An attention window of so many seconds in mel frames, for `forward` and `init_state`.

        Raises TypeError for what is not a number, ValueError for a window that this encoder cannot have.
        """
        check_seconds(seconds)
        raise ValueError(
            f"attention window of {seconds:g} s is not possible: {type(self).__name__} encodes whole clips; leave "
            "audio_window_s out"
        )

    def init_state(self, window_frames: int | None = None, chunk_frames: int | None = None) -> Any:
        """The state before the first frame of a clip, a `State` whose fields are tensors and plain values.

        window_frames, chunk_frames: of the methods of these names; None is the encoder's usual way.
        """
        if chunk_frames is not None:
            raise ValueError(
                f"{type(self).__name__} keeps a clip to its end without its chunks of {chunk_frames} frames; give it "
                "init_state, step and finish of its own"
            )
        if window_frames is not None:
            raise ValueError(f"{type(self).__name__} encodes whole clips and has no window of {window_frames} frames")
        like = next(self.parameters(), torch.zeros(0))
        return WholeClipState(like.new_zeros(0, 0))

    @torch.no_grad()
    def step(self, features: Tensor, state: Any) -> Tensor:
        """The next frames [M, n] of a clip, n >= 0 -> the embeds that they complete [m, D], often none.

        The embeds of all steps and of `finish`, joined, are `forward` of the whole clip. Updates `state` in place.
        Raises ValueError for a finished clip.
        """
        check_open(state.finished)
        state.append(features)
        return features.new_zeros(0, 0)

    @torch.no_grad()
    def finish(self, state: Any) -> Tensor:
        """The embeds [m, D] that are left at a clip's end. The state takes no further frames.

        Raises ValueError for a clip without frames; the state is then as it was.
        """
        check_end(state.frames, state.finished)
        state.finished = True
        clip = state.features[None, :, : state.frames]
        out: EncoderOutput = self(clip, torch.tensor([state.frames], device=clip.device))
        return out.embeds


class VisionEncoderContract(nn.Module):
    """Pixel patches of images and videos -> packed Thinker embeddings and DeepStack taps.

    How many tokens an item has is fixed by the config: patches / `spatial_merge_size` squared.
    """

    keep_together = True  # on one device: weights are read where they are shared

    @abstractmethod
    def forward(self, pixels: Tensor, grid_thw: Tensor) -> EncoderOutput:
        """pixels [P, channels * frames * side * side], the patches of all items in the processor's order; grid_thw
        int64 [items, 3] of (t, h, w) in patches -> embeds [N, D], and as many taps [N, D] as the encoder has (or none).
        """
