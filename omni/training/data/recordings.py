"""Recorded sound as training data: endless batches drawn from manifests or folders, and crops at a codec's rate.

A row may be any JSON object that names a recording: those of conversations (`audios`, `speech`, audio items of
messages) or `{"audio": "a.wav"}`. What is drawn, and where it is cropped, follows from the seed and the number of the
draw alone, so a restart repeats it. A crop is cut out of a decoded file: hour-long files are better cut beforehand.

Shapes: B crops of n samples, K codebooks, F = n / hop_length frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.training.data.conversation_samples import SkipRow
from omni.training.data.failures import RunError, reason
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Draw, Mixture, random_number
from omni.training.data.row_stores import AUDIO_SUFFIXES, Checksum, RowStore
from omni.training.data.sound import read_speech
from omni.training.data.tally import Tallied, Tally, describe_counts

HEARD = ("audio", "audios")  # keys of what a conversation hears; items of its messages belong to them
SOUNDS = (*HEARD, "speech")
_FRUITLESS = 1000  # unusable rows, beyond all there are, after which the search for a good one ends
_WHICH, _WHERE = 3, 4  # what a random number is for, beside the mixture's and the batches' own

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class _Files(RowStore):
    """The audio files in a folder and below, in the order of their paths."""

    def __init__(self, source: str | Path, seen: Checksum) -> None:
        path = Path(source).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder; pass one with audio files")
        files = (file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        self.path, self.files = path, sorted(files)
        if not self.files:
            raise FileNotFoundError(f"{path} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
        for file in self.files:
            seen.add(f"{file.relative_to(path)} {file.stat().st_size};")

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        return str(self.files[index].relative_to(self.path))

    def read(self, index: int) -> Any:
        return {"audio": str(self.files[index].absolute())}


class SoundFolder(Manifest):
    """The audio files in a folder and below, as rows `{"audio": path}`.

    Raises FileNotFoundError where there is no folder or no audio file.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(path, open_store=_Files, **options)


def open_sounds(path: str | Path, **options: Any) -> Manifest:
    """A manifest, or a folder of audio files; options of `Manifest`. Raises FileNotFoundError or ValueError as they
    do."""
    folder = Path(path).expanduser()
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))  # by `datasets`
    return SoundFolder(path, **options) if folder.is_dir() and not saved else Manifest(path, **options)


def sounds_of(draw: Draw, keys: Sequence[str] = SOUNDS) -> list[Any]:
    """The recordings of a row, as `read_speech` takes them: those under `keys`, one or a list each, and where "audios"
    is among them those of the messages' audio items. Raises ValueError for a row that is no JSON object."""
    raw = draw.manifest.heard(draw.row)
    found = [sound for key in keys for sound in _listed(raw.get(key))]
    if "audios" in keys:
        for message in _listed(raw.get("messages")):
            content = message.get("content") if isinstance(message, Mapping) else None
            items = [item for item in content if isinstance(item, Mapping)] if isinstance(content, list) else []
            found += [item["audio"] for item in items if item.get("audio") is not None]
    return [_whole(draw, sound) for sound in found]


def _listed(value: Any) -> list[Any]:
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]


def _whole(draw: Draw, sound: Any) -> Any:
    """A recording with its path made whole, or the bytes that a tar file holds."""
    locate = draw.manifest.store.locate(draw.row)
    if isinstance(sound, str):
        return locate(sound)
    if isinstance(sound, Mapping) and isinstance(sound.get("path"), str):
        inside = sound.get("array") is not None or sound.get("bytes") is not None
        return sound if inside else locate(sound["path"])
    return sound


class _Made(NamedTuple):
    """What became of a draw: `item`, or the reason why there is none (bad: something is wrong with the row)."""

    name: str
    item: Any = None
    reason: str = ""
    kind: str = ""
    bad: bool = False


