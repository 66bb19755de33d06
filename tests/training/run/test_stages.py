"""Every published stage, as its file says: what learns, what stays, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from build import SIZES, chat, config_values, fixed, speckle, tone, widen, write_processor, write_rows
from PIL import Image

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.packaged.toy import toy_model
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import LogTable, TrainConfig

# One manifest serves stages with and without filters, and none says the second family's system text.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nothing but filters reads"),
    pytest.mark.filterwarnings("ignore:the conversation does not begin"),
]
ROOT = Path(__file__).parents[3]
STAGES = sorted(path.stem.removeprefix("train_") for path in (ROOT / "configs").glob("train_*.toml"))
CODEBOOKS, CODES, FRAMES = 4, 64, 70  # of the tiny model; more frames than codes, so that each code may occur


def codes(seed: int, frames: int = FRAMES) -> list[list[int]]:
    """Codes in which every code of every codebook occurs."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.arange(frames) % CODES).tolist() for _ in range(CODEBOOKS)]


def varied(sample: Any) -> float:
    """A reward that tells answers apart."""
    return float(sum(sample.ids) % 7)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One manifest of each kind, with its media."""
    folder = tmp_path_factory.mktemp("data")
    soundfile.write(folder / "tone.wav", tone(1.5, hz=330, level=0.3), 16000)
    Image.fromarray(speckle(64, 96)).save(folder / "picture.png")
    spoken = {
        "messages": chat("Say it.", "All right then."),
        "codes": codes(0),
        "speaker": "Ethan",
        "wer": 0.01,
        "snr_db": 40,
    }
    rows: dict[str, list[dict[str, Any]]] = {
        "mixed": [
            {"messages": chat("<audio>What is this?", "A tone, steady and low."), "audios": ["tone.wav"]},
            {"messages": chat("<image>And this?", "Noise in many colours."), "images": ["picture.png"]},
            {"messages": chat("One?", "Two.", "Three?", "Four, and so on.")},
        ],
        "audio": [{"messages": chat("<audio>", "A low tone."), "audios": ["tone.wav"]}],
        "spoken": [spoken, {**spoken, "messages": chat("<audio>Repeat.", "A tone."), "audios": ["tone.wav"]}],
        "new_voice": [{**spoken, "speaker": "robin"}],
        "pairs": [{**spoken, "rejected": {"content": "All right then.", "codes": codes(1, 40)}}],
        "questions": [{"messages": chat("What is two and two?", "4")}],
        "spoken_alone": [{"messages": chat("Say it.", "All right then."), "codes": codes(2)[:1], "speaker": "eve"}],
        "voices": [{"audio": "tone.wav", "speaker": "ann", "speaker_embedding": [1, i, -1]} for i in range(2)],
    }
    for row in rows["voices"]:  # as many as the tiny decoder's 12 samples a code make of 1.5 s at 24 kHz
        row["codes"] = [np.random.default_rng(0).integers(0, 20, 3000).tolist()]
    return {name: write_rows(folder / f"{name}.jsonl", content) for name, content in rows.items()}


KIND = {
    "audio_encoder": "audio",
    "captioner": "audio",
    "codec": "audio",
    "distillation": "questions",
    "gspo": "questions",
    "qwen2_5_talker": "spoken_alone",
    "qwen2_5_token2wav": "voices",
    "speaker": "new_voice",
    "talker_continued": "spoken",
    "talker_dpo": "pairs",
    "talker_mapping": "spoken",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights, so that no gradient drowns in rounding, and its processor files."""
    model = widen(toy_model(seed=0), 5, but="")
    folder = tmp_path_factory.mktemp("stages") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def second_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the second family, no parameter at zero."""
    values = {**config_values(1, audio={}, vocabulary=512), "token2wav_config": SIZES}
    with fixed(), torch.no_grad():
        model = OmniModel(OmniConfig.from_dict(values))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    files = tmp_path_factory.mktemp("second")
    model.processor = OmniProcessor.from_pretrained(write_processor(files / "files"))
    model.save_pretrained(files / "tiny")
    values = json.loads((files / "tiny" / "config.json").read_text())
    values |= {name: getattr(model.config, name) for name in CHAT_IDS}  # the tiny vocabulary's own, not in real files
    (files / "tiny" / "config.json").write_text(json.dumps(values))
    return files / "tiny"


CHAT_IDS = ("im_start_token_id", "im_end_token_id", "user_token_id", "assistant_token_id")
Make = Callable[..., Run]


@pytest.fixture
def make(manifests: dict[str, Path], checkpoint: Path, request: pytest.FixtureRequest) -> Make:
    """A stage on the tiny model of its family and the manifests of this file."""

    def build(stage: str, **changes: Any) -> Run:
        kind, second = KIND.get(stage, "mixed"), stage.startswith("qwen2_5")
        folder = request.getfixturevalue("second_checkpoint") if second else checkpoint
        data = json.dumps(str(manifests[kind]))
        overrides = {
            "model.checkpoint": json.dumps(str(folder)),
            "model.dtype": '"float32"',
            "data.train": f"[{{ manifest = {data} }}]",
            "data.workers": "0",
            "data.max_tokens": "2048",
            "data.bucket": "8",
            "train.steps": "2",
            "train.precision": '"fp32"',
            "train.device": '"cpu"',
            "optimiser.warmup_steps": "0",
            "log.progress": "false",
            **changes,
        }
        values = TrainConfig.from_toml(
            ROOT / "configs" / f"train_{stage}.toml", [f"{key}={value}" for key, value in overrides.items()]
        ).to_dict()
        for table in ("log", "save"):
            values[table] = {k: v for k, v in values.get(table, {}).items() if k not in ("folder", "export")}
        values["data"].get("codec", {}).pop("path", None)
        small = {
            "teacher": str(checkpoint), "max_new_tokens": 6, "group_size": 4, "batch_size": 2, "crop_s": 0.4,
            "rewards": ["test_stages:varied"], "start_adversarial_step": 0,
        }  # fmt: skip
        own = values.get("objective", {})
        own |= {key: value for key, value in small.items() if key in own}
        own |= {"judge_width": 4, "judge_levels": [128]} if stage == "codec" else {}
        own |= {"crop_s": 0.01, "reference_s": 0.004, "n_fft": 64} if stage == "qwen2_5_token2wav" else {}
        own.pop("encoder_folder", None)
        return build_run(TrainConfig.from_dict(values))

    return build


# Adding a constant to all keys changes no attention weight, so these have a gradient of zero.
ZERO = ("k_proj.bias",)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_what_it_names_and_nothing_else(make: Make, stage: str) -> None:
    run = make(stage)
    before = {name: p.detach().clone() for name, p in run.stage.module.named_parameters()}
    learns = {name for name, p in run.stage.module.named_parameters() if p.requires_grad}
    seen: set[str] = set()
    for name, p in run.stage.module.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda grad, name=name: seen.add(name) if grad is not None else None)
    for _ in range(2):  # in its first step the second factor of a low-rank update is zero, and hides the first
        result = run.trainer.step()
        assert not result.skipped and np.isfinite(result.loss)
    assert learns and learns == seen, sorted(learns - seen)[:5]
    changed = {name for name, p in run.stage.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= learns
    moved = {name for name in learns if not name.endswith(ZERO)}
    # what a single step of a small batch cannot reach: experts and ids that nothing chose are inside one parameter
    assert len(moved - changed) <= len(moved) // 20, sorted(moved - changed)[:10]


def test_every_expert_and_codebook_learns(make: Make) -> None:
    """In a batch large enough that each is chosen: no stacked expert, embedding table or head is left out."""
    run = make("talker_mapping", **{"train.accumulate": "4"})
    reached: dict[str, torch.Tensor] = {}

    def note(name: str, grad: torch.Tensor) -> None:
        rows = grad.detach().abs().flatten(1).sum(1) > 0
        reached[name] = reached.get(name, torch.zeros_like(rows)) | rows

    for name, p in run.stage.module.named_parameters():
        if p.requires_grad and p.dim() > 1:
            p.register_hook(lambda grad, name=name: note(name, grad))
    run.trainer.step()
    experts = {name: rows for name, rows in reached.items() if ".experts." in name}
    assert len(experts) == 6 and all(bool(rows.all()) for rows in experts.values())
    books = {name: rows for name, rows in reached.items() if name.startswith(("talker.mtp.codec_", "talker.mtp.lm_"))}
    assert len(books) == 6 and all(bool(rows.all()) for rows in books.values())
    first = reached["talker.codec_embedding.weight"]
    assert bool(first[:CODES].all())


@pytest.mark.parametrize(
    "stage",
    ["codec", "qwen2_5_talker", "s1_audio_adapter", "s1_vision_encoder", "speaker", "talker_mapping", "thinker_lora"],
)
def test_stages_run_in_bfloat16_as_their_files_say(make: Make, stage: str) -> None:
    """Frozen weights in bfloat16, those that learn in float32, the passes under autocast."""
    run = make(stage, **{"model.dtype": '"bfloat16"', "train.precision": '"bf16"'})
    kinds = {p.dtype for p in run.stage.module.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    losses = [run.trainer.step().loss for _ in range(2)]
    assert all(np.isfinite(losses)) and losses[0] != losses[1]


@pytest.mark.parametrize(("stage", "name"), [("thinker_sft", "loss"), ("codec", "mel_db"), ("audio_encoder", "wer")])
def test_a_run_scores_itself_between_steps(
    make: Make, manifests: dict[str, Path], tmp_path: Path, stage: str, name: str
) -> None:
    data = json.dumps(str(manifests[KIND.get(stage, "mixed")]))
    changes = {"data.eval": f"[{{ manifest = {data} }}]", "eval.every": "2", "eval.limit": "1", "train.steps": "2"}
    run = make(stage, **changes)
    run.trainer.config = replace(run.trainer.config, log=LogTable(folder=str(tmp_path), progress=False))
    run.train()
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert any(name in key for key in last) or name in str(last), last


@pytest.mark.parametrize("parts", [("code2wav",), ("thinker", "talker")])
def test_an_export_that_would_fail_in_the_end_fails_at_once(checkpoint: Path, parts: tuple[str, ...]) -> None:
    values = {
        "model": {"checkpoint": str(checkpoint), "parts": parts},
        "train": {"objective": "codec"},
        "save": {"export": "somewhere"},
    }
    with pytest.raises(ValueError, match="make none"):
        build_run(TrainConfig.from_dict(values))
