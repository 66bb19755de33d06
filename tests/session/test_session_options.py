"""Sessions and engines take the options of `generate`: stop strings, likelihoods, a function of the logits."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import build
import pytest
import torch
from build import second_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni import AudioChunk, OmniEngine, OmniInputs, OmniModel, OmniSession, StreamingConfig, TextDelta

PLAIN = {**build.PLAIN, "max_new_tokens": 7, "max_frames": 8, "seed": 5}


class Oops(Exception):
    pass


def says(model: OmniModel, text: str) -> Callable[[Tensor, Tensor], None]:
    """A function of the logits that makes a reply of this text."""
    words = iter([*model.processor.encode_text(text), *[258] * 9])

    def force(ids: Tensor, logits: Tensor) -> None:
        logits.index_fill_(0, torch.tensor([next(words)]), math.inf)

    return force


def outcome(events: list[Any]) -> tuple[list[int], str, str, Tensor, list[Any]]:
    sound = [e.samples for e in events if isinstance(e, AudioChunk)]
    deltas = [e for e in events if isinstance(e, TextDelta)]
    ids = [i for e in deltas for i in e.token_ids]
    likely = [entry.token_id for e in deltas for entry in e.logprobs or ()]
    return ids, events[-1].text, events[-1].reason, torch.cat(sound) if sound else torch.zeros(0), likely


@pytest.fixture(scope="module", params=["first", "second"])
def either(request: pytest.FixtureRequest, model: OmniModel) -> Iterator[OmniModel]:
    yield model if request.param == "first" else second_model()


@given(
    st.lists(st.text("aeiou st\n", min_size=1, max_size=2), max_size=3),
    st.integers(0, 4),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
@settings(max_examples=8)
def test_a_session_equals_generate_with_the_same_options(
    model: OmniModel, stop: list[str], least: int, logprobs: int | None, shy: bool
) -> None:
    def avoid(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_add(0, ids, torch.full((len(ids),), -2.0))

    options: dict[str, Any] = {"stop": stop, "min_new_tokens": least, "logprobs": logprobs}
    options |= {"logits_processor": avoid if shy else None, "text_sampling": {"temperature": 1.2}}
    with OmniEngine(model, max_sessions=1) as engine:
        for session in (OmniSession(model), engine.session()):
            session.push_text("tell me")
            got = outcome(list(session.respond(**{**PLAIN, **options})))
            prompt = session.ids[: session._turn.request.prompt_tokens]
            out = model.generate(OmniInputs(input_ids=torch.tensor([prompt])), **{**PLAIN, **options})
            assert got[:3] == (out.replies[0], out.text[0], out.reason[0])
            torch.testing.assert_close(got[3], out.audio[0], atol=1e-5, rtol=1e-5)
            assert got[4] == ([] if logprobs is None else out.replies[0])


@pytest.mark.parametrize(
    ("stop", "kept"), [(" tw", "one"), ("ne t", "o"), ("one", ""), ("wo", "one t"), (["four", "e tw"], "on")]
)
def test_the_history_holds_what_was_said(either: OmniModel, stop: Any, kept: str) -> None:
    session, processor = OmniSession(either, streaming=StreamingConfig(codec_schedule="whole")), either.processor
    session.push_text("count")
    got = outcome(list(session.respond(**{**PLAIN, "stop": stop, "logits_processor": says(either, "one two three")})))
    assert got[1:3] == (kept, "stop") or got[2] == "max_frames"
    closing = [258, *processor.encode_text("\n")]
    assert processor.decode(session.ids).endswith("assistant\n" + kept + "\n") and session.ids[-2:] == closing
    session.push_text("and now?")
    events = list(session.respond(**PLAIN))
    prompt = session.ids[: events[-1].usage["prompt_tokens"]]
    fresh = either.generate(OmniInputs(input_ids=torch.tensor([prompt])), **PLAIN)
    assert outcome(events)[0] == fresh.replies[0]
    torch.testing.assert_close(outcome(events)[3], fresh.audio[0], atol=1e-4, rtol=0)


def test_an_interruption_keeps_nothing_that_was_cut(model: OmniModel) -> None:
    for taken in range(1, 9):
        session = OmniSession(model)
        session.push_text("count")
        arguments = {"stop": "e tw", "logits_processor": says(model, "one two three"), "return_audio": False}
        events = session.respond(**{**PLAIN, **arguments})
        seen = "".join(e.text for e in islice(events, taken) if isinstance(e, TextDelta))
        assert session.interrupt().text == seen and "on".startswith(seen)


def test_respond_shows_its_arguments(model: OmniModel) -> None:
    offline = [name for name in inspect.signature(OmniModel.stream).parameters if name not in ("self", "inputs", "n")]
    with OmniEngine(model, max_sessions=1) as engine:
        for session in (OmniSession(model), engine.session()):
            for method in (session.respond, session.respond_async):
                parameters = inspect.signature(method).parameters
                assert set(parameters) == {*offline, "prefill", "items", "remember"} and "streaming" in offline
                assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            with pytest.raises(TypeError, match=r"respond has no argument 'stops'; did you mean 'stop'\?"):
                session.respond(stops="x")
            with pytest.raises(TypeError, match="respond has no argument 'n'"):
                session.respond(n=2)
            with pytest.raises(TypeError, match="streaming must be a StreamingConfig, got int"):
                session.respond(streaming=3)


def test_options_reach_an_asynchronous_reply(model: OmniModel) -> None:
    async def ask() -> list[Any]:
        session = OmniSession(model)
        session.push_text("count")
        options = {"stop": " tw", "logits_processor": says(model, "one two"), "logprobs": 1}
        return [event async for event in session.respond_async(**{**PLAIN, **options})]

    got = outcome(asyncio.run(ask()))
    assert got[1] == "one" and got[4] == got[0]
    with pytest.raises(TypeError, match="did you mean 'logprobs'"):
        OmniSession(model).respond_async(logprob=1)


def fails_at(step: int) -> Callable[[Tensor, Tensor], None]:
    calls: list[int] = []

    def fail(ids: Tensor, logits: Tensor) -> None:
        calls.append(1)
        if len(calls) > step:
            raise Oops("mine")

    return fail


@pytest.mark.parametrize("step", [0, 3])
def test_an_error_of_the_callers_function_is_the_callers_alone(model: OmniModel, step: int) -> None:
    session = OmniSession(model)
    session.push_text("count")
    with pytest.raises(Oops, match="mine"):
        list(session.respond(**{**PLAIN, "logits_processor": fails_at(step)}))
    with OmniEngine(model, max_sessions=2) as engine:
        other, mine = engine.session(), engine.session()
        for asked in (other, mine):
            asked.push_text("count")
        others = other.respond(**{**PLAIN, "max_new_tokens": 20, "max_frames": 20})
        next(others)
        with pytest.raises(Oops, match="mine"):
            list(mine.respond(**{**PLAIN, "logits_processor": fails_at(step)}))
        alone = OmniSession(model)
        alone.push_text("count")
        expected = outcome(list(alone.respond(**{**PLAIN, "max_new_tokens": 20, "max_frames": 20})))
        rest = outcome(list(others))
        assert rest[1:3] == expected[1:3]
        assert not mine.responding
        mine.push_text("again")
        assert outcome(list(mine.respond(**PLAIN)))[0]