class DrawnBatches(Tallied, Generic[Item, Batch]):
    """Endless batches of `batch_size` items, one made of each draw of a mixture.

    Rows that cannot be read are named by a warning, kept in `skipped` (name -> reason) and replaced by further draws;
    those that `make` raises SkipRow for are counted by reason in `tally`, and the first of each reason is named.

    Args:
        mixture: which rows, in which order; it belongs to this object from now on.
        make: (draw, its number from 1) -> item; the same item each time for a restart to repeat its batches.
        join: the items of a batch -> the batch.
        skip_limit: how many different rows may be bad before a ValueError names the first.
        workers: threads that read ahead by one batch (0: the calling one reads). They change nothing in what comes.
    """

    def __init__(
        self,
        mixture: Mixture,
        make: Callable[[Draw, int], Item],
        join: Callable[[list[Item]], Batch],
        *,
        batch_size: int = 16,
        skip_limit: int = 100,
        workers: int = 0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("skip_limit", skip_limit, 0),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.mixture, self.make, self.join = mixture, make, join
        self.batch_size, self.tally = batch_size, Tally(skip_limit)
        self._pool = ThreadPoolExecutor(workers, "read-ahead") if workers else None
        self._ahead: list[Future[_Made]] = []
        self._place = mixture.state_dict()  # after the batch that was given last

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        work: list[Any] = list(self._ahead) or [self._draw() for _ in range(self.batch_size)]
        self._ahead = []
        batch = self.join([self._good(made) for made in work])
        self._place = self.mixture.state_dict()
        if self._pool is not None:
            self._ahead = [self._pool.submit(self._make, *self._next_draw()) for _ in range(self.batch_size)]
        return batch

    def _next_draw(self) -> tuple[Draw, int]:
        draw = next(self.mixture)
        return draw, self.mixture.draws

    def _draw(self) -> _Made:
        return self._make(*self._next_draw())

    def _make(self, draw: Draw, number: int) -> _Made:
        try:
            return _Made(draw.name, self.make(draw, number))
        except SkipRow as skipped:
            return _Made(draw.name, reason=str(skipped), kind=skipped.kind)
        except RunError:
            raise
        except Exception as error:  # whatever a decoder makes of a damaged file costs the row, not the run
            return _Made(draw.name, reason=reason(error), bad=True)

    def _good(self, made: _Made | Future[_Made]) -> Item:
        """The item, or that of the next draw that has one."""
        made = made.result() if isinstance(made, Future) else made
        for _ in range(len(self.mixture) + _FRUITLESS):
            if made.item is not None:
                if note := getattr(made.item, "note", ""):
                    self.tally.cut[note] += 1
                return made.item
            if made.bad:
                self.tally.pass_over(made.name, made.reason)
            else:
                self.tally.leave_out(made.name, made.reason, made.kind)
            made = self._draw()
        raise ValueError(
            f"none of the last {len(self.mixture) + _FRUITLESS} rows can be used: {describe_counts(self.counts())}; "
            f"the last is {made.name}: {made.reason}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the batch that was given last; what was read ahead is read again."""
        return {"mixture": self._place, **self.tally.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands. Raises ValueError where it is of other manifests, seeds or processes."""
        self._drop_ahead()
        self.mixture.load_state_dict(state["mixture"])
        self._place = self.mixture.state_dict()
        self.tally.load_state_dict(state)

    def close(self) -> None:
        """End the reading ahead; the object is of no further use."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead = []


@dataclass(frozen=True)
class Crop:
    """Samples [n] of one recording, of which `length` are recorded and the rest is silence behind its end; start: the
    first one's place in the recording; codes int64 [K, F] where they were asked for, zeros behind the end; note: what
    of the recording is not in it."""

    wave: Tensor
    length: int
    start: int = 0
    codes: Tensor | None = None
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Crops:
    """Crops side by side: waves [B, n], lengths int64 [B], codes int64 [B, K, F] or None."""

    waves: Tensor
    lengths: Tensor
    codes: Tensor | None
    names: list[str]

    @property
    def mask(self) -> Tensor:
        """bool [B, n]: True for recorded samples, False for silence behind a recording's end."""
        return torch.arange(self.waves.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Recorded samples of all rows."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> Crops:
        """The same on a device."""
        codes = None if self.codes is None else self.codes.to(device)
        return replace(self, waves=self.waves.to(device), lengths=self.lengths.to(device), codes=codes)


def join_crops(crops: Sequence[Crop]) -> Crops:
    """Crops of one size as a batch."""
    codes = [crop.codes for crop in crops if crop.codes is not None]
    return Crops(
        torch.stack([crop.wave for crop in crops]),
        torch.tensor([crop.length for crop in crops]),
        torch.stack(codes) if codes else None,
        [crop.name for crop in crops],
    )


class CropMaker:
    """Cuts `crop_s` seconds at a random place out of one of a row's recordings; shorter ones get silence at the end.

    sample_rate: of the crops in Hz, the codec's. codes: encodes a recording to int64 [K, T] (`cached_codes` of an
    encoder); crops then begin at a frame and hold whole frames of `hop_length` samples. keys: where rows have their
    recordings, see `sounds_of`.
    """

    def __init__(
        self,
        sample_rate: int,
        crop_s: float = 1.0,
        *,
        seed: int = 0,
        codes: Callable[[Any], Tensor] | None = None,
        hop_length: int = 1,
        keys: Sequence[str] = SOUNDS,
        rank: int = 0,
    ) -> None:
        """Raises ValueError for crops without a sample, or without a frame."""
        self.hop = hop_length if codes is not None else 1
        self.samples = round(crop_s * sample_rate) // self.hop * self.hop
        if self.samples < 1:
            raise ValueError(
                f"a crop of {crop_s} s holds no frame of {self.hop} sample(s) at {sample_rate} Hz; make crop_s larger"
            )
        self.sample_rate, self.seed, self.codes, self.keys, self.rank = sample_rate, seed, codes, tuple(keys), rank

    def __call__(self, draw: Draw, number: int) -> Crop:
        """The crop of draw `number`. Raises ValueError, TypeError or OSError for a bad row."""
        sounds = sounds_of(draw, self.keys)
        if not sounds:
            raise ValueError(f"the row names no recording; it needs one of {', '.join(self.keys)}")
        sound = sounds[random_number(self.seed, self.rank, number, _WHICH) % len(sounds)]
        wave = read_speech(sound, self.sample_rate)
        places = max(0, len(wave) - self.samples) // self.hop + 1
        start = random_number(self.seed, self.rank, number, _WHERE) % places * self.hop
        length = min(len(wave) - start, self.samples)
        codes = None
        if self.codes is not None:
            codes = self._codes_at(self.codes(sound), len(wave), start)
            length = min(length, codes.shape[1] * self.hop)
            if not length:
                raise ValueError("the codec encoder gave no frame of the recording; it is too short")
            codes = F.pad(codes, (0, self.samples // self.hop - codes.shape[1]))
        crop = F.pad(wave[start : start + length], (0, self.samples - length)).clone()  # not the whole recording
        note = "a crop of a longer recording" if length < len(wave) else ""
        return Crop(crop, length, start, codes, draw.name, note)

    def _codes_at(self, codes: Tensor, samples: int, start: int) -> Tensor:
        """The frames of a crop [K, F] or less, out of the codes [K, T] of a recording of that many samples."""
        whole = -(-samples // self.hop)
        if codes.dim() != 2 or abs(codes.shape[1] - whole) > 1:  # encoders differ in the frame that is not full
            raise ValueError(
                f"the codec encoder gave codes of shape {list(codes.shape)} for {samples} samples, which are {whole} "
                f"frames of {self.hop}; use the encoder of the codec that the model decodes"
            )
        return codes[:, start // self.hop : (start + self.samples) // self.hop].long()


def crop_batches(
    mixture: Mixture,
    sample_rate: int,
    crop_s: float = 1.0,
    *,
    batch_size: int = 16,
    codes: Callable[[Any], Tensor] | None = None,
    hop_length: int = 1,
    skip_limit: int = 100,
    workers: int = 0,
) -> DrawnBatches[Crop, Crops]:
    """Endless random crops of the mixture's recordings, see `CropMaker` and `DrawnBatches`; the mixture's seed and rank
    also place the crops."""
    make = CropMaker(sample_rate, crop_s, seed=mixture.seed, codes=codes, hop_length=hop_length, rank=mixture.rank)
    return DrawnBatches(mixture, make, join_crops, batch_size=batch_size, skip_limit=skip_limit, workers=workers)
