"""The audio encoder (AuT): log-mel features to Thinker embeddings, 13 tokens a second.

Each clip is cut into chunks of 100 mel frames (released config), three stride-2 convolutions turn a chunk into 13
tokens with positions that restart at 0, and a transformer attends inside windows of several chunks. A chunk never sees
another one before the transformer, and a window never sees another one at all, so a window can be encoded as soon as
it is complete (`step`), and each clip is encoded as if it were alone.

The chunk may be chosen for each clip: any multiple of 8 frames up to the checkpoint's own, or that itself. A multiple
of 8 is what the convolutions turn into tokens of 80 ms each, without a shorter one at its end; the sinusoids of a chunk
that is no longer than the own one are those that were learnt with. 48 frames (0.48 s) give 6 tokens.

Shapes: C clips, M mel bins, F frames, N tokens of all clips (packed), D model width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.encoders import AudioTransformerConfig
from omni.config.qwen3_omni import AudioEncoderConfig
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
from omni.layers.attention_backends import packed_attention
from omni.layers.packing import BlockPasses, PackedBlocks
from omni.layers.state import State

CHUNK_STEP = 8  # mel frames of a token (3 stride-2 convs), of which a chosen chunk is a multiple
_CHUNKS_AT_ONCE = 64  # bounds the memory of the convolutions (64 s of audio, released config)
_CPU_VALUES = 1 << 21  # of the first convolution's output: larger ones leave the cache, and take 2 to 3 times as long
_TOKENS_AT_ONCE = 8192  # bounds the memory of the layers (10 minutes of audio)
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
    """Multi-head self-attention inside consecutive blocks of a packed row; `key_bias`: AuT has one, Whisper has not."""

    def __init__(self, config: AudioTransformerConfig, *, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=key_bias)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, blocks: PackedBlocks) -> Tensor:
        """x [N, D] -> [N, D]."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, blocks).flatten(1))


class AudioLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: AudioTransformerConfig, *, key_bias: bool = True) -> None:
        super().__init__()
        self.self_attn = AudioAttention(config, key_bias=key_bias)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, blocks: PackedBlocks) -> Tensor:
        """x [N, D] -> [N, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), blocks)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:  # the residual stream of the release can leave fp16's range
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


@dataclass(kw_only=True)
class ClipState(State):
    """A clip that comes in pieces. `frames` of its mel frames have come in.

    tail [M, chunk]: its first `held` columns are the frames of the chunk that is not complete.
    """

    tail: Tensor
    held: int = 0
    frames: int = 0
    finished: bool = False

    def take(self, features: Tensor) -> Tensor:
        """The next frames [M, n] -> the frames [M, chunks * chunk] of the chunks that they complete."""
        chunk = self.tail.shape[1]
        self.frames += features.shape[1]
        features = torch.cat((self.tail[:, : self.held], features.to(self.tail)), dim=1)
        whole = features.shape[1] // chunk * chunk
        self.held = features.shape[1] - whole
        self.tail[:, : self.held] = features[:, whole:]
        return features[:, :whole]


@dataclass(kw_only=True)
class AudioEncoderState(ClipState):
    """One clip's open attention window.

    tokens [window, D]: its first `filled` rows are the convolved tokens of the complete chunks.
    """

    tokens: Tensor
    filled: int = 0


class AudioEncoder(AudioEncoderContract):
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

    def num_tokens(self, length: int, chunk_frames: int | None = None) -> int:
        """Tokens of a clip of `length` mel frames, cut into chunks of `chunk_frames` (None: the config's)."""
        return num_audio_tokens(length, self._chunk(chunk_frames))

    def chunk_frames(self, seconds: float) -> int:
        """A chunk in mel frames, for all that takes `chunk_frames`: a multiple of 8 up to the own one, or that itself.

        Raises TypeError for what is not a number, ValueError for any other chunk.
        """
        return chosen_chunk(seconds, self.config.chunk_frames, CHUNK_STEP)

    def window_frames(self, seconds: float, chunk_frames: int | None = None) -> int:
        """An attention window in mel frames, for `forward` and `init_state`.

        Raises TypeError for what is not a number, ValueError unless it is a positive multiple of one chunk (1 s).
        """
        chunk = self._chunk(chunk_frames)
        chunk_s = chunk / FRAMES_HZ
        check_seconds(seconds)
        chunks = round(seconds / chunk_s) if math.isfinite(seconds) else 0
        if chunks < 1 or abs(chunks * chunk_s - seconds) > 1e-6 * seconds:
            raise ValueError(
                f"attention window of {seconds:g} s must be a positive multiple of one chunk of {chunk_s:g} s"
            )
        return chunks * chunk

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | Sequence[int],
        window_frames: int | Sequence[int] | None = None,
        chunk_frames: int | Sequence[int] | None = None,
    ) -> EncoderOutput:
        """features [C, M, F], right-padded; lengths [C] in mel frames -> embeds [N, D_out] of all clips.

        `chunk_frames` are convolved together (default: the config's `2 * n_window`); what may be chosen says the method
        of that name. `window_frames` bounds attention (default: the config's `n_window_infer`, rounded down to whole
        chunks); a shorter window answers earlier while streaming, a longer one hears more context. Each is one number,
        or one for each clip. What lies beyond a clip's length is never read, and no clip changes another one's result.
        Raises ValueError for shapes or lengths that do not fit, for a chunk that cannot be chosen and for a window that
        is not a multiple of a chunk.
        """
        frames = self._check(features, lengths)
        chunks = [self._chunk(n) for n in one_a_clip("chunk_frames", chunk_frames, len(frames))]
        windows = one_a_clip("window_frames", window_frames, len(frames))
        blocks = [self._window_tokens(window, chunk) for window, chunk in zip(windows, chunks)]
        counts = [self.num_tokens(n, chunk) for n, chunk in zip(frames, chunks)]
        if not frames:
            return EncoderOutput(self._no_embeds(), [], [])
        x = torch.cat(self._tokens(features.to(self.conv2d1.weight), frames, chunks))  # [N, D]
        return EncoderOutput(
            self._transform(x, [block for n, window in zip(counts, blocks) for block in split_blocks(n, window)]),
            counts,
            [],
        )

    def init_state(self, window_frames: int | None = None, chunk_frames: int | None = None) -> AudioEncoderState:
        """The state before the first frame of a clip, in the dtype and on the device of the parameters.

        `window_frames` and `chunk_frames` as in `forward`; raises ValueError as there.
        """
        weight, chunk = self.conv2d1.weight, self._chunk(chunk_frames)
        return AudioEncoderState(
            tail=weight.new_zeros(self.config.num_mel_bins, chunk),
            tokens=weight.new_zeros(self._window_tokens(window_frames, chunk), self.config.d_model),
        )

    @torch.no_grad()
    def step(self, features: Tensor, state: AudioEncoderState) -> Tensor:
        """The next frames [M, n] of a clip, n >= 0 -> embeds [m, D_out] of the windows that they complete.

        The embeds of all steps and of `finish`, joined, are `forward` of the whole clip. A chunk is convolved when it
        is complete, so that only the transformer is left to run at the end of a window. Updates `state` in place.
        Raises ValueError for features of another shape and for a finished clip; the state is then as it was.
        """
        check_open(state.finished)
        check_frames(features, self.config.num_mel_bins)
        whole = state.take(features)
        if not whole.shape[1]:
            return self._no_embeds()
        return self._fill_window(self._convolve(cut_chunks(whole, state.tail.shape[1])).flatten(0, 1), state)

    @torch.no_grad()
    def finish(self, state: AudioEncoderState) -> Tensor:
        """The embeds [m, D_out] of the clip's last window. The state takes no further frames.

        Raises ValueError for a clip without frames; the state is then as it was.
        """
        check_end(state.frames, state.finished)
        tokens = state.tokens[: state.filled]
        if state.held:
            # As in `_tokens`: a clip of one short chunk is not padded; a tail chunk is.
            width = min(state.frames, state.tail.shape[1])
            last = self._convolve(cut_chunks(state.tail[:, : state.held], width))[0]
            tokens = torch.cat((tokens, last[: conv_length(state.held)]))
        state.held, state.filled, state.finished = 0, 0, True
        return self._transform(tokens, [len(tokens)]) if len(tokens) else self._no_embeds()

    def _fill_window(self, tokens: Tensor, state: AudioEncoderState) -> Tensor:
        """Take convolved tokens [n, D] into the open window -> embeds of the windows that they complete."""
        window = state.tokens.shape[0]
        tokens = torch.cat((state.tokens[: state.filled], tokens))
        windows, state.filled = divmod(len(tokens), window)
        state.tokens[: state.filled] = tokens[windows * window :]
        if not windows:
            return self._no_embeds()
        return self._transform(tokens[: windows * window], [window] * windows)

    def _no_embeds(self) -> Tensor:
        return self.proj2.weight.new_zeros(0, self.config.output_dim)

    def _transform(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Convolved tokens [N, D] in attention blocks of these lengths, with sum N -> embeds [N, D_out].

        Without gradients, in passes of bounded memory.
        """
        passes = BlockPasses(lengths, None if torch.is_grad_enabled() else _TOKENS_AT_ONCE)
        parts = []
        for numbers in passes:
            blocks = PackedBlocks([lengths[block] for block in numbers], tokens.device)
            x = torch.cat(passes.runs(tokens, numbers))
            for layer in self.layers:
                x = layer(x, blocks)
            parts.append(self.proj2(F.gelu(self.proj1(self.ln_post(x)))))
        return passes.join(parts)

    def _tokens(self, features: Tensor, frames: list[int], sizes: list[int]) -> list[Tensor]:
        """Convolved tokens [n, D] of each clip, in chunks of its size. Chunks of one width share the convolutions."""
        tokens: dict[int, Tensor] = {}
        # A clip of one short chunk is not padded; a tail chunk is.
        widths = [min(n, size) for n, size in zip(frames, sizes)]
        for width in sorted(set(widths)):
            clips = [i for i, w in enumerate(widths) if w == width]
            chunks = [cut_chunks(features[i, :, : frames[i]], width) for i in clips]
            done = self._convolve(torch.cat(chunks)).split([len(c) for c in chunks])
            for i, y in zip(clips, done):
                tokens[i] = y.flatten(0, 1)[: self.num_tokens(frames[i], sizes[i])]
        return [tokens[i] for i in range(len(frames))]

    def _convolve(self, chunks: Tensor) -> Tensor:
        """chunks [c, M, width] -> [c, tokens a chunk, D], positions added."""
        parts = []
        for part in chunks.split(self._chunks_at_once(chunks)):
            y = part[:, None]  # [c, 1, M, width]
            for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
                y = F.gelu(_halved(conv, y))
            parts.append(self.conv_out(rearrange(y, "chunks channels mels t -> chunks t (channels mels)")))
        y = torch.cat(parts)
        return y + sinusoids(y.shape[1], y.shape[2], y.device).to(y.dtype)

    def _chunks_at_once(self, chunks: Tensor) -> int:
        if chunks.device.type != "cpu":
            return _CHUNKS_AT_ONCE
        values = self.conv2d1.out_channels * chunks[0].numel() // 4  # a quarter of the places, for each channel
        return min(max(_CPU_VALUES // max(values, 1), 1), _CHUNKS_AT_ONCE)

    def _chunk(self, chunk_frames: int | None) -> int:
        """The chunk in mel frames. Raises ValueError for one that cannot be chosen."""
        own = self.config.chunk_frames
        return own if chunk_frames is None else chosen_chunk(chunk_frames / FRAMES_HZ, own, CHUNK_STEP)

    def _window_tokens(self, window_frames: int | None, chunk: int) -> int:
        if window_frames is None:
            window_frames = self.config.n_window_infer // chunk * chunk
        if window_frames <= 0 or window_frames % chunk:
            raise ValueError(
                f"attention window of {window_frames} mel frames must be a positive multiple of one chunk of {chunk}"
            )
        return window_frames // chunk * conv_length(chunk)

    def _check(self, features: Tensor, lengths: Tensor | Sequence[int]) -> list[int]:
        """The lengths as a list, after checking them against the features."""
        return check_clips(features, lengths, self.config.num_mel_bins)


def _halved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """One of the convolutions: x [c, channels, M, width] -> half of both axes, rounded up.

    Where one column comes out, torch's bfloat16 kernel for CPUs with AMX reads beyond what it was given (2.13: values
    of any size, NaN among them): two are computed there, with zeros on the right as the padding has them.
    """
    if x.device.type == "cpu" and x.shape[-1] < 3:
        return conv(F.pad(x, (0, 3 - x.shape[-1])))[..., :1]
    return conv(x)


def cut_chunks(clip: Tensor, width: int) -> Tensor:
    """clip [M, F] -> [chunks, M, width], the last chunk padded with zeros."""
    clip = F.pad(clip, (0, -clip.shape[1] % width))
    return rearrange(clip, "mels (chunks width) -> chunks mels width", width=width)


def split_blocks(tokens: int, window: int) -> list[int]:
    """Lengths of the attention blocks of one clip: whole windows, then what remains."""
    whole, rest = divmod(tokens, window)
    return [window] * whole + [rest] * (rest > 0)
