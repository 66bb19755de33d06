"""What training leaves behind opens in transformers and computes the same there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3OmniMoeForConditionalGeneration

from omni import OmniModel
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

CODES = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4]]
KINDS = {
    "all": {"train": {"objective": "joint"}},
    "lora": {"train": {"objective": "thinker"}, "lora": {"patterns": ["thinker.layers.*"], "rank": 2}},
    "voice": {"train": {"objective": "talker"}, "speaker": {"add": "robin", "like": "mean"}},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_exported_model_opens_in_transformers(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Well then."}]
    row = {"messages": messages, "codes": CODES, "speaker": "robin" if kind == "voice" else "Ethan"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    values = {
        **KINDS[kind],
        "model": {"checkpoint": str(tiny_checkpoint)},
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
        "data": {"train": [{"manifest": str(tmp_path / "train.jsonl")}], "bucket": 1},
        "log": {"progress": False},
        "save": {"export": str(tmp_path / "model")},
    }
    values["train"] = {**values["train"], "steps": 2, "precision": "fp32", "device": "cpu"}
    build_run(TrainConfig.from_dict(values)).train()

    trained, before = (
        OmniModel.from_pretrained(folder, device="cpu") for folder in (tmp_path / "model", tiny_checkpoint)
    )
    reference, loading = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    inputs = trained.processor(messages)
    with torch.no_grad():
        ours = trained(inputs).logits
        theirs = reference.eval().thinker(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
        changed = not torch.allclose(ours, before(inputs).logits, atol=1e-3)
    assert changed == (kind != "voice")
    voices = reference.config.talker_config.speaker_id
    assert ("robin" in voices) == (kind == "voice")
    name = "talker.codec_embedding.weight"
    table, old = (dict(m.named_parameters())[name] for m in (trained, before))
    moved = (table != old).any(1).nonzero()[:, 0].tolist()
    if kind == "voice":
        assert moved == [voices["robin"]]
