"""What the Talker reads in training, and in agreement, is what it read while the same turn was generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from build import AUDIO, config_values, write_processor
from torch import Tensor

from omni import OmniConfig, OmniInputs, OmniModel, OmniProcessor, OmniSession, TextDelta
from omni.generation.prompt import encode_prompt
from omni.metrics.agreement import _speech, teacher_forced
from omni.training.data.samples import IGNORED, SpokenTurn, TrainingBatch
from omni.training.objectives.passes import talker_pass, thinker_pass

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
FAMILIES = ("qwen3", "qwen2_5")
Read = tuple[Tensor, Tensor]  # inputs [M, Di] and their positions [3, M]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """A tiny model of the second family that hears, without its codec decoder."""
    values = {**config_values(1), "system_token_id": 276}
    text = values["thinker_config"]["text_config"]
    text["vocab_size"] = 512
    values["thinker_config"]["audio_config"] = {**AUDIO, "num_mel_bins": 128, "output_dim": text["hidden_size"]}
    folder = write_processor(tmp_path_factory.mktemp("files"))
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(folder), parts=["thinker", "talker"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        model.talker.codec_head.weight[[80, 82]] = 0  # greedy speech goes on to its limit
    model.processor = OmniProcessor.from_pretrained(folder)
    return model


@pytest.fixture(params=FAMILIES)
def speaker(request: pytest.FixtureRequest, model: OmniModel, second: OmniModel) -> OmniModel:
    return model if request.param == "qwen3" else second


TONE = np.sin(np.arange(16000) / 20).astype(np.float32)


def prompts() -> dict[str, list[dict[str, Any]]]:
    return {
        "text": [{"role": "user", "content": "Name a river."}],
        "sound": [{"role": "user", "content": [{"audio": TONE}, "What is this?"]}],
        "turns": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"audio": TONE}, "And?"]},
            {"role": "assistant", "content": "A tone."},
            {"role": "user", "content": "Well?"},
        ],
    }


def spied(talker: Any, patch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Read]:
    """What `run` returns, and all that the Talker read in it, of one row: prefill and frames."""
    reads: list[Read] = []
    forward, decode = talker.forward, talker.decode

    def spy_forward(embeds: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        reads.append((embeds[0].detach().clone(), positions[:, 0].clone()))
        return forward(embeds, positions, *args, **kwargs)

    def spy_decode(embeds: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        reads.append((embeds.detach().clone(), positions[:, 0].clone()))
        return decode(embeds, positions, *args, **kwargs)

    with patch.context() as p:
        p.setattr(talker, "forward", spy_forward)
        p.setattr(talker, "decode", spy_decode)
        result = run()
    return result, (torch.cat([x for x, _ in reads]), torch.cat([at for _, at in reads], dim=1))


def greedy(**more: Any) -> dict[str, Any]:
    one = {"temperature": 0.0}
    return {"text_sampling": one, "audio_sampling": one, "residual_sampling": one, "seed": 0, **more}


def assert_same_reading(one: Read, other: Read) -> None:
    """Positions exactly; vectors up to the rounding of matrix products of other sizes, relative to their own size."""
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5 * float(one[0].abs().max()))


def batch_of(model: OmniModel, inputs: OmniInputs, reply: list[int], codes: Tensor) -> TrainingBatch:
    """The generated turn as training data."""
    prompt = inputs.input_ids[0].tolist()
    whole = [*prompt, *reply]
    fields = {**inputs.to_dict(), "input_ids": [whole], "attention_mask": [[1] * len(whole)]}
    ids = [token for token in reply if token != model.config.im_end_token_id]
    turn = SpokenTurn(len(prompt) - 3, ids, codes)
    return TrainingBatch(OmniInputs(**fields), [torch.full((len(whole),), IGNORED)], [(0, turn)], ["row"])


@pytest.mark.parametrize("frames", [1, 3, 9])
@pytest.mark.parametrize("kind", sorted(prompts()))
@torch.no_grad()
def test_training_and_agreement_read_what_generation_read(
    speaker: OmniModel, kind: str, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer frames than reply tokens, and more: then the endings follow. The last frame is read in training alone."""
    model = speaker
    inputs = model.processor(prompts()[kind])
    out, read = spied(
        model.talker, monkeypatch, lambda: model.generate(inputs, **greedy(max_new_tokens=4, max_frames=frames))
    )
    assert out.codes[0].shape[1] == frames
    batch = batch_of(model, inputs, out.replies[0], out.codes[0])
    _, (trained, positions) = spied(
        model.talker, monkeypatch, lambda: talker_pass(model, batch, thinker_pass(model, batch))
    )
    assert len(trained) == len(read[0]) + 1
    assert_same_reading(read, (trained[:-1], positions[:, :-1]))

    prompt = encode_prompt(model, inputs)
    speech = _speech(model, prompt.row_ids(0), out.replies[0], out.codes[0], None)
    _, agreed = spied(model.talker, monkeypatch, lambda: teacher_forced(model, prompt, 0, out.replies[0], speech))
    assert_same_reading(read, agreed)


@pytest.mark.parametrize("sound", [False, True])
@torch.no_grad()
def test_training_reads_what_a_session_read(speaker: OmniModel, sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of a session comes in pieces. Its sound has another mel level, so there only positions are equal."""
    model = speaker

    def talk() -> tuple[list[int], list[int], Tensor]:
        session = OmniSession(model, model.processor)
        if sound:
            session.push_audio(TONE)
        session.push_text("What is this?")
        events = session.respond(**greedy(max_new_tokens=4, max_frames=9))
        reply = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
        assert session._turn is not None
        return session.ids, reply, torch.stack(session._turn.speech.codes, dim=1)

    (ids, reply, codes), read = spied(model.talker, monkeypatch, talk)
    tail = 1 if reply[-1] == model.config.im_end_token_id else 2  # what closes the reply
    prompt = ids[: len(ids) - tail - len(reply)]
    processed = model.processor(prompts()["sound" if sound else "text"])
    fields = {**processed.to_dict(), "input_ids": [prompt], "attention_mask": [[1] * len(prompt)]}
    batch = batch_of(model, OmniInputs(**fields), reply, codes)
    _, (trained, positions) = spied(
        model.talker, monkeypatch, lambda: talker_pass(model, batch, thinker_pass(model, batch))
    )
    length = (
        len(trained) - 1
    )  # in training the last frame is read too, in a session the reply where it is in the prompt
    assert torch.equal(read[1][:, :length], positions[:, :length])
    if not sound:
        assert_same_reading((read[0][:length], read[1][:, :length]), (trained[:-1], positions[:, :-1]))
