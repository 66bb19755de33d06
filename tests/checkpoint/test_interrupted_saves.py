"""A process that is killed while it saves leaves the old folder or the new one, and nothing else for long."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from build import make_voice, tiny_config, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from omni import OmniConfig, OmniModel, OmniProcessor, OmniSession
from omni.checkpoint import atomic_folder
from omni.cli.main import main
from omni.code2wav.voices import save_voices
from omni.training.run.lora import add_lora, save_lora

# A save in a process that ends, as if killed, at its n-th rename or at the n-th file that it removes.
KILLED = """
import os, sys, shutil
from pathlib import Path
at, target = int(sys.argv[1]), Path(sys.argv[2])
calls = [0]
def ending(real):
    def call(*a, **k):
        calls[0] += 1
        if calls[0] == at:
            os._exit(9)
        return real(*a, **k)
    return call
from omni.checkpoint import atomic_folder
for name in ("rename", "replace", "unlink", "rmdir"):
    setattr(os, name, ending(getattr(os, name)))
with atomic_folder(target) as folder:
    for name in ("a.json", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                 "model.safetensors.index.json", "z.json"):
        (folder / name).write_text("new")
"""
# One process tries every step in a folder of its own; it forks, so that libraries are imported once.
EVERY_STEP = """
import os, sys
from pathlib import Path
import omni.checkpoint
source, root = sys.argv[1], Path(sys.argv[2])
for step in range(1, 40):
    target = root / str(step) / "model"
    target.mkdir(parents=True)
    for name in ("a.json", "config.json", "model.safetensors", "mine.txt"):
        (target / name).write_text("old")
    child = os.fork()
    if child == 0:
        sys.argv = ["", str(step), str(target)]
        exec(source)
        os._exit(0)
    os.waitpid(child, 0)
"""
OLD = ("a.json", "config.json", "model.safetensors", "mine.txt")
NEW = {"a.json", "config.json", "z.json", "model.safetensors.index.json"}
NEW |= {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def kill_at(step: int, target: Path, program: str = KILLED) -> int:
    done = subprocess.run([sys.executable, "-c", program, str(step), str(target)], capture_output=True, timeout=120)
    assert done.returncode in (0, 9), done.stderr.decode()
    return done.returncode


def test_killed_at_any_step_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVERY_STEP, KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=200, text=True)
    assert done.returncode == 0, done.stderr
    found = set()
    for step in range(1, 40):
        first, second = tmp_path / str(step), tmp_path / f"{step} again"
        shutil.copytree(first, second)
        for target, opening in ((first / "model", "load"), (second / "model", "save")):
            if opening == "load":
                with pytest.raises((ValueError, FileNotFoundError)):
                    OmniModel.from_pretrained(target)
            else:
                with pytest.raises(KeyError), atomic_folder(target):
                    raise KeyError
            files = contents(target)
            kept = files.pop("mine.txt")
            assert kept == "old" and len(set(files.values())) == 1, (step, files)
            state = next(iter(files.values()))
            assert files.keys() == (NEW if state == "new" else set(OLD) - {"mine.txt"}), (step, files)
            assert [path.name for path in target.parent.iterdir()] == ["model"], step
            found.add((opening, state))
    assert len(found) == 4


def test_leftovers_of_a_first_save_are_cleaned_and_living_saves_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert kill_at(1, target) == 9
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_folder(target) as first:
        (first / "config.json").write_text("{}")
        with atomic_folder(target) as second:  # of another save that runs
            (second / "config.json").write_text("[]")
        assert first.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and contents(target) == {"config.json": "{}"}


@pytest.mark.slow  # two processes that import everything; the same moves are killed one by one above
def test_a_whole_model_killed_in_the_middle_opens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = KILLED.split("with atomic_folder")[0] + (
        "from omni import OmniModel\nmodel = OmniModel.from_pretrained(sys.argv[2], device='cpu')\n"
        "model.thinker.norm.weight.data.fill_(7)\nmodel.save_pretrained(target)\n"
    )
    # at its n-th new file of the model's own save, which holds a save of the processor's files
    moves = "Path(a[0]).parent.name == 'ready' and '/.new.saving' not in str(a[0])"
    program = program.replace("calls[0] += 1", f"calls[0] += bool({moves})")
    target = tmp_path / "odd [name]*"
    OmniModel.from_pretrained(tiny_checkpoint, device="cpu").save_pretrained(target)
    assert kill_at(2, target, program) == 9
    assert len(list(tmp_path.iterdir())) == 2
    model = OmniModel.from_pretrained(target, device="cpu")
    assert model.processor is not None and (model.thinker.norm.weight == 7).all()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("what", ["config", "processor"])
def test_configs_and_processors_are_written_whole_or_not_at_all(what, tmp_path: Path, monkeypatch) -> None:
    thing = tiny_config() if what == "config" else tiny_model("thinker").processor
    thing.save_pretrained(tmp_path)
    before = contents(tmp_path)
    real = Path.write_text

    def failing(path: Path, text: str, *args: object, **options: object) -> int:
        real(path, text[: len(text) // 2], *args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match=r"No space"):
        thing.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    (OmniConfig if what == "config" else OmniProcessor).from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["session", "voices", "adapter", "model"])
def test_a_disk_that_is_full_is_an_os_error(what, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = tiny_model()
    saved = {
        "session": lambda: OmniSession(model).save(tmp_path / "session"),
        "model": lambda: model.save_pretrained(tmp_path / "model"),
    }
    if what == "voices":
        saved[what] = lambda: save_voices({"ann": make_voice()}, tmp_path / "voices.safetensors")
    if what == "adapter":
        add_lora(model, "thinker.layers.*.q_proj", rank=2)
        saved[what] = lambda: save_lora(model, tmp_path / "adapter")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name in ("omni.session.file", "omni.checkpoint.save", "omni.code2wav.voices", "omni.training.run.lora"):
        if hasattr(sys.modules.get(name), "save_file"):
            monkeypatch.setattr(f"{name}.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*free space"):
        saved[what]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000, 0o077])
def test_all_files_have_the_mode_of_the_process(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        model = tiny_model()
        model.save_pretrained(tmp_path / "model")
        OmniSession(model).save(tmp_path / "session")
        save_voices({"ann": make_voice()}, tmp_path / "voices.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "command",
    [
        ["speak", "one", "--out", "{}/answer.wav"],
        ["chat", "say one", "--out", "{}/answer.wav"],
        ["demo", "--out-dir", "{}"],
        ["eval", "{}/rows.jsonl", "--model", "omni-nano", "--out", "{}/results.jsonl"],
        ["bench", "p12", "--json", "{}/results.json"],
    ],
    ids=lambda command: command[0],
)
def test_commands_find_out_that_they_cannot_write_first(command, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    monkeypatch.setattr(OmniModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("omni.packaged.nano.nano_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("omni.cli.bench.measure", lambda *_, **__: pytest.fail("it was measured"))
    real, inside = os.open, str(tmp_path)  # rights do not hold root back: nothing there opens for writing

    def refusing(path: object, flags: int, *args: object, **options: object) -> int:
        if str(path).startswith(inside) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *args, **options)

    real_open = io.open

    def refusing_open(file: object, mode: str = "r", *args: object, **options: object) -> object:
        if str(file).startswith(inside) and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(file))
        return real_open(file, mode, *args, **options)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(io, "open", refusing_open)
    assert main([part.format(tmp_path) for part in command]) == 1
    said = capsys.readouterr().err
    assert "cannot be written" in said and "Permission denied" in said
