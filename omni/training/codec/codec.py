"""The speech codec as one trainable module: waveform -> encoder -> residual quantiser -> Code2Wav -> waveform.

The quantiser has no parameters of its own: codebook k is rows k * size .. (k + 1) * size - 1 of the one embedding table
in Code2Wav. That reads the mean of a frame's K code vectors, while the quantiser approximates the encoder's latent by
their sum: so latents live on the scale of the sum, and what Code2Wav reads is the quantised latent divided by K,
computed as it computes it. Training therefore hears exactly what decoding the codes gives.

There is no quantiser dropout (training on the first n < K codebooks): Code2Wav always averages K vectors and has no
code that stands for nothing, hence a shorter sum is an input that no codes can produce.
Sources: van den Oord et al., 2017 (straight-through gradient, codebook and commitment loss); Zeghidour et al., 2021
(residual quantisation, k-means start, replacement of dead codes).
Shapes: B rows, n samples, T frames, D width, K codebooks of `size` codes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.contract import SAMPLE_RATE_HZ
from omni.config.qwen3_omni import Code2WavConfig
from omni.config.reading import read_json
from omni.config.writing import atomic_folder
from omni.layers.state import State
from omni.training.codec.codec_encoders import ENCODERS, CodecEncoder, ControlsEncoder
from omni.training.codec.codec_encoders import draw_weights as draw_weights
from omni.training.codec.decoding import controls_of, decoded
from omni.training.objectives.losses import Loss

CONFIG, WEIGHTS = "codec.json", "codec.safetensors"
_FRAMES_AT_ONCE = 256  # bounds the memory of encoding a long recording
_SEARCHES_AT_ONCE = 8192  # latents compared with a codebook at once
_TABLE = "code2wav.code_embedding.weight"
_ROUNDING = 2**-8  # of a table's largest value: twice what bf16 rounds off


class Quantised(NamedTuple):
    """codes int64 [B, K, T]; commitment and codebook: mean squared distances over K and D, summed over frames."""

    codes: Tensor
    commitment: Loss
    codebook: Loss


@dataclass
class CodeUsage(State):
    """How often each code was used of late: a running mean of its share, shares [K, size]; 1 is its share if all were
    used alike. The caller holds it and saves it with the optimizer."""

    shares: Tensor
    decay: float = 0.99

    @classmethod
    def start(cls, codec: Codec, decay: float = 0.99) -> CodeUsage:
        """As if all codes had been used alike."""
        return cls(codec.quantiser.books.detach().new_ones(codec.quantiser.books.shape[:2], dtype=torch.float32), decay)

    def update(self, codes: Tensor) -> None:
        """Count a batch of codes int64 [B, K, T]."""
        size = self.shares.shape[1]
        self.shares.mul_(self.decay).add_(code_shares(codes, size) * size, alpha=1 - self.decay)


class ResidualQuantiser:
    """Nearest code of codebook 0, nearest code of codebook 1 to what remains, and so on; on Code2Wav's own table."""

    def __init__(self, code2wav: Code2Wav) -> None:
        self.code2wav = code2wav

    @property
    def books(self) -> Tensor:
        """The codebooks [K, size, D]: a view of the table, through which gradients flow."""
        return rearrange(self.code2wav.code_embedding.weight, "(k codes) d -> k codes d", k=self.code2wav.num_codebooks)

    def __call__(self, latents: Tensor) -> Quantised:
        """latents [B, D, T] -> their codes and losses.

        The commitment loss moves latents only and the codebook loss moves the table only: each sees the other, and the
        codes chosen before, as constants.
        """
        residual, books = self._working(latents), self.books
        codes, commitment, codebook = [], residual.new_zeros(()), residual.new_zeros(())
        for book in books.to(residual.dtype):
            chosen = nearest_codes(residual.detach(), book.detach())
            vectors = F.embedding(chosen, book)
            commitment = commitment + (residual - vectors.detach()).square().sum()
            codebook = codebook + (residual.detach() - vectors).square().sum()
            residual = residual - vectors.detach()
            codes.append(chosen)
        values = books.shape[0] * books.shape[2]
        frames = torch.tensor(float(residual.shape[0]), device=residual.device)
        joined = rearrange(torch.stack(codes), "k (b t) -> b k t", b=latents.shape[0])
        return Quantised(joined, Loss(commitment / values, frames), Loss(codebook / values, frames))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """latents [B, D, T] -> codes int64 [B, K, T]."""
        return self(latents).codes

    def embed(self, codes: Tensor) -> Tensor:
        """What Code2Wav reads of codes [B, K, T]: the mean of each frame's vectors [B, T, D]."""
        offsets = torch.arange(codes.shape[1], device=codes.device)[:, None] * self.books.shape[1]
        return F.embedding(codes + offsets, self.code2wav.code_embedding.weight).mean(1)

    @torch.no_grad()
    def initialise_codebooks(
        self, latents: Tensor, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set the codebooks one after the other to k-means centres of what remains of latents [B, D, T], in place.

        Call it once before training, with as many frames as memory allows. With fewer frames than codes, frames are
        drawn repeatedly and moved apart a little. generator: of the CPU; makes it repeatable.
        """
        residual = self._working(latents)
        for book in self.books:
            book.copy_(k_means(residual, len(book), iterations, generator))
            stored = book.to(residual.dtype)
            residual = residual - stored[nearest_codes(residual, stored)]

    @torch.no_grad()
    def restart_dead_codes(
        self, latents: Tensor, usage: CodeUsage, threshold: float = 0.05, generator: torch.Generator | None = None
    ) -> int:
        """Give codes whose usage fell below `threshold` a place among what remains of recent latents [B, D, T].

        Changes the table in place and returns how many codes moved; their usage starts anew. Call it between optimizer
        steps; the optimizer's moments of these rows stay. Where processes train together, one of them calls it and
        broadcasts the table. generator: of the CPU; makes it repeatable.
        """
        residual, moved = self._working(latents), 0
        for book, shares in zip(self.books, usage.shares):
            dead = shares < threshold
            fresh = draw_rows(residual, len(book), generator).to(book.dtype)
            book.copy_(torch.where(dead[:, None], fresh, book))
            shares.masked_fill_(dead, 1.0)
            moved += int(dead.sum())
            stored = book.to(residual.dtype)
            residual = residual - stored[nearest_codes(residual, stored)]
        return moved

    def _working(self, latents: Tensor) -> Tensor:
        """latents [B, D, T] -> [B * T, D], at least fp32: codes must not depend on a narrower type's rounding."""
        dtype = torch.promote_types(torch.promote_types(latents.dtype, self.books.dtype), torch.float32)
        return latents.transpose(1, 2).flatten(0, 1).to(dtype)


class CodecOutput(NamedTuple):
    """wave [B, min(n, hop_length * T - lookahead)]: sample i is to equal the input's sample i, compare with
    `input[:, : wave.shape[1]]`; codes int64 [B, K, T]; latents [B, D, T], detached; commitment and codebook losses a
    frame; perplexity [K]: how many codes of each codebook this batch used, in effect (1 .. size); losses: further ones,
    of `decoded`."""

    wave: Tensor
    codes: Tensor
    latents: Tensor
    commitment: Loss
    codebook: Loss
    perplexity: Tensor
    losses: dict[str, Loss]


class Codec(nn.Module):
    """Encoder, quantiser and Code2Wav. `code2wav` is the model's own part: training here trains it there, and it is
    saved with the model under the Hub's names."""

    def __init__(self, code2wav: Code2Wav, encoder: CodecEncoder | ControlsEncoder | None = None) -> None:
        super().__init__()
        encoder = encoder or CodecEncoder(code2wav.config).to(code2wav.code_embedding.weight)
        if (encoder.hop_length, encoder.config.hidden_size) != (code2wav.hop_length, code2wav.config.hidden_size):
            raise ValueError(
                f"the encoder makes frames of {encoder.hop_length} samples and width {encoder.config.hidden_size}, "
                f"Code2Wav reads {code2wav.hop_length} and {code2wav.config.hidden_size}; build it from code2wav.config"
            )
        self.code2wav = code2wav
        self.encoder = encoder
        self.quantiser = ResidualQuantiser(code2wav)

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return SAMPLE_RATE_HZ

    def forward(self, wave: Tensor, *, quantised: bool = True, heard: bool = True) -> CodecOutput:
        """wave [B, n] in -1 .. 1 -> its reconstruction with gradients, codes and losses.

        Gradients of the waveform reach Code2Wav, and the encoder straight through the quantiser; the table learns from
        the codebook loss alone. They also pass the limit at -1 and 1, where a clipped sample would otherwise learn
        nothing. The waveform equals `decode(codes)`, but where a source and a filter sound it: see `decoded`.
        quantised: False lets Code2Wav read the latents as they are, for the time before there are codebooks. heard:
        False leaves the wave out, see `decoded`.
        Raises ValueError for a wave that is not [B, n] with n >= 1.
        """
        wave, told = self._check(wave), None
        if isinstance(self.encoder, ControlsEncoder):  # analysed once for both ends
            whole = F.pad(wave, (0, -wave.shape[1] % self.encoder.hop_length))
            told = controls_of(self.encoder.source[0], whole)
            latents = self.encoder(wave, told)
        else:
            latents = self.encoder(wave)
        codes, commitment, codebook = self.quantiser(latents)
        read = latents.transpose(1, 2) / codes.shape[1]
        if quantised:
            read = _straight_through(self.quantiser.embed(codes).detach(), read)
        loud, losses = decoded(self.code2wav, read, wave, told, heard=heard)
        limited = _straight_through(loud.detach().clamp(-1, 1), loud)[:, : wave.shape[1]]
        shares = code_shares(codes, self.code2wav.config.codebook_size)
        perplexity = torch.special.entr(shares).sum(1).exp()
        return CodecOutput(limited, codes, latents.detach(), commitment, codebook, perplexity, losses)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """wave [B, n] -> codes int64 [B, K, ceil(n / hop_length)]; a long recording is encoded in pieces."""
        wave = self._check(wave)
        piece = _FRAMES_AT_ONCE * self.encoder.hop_length
        if wave.shape[1] <= piece or isinstance(self.encoder, ControlsEncoder):
            return self.quantiser.encode(self.encoder(wave))
        wave = F.pad(wave, (0, -wave.shape[1] % self.encoder.hop_length))
        state = self.encoder.init_state(wave.shape[0])
        latents = [self.encoder.step(part, state) for part in wave.split(piece, dim=1)]
        return self.quantiser.encode(torch.cat(latents, dim=2))

    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [B, K, T] -> samples [B, hop_length * T - lookahead]: Code2Wav."""
        return self.code2wav(codes)

    def save(self, folder: str | Path, *, decoder: bool = True) -> None:
        """Write the codec, so that it encodes without the model: `codec.json` and `codec.safetensors`, all or nothing.

        decoder: False leaves out Code2Wav's weights but for the code table. Raises OSError when that fails.
        """
        settings = {
            "encoder": self.encoder.kind,
            **self.encoder.settings,
            "strict_causal": self.code2wav.strict_causal,
            "code2wav_config": self.code2wav.config.to_dict(),
        }
        kept = ("encoder.", "" if decoder else _TABLE)
        tensors = {k: value.detach().cpu().contiguous() for k, value in self.state_dict().items() if k.startswith(kept)}
        with atomic_folder(folder) as fresh:
            (fresh / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            try:
                save_file(tensors, fresh / WEIGHTS)
            except SafetensorError as error:
                raise OSError(f"{fresh / WEIGHTS} could not be written: {error}; check the free space") from error

    @classmethod
    def load(cls, folder: str | Path, code2wav: Code2Wav | None = None) -> Codec:
        """A saved codec, on the CPU; with `code2wav` around the model's own part, on its device and in its dtype.

        One that was saved without its decoder encodes; what its `decode` gives without `code2wav` is noise.
        Raises FileNotFoundError for a folder without a codec, ValueError for a damaged one and for a `code2wav` whose
        shapes or code table differ: its codes would mean other sounds.
        """
        folder = Path(folder).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; pass a folder that Codec.save has written")
        settings = dict(read_json(folder / CONFIG))
        try:
            strict_causal, make = settings.pop("strict_causal"), ENCODERS[settings.pop("encoder", CodecEncoder.kind)]
            config = Code2WavConfig.from_dict(settings.pop("code2wav_config"), "code2wav_config")
            tensors = load_file(folder / WEIGHTS)
            if code2wav is None:
                code2wav = Code2Wav(config, strict_causal=strict_causal).to(tensors[_TABLE])
                own = _below("code2wav.", tensors)
                code2wav.load_state_dict(own, strict=len(own) > 1)
            encoder: CodecEncoder | ControlsEncoder
            if make is ControlsEncoder:
                encoder = ControlsEncoder(code2wav, **settings)
            else:
                encoder = CodecEncoder(config, **settings)
            encoder.load_state_dict(_below("encoder.", tensors))
        except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a codec that cannot be read: {error}; save it again") from error
        table, saved = code2wav.code_embedding.weight, tensors[_TABLE]
        same_shape, limit = table.shape == saved.shape, _ROUNDING * float(saved.abs().max())
        if not same_shape or float((table.detach().cpu().double() - saved.double()).abs().max()) > limit:
            raise ValueError(
                f"the code table of the given Code2Wav differs from the one saved in {folder}; pass the model that was "
                "trained with this codec, or no code2wav for the saved one"
            )
        return cls(code2wav, encoder.to(table))

    def _check(self, wave: Tensor) -> Tensor:
        """The wave in the encoder's dtype."""
        if wave.dim() != 2 or wave.shape[1] == 0 or not wave.is_floating_point():
            raise ValueError(f"a wave must be floating samples [rows, n >= 1], got {wave.dtype} {list(wave.shape)}")
        return wave.to(self.encoder.to_latents.weight.dtype)


def nearest_codes(vectors: Tensor, book: Tensor) -> Tensor:
    """The nearest of book [size, D] to each of vectors [N, D], of equals the first: int64 [N]."""
    with torch.autocast(vectors.device.type, enabled=False):
        lengths = book.square().sum(1)
        found = [(lengths - 2 * part @ book.t()).argmin(1) for part in vectors.split(_SEARCHES_AT_ONCE)]
    return torch.cat(found)


def code_shares(codes: Tensor, size: int) -> Tensor:
    """The share of each code among codes int64 [B, K, T], by codebook: fp32 [K, size]; each row adds up to 1."""
    flat = codes.transpose(0, 1).flatten(1)  # [K, B * T]
    counts = torch.zeros(flat.shape[0], size, device=codes.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype)) / flat.shape[1]


def k_means(vectors: Tensor, count: int, iterations: int, generator: torch.Generator | None) -> Tensor:
    """Centres [count, D] of vectors [N, D]; those that no vector is nearest to are drawn anew in each iteration."""
    centres = draw_rows(vectors, count, generator)
    for _ in range(iterations):
        chosen = nearest_codes(vectors, centres)
        counts = torch.bincount(chosen, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        means = sums / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, draw_rows(vectors, count, generator))
    return centres


def draw_rows(vectors: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of vectors [N, D] at random, each at most once if there are enough; else repeated, moved apart by 1 % of
    the spread."""
    available = len(vectors)
    if available >= count:
        return vectors[torch.randperm(available, generator=generator)[:count].to(vectors.device)]
    picks = torch.randint(available, (count,), generator=generator).to(vectors.device)
    noise = torch.randn(count, vectors.shape[1], generator=generator).to(vectors)
    return vectors[picks] + 0.01 * vectors.std(0, unbiased=False) * noise


def _straight_through(value: Tensor, source: Tensor) -> Tensor:
    """Exactly `value`, which has no gradient, with the gradient of `source`."""
    return value + (source - source.detach())


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
