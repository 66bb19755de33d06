"""A turn decodes with the number of threads for it, and the caller sees its own between events and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from build import GREEDY, PLAIN
from torch import Tensor

from omni import OmniInputs, OmniModel
from omni.generation import compilation
from omni.layers import threads

Seen = dict[str, set[int]]
pytestmark = pytest.mark.usefixtures("three_threads")


@pytest.fixture
def seen(model: OmniModel) -> Iterator[Seen]:
    """The numbers that the operations of each part have seen."""
    found: Seen = {}

    def watch(part: str) -> Callable[..., None]:
        return lambda *_: found.setdefault(part, set()).add(torch.get_num_threads())

    modules = [(name.partition(".")[0], m) for name, m in model.named_modules() if name and not list(m.children())]
    hooks = [module.register_forward_pre_hook(watch(part)) for part, module in modules]
    yield found
    for hook in hooks:
        hook.remove()


def ask(model: OmniModel, text: str = "How are you?", **more: Any) -> OmniInputs:
    assert model.processor is not None
    sound = {"type": "audio", "audio": torch.linspace(-0.5, 0.5, 4000).sin()}
    content = [sound, {"type": "text", "text": text}]
    return model.processor([{"role": "user", "content": content}], **more)


SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 3, "text_sampling": GREEDY, **PLAIN}
SPEAKING = {"thinker", "talker", "code2wav"}


def test_generate(model: OmniModel, seen: Seen) -> None:
    model.generate(ask(model), **SHORT)
    assert seen == {name: {1} for name in SPEAKING | {"audio_encoder"}}
    assert torch.get_num_threads() == 3


def test_stream_gives_the_caller_its_number_between_events(model: OmniModel, seen: Seen) -> None:
    events = model.stream(ask(model), **SHORT)
    assert torch.get_num_threads() == 3
    seen.clear()
    for event in events:
        assert torch.get_num_threads() == 3, event
    assert seen == {name: {1} for name in SPEAKING}


def test_a_number_set_between_events_is_seen_at_once(model: OmniModel, seen: Seen) -> None:
    events = model.stream(ask(model), **SHORT)
    next(events)
    seen.clear()
    torch.set_num_threads(2)
    list(events)
    assert seen == {name: {2} for name in SPEAKING}
    assert torch.get_num_threads() == 2


def test_speak(model: OmniModel, seen: Seen) -> None:
    model.speak("Hello there.", max_frames=3)
    assert seen["talker"] == seen["code2wav"] == {1}
    assert torch.get_num_threads() == 3


def test_long_prompts_are_read_with_more(model: OmniModel, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ask(model, "word " * 30)
    monkeypatch.setattr(threads, "SHORT_TOKENS", 20)
    events = model.stream(inputs, **SHORT)
    assert seen["thinker"] == {3} and seen["talker"] == {3}
    assert seen["audio_encoder"] == {1}  # a quarter of a second
    seen.clear()
    list(events)
    assert seen == {name: {1} for name in SPEAKING}


def test_a_wide_model_keeps_what_torch_has(model: OmniModel, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SMALL_WIDTH", model.config.thinker.text_config.hidden_size - 1)
    model.generate(ask(model), **SHORT)
    assert seen == {name: {3} for name in SPEAKING | {"audio_encoder"}}


def test_the_model_s_own_number(model: OmniModel, seen: Seen) -> None:
    model.decode_threads = 2
    try:
        events = model.stream(ask(model), **SHORT)
        assert {number for numbers in seen.values() for number in numbers} == {3}
        seen.clear()
        list(events)
    finally:
        model.decode_threads = None
    assert seen == {name: {2} for name in SPEAKING}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["thinker", "talker", "code2wav"])
def test_after_an_error(model: OmniModel, part: str, error: type[BaseException]) -> None:
    events = model.stream(ask(model), **SHORT)

    def fail(*_: Any) -> None:
        raise error(f"in {part} with {torch.get_num_threads()}")

    hooks = [module.register_forward_hook(fail) for module in model.require(part).modules()]
    try:
        with pytest.raises(error, match=f"in {part} with 1"):
            list(events)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.get_num_threads() == 3


def test_a_stream_that_is_left(model: OmniModel) -> None:
    events = model.stream(ask(model), **SHORT)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 3


def test_a_turn_inside_a_turn(model: OmniModel, seen: Seen) -> None:
    numbers = []

    def processor(ids: Tensor, logits: Tensor) -> Tensor:
        numbers.append(torch.get_num_threads())
        model.generate(ask(model), max_new_tokens=1, return_audio=False)
        numbers.append(torch.get_num_threads())
        return logits

    model.generate(ask(model), **SHORT, logits_processor=processor)
    assert set(numbers) == {1}
    assert seen["thinker"] == {1}
    assert torch.get_num_threads() == 3


def test_results_do_not_depend_on_it(model: OmniModel) -> None:
    inputs = ask(model)
    one = model.generate(inputs, **SHORT)
    model.decode_threads = 3
    try:
        three = model.generate(inputs, **SHORT)
    finally:
        model.decode_threads = None
    assert torch.equal(one.sequences, three.sequences)
    assert one.codes is not None and three.codes is not None and torch.equal(one.codes[0], three.codes[0])


def test_steps_are_compiled_for_the_number(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    monkeypatch.setattr(compilation, "_run_once", lambda *_: numbers.append(torch.get_num_threads()))
    compilation.warm_up(model, [1])
    assert numbers == [1, 1]
    assert torch.get_num_threads() == 3
