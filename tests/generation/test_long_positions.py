"""Positions beyond the model's are refused, however few tokens reach them, unless the caller allows it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import GREEDY, chat, second_model, speckle, tiny_config
from torch import Tensor

from omni import OmniConfig, OmniInputs, OmniModel, OmniSession, TurnEnd
from omni.generation.prompt import encode_prompt
from omni.training.data.conversation_samples import SampleMaker, SkipRow
from omni.training.data.manifest import Row, Voice

QUIET: dict[str, Any] = {"max_new_tokens": 3, "return_audio": False}


def cramped(model: OmniModel, positions: int, *parts: str) -> OmniModel:
    """The same model with other limits."""
    values = model.config.to_dict()
    for part in parts or ("thinker_config", "talker_config"):
        own = values[part]
        own.get("text_config", own)["max_position_embeddings"] = positions
    small = OmniModel(OmniConfig.from_dict(values))
    small.load_state_dict(model.state_dict())
    small.processor = model.processor
    return small


def film(seconds: float, *extra: Any) -> list[dict[str, Any]]:
    """Four frames over so many seconds: two grid steps, the second after half of them."""
    frames = {"type": "video", "video": speckle(4, 32, 32), "fps": 4 / seconds, "max_pixels": 4096, "min_pixels": 1024}
    return [{"role": "user", "content": [frames, *extra]}]


def forced_end(ids: Tensor, logits: Tensor) -> None:
    logits[258] = -1e4


@pytest.fixture(scope="module")
def small(model: OmniModel) -> Iterator[OmniModel]:
    yield cramped(model, 300)


def test_a_film_of_many_seconds_and_few_tokens(model: OmniModel) -> None:
    inputs = model.processor(film(2400.0, "what is it?"))
    assert inputs.input_ids.shape[1] < 100
    for call in (model.generate, model.stream, model.forward):
        with pytest.raises(ValueError, match=r"position 156\d\d.*positions for 8192.*max_frames.*allow_long=True"):
            call(inputs)
    with pytest.warns(UserWarning, match=r"position 156\d\d.*8192") as caught:
        out = model.generate(inputs, allow_long=True, max_frames=3, max_new_tokens=3)
    assert len(caught) == 1 and len(out.replies[0]) == 3 and out.codes[0].shape[1] == 3
    with pytest.warns(UserWarning, match="position"):
        assert isinstance(list(model.stream(inputs, allow_long=True, **QUIET))[-1], TurnEnd)
    with pytest.warns(UserWarning, match="position"):
        assert model.forward(inputs, allow_long=True).logits.shape[1] == inputs.input_ids.shape[1]
    short = model.processor(film(24.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(short, allow_long=True, **QUIET).replies == model.generate(short, **QUIET).replies


def test_one_row_of_a_batch_is_enough(model: OmniModel) -> None:
    inputs = model.processor([chat("hi"), film(2400.0), film(8.0)])
    with pytest.raises(ValueError, match=r"position 156\d\d"):
        model.generate(inputs, **QUIET)


def test_too_many_tokens_may_be_allowed_too(small: OmniModel) -> None:
    inputs = OmniInputs(input_ids=torch.full((1, 320), 75))
    with pytest.raises(ValueError, match=r"320 tokens.*positions for 300.*allow_long=True"):
        small.generate(inputs, **QUIET)
    with pytest.warns(UserWarning, match="320"):
        assert len(small.generate(inputs, allow_long=True, **QUIET).replies[0]) == 3


def test_a_reply_ends_at_the_last_position(small: OmniModel) -> None:
    """Whatever took the positions, text or seconds, no token stands beyond the last one."""
    arguments: dict[str, Any] = {"max_new_tokens": 60, "return_audio": False, "logits_processor": forced_end}
    prompts = [chat("k" * 250), film(38.0), film(40.0, "k" * 10)]
    for messages in prompts:
        inputs = small.processor(messages)
        with torch.no_grad():
            begin = float(encode_prompt(small, inputs).next_position)
        reply = small.generate(inputs, **arguments).replies[0]
        assert len(reply) == int(300 - max(begin, inputs.input_ids.shape[1]))
        with pytest.warns(UserWarning, match=r"position \d+.*300"):
            assert len(small.generate(inputs, allow_long=True, **arguments).replies[0]) == 60


def test_the_talkers_positions_end_too(model: OmniModel) -> None:
    small = cramped(model, 300, "talker_config")
    arguments: dict[str, Any] = {"max_new_tokens": 2, "max_frames": 100, "seed": 0}
    arguments["audio_sampling"] = {"temperature": 0, "repetition_penalty": 1.3}
    banned = small.talker.config.codec_eos_token_id
    hook = small.talker.codec_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([banned]), -1e4)
    )
    try:
        inputs = small.processor(film(38.0))
        frames = small.generate(inputs, **arguments).codes[0].shape[1]
        assert 0 < frames < 300 - 246  # the second grid step stands at 19 s, 13 positions each
        with pytest.warns(UserWarning, match="position"):
            assert small.generate(inputs, allow_long=True, **arguments).codes[0].shape[1] == 100
        with pytest.raises(ValueError, match=r"leaves the Talker no position.*return_audio=False"):
            small.generate(small.processor(film(60.0)), **arguments)
        assert small.generate(small.processor(film(60.0)), **QUIET).replies
    finally:
        hook.remove()


def test_the_second_family_counts_as_well() -> None:
    model = second_model()
    inputs = OmniInputs(input_ids=torch.full((1, 4200), 75))
    with pytest.raises(ValueError, match=r"tokens.*4096"):
        model.generate(inputs, **QUIET)
    with pytest.warns(UserWarning, match="4096"):
        assert model.generate(inputs, allow_long=True, **QUIET).replies


def test_a_session_counts_positions_as_well(small: OmniModel) -> None:
    session = OmniSession(small)
    for i in range(4):
        session.push_video_frame(speckle(32, 32, seed=i), 4.0 * i)
    before = session.ids
    with pytest.raises(ValueError, match=r"session is full.*300"):
        for i in range(2):
            session.push_video_frame(speckle(32, 32, seed=i), 60.0 + i)
    assert session.ids == before
    near = OmniSession(small)
    for i in range(4):
        near.push_video_frame(speckle(32, 32, seed=i), 10.2 * i)  # the second grid step stands at 20.4 s
    end = list(near.respond(max_new_tokens=400, return_audio=False, logits_processor=forced_end))[-1]
    assert end.reason == "max_new_tokens" and 0 < end.usage["reply_tokens"] < 35
    with pytest.raises(ValueError, match="session is full"):
        near.push_text("more " * 20)
        near.respond(**QUIET)


def test_a_session_may_be_allowed_to_go_on(small: OmniModel) -> None:
    session = OmniSession(small)
    session.push_text("k" * 284)
    with pytest.raises(ValueError, match="session is full"):
        session.push_text("k" * 100)
        session.respond(**QUIET)
    with pytest.warns(UserWarning, match=r"position \d+.*300"):
        end = list(session.respond(allow_long=True, text_sampling=GREEDY, **QUIET))[-1]
    assert end.usage["prompt_tokens"] > 384 and end.usage["reply_tokens"] == 3


def test_rows_for_training_are_left_out(model: OmniModel) -> None:
    make = SampleMaker(model.processor, tiny_config())
    messages = [*film(2400.0), {"role": "assistant", "content": "a film"}]
    with pytest.raises(SkipRow, match="position 156"):
        make(Row(messages, voices=[Voice()]))
