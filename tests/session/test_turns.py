"""Turns, to the frame: what begins, ends and interrupts one, and what does not. Sounds are bursts with known edges."""

from __future__ import annotations

import pytest
import torch
from turn_sounds import LoudDetector, bursts

from omni.session.turn_events import (
    Backchannel,
    IdleTimeout,
    Interrupt,
    ResumeReply,
    SpeechStarted,
    SpeechStopped,
    TurnConfig,
    TurnContext,
    TurnEvent,
)
from omni.session.turns import TurnTaking
from omni.session.voice_activity import EnergyDetector

# Bursts of noise are not explained by the sound of a reply that is no sound: the guard has its own tests.
UNGUARDED = {"echo_guard": False}


def listener(**settings: object) -> TurnTaking:
    return TurnTaking(TurnConfig(**{**UNGUARDED, **settings}), LoudDetector())  # type: ignore[arg-type]


def in_reply(turns: TurnTaking, *parts: tuple[int, bool], sent_ms: int = 20_000) -> list[TurnEvent]:
    """Events of bursts during a reply that began 320 ms earlier."""
    turns.push(bursts((640, False)))
    turns.reply_started()
    turns.reply_sent(torch.zeros(sent_ms * 16), 16000)
    turns.reply_ended()
    return turns.push(bursts((320, False), *parts))


