"""Codes of recorded speech: what the Talker is trained on. Computed once by a codec encoder, then read from a cache.

The codes must be those that the model's Code2Wav decodes. "mimi" is the encoder of Mimi (Defossez et al., 2024), which
has the shape of the released codec: 12.5 frames a second of 24 kHz sound and 2048 codes a codebook. "omni" is a codec
trained here. Any function of a waveform will do as well: wrap it in a `SpeechEncoder`.
Shapes: K codebooks, T frames, n samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from omni.code2wav.code2wav import Code2Wav
from omni.config.locate import locate
from omni.config.writing import write_tensors
from omni.processing.audio_file import read_array
from omni.processing.sources import describe, open_source
from omni.training.data.failures import RunError, RunOSError
from omni.training.data.row_stores import AUDIO_SUFFIXES
from omni.training.data.sound import medium_of, read_speech

MIMI_FOLDER = "kyutai/mimi"  # on the Hub; CC-BY 4.0
OWN_FOLDER = "codec_encoder"  # of a checkpoint that brings the encoder of its codec
_OWN_KINDS = {"mel_codec.json": "mel", "codec.json": "omni"}  # by the file that only this kind has


@dataclass(frozen=True)
class SpeechEncoder:
    """A function from samples fp32 [n] at `sample_rate` Hz to codes int64 [num_codebooks, T].

    fingerprint: a text that changes whenever its codes may, such as the hash of its weights; it is part of the cache's
    keys. codebook_size: codes lie in 0 .. codebook_size - 1. start_table: writes what the codes mean into a new
    Code2Wav's code table, None where that is not known.
    """

    encode: Callable[[Tensor], Tensor]
    sample_rate: int
    num_codebooks: int
    codebook_size: int
    fingerprint: str
    start_table: Callable[[Code2Wav], None] | None = None

    def __call__(self, samples: Tensor) -> Tensor:
        """Codes on the CPU. Raises ValueError where the function gives something else than promised."""
        return self.check(torch.as_tensor(self.encode(samples)).detach().cpu())

    def check(self, codes: Tensor) -> Tensor:
        """The codes as int64. Raises ValueError for a wrong shape or type, and for codes out of range."""
        if codes.dim() != 2 or codes.shape[0] != self.num_codebooks or codes.is_floating_point():
            raise ValueError(
                f"the codec encoder must give integer codes [{self.num_codebooks}, frames], "
                f"got {codes.dtype} {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"the codec encoder gave codes {int(codes.min())}..{int(codes.max())}, "
                f"which do not fit into 0..{self.codebook_size - 1}"
            )
        return codes.long()


def load_mimi(
    path: str | Path | None, code2wav: Code2Wav | None, num_codebooks: int | None, device: torch.device
) -> SpeechEncoder:
    """The first K codebooks of a MimiModel in a folder or on the Hub (None: `MIMI_FOLDER`)."""
    from transformers import MimiModel

    path = MIMI_FOLDER if path is None else str(path)
    try:
        model = MimiModel.from_pretrained(path, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
    except OSError as error:
        raise FileNotFoundError(f"no Mimi model can be read from {path!r}: {error}") from error
    available, size = model.config.num_quantizers, model.config.codebook_size
    books = _num_codebooks(num_codebooks, code2wav, available, f"Mimi in {path}")

    @torch.no_grad()
    def encode(samples: Tensor) -> Tensor:
        return model.encode(samples.to(device)[None, None], num_quantizers=books).audio_codes[0]

    return SpeechEncoder(encode, model.config.sampling_rate, books, size, weights_fingerprint(model, f"mimi-{books}"))


def load_omni(
    path: str | Path | None, code2wav: Code2Wav | None, num_codebooks: int | None, device: torch.device
) -> SpeechEncoder:
    """A codec that `Codec.save` has written; with `code2wav` checked against its code table."""
    from omni.training.codec.codec import Codec

    if path is None:
        raise ValueError("a codec of kind 'omni' has no default; pass the folder that Codec.save has written as path=")
    codec = Codec.load(path)
    if code2wav is not None:
        Codec.load(path, code2wav)  # only to compare the tables: encoding keeps its precision and device
    codec.to(device, torch.float32)  # a small encoder may be stored in half of that
    books = _num_codebooks(num_codebooks, code2wav, codec.code2wav.num_codebooks, f"the codec in {path}")

    def encode(samples: Tensor) -> Tensor:
        return codec.encode(samples.to(device)[None])[0, :books]

    size = codec.code2wav.config.codebook_size
    told = nn.ModuleList([codec.encoder, codec.code2wav.code_embedding])  # what codes follow from, not how they sound
    return SpeechEncoder(encode, codec.sample_rate, books, size, weights_fingerprint(told, f"omni-{books}"))


def load_mel(
    path: str | Path | None, code2wav: Code2Wav | None, num_codebooks: int | None, device: torch.device
) -> SpeechEncoder:
    """Codebooks over mel spectra, which `MelCodec.save` has written."""
    from omni.training.codec.mel_codec import MelCodec

    if path is None:
        raise ValueError(
            "a codec of kind 'mel' has no default; pass the folder that MelCodec.save has written as path="
        )
    codec = MelCodec.load(path).to(device)
    available, size, _ = codec.books.shape
    books = _num_codebooks(num_codebooks, code2wav, available, f"the codec in {path}")

    def encode(samples: Tensor) -> Tensor:
        return codec.encode(samples.to(device))[:books]

    fingerprint = weights_fingerprint(codec, f"mel-{books}")
    return SpeechEncoder(encode, codec.sample_rate, books, size, fingerprint, codec.start_table)


CODEC_ENCODERS: dict[str, Callable[[str | Path | None, Code2Wav | None, int | None, torch.device], SpeechEncoder]] = {
    "mimi": load_mimi,
    "omni": load_omni,
    "mel": load_mel,
}


def own_encoder(checkpoint: str | Path) -> tuple[str, Path] | None:
    """Kind and folder of the encoder that a checkpoint brings, None where it brings none."""
    folder = locate(checkpoint) / OWN_FOLDER
    return next(((kind, folder) for name, kind in _OWN_KINDS.items() if (folder / name).is_file()), None)


def find_encoder(
    kind: str | None, path: str | Path | None, checkpoint: str | Path | None
) -> tuple[str, str | Path | None] | None:
    """Kind and path of the encoder that is meant, for `load_codec_encoder`; None where none is named or brought.

    Without a path it is the one that the checkpoint brings, if it is of this kind (None: of any). Raises ValueError for
    a kind that is always trained or fitted, where neither a path nor the checkpoint has one.
    """
    if path is not None:
        return kind or "mimi", path
    own = own_encoder(checkpoint) if checkpoint is not None else None
    if own is not None and kind in (None, own[0]):
        return own
    if kind in ("mel", "omni"):
        raise ValueError(
            f"data.codec.kind = {kind!r} needs the folder of an encoder that was made for this model's codec: "
            f"{checkpoint or 'a new model'} brings none in {OWN_FOLDER}/; name one (data.codec.path, --codec-path of "
            "omni eval), make one (MelCodec.of_decoder), or write the codes into the manifest"
        )
    return None


def keep_encoder(checkpoint: str | Path, folder: str | Path) -> None:
    """Copy the encoder that a checkpoint brings, if it does, into the folder of one made from it."""
    own = own_encoder(checkpoint)
    target = Path(folder).expanduser() / OWN_FOLDER
    if own is not None and own[1].resolve() != target.resolve():
        shutil.copytree(own[1], target, dirs_exist_ok=True)


def load_codec_encoder(
    kind: str,
    path: str | Path | None = None,
    *,
    code2wav: Code2Wav | None = None,
    num_codebooks: int | None = None,
    device: torch.device | str | None = None,
) -> SpeechEncoder:
    """An encoder by its name in `CODEC_ENCODERS`, from a folder or Hub id.

    num_codebooks: how many codebooks to keep, the first ones; None: those of `code2wav` if given, else all that there
    are. device: None is the CPU. Further kinds are entries of the table. Raises ValueError for an unknown kind, for too
    many codebooks and for a codec that `code2wav` does not decode, FileNotFoundError where there is none.
    """
    if kind not in CODEC_ENCODERS:
        raise ValueError(f"codec encoder {kind!r} is not one of {', '.join(sorted(CODEC_ENCODERS))}")
    encoder = CODEC_ENCODERS[kind](path, code2wav, num_codebooks, torch.device(device or "cpu"))
    if code2wav is not None:
        theirs = (encoder.codebook_size, encoder.sample_rate)
        ours = (code2wav.config.codebook_size, code2wav.sample_rate)
        if theirs != ours:
            raise ValueError(
                f"the {kind} encoder has {theirs[0]} codes a codebook at {theirs[1]} Hz, the model's Code2Wav has "
                f"{ours[0]} at {ours[1]} Hz; use an encoder of the codec that the model decodes"
            )
    return encoder


def weights_fingerprint(model: nn.Module, label: str) -> str:
    """`label` and a hash of all weights and buffers, names, shapes and types included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{label}-{digest.hexdigest()[:24]}"


