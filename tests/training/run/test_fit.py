"""Objective, settings and rows that do not fit each other are refused before the first step, also by a dry run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from build import chat, speech_codes, tone, write_rows

from omni.cli.main import main
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import TrainConfig

CODES = speech_codes(6)
PLAIN = [{"messages": chat("q", "a", "q", "b")}, {"messages": chat("other", "c")}]
SPOKEN = [{"messages": chat("q", "a"), "codes": CODES, "speaker": "ethan"} for _ in range(2)]
PAIR = [{"messages": chat("q", "good"), "rejected_response": "bad"}]
SPOKEN_PAIR = [{"messages": chat("q", "a"), "codes": CODES, "rejected": {"codes": speech_codes(5)}}]
Make = Callable[..., Run]


@pytest.fixture
def make(tiny_checkpoint: Path, tmp_path: Path) -> Make:
    """A run of an objective on rows; further tables of its config by name."""

    def build(named: str, rows: list[dict[str, Any]], **tables: Any) -> Run:
        data = {"train": [{"manifest": str(write_rows(tmp_path / "rows.jsonl", rows))}], "bucket": 4}
        if tables.get("objective", {}).get("teacher") == "CHECKPOINT":
            tables["objective"] = {"teacher": str(tiny_checkpoint)}
        train = {"objective": named, "steps": 2, "precision": "fp32", "device": "cpu"}
        return build_run(
            TrainConfig.from_dict(
                {
                    "model": {"checkpoint": str(tiny_checkpoint), "dtype": "float32"},
                    "train": {**train, **tables.pop("train", {})},
                    "data": {**data, **tables.pop("data", {})},
                    "log": {"progress": False},
                    **tables,
                }
            )
        )

    return build


MISFITS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "one answer to compare": ("dpo", PLAIN, {}, r"rows\.jsonl:1: the row has one answer"),
    "one answer to compare aloud": ("dpo", SPOKEN, {"objective": {"text": False, "speech": True}}, "has one answer"),
    "one row among pairs": ("dpo", [*PAIR, *PLAIN], {}, r"rows\.jsonl:2: the row has one answer"),
    "a rejected answer to learn": ("thinker", PAIR, {}, "has a rejected answer.*data.ignore_columns"),
    "a rejected answer to say": ("talker", SPOKEN_PAIR, {}, "has a rejected answer"),
    "a rejected answer among plain ones": ("thinker", [*PLAIN, *PAIR], {}, r"rows\.jsonl:3: the row has a rejected"),
    "a rejected answer to sample for": ("gspo", PAIR, {"objective": {"rewards": ["exact_answer"]}}, "rejected answer"),
    "nothing to say": ("talker", PLAIN, {}, r"no answer that is learnt in .*rows\.jsonl has any"),
    "nothing to say for both": ("joint", PLAIN, {}, "learns from speech"),
    "speech of an answer that is not learnt": (
        "talker",
        [{"messages": chat("q", "a", "q", "b"), "codes": [CODES, None]}],
        {"data": {"loss_on": "last"}},
        "learns from speech",
    ),
    "no row of the new voice": ("talker", SPOKEN, {"speaker": {"add": "robin"}}, "speaker.add = 'robin' learns from"),
    "rows without a voice": (
        "talker",
        [{"messages": chat("q", "a"), "codes": CODES}],
        {"speaker": {"add": "robin"}},
        "write 'speaker': 'robin' into the rows",
    ),
    "no row that can be used": (
        "thinker",
        [{"messages": chat("<audio>", "a"), "audios": ["nowhere.wav"]}],
        {},
        r"none of 1 rows.*nowhere\.wav",
    ),
    "no recording to transcribe": ("transcription", PLAIN, {}, r"none of 2 rows.*rows\.jsonl:1.*recording"),
    "no recording that is there": ("transcription", [{"audio": "nowhere.wav", "text": "a"}], {}, "nowhere"),
    "no recording to encode": ("codec", PAIR, {}, r"none of 1 rows.*rows\.jsonl:1.*recording"),
    "no recording to decode": ("codec", PLAIN, {"objective": {"decoder_only": True}}, r"none of 2 rows"),
    "a Talker to learn from texts": ("thinker", PLAIN, {"train": {"parameters": ["talker.*"]}}, "teach nothing"),
    "a Thinker to learn from speech": ("talker", SPOKEN, {"train": {"parameters": ["thinker.*"]}}, "reaches talker"),
    "low-rank updates of the Talker": ("dpo", PAIR, {"lora": {"patterns": ["talker.*.q_proj"]}}, "teach nothing"),
    "nothing to hear": ("thinker", PLAIN, {"train": {"parameters": ["audio_encoder.*"]}}, "holds audio or video"),
    "nothing to see": (
        "distillation",
        [{"messages": chat("<audio>", "a"), "audios": ["nowhere.wav"]}, *PLAIN],
        {"train": {"parameters": ["vision_encoder.*"]}, "objective": {"teacher": "CHECKPOINT"}},
        "holds image or video",
    ),
    "nothing to hear or see": (
        "thinker",
        PLAIN,
        {"train": {"parameters": ["audio_encoder.*", "vision_encoder.*"]}},
        "nothing but audio_encoder and vision_encoder learns",
    ),
    "a column that is not understood": ("thinker", [{"messages": chat("q", "a"), "bad": "b"}], {}, "unknown key 'bad'"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_rows_that_do_not_fit_the_objective(make: Make, misfit: str) -> None:
    objective, rows, tables, told = MISFITS[misfit]
    with pytest.raises(ValueError, match=told):
        make(objective, rows, **tables)


LORA = {"patterns": ["thinker.layers.*.self_attn.?_proj"]}
SOUNDS = [{"audio": "a.wav", "text": "a"}]
HEARD = [{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, *chat("q", "a")[1:]]}]
USELESS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("codec", {"lora": {"patterns": ["code2wav.*"]}}),
    "lora ": ("transcription", {"lora": LORA}),
    "lora  ": ("flow_matching", {"lora": LORA}),
    "speaker": ("codec", {"speaker": {"add": "robin"}}),
    "speaker ": ("transcription", {"speaker": {"add": "robin"}}),
    "speaker  ": ("thinker", {"speaker": {"add": "robin"}}),
    "speaker   ": ("dpo", {"speaker": {"add": "robin"}}),
    "data.loss_on": ("transcription", {"data": {"loss_on": "last"}}),
    "data.audio_chunks_s": ("codec", {"data": {"audio_chunks_s": [0.48]}}),
    "data.audio_windows_s": ("flow_matching", {"data": {"audio_windows_s": [1.0, 8.0]}}),
    "data.codec": ("thinker", {"data": {"codec": {"kind": "mel", "path": "codes"}}}),
    "data.codec ": ("codec", {"data": {"codec": {"kind": "mel", "path": "codes"}}}),
    "eval.metrics": ("codec", {"eval": {"metrics": ["wer"]}}),
    "objective.residual_share": ("thinker", {"objective": {"residual_share": 0.5}}),
    "objective.residual_weight": ("dpo", {"objective": {"residual_weight": 0.5}}),
    "objective.max_new_tokens": ("distillation", {"objective": {"teacher": "none", "max_new_tokens": 4}}),
    "objective.alphabet": ("transcription", {"objective": {"labels": "tokens", "alphabet": "ab"}}),
}


@pytest.mark.parametrize("setting", USELESS)
def test_a_setting_without_effect(make: Make, setting: str) -> None:
    objective, tables = USELESS[setting]
    with pytest.raises(ValueError, match=rf"{setting.strip()}\b.*(no|without) effect"):
        make(objective, PLAIN if objective != "dpo" else PAIR, **tables)


def test_what_fits_runs(make: Make, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    voice = {"speaker": {"add": "robin"}, "train": {"parameters": ["*"]}}
    silent = {"messages": chat("q", "a")}
    spoken = {"messages": chat("q", "a"), "codes": CODES, "speaker": "Robin"}
    for objective, rows, tables in (
        ("dpo", PAIR, {}),
        ("thinker", PAIR, {"data": {"ignore_columns": ["rejected_response"]}}),
        ("talker", [*[silent] * 80, *SPOKEN], {}),  # what a sample may not show is looked for in all rows
        ("talker", [spoken, silent], voice),
        ("joint", SPOKEN, {}),
        ("thinker", [*PLAIN, {"messages": chat("<audio>", "a"), "audios": ["nowhere.wav"]}], {}),
        ("transcription", SOUNDS, {}),
        ("thinker", [*PLAIN * 40, *HEARD], {"train": {"parameters": ["audio_encoder.*"]}}),
        ("thinker", HEARD, {"train": {"parameters": ["audio_encoder.*", "vision_encoder.*"]}}),
    ):
        assert make(objective, rows, **tables).trainer.config.train.objective == objective


def test_both_of_two_answers_in_a_row_are_learnt(make: Make) -> None:
    answers = chat("q", "one")[1:] + chat("q", "two")[1:]
    run = make("thinker", [{"messages": [*chat("q", "")[:1], *answers]}])
    labels = next(iter(run.trainer.data)).labels[0]
    assert run.setup.processor is not None
    assert run.setup.processor.decode(labels[labels >= 0]) == "onetwo"


@pytest.mark.parametrize(
    "misfit",
    ["one answer to compare", "nothing to say", "no recording to transcribe", "a column that is not understood"],
)
def test_a_dry_run_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], misfit: str
) -> None:
    objective, rows, _, _ = MISFITS[misfit]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "run.toml").write_text(
        f"[model]\ncheckpoint = {json.dumps(str(tiny_checkpoint))}\n"
        f"[train]\nobjective = '{objective}'\ndevice = 'cpu'\n"
        f"[data]\ntrain = [{{ manifest = {json.dumps(str(manifest))} }}]\n"
    )
    assert main(["train", str(tmp_path / "run.toml"), "--dry-run"]) == 1
    assert "rows.jsonl" in capsys.readouterr().err
