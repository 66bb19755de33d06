"""What of a reply counts as heard: whole words, never more than was played."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from build import GREEDY, saying, second_model

from omni import AudioChunk, OmniModel, OmniSession, StreamingConfig, TextDelta
from omni.generation.turn import Turn
from omni.packaged.nano import nano_model
from omni.session.heard import ReplyTimes, heard_ids, reply_times

SPEECH: dict[str, Any] = {"audio_sampling": {"temperature": 0, "repetition_penalty": 1.3}, "residual_sampling": GREEDY}
SPEECH |= {"max_new_tokens": 60, "seed": 3}
TEXTS = ["the cat remembers 12 fish, today.", "你好，世界 (good)", "one", "a\n\nb - c", "...", "naïve é€ 🙂 yes"]  # noqa: RUF001


@pytest.fixture(scope="module", params=["first", "second"])
def either(request: pytest.FixtureRequest, model: OmniModel) -> Iterator[OmniModel]:
    yield model if request.param == "first" else second_model()


@pytest.fixture(scope="module")
def nano() -> OmniModel:
    return nano_model()


def spoken(model: OmniModel, text: str, frames: int = 60, **arguments: Any) -> tuple[OmniSession, Turn]:
    """A session that has said a text, and the turn."""
    session = OmniSession(model, streaming=StreamingConfig(silence_s=None, loop_frames=None))
    session.push_text("go on")
    with saying(model, model.processor.encode_text(text)):
        list(session.respond(**{**SPEECH, "max_frames": frames, **arguments}))
    assert session._turn is not None
    return session, session._turn


def length_ms(turn: Turn, model: OmniModel) -> float:
    return 1000 * turn.sound.samples / model.code2wav.sample_rate


# ---- laws ----


@pytest.mark.parametrize("text", TEXTS)
def test_whole_words_and_more_of_them_the_later_the_cut(either: OmniModel, text: str) -> None:
    _, turn = spoken(either, text)
    codec, decode = either.code2wav, either.processor.decode
    ids = either.processor.encode_text(text)
    end = length_ms(turn, either)
    kept = [heard_ids(turn, codec, end * part / 20) for part in range(21)]
    assert kept[0] == [] and kept[-1] == ids == heard_ids(turn, codec, None) == heard_ids(turn, codec, 1e9)
    assert all(less == more[: len(less)] for less, more in pairwise(kept))
    words = turn.times.words
    for some in kept:
        rest = text[len(decode(some)) :]
        assert text.startswith(decode(some)), "no half character"
        assert not rest or not words or len(decode(some)) in {word.start for word in words} | {0}, "no half word"


def test_a_record_says_the_same_later(either: OmniModel) -> None:
    _, turn = spoken(either, TEXTS[0])
    times = reply_times(turn, either.code2wav)
    saved = json.loads(json.dumps({"token_ids": times.token_ids, "ends_ms": times.ends_ms}))
    again = ReplyTimes(**saved)
    assert again == times and list(times.ends_ms) == sorted(times.ends_ms)
    assert list(times.token_ids) == either.processor.encode_text(TEXTS[0])
    end = length_ms(turn, either)
    for played in (None, 0, 1, end / 3, end / 2, end, 2 * end):
        assert again.heard(played) == heard_ids(turn, either.code2wav, played)
    assert min(times.ends_ms) > 0 and max(times.ends_ms) <= end


@pytest.mark.parametrize("wrong", [-1, True, "80", float("inf"), float("nan"), [1]])
def test_wrong_times_are_refused(model: OmniModel, wrong: Any) -> None:
    _, turn = spoken(model, "one", 4)
    with pytest.raises(ValueError, match="played_ms"):
        heard_ids(turn, model.code2wav, wrong)
    with pytest.raises(ValueError, match="played_ms"):
        ReplyTimes((1,), (2.0,)).heard(wrong)
    with pytest.raises(ValueError, match="2 tokens need as many times, got 1"):
        ReplyTimes((1, 2), (2.0,))


def test_a_silent_reply_counts_as_read_whatever_was_played(model: OmniModel) -> None:
    _, turn = spoken(model, "one two", return_audio=False)
    ids = model.processor.encode_text("one two")
    times = reply_times(turn, model.code2wav)
    assert turn.times is None and set(times.ends_ms) == {0.0}
    for played in (None, 0, 100):
        assert heard_ids(turn, model.code2wav, played) == times.heard(played) == ids
    turn.delivered_ids = 3  # no more was yielded
    assert heard_ids(turn, model.code2wav, None) == ids[:3]


def test_what_was_not_yielded_was_not_heard(model: OmniModel) -> None:
    _, turn = spoken(model, TEXTS[0])
    turn.delivered_frames = 10
    assert heard_ids(turn, model.code2wav, None) == heard_ids(turn, model.code2wav, 5000)
    assert len(heard_ids(turn, model.code2wav, None)) < len(turn.text.ids) - 1


def test_what_a_stop_string_cut_off_does_not_count(model: OmniModel) -> None:
    _, turn = spoken(model, "one two STOP three", stop="STOP")
    kept = heard_ids(turn, model.code2wav, None)
    assert model.processor.decode(kept) == "one two " and kept == turn.text.kept
    assert turn.times.text == "one two " and len(turn.times.words) == 2


def test_thoughts_go_with_the_first_word(model: OmniModel) -> None:
    processor = model.processor
    opened, closed = processor.think_token_ids
    thought = [opened, *processor.encode_text("long thoughts"), closed]
    session = OmniSession(model)
    session.push_text("go on")
    with saying(model, [*thought, *processor.encode_text("one two three")]):
        events = list(session.respond(**{**SPEECH, "max_frames": 40}))
    turn = session._turn
    times = reply_times(turn, model.code2wav)
    assert turn.times.text == "one two three"
    first = times.ends_ms[len(thought)]
    assert set(times.ends_ms[: len(thought)]) == {first} and first > 0
    assert times.heard(first)[: len(thought)] == thought and times.heard(first / 2) == []
    assert [e.time_ms is None for e in events if isinstance(e, TextDelta) and e.text and e.reasoning].count(False) == 0
    assert all(e.time_ms is not None for e in events if isinstance(e, TextDelta) and e.text and not e.reasoning)


def test_a_given_beginning_is_heard_first(either: OmniModel) -> None:
    session = OmniSession(either, streaming=StreamingConfig(silence_s=None, loop_frames=None, codec_schedule="whole"))
    session.push_text("go on")
    with saying(either, either.processor.encode_text(" one two")):
        list(session.respond(prefill="before all this", speak_prefill=True, **{**SPEECH, "max_frames": 60}))
    turn = session._turn
    times = reply_times(turn, either.code2wav)
    said = either.processor.decode(times.token_ids)
    assert said.endswith(" two") and turn.times.text == "before all this" + said
    ends = turn.times.word_ends_ms(sound_over=turn.speech.reason == "stop")
    assert times.ends_ms[0] >= min(ends[2], length_ms(turn, either))


# ---- marks of events ----


def test_events_carry_times_and_say_the_same_as_before(either: OmniModel) -> None:
    session = OmniSession(either)
    session.push_text("go on")
    with saying(either, either.processor.encode_text(TEXTS[0])):
        events = list(session.respond(**{**SPEECH, "max_frames": 60}))
    texts = [event for event in events if isinstance(event, TextDelta)]
    begins = [event.time_ms for event in texts if event.text]
    assert begins == sorted(begins) and all(0 <= begin < 60_000 for begin in begins)
    assert all(event.time_ms is None for event in texts if not event.text)
    rate = either.code2wav.sample_rate
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert chunks and all(event.start_ms == pytest.approx(1000 * event.start_sample / rate) for event in chunks)
    silent = OmniSession(either)
    silent.push_text("go on")
    assert {e.time_ms for e in silent.respond(**SPEECH, return_audio=False) if isinstance(e, TextDelta)} == {None}


# ---- the packaged model ----

ASKED = "repeat after me the old king follows your blue fish"
JUDGED = (  # by PocketSphinx: when each of these words begins and ends
    ("the", 0, 170), ("old", 170, 490), ("king", 490, 860), ("follows", 860, 1540), ("your", 1540, 1940),
    ("blue", 1940, 2330), ("fish", 2330, 2660),
)  # fmt: skip


def test_cuts_of_a_real_voice_while_it_speaks(nano: OmniModel) -> None:
    session = OmniSession(nano)
    session.push_text(ASKED)
    errors, played = [], 100
    for event in session.respond():
        if isinstance(event, AudioChunk):
            while played <= event.start_ms + 1000 * len(event.samples) / event.sample_rate:
                kept = nano.processor.decode(heard_ids(session._turn, nano.code2wav, played)).split()
                assert kept == [word for word, _, _ in JUDGED][: len(kept)]
                errors.append(len(kept) - sum(end <= played for _, _, end in JUDGED))
                played += 100
    assert len(errors) >= 25 and set(errors) <= {-1, 0} and sum(errors) >= -8


def test_captions_of_a_real_voice(nano: OmniModel) -> None:
    session = OmniSession(nano)
    session.push_text(ASKED)
    sent = [e.time_ms for e in session.respond() if isinstance(e, TextDelta) and e.text]
    assert len(sent) == len(JUDGED)
    assert max(abs(time - begin) for time, (_, begin, _) in zip(sent, JUDGED)) < 600  # known before the sound
    spans = session._turn.times.word_spans_ms(sound_over=True)
    assert max(abs(begin - judged) for (begin, _), (_, judged, _) in zip(spans, JUDGED)) < 150