def cached_codes(source: Any, encoder: SpeechEncoder, folder: str | Path) -> Tensor:
    """The codes int64 [K, T] of a recording (see `read_speech`), read from `folder` or computed and kept there.

    An entry is found by the hash of the recording's bytes and the encoder's fingerprint, wherever the file lies. It is
    written under another name and then renamed, so that any number of processes may share a folder. A damaged entry is
    made anew, with a warning. Raises as `read_speech` and the encoder do.
    """
    return _cached(source, encoder, Path(folder).expanduser())[0]


@dataclass
class EncodingReport:
    """What became of a set of recordings. failed: (name, reason) of those that could not be read."""

    encoded: int = 0
    found: int = 0
    frames: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, name: str, reason: str, limit: int) -> None:
        """Note a failure; ValueError, naming the first, once there are more than `limit`."""
        self.failed.append((name, reason))
        if len(self.failed) > limit:
            first, why = self.failed[0]
            raise ValueError(
                f"{len(self.failed)} recordings cannot be read, the limit is {limit}; the first is {first}: {why}"
            )


def encode_folder(
    source: str | Path,
    encoder: SpeechEncoder,
    folder: str | Path,
    *,
    max_failures: int = 100,
    progress: bool | None = None,
) -> EncodingReport:
    """Fill the cache in `folder` with the codes of every audio file below `source`. See `encode_files`."""
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; pass one with audio files")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(f"{root} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return encode_files(paths, encoder, folder, max_failures=max_failures, progress=progress)


