"""The Whisper-shaped audio encoder of Qwen2.5-Omni: log-mel features to Thinker embeddings, 25 tokens a second.

Each clip is cut into blocks of 200 mel frames (released config, 2 s). Two convolutions, the second of stride 2, turn a
block into 100 positions that restart at 0; a transformer attends inside the block; pairs of positions are averaged into
50 tokens. Blocks never see each other, so that one can be encoded as soon as it is complete (`step`), each clip is
encoded as if it were alone, and nothing has to be padded to a common length.
Sources: Whisper (Radford et al., 2022), Qwen2-Audio (Chu et al., 2024), Qwen2.5-Omni (Xu et al., 2025).

Shapes: C clips, M mel bins, F frames, B blocks, N positions of all blocks (packed), D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.qwen2_5_omni import WhisperAudioEncoderConfig
from omni.encoders.audio import AudioLayer, ClipState, sinusoids
from omni.encoders.checks import (
    FRAMES_HZ,
    check_clips,
    check_end,
    check_frames,
    check_open,
    check_seconds,
    chosen_chunk,
    one_a_clip,
)
from omni.encoders.contract import AudioEncoderContract, EncoderOutput
from omni.layers.packing import BlockPasses, PackedBlocks

_POSITIONS_AT_ONCE = 8192  # bounds the memory of convolutions and layers (164 s of audio)


def num_positions(frames: int) -> int:
    """Positions of `frames` mel frames after the convolution of stride 2 (kernel 3, padding 1)."""
    return (frames - 1) // 2 + 1


def num_whisper_tokens(frames: int, chunk_frames: int = 200) -> int:
    """Thinker tokens of a clip of `frames` mel frames: one for each whole pair of positions, however it is cut.

    100 -> 25, 400 -> 100, 3000 -> 750. A clip of 1 or 2 frames has a single position and no token.
    """
    return num_positions(frames) // 2


def average_pairs(x: Tensor, blocks: PackedBlocks) -> Tensor:
    """Means of neighbouring pairs [N / 2, D] of x [N, D]; a block of odd length drops its last position."""
    parts = []
    for start, length, count in blocks.runs:
        run = x[start : start + length * count].unflatten(0, (count, length))
        parts.append(reduce(run[:, : length // 2 * 2], "blocks (pairs two) d -> (blocks pairs) d", "mean", two=2))
    return torch.cat(parts)


class WhisperAudioEncoder(AudioEncoderContract):
    """Log-mel features of several clips -> packed Thinker embeddings."""

    def __init__(self, config: WhisperAudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList([AudioLayer(config, key_bias=False) for _ in range(config.encoder_layers)])
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.output_dim)
        # The release holds it and nothing reads it: it is here so that a checkpoint comes back complete.
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim).requires_grad_(False)

    def num_tokens(self, length: int, chunk_frames: int | None = None) -> int:
        """Tokens of a clip of `length` mel frames. chunk_frames: None, or the frames of a block."""
        self._check_cuts(None, chunk_frames)
        return num_whisper_tokens(length)

    def chunk_frames(self, seconds: float) -> int:
        """A chunk in mel frames: the only one there is, a block.

        Raises TypeError for what is not a number, ValueError for any other length.
        """
        return chosen_chunk(seconds, self.config.chunk_frames, None)

    def window_frames(self, seconds: float, chunk_frames: int | None = None) -> int:
        """An attention window in mel frames, for `forward` and `init_state`: the only one there is, a block.

        Raises TypeError for what is not a number, ValueError for any other length.
        """
        check_seconds(seconds)
        block_s = self.config.chunk_frames / FRAMES_HZ
        if not abs(seconds - block_s) <= 1e-6 * block_s:
            raise ValueError(
                f"attention window of {seconds:g} s is not possible: this encoder attends in blocks of {block_s:g} s"
            )
        return self.config.chunk_frames

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | Sequence[int],
        window_frames: int | Sequence[int] | None = None,
        chunk_frames: int | Sequence[int] | None = None,
    ) -> EncoderOutput:
        """features [C, M, F], right-padded; lengths [C] in mel frames -> embeds [N, D_out] of all clips.

        What lies beyond a clip's length is never read, and no clip changes another one's result. `window_frames` and
        `chunk_frames` are here for the encoders' common contract: None, or the frames of a block.
        Raises ValueError for shapes or lengths that do not fit and for another window or chunk.
        """
        frames = check_clips(features, lengths, self.config.num_mel_bins)
        for cuts in zip(
            one_a_clip("window_frames", window_frames, len(frames)),
            one_a_clip("chunk_frames", chunk_frames, len(frames)),
        ):
            self._check_cuts(*cuts)
        if not frames:
            return EncoderOutput(self._no_embeds(), [], [])
        features = features.to(self.conv1.weight)
        clips = [clip[:, :n].split(self.config.chunk_frames, dim=1) for clip, n in zip(features, frames)]
        embeds = self._encode([block for blocks in clips for block in blocks])
        return EncoderOutput(embeds, [self.num_tokens(n) for n in frames], [])

    def init_state(self, window_frames: int | None = None, chunk_frames: int | None = None) -> ClipState:
        """The state before the first frame of a clip, in the dtype and on the device of the parameters.

        `window_frames` and `chunk_frames` as in `forward`; raises ValueError as there.
        """
        self._check_cuts(window_frames, chunk_frames)
        return ClipState(tail=self.conv1.weight.new_zeros(self.config.num_mel_bins, self.config.chunk_frames))

    @torch.no_grad()
    def step(self, features: Tensor, state: ClipState) -> Tensor:
        """The next frames [M, n] of a clip, n >= 0 -> embeds [m, D_out] of the blocks that they complete.

        The embeds of all steps and of `finish`, joined, are `forward` of the whole clip. Updates `state` in place.
        Raises ValueError for features of another shape and for a finished clip; the state is then as it was.
        """
        check_open(state.finished)
        check_frames(features, self.config.num_mel_bins)
        whole = state.take(features)
        return self._encode(list(whole.split(self.config.chunk_frames, dim=1))) if whole.shape[1] else self._no_embeds()

    @torch.no_grad()
    def finish(self, state: ClipState) -> Tensor:
        """The embeds [m, D_out] of the clip's last block. The state takes no further frames.

        Raises ValueError for a clip without frames; the state is then as it was.
        """
        check_end(state.frames, state.finished)
        rest = state.tail[:, : state.held]
        state.held, state.finished = 0, True
        return self._encode([rest]) if rest.shape[1] else self._no_embeds()

    def _no_embeds(self) -> Tensor:
        return self.proj.weight.new_zeros(0, self.config.output_dim)

    def _encode(self, blocks: list[Tensor]) -> Tensor:
        """Blocks, each [M, 1 .. chunk] -> their embeds [N, D_out]. Without gradients, in passes of bounded memory."""
        counts = [num_positions(block.shape[1]) for block in blocks]
        passes = BlockPasses(counts, None if torch.is_grad_enabled() else _POSITIONS_AT_ONCE)
        parts = []
        for numbers in passes:
            packed = PackedBlocks([counts[i] for i in numbers], blocks[0].device)
            x = self._convolve([blocks[i] for i in numbers], packed.lengths)
            for layer in self.layers:
                x = layer(x, packed)
            parts.append(self.proj(self.ln_post(average_pairs(x, packed))))
        return passes.join(parts, merged=2)

    def _convolve(self, blocks: list[Tensor], counts: list[int]) -> Tensor:
        """Blocks -> their positions [N, D], with sinusoids added; `counts` are the positions of each block."""
        widths = [block.shape[1] for block in blocks]
        widest = max(widths)
        x = torch.stack([F.pad(b, (0, widest - b.shape[1])) if b.shape[1] < widest else b for b in blocks])
        x = F.gelu(self.conv1(x))  # [B, D, widest]
        if min(widths) < widest:  # behind a block's end the next convolution sees zeros, as it would in the block alone
            inside = torch.arange(widest, device=x.device) < torch.tensor(widths, device=x.device)[:, None]
            x = x * inside[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [B, widest / 2, D]
        x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        if min(counts) == x.shape[1]:
            return x.flatten(0, 1)
        return torch.cat([row[:count] for row, count in zip(x, counts)])

    def _check_cuts(self, window_frames: int | None, chunk_frames: int | None) -> None:
        block = self.config.chunk_frames
        if window_frames not in (None, block):
            raise ValueError(
                f"attention window of {window_frames} mel frames is not possible: this encoder attends in blocks of "
                f"{block}; leave the window out"
            )
        if chunk_frames not in (None, block):
            raise ValueError(
                f"chunks of {chunk_frames} mel frames are not possible: this encoder cuts sound into blocks of "
                f"{block}; leave the chunk out"
            )
