"""Decisions do not depend on how the samples were cut into pieces, and the state stays small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from turn_sounds import LoudDetector, bursts, recording

from omni.session.sample_stream import SampleStream
from omni.session.turn_events import SpeechStarted, TurnConfig, TurnContext, TurnEvent
from omni.session.turns import TurnTaking
from omni.session.voice_activity import EnergyDetector, SileroDetector, VoiceDetector

RATES = (8000, 11025, 16000, 24000, 44100, 48000)
Step = tuple[str, Any]

CONFIG = TurnConfig(
    silence_duration_ms=160, interrupt_after_ms=96, backchannel_ms=160, idle_timeout_ms=320, max_turn_ms=1000
)


def rates() -> st.SearchStrategy[int]:
    return st.sampled_from(RATES)


def sounds() -> st.SearchStrategy[Step]:
    """Some of bursts or of a recording, at any rate."""
    made = st.builds(
        lambda parts, rate, seed: ("push", (bursts(*parts, rate_hz=rate, seed=seed), rate)),
        st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=3),
        rates(),
        st.integers(0, 3),
    )
    recorded = st.builds(
        lambda first, rate: ("push", (recording("question.wav")[first : first + 5000], rate)),
        st.integers(0, 20_000),
        rates(),
    )
    return made | recorded


def steps() -> st.SearchStrategy[list[Step]]:
    """What a microphone and a reply may bring, in any order."""
    others = st.one_of(
        st.just(("start", None)),
        st.builds(lambda ms, rate: ("send", (bursts((ms, True), rate_hz=rate), rate)), st.integers(0, 600), rates()),
        st.tuples(st.just("played"), st.integers(0, 1500)),
        st.sampled_from([("end", None), ("cancel", None), ("heard", ""), ("heard", "yes")]),
    )  # fmt: skip
    return st.lists(sounds() | others, min_size=1, max_size=5)


def act(turns: TurnTaking, step: Step, cut: Callable[[Tensor], Sequence[Tensor]]) -> list[TurnEvent]:
    """One step; a call that is refused changes nothing and is left out."""
    name, value = step
    try:
        if name == "push":
            return [event for piece in cut(value[0]) for event in turns.push(piece, value[1])]
        if name == "start":
            turns.reply_started()
        elif name == "send":
            turns.reply_sent(*value)
        elif name == "played":
            turns.reply_played(value)
        elif name == "end":
            turns.reply_ended()
        elif name == "cancel":
            turns.reply_cancelled()
        else:
            return turns.heard(value)
    except ValueError as error:
        assert "repl" in str(error)
    return []


def sure_of_length(context: TurnContext) -> float:
    """A judge that looks at all it is given."""
    return float(context.samples.abs().mean().clamp(max=1)) if context.silence_ms < 400 else 1.0


@pytest.mark.parametrize("judge", [None, sure_of_length])
@pytest.mark.parametrize("detector", [LoudDetector, EnergyDetector, SileroDetector])
@given(data=st.data())
@settings(max_examples=20)
def test_streamed_equals_at_once(detector: Callable[[], VoiceDetector], judge: Any, data: st.DataObject) -> None:
    plan = data.draw(steps())
    sizes = data.draw(st.lists(st.sampled_from([1, 7, 31, 160, 511, 512, 513, 4000]), min_size=1, max_size=6))

    def cut(samples: Tensor) -> list[Tensor]:
        pieces, place, turn = [], 0, 0
        while place < len(samples):
            # Pieces of one sample are many: a few of them, then longer ones.
            size = sizes[turn % len(sizes)] if turn < 100 else 512
            pieces.append(samples[place : place + size])
            place, turn = place + size, turn + 1
        return pieces

    whole, cut_up = TurnTaking(CONFIG, detector(), judge), TurnTaking(CONFIG, detector(), judge)
    for step in plan:
        expected = act(whole, step, lambda samples: [samples])
        assert act(cut_up, step, cut) == expected
        assert (cut_up.position_ms, cut_up.played_ms) == (whole.position_ms, whole.played_ms)
        assert cut_up.speaking == whole.speaking
    assert torch.equal(cut_up.audio(cut_up.state.oldest // 16), whole.audio(whole.state.oldest // 16))


def test_sample_by_sample() -> None:
    sound = bursts((320, False), (320, True), (320, False))
    for detector in (EnergyDetector(), SileroDetector()):
        whole, cut_up = TurnTaking(CONFIG, detector), TurnTaking(CONFIG, detector)
        expected = whole.push(sound, 16000)
        assert [event for sample in sound.split(1) for event in cut_up.push(sample, 16000)] == expected


@pytest.mark.parametrize("rate_hz", [*RATES, 1000, 44_056, 384_000])
def test_a_stream_of_any_rate_is_the_same_however_cut(rate_hz: int) -> None:
    sound = torch.randn(3000)
    whole, cut_up = SampleStream(), SampleStream()
    expected = whole.push(sound, rate_hz)
    assert torch.equal(torch.cat([cut_up.push(piece, rate_hz) for piece in sound.split(13)]), expected)
    rest = whole.push(sound[:100], 16000)  # the end of the filter, then these
    assert whole.length == len(expected) + len(rest) == -(-3000 * 16000 // rate_hz) + 100


def test_times_are_those_of_the_stream_at_every_rate() -> None:
    for rate_hz in RATES:
        started = TurnTaking(detector=LoudDetector()).push(
            bursts((1000, False), (640, True), rate_hz=rate_hz), rate_hz
        )[0]
        assert isinstance(started, SpeechStarted) and abs(started.speech_ms - 1000) <= 32


def test_the_state_is_bounded() -> None:
    def size(turns: TurnTaking) -> int:
        state = turns.state
        assert state.playback is not None
        tensors = [state.echo.near, state.echo.far, state.loudness.powers, state.loudness.noise, state.playback.powers]
        tensors += [state.playback.waiting, state.rest, state.stream.waiting, *state.frames]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    turns = TurnTaking(TurnConfig(keep_audio_ms=1000), EnergyDetector())
    sizes = []
    for part in range(3):
        for _ in range(3):
            if part or turns.state.playback is None:
                turns.reply_cancelled()
                turns.reply_started()
            turns.reply_sent(torch.randn(16000 * 4) * 0.01, 16000)
            turns.push(bursts((4000, False)))
        sizes.append(size(turns))
    assert sizes[2] <= sizes[0] <= 2_000_000


def test_a_reply_sent_far_ahead_is_kept_as_levels_only() -> None:
    turns = TurnTaking(detector=EnergyDetector())
    turns.reply_started()
    for _ in range(70):
        turns.reply_sent(torch.randn(16000 * 10) * 0.01, 16000)
    assert turns.state.playback is not None
    assert (
        turns.state.playback.powers.untyped_storage().nbytes() <= 40_000 * 16 * 4
    )  # ten parts; here are nearly twelve
    turns.push(bursts((1000, False)))
    assert turns.played_ms == 1000
