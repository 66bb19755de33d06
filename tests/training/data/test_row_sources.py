"""Where rows come from: every kind of file, patterns, shards, packed files, and what `datasets` keeps."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from build import chat, tone, write_rows

from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Mixture
from omni.training.data.recordings import crop_batches
from omni.training.run.stage_table import keeps
from omni.training.run.train_config import FilterTable

ROWS: list[dict[str, Any]] = [{"messages": chat(f"q{i}", 'é 你好 ] , [ \\ " {' * i), "id": f"{i}"} for i in range(7)]
NEEDS_DATASETS = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is optional")


def every(manifest: Manifest) -> list[dict[str, Any]]:
    return [manifest.raw(index) for index in range(len(manifest))]


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_of_rows(tmp_path: Path, indent: int | None, mark: str) -> None:
    (tmp_path / "a.json").write_text(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    manifest = Manifest(tmp_path / "a.json")
    assert every(manifest) == ROWS and manifest.name(2) == f"{tmp_path / 'a.json'}:2"


def test_an_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a block, and blocks that end anywhere in a row."""
    (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    for block in (1, 7, 100):
        monkeypatch.setattr("omni.training.data.row_stores.BLOCK", block)
        assert every(Manifest(tmp_path / "a.json")) == ROWS


def test_lines_that_are_named_json(tmp_path: Path) -> None:
    assert every(Manifest(write_rows(tmp_path / "a.json", ROWS))) == ROWS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "no rows"),
        ('[{"a": 1}, {"a": ', r"from byte \d+ on"),
        ('{\n  "data": []\n}', "an array of rows, or one row a line"),
    ],
)
def test_arrays_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        Manifest(tmp_path / "a.json")


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_records_with_a_header(tmp_path: Path, suffix: str, delimiter: str) -> None:
    said = 'He said: "ah"' if suffix == "tsv" else 'two\nlines, "quoted"; and more'
    with (tmp_path / f"a.{suffix}").open("w", encoding="utf-8-sig", newline="") as file:
        quoting = csv.QUOTE_NONE if suffix == "tsv" else csv.QUOTE_MINIMAL
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, quotechar=None if suffix == "tsv" else '"')
        writer.writerows([["query", "response", "system", "wer"], ["é", said, "", "0.2"], [], ["q", "a", "s", ""]])
    manifest = Manifest(tmp_path / f"a.{suffix}")
    assert every(manifest) == [
        {"query": "é", "response": said, "wer": "0.2"},
        {"query": "q", "response": "a", "system": "s"},
    ]
    assert manifest[1].messages == [{"role": "system", "content": "s"}, *chat("q", "a")]
    with pytest.warns(UserWarning, match="nothing but filters reads wer"):  # a number in a file that knows none
        assert manifest[0].messages == chat("é", said)
    kept = [keeps(row, (FilterTable("wer", max=0.5),)) for row in every(manifest)]
    assert kept == [True, False]


