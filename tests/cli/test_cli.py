"""The `omni` command: what it writes, and that every failure is one line and an exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni.cli.checkpoint_info import format_bytes, sizes_from_config, sizes_from_files
from omni.cli.main import main
from omni.cli.sound_picture import LEFT, MEL, TITLE, WAVE, save_sound_picture
from omni.packaged.toy import TOY_DATA, toy_model

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *argv: str | Path, code: int = 1) -> str:
    """Run a command that must fail with a code; returns its one line on stderr."""
    try:
        assert main([str(word) for word in argv]) == code
    except SystemExit as stop:  # argparse's way out
        assert stop.code == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("omni") and captured.out == "", captured
    return lines[0]


# --- the packaged toy


def test_demo_model_is_reproducible() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = toy_model(1), toy_model(1), toy_model(2)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is left alone"
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert a.dim() < 2 or not torch.equal(a, c), name


def test_packaged_media_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in TOY_DATA.iterdir()}
    assert {"question.wav", "picture.png", "clip.mp4", "config.json", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) < 1_000_000


# --- speak and chat


def test_speak_with_a_checkpoint_is_reproducible(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    def speak(name: str, *more: str) -> np.ndarray:
        path = tmp_path / name
        argv = ["speak", "Hi.", "--model", str(tiny_checkpoint), "--out", str(path), "--max-frames", "3", *more]
        assert main(argv) == 0
        return soundfile.read(path)[0]

    one = speak("1.wav", "--seed", "1", "--speaker", "ETHAN")
    assert np.array_equal(one, speak("2.wav", "--seed", "1", "--speaker", "Ethan"))
    assert not np.array_equal(one, speak("3.wav", "--seed", "2", "--speaker", "Ethan"))
    assert "omni-nano" not in capsys.readouterr().err


def test_chat_with_all_media(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "answer.wav"
    argv = ["chat", "--model", tiny_checkpoint, "--audio", TOY_DATA / "question.wav"]
    argv += ["--image", TOY_DATA / "picture.png", "--image", TOY_DATA / "picture.png"]
    argv += ["--video", TOY_DATA / "clip.mp4", "--use-audio-in-video", "--system", "Be brief."]
    argv += ["--max-new-tokens", "3", "--max-frames", "3", "--seed", "0", "--out", out, "What is it?"]
    assert main([str(word) for word in argv]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() and "speech" in captured.err
    assert soundfile.info(out).frames > 0


def test_chat_in_text_only(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "--model", str(tiny_checkpoint), "--no-audio", "--max-new-tokens", "2", "Hello"]) == 0
    assert capsys.readouterr().out.strip() and not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.processing.audio_file import write_sound

    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def break_off(file: Path, *_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(soundfile, "write", break_off)
    with pytest.raises(OSError, match="disk full"):
        write_sound(path, torch.zeros(10), 24000)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.wav"]


def test_realtime_misuse_and_failures(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    ask = ("chat", "--model", "x", "--realtime")
    assert "takes time" in fails(capsys, *ask, "Hi", code=2)
    assert "one --audio" in fails(capsys, *ask, "--audio", "a", "--audio", "b", code=2)
    assert "one sound" in fails(capsys, *ask, "--audio", "a", "--video", "b", "--use-audio-in-video", code=2)
    assert "'-1'" in fails(capsys, *ask, "--audio", "a", "--pace=-1", code=2)
    assert "'0'" in fails(capsys, *ask, "--audio", "a", "--audio-window", "0", code=2)
    assert "'0'" in fails(capsys, *ask, "--audio", "a", "--audio-chunk", "0", code=2)
    assert "--realtime" in fails(capsys, "chat", "--model", "x", "--pace", "0", "Hi", code=2)
    assert "--play" in fails(capsys, "chat", "--model", "x", "--no-audio", "--play", "Hi", code=2)
    missing = ("chat", "--model", tiny_checkpoint, "--realtime", "--no-audio", "--audio", tmp_path / "missing.wav")
    assert "missing.wav" in fails(capsys, *missing)
    half = (
        "chat",
        "--model",
        tiny_checkpoint,
        "--no-audio",
        "--audio",
        TOY_DATA / "question.wav",
        "--audio-chunk",
        "0.5",
    )
    for how in ((), ("--realtime",)):
        assert "audio_chunk_s of 0.5 s is not possible" in fails(capsys, *half, *how)


# --- info


def test_info_reads_headers_alone(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """The figures equal those of the loaded model, and the same file without its data is refused, not read."""
    assert main(["info", str(tiny_checkpoint)]) == 0
    printed = capsys.readouterr().out
    model = toy_model(0)
    for module in (model.audio_encoder, model.vision_encoder, model.thinker, model.code2wav, model.talker.mtp):  # type: ignore[union-attr]
        assert f"{sum(p.numel() for p in module.parameters()):,}" in printed  # type: ignore[union-attr]
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in printed and "float32" in printed and format_bytes(4 * total) in printed
    assert "aiden, chelsie, ethan" in printed and "text and speech out" in printed
    shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert "model.safetensors" in fails(capsys, "info", tmp_path / "cut")


def test_info_from_a_config_alone(tmp_path: Path, capsys: Capture) -> None:
    released = ROOT / "configs" / "qwen3_omni_30b_a3b.json"
    shutil.copy(released, tmp_path / "config.json")
    for path in (released, tmp_path):
        assert main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "35,259,818,545" in printed and "70.5 GB" in printed and "no weight files" in printed
        assert "streaming" not in printed
    assert main(["info", str(ROOT / "configs" / "qwen2_5_omni_7b.json")]) == 0
    assert "the first 140 ms of sound need 36 codes, 720 ms of speech" in capsys.readouterr().out


def test_info_sizes_agree_between_files_and_config(tiny_checkpoint: Path) -> None:
    from omni.config.model import OmniConfig
    from omni.config.qwen3_omni import QWEN3_OMNI

    on_disk, files = sizes_from_files(tiny_checkpoint, QWEN3_OMNI)
    described = sizes_from_config(OmniConfig.from_pretrained(tiny_checkpoint))
    assert files == 1 and set(on_disk) == set(described)
    for part, size in on_disk.items():
        assert (size.parameters, size.bytes) == (described[part].parameters, described[part].bytes), part


def test_info_of_a_text_only_variant(tmp_path: Path, capsys: Capture) -> None:
    values = json.loads((TOY_DATA / "config.json").read_text())
    values["enable_audio_output"] = False
    values["thinker_config"]["vision_config"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "text, audio in; text out" in printed and "code2wav" not in printed and "speakers" not in printed


# --- errors


def test_misuse_is_one_line_and_code_2(capsys: Capture) -> None:
    assert "command" in fails(capsys, code=2)
    assert "demo" in fails(capsys, "dmo", code=2)
    assert "--out" in fails(capsys, "speak", "Hello", code=2)
    assert "nothing is asked" in fails(capsys, "chat", "--model", "x", "", code=2)
    assert "--no-audio" in fails(capsys, "chat", "--model", "x", "--no-audio", "--out", "a.wav", "Hi", code=2)
    assert "'0'" in fails(capsys, "speak", "Hi", "--out", "a.wav", "--max-frames", "0", code=2)


def test_failures_are_one_line_and_code_1(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    ask = ("chat", "--model", tiny_checkpoint, "--no-audio")
    assert "missing.wav" in fails(capsys, *ask, "--audio", tmp_path / "missing.wav")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert "broken.png" in fails(capsys, *ask, "--image", tmp_path / "broken.png", "Hi")
    assert "nowhere" in fails(capsys, "chat", "--model", tmp_path / "nowhere", "--no-audio", "Hi")
    assert "nowhere" in fails(capsys, "info", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in fails(capsys, "info", tmp_path)


def test_the_output_path_is_checked_before_the_model_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    """The model of these commands does not exist, so the complaint about the path must have come first."""
    ask = ("speak", "--model", tmp_path / "no-model", "Hi", "--out")
    assert "no-folder" in fails(capsys, *ask, tmp_path / "no-folder" / "a.wav")
    assert ".wav" in fails(capsys, *ask, tmp_path / "a.xyz")
    assert "is a folder" in fails(capsys, *ask, tmp_path)


def test_an_unknown_speaker_is_answered_with_the_known_ones(tmp_path: Path, capsys: Capture) -> None:
    assert main(["speak", "Hi", "--out", str(tmp_path / "a.wav"), "--speaker", "nobody"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("omni: error:") and "nobody" in line and "slt" in line and not any(tmp_path.iterdir())


def test_unforeseen_errors(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def burst(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("omni.cli.checkpoint_info.print_info", burst)
    line = fails(capsys, "info", "x")
    assert "RuntimeError: two lines" in line and "OMNI_DEBUG" in line
    monkeypatch.setenv("OMNI_DEBUG", "1")
    with pytest.raises(RuntimeError, match="two"):
        main(["info", "x"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omni.cli.checkpoint_info.print_info", interrupt)
    assert fails(capsys, "info", "x", code=130) == "omni: interrupted"


def test_help() -> None:
    done = subprocess.run([sys.executable, "-m", "omni.cli", "--help"], capture_output=True, text=True, check=True)
    for word in ("examples:", "omni demo", "chat", "speak", "info"):
        assert word in done.stdout


# --- the picture


def test_picture_shows_where_the_sound_is(tmp_path: Path) -> None:
    """A tone in the second half: the waveform is flat before it, the spectrogram dark before it and bright at it."""
    samples = torch.zeros(24000)
    samples[12000:] = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(12000) / 24000)
    save_sound_picture(tmp_path / "tone.png", samples, 24000, "tone")
    pixels = np.asarray(Image.open(tmp_path / "tone.png").convert("L"), dtype=float)
    quiet, loud = slice(LEFT + 50, LEFT + 300), slice(LEFT + 550, LEFT + 800)
    wave = pixels[TITLE + 10 : TITLE + WAVE // 2 - 10]
    assert wave[:, loud].mean() < wave[:, quiet].mean() - 30
    mel = pixels[-MEL - 40 : -60]
    assert mel[:, quiet].max() < 60 and mel[:, loud].max() > 180


@pytest.mark.parametrize("samples", [torch.zeros(0), torch.zeros(24000), torch.full((5,), 2.0)], ids=str)
def test_picture_of_silence_and_of_very_short_sounds(tmp_path: Path, samples: torch.Tensor) -> None:
    save_sound_picture(tmp_path / "a.png", samples, 24000, "a")
    assert (tmp_path / "a.png").stat().st_size > 1000
