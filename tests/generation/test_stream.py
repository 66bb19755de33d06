"""Streaming: the events of a turn are those of `generate`, as they happen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from build import BATCH, GREEDY, PLAIN, chat, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import AudioChunk, OmniModel, OmniSession, StreamingConfig, TextDelta, TurnEnd
from omni.generation.turn import repeats

ROOT = Path(__file__).parents[2]


def collect(events: list[Any], row: int) -> dict[str, Any]:
    mine = [e for e in events if e.row == row]
    assert isinstance(mine[-1], TurnEnd) and sum(isinstance(e, TurnEnd) for e in mine) == 1
    chunks = [e for e in mine if isinstance(e, AudioChunk)]
    at = 0
    for chunk in chunks:
        assert chunk.start_sample == at and chunk.samples.dtype == torch.float32
        at += chunk.samples.numel()
    deltas = [e for e in mine if isinstance(e, TextDelta)]
    return {
        "ids": [i for d in deltas for i in d.token_ids],
        "text": "".join(d.text for d in deltas if not d.reasoning),
        "audio": torch.cat([c.samples for c in chunks]) if chunks else torch.zeros(0),
        "end": mine[-1],
        "events": mine,
    }


@pytest.mark.parametrize("schedule", [(1,), (1, 1, 2, 4, 8), (3,), (100,)])
@pytest.mark.parametrize("ahead", [1, 4])
def test_stream_equals_generate_row_by_row(model: OmniModel, schedule: tuple[int, ...], ahead: int) -> None:
    arguments = {"max_new_tokens": 7, "max_frames": 11, **PLAIN}
    whole = model.generate(model.processor(BATCH), **arguments)
    streaming = StreamingConfig(chunk_frames=schedule, text_ahead=ahead)
    events = list(model.stream(model.processor(BATCH), streaming=streaming, **arguments))
    for row in range(3):
        got = collect(events, row)
        assert got["ids"] == whole.replies[row]
        assert got["text"] == whole.text[row] == got["end"].text
        assert got["end"].reason == whole.reason[row]
        assert got["end"].usage["frames"] == whole.codes[row].shape[1]
        torch.testing.assert_close(got["audio"], whole.audio[row], atol=1e-5, rtol=1e-5)


def test_seeded_stream_equals_seeded_generate(model: OmniModel) -> None:
    arguments: dict[str, Any] = {
        "max_new_tokens": 6,
        "max_frames": 6,
        "seed": 11,
        "text_sampling": {"temperature": 1.3},
    }
    whole = model.generate(model.processor(BATCH), **arguments)
    events = list(model.stream(model.processor(BATCH), **arguments))
    for row in range(3):
        assert collect(events, row)["ids"] == whole.replies[row]
        torch.testing.assert_close(collect(events, row)["audio"], whole.audio[row], atol=1e-5, rtol=1e-5)


def test_the_first_sound_follows_the_first_word(model: OmniModel) -> None:
    events = list(model.stream(model.processor(chat("hi")), max_new_tokens=12, max_frames=20, **PLAIN))
    kinds = [type(e) for e in events]
    assert kinds[0] is TextDelta and kinds.index(AudioChunk) <= 2
    assert len(events[kinds.index(AudioChunk)].samples) == 1920 - 555
    last_text = max(i for i, kind in enumerate(kinds) if kind is TextDelta)
    assert last_text > kinds.index(AudioChunk)  # it still thinks while it speaks


def test_sound_in_the_order_of_the_schedule(model: OmniModel) -> None:
    streaming = StreamingConfig(chunk_frames=(1, 1, 2, 4))
    events = list(
        model.stream(model.processor(chat("hi")), max_new_tokens=4, max_frames=13, streaming=streaming, **PLAIN)
    )
    frames = [(c.samples.numel() + 555 * (c.start_sample == 0)) // 1920 for c in events if isinstance(c, AudioChunk)]
    total = events[-1].usage["frames"]
    assert total > 4 and sum(frames) == total
    assert frames[:3] == [1, 1, 2] and all(n == 4 for n in frames[3:-1]) and frames[-1] <= 4


def test_two_interleaved_streams_equal_two_separate_ones(model: OmniModel) -> None:
    arguments = {"max_new_tokens": 6, "max_frames": 8, **PLAIN}
    separate = [list(model.stream(model.processor(BATCH[i]), **arguments)) for i in range(2)]
    streams = [model.stream(model.processor(BATCH[i]), **arguments) for i in range(2)]
    together: list[list[Any]] = [[], []]
    while any(streams):
        for i, events in enumerate(streams):
            event = next(events, None) if events else None
            if event is None:
                streams[i] = None  # type: ignore[call-overload]
            else:
                together[i].append(event)
    for a, b in zip(separate, together):
        assert collect(a, 0)["ids"] == collect(b, 0)["ids"]
        assert torch.equal(collect(a, 0)["audio"], collect(b, 0)["audio"])


def test_text_only_stream(model: OmniModel) -> None:
    events = list(model.stream(model.processor(BATCH), max_new_tokens=5, return_audio=False))
    assert not any(isinstance(e, AudioChunk) for e in events)
    assert all(collect(events, row)["end"].reason == "max_new_tokens" for row in range(3))


def test_arguments_are_checked_before_the_first_event(model: OmniModel) -> None:
    with pytest.raises(ValueError, match="unknown speaker"):
        model.stream(model.processor(chat("x")), speaker="nobody")


def test_a_stream_may_be_closed_early(model: OmniModel) -> None:
    events = model.stream(model.processor(chat("hi")), max_new_tokens=50, max_frames=50)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert list(events) == []


def test_timing_up_to_the_first_sound_adds_up(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # no other process takes time between two stages
    end = list(model.stream(model.processor(chat("hi")), max_new_tokens=4, max_frames=4))[-1]
    stages = {k: v for k, v in end.timing.items() if k not in ("first_audio", "total", "rtf", "rtf_step")}
    names = {"encoders", "thinker_prefill", "thinker_first_token", "talker_first_code", "residual_codes", "codec"}
    assert names <= stages.keys()
    assert sum(stages.values()) == pytest.approx(end.timing["first_audio"], rel=0.05, abs=2e-3)
    assert end.timing["total"] >= end.timing["first_audio"]


def test_runaway_speech_is_ended(model: OmniModel) -> None:
    talker = model.talker

    def always_the_same(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e4)
        forced[..., 5] = 1e4
        return forced

    hook = talker.codec_head.register_forward_hook(always_the_same)
    try:
        streaming = StreamingConfig(loop_frames=50, silence_s=None)
        end = list(model.stream(model.processor(chat("hi")), max_new_tokens=3, max_frames=400, streaming=streaming))[-1]
        assert end.reason in ("code_loop", "max_new_tokens") and end.usage["frames"] == 50
        codec = model.code2wav.decoder[-1].conv
        kept = codec.weight.clone(), codec.bias.clone()
        with torch.no_grad():
            codec.weight.zero_()
            codec.bias.zero_()
        streaming = StreamingConfig(loop_frames=None, silence_s=1.0, chunk_frames=(4,))
        end = list(model.stream(model.processor(chat("hi")), max_new_tokens=3, max_frames=400, streaming=streaming))[-1]
        assert end.usage["frames"] < 25
    finally:
        hook.remove()
        with torch.no_grad():
            codec.weight.copy_(kept[0])
            codec.bias.copy_(kept[1])


@given(st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=30)
def test_repeats_finds_every_short_period(period: int, seed: int) -> None:
    generator = seeded(seed)
    loop = torch.randint(0, 99, (period,), generator=generator).tolist()
    assert repeats((loop * 100)[:100], 50)
    varied = torch.randperm(100, generator=generator).tolist()
    assert not repeats(varied, 50) and not repeats((loop * 100)[:100], None)


@pytest.mark.parametrize(
    "changes", [{"chunk_frames": ()}, {"chunk_frames": (0,)}, {"text_ahead": 0}, {"silence_s": -1}]
)
def test_impossible_streaming_configs(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        StreamingConfig(**changes)


def test_parts_that_are_not_loaded(model: OmniModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    arguments = {"max_new_tokens": 3, "max_frames": 5, **PLAIN}
    whole = model.generate(model.processor(chat("hi")), **arguments)
    mute = OmniModel.from_pretrained(tmp_path, device="cpu", parts=("thinker", "talker"))
    out = mute.generate(mute.processor(chat("hi")), **arguments)
    assert torch.equal(out.codes[0], whole.codes[0]) and out.audio is None and out.sample_rate is None
    events = list(mute.stream(mute.processor(chat("hi")), **arguments))
    assert not any(isinstance(e, AudioChunk) for e in events) and isinstance(events[-1], TurnEnd)
    codec = OmniModel.from_pretrained(tmp_path, device="cpu", parts=("code2wav",))
    torch.testing.assert_close(codec.code2wav(out.codes[0][None])[0], whole.audio[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="thinker was not loaded"):
        codec.generate(model.processor(chat("hi")))


def test_a_long_greedy_loop_streams_as_it_is_generated(model: OmniModel) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 2, "max_frames": 300, "audio_sampling": GREEDY}
    hook = model.talker.codec_head.register_forward_hook(
        lambda _, __, logits: torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([5]), 1e4)
    )
    try:
        whole = model.generate(model.processor(chat("hi")), residual_sampling=GREEDY, **arguments)
        end = list(model.stream(model.processor(chat("hi")), residual_sampling=GREEDY, **arguments))[-1]
        session = OmniSession(model, streaming=StreamingConfig(silence_s=None))
        session.push_text("hi")
        watched = list(session.respond(residual_sampling=GREEDY, **arguments))[-1]
    finally:
        hook.remove()
    assert whole.codes[0].shape[1] == end.usage["frames"] == 300 and watched.usage["frames"] == 250
