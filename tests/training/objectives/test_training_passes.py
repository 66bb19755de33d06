"""A batch through the model as training does it equals generation, conversation by conversation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from build import GREEDY, chat, picture_item, sound_item
from torch import Tensor

from omni import OmniInputs, OmniModel
from omni.generation.sampling import RowSampling
from omni.generation.steps import Steps
from omni.training.data.samples import IGNORED, SpokenTurn, TrainingBatch
from omni.training.objectives.passes import talker_pass, thinker_pass
from omni.training.objectives.supervised import Supervised


def conversation(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": list(content)}]


PROMPTS = {
    "text": [conversation("Name a river.")],
    "sound": [conversation(sound_item(1.3), "What is this?")],
    "mixed": [
        conversation("One."),
        conversation(picture_item(), "and", sound_item(0.4), "Well?"),
        [*conversation("Two."), *chat("", "Yes.", [picture_item(width=96)])[1:]],
    ],
}


def spoken_batch(model: OmniModel, messages: list[Any], frames: int = 7) -> tuple[TrainingBatch, Any]:
    """Prompts with the replies that the model itself gave greedily, as a training batch; and that output."""
    inputs = model.processor(messages)
    out = model.generate(
        inputs,
        max_new_tokens=5,
        max_frames=frames,
        audio_sampling=GREEDY,
        residual_sampling=GREEDY,
        text_sampling=GREEDY,
    )
    replies = out.sequences[:, inputs.input_ids.shape[1] :]
    fields = inputs.to_dict()
    fields["input_ids"] = out.sequences
    fields["attention_mask"] = torch.cat((inputs.attention_mask, torch.ones_like(replies)), dim=1)
    labels, speech = [], []
    for row, mask in enumerate(inputs.attention_mask.bool()):
        prompt = inputs.input_ids[row, mask]
        labels.append(torch.cat((torch.full_like(prompt, IGNORED), replies[row])))
        ids = replies[row].tolist()
        header = int((prompt == model.config.im_start_token_id).nonzero()[-1])
        speech.append((row, SpokenTurn(header, ids, out.codes[row])))
    return TrainingBatch(OmniInputs(**fields), labels, speech, [f"row {i}" for i in range(len(labels))]), out


@pytest.mark.parametrize("kind", sorted(PROMPTS))
@torch.no_grad()
def test_teacher_forced_talker_draws_what_generation_drew(model: OmniModel, kind: str) -> None:
    batch, out = spoken_batch(model, PROMPTS[kind])
    spoken = talker_pass(model, batch, thinker_pass(model, batch))
    logits = spoken.logits.masked_fill(model.talker.suppressed(), float("-inf"))
    start = 0
    for codes, frames in zip(out.codes, spoken.turns):
        assert codes.shape[1] == frames > 0
        assert torch.equal(logits[start : start + frames].argmax(-1), codes[0])
        assert torch.equal(
            spoken.codes[start : start + frames + 1],
            torch.tensor([*codes[0].tolist(), model.talker.config.codec_eos_token_id]),
        )
        start += frames + 1
    assert torch.equal(spoken.residual_logits.argmax(-1), torch.cat([c[1:] for c in out.codes], dim=1).T)
    assert torch.equal(spoken.residual_codes, torch.cat([c[1:] for c in out.codes], dim=1).T)


@pytest.mark.parametrize("kind", sorted(PROMPTS))
@torch.no_grad()
def test_teacher_forced_logits_are_those_of_each_step(
    model: OmniModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of codes read at once is the loss of the same codes drawn one by one."""
    drawn: dict[int, list[Tensor]] = {}

    def draw(sampling: RowSampling, logits: Tensor, *rest: Any) -> Tensor:
        drawn.setdefault(logits.shape[1], []).append(logits.clone())
        return sampling.draw(logits, *rest)

    monkeypatch.setattr(model, "steps", Steps(draw=draw))
    batch, out = spoken_batch(model, PROMPTS[kind])
    assert all(codes.shape[1] == 7 for codes in out.codes)
    spoken = talker_pass(model, batch, thinker_pass(model, batch))
    talker = model.talker.config
    first = torch.stack(drawn[talker.text_config.vocab_size])  # [frames, rows, V]
    residual = torch.stack(drawn[talker.code_predictor_config.vocab_size]).unflatten(0, (7, -1))  # [frames, K - 1, …]
    rows = len(out.codes)
    read = spoken.logits.unflatten(0, (rows, 8))[:, :7]
    torch.testing.assert_close(read, first.transpose(0, 1), atol=1e-4, rtol=1e-5)
    read = spoken.residual_logits.unflatten(0, (rows, 7))
    torch.testing.assert_close(read, residual.permute(2, 0, 1, 3), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(PROMPTS))
