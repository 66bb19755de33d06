"""The audio encoder (AuT): log-mel features to Thinker embeddings, 13 tokens a second.

Each clip is cut into chunks of 100 mel frames (released config), three stride-2 convolutions turn a chunk into 13
tokens with positions that restart at 0, and a transformer attends inside windows of several chunks. A chunk never sees
another one before the transformer, and a window never sees another one at all, so a window can be encoded as soon as
it is complete, and each clip is encoded as if it were alone.

Shapes: C clips, M mel bins, F frames, N tokens of all clips (packed), D model width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config import AudioEncoderConfig
from omni.encoders.output import EncoderOutput
from omni.layers.attention_backends import packed_attention

_CHUNKS_AT_ONCE = 64  # bounds the memory of the convolutions (64 s of audio, released config)
_MAX_TIMESCALE = 10000.0  # of the sinusoids (Vaswani et al., 2017)


def conv_length(length: int) -> int:
    """Length along one axis after the three convolutions (kernel 3, stride 2, padding 1)."""
    for _ in range(3):
        length = (length - 1) // 2 + 1
    return length


def num_audio_tokens(frames: int, chunk_frames: int = 100) -> int:
    """Thinker tokens of a clip of `frames` mel frames: each chunk is convolved by itself, the last may be shorter.

    Released chunk of 100 frames: 100 -> 13, 800 -> 104, 3000 -> 390.
    """
    chunks, rest = divmod(frames, chunk_frames)
    return chunks * conv_length(chunk_frames) + conv_length(rest)


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """Fixed position table, fp32 [length, channels]: the sines of all timescales, then their cosines."""
    half = channels // 2
    step = math.log(_MAX_TIMESCALE) / (half - 1)
    inverse_timescales = torch.exp(-step * torch.arange(half, dtype=torch.float32, device=device))
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inverse_timescales
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class AudioAttention(nn.Module):
    """Multi-head self-attention inside consecutive blocks of a packed row; all projections have biases."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, blocks: list[int]) -> Tensor:
        """x [N, D] -> [N, D]; `blocks` are the block lengths, with sum N."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, blocks).flatten(1))


class AudioLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.self_attn = AudioAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, blocks: list[int]) -> Tensor:
        """x [N, D] -> [N, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), blocks)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:  # the residual stream of the release can leave fp16's range
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class AudioEncoder(nn.Module):
    """Log-mel features of several clips -> packed Thinker embeddings."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.downsample_hidden_size
        self.conv2d1 = nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=1)
        self.conv2d2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.conv2d3 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.conv_out = nn.Linear(channels * conv_length(config.num_mel_bins), config.d_model, bias=False)
        self.layers = nn.ModuleList([AudioLayer(config) for _ in range(config.encoder_layers)])
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj1 = nn.Linear(config.d_model, config.d_model)
        self.proj2 = nn.Linear(config.d_model, config.output_dim)

    def num_tokens(self, length: int) -> int:
        """Tokens of a clip of `length` mel frames."""
        return num_audio_tokens(length, self.config.chunk_frames)

    def forward(
        self, features: Tensor, lengths: Tensor | Sequence[int], window_frames: int | None = None
    ) -> EncoderOutput:
        """features [C, M, F], right-padded; lengths [C] in mel frames -> embeds [N, D_out] of all clips.

        `window_frames` bounds attention (default: the config's `n_window_infer`, rounded down to whole chunks); a
        shorter window answers earlier while streaming, a longer one hears more context. What lies beyond a clip's
        length is never read, and no clip changes another one's result.
        Raises ValueError for shapes or lengths that do not fit and for a window that is not a multiple of a chunk.
        """
        frames = self._check(features, lengths)
        window = self._window_tokens(window_frames)
        counts = [self.num_tokens(n) for n in frames]
        if not frames:
            return EncoderOutput(self.proj2.weight.new_zeros(0, self.config.output_dim), [], [])
        x = torch.cat(self._tokens(features.to(self.conv2d1.weight), frames))  # [N, D]
        blocks = [block for n in counts for block in split_blocks(n, window)]
        for layer in self.layers:
            x = layer(x, blocks)
        embeds = self.proj2(F.gelu(self.proj1(self.ln_post(x))))
        return EncoderOutput(embeds, counts, [])

    def _tokens(self, features: Tensor, frames: list[int]) -> list[Tensor]:
        """Convolved tokens [n, D] of each clip. Clips whose chunks have the same width share the convolutions."""
        chunk = self.config.chunk_frames
        tokens: dict[int, Tensor] = {}
        widths = [min(n, chunk) for n in frames]  # a clip of one short chunk is not padded; a tail chunk is
        for width in sorted(set(widths)):
            clips = [i for i, w in enumerate(widths) if w == width]
            chunks = [cut_chunks(features[i, :, : frames[i]], width) for i in clips]
            done = self._convolve(torch.cat(chunks)).split([len(c) for c in chunks])
            for i, y in zip(clips, done):
                tokens[i] = y.flatten(0, 1)[: self.num_tokens(frames[i])]
        return [tokens[i] for i in range(len(frames))]

    def _convolve(self, chunks: Tensor) -> Tensor:
        """chunks [c, M, width] -> [c, tokens a chunk, D], positions added."""
        parts = []
        for part in chunks.split(_CHUNKS_AT_ONCE):
            y = part[:, None]  # [c, 1, M, width]
            for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
                y = F.gelu(conv(y))
            parts.append(self.conv_out(y.permute(0, 3, 1, 2).flatten(2)))  # channel-major: [c, t, channels * mels]
        y = torch.cat(parts)
        return y + sinusoids(y.shape[1], y.shape[2], y.device).to(y.dtype)

    def _window_tokens(self, window_frames: int | None) -> int:
        chunk = self.config.chunk_frames
        if window_frames is None:
            window_frames = self.config.n_window_infer // chunk * chunk
        if window_frames <= 0 or window_frames % chunk:
            raise ValueError(
                f"attention window of {window_frames} mel frames must be a positive multiple of one chunk of {chunk}"
            )
        return window_frames // chunk * conv_length(chunk)

    def _check(self, features: Tensor, lengths: Tensor | Sequence[int]) -> list[int]:
        """The lengths as a list, after checking them against the features."""
        if features.dim() != 3 or features.shape[1] != self.config.num_mel_bins:
            raise ValueError(
                f"audio features must be [clips, {self.config.num_mel_bins} mel bins, frames], "
                f"got shape {list(features.shape)}"
            )
        frames = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(frames) != features.shape[0]:
            raise ValueError(f"{features.shape[0]} audio clips need as many lengths, got {len(frames)}")
        for clip, n in enumerate(frames):
            if not 1 <= n <= features.shape[2]:
                raise ValueError(
                    f"length of audio clip {clip} is {n} mel frames; it must lie in 1..{features.shape[2]}"
                )
        return frames


def cut_chunks(clip: Tensor, width: int) -> Tensor:
    """clip [M, F] -> [chunks, M, width], the last chunk padded with zeros."""
    clip = F.pad(clip, (0, -clip.shape[1] % width))
    return clip.unflatten(1, (-1, width)).transpose(0, 1)


def split_blocks(tokens: int, window: int) -> list[int]:
    """Lengths of the attention blocks of one clip: whole windows, then what remains."""
    whole, rest = divmod(tokens, window)
    return [window] * whole + [rest] * (rest > 0)
