"""The number of CPU threads in sessions and engines: of a reply's steps, and of the caller between events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from build import GREEDY, PLAIN

from omni import OmniEngine, OmniModel, OmniSession

pytestmark = pytest.mark.usefixtures("three_threads")
SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 3, "text_sampling": GREEDY, **PLAIN}


@pytest.fixture
def seen(model: OmniModel) -> Iterator[set[int]]:
    """The numbers that the layers of all parts have seen."""
    found: set[int] = set()
    layers = [module for name, module in model.named_modules() if ".layers." in name or "encoder." in name]
    layers += [module for module in model.require("code2wav").modules() if not list(module.children())]
    hooks = [layer.register_forward_pre_hook(lambda *_: found.add(torch.get_num_threads())) for layer in layers]
    yield found
    for hook in hooks:
        hook.remove()


def test_a_session(model: OmniModel, seen: set[int]) -> None:
    session = OmniSession(model)
    session.push_image(torch.zeros(3, 56, 56, dtype=torch.uint8))
    session.push_text("How are you?")
    assert torch.get_num_threads() == 3
    for event in session.respond(**SHORT):
        assert torch.get_num_threads() == 3, event
    assert seen == {1}
    events = session.respond(**SHORT)
    next(events)
    session.interrupt()
    assert torch.get_num_threads() == 3


def test_a_session_hears_in_one_thread(model: OmniModel, seen: set[int]) -> None:
    session = OmniSession(model)
    session.push_audio(torch.linspace(-0.5, 0.5, 4000).sin())
    list(session.respond(**SHORT))
    assert seen == {1}
    assert torch.get_num_threads() == 3


def test_a_session_answers_asynchronously(model: OmniModel, seen: set[int]) -> None:
    session = OmniSession(model)
    session.push_text("How are you?")

    async def take() -> None:
        async for event in session.respond_async(**SHORT):
            assert torch.get_num_threads() == 3, event

    asyncio.run(take())
    assert seen == {1}


def test_an_engine(model: OmniModel, seen: set[int]) -> None:
    with OmniEngine(model, max_sessions=2) as engine, engine.session() as session:
        session.push_text("How are you?")
        for event in session.respond(**SHORT):
            assert torch.get_num_threads() == 3, event
    assert seen == {1}


def test_an_engine_with_a_number_of_the_model_s(model: OmniModel, seen: set[int]) -> None:
    model.decode_threads = 2
    try:
        with OmniEngine(model, max_sessions=2) as engine, engine.session() as session:
            session.push_text("How are you?")
            events = session.respond(**SHORT)
            seen.clear()
            list(events)
    finally:
        model.decode_threads = None
    assert 2 in seen and 1 not in seen