def test_records_hold_conversations_as_text(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "images"], [json.dumps(chat("<image>", "a" * 200_000)), '["1.png"]']])
    content = Manifest(tmp_path / "a.csv")[0].messages[0]["content"]
    assert content == [{"type": "image", "image": str(tmp_path / "1.png")}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_packed_files(tmp_path: Path, suffix: str) -> None:
    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": "query,response\nq,<audio>\n",
    }
    with gzip.open(tmp_path / f"a.{suffix}.gz", "wt", encoding="utf-8") as file:
        file.write(text[suffix])
    manifest = Manifest(tmp_path / f"a.{suffix}.gz")
    assert every(manifest) == (ROWS if suffix != "csv" else [{"query": "q", "response": "<audio>"}])
    assert manifest.name(0).startswith(str(tmp_path / f"a.{suffix}.gz:"))
    assert manifest.store.locate(0)("b.wav") == str(tmp_path / "b.wav")  # beside the packed file
    unpacked = manifest.store.path
    assert unpacked.exists()
    del manifest
    assert not unpacked.exists()
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / f"a.{suffix}.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz cannot be unpacked"):
        Manifest(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize("pattern", ["s-*.jsonl", "s-{00..02}.jsonl", "s-{00,01,02}.jsonl", "{s,t}-0[0-9].jsonl"])
def test_patterns_and_shards(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "deep").mkdir()
    for shard in range(3):
        write_rows(tmp_path / f"s-{shard:02d}.jsonl", ROWS[2 * shard : 2 * shard + 2])
    if pattern.startswith("{s"):
        write_rows(tmp_path / "t-00.jsonl", ROWS[6:])
    manifest = Manifest(str(tmp_path / pattern))
    assert every(manifest) == ROWS[: len(manifest)] and len(manifest) == (7 if pattern.startswith("{s") else 6)
    assert manifest.name(3) == f"{tmp_path / 's-01.jsonl'}:2"
    with pytest.raises(IndexError):
        manifest.raw(len(manifest))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "s-0.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"s-1\.jsonl"):
        Manifest(str(tmp_path / "s-{0..1}.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"t-\*\.jsonl"):
        Manifest(str(tmp_path / "t-*.jsonl"))


def test_a_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"is a folder.*\*\.jsonl"):
        Manifest(tmp_path)


# ---- WebDataset ----


def test_members_imply_what_they_are(tmp_path: Path) -> None:
    members = {
        "x/a.txt": "hello\n", "x/a.wav": b"sound", "b.txt": "a cat", "b.JPG": b"picture",
        "c.json": json.dumps({"messages": chat("<audio><audio>?", "a")}), "c.1.flac": b"one", "c.2.flac": b"two",
        "d.json": json.dumps({"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "a"}]}),
        "d.mp4": b"film", "e.json": json.dumps({"id": 3, "duration": 2.5}), "e.txt": "hi", "e.ogg": b"more",
        "f.json": json.dumps({"messages": chat("q", "a"), "speech": "said.wav"}), "f.said.wav": b"answer",
    }  # fmt: skip
    manifest = Manifest(write_tar(tmp_path / "s.tar", members))
    with pytest.warns(UserWarning, match=r"s\.tar:e: nothing but filters reads id, duration"):
        contents = [manifest[index].messages[0]["content"] for index in range(6)]
    assert contents[0] == [{"type": "audio", "audio": b"sound"}] and contents[1] == [
        {"type": "image", "image": b"picture"}
    ]
    assert contents[2] == [{"type": "audio", "audio": b"one"}, {"type": "audio", "audio": b"two"}, "?"]
    assert contents[3] == [{"type": "video", "video": b"film"}] and contents[4] == [{"type": "audio", "audio": b"more"}]
    assert contents[5] == "q" and manifest[5].voices[0].speech == b"answer"
    assert manifest[0].messages[1]["content"] == [{"type": "text", "text": "hello"}]


def test_members_that_nothing_reads_are_errors(tmp_path: Path) -> None:
    row = json.dumps({"messages": chat("q", "a")})
    members = {"a.json": row, "a.wav": "sound", "b.txt": "hi", "b.wav": "x", "b.srt": "1", "c.wav": "alone"}
    manifest = Manifest(write_tar(tmp_path / "s.tar", members))
    for index, told in ((0, "0 <audio>.* 1 entries"), (1, "'srt'"), (2, "no .json member, only wav")):
        with pytest.raises(ValueError, match=told):
            manifest[index]


def test_shards_of_recordings_are_heard(tmp_path: Path) -> None:
    for shard in range(2):
        sound = io.BytesIO()
        soundfile.write(sound, tone(0.2, hz=300 * (shard + 1)), 16000, format="WAV")
        write_tar(tmp_path / f"s-{shard}.tar", {"a.txt": "hello", "a.wav": sound.getvalue()})
    manifest = Manifest(str(tmp_path / "s-{0..1}.tar"))
    crops = next(crop_batches(Mixture([manifest]), 16000, 0.1, batch_size=4))
    assert set(crops.names) == {f"{tmp_path / f's-{i}.tar'}:a" for i in range(2)} and bool(
        crops.waves.abs().amax(1).gt(0.1).all()
    )


# ---- datasets ----


class Table:
    """As much of a `datasets.Dataset` as a manifest asks for."""

    _fingerprint = "f0"

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def with_format(self, name: str) -> Table:
        assert name == "arrow"
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice) -> Any:
        return SimpleNamespace(to_pylist=lambda: self.rows[places])


def test_a_dataset_of_the_hub_is_named_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> Table:
        asked.append((name, config, split))
        if name == "none/such":
            raise FileNotFoundError("not on the Hub")
        return Table(
            [{"messages": [{"role": "user", "content": "q", "loss": None}, *chat("", "a")[1:]], "tools": None}]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    for name in ("owner/name:train", "name:test", "owner/name:en:train[:10%]"):
        manifest = Manifest(name)
        assert manifest[0].messages == chat("q", "a") and manifest.name(0) == f"{name}:0"
    assert asked == [("owner/name", None, "train"), ("name", None, "test"), ("owner/name", "en", "train[:10%]")]
    with pytest.raises(FileNotFoundError):
        Manifest("none/such:train")
    with pytest.raises(FileNotFoundError, match="name:split"):
        Manifest("owner/name")


def test_a_saved_dataset_of_several_splits_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("test", "train"):
        (tmp_path / "d" / split).mkdir(parents=True)
        (tmp_path / "d" / split / "state.json").write_text("{}")
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    library = SimpleNamespace(load_from_disk=lambda folder: Table([{"prompt": folder, "completion": "a"}]))
    monkeypatch.setitem(sys.modules, "datasets", library)
    manifest = Manifest(f"{tmp_path / 'd'}:test")
    assert manifest[0].messages == chat(str(tmp_path / "d" / "test"), "a")
    assert Manifest(tmp_path / "d" / "train")[0].messages == chat(str(tmp_path / "d" / "train"), "a")
    with pytest.raises(ValueError, match="holds the splits test, train"):
        Manifest(tmp_path / "d")


@NEEDS_DATASETS
def test_a_saved_dataset_equals_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"audio": {"bytes": b"wav", "path": None}, "sentence": "hello", "id": 3}]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    manifest = Manifest(tmp_path / "d")
    with pytest.warns(UserWarning, match="nothing but filters reads id"):
        assert manifest[0].messages[0]["content"] == [{"type": "audio", "audio": b"wav"}]
