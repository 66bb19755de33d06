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
from omni.encoders.mel import LogMel, frame_signal
from omni.packaged.nano import NANO_DATA
from omni.training.data.sound import read_speech

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
    (python,) = blocks("python")
    exec(compile(python, "docs/training.md", "exec"), {"__name__": "page"})
    for name, toml in zip(re.findall(r"as `(robin/\w+\.toml)`", SECTION), blocks("toml"), strict=True):
        Path(name).write_text(toml, encoding="utf-8")
    commands = [shlex.split(line) for block in blocks("") for line in block.replace("\\\n", " ").splitlines()]
    assert [command[1] for command in commands] == ["train", "train", "train", "chat"]
    for command in commands:
        assert command[0] == "omni"
        at = 3 if command[1] == "train" else len(command)  # settings stand behind the file's name
        assert main([*command[1:at], *(changes if at == 3 else ()), *command[at:]]) == 0, command


def test_fifty_recordings_become_a_checkpoint_that_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two steps in place of the page's: everything but how well it speaks."""
    monkeypatch.chdir(tmp_path)
    wave, rate_hz = soundfile.read(NANO_DATA / "demo" / "request.wav", dtype="float32")
    parts = np.array_split(wave, RECORDINGS // 10)
    said = {f"the old king number {i}": np.tile(parts[i % len(parts)], 2)[: 8000 + 100 * i] for i in range(RECORDINGS)}
    record(tmp_path, said, rate_hz)
    follow("train.steps=2", "optimiser.warmup_steps=0")
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


def spectrum(waves: list[torch.Tensor]) -> torch.Tensor:
    """The long-term spectrum of the louder half of some sounds at 24 kHz: 80 mel bins, in dB."""
    mel = LogMel(24000, 960, 240, 80)
    frames = torch.cat([mel.log_mel(frame_signal(wave.float(), 960, 240)) for wave in waves], dim=1)
    loud = frames.mean(0) > frames.mean(0).median()
    return 10 * frames[:, loud].mean(1)


@pytest.mark.slow  # minutes
def test_the_new_voice_sounds_like_the_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page as it stands, with recordings of a voice like nano's own, but a quarter higher and faster."""
    monkeypatch.chdir(tmp_path)
    nano = OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
    animals, things = ("dog", "king", "fish", "bird", "cat"), ("tree", "boat", "horse", "car", "table")
    texts = [f"{which} {who} sees the {what}" for which in ("the", "my") for who in animals for what in things]
    asked = [[{"role": "user", "content": f"repeat after me {text}"}] for text in texts]
    said = [nano.generate(nano.processor(asked[i : i + 10]), max_frames=60) for i in range(0, RECORDINGS, 10)]
    recorded = [wave.numpy() for out in said for wave in out.audio]  # type: ignore[union-attr]
    record(tmp_path, dict(zip(texts, recorded, strict=True)), 30000)
    follow()
    model: Any = OmniModel.from_pretrained(tmp_path / "runs" / "robin" / "model", dtype="float32", device="cpu")
    question = model.processor([{"role": "user", "content": "repeat after me the old king follows your blue fish"}])
    robin = spectrum([model.generate(question, speaker="robin", max_frames=60).audio[0]])
    heard = spectrum([read_speech((wave, 30000), 24000) for wave in recorded[:10]])
    before = spectrum([torch.from_numpy(wave) for wave in recorded[:10]])
    assert (robin - heard).abs().mean() < (robin - before).abs().mean()
