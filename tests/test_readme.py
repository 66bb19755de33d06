"""The README's Python blocks run as printed, in order: the first on omni-nano, the others on the tiny model instead of
the released one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omni import OmniSession
from omni.packaged.toy import TOY_DATA

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MEDIA = ("question.wav", "picture.png", "clip.mp4")
RELEASED = "Qwen/Qwen3-Omni-30B-A3B-Instruct"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_example_is_short() -> None:
    assert len(python_blocks()[0].splitlines()) <= 20


def test_the_first_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder, without a download: omni-nano hears a question about a picture, and answers."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(python_blocks()[0], "README block 1", "exec"), names)
    assert capsys.readouterr().out.strip() == "purple"
    samples, sample_rate = soundfile.read(tmp_path / "answer.wav")
    assert len(samples) > sample_rate // 4 and RELEASED not in python_blocks()[0] and RELEASED in python_blocks()[1]


def test_every_block_runs(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MEDIA:
        shutil.copy(TOY_DATA / name, tmp_path / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(python_blocks(), 1):
        code = block.replace(RELEASED, str(tiny_checkpoint))
        exec(compile(code, f"README block {number}", "exec"), names)
    assert capsys.readouterr().out.strip(), "the first example prints the answer"
    samples, sample_rate = soundfile.read(tmp_path / "answer.wav")
    assert len(samples) > 0 and sample_rate == 24000
    assert len(names["out"].text) == 1 and len(names["wav"]) > 0
    assert names["logits"].shape[:2] == names["audio"].input_ids.shape
    assert sum(len(samples) for samples in names["sound"]) > 0 and len(names["heard"]) == 2 and names["reply"]
    assert (tmp_path / "my-checkpoint" / "model.safetensors").is_file()
    session = OmniSession(names["mine"])  # its encoder gives `forward` and `num_tokens` alone
    for piece in np.array_split(0.1 * np.sin(np.arange(16000.0)), 7):
        session.push_audio(piece)
    *_, end = session.respond(max_new_tokens=2, max_frames=2)
    assert session.ids.count(275) == 5 and end.usage["frames"] > 0


def test_commands_and_files_it_names_exist() -> None:
    from omni.cli.main import build_parser

    parser = build_parser()
    for line in re.findall(r"^omni (.*)$", README, re.MULTILINE):
        words = re.findall(r'"[^"]*"|\S+', line)
        parser.parse_args([word.strip('"') for word in words])  # a wrong option would exit
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"[`(]((?:omni|configs|docs)/[\w./]+)[`)]", README):
        assert (ROOT / path).exists(), path


def test_figures_are_those_of_the_released_config() -> None:
    from omni.bench.footprint import cache_bytes_per_token
    from omni.cli.checkpoint_info import sizes_from_config
    from omni.config.model import OmniConfig

    config = OmniConfig.from_pretrained(ROOT / "configs" / "qwen3_omni_30b_a3b.json")
    sizes = sizes_from_config(config)
    total = sum(size.bytes for size in sizes.values())
    thinker = sum(sizes[part].bytes for part in ("thinker", "audio encoder", "vision encoder"))
    assert f"| {total / 1e9:.1f} GB |" in README and f"| {thinker / 1e9:.1f} GB |" in README
    assert f"{cache_bytes_per_token(config) * 1000 / 1e6:.1f} MB" in README
    for size in ("7b", "3b"):
        config = OmniConfig.from_pretrained(ROOT / "configs" / f"qwen2_5_omni_{size}.json")
        sizes = sizes_from_config(config)
        total = sum(part.bytes for part in sizes.values()) / 1e9
        thinker = sum(sizes[part].bytes for part in ("thinker", "audio encoder", "vision encoder")) / 1e9
        row = f"| {total:.1f} GB | {thinker:.1f} GB | {cache_bytes_per_token(config) / 1e3:.1f} MB |"
        assert f"| Qwen2.5-Omni-{size.upper()} |" in README and row in README, row


def test_the_page_on_streaming_is_true() -> None:
    """Its links and commands work, and it explains every key of a turn's timing and every knob of latency."""
    from dataclasses import fields

    from omni import StreamingConfig
    from omni.cli.main import build_parser
    from omni.packaged.toy import toy_model

    page = (ROOT / "docs" / "streaming.md").read_text()
    for path in re.findall(r"\]\(([\w./]+)\)", page):
        assert (ROOT / "docs" / path).stat().st_size < 300_000, path
    for path in re.findall(r"`((?:omni|configs|scripts|benchmarks)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
    for line in re.findall(r"^omni (.*)$", page, re.MULTILINE):
        build_parser().parse_args(line.split())
    model = toy_model()
    assert model.processor is not None
    inputs = model.processor([{"role": "user", "content": "Hi"}])
    *_, end = model.stream(inputs, max_new_tokens=3, max_frames=4, streaming=StreamingConfig(chunk_frames=(2,)))
    rows = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert end.timing.keys() <= rows, end.timing.keys() - rows
    for knob in fields(StreamingConfig):
        assert knob.name in page, knob.name


def test_the_page_on_training_is_true() -> None:
    """Its commands parse, its stages are the files that exist, and the manifest it writes is read."""
    from omni.cli.main import build_parser
    from omni.training.run.stages import OBJECTIVES

    page = (ROOT / "docs" / "training.md").read_text()
    for command in re.findall(r"^omni ((?:.*\\\n)*.*)$", page, re.MULTILINE):
        words = re.findall(r"'[^']*'|\"[^\"]*\"|\S+", command.replace("\\\n", " "))
        build_parser().parse_args([word.strip("'\"") for word in words])
    stages = {path.stem for path in (ROOT / "configs").glob("train_*.toml")}
    rows = re.findall(r"^\| `(train_\w+)` \|.*?\| `(\w+)` \|[^|]*\|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == stages
    assert {objective for _, objective in rows} <= set(OBJECTIVES)
    for path in re.findall(r"`((?:omni|configs|docs)/[\w./]+\w)`", page):
        assert (ROOT / path).exists(), path
