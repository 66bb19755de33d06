"""Items on training: losses and gradients of one batch, a short run, the codec and the flow."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni import OmniModel
from omni.training.codec.codec import Codec, CodeUsage
from omni.training.codec.codec_losses import multi_scale_mel_loss, multi_scale_stft_loss
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import answer_spans, spoken_ids
from omni.training.data.samples import IGNORED, Pair, Sample, SpokenTurn
from omni.training.objectives.dpo import DPO
from omni.training.objectives.flow_matching import FlowBatch, draw_flow, flow_matching_loss
from omni.training.objectives.passes import talker_pass, thinker_pass
from omni.training.objectives.supervised import Supervised
from omni.training.objectives.teacher_forced import score_samples
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

from .models import CONFIGS, build, chat, draw, draw_ids, picture, second_values, sound, tiny, write_processor
from .registry import by_key, cut, each_family, item
from .replies import SPEAKERS


def sample(model: OmniModel, family: str, content: Any, reply: str, frames: int, speaker: str | None) -> Sample:
    """A conversation of two turns whose last answer is spoken with random codes."""
    messages = [*chat("Hello."), {"role": "assistant", "content": "Yes?"}, *chat(*content)]
    messages.append({"role": "assistant", "content": reply})
    inputs = model.processor(messages, add_generation_prompt=False)
    ids = inputs.input_ids[0].tolist()
    labels = torch.full((len(ids),), IGNORED)
    for start, stop in answer_spans(ids, model.config):
        labels[start:stop] = inputs.input_ids[0, start:stop]
    codes = draw_ids(20, model.talker.config.num_code_groups, frames, seed=frames)
    turn = SpokenTurn(start - 3, spoken_ids(ids[start : stop - 1], model.processor), codes, speaker)
    return Sample(inputs, labels, [turn], reply)


def samples(model: OmniModel, family: str) -> list[Sample]:
    """Three conversations: with sound, with a picture, with text alone."""
    first, second, _ = SPEAKERS[family]
    heard = {"audio": sound(1.3).numpy(), "sampling_rate": 16000}
    seen = {"type": "image", "image": picture(60, 90), "max_pixels": 8000}
    return [
        sample(model, family, [heard, "What is this?"], "A tone.", 7, first),
        sample(model, family, [seen, "And this?"], "A picture, with much noise in it.", 4, second),
        sample(model, family, ["Well?"], "So.", 9, None),
    ]


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of each parameter."""
    return {name: weight.grad for name, weight in module.named_parameters()}


def values(losses: dict[str, Any]) -> dict[str, Any]:
    """Losses as plain values."""
    return {name: (loss.total, loss.count) for name, loss in losses.items()}


@each_family("training.supervised")
def supervised(family: str) -> Any:
    """Losses and all gradients of a batch with speech: the Talker alone, both, both joined."""
    out = []
    for options in ({"text": False}, {"text": True}, {"text": True, "detach": True, "residual_share": 0.5}):
        model = build(family)
        batch = collate(samples(model, family))
        objective = Supervised(model, speech=True, **options)
        torch.manual_seed(1)
        with torch.enable_grad():
            losses = objective.losses(model, batch)
            total = sum(weight * losses[name].total for name, weight in objective.weights.items())
            assert isinstance(total, Tensor)
            total.backward()
        out.append((values(losses), objective.weights, objective.counts(batch), by_key(model, gradients(model))))
    return out


@each_family("training.passes")
def passes(family: str) -> Any:
    """What Thinker and Talker make of a packed batch, with and without speech."""
    model = tiny(family)
    batch = collate(samples(model, family))
    thought = thinker_pass(model, batch)
    spoken = talker_pass(model, batch, thought)
    batch.speech = []
    mute = talker_pass(model, batch, thought)
    return (
        (thought.final, thought.labels, thought.hidden, thought.router_logits, thought.starts),
        (spoken.logits, spoken.codes, spoken.residual_logits, spoken.residual_codes, spoken.turns),
        (mute.logits, mute.codes, mute.residual_codes, mute.turns),
    )


@each_family("training.scores")
def scores(family: str) -> Any:
    model = tiny(family)
    found = [score_samples(model, samples(model, family), text=text) for text in (True, False)]
    return [[(one.text, [(t.log_probs, t.right) for t in one.speech]) for one in some] for some in found]


