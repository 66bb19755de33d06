"""Folders: saved all or nothing."""

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

from omni.checkpoint import atomic_folder, save_weights
from omni.checkpoint.keys import KeyTable
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
