"""Decoding as written, compiled and captured: the same ids, codes and samples; steps that a graph can hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from build import BATCH, PLAIN

from omni import AudioChunk, OmniConfig, OmniEngine, OmniModel, OmniSession, SamplingConfig, StreamingConfig
from omni.generation import graphs
from omni.generation.compilation import warm_up
from omni.generation.graphs import GraphPool, GraphRunner, Outputs, Replay
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, TEXT_STREAM, RowSampling
from omni.generation.steps import Steps, compiled_steps
from omni.layers.init import MetaBuild
from omni.layers.state import State
from omni.packaged.toy import toy_model

SAMPLED: dict[str, Any] = {"seed": [3, 4, 5], "text_sampling": {"temperature": 1.2}}


class Recorder:
    """Stands in for a CUDA graph on a CPU: runs a step as often as capturing does, and always returns one memory."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, step: Callable[[], Outputs]) -> Replay:
        self.captured += 1
        step(), step()
        fixed = tuple(x.clone() for x in step())

        def replay() -> Outputs:
            for mine, new in zip(fixed, step()):
                mine.copy_(new)
            return fixed

        return replay


@pytest.fixture
def recorder(model: OmniModel) -> Iterator[Recorder]:
    recorder = Recorder()
    model.graphs = GraphPool(capture=recorder)
    yield recorder
    model.graphs = None


def same(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.codes, other.codes):
        assert torch.equal(a, b)
    for a, b in zip(one.audio, other.audio):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_generation_equals_generation_as_written(
    model: OmniModel, recorder: Recorder, arguments: dict[str, Any], rows: int
) -> None:
    inputs = model.processor(BATCH[:rows])
    arguments = {"max_new_tokens": 7, "max_frames": 12, **arguments}
    if "seed" in arguments:
        arguments["seed"] = arguments["seed"][:rows]
    captured = model.generate(inputs, **arguments)
    pool, model.graphs = model.graphs, None
    same(captured, model.generate(inputs, **arguments))
    model.graphs = pool


@pytest.mark.parametrize("schedule", [(1,), (1, 1, 2, 4), (3,)])
def test_captured_streams_decode_each_frame_and_deal_in_chunks(
    model: OmniModel, recorder: Recorder, schedule: tuple[int, ...]
) -> None:
    inputs = model.processor(BATCH)
    arguments: dict[str, Any] = {"max_new_tokens": 7, "max_frames": 11, **PLAIN}
    events = list(model.stream(inputs, streaming=StreamingConfig(chunk_frames=schedule), **arguments))
    pool, model.graphs = model.graphs, None
    whole = model.generate(inputs, **arguments)
    model.graphs = pool
    for row in range(3):
        chunks = [e.samples for e in events if isinstance(e, AudioChunk) and e.row == row]
        torch.testing.assert_close(torch.cat(chunks), whole.audio[row], atol=1e-5, rtol=1e-5)


def test_graphs_are_captured_once_and_used_again_by_the_next_turn(model: OmniModel, recorder: Recorder) -> None:
    inputs = model.processor(BATCH[:1])
    first = model.generate(inputs, max_new_tokens=6, max_frames=8, **PLAIN)
    gc.collect()
    captured = recorder.captured
    assert captured > 0
    same(first, model.generate(inputs, max_new_tokens=6, max_frames=8, **PLAIN))
    assert recorder.captured == captured
    with torch.no_grad():  # other weights: old graphs would read freed memory
        model.talker.codec_head.weight = torch.nn.Parameter(model.talker.codec_head.weight.clone())
    gc.collect()
    same(first, model.generate(inputs, max_new_tokens=6, max_frames=8, **PLAIN))
    assert recorder.captured > captured