def encode_manifest(
    manifest: str | Path,
    encoder: SpeechEncoder,
    folder: str | Path,
    *,
    max_failures: int = 100,
    progress: bool | None = None,
) -> EncodingReport:
    """Fill the cache with the codes of all `speech` in a JSONL manifest, also that of `chosen` and `rejected` answers.

    Paths are relative to the manifest's folder. Lines that are no JSON object count as failures. Raises
    FileNotFoundError for a missing manifest. See `encode_files`.
    """
    manifest = Path(manifest).expanduser()
    if not manifest.is_file():
        raise FileNotFoundError(f"the manifest {manifest} does not exist; check the path")
    sources: dict[str, None] = {}  # each once, in order
    report = EncodingReport()
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            report.fail(f"{manifest}:{number}", f"it is not JSON: {error}", max_failures)
            continue
        if not isinstance(row, dict):
            report.fail(f"{manifest}:{number}", f"it is not a JSON object but {type(row).__name__}", max_failures)
            continue
        for path in _speech_of(row):
            sources[_located(path, manifest.parent)] = None
    return _encode(list(sources), encoder, folder, report, max_failures, progress)


def encode_files(
    sources: Iterable[Any],
    encoder: SpeechEncoder,
    folder: str | Path,
    *,
    max_failures: int = 100,
    progress: bool | None = None,
) -> EncodingReport:
    """Fill the cache in `folder` with the codes of each source.

    Recordings that cannot be read are named in the report and passed over; more than `max_failures` of them are a
    ValueError that names the first. progress: True shows a bar at once, None after two seconds, False none.
    """
    return _encode(list(sources), encoder, folder, EncodingReport(), max_failures, progress)


