"""Damaged media cost their row, which is named and counted; a full disk ends the run and blames no row."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from build import chat, tone, write_rows
from safetensors import SafetensorError

from omni.packaged.toy import TOY_DATA, toy_processor
from omni.training.codec import speech_codes
from omni.training.codec.speech_codes import SpeechEncoder, cached_codes, encode_files
from omni.training.data.batches import Batches
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Mixture
from omni.training.data.recordings import crop_batches
from omni.training.data.samples import Sample

ODD = [
    AttributeError("no codec_context"),
    OverflowError("too large"),
    MemoryError(),
    KeyError("rotation"),
    RuntimeError("x"),
]


def rows_of(folder: Path, count: int = 6) -> Mixture:
    rows = [{"messages": chat(f"Question {i}?", "Answer.")} for i in range(count)]
    return Mixture([Manifest(write_rows(folder / "rows.jsonl", rows))])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_an_unforeseen_error_costs_its_row(tmp_path: Path, model: Any, error: Exception, workers: int) -> None:
    make = SampleMaker(toy_processor(), model.config)

    def made(row: Any) -> Sample:
        if row.name.endswith(":3"):
            raise error
        return make(row)  # type: ignore[return-value]

    batches = Batches(rows_of(tmp_path), made, max_tokens=100, bucket_size=12, workers=workers)
    with pytest.warns(UserWarning, match=rf"rows\.jsonl:3 is skipped: .*{type(error).__name__}"):
        names = {sample.name for _ in range(4) for sample in next(batches)}
    batches.close()
    (skipped,) = batches.skipped
    assert skipped.endswith("rows.jsonl:3") and skipped not in names and len(names) > 2


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "header"])
def test_a_damaged_film_costs_its_row(tmp_path: Path, model: Any, damage: str) -> None:
    whole = (TOY_DATA / "clip.mp4").read_bytes()
    ruined = {"cut": whole[:60], "noise": bytes(range(256)) * 8, "empty": b"", "header": b"\0" * 400 + whole[400:]}
    (tmp_path / "clip.mp4").write_bytes(ruined[damage])
    rows: list[dict[str, Any]] = [{"messages": chat(f"Question {i}?", "Answer.")} for i in range(5)]
    rows.insert(2, {"messages": chat("<video>Well?", "Answer."), "videos": ["clip.mp4"]})
    mixture = Mixture([Manifest(write_rows(tmp_path / "rows.jsonl", rows))])
    batches = Batches(mixture, SampleMaker(toy_processor(), model.config), max_tokens=200, bucket_size=12)
    with pytest.warns(UserWarning, match=r"rows\.jsonl:3 is skipped: .*clip\.mp4"):
        next(batches)
    assert [name.rpartition("/")[2] for name in batches.skipped] == ["rows.jsonl:3"]


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.fixture(params=FULL, ids=["OSError", "SafetensorError"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of codes has no room."""

    def save(*_: Any, **__: Any) -> None:
        raise request.param

    monkeypatch.setattr(speech_codes, "write_tensors", save)


def encoder() -> SpeechEncoder:
    return SpeechEncoder(lambda samples: torch.zeros(4, 1 + len(samples) // 1920, dtype=torch.int64), 24000, 4, 64, "0")


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("reader", ["conversations", "crops", "files", "folder"])
def test_a_full_disk_ends_the_run_and_blames_no_row(tmp_path: Path, model: Any, reader: str) -> None:
    import soundfile

    soundfile.write(tmp_path / "tone.wav", tone(0.4), 16000)
    rows = [{"messages": chat("Say it.", "So."), "speech": "tone.wav"} for _ in range(3)]
    mixture = Mixture([Manifest(write_rows(tmp_path / "rows.jsonl", rows))])

    def codes(source: Any) -> torch.Tensor:
        return cached_codes(source, encoder(), tmp_path / "codes")

    with pytest.raises(OSError, match=r"No space left on device.*data\.codec\.cache"):
        if reader == "conversations":
            next(Batches(mixture, SampleMaker(toy_processor(), model.config, codes), max_tokens=200))
        elif reader == "crops":
            next(crop_batches(mixture, 24000, 0.2, batch_size=2, codes=codes, hop_length=1920))
        elif reader == "files":
            encode_files([tmp_path / "tone.wav"], encoder(), tmp_path / "codes", progress=False)
        else:
            speech_codes.encode_folder(tmp_path, encoder(), tmp_path / "codes", progress=False)


def test_a_cache_below_a_file_is_an_error_too(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "tone.wav", tone(0.4), 16000)
    with pytest.raises(OSError, match=r"cannot be kept in .*tone\.wav"):
        encode_files([tmp_path / "tone.wav"], encoder(), tmp_path / "tone.wav", progress=False)
