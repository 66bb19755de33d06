"""The second family speaks: streams, batches, sessions, engines and captured steps give what `generate` gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import BATCH, FAST, chat, second_model

from omni import (
    AudioChunk,
    OmniEngine,
    OmniInputs,
    OmniModel,
    OmniSession,
    StreamingConfig,
    TextDelta,
    TurnEnd,
)
from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.generation.arguments import default_codes
from omni.generation.graphs import GraphPool, Outputs, Replay
from omni.generation.prompt import encode_prompt
from omni.generation.rows import Rows
from omni.generation.sampling import SOUND_STREAM, SamplingConfig, stream_seed
from omni.metrics.agreement import _speech, agreement, teacher_forced
from omni.session.heard import heard_ids

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "seed": 3}
PLAIN |= {"max_new_tokens": 5, "max_frames": 18}
SCHEDULE = ChunkSchedule(chunk_codes=4, left_codes=2, lookahead_codes=2)
WINDOWS = StreamingConfig(codec_schedule=SCHEDULE, codec_ode=FAST, silence_s=None)


@pytest.fixture(scope="module")
def speaker_model() -> OmniModel:
    return second_model()


def collect(events: list[Any], row: int = 0) -> tuple[list[int], torch.Tensor, TurnEnd]:
    mine = [e for e in events if e.row == row]
    chunks = [e for e in mine if isinstance(e, AudioChunk)]
    assert all(c.start_sample == sum(d.samples.numel() for d in chunks[:i]) for i, c in enumerate(chunks))
    sound = torch.cat([c.samples for c in chunks]) if chunks else torch.zeros(0)
    assert isinstance(mine[-1], TurnEnd)
    return [i for e in mine if isinstance(e, TextDelta) for i in e.token_ids], sound, mine[-1]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_streams_and_batches_say_what_generate_says(speaker_model: OmniModel) -> None:
    model, codec = speaker_model, speaker_model.code2wav
    whole = model.generate(model.processor(BATCH), speaker=["ann", "BOB", None], **PLAIN)
    assert min(codes.shape[1] for codes in whole.codes) > 8 and whole.codes[0].max() <= 20
    for schedule in ((1, 1, 2, 4), (5,)):
        streaming = StreamingConfig(chunk_frames=schedule, codec_schedule=SCHEDULE, codec_ode=FAST)
        events = list(model.stream(model.processor(BATCH), speaker=["ann", "BOB", None], streaming=streaming, **PLAIN))
        for row, voice in enumerate(("Ann", "bob", "Ann")):
            ids, sound, end = collect(events, row)
            assert ids == whole.replies[row] and end.usage["frames"] == whole.codes[row].shape[1]
            seed = stream_seed(3, SOUND_STREAM)
            codes = whole.codes[row][None]
            close(sound, codec.decode_chunked(codes, model.voices[voice], SCHEDULE, seed=seed, ode=FAST)[0])
    seed = stream_seed(3, SOUND_STREAM)
    close(whole.audio[0], codec(whole.codes[0][None], model.voices["Ann"], seed=seed)[0])
    alone = model.generate(model.processor(BATCH[1]), speaker="bob", **PLAIN)
    assert alone.replies[0] == whole.replies[1] and torch.equal(alone.codes[0], whole.codes[1])
    close(alone.audio[0], whole.audio[1])


def test_sound_comes_while_codes_are_still_drawn(speaker_model: OmniModel) -> None:
    model = speaker_model
    early = ChunkSchedule(chunk_codes=2, left_codes=2, lookahead_codes=0, vocoder_lookahead_frames=1)
    streaming = StreamingConfig(chunk_frames=(1,), codec_schedule=early, codec_ode=FAST)
    events = list(model.stream(model.processor(chat("hi")), streaming=streaming, **PLAIN))
    sound = [e for e in events if isinstance(e, AudioChunk)]
    assert len(sound) > 4 and all(e.samples.numel() for e in sound)
    assert events.index(sound[0]) < max(i for i, e in enumerate(events) if isinstance(e, TextDelta))


class Recorder:
    """Stands in for a CUDA graph on a CPU."""

    captured = 0

    def __call__(self, step: Callable[[], Outputs]) -> Replay:
        self.captured += 1
        step()
        fixed = tuple(x.clone() for x in step())

        def replay() -> Outputs:
            for mine, new in zip(fixed, step()):
                mine.copy_(new)
            return fixed

        return replay


def test_captured_steps_give_the_same(speaker_model: OmniModel) -> None:
    model, recorder = speaker_model, Recorder()
    inputs = model.processor(BATCH[:2])
    expected = list(model.stream(inputs, streaming=WINDOWS, **PLAIN))
    model.graphs = GraphPool(capture=recorder)
    try:
        got = list(model.stream(inputs, streaming=WINDOWS, **PLAIN))
    finally:
        model.graphs = None
    assert recorder.captured
    for row in range(2):
        a, b = collect(expected, row), collect(got, row)
        assert a[0] == b[0] and a[2].usage == b[2].usage
        close(a[1], b[1])


def fresh(model: OmniModel, session: OmniSession, got: tuple[list[int], torch.Tensor, TurnEnd]) -> None:
    """A session's reply equals that of a stream on its prompt's ids."""
    prompt = session.ids[: got[2].usage["prompt_tokens"]]
    inputs = OmniInputs(input_ids=torch.tensor([prompt]))
    ids, sound, end = collect(list(model.stream(inputs, streaming=WINDOWS, **PLAIN)))
    assert got[0] == ids and got[2].usage == end.usage
    close(got[1], sound)


def ask(session: OmniSession, text: str, **changes: Any) -> tuple[list[int], torch.Tensor, TurnEnd]:
    session.push_text(text)
    return collect(list(session.respond(**{**PLAIN, **changes})))


def test_sessions_equal_fresh_runs_after_replies_silence_interruptions_and_forks(
    speaker_model: OmniModel, tmp_path: Path
) -> None:
    model = speaker_model
    session = OmniSession(model, system="be brief", streaming=WINDOWS)
    fresh(model, session, ask(session, "hello"))
    fresh(model, session, ask(session, "and now?"))  # the first reply has been heard too
    session.push_text("tell me a story")
    events = session.respond(**{**PLAIN, "max_new_tokens": 12, "max_frames": 40})
    heard = next(event for event in events if isinstance(event, AudioChunk)).samples.numel()
    turn = session._turn
    assert turn is not None
    words = heard_ids(turn, model.code2wav, 1000 * heard / model.code2wav.sample_rate)
    kept = session.interrupt(played_ms=1000.0)
    spoken = [token for token in turn.text.ids if token != 258]
    assert 0 < heard < 1.0 * model.code2wav.sample_rate  # no more is heard than was handed out
    assert kept.token_ids == words == spoken[: len(words)] and len(words) < len(spoken)
    session.save(tmp_path / "kept")
    loaded, other = OmniSession.load(tmp_path / "kept", model), session.fork()
    assert loaded.streaming == WINDOWS
    first = ask(session, "stop")
    fresh(model, session, first)
    for copy in (loaded, other):
        again = ask(copy, "stop")
        assert again[0] == first[0]
        close(again[1], first[1])
    ask(session, "quietly", return_audio=False)
    fresh(model, session, ask(session, "aloud again"))
    assert len(session.interrupt(played_ms=4.0).token_ids) < 5  # 8 codes of 18: a reply may be cut after its end
    fresh(model, session, ask(session, "once more"))
    session.drop_oldest_turns(3)
    fresh(model, session, ask(session, "and the rest?"))


def test_an_engine_says_what_sessions_say_alone(speaker_model: OmniModel) -> None:
    model = speaker_model
    alone = [ask(OmniSession(model, speaker=name, streaming=WINDOWS), "hello " + name) for name in ("ann", "bob")]
    with OmniEngine(model, max_sessions=2, streaming=WINDOWS) as engine:
        sessions = [engine.session(speaker=name) for name in ("ann", "bob")]
        for session, name in zip(sessions, ("ann", "bob")):
            session.push_text("hello " + name)
        streams = [session.respond(**PLAIN) for session in sessions]
        together = [collect(list(events)) for events in streams]
    for got, expected in zip(together, alone):
        assert got[0] == expected[0] and got[2].reason == expected[2].reason
        close(got[1], expected[1])


def test_speak_lets_the_thinker_read_the_text_as_its_reply(speaker_model: OmniModel) -> None:
    model, text = speaker_model, "a given text"
    arguments = {key: PLAIN[key] for key in ("audio_sampling", "seed", "max_frames")}
    said, other = model.speak([text, "another"], speaker="bob", **arguments)
    prompt = model.processor(chat("")).input_ids[0].tolist()
    reply = [*model.processor.encode_text(text), 258]
    forced = iter(reply)
    hook = model.thinker.lm_head.register_forward_hook(
        lambda _, __, logits: torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([next(forced)]), 1e4)
    )
    try:
        inputs = OmniInputs(input_ids=torch.tensor([prompt]))
        out = model.generate(inputs, speaker="bob", max_new_tokens=50, **arguments)
    finally:
        hook.remove()
    assert out.replies[0] == reply
    close(said, out.audio[0])
    assert said.shape != other.shape or not torch.allclose(said, other)


def test_teacher_forcing_finds_the_choices_of_generation(speaker_model: OmniModel) -> None:
    model, inputs = speaker_model, speaker_model.processor(BATCH)
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    out = model.generate(inputs, 5, max_frames=9, text_sampling=greedy, audio_sampling=greedy, seed=3)
    prompt, banned = encode_prompt(model, inputs), Rows(model, 1).runner.banned
    for row, (reply, codes) in enumerate(zip(out.replies, out.codes)):
        assert codes.shape[1] > len(reply) + 1  # the text ends within the speech
        speech = _speech(model, prompt.row_ids(row), reply, codes, None)
        forced = teacher_forced(model, prompt, row, reply, speech)
        assert forced.text.argmax(-1).tolist() == reply and len(forced.codes) == 1
        assert forced.codes[0].masked_fill(banned, float("-inf")).argmax(-1).tolist() == codes[0].tolist()
    same = agreement(model, model, inputs, max_new_tokens=3, max_frames=4)
    assert same.frames > 4 and same.code_kl == (0.0,) and same.code_agreement == (1.0,)


def test_sessions_and_speak_know_the_system_text_of_the_speech(
    speaker_model: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = speaker_model, speaker_model.processor
    arguments = {key: PLAIN[key] for key in ("audio_sampling", "seed", "max_frames")}
    plain = model.speak("a text", **arguments)
    monkeypatch.setattr(processor, "speech_system", "speak well")
    for system in (None, "be brief"):
        monkeypatch.setattr(processor, "_warned", False)
        with pytest.warns(UserWarning, match="speech may fail"):
            OmniSession(model, system=system).push_text("hello")
    monkeypatch.setattr(processor, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OmniSession(model, system="speak well").push_text("hello")
        taught = model.speak("a text", **arguments)
    assert taught.shape != plain.shape or not torch.equal(taught, plain)


def test_voices_are_needed_and_named(speaker_model: OmniModel) -> None:
    model = speaker_model
    assert default_codes(model) == SamplingConfig(0.9, 40, 0.8, 1.05)
    with pytest.raises(ValueError, match="unknown speaker 'eve'; this checkpoint has ann, bob"):
        model.generate(model.processor(chat("x")), speaker="eve")
    voices, model.voices = model.voices, {}
    try:
        with pytest.raises(ValueError, match=r"model\.voices"):
            model.generate(model.processor(chat("x")), **PLAIN)
        assert model.generate(model.processor(chat("x")), return_audio=False, max_new_tokens=2).audio is None
    finally:
        model.voices = voices
    object.__setattr__(voices["bob"], "bos_token", 700)
    try:
        with pytest.raises(ValueError, match="'bob' begins with the text token 700"):
            model.generate(model.processor(chat("x")), speaker="bob")
    finally:
        object.__setattr__(voices["bob"], "bos_token", 301)
