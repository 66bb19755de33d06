"""A codec encoder that is fitted, not trained: log-mel patches, their principal components, residual k-means.

A frame's patch is the log-mel spectrum of its `hop_length` samples (and of the window's past), flattened and projected
on its leading principal components; codebook k holds k-means centres of what codebooks before it left over. Codes
know nothing of phase, so that the same sound gives nearly the same codes wherever a frame begins, and fitting an hour
of speech takes a minute on a CPU. Code2Wav learns to decode them (`objective.decoder_only`), its phases included.
Sources: Juang and Gray, 1982 (multi-stage vector quantisation); Davis and Mermelstein, 1980 (mel spectra).
Shapes: n samples, T frames, P spectra a frame, M mel bins, D components, K codebooks of `size` codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.contract import SAMPLE_RATE_HZ
from omni.config.reading import read_json
from omni.config.writing import atomic_folder
from omni.encoders.mel import frame_signal, mel_filter_bank, power_spectrum
from omni.training.codec.codec import k_means, nearest_codes

CONFIG, WEIGHTS = "mel_codec.json", "mel_codec.safetensors"
_FLOOR = 1e-4  # of mel powers: far below quiet speech, so that no code is spent on silence


class MelCodec(nn.Module):
    """Speech to codes; nothing in it learns by gradients.

    hop_length: samples a frame at 24 kHz, a multiple of `spectra`; spectra: P.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        width: int,
        *,
        hop_length: int = 1920,
        spectra: int = 4,
        num_mels: int = 80,
        n_fft: int = 1024,
    ) -> None:
        """Raises ValueError for sizes that do not go together."""
        super().__init__()
        if hop_length % spectra or n_fft < hop_length // spectra:
            raise ValueError(f"{spectra} windows of {n_fft} samples do not cover frames of {hop_length} samples evenly")
        values = spectra * num_mels
        if not 1 <= width <= values:
            raise ValueError(f"width must lie in 1..{values}, the values of a frame's patch; got {width}")
        self.hop_length, self.spectra, self.num_mels, self.n_fft = hop_length, spectra, num_mels, n_fft
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(values, width))
        self.register_buffer("books", torch.zeros(num_codebooks, codebook_size, width))
        self.register_buffer("filters", mel_filter_bank(num_mels, n_fft, SAMPLE_RATE_HZ), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    mean: Tensor
    components: Tensor
    books: Tensor
    filters: Tensor
    window: Tensor

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return SAMPLE_RATE_HZ

    def patches(self, samples: Tensor) -> Tensor:
        """Samples fp32 [n] -> log-mel patches [T = ceil(n / hop_length), P * M]; frame t ends at sample
        hop_length * (t + 1), silence is added before the first and behind the last."""
        step = self.hop_length // self.spectra
        padded = F.pad(samples, (self.n_fft - step, -len(samples) % self.hop_length))
        power = power_spectrum(frame_signal(padded, self.n_fft, step), self.window)
        return (power @ self.filters.t()).clamp(min=_FLOOR).log10().reshape(-1, self.spectra * self.num_mels)

    @torch.no_grad()
    def fit(
        self, recordings: Iterable[Tensor], *, iterations: int = 20, generator: torch.Generator | None = None
    ) -> Tensor:
        """Set components and codebooks from recordings fp32 [n] each. Returns [K]: the share of the components' energy
        that is left over behind each codebook.

        generator: of the CPU; makes it repeatable. Raises ValueError for fewer frames than codes.
        """
        patches = torch.cat([self.patches(samples) for samples in recordings])
        if len(patches) < self.books.shape[1]:
            raise ValueError(f"{len(patches)} frames cannot start {self.books.shape[1]} codes; fit on more recordings")
        self.mean.copy_(patches.mean(0))
        patches = patches - self.mean
        _, vectors = torch.linalg.eigh(patches.t().double() @ patches.double())  # ascending
        self.components.copy_(vectors.flip(1)[:, : self.components.shape[1]])
        residual = patches @ self.components
        energy, left = residual.square().sum(), []
        for book in self.books:
            book.copy_(k_means(residual, len(book), iterations, generator))
            residual = residual - book[nearest_codes(residual, book)]
            left.append(residual.square().sum() / energy)
        return torch.stack(left)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Samples [n] -> codes int64 [K, T]."""
        residual = (self.patches(samples.float()) - self.mean) @ self.components
        codes = []
        for book in self.books:
            chosen = nearest_codes(residual, book)
            residual = residual - book[chosen]
            codes.append(chosen)
        return torch.stack(codes)

    @torch.no_grad()
    def start_table(self, code2wav: Code2Wav) -> None:
        """Let Code2Wav's code table begin with the codebooks: the mean that it takes of a frame's codes is then the
        frame's patch, of standard deviation about one. Raises ValueError for a table of another shape."""
        table = code2wav.code_embedding.weight
        books, size, width = self.books.shape
        if table.shape[0] != books * size or table.shape[1] < width:
            raise ValueError(
                f"Code2Wav's code table is {list(table.shape)}, the codebooks are {list(self.books.shape)}; fit them "
                "with its number of codebooks and codes, and no more components than its width"
            )
        scale = books / self.books[0].std()
        table.zero_()
        table[:, :width] = (self.books.flatten(0, 1) * scale).to(table)

    @classmethod
    @torch.no_grad()
    def of_decoder(cls, code2wav: Code2Wav, codes: Iterable[Tensor], ridge: float = 100.0) -> MelCodec:
        """An encoder for a Code2Wav that was trained on such codes, where the codec that made them is lost.

        codes: int64 [K, T] each, such as its Talker writes. Code2Wav sounds them; the map from the sound's patches to
        what it reads of the codes is a linear one, found by least squares, and its own table has the codebooks. ridge:
        keeps directions that these sounds hardly have from being blown up. Raises ValueError for fewer frames than a
        patch has values.
        """
        books, size = code2wav.num_codebooks, code2wav.config.codebook_size
        table = code2wav.code_embedding.weight.detach().float().view(books, size, -1)
        codec = cls(books, size, table.shape[2], hop_length=code2wav.hop_length)
        pairs = []
        for frames in codes:
            wave = code2wav(frames[None])[0].float()
            wave = F.pad(wave, (0, frames.shape[1] * codec.hop_length - len(wave)))
            read = torch.stack([book[chosen] for book, chosen in zip(table, frames)]).mean(0)
            pairs.append((codec.patches(wave), read))
        patches, read = (torch.cat(parts).double() for parts in zip(*pairs))
        if len(patches) < patches.shape[1]:
            raise ValueError(f"{len(patches)} frames cannot settle {patches.shape[1]} values; give more codes")
        heard, centre = patches - patches.mean(0), read.mean(0)
        values = heard.t() @ heard + ridge * torch.eye(heard.shape[1], dtype=heard.dtype)
        components = torch.linalg.solve(values, heard.t() @ (read - centre))
        # the mean belongs to patches: the one nearest to theirs that is read as zero
        codec.mean.copy_(patches.mean(0) - centre @ torch.linalg.pinv(components))
        codec.components.copy_(components)
        codec.books.copy_(table / books)
        return codec

    def save(self, folder: str | Path) -> None:
        """Write `mel_codec.json` and `mel_codec.safetensors`, all or nothing. Raises OSError when that fails."""
        books, size, width = self.books.shape
        settings = {"num_codebooks": books, "codebook_size": size, "width": width, "hop_length": self.hop_length}
        settings |= {"spectra": self.spectra, "num_mels": self.num_mels, "n_fft": self.n_fft}
        with atomic_folder(folder) as fresh:
            (fresh / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, fresh / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> MelCodec:
        """What `save` wrote. Raises FileNotFoundError for a folder without it, ValueError for a damaged one."""
        folder = Path(folder).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; pass a folder that MelCodec.save has written")
        try:
            codec = cls(**read_json(folder / CONFIG))
            codec.load_state_dict(load_file(folder / WEIGHTS))
        except (TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a codec that cannot be read: {error}; fit it again") from error
        return codec
