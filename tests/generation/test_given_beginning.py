"""A reply that is begun for the model: where it begins is recorded, and what was given is not spoken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from build import GREEDY, chat, saying, second_model, sound_item
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import AudioChunk, OmniEngine, OmniInputs, OmniModel, OmniSession, StreamingConfig, TextDelta
from omni.training.data.batches import collate
from omni.training.data.samples import Sample

SPEECH: dict[str, Any] = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "residual_sampling": GREEDY}
SPEECH |= {"max_new_tokens": 40, "max_frames": 16, "seed": 3}
GIVEN = " The river is"
WHOLE = StreamingConfig(silence_s=None, codec_schedule="whole")  # what generate decodes


@pytest.fixture(scope="module", params=["first", "second"])
def either(request: pytest.FixtureRequest, model: OmniModel) -> Iterator[OmniModel]:
    yield model if request.param == "first" else second_model()


def begun(given: Any = GIVEN, question: Any = "Name a river.") -> list[dict[str, Any]]:
    return chat(question, given)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# ---- the processor ----


@pytest.mark.parametrize("given", [GIVEN, "", "  two blanks", "ends in a blank ", "é€", "<|im_end|> is text"])
def test_the_prompt_ends_where_the_given_part_ends(model: OmniModel, given: str) -> None:
    processor = model.processor
    inputs = processor(begun(given), continue_final_message=True)
    header = processor(chat("Name a river.")).input_ids[0].tolist()
    assert inputs.input_ids[0].tolist() == [*header, *processor.encode_text(given)]
    assert inputs.reply_start.tolist() == [len(header)] and inputs.reply_start.dtype == torch.int64
    listed = processor(begun([{"type": "text", "text": given}]), continue_final_message=True)
    assert listed.input_ids.equal(inputs.input_ids) and listed.reply_start.equal(inputs.reply_start)


@pytest.mark.parametrize("given", [GIVEN, "\n\nThe river", "<think>\nwell", "ends in a blank "])
def test_ids_are_those_of_transformers(model: OmniModel, given: str) -> None:
    processor = model.processor
    text = processor.tokenizer.apply_chat_template(
        begun(given), chat_template=processor.chat.template, continue_final_message=True, tokenize=False
    )
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs = processor(begun(given), continue_final_message=True)
    assert inputs.input_ids[0].tolist() == expected
    start = int(inputs.reply_start[0])
    assert expected[start - 3 : start - 1] == [257, 278]  # behind the header


def test_where_it_begins_survives_padding_moving_and_batching(model: OmniModel) -> None:
    processor = model.processor
    heard = [{"role": "user", "content": [sound_item(0.4)]}, {"role": "assistant", "content": "I hear"}]
    batch = processor([begun(), heard, begun("A")], continue_final_message=True)
    starts = [int(row) for row in batch.reply_start]
    for row, text in enumerate((GIVEN, "I hear", "A")):
        assert batch.input_ids[row, starts[row] :].tolist() == processor.encode_text(text)
    assert batch.to("cpu", torch.bfloat16).reply_start.equal(batch.reply_start)
    assert OmniInputs(**batch.to_dict()).reply_start.equal(batch.reply_start)
    assert processor(chat("x")).reply_start is None and OmniInputs(input_ids=[[1, 2]]).reply_start is None
    singles = [processor(messages, continue_final_message=True) for messages in (begun(), heard, begun("A"))]

    def joined(*rows: OmniInputs) -> OmniInputs:
        return collate([Sample(row, torch.full_like(row.input_ids[0], -100)) for row in rows]).inputs

    assert joined(*singles).reply_start.equal(batch.reply_start)
    mixed = joined(singles[0], processor(chat("x")))
    assert mixed.reply_start.tolist() == [int(singles[0].reply_start), mixed.input_ids.shape[1]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat("hi"), "continue_final_message needs a last message of the assistant, got one of the user"),
        (chat("hi", [sound_item(0.4)]), "must end with text"),
        ([*chat("hi"), {"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}], "tool_calls"),
    ],
)
def test_what_cannot_be_continued(model: OmniModel, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.processor(messages, continue_final_message=True)


@pytest.mark.parametrize("start", [[-1], [99], [0, 0], [[1]]])
def test_impossible_beginnings(start: Any) -> None:
    with pytest.raises(ValueError, match="reply_start"):
        OmniInputs(input_ids=torch.ones(1, 5, dtype=torch.int64), reply_start=start)


# ---- generate and stream ----


def test_the_model_goes_on_from_there(either: OmniModel) -> None:
    inputs = either.processor(begun(), continue_final_message=True)
    out = either.generate(inputs, **{**SPEECH, "max_new_tokens": 5})
    bare = either.generate(OmniInputs(input_ids=inputs.input_ids), **{**SPEECH, "max_new_tokens": 5})
    assert out.replies == bare.replies and out.text == [either.processor.decode(out.replies[0])]
    assert out.sequences[0].tolist() == [*inputs.input_ids[0].tolist(), *out.replies[0]]
    assert torch.equal(out.codes[0], bare.codes[0])  # a prompt of ids alone means the same
    events = list(either.stream(inputs, **{**SPEECH, "max_new_tokens": 5}))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == out.text[0] == events[-1].text


def test_what_was_given_is_spoken_if_asked_for_alone(either: OmniModel) -> None:
    """Spoken, it sounds as a reply that said all of it; unspoken, as one that said the rest."""
    encode = either.processor.encode_text
    rest, plain = encode(" long."), either.processor(chat("Name a river."))
    inputs = either.processor(begun(), continue_final_message=True)
    with saying(either, rest):
        silent = either.generate(inputs, **SPEECH)
    with saying(either, rest):
        aloud = either.generate(inputs, speak_prefill=True, **SPEECH)
    with saying(either, [*encode(GIVEN), *rest]):
        whole = either.generate(plain, **SPEECH)
    assert silent.text == aloud.text == [" long."]
    assert torch.equal(aloud.codes[0], whole.codes[0])
    close(aloud.audio[0], whole.audio[0])
    assert not torch.equal(silent.codes[0], whole.codes[0])
    if not either.code2wav.needs_voice:  # of the first family's Talker, which hears the words alone
        with saying(either, rest):
            assert torch.equal(silent.codes[0], either.generate(plain, **SPEECH).codes[0])


def test_what_was_given_is_spoken_though_nothing_follows(either: OmniModel) -> None:
    inputs = either.processor(begun(), continue_final_message=True)
    with saying(either, []):
        aloud, silent = (either.generate(inputs, speak_prefill=flag, **SPEECH) for flag in (True, False))
    with saying(either, either.processor.encode_text(GIVEN)):
        whole = either.generate(either.processor(chat("Name a river.")), **SPEECH)
    assert aloud.text == [""] and torch.equal(aloud.codes[0], whole.codes[0])
    assert silent.codes[0].shape[1] == 0 and silent.audio[0].numel() == 0


def test_rows_of_a_batch_with_and_without_a_beginning(either: OmniModel) -> None:
    conversations = [begun(), begun("A", "a much longer question than the first one")]
    batch = either.processor(conversations, continue_final_message=True)
    for flag in (True, False):
        together = either.generate(batch, speak_prefill=flag, **{**SPEECH, "max_new_tokens": 4})
        for row, messages in enumerate(conversations):
            single = either.processor(messages, continue_final_message=True)
            alone = either.generate(single, speak_prefill=flag, **{**SPEECH, "max_new_tokens": 4})
            assert alone.replies[0] == together.replies[row]
            assert torch.equal(alone.codes[0], together.codes[row])


def test_a_thought_may_be_begun_and_is_never_spoken(model: OmniModel) -> None:
    encode, (_, end) = model.processor.encode_text, model.processor.think_token_ids
    thought = model.processor(begun("<think>\nwell"), continue_final_message=True)
    with saying(model, [*encode(" then"), end, *encode("yes")]):
        out = model.generate(thought, speak_prefill=True, **SPEECH)
    assert out.text == ["yes"] and out.reasoning == ["then"]
    ended = model.processor(begun("<think>\nwell\n</think>\n\n"), continue_final_message=True)
    with saying(model, encode("yes")):
        after = model.generate(ended, speak_prefill=True, **SPEECH)
    with saying(model, encode("yes")):
        plain = model.generate(model.processor(chat("Name a river.")), **SPEECH)
    assert torch.equal(out.codes[0], plain.codes[0]) and torch.equal(after.codes[0], plain.codes[0])
    answered = model.processor(begun("Well, "), continue_final_message=True)
    with saying(model, [259, *encode("no thought")]):
        assert model.generate(answered, **SPEECH).reasoning == [None]  # an answer that has begun stays one


def test_options_and_several_answers_go_on_from_there(either: OmniModel) -> None:
    inputs = either.processor(begun(), continue_final_message=True)
    arguments: dict[str, Any] = {**SPEECH, "max_new_tokens": 4, "text_sampling": {"temperature": 1.3}}
    for flag in (True, False):
        out = either.generate(inputs, n=2, speak_prefill=flag, **arguments)
        for j in range(2):
            alone = either.generate(inputs, speak_prefill=flag, **{**arguments, "seed": 3 + j})
            assert alone.replies[0] == out.replies[j] and torch.equal(alone.codes[0], out.codes[j])


# ---- sessions ----


def replies(events: Sequence[Any]) -> tuple[list[int], str, torch.Tensor]:
    sound = [e.samples for e in events if isinstance(e, AudioChunk)]
    ids = [i for e in events if isinstance(e, TextDelta) for i in e.token_ids]
    return ids, events[-1].text, torch.cat(sound) if sound else torch.zeros(0)


@given(
    st.text("\n ab<é", max_size=6) | st.sampled_from(["<think>\nwell", "<think>\nx\n</think>\n\nA", "<|im_end|>"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=8)
def test_a_session_equals_generate_on_the_same_beginning(
    model: OmniModel, given: str, speak: bool, silent: bool
) -> None:
    session = OmniSession(model)
    session.push_text("Name a river.")
    arguments = {**SPEECH, "max_new_tokens": 4, "return_audio": not silent, "speak_prefill": speak}
    events = list(session.respond(prefill=given, **arguments))
    inputs = model.processor(begun(given), continue_final_message=True)
    assert session.ids[: inputs.input_ids.shape[1]] == inputs.input_ids[0].tolist()
    out = model.generate(inputs, **arguments)
    ids, text, sound = replies(events)
    assert ids == out.replies[0] and text == out.text[0]
    if not silent:
        close(sound, out.audio[0])


def test_what_follows_a_begun_reply_equals_a_fresh_run(either: OmniModel) -> None:
    for speak in (True, False):
        session = OmniSession(either, streaming=WHOLE)
        session.push_text("Name a river.")
        arguments = {**SPEECH, "max_new_tokens": 4, "speak_prefill": speak}
        first = list(session.respond(prefill=GIVEN, **arguments))
        ids = replies(first)[0]
        session.push_text("and now?")
        events = list(session.respond(**SPEECH))
        prompt = session.ids[: events[-1].usage["prompt_tokens"]]
        text = either.processor.decode(prompt)
        assert GIVEN + either.processor.decode(ids) in text
        fresh = either.generate(OmniInputs(input_ids=torch.tensor([prompt])), **SPEECH)
        assert replies(events)[0] == fresh.replies[0]
        close(replies(events)[2], fresh.audio[0])


def test_an_interrupted_reply_counts_what_was_given_as_heard_first(either: OmniModel) -> None:
    session = OmniSession(either, streaming=WHOLE)
    session.push_text("Name a river.")
    list(session.respond(prefill=GIVEN, speak_prefill=True, **{**SPEECH, "max_new_tokens": 6}))
    turn = session._turn
    assert turn.times.text.startswith(GIVEN) and turn.times.given == len(GIVEN)
    ends = turn.times.word_ends_ms()  # of the words given first
    played = 1000 * (len(turn.speech.codes) - 2) / either.code2wav.frame_rate
    kept = session.interrupt(played_ms=played)
    spoken = [token for token in turn.text.ids if token != 258]
    assert kept.token_ids == spoken[: len(kept.token_ids)] and len(kept.token_ids) < len(spoken)
    assert not kept.token_ids or ends[len(GIVEN.split()) - 1] < played
    assert either.processor.decode(session.ids).endswith(GIVEN + kept.text + "\n")
    session.push_text("go on")
    events = list(session.respond(**SPEECH))
    prompt = session.ids[: events[-1].usage["prompt_tokens"]]
    fresh = either.generate(OmniInputs(input_ids=torch.tensor([prompt])), **SPEECH)
    assert replies(events)[0] == fresh.replies[0]
    close(replies(events)[2], fresh.audio[0])


def test_engines_take_a_beginning_too(either: OmniModel) -> None:
    alone = OmniSession(either, streaming=WHOLE)
    with OmniEngine(either, max_sessions=2) as engine:
        both = [alone, engine.session(streaming=WHOLE)]
        got = []
        for session in both:
            session.push_text("Name a river.")
            got.append(replies(list(session.respond(prefill=GIVEN, speak_prefill=True, **SPEECH))))
        assert both[0].ids == both[1].ids
    assert got[0][:2] == got[1][:2]
    close(got[0][2], got[1][2])


def test_a_beginning_is_text(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("x")
    before = session.ids
    with pytest.raises(TypeError, match="prefill must be a string, got int"):
        session.respond(prefill=3)
    assert session.ids == before
