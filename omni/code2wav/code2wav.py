"""Code2Wav: frames of residual codes to a waveform, in one call or frame by frame.

The embeddings of a frame's codes are averaged, a windowed transformer mixes the frames, and causal convolutions
upsample them to samples: x2 x2 (ConvNeXt), then x8 x5 x4 x3 (Snake blocks), which makes 1920 samples of 24 kHz for a
frame of 80 ms (released config). A checkpoint of omni's own may bring another way from the transformer to samples,
`source_filter`, which is then taken instead of the convolutions.

Shapes: B rows, K codebooks, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni.code2wav.contract import SAMPLE_RATE_HZ, CodecDecoder, CodecState
from omni.code2wav.conv import (
    CausalConv1d,
    CausalConvTranspose1d,
    ChainState,
    ConvNeXtBlock,
    ConvState,
    DecoderBlock,
    StreamingChain,
    StreamingSnake,
)
from omni.code2wav.source_filter import SourceFilter, SourceFilterState
from omni.code2wav.window_transformer import WindowState, WindowTransformer
from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.state import State

_FRAMES_AT_ONCE = 256  # bounds the memory of decoding without gradients (20 s of speech, released config)


@dataclass
class Code2WavState(CodecState):
    """What decoding remembers of the frames so far. Make a fresh one for each turn."""

    transformer: WindowState
    upsample: ChainState
    decoder: ChainState | SourceFilterState

    @property
    def started(self) -> bool:
        """Whether the samples that the first call lacks lie behind; known on the host."""
        return not any(part.skip for part in _parts(self) if isinstance(part, ConvState))

    def write_row(self, row: int, one: Code2WavState) -> None:
        """Overwrite a row with a started state of one row, in place; the batch counts as started from then on.

        Raises ValueError for a state that has not started.
        """
        if not one.started:
            raise ValueError(f"the state for row {row} has not started; a row joins a batch after its first frame")
        for mine, new in zip(_parts(self), _parts(one)):
            for name, value in vars(mine.rows(row, row + 1)).items():  # views of this batch's memory
                if isinstance(value, Tensor):
                    value.copy_(getattr(new, name))
                else:
                    setattr(mine, name, getattr(new, name))

    def read_row(self, row: int) -> Code2WavState:
        """A copy of one row."""
        return self.rows(row, row + 1).clone()


def _parts(state: State) -> Iterator[State]:
    """The states of single layers, in order."""
    inside = (
        state.layers if isinstance(state, ChainState) else [v for v in vars(state).values() if isinstance(v, State)]
    )
    for part in inside:
        yield from _parts(part)
    if not inside:
        yield state


class Code2Wav(CodecDecoder):
    """The codec decoder.

    The released weights are trained with transposed convolutions that are trimmed at both ends: T frames give
    hop_length * T - lookahead samples, each of which looks `lookahead` samples (555, 23 ms) ahead. With
    `strict_causal` they are trimmed at the end only: hop_length * T samples, no lookahead, and the same waveform later
    by that much once the first few frames are over.

    by_convolutions: set it to hear what libraries that know of no `source_filter` make of the same codes.
    """

    by_convolutions = False

    static_step = True
    sample_rate = SAMPLE_RATE_HZ

    def __init__(self, config: Code2WavConfig, *, strict_causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.strict_causal = strict_causal
        self.hop_length, self.num_codebooks = config.hop_length, config.num_quantizers
        dim, channels = config.hidden_size, config.decoder_dim
        self.code_embedding = nn.Embedding(config.codebook_size * config.num_quantizers, dim)
        self.pre_transformer = WindowTransformer(config)
        self.upsample = StreamingChain(
            StreamingChain([CausalConvTranspose1d(dim, dim, kernel_size=ratio, stride=ratio), ConvNeXtBlock(dim)])
            for ratio in config.upsampling_ratios
        )
        layers: list[nn.Module] = [CausalConv1d(dim, channels, kernel_size=7)]
        for rate in config.upsample_rates:
            layers.append(DecoderBlock(channels, channels // 2, rate, trim_start=not strict_causal))
            channels //= 2
        layers += [StreamingSnake(channels), CausalConv1d(channels, 1, kernel_size=7)]
        self.decoder = StreamingChain(layers)
        source = config.source_filter
        self.source_filter: SourceFilter | None = None
        if source is not None:
            self.source_filter = SourceFilter(source, dim, self.hop_length, self.sample_rate)

    @property
    def sounding(self) -> SourceFilter | None:
        """The source and filter that codes are sounded by; None for convolutions."""
        return None if self.by_convolutions else self.source_filter

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        """Samples of the future that a sample depends on, which are also missing from the first call's output."""
        if self.sounding is not None:
            return 0
        samples = 0
        for rate in self.config.upsample_rates:  # a block upsamples what is missing and trims `rate` samples more
            samples = samples * rate + (0 if self.strict_causal else rate)
        return samples

    def forward(self, codes: Tensor) -> Tensor:
        """codes int64 [B, K, T] -> samples in -1 .. 1 [B, hop_length * T - lookahead] (none for T = 0).

        Without gradients a long signal is decoded in pieces, which bounds memory and changes nothing. Raises
        ValueError for a wrong number of codebooks and for codes out of range.
        """
        self._check(codes)
        self._check_range(codes)
        frames = codes.shape[2]
        if frames == 0:
            return self.code_embedding.weight.new_zeros(codes.shape[0], 0)
        if frames > _FRAMES_AT_ONCE and not torch.is_grad_enabled():
            state = self.init_state(codes.shape[0])
            return torch.cat([self.step(piece, state) for piece in codes.split(_FRAMES_AT_ONCE, dim=2)], dim=1)
        return self.decode_embeddings(self._embed(codes)).clamp(-1, 1)

    def init_state(self, batch_size: int) -> Code2WavState:
        """The state before the first frame, in the dtype and on the device of the parameters."""
        mixed = self.pre_transformer.init_state(batch_size)
        if self.sounding is not None:
            return Code2WavState(mixed, ChainState([]), self.sounding.init_state(batch_size))
        return Code2WavState(mixed, self.upsample.init_state(batch_size), self.decoder.init_state(batch_size))

    @torch.no_grad()
    def step(self, codes: Tensor, state: Code2WavState, active: Tensor | None = None) -> Tensor:
        """The next n >= 1 frames, codes int64 [B, K, n] -> [B, hop_length * n] samples; updates `state` in place.

        The first call returns `lookahead` samples less; joined, all calls equal one `forward`. Rows that are False in
        `active` (bool [B], on the device) stand still: their codes, which must be in range, are not heard, their
        samples mean nothing and their state goes on where it was; this needs a state that has `started`. The codes'
        range is checked on a CPU only: elsewhere the check would wait for the device in every frame. Once started, a
        step reads nothing back from the device and keeps the state's tensors where they are: it can be captured.
        """
        self._check(codes)
        if codes.shape[2] == 0 or codes.shape[0] != state.transformer.frames.shape[0]:
            raise ValueError(
                f"step needs codes of {state.transformer.frames.shape[0]} rows and at least one frame, "
                f"got shape {list(codes.shape)}"
            )
        if codes.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(codes)
        if active is not None and not state.started:
            raise ValueError(
                f"rows can stand still only once the state has started, and this one still lacks samples of its "
                f"{self.lookahead} of lookahead; step all rows together first, or start a row alone and write_row it"
            )
        active = None if active is None else active[:, None, None]
        return self.decode_embeddings(self._embed(codes), state, active).clamp(-1, 1)

    def decode_embeddings(self, x: Tensor, state: Code2WavState | None = None, active: Tensor | None = None) -> Tensor:
        """Mean code embeddings x [B, T, D], of a whole signal or with a state of its next frames -> [B, samples].

        The samples are not yet limited to -1 .. 1. active bool [B, 1, 1]: as in `step`.
        """
        mixed = upsampled = decoded = None
        if state is not None:
            mixed, upsampled, decoded = state.transformer, state.upsample, state.decoder
        x = self.pre_transformer(x, mixed, active).transpose(1, 2)  # [B, D, T]
        if self.sounding is not None:
            return self.sounding(x, decoded, active)
        return self.decoder(self.upsample(x, upsampled, active), decoded, active)[:, 0]

    def _embed(self, codes: Tensor) -> Tensor:
        """Mean embedding of each frame's codes [B, T, D]; codebook q lies at q * codebook_size in the one table."""
        offsets = torch.arange(self.num_codebooks, device=codes.device)[:, None] * self.config.codebook_size
        return self.code_embedding(codes + offsets).mean(1)

    def _check(self, codes: Tensor) -> None:
        if codes.dim() != 3 or codes.shape[1] != self.num_codebooks:
            raise ValueError(
                f"codes must have shape [rows, {self.num_codebooks} codebooks, frames], got {list(codes.shape)}"
            )
        if codes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"codes must be int64, got {codes.dtype}")

    def _check_range(self, codes: Tensor) -> None:
        size = self.config.codebook_size
        outside = (codes < 0) | (codes >= size)
        if outside.any():
            row, book, frame = outside.nonzero()[0].tolist()
            raise ValueError(
                f"code {codes[row, book, frame].item()} at row {row}, codebook {book}, frame {frame} lies outside "
                f"0..{size - 1}; control codes such as the end code must be removed before decoding"
            )