@each_family("training.preferences")
def preferences(family: str) -> Any:
    """DPO over written and spoken answers, after a step that moved the model."""
    model = build(family)
    objective = DPO(model, speech=True)
    first, second, third = samples(model, family)
    batch = objective.prepare(model, collate([Pair(first, second), Pair(third, first)]))
    for weight in model.parameters():
        weight.mul_(1.01)
    with torch.enable_grad():
        losses = objective.losses(model, batch)
        total = sum(losses[name].total for name in objective.weights)
        assert isinstance(total, Tensor)
        total.backward()
    return values(losses), batch.reference, by_key(model, gradients(model))


@each_family("training.run")
def run(family: str) -> Any:
    """Three steps of a stage that trains the Talker, from a manifest."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_processor(family, Path(name))
        config = second_values() if family == "qwen2_5" else json.loads((CONFIGS / "tiny.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
        books = 4 if family == "qwen3" else 1
        rows = [
            {
                "messages": [*chat(f"Say {word}."), {"role": "assistant", "content": f"{word}, yes."}],
                "codes": draw_ids(20, books, 6 + 2 * i, seed=i).tolist(),
                "speaker": speaker,
            }
            for i, (word, speaker) in enumerate(zip(("one", "two"), SPEAKERS[family]))
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model": {"config": str(folder / "config.json"), "parts": ("thinker", "talker"), "processor": str(folder)},
            "train": {
                "objective": "talker",
                "parameters": ("talker.*",),
                "steps": 3,
                "precision": "fp32",
                "device": "cpu",
            },
            "optimiser": {"lr": 1e-2, "schedule": "constant"},
            "data": {"train": ({"manifest": str(folder / "rows.jsonl")},), "max_tokens": 512, "bucket": 2},
            "log": {"progress": False},
        }
        made = build_run(TrainConfig.from_dict(settings))
        with torch.enable_grad():
            losses = [dict(made.trainer.step().losses) for _ in range(3)]
        model = made.setup.model
        return losses, by_key(model, dict(model.named_parameters()))


@item("training.codec")
def codec() -> Any:
    """Losses and gradients of a codec around Code2Wav, its codes, and its encoder in pieces."""
    torch.manual_seed(2)
    codec = Codec(build("qwen3").code2wav)
    waves = torch.stack((sound(0.5, 1, 24000), sound(0.5, 2, 24000)))
    with torch.enable_grad():
        out = codec(waves)
        recorded = waves[:, : out.wave.shape[1]]
        mel, stft = multi_scale_mel_loss(out.wave, recorded, 24000), multi_scale_stft_loss(out.wave, recorded)
        losses = (mel, stft, out.commitment, out.codebook)
        sum((loss.total / loss.count for loss in losses), torch.zeros(())).backward()
    grads, hop = gradients(codec), codec.encoder.hop_length
    state = codec.encoder.init_state(2)
    pieces = [codec.encoder.step(piece, state) for piece in cut(waves[:, : 6 * hop], (hop, 3 * hop))]
    usage, generator = CodeUsage.start(codec), torch.Generator().manual_seed(1)
    usage.update(out.codes)
    codec.quantiser.initialise_codebooks(out.latents, 2, generator)
    moved = codec.quantiser.restart_dead_codes(out.latents, usage, 0.99, generator)
    plain = [(loss.total, loss.count) for loss in losses]
    codes = (out.wave, out.codes, out.perplexity, codec.encode(waves[:, :5000]))
    return codes, plain, grads, pieces, moved, usage.shares, codec.quantiser.books


@item("training.flow")
def flow() -> Any:
    """The flow-matching loss of the DiT and its gradients, rows padded and one without a condition."""
    dit = build("qwen2_5").code2wav.dit
    codes, lengths = draw_ids(21, 3, 9, seed=1), torch.tensor([9, 4, 7])
    batch = FlowBatch(draw(3, 18, 5, seed=2), codes, draw(3, 3, seed=3), draw(3, 8, 5, seed=4), lengths)
    chance = draw_flow(batch.mel, torch.Generator().manual_seed(6), 0.5)
    with torch.enable_grad():
        loss = flow_matching_loss(dit, batch, chance)
        loss.backward()
    return loss, chance.time, chance.dropped, gradients(dit)
