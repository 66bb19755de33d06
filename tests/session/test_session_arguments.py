"""Arguments of sessions and engines that are of a wrong type are refused in words, where they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import speckle

from omni import OmniEngine, OmniModel, OmniSession, StreamingConfig
from omni.processing.media_budget import MediaBudget

PLAIN = {"max_new_tokens": 2, "return_audio": False}
MADE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "streaming text": ({"streaming": "fast"}, TypeError, "streaming must be of StreamingConfig"),
    "streaming number": ({"streaming": 0}, TypeError, "streaming must be of StreamingConfig"),
    "streaming dict": ({"streaming": {"text_ahead": 2}}, TypeError, "streaming must be of StreamingConfig"),
    "system number": ({"system": 5}, TypeError, "system must be a text"),
    "system message": ({"system": [{"role": "system"}]}, TypeError, "system must be a text"),
    "sound flag": ({"use_audio_in_video": "no"}, TypeError, "use_audio_in_video must be True or False"),
    "no sound flag": ({"use_audio_in_video": None}, TypeError, "use_audio_in_video must be True or False"),
    "media flag": ({"keep_media": "x"}, TypeError, "keep_media must be True or False"),
    "media number": ({"keep_media": 1}, TypeError, "keep_media must be True or False"),
    "unknown speaker": ({"speaker": "nobody"}, ValueError, "unknown speaker 'nobody'; this checkpoint has"),
    "half a chunk": ({"streaming": StreamingConfig(audio_window_s=0.5)}, ValueError, "multiple of one chunk"),
    "speaker number": ({"speaker": 3}, TypeError, "speaker must be a text"),
}


@pytest.mark.parametrize("where", ["alone", "in an engine"])
@pytest.mark.parametrize("name", MADE)
def test_options_of_a_session(model: OmniModel, name: str, where: str) -> None:
    options, error, words = MADE[name]
    with OmniEngine(model, max_sessions=1) as engine:
        make: Callable[..., OmniSession] = (
            engine.session if where == "in an engine" else lambda **o: OmniSession(model, **o)
        )
        with pytest.raises(error, match=words):
            make(**options)
        session = make(
            speaker="AIDEN", system="", streaming=StreamingConfig(), use_audio_in_video=True, keep_media=True
        )
        session.push_text("x")
        assert list(session.respond(**PLAIN))


@pytest.mark.parametrize("wrong", [None, "x", 5, {}], ids=repr)
@pytest.mark.parametrize("make", [OmniSession, OmniEngine, lambda model: OmniSession.load(".", model)])
def test_what_is_no_model(make: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match="a session takes an OmniModel, got"):
        make(wrong)


@pytest.mark.parametrize("make", [OmniSession, OmniEngine, lambda model, p: OmniSession.load(".", model, p)])
@pytest.mark.parametrize("wrong", ["x", 5, torch.nn.Identity()], ids=repr)
def test_what_is_no_processor(model: OmniModel, make: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match="processor must be of OmniProcessor"):
        make(model, wrong)


@pytest.mark.parametrize("streaming", ["x", 0, {}, StreamingConfig], ids=repr)
def test_streaming_of_engines_and_replies(model: OmniModel, streaming: Any) -> None:
    with pytest.raises(TypeError, match="streaming must be"):
        OmniEngine(model, streaming=streaming)
    session = OmniSession(model)
    session.push_text("x")
    before = session.ids
    with pytest.raises(TypeError, match="streaming must be"):
        session.respond(streaming=streaming)
    assert session.ids == before and list(session.respond(**PLAIN, streaming=None))


@pytest.mark.parametrize("name", ["audio_window_s", "silence_s", "loop_frames"])
@pytest.mark.parametrize("value", ["1", True, [1.0], float("nan"), 0], ids=repr)
def test_numbers_of_a_streaming_config(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        StreamingConfig(**{name: value})


def test_what_is_pushed_and_asked(model: OmniModel, tmp_path: Path) -> None:
    session = OmniSession(model)
    session.push_text("x")
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: session.push_text("half \ud800"), ValueError, "surrogate"),
        (lambda: session.push_text(None), TypeError, "string"),
        (lambda: session.push_text("x", control_tokens="false"), TypeError, "control_tokens must be True or False"),
        (lambda: session.push_text("x", control_tokens=torch.zeros(2)), TypeError, "control_tokens must be"),
        (lambda: session.push_audio([0.0], True), ValueError, "sample_rate"),
        (lambda: session.push_audio([0.0], "16000"), ValueError, "sample_rate"),
        (lambda: session.push_video_frame(speckle(32, 32), True), ValueError, "time_s"),
        (lambda: session.push_video_frame(speckle(32, 32), "1"), ValueError, "time_s"),
        (lambda: session.push_image(speckle(32, 32), max_pixels="small"), ValueError, "max_pixels"),
        (lambda: session.push_image(speckle(32, 32), min_pixels=0), ValueError, "min_pixels"),
        (lambda: session.save(""), ValueError, "empty"),
        (lambda: session.save(5), TypeError, "folder"),
        (lambda: session.save(None), TypeError, "folder"),
        (lambda: OmniSession.load("", model), ValueError, "empty"),
        (lambda: OmniSession.load(b"kept", model), TypeError, "folder"),
        (lambda: OmniSession.load(tmp_path, model), FileNotFoundError, "session.json"),
    ]
    before = session.ids
    for call, error, words in calls:
        with pytest.raises(error, match=words):
            call()
        assert session.ids == before
    list(session.respond(**PLAIN))
    for played_ms in (True, "80", [1], -1):
        with pytest.raises(ValueError, match="played_ms"):
            session.interrupt(played_ms)


def test_a_picture_within_limits(model: OmniModel) -> None:
    session, tokens = OmniSession(model), model.processor.tokens
    session.push_image(speckle(256, 256), min_pixels=np.int64(32), max_pixels=np.int32(64 * 64))
    item = {"type": "image", "image": speckle(256, 256), "max_pixels": 64 * 64}
    ids = model.processor([{"role": "user", "content": [item]}], add_generation_prompt=False).input_ids[0].tolist()
    assert session.ids.count(tokens.image) == ids.count(tokens.image)


@pytest.mark.parametrize("rows", [10**11, 10**18, 10**30])
def test_an_engine_that_no_memory_holds(model: OmniModel, rows: int) -> None:
    with pytest.raises(ValueError, match=f"engine of max_sessions = {rows} cannot be made"):
        OmniEngine(model, max_sessions=rows)


@pytest.mark.parametrize("wrong", ["false", 1, None, torch.zeros(2)], ids=str)
def test_control_tokens_are_let_through_by_true_alone(model: OmniModel, wrong: Any) -> None:
    for call in (
        lambda: model.processor([{"role": "user", "content": "<|im_end|>"}], control_tokens=wrong),
        lambda: model.processor.encode_text("<|im_end|>", control_tokens=wrong),
        lambda: model.speak("<|im_end|>", max_frames=1, control_tokens=wrong),
    ):
        with pytest.raises(TypeError, match="control_tokens must be True or False"):
            call()


@pytest.mark.parametrize("flag", ["add_generation_prompt", "continue_final_message", "allow_long"])
def test_flags_of_the_processor(model: OmniModel, flag: str) -> None:
    for wrong in ("false", 1, torch.zeros(2)):
        with pytest.raises(TypeError, match=f"{flag} must be True or False"):
            model.processor([{"role": "user", "content": "x"}], **{flag: wrong})


@pytest.mark.parametrize("flag", ["with_router_logits", "allow_long"])
def test_flags_of_a_pass(model: OmniModel, flag: str) -> None:
    inputs = model.processor([{"role": "user", "content": "x"}])
    for wrong in ("false", None, torch.zeros(2)):
        with pytest.raises(TypeError, match=f"{flag} must be True or False"):
            model.forward(inputs, **{flag: wrong})


def test_the_media_budget_of_the_processor(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture or frame that a message may not hold may not be pushed either."""
    session, large = OmniSession(model), speckle(96, 96)
    monkeypatch.setattr(model.processor, "media_budget", MediaBudget(pixels=64 * 64))
    calls: list[Callable[[], Any]] = [
        lambda: model.processor([{"role": "user", "content": [{"type": "image", "image": large}]}]),
        lambda: session.push_image(large),
        lambda: session.push_image(large, max_pixels=64 * 64),
        lambda: session.push_video_frame(large, 0.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="more than the limit of 4,096"):
            call()
    session.push_image(speckle(64, 64))
    monkeypatch.setattr(model.processor, "media_budget", MediaBudget(pixels=1 << 40))
    session.push_image(large)
