"""What turn taking does not take: named, with what it takes instead, and nothing changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from turn_sounds import LoudDetector, bursts

from omni.session.turn_events import TurnConfig, TurnContext
from omni.session.turns import TurnTaking

MILLISECONDS = (
    "prefix_padding_ms",
    "silence_duration_ms",
    "min_speech_ms",
    "interrupt_after_ms",
    "backchannel_ms",
    "max_turn_ms",
    "keep_audio_ms",
    "idle_timeout_ms",
)


def listener() -> TurnTaking:
    return TurnTaking(detector=LoudDetector())


@pytest.mark.parametrize("value", [-0.1, 0, 1, 1.5, math.nan, math.inf])
def test_thresholds_outside_0_to_1(value: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must lie between 0 and 1.*0\.5"):
        TurnConfig(threshold=value)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5]])
def test_thresholds_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="threshold must be a number"):
        TurnConfig(threshold=value)


@pytest.mark.parametrize("name", MILLISECONDS)
def test_times_that_are_none(name: str) -> None:
    for value in (-1, -300, 3_600_001):
        with pytest.raises(ValueError, match=rf"{name} must lie in \d+\.\.3600000 ms, got {value}"):
            TurnConfig(**{name: value})  # type: ignore[arg-type]
    wrong: list[Any] = [0.5, "300", True, math.nan]
    if name != "idle_timeout_ms":
        wrong.append(None)
    for value in wrong:
        with pytest.raises(TypeError, match=f"{name} must be a whole number of milliseconds"):
            TurnConfig(**{name: value})  # type: ignore[arg-type]


def test_other_settings() -> None:
    with pytest.raises(ValueError, match="eagerness must be one of low, medium, high, auto, got 'eager'"):
        TurnConfig(eagerness="eager")
    for name in ("interrupt", "echo_guard"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
            TurnConfig(**{name: 1})  # type: ignore[arg-type]


def test_parts_that_are_none() -> None:
    with pytest.raises(TypeError, match="config must be a TurnConfig or None, got dict"):
        TurnTaking({"threshold": 0.5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a detector needs init_state"):
        TurnTaking(detector=len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a judge is called"):
        TurnTaking(detector=LoudDetector(), judge=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0, -16000, 999, 400_000, 16000.5, math.nan, None, "16000", True])
def test_rates(rate: Any) -> None:
    turns = listener()
    turns.reply_started()
    for call in (turns.push, turns.reply_sent):
        with pytest.raises(ValueError, match=r"sample_rate must be a whole number of Hz in 1000\.\.384000"):
            call(torch.zeros(160), rate)


@pytest.mark.parametrize(
    "samples",
    [
        torch.tensor([0.0, math.nan]),
        torch.tensor([math.inf]),
        np.zeros((3, 4, 5), np.float32),
        torch.zeros(2, 2, 2),
        None,
        "sound",
        {"samples": [0.0]},
        np.zeros(10, complex),
    ],
)
def test_samples(samples: Any) -> None:
    turns = listener()
    turns.push(bursts((320, False), (320, True)))
    turns.reply_started()
    before = (turns.position_ms, turns.played_ms, turns.speaking)
    for call in (turns.push, turns.reply_sent):
        with pytest.raises((TypeError, ValueError)):
            call(samples, 16000)
    assert (turns.position_ms, turns.played_ms, turns.speaking) == before
    assert turns.push(bursts((960, False)))  # goes on


@pytest.mark.parametrize(
    "samples", [[0.0] * 160, np.zeros(160, np.int16), torch.zeros(160, dtype=torch.float64), np.zeros((2, 160)), []]
)
def test_what_sessions_take_is_taken(samples: Any) -> None:
    assert listener().push(samples, 16000) == []


def test_replies_out_of_order() -> None:
    turns = listener()
    for call in (lambda: turns.reply_sent([0.0], 16000), lambda: turns.reply_played(0), turns.reply_ended):
        with pytest.raises(ValueError, match=r"there is no reply; call reply_started\(\) first"):
            call()
    turns.reply_cancelled()  # nothing to do
    turns.reply_started()
    with pytest.raises(ValueError, match=r"another reply is being sent; call reply_ended\(\) or reply_cancelled\(\)"):
        turns.reply_started()
    turns.reply_ended()
    with pytest.raises(ValueError, match="there is no reply"):
        turns.reply_sent([0.0], 16000)


@pytest.mark.parametrize("played", [-1, 4_000_000])
def test_reports_of_no_time(played: int) -> None:
    turns = listener()
    turns.reply_started()
    with pytest.raises(ValueError, match="played_ms must lie in"):
        turns.reply_played(played)
    with pytest.raises(TypeError, match="played_ms must be a whole number"):
        turns.reply_played(1.5)  # type: ignore[arg-type]


def test_sound_that_is_not_kept() -> None:
    turns = TurnTaking(TurnConfig(keep_audio_ms=1000), LoudDetector())
    turns.push(bursts((3200, False)))
    for start, end in ((0, 1000), (3000, 3300), (3100, 3000)):
        with pytest.raises(ValueError, match=f"the sound from {start} to {end} ms is not kept, only 2208 to 3200"):
            turns.audio(start, end)
    with pytest.raises(TypeError, match="start_ms must be a whole number"):
        turns.audio(2500.0)  # type: ignore[arg-type]


def test_transcripts_that_are_no_text() -> None:
    with pytest.raises(TypeError, match="a transcript must be a text, got NoneType"):
        listener().heard(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer, error",
    [(None, TypeError), ("0.5", TypeError), (True, TypeError), (math.nan, ValueError), (1.1, ValueError)],
)
def test_a_judge_without_a_probability(answer: Any, error: type[Exception]) -> None:
    def judge(context: TurnContext) -> Any:
        return answer

    turns = TurnTaking(detector=LoudDetector(), judge=judge)
    with pytest.raises(error, match="a judge of turns must give a"):
        turns.push(bursts((320, False), (640, True), (640, False)))
    assert turns.position_ms == 0