def _encode(
    sources: list[Any],
    encoder: SpeechEncoder,
    folder: str | Path,
    report: EncodingReport,
    max_failures: int,
    progress: bool | None,
) -> EncodingReport:
    folder, delay = Path(folder).expanduser(), 0 if progress else 2
    for source in tqdm(sources, "speech codes", unit="file", delay=delay, disable=progress is False):
        try:
            codes, found = _cached(source, encoder, folder)
        except RunError:
            raise
        except (ValueError, TypeError, OSError) as error:
            report.fail(describe(source), str(error), max_failures)
            continue
        report.found += found
        report.encoded += not found
        report.frames += codes.shape[1]
    return report


def _cached(source: Any, encoder: SpeechEncoder, folder: Path) -> tuple[Tensor, bool]:
    """A recording's codes, and whether they were found."""
    source = medium_of(source)
    if not isinstance(source, tuple):
        source = open_source(source, "audio")  # downloaded or read once, for hashing and decoding
    key = hashlib.sha256(f"{encoder.fingerprint} {_content_hash(source)}".encode()).hexdigest()
    path = folder / key[:2] / f"{key[2:]}.safetensors"
    if path.is_file():
        try:
            return _read_entry(path, encoder), True
        except (ValueError, OSError, SafetensorError) as error:
            warnings.warn(f"the speech codes in {path} are damaged and made anew: {error}", stacklevel=3)
    codes = encoder(read_speech(source, encoder.sample_rate))
    _write_entry(path, codes)
    return codes, False


def _read_entry(path: Path, encoder: SpeechEncoder) -> Tensor:
    with safe_open(path, framework="pt") as file:
        if "codes" not in file.keys() or file.metadata() is None:  # noqa: SIM118
            raise ValueError("it holds no codes")
        codes, expected = file.get_tensor("codes"), file.metadata().get("sha256")
    if _codes_hash(codes) != expected:
        raise ValueError("the codes do not match their hash")
    return encoder.check(codes)


def _write_entry(path: Path, codes: Tensor) -> None:
    """Raises RunOSError: what hinders one entry hinders all, and is no fault of the recording."""
    small = codes.to(torch.int32).contiguous()
    fresh = path.with_name(f".{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors({"codes": small}, fresh, {"sha256": _codes_hash(small)})
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:
        raise RunOSError(
            f"the codes of recordings cannot be kept in {path.parent.parent}: {error}; make room there, or choose "
            "another folder with data.codec.cache"
        ) from error


def _codes_hash(codes: Tensor) -> str:
    return hashlib.sha256(f"{codes.dtype} {tuple(codes.shape)};".encode() + codes.numpy().tobytes()).hexdigest()


def _content_hash(source: Any) -> str:
    """Of a file's path or bytes, or of an (array, rate) pair."""
    digest = hashlib.sha256()
    if isinstance(source, Path):
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif isinstance(source, bytes):
        digest.update(source)
    else:
        samples = read_array(source[0])
        digest.update(f"samples at {source[1]} Hz;".encode() + samples.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _speech_of(row: Mapping[str, Any]) -> list[str]:
    """Paths of the spoken answers in a manifest's row."""
    given = row.get("speech")
    found = [path for path in (given if isinstance(given, list) else [given]) if path is not None]
    for key in ("chosen", "rejected"):
        if isinstance(row.get(key), dict):
            found += _speech_of(row[key])
    return found


def _located(path: str, folder: Path) -> str:
    """A path relative to the manifest's folder; addresses and data URIs as they are."""
    text = str(path)
    return text if ":" in text[:8] else str(folder / Path(text).expanduser())


def _num_codebooks(wanted: int | None, code2wav: Code2Wav | None, available: int, name: str) -> int:
    books = wanted if wanted is not None else available if code2wav is None else code2wav.num_codebooks
    if not 1 <= books <= available:
        raise ValueError(f"{name} has {available} codebooks, {books} were asked for; ask for 1..{available}")
    return books
