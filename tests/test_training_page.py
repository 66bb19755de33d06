"""docs/training.md from a folder of recordings to a checkpoint that speaks in their voice, word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from omni import OmniModel
from omni.cli.main import main
from omni.packaged.nano import NANO_DATA

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## From recordings to a new voice")[2].partition("\n## ")[0]
RECORDINGS = 50


def blocks(kind: str) -> list[str]:
    """The section's blocks of one language; "" are commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language == kind]


def record(folder: Path, said: dict[str, np.ndarray], rate_hz: int) -> None:
    """Recordings and what is said in them, in the folder that the page names."""
    wavs = folder / "robin" / "wavs"
    wavs.mkdir(parents=True)
    for number, (text, wave) in enumerate(said.items()):
        soundfile.write(wavs / f"{number:04}.wav", wave, rate_hz)
        (wavs / f"{number:04}.txt").write_text(f"{text}\n", encoding="utf-8")


def follow(*changes: str) -> None:
    """Do what the page says, in the current folder; changes are settings of the training command."""
    (python,), (toml,) = blocks("python"), blocks("toml")
    exec(compile(python, "docs/training.md", "exec"), {"__name__": "page"})
    (name,) = re.findall(r"as `(robin/\w+\.toml)`", SECTION)
    Path(name).write_text(toml, encoding="utf-8")
    commands = [shlex.split(line) for block in blocks("") for line in block.replace("\\\n", " ").splitlines()]
    assert [command[1] for command in commands] == ["train", "train", "speak"]
    for command in commands:
        assert command[0] == "omni"
        at = 3 if command[1] == "train" else len(command)  # settings stand behind the file's name
        assert main([*command[1:at], *(changes if at == 3 else ()), *command[at:]]) == 0, command


@pytest.mark.xfail(strict=True, reason="the page needs a codec encoder that nobody has")
def test_fifty_recordings_become_a_checkpoint_that_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two steps in place of the page's: everything but how well it speaks."""
    monkeypatch.chdir(tmp_path)
    wave, rate_hz = soundfile.read(NANO_DATA / "demo" / "request.wav", dtype="float32")
    parts = np.array_split(wave, RECORDINGS // 10)
    said = {f"the old king number {i}": np.tile(parts[i % len(parts)], 2)[: 8000 + 100 * i] for i in range(RECORDINGS)}
    record(tmp_path, said, rate_hz)
    follow("train.steps=2", "optimiser.warmup_steps=0", "data.max_tokens=600")
    said_of = capsys.readouterr()
    assert "skipped" not in said_of.err and "left out" not in said_of.err and "step 2/2" in said_of.err
    assert len(list((tmp_path / "robin" / "codes").rglob("*.safetensors"))) == RECORDINGS
    heard, rate_hz = soundfile.read(tmp_path / "hello.wav")
    assert rate_hz == 24000 and len(heard) > 0.3 * rate_hz and float(np.abs(heard).max()) > 0.02
    model = OmniModel.from_pretrained(tmp_path / "runs" / "robin" / "model", device="cpu")
    nano = OmniModel.from_pretrained("omni-nano", device="cpu")
    voices: dict[str, int] = model.config.talker_config.speaker_id  # type: ignore[assignment,union-attr]
    assert voices["robin"] not in nano.config.talker_config.speaker_id.values()  # type: ignore[union-attr]
    rows = model.talker.codec_embedding.weight, nano.talker.codec_embedding.weight  # type: ignore[union-attr]
    others = torch.arange(len(rows[0])) != voices["robin"]
    assert torch.equal(rows[0][others], rows[1][others]) and not torch.equal(rows[0], rows[1])
    assert model.dtype == torch.bfloat16


@pytest.mark.xfail(strict=True, reason="the page needs a codec encoder that nobody has")
@pytest.mark.slow  # minutes
def test_the_new_voice_says_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page as it stands: of a voice like nano's own, but a third higher, it learns words and timbre."""
    monkeypatch.chdir(tmp_path)
    nano = OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
    texts = [
        f"the {a} {b} sees the {c}"
        for a in ("old", "red", "small", "big", "blue")
        for b in ("dog", "king")
        for c in ("fish", "tree", "bird", "cat", "fox")
    ]
    waves = [nano.speak(texts[i : i + 10], speaker="slt", max_frames=100) for i in range(0, RECORDINGS, 10)]
    higher = [wave.numpy() for batch in waves for wave in batch]
    record(tmp_path, dict(zip(texts, higher)), 30000)  # played a quarter faster
    follow()
    model: Any = OmniModel.from_pretrained(tmp_path / "runs" / "robin" / "model", dtype="float32", device="cpu")
    robin, slt = (model.speak("the old dog sees the bird", speaker=name, max_frames=100) for name in ("robin", "slt"))
    assert len(robin) < len(slt)  # it speaks as fast as it was taught
