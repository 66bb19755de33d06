"""Folders: saved all or nothing, and found from what the user wrote."""

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

from omni.checkpoint import atomic_folder, save_weights
from omni.checkpoint.keys import KeyTable
from omni.config.locate import locate
from omni.config.qwen3_omni import QWEN3_OMNI

KEYS = KeyTable.of(QWEN3_OMNI)


def model():
    """A few tensors of 100 to 400 bytes with random values."""
    net = nn.Module()
    net.thinker = nn.Sequential(*(nn.Linear(5, 5 * n) for n in range(1, 5)))
    return net


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_save_replaces_an_old_one(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        save_weights(model(), folder, table=KEYS, max_shard_size=300)
    (target / "README.md").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("kept")
    with atomic_folder(target) as folder:
        save_weights(model(), folder, table=KEYS)
        (folder / "config.json").write_text("{}")
    assert set(contents(target)) == {"README.md", "runs/log", "config.json", "model.safetensors"}
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("{1}")  # no weights: the old ones stay
    assert "model.safetensors" in contents(target) and contents(target)["config.json"] == b"{1}"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("when", ["config", "serialising", "moving"])
def test_an_interrupted_save_leaves_the_old_folder_intact(tmp_path, monkeypatch, when):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        save_weights(model(), folder, table=KEYS, max_shard_size=300)
        (folder / "config.json").write_text("old")
    before = contents(target)
    calls = []

    def failing(real, at):
        def call(*arguments, **keywords):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        return call

    if when == "serialising":
        monkeypatch.setattr("omni.checkpoint.save.save_file", failing(save_file, 3))
    if when == "moving":
        monkeypatch.setattr(os, "rename", failing(os.rename, len(before) + 4))
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
        (folder / "config.json").write_text("new")
        if when == "config":
            raise KeyboardInterrupt
        save_weights(model(), folder, table=KEYS, max_shard_size=200)
    monkeypatch.undo()
    assert contents(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_first_save_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "deep" / "model"):
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_saving_through_a_link_and_into_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"config.json": b"{}"}
    monkeypatch.chdir(tmp_path / "real")
    with atomic_folder(".") as folder:
        (folder / "config.json").write_text("[]")
    assert Path("config.json").read_text() == "[]"


def test_resolving_folders(tmp_path, monkeypatch):
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    for missing in ("./none", "/none/here", "~/none-such", "a/b/c", "", tmp_path / "none", "C:\\models", "a b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist; pass a checkpoint folder or a Hub id"):
            locate(missing)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="is a file; pass the folder"):
        locate(tmp_path / "model.safetensors")


def test_resolving_hub_ids(tmp_path, monkeypatch):
    asked = {}

    def download(name, **keywords):
        asked.update(keywords, name=name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    answer = tmp_path
    assert locate("org/name", revision="v1", token="t", cache_dir="c", local_files_only=True) == tmp_path
    assert asked["name"] == "org/name" and asked["revision"] == "v1" and asked["local_files_only"]
    pickles = [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or "pt" in pattern]
    assert pickles == ["spk_dict.pt"], "the voices, which are read as tensors only"
    answer = FileNotFoundError("not in the cache")
    with pytest.raises(FileNotFoundError, match="'org/name' is no folder here and was not found on the Hub"):
        locate("org/name")
    answer = RuntimeError("401 no access.\nlong trace")
    with pytest.raises(OSError, match=r"401 no access; check the name") as error:
        locate("org/name")
    assert error.value.__cause__ is answer and "\n" not in str(error.value)