@torch.no_grad()
def test_packed_thinker_equals_forward(model: OmniModel, kind: str) -> None:
    batch, _ = spoken_batch(model, PROMPTS[kind], frames=1)
    thought = thinker_pass(model, batch)
    padded = model.forward(batch.inputs)
    mask = batch.inputs.attention_mask.bool()
    torch.testing.assert_close(model.thinker.lm_head(thought.final), padded.logits[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(thought.hidden, padded.hidden[mask], atol=1e-5, rtol=1e-5)
    # the label of a token is the one after it; the last of a conversation has none
    for row, (start, stop) in enumerate(zip(thought.starts, thought.starts[1:])):
        assert thought.labels[stop - 1] == IGNORED
        assert torch.equal(thought.labels[start : stop - 1], batch.labels[row][1:])


def reached(model: OmniModel, loss: Tensor) -> set[str]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_every_part_is_touched_whatever_the_batch_holds(model: OmniModel) -> None:
    """A batch of text without speech leaves no parameter of encoders, Thinker and Talker without a gradient."""
    batch, _ = spoken_batch(model, PROMPTS["text"])
    batch.speech = []
    thought = thinker_pass(model, batch)
    spoken = talker_pass(model, batch, thought)
    assert (
        spoken.turns == [] and bool((spoken.codes == IGNORED).all()) and bool((spoken.residual_codes == IGNORED).all())
    )
    loss = model.thinker.lm_head(thought.final).sum() + 0 * spoken.logits.sum() + 0 * spoken.residual_logits.sum()
    names = reached(model, loss)
    missing = {n for n, _ in model.named_parameters() if not n.startswith("code2wav.")} - names
    assert not missing
    idle = [p.grad for n, p in model.named_parameters() if n.startswith(("audio_encoder", "vision_encoder", "talker"))]
    assert all(not grad.any() for grad in idle if grad is not None)


def test_residual_head_may_read_a_share_of_the_frames(model: OmniModel) -> None:
    """Each of the frames that were drawn has the logits that it has among all; the loss counts what was read."""
    batch, _ = spoken_batch(model, PROMPTS["text"])
    thought = thinker_pass(model, batch)
    every = talker_pass(model, batch, thought)
    some = talker_pass(model, batch, thought, residual_share=0.4)
    read = math.ceil(0.4 * len(every.residual_codes))
    assert len(some.residual_codes) == read < len(every.residual_codes)
    torch.testing.assert_close(some.logits, every.logits)
    for logits, codes in zip(some.residual_logits, some.residual_codes):
        near = [(logits - other).abs().max() < 1e-5 for other in every.residual_logits]
        assert any(same and torch.equal(codes, whole) for same, whole in zip(near, every.residual_codes))
    objective = Supervised(model, text=False, speech=True, residual_share=0.4)
    losses = objective.losses(model, batch)
    assert (
        objective.counts(batch)["residual"] == float(losses["residual"].count) == read * (every.residual_codes.shape[1])
    )
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="residual_share"):
            Supervised(model, text=False, speech=True, residual_share=wrong)


def test_detached_speech_leaves_the_thinker_alone(model: OmniModel) -> None:
    batch, _ = spoken_batch(model, PROMPTS["sound"])
    detached = reached(model, talker_pass(model, batch, thinker_pass(model, batch)).logits.sum())
    assert not any(name.startswith(("thinker", "audio_encoder")) for name in detached)
    joint = reached(model, talker_pass(model, batch, thinker_pass(model, batch), detach=False).logits.sum())
    assert {"thinker.embed_tokens.weight", "audio_encoder.proj2.weight"} <= joint


def test_wrong_turns_are_refused(model: OmniModel) -> None:
    batch, _ = spoken_batch(model, PROMPTS["text"])
    thought = thinker_pass(model, batch)
    row, turn = batch.speech[0]
    batch.speech = [(row, SpokenTurn(turn.header, turn.ids, turn.codes[:2]))]
    with pytest.raises(ValueError, match="4 codebooks"):
        talker_pass(model, batch, thought)
    batch.speech = [(row, SpokenTurn(turn.header, turn.ids, turn.codes, "nobody"))]
    with pytest.raises(ValueError, match="unknown speaker 'nobody'"):
        talker_pass(model, batch, thought)
    batch.speech = [(row, SpokenTurn(turn.header, turn.ids, turn.codes.repeat(1, 2000)))]
    with pytest.raises(ValueError, match="positions, the Talker has 8192"):
        talker_pass(model, batch, thought)