def test_a_cache_that_moves_is_captured_again(
    model: OmniModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = model.processor(BATCH[1:2])
    whole = model.generate(inputs, max_new_tokens=9, max_frames=200, **PLAIN)
    monkeypatch.setattr(graphs, "_CAPACITY", 8)
    model.graphs = GraphPool(capture=recorder)
    monkeypatch.setattr("omni.generation.rows.Rows.__init__.__defaults__", (8,))
    same(whole, model.generate(inputs, max_new_tokens=9, max_frames=200, **PLAIN))


def test_a_cache_that_a_prompt_has_moved_is_captured_again(
    model: OmniModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also graphs of a short span, which a later turn may need again."""
    monkeypatch.setattr(graphs, "_CAPACITY", 8)
    session = OmniSession(model, model.processor)
    runner = session._reader.rows.runner
    captured: list[list[Replay]] = []
    for text in ("hi", "a long story " * 60):
        session.push_text(text)
        list(session.respond(max_new_tokens=4, max_frames=4, **PLAIN))
        captured.append(list(runner._graphs.values()))
    assert captured[0] and not any(old is new for old in captured[0] for new in captured[1])


def test_sessions_and_engines_answer_alike_with_graphs(model: OmniModel, recorder: Recorder) -> None:
    def talk(session: OmniSession) -> tuple[list[int], torch.Tensor]:
        ids, sound = [], []
        for text in ("hello", "and again"):
            session.push_text(text)
            for event in session.respond(max_new_tokens=6, max_frames=7, **PLAIN):
                if isinstance(event, AudioChunk):
                    sound.append(event.samples)
                ids += getattr(event, "token_ids", ())
        return ids, torch.cat(sound)

    with OmniEngine(model, model.processor, max_sessions=3) as engine:
        one, two = engine.session(), engine.session()
        captured = [talk(two), talk(one), talk(OmniSession(model, model.processor))]
    pool, model.graphs = model.graphs, None
    ids, sound = talk(OmniSession(model, model.processor))
    model.graphs = pool
    for got in captured:
        assert got[0] == ids
        torch.testing.assert_close(got[1], sound, atol=1e-5, rtol=1e-5)


def addresses(state: State) -> list[int]:
    found: list[int] = []
    state._map(lambda t: found.append(t.data_ptr()) or t)  # type: ignore[func-returns-value]
    return found


def test_steps_leave_every_state_where_it_is(model: OmniModel, recorder: Recorder) -> None:
    session = OmniSession(model, model.processor)
    session.push_text("hello")
    runner = session._reader.rows.runner
    before = addresses(runner.text), addresses(runner.speech), addresses(runner._sound)
    assert len(list(session.respond(max_new_tokens=8, max_frames=20, **PLAIN))) > 10
    assert (addresses(runner.text), addresses(runner.speech), addresses(runner._sound)) == before


def test_nothing_in_a_step_waits_for_the_device_or_sends_to_it(model: OmniModel) -> None:
    class Ran(Exception):
        pass

    def run_once(step: Callable[[], Outputs]) -> Replay:
        step()  # fills the tables that are kept for good
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "tensor", lambda *a, **k: pytest.fail("a step builds a tensor on the host"))
            assert all(x.device.type == "meta" for x in step())  # reading a value of the meta device raises
        raise Ran

    with MetaBuild():
        ghost = OmniModel(model.config).to(torch.bfloat16)
    runner = GraphRunner(ghost, 3, 16, capture=run_once)
    everyone = [True] * 3
    seeds = torch.zeros(3, dtype=torch.int64, device="meta")
    config = SamplingConfig(temperature=0.9, top_k=5, top_p=0.8, repetition_penalty=1.1)
    text, codes, residual = (
        RowSampling.of([config] * 3, seeds, s) for s in (TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM)
    )
    state = ghost.code2wav.init_state(1)
    while not state.started:
        ghost.code2wav.step(torch.zeros(1, ghost.code2wav.num_codebooks, 1, dtype=torch.int64, device="meta"), state)
    runner.adopt_sound(0, state)
    for step in (
        lambda: runner.draw_token(text, everyone),
        lambda: runner.read_token(everyone),
        lambda: runner.frame([0] * 3, everyone, everyone, everyone, (codes, residual)),
    ):
        with pytest.raises(Ran):
            step()


def test_traced_steps_equal_steps_as_written(model: OmniModel) -> None:
    inputs = model.processor(BATCH[:2])
    arguments: dict[str, Any] = {"max_new_tokens": 6, "max_frames": 9, **PLAIN}
    whole = model.generate(inputs, **arguments)
    model.steps = compiled_steps("aot_eager")
    try:
        same(whole, model.generate(inputs, **arguments))
    finally:
        model.steps = Steps()


def test_models_of_other_widths_compile_in_one_process(model: OmniModel) -> None:
    """What torch has learnt of the sizes of one model is not taken to vary in the next."""
    inputs, values = model.processor(BATCH[0]), model.config.to_dict()
    arguments: dict[str, Any] = {"max_new_tokens": 3, "max_frames": 4, **PLAIN}
    values["code2wav_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    values["thinker_config"]["text_config"] |= {"num_attention_heads": 8}
    torch.manual_seed(0)
    other = OmniModel(OmniConfig.from_dict(values))
    for each in (model, other):
        whole = each.generate(inputs, **arguments)
        each.steps = compiled_steps("aot_eager")
        try:
            same(whole, each.generate(inputs, **arguments))
        finally:
            each.steps = Steps()


def test_a_model_changed_after_compiling_is_not_taken_for_what_it_was() -> None:
    torch.manual_seed(0)
    model = toy_model()
    arguments: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 5, **PLAIN}
    inputs = model.processor(BATCH[0])
    model.steps = compiled_steps("aot_eager")
    model.generate(inputs, **arguments)
    seen: list[int] = []
    model.talker.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.to(torch.bfloat16)
    changed = model.generate(inputs, **arguments)
    model.steps = Steps()
    seen.clear()
    same(changed, model.generate(inputs, **arguments))
    assert seen


@pytest.mark.slow  # a minute of compiling; the same steps are traced and run above
def test_compiled_turns_equal_turns_as_written_and_compile_nothing_more(model: OmniModel) -> None:
    inputs = model.processor(BATCH[1])
    variants: list[dict[str, Any]] = [PLAIN, {"seed": 5}]
    whole = [model.generate(inputs, max_new_tokens=6, max_frames=9, **v) for v in variants]
    model.compile("inductor")
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for expected, variant in zip(whole, variants):
                same(expected, model.generate(inputs, max_new_tokens=6, max_frames=9, **variant))
    finally:
        model.compile("eager")
    assert model.steps == Steps()


def test_wrong_requests_to_compile_are_refused(model: OmniModel) -> None:
    with pytest.raises(ValueError, match="needs a model on a GPU"):
        model.compile("graphs")
    with pytest.raises(ValueError, match="eager, inductor, graphs"):
        model.compile("fast")
    with pytest.raises(ValueError, match="batch_sizes"):
        model.compile("inductor", batch_sizes=0)
    with pytest.raises(TypeError, match="batch_sizes"):
        model.compile(batch_size=2)


def test_warming_up_leaves_no_trace(model: OmniModel, recorder: Recorder) -> None:
    warm_up(model, [1, 2])
    gc.collect()
    captured = recorder.captured
    inputs = model.processor(BATCH[0])
    got = model.generate(inputs, max_new_tokens=6, max_frames=9, seed=3)
    assert captured > 0 and recorder.captured == captured
    pool, model.graphs = model.graphs, None
    same(got, model.generate(inputs, max_new_tokens=6, max_frames=9, seed=3))
    model.graphs = pool
