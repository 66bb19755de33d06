"""Thinker, Talker and residual-code head learn a few spoken conversations by heart, and then say them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from omni import OmniModel, SamplingConfig
from omni.code2wav.code2wav import Code2Wav
from omni.config.model import OmniConfig
from omni.packaged.toy import TOY_DATA
from omni.training.codec.codec import Codec, draw_weights
from omni.training.codec.speech_codes import cached_codes, load_codec_encoder
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

GREEDY = SamplingConfig(temperature=0)
ANSWERS = {"Say one.": "One.", "Say two.": "Two, please.", "<audio>": "I hear you."}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers whose recordings are pieces of the packaged question."""
    folder = tmp_path_factory.mktemp("spoken")
    samples, rate = soundfile.read(TOY_DATA / "question.wav", dtype="float32")
    piece = int(0.7 * rate)
    lines = []
    for i, (question, answer) in enumerate(ANSWERS.items()):
        soundfile.write(folder / f"{i}.wav", samples[i * piece : (i + 1) * piece], rate)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "speech": f"{i}.wav", "speaker": ["Ethan", "Chelsie", "Aiden"][i]}
        lines.append(json.dumps(row | ({"audios": ["2.wav"]} if "<audio>" in question else {})))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained codec: its codes are as good as any to be learnt."""
    torch.manual_seed(0)
    config = OmniConfig.from_pretrained(TOY_DATA).code2wav_config
    assert config is not None
    codec = Codec(Code2Wav(config))
    draw_weights(codec)
    folder = tmp_path_factory.mktemp("codec") / "codec"
    codec.save(folder)
    return folder


def test_it_says_what_it_has_learnt(manifest: Path, codec: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {
            "model": {"config": str(TOY_DATA), "processor": str(TOY_DATA)},
            "train": {
                "objective": "joint", "steps": 160, "precision": "fp32", "device": "cpu",
                "parameters": ["audio_encoder.*", "thinker.*", "talker.*"],
            },
            "optimiser": {"lr": 4e-3, "warmup_steps": 10, "weight_decay": 0.0, "min_lr_ratio": 0.05},
            "loss": {"balance": 0.0, "talker_balance": 0.0, "residual": 1.0},
            "objective": {"residual_weight": 1.0},
            "data": {
                "train": [{"manifest": str(manifest)}], "bucket": 3, "max_tokens": 4096,
                "codec": {"kind": "omni", "path": str(codec), "cache": str(tmp_path / "codes")},
            },
            "log": {"progress": False, "folder": str(tmp_path / "log")},
            "save": {"export": str(tmp_path / "model")},
        }
    )  # fmt: skip
    result = build_run(config).train()
    assert result.last is not None
    assert result.last.losses["text"] < 0.02 and result.last.losses["codebook_0"] < 0.05
    assert result.last.losses["residual"] < 0.05
    model = OmniModel.from_pretrained(tmp_path / "model", device="cpu")
    assert model.processor is not None
    encoder = load_codec_encoder("omni", codec)
    for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
        question, answer = row["messages"]
        sound = str(manifest.parent / row["speech"])
        content = [{"type": "audio", "audio": sound}] if question["content"] == "<audio>" else question["content"]
        out = model.generate(
            model.processor([{"role": "user", "content": content}]), max_new_tokens=20, max_frames=30,
            text_sampling=GREEDY, audio_sampling=GREEDY, residual_sampling=GREEDY, speaker=row["speaker"],
        )  # fmt: skip
        assert out.text == [answer["content"]] and out.reason == ["stop"]
        assert torch.equal(out.codes[0], cached_codes(sound, encoder, tmp_path / "codes"))