def kinds(events: list[TurnEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


@pytest.mark.parametrize("start_ms", [0, 5, 320, 1001, 1015, 1031])
@pytest.mark.parametrize("length_ms", [100, 640, 3333])
def test_edges_are_found_to_a_frame(start_ms: int, length_ms: int) -> None:
    events = listener().push(bursts((start_ms, False), (length_ms, True), (1000, False)))
    started, stopped = events
    assert isinstance(started, SpeechStarted) and isinstance(stopped, SpeechStopped)
    assert abs(started.speech_ms - start_ms) <= 32
    assert abs(stopped.speech_end_ms - (start_ms + length_ms)) <= 32
    assert started.start_ms == max(0, started.speech_ms - 300)
    assert stopped.is_turn and stopped.reason == "silence"


@pytest.mark.parametrize("silence_ms", [32, 100, 200, 500, 800, 2000])
def test_silence_duration_is_kept_to_a_frame(silence_ms: int) -> None:
    events = listener(silence_duration_ms=silence_ms).push(bursts((500, False), (700, True), (3000, False)))
    stopped = events[-1]
    assert isinstance(stopped, SpeechStopped)
    assert abs(stopped.at_ms - (1200 + silence_ms)) <= 32
    assert stopped.end_ms == stopped.at_ms


def test_a_pause_shorter_than_the_silence_is_part_of_the_turn_and_a_longer_one_is_not() -> None:
    for pause_ms, turns in ((450, 1), (550, 2)):
        events = listener().push(bursts((320, False), (640, True), (pause_ms, False), (640, True), (1000, False)))
        assert kinds(events) == ["SpeechStarted", "SpeechStopped"] * turns


@pytest.mark.parametrize("padding_ms", [0, 100, 300, 1000])
def test_prefix_padding_never_reaches_into_the_turn_before(padding_ms: int) -> None:
    turns = listener(prefix_padding_ms=padding_ms)
    events = turns.push(bursts((320, False), (320, True), (640, False), (320, True), (640, False)))
    first, second = (event for event in events if isinstance(event, SpeechStarted))
    stopped = next(event for event in events if isinstance(event, SpeechStopped))
    assert first.start_ms == max(0, first.speech_ms - padding_ms)
    assert second.start_ms == max(stopped.end_ms, second.speech_ms - padding_ms)


def test_the_sound_of_a_turn_is_at_hand_from_its_padding_to_its_end() -> None:
    turns, sound = listener(), bursts((1000, False), (500, True), (600, False))
    started, stopped = turns.push(sound)
    assert isinstance(started, SpeechStarted) and isinstance(stopped, SpeechStopped)
    heard = turns.audio(started.start_ms, stopped.end_ms)
    assert torch.equal(heard, sound[started.start_ms * 16 : stopped.end_ms * 16])
    assert torch.equal(turns.audio(stopped.end_ms), sound[stopped.end_ms * 16 : turns.position_ms // 32 * 512])


def test_a_click_is_no_turn() -> None:
    assert listener(min_speech_ms=96).push(bursts((640, False), (32, True), (1000, False))) == []


def test_a_turn_that_never_ends_is_cut() -> None:
    events = listener(max_turn_ms=2000).push(bursts((320, False), (5000, True), (1000, False)))
    stops = [event for event in events if isinstance(event, SpeechStopped)]
    starts = [event for event in events if isinstance(event, SpeechStarted)]
    assert [stop.reason for stop in stops] == ["max_length", "max_length", "silence"]
    assert [start.start_ms for start in starts[1:]] == [stop.end_ms for stop in stops[:-1]]  # nothing is lost between


def test_an_hour_of_silence_leaves_times_exact() -> None:
    turns = TurnTaking(detector=LoudDetector())
    for _ in range(20):
        assert turns.push(torch.zeros(16 * 3000)) == []
    turns.state.position += 3_540_000 * 16  # the rest of the hour
    turns.state.stream.received += 3_540_000 * 16
    started = turns.push(bursts((320, False), (320, True)))[0]
    assert isinstance(started, SpeechStarted) and abs(started.speech_ms - 3_600_320) <= 32


def test_speech_over_a_reply_interrupts_it_after_the_least_speech() -> None:
    turns = listener(interrupt_after_ms=320)
    started, interrupt, stopped = in_reply(turns, (960, True), (640, False))
    assert (
        isinstance(started, SpeechStarted) and isinstance(interrupt, Interrupt) and isinstance(stopped, SpeechStopped)
    )
    assert interrupt.at_ms == started.at_ms == 960 + 320
    assert (interrupt.reply, interrupt.played_ms) == (0, 320 + 320)
    assert started.speech_ms == 960 - 16 and stopped.is_turn
    assert turns.played_ms == interrupt.played_ms  # the rest is not played


@pytest.mark.parametrize("mhm_ms", [160, 320, 576])
def test_a_backchannel_does_not_stop_the_reply(mhm_ms: int) -> None:
    turns = listener()
    (event,) = in_reply(turns, (mhm_ms, True), (960, False))
    assert isinstance(event, Backchannel)
    assert abs(event.start_ms - 960) <= 32 and abs(event.end_ms - 960 - mhm_ms) <= 32
    assert not turns.speaking and turns.played_ms == 320 + mhm_ms + 960  # it went on


def test_a_backchannel_that_interrupted_is_taken_back() -> None:
    turns = listener(interrupt_after_ms=192, backchannel_ms=512)
    started, interrupt, stopped, resume = in_reply(turns, (512, True), (960, False))
    assert isinstance(interrupt, Interrupt) and isinstance(stopped, SpeechStopped) and isinstance(resume, ResumeReply)
    assert isinstance(started, SpeechStarted) and not stopped.is_turn
    assert (resume.reason, resume.reply, resume.from_ms) == ("backchannel", interrupt.reply, interrupt.played_ms)
    turns.reply_sent(torch.zeros(16000), 16000)
    turns.push(bursts((320, False)))
    assert turns.played_ms == resume.from_ms + 320  # plays on from there


@pytest.mark.parametrize("open_turn", [True, False])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_transcript_resumes_the_reply(open_turn: bool, text: str) -> None:
    turns = listener()
    events = in_reply(turns, (1600, True), (0 if open_turn else 960, False))
    interrupt = next(event for event in events if isinstance(event, Interrupt))
    events = turns.heard(text)
    if open_turn:
        assert events == []
        stopped, *events = turns.push(bursts((960, False)))
        assert isinstance(stopped, SpeechStopped) and not stopped.is_turn
    (resume,) = events
    assert isinstance(resume, ResumeReply)
    assert (resume.reason, resume.from_ms) == ("nothing_said", interrupt.played_ms)
    assert turns.heard(text) == []  # once


def test_words_make_a_short_interruption_a_turn() -> None:
    turns = listener(interrupt_after_ms=192)
    in_reply(turns, (256, True))
    assert turns.heard("stop") == []
    (stopped,) = turns.push(bursts((960, False)))
    assert isinstance(stopped, SpeechStopped) and stopped.is_turn


def test_a_new_reply_ends_the_chance_to_resume() -> None:
    turns = listener()
    in_reply(turns, (1600, True), (960, False))
    assert turns.reply_started() == 1
    assert turns.heard("") == [] and turns.played_ms == 0


def test_before_its_first_sound_a_reply_is_interrupted_at_once() -> None:
    turns = listener()
    turns.push(bursts((640, False)))
    turns.reply_started()
    started, interrupt, stopped = turns.push(bursts((320, False), (128, True), (960, False)))
    assert (
        isinstance(started, SpeechStarted) and isinstance(interrupt, Interrupt) and isinstance(stopped, SpeechStopped)
    )
    assert interrupt.at_ms == 960 + 64 and interrupt.played_ms == 0
    assert stopped.is_turn  # the user goes on with what was said before, however short


def test_who_may_not_interrupt_is_heard_all_the_same() -> None:
    events = in_reply(listener(interrupt=False), (1280, True), (960, False))
    assert kinds(events) == ["SpeechStarted", "SpeechStopped"]


def test_speech_that_outlasts_the_reply_is_a_turn() -> None:
    turns = listener()
    events = in_reply(turns, (480, True), (960, False), sent_ms=600)  # over 280 ms after the speech began
    assert kinds(events) == ["SpeechStarted", "SpeechStopped"]
    assert turns.played_ms == 0


def test_the_player_knows_better_what_was_played() -> None:
    turns = listener()
    turns.reply_started()
    turns.reply_sent(torch.zeros(24000 * 3), 24000)
    turns.push(bursts((1000, False)))
    assert turns.played_ms == 1000
    turns.reply_played(400)
    turns.push(bursts((100, False)))
    assert turns.played_ms == 500
    turns.reply_played(99_999)  # more than was sent: all of it
    assert turns.played_ms == 3000


def test_sound_that_comes_late_is_played_when_it_comes() -> None:
    turns = listener()
    turns.reply_started()
    turns.reply_sent(torch.zeros(16 * 200), 16000)
    turns.push(bursts((500, False)))
    assert turns.played_ms == 200
    turns.reply_sent(torch.zeros(16 * 200), 16000)
    turns.push(bursts((100, False)))
    assert turns.played_ms == 300


def test_a_second_reply_waits_behind_the_first_and_neither_is_mistaken_for_the_other() -> None:
    for speech_at_ms, reply, played_ms in ((320, 0, 320 + 608), (1600, 1, 1600 + 608 - 1000)):
        turns = listener()
        for number in (0, 1):
            assert turns.reply_started() == number
            turns.reply_sent(torch.zeros(16 * 1000 * (1 + 9 * number)), 16000)
            turns.reply_ended()
        events = turns.push(bursts((speech_at_ms, False), (1280, True)))
        interrupt = next(event for event in events if isinstance(event, Interrupt))
        assert (interrupt.reply, interrupt.played_ms) == (reply, played_ms)


def test_long_silence_after_a_reply_is_reported_once() -> None:
    turns = listener(idle_timeout_ms=5000)
    assert turns.push(bursts((8000, False))) == []  # nobody has replied yet
    turns.reply_started()
    turns.reply_sent(torch.zeros(16 * 1000), 16000)
    turns.reply_ended()
    (event,) = turns.push(bursts((20_000, False)))
    assert isinstance(event, IdleTimeout)
    assert event.since_ms == 9000 and 0 <= event.at_ms - 14_000 <= 32
    turns.reply_started()
    turns.reply_ended()
    assert "IdleTimeout" not in kinds(turns.push(bursts((3200, False), (640, True), (4000, False))))


@pytest.mark.parametrize("eagerness, longest_ms", [("low", 8000), ("medium", 4000), ("high", 2000), ("auto", 4000)])
def test_a_judge_shortens_or_lengthens_the_silence(eagerness: str, longest_ms: int) -> None:
    seen: list[TurnContext] = []

    sound = bursts((320, False), (1280, True), (9000, False))
    for sure, wait_ms in ((1.0, 192), (0.0, longest_ms), (0.5, 192 + (longest_ms - 192) / 4)):
        seen.clear()

        def judge(context: TurnContext, sure: float = sure) -> float:
            seen.append(context)
            return sure

        turns = TurnTaking(TurnConfig(eagerness=eagerness, keep_audio_ms=20_000), LoudDetector(), judge)
        stopped = turns.push(sound)[-1]
        assert isinstance(stopped, SpeechStopped) and stopped.reason == "judge"
        assert abs(stopped.at_ms - 1600 - wait_ms) <= 32
        assert [context.silence_ms for context in seen] == [192 * 2**i for i in range(len(seen))]
        first = seen[0]
        assert torch.equal(first.samples, sound[first.start_ms * 16 : first.at_ms * 16])


def test_a_judge_that_fails_leaves_the_listener_as_it_was() -> None:
    def judge(context: TurnContext) -> float:
        raise OSError("no answer")

    turns = TurnTaking(detector=LoudDetector(), judge=judge)
    turns.push(bursts((320, False), (640, True)))
    before = turns.position_ms
    with pytest.raises(OSError, match="no answer"):
        turns.push(bursts((1000, False)))
    assert turns.position_ms == before and turns.speaking


def test_a_clone_goes_its_own_way() -> None:
    turns = listener()
    in_reply(turns, (320, True))
    other = turns.clone()
    first = turns.push(bursts((960, False)))
    assert kinds(first) == ["Backchannel"]
    assert kinds(other.push(bursts((640, True)))) == ["SpeechStarted", "Interrupt"]
    assert turns.played_ms != other.played_ms


def test_levels_alone_find_bursts_in_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    sound = bursts((1500, False), (800, True), (1500, False), (300, True), (1200, False))
    for noise in (1e-4, 0.01, 0.03):  # the last is 10 dB below
        noisy = sound + torch.randn(len(sound), generator=generator) * noise
        events = TurnTaking(detector=EnergyDetector()).push(noisy)
        assert kinds(events) == ["SpeechStarted", "SpeechStopped"] * 2
        times = [event.speech_ms if isinstance(event, SpeechStarted) else event.speech_end_ms for event in events]
        assert max(abs(found - true) for found, true in zip(times, (1500, 2300, 3800, 4100))) <= 32
