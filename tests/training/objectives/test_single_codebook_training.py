"""Training of the Talker over one codebook: what it reads, which gradients flow, learning by heart, going on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import config_values, fixed, seeded, widen, write_processor, write_rows

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.processing.inputs import OmniInputs
from omni.rope.positions import prompt_positions
from omni.talker.layout import turn_layout
from omni.training.data.batches import collate
from omni.training.data.samples import IGNORED, Pair, Sample, SpokenTurn, TrainingBatch
from omni.training.objectives.dpo import DPO
from omni.training.objectives.passes import talker_pass, thinker_pass
from omni.training.objectives.supervised import Supervised
from omni.training.run.lora import add_lora, save_lora
from omni.training.run.speakers import add_speaker
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")


def tiny_values() -> dict[str, Any]:
    """A tiny Thinker that hears, with its Talker, around the demo's vocabulary."""
    return {**config_values(1, audio={}, vocabulary=512), "system_token_id": 276}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json, processor files and two spoken conversations of the family."""
    folder = write_processor(tmp_path_factory.mktemp("files"))
    (folder / "config.json").write_text(json.dumps(tiny_values()))
    rng = np.random.default_rng(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {word}."},
                {"role": "assistant", "content": f"{word}, yes."},
            ],
            "codes": rng.integers(0, 80, (1, 6 + 2 * i)).tolist(),
            "speaker": voice,
        }
        for i, (word, voice) in enumerate((("one", "eve"), ("two", "Bob")))
    ]
    write_rows(folder / "spoken.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> OmniModel:
    with fixed():
        model = widen(OmniModel(OmniConfig.from_pretrained(folder), parts=["thinker", "talker"]), 5)
    model.processor = OmniProcessor.from_pretrained(folder)
    return model


def spoken(model: OmniModel, content: Any, reply: str, codes: torch.Tensor, speaker: str | None) -> TrainingBatch:
    """One conversation of two turns, of which the last answer is spoken."""
    wave = np.sin(np.arange(16000) / 20).astype(np.float32)
    messages = [
        {"role": "user", "content": [{"audio": wave}, "and?"]},
        {"role": "assistant", "content": "A tone."},
        {"role": "user", "content": content},
    ]
    inputs = model.processor(messages)
    ids = model.processor.encode_text(reply)
    prompt = inputs.input_ids[0].tolist()
    whole = [*prompt, *ids, model.config.im_end_token_id]
    fields = {**inputs.to_dict(), "input_ids": [whole], "attention_mask": [[1] * len(whole)]}
    labels = torch.tensor([IGNORED] * len(prompt) + whole[len(prompt) :])
    turn = SpokenTurn(len(prompt) - 3, ids, codes, speaker)
    return TrainingBatch(OmniInputs(**fields), [labels], [(0, turn)], ["row"])


def by_hand(model: OmniModel, batch: TrainingBatch, voice: int) -> torch.Tensor:
    """Logits of each frame and of the end, from the published layout written out: one vector after the other."""
    talker, config, ((_, turn),) = model.talker, model.config, batch.speech
    thought = thinker_pass(model, batch)
    ids = batch.inputs.input_ids[0].tolist()
    words = model.thinker.embed_tokens.weight
    stop = turn.header + 3
    vectors = []
    for place in range(stop):
        media = ids[place] == config.thinker_config.audio_token_id
        vectors.append(thought.hidden[place] + (0 if media else words[ids[place]]))
    reply = [thought.hidden[stop + i] + words[token] for i, token in enumerate(turn.ids)]
    queue = [*reply[1:], words[config.tts_eos_token_id], *[words[config.tts_pad_token_id]] * turn.codes.shape[1]]
    codec = talker.codec_embedding.weight
    vectors.append(words[voice] + codec[talker.config.codec_pad_id])
    vectors.append(reply[0] + codec[talker.config.codec_bos_id])
    vectors += [codec[code] + text for code, text in zip(turn.codes[0].tolist(), queue)]
    (segments,) = batch.inputs.segments(config.thinker_config)
    positions, _ = prompt_positions(segments, config.thinker_config.position_rule)
    start = positions[:, :stop]
    after = start.max() + 1 + torch.arange(len(vectors) - stop, dtype=torch.float32)
    positions = torch.cat((start, after.expand(3, -1)), dim=1)
    out = talker(torch.stack(vectors)[None], positions[:, None])
    return out.logits[0, stop + 1 :]


@pytest.mark.parametrize("frames", [1, 2, 9])
@torch.no_grad()
def test_the_pass_is_the_published_layout(model: OmniModel, frames: int) -> None:
    """Fewer frames than words, as many, and more: then the end of text and padding follow."""
    codes = torch.randint(0, 80, (1, frames), generator=seeded(frames))
    batch = spoken(model, "Well?", "So it is.", codes, "Bob")
    found = talker_pass(model, batch, thinker_pass(model, batch, needed=False))
    torch.testing.assert_close(found.logits, by_hand(model, batch, voice=301), atol=1e-4, rtol=1e-4)
    assert found.codes.tolist() == [*codes[0].tolist(), model.talker.config.codec_eos_token_id]
    assert found.turns == [frames] and found.residual_logits.numel() == 0 == found.residual_codes.numel()


@torch.no_grad()
def test_turns_beside_each_other_are_those_alone(model: OmniModel) -> None:
    ones = [
        spoken(model, text, reply, torch.randint(0, 80, (1, n)), voice)
        for text, reply, n, voice in (("Well?", "So it is.", 4, "eve"), ("And a long question?", "No.", 7, "bob"))
    ]
    samples = [Sample(one.inputs, one.labels[0], [one.speech[0][1]]) for one in ones]
    both = collate(samples)
    together = talker_pass(model, both, thinker_pass(model, both))
    alone = [talker_pass(model, one, thinker_pass(model, one)).logits for one in ones]
    torch.testing.assert_close(together.logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_batch_without_speech_costs_nothing_and_calls_everything(model: OmniModel) -> None:
    batch = spoken(model, "Well?", "So.", torch.zeros(1, 3, dtype=torch.int64), None)
    silent = replace(batch, speech=[])
    objective = Supervised(model, text=False, speech=True)
    model.requires_grad_(True)
    model.zero_grad()
    losses = objective.losses(model, silent)
    assert losses["codebook_0"].count == 0 == losses["codebook_0"].total
    losses["codebook_0"].total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.talker.parameters())
    model.zero_grad()


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_stay_in_the_talker_unless_both_learn(model: OmniModel, joint: bool) -> None:
    batch = spoken(model, "Well?", "So it is.", torch.randint(0, 80, (1, 5)), "eve")
    objective = Supervised(model, text=joint, speech=True)
    assert set(objective.weights) == ({"text"} if joint else set()) | {"codebook_0"}
    model.requires_grad_(True)
    model.zero_grad()
    losses = objective.losses(model, batch)
    losses["codebook_0"].total.backward()
    silent = [n for n, p in model.talker.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith("k_proj.bias") for name in silent), silent
    heard = [p.grad is not None and bool(p.grad.any()) for p in model.thinker.parameters()]
    assert any(heard) == joint
    assert objective.counts(batch)["codebook_0"] == float(losses["codebook_0"].count) == 6
    model.zero_grad()


def test_what_cannot_be_spoken_is_named(model: OmniModel) -> None:
    batch = spoken(model, "Well?", "So.", torch.zeros(4, 3, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="1 codebooks"):
        talker_pass(model, batch, thinker_pass(model, batch))
    batch = spoken(model, "Well?", "So.", torch.zeros(1, 3, dtype=torch.int64), None)
    batch.speech[0][1].ids = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="not among the ids"):
        talker_pass(model, batch, thinker_pass(model, batch))
    assert turn_layout(model.config).prefix_length == 2
    with pytest.raises(ValueError, match=r"model\.voices"):
        add_speaker(model, "robin")


def test_preference_of_one_way_to_speak_over_another(model: OmniModel) -> None:
    """DPO over codes: it begins at log 2, prefers the chosen codes, moves the Talker alone."""
    talking = copy.deepcopy(model)
    for name, p in talking.named_parameters():
        p.requires_grad_(name.startswith("talker."))
    before = {name: p.clone() for name, p in talking.named_parameters()}
    ways = [spoken(talking, "Well?", "So it is.", torch.randint(0, 80, (1, n)), "eve") for n in (4, 6)]
    samples = [Sample(way.inputs, way.labels[0], [way.speech[0][1]], "row") for way in ways]
    given = collate([Pair(*samples)])
    objective = DPO(talking, text=False, speech=True)
    optimizer = torch.optim.AdamW([p for p in talking.parameters() if p.requires_grad], 1e-3, weight_decay=0)
    losses = []
    for _ in range(20):
        found = objective.losses(talking, objective.prepare(talking, given))
        losses.append(found["speech_preference"].total)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses[0].detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 * losses[0] and found["reward_margin"].total > 0
    changed = {name for name, p in talking.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("talker.") for name in changed)


def make(folder: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "model": {"config": str(folder / "config.json"), "parts": ("thinker", "talker"), "processor": str(folder)},
        "train": {
            "objective": "talker",
            "parameters": ("talker.*",),
            "steps": 40,
            "precision": "fp32",
            "device": "cpu",
        },
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
        "data": {"train": ({"manifest": str(folder / "spoken.jsonl")},), "max_tokens": 512, "bucket": 2},
        "log": {"progress": False},
    }
    for table, own in changes.items():
        settings[table] = {**settings.get(table, {}), **own}
    return build_run(TrainConfig.from_dict(settings))


def test_the_talker_learns_two_answers_by_heart(folder: Path) -> None:
    run = make(folder)
    before = {name: p.detach().clone() for name, p in run.setup.model.named_parameters()}
    losses = [run.trainer.step().losses["codebook_0"] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0], losses
    changed = {name for name, p in run.setup.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("talker.") for name in changed)


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    whole = make(folder)
    for _ in range(4):
        whole.trainer.step()
    saves = {"save": {"folder": str(tmp_path / "saves"), "every": 0}}
    first = make(folder, **saves)
    for _ in range(2):
        first.trainer.step()
    first.trainer.save()
    second = make(folder, **saves)
    assert second.trainer.resume() == 2
    for _ in range(2):
        second.trainer.step()
    expected = dict(whole.setup.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.setup.model.named_parameters())


def test_low_rank_updates_of_this_family_are_saved_under_its_names(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = OmniModel(OmniConfig.from_pretrained(folder), parts=["thinker", "talker"])
    add_lora(model, ["thinker.*q_proj", "talker.input_projection"], rank=2)
    save_lora(model, tmp_path / "hub", names="hub")
    keys = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in
            load_file(tmp_path / "hub" / "adapter_model.safetensors")}  # fmt: skip
    layers = len(model.thinker.layers)
    expected = {f"thinker.model.layers.{i}.self_attn.q_proj" for i in range(layers)}
    assert keys == expected | {"talker.thinker_to_talker_proj"}
