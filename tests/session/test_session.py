"""Sessions: whatever is pushed in whatever pieces, the reply is that of a fresh run on the same ids and features."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import build
import numpy as np
import pytest
import torch
from build import noise, speckle

from omni import (
    AudioChunk,
    OmniInputs,
    OmniModel,
    OmniSession,
    StreamingConfig,
    TextDelta,
    TurnEnd,
)
from omni.rope.positions import Audio, AudioVideo, MediaTokens, Video, placeholder_ids
from omni.session.heard import heard_ids

ROOT = Path(__file__).parents[2]
PLAIN = {**build.PLAIN, "max_new_tokens": 6, "max_frames": 8}


def outcome(events: list[Any]) -> dict[str, Any]:
    assert isinstance(events[-1], TurnEnd)
    chunks = [e.samples for e in events if isinstance(e, AudioChunk)]
    return {
        "ids": [i for e in events if isinstance(e, TextDelta) for i in e.token_ids],
        "text": "".join(e.text for e in events if isinstance(e, TextDelta)),
        "audio": torch.cat(chunks) if chunks else torch.zeros(0),
        "end": events[-1],
    }


def check_fresh(
    model: OmniModel, session: OmniSession, got: dict[str, Any], features: dict[str, Any], **arguments: Any
) -> None:
    """The reply equals that of `generate` on the session's prompt ids and the same features."""
    prompt = session.ids[: got["end"].usage["prompt_tokens"]]
    inputs = OmniInputs(input_ids=torch.tensor([prompt]), **features)
    fresh = model.generate(inputs, **{**PLAIN, **arguments})
    assert got["ids"] == fresh.replies[0]
    assert got["end"].usage["frames"] == fresh.codes[0].shape[1]
    torch.testing.assert_close(got["audio"], fresh.audio[0], atol=1e-5, rtol=1e-5)


def wave(seconds: float, seed: int = 0) -> torch.Tensor:
    return noise(int(seconds * 16000), seed)


def picture(seed: int = 0, height: int = 40, width: int = 72) -> np.ndarray:
    return speckle(height, width, seed=seed)


def mel(model: OmniModel, *clips: torch.Tensor) -> dict[str, torch.Tensor]:
    features = [model.processor.log_mel(clip, level="causal") for clip in clips]
    longest = max(f.shape[1] for f in features)
    padded = torch.stack([torch.nn.functional.pad(f, (0, longest - f.shape[1])) for f in features])
    mask = torch.stack([torch.arange(longest) < f.shape[1] for f in features]).long()
    return {"input_features": padded, "feature_attention_mask": mask}


def test_text_turns_equal_fresh_runs_and_the_template(model: OmniModel) -> None:
    session = OmniSession(model, system="be brief")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
    for pieces in (["hel", "lo the", "re"], ["and", " now?"], ["a third"]):
        for piece in pieces:
            session.push_text(piece)
        got = outcome(list(session.respond(**PLAIN)))
        check_fresh(model, session, got, {})
        messages.append({"role": "user", "content": "".join(pieces)})
        prompt = session.ids[: got["end"].usage["prompt_tokens"]]
        if len(messages) == 2:
            assert prompt == model.processor(messages).input_ids[0].tolist()
        assert session.ids[len(prompt) : len(prompt) + len(got["ids"])] == got["ids"]
        assert session.ids[-2:] == [258, 10]


@pytest.mark.parametrize("cut", [1600, 777, 16000])
def test_sound_in_any_pieces(model: OmniModel, cut: int) -> None:
    clip = wave(2.3)
    session = OmniSession(model)
    session.push_text("listen:")
    for piece in clip.split(cut):
        session.push_audio(piece, 16000)
    session.push_text("what was it?")
    got = outcome(list(session.respond(**PLAIN)))
    check_fresh(model, session, got, mel(model, clip))


def test_a_short_audio_window_reads_while_the_user_speaks(model: OmniModel) -> None:
    session = OmniSession(model, streaming=StreamingConfig(audio_window_s=1.0))
    before = len(session.ids)
    for piece in wave(3.5).split(1600):
        session.push_audio(piece)
    assert len(session.ids) - before >= 26  # two windows of one second are in the caches before the clip ends
    outcome(list(session.respond(**PLAIN)))


def test_other_rates_and_two_clips(model: OmniModel) -> None:
    from omni.processing.audio_file import resample

    slow = wave(1.4, 3)[: int(1.4 * 8000)]
    session = OmniSession(model)
    for piece in slow.split(333):
        session.push_audio(piece, 8000)
    session.push_text("then")
    session.push_audio(wave(0.5, 4))
    got = outcome(list(session.respond(**PLAIN)))
    check_fresh(model, session, got, mel(model, resample(slow, 8000, "x"), wave(0.5, 4)))


def test_pictures_and_video_frames(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_image(picture())
    session.push_text("and a clip")
    frames = [picture(i, 32, 32) for i in range(5)]
    times = [10.0, 10.4, 11.0, 11.5, 12.25]
    for frame, time_s in zip(frames, times):
        session.push_video_frame(frame, time_s)
    got = outcome(list(session.respond(**PLAIN)))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "video", "video": frames}]}
    ]
    features = model.processor(messages)
    check_fresh(
        model,
        session,
        got,
        {
            "pixel_values": features.pixel_values,
            "image_grid_thw": features.image_grid_thw,
            "pixel_values_videos": features.pixel_values_videos,
            "video_grid_thw": features.video_grid_thw,
            "video_grid_times": [torch.tensor([0.0, 1.0, 2.25], dtype=torch.float64)],
        },
    )


@pytest.mark.parametrize("order", ["sound first", "frames first", "in time"])
def test_video_with_its_sound_is_interleaved_by_time(model: OmniModel, order: str) -> None:
    clip, frames = wave(2.6, 5), [picture(i, 32, 32) for i in range(6)]
    session = OmniSession(model, use_audio_in_video=True, streaming=StreamingConfig(audio_window_s=1.0))
    jobs = [(i * 0.5, lambda i=i: session.push_video_frame(frames[i], i * 0.5)) for i in range(6)]
    jobs += [(i * 0.2, lambda i=i: session.push_audio(clip[i * 3200 : (i + 1) * 3200])) for i in range(13)]
    head, jobs = jobs[0], jobs[1:]
    if order == "in time":
        jobs.sort(key=lambda job: job[0])
    elif order == "sound first":
        jobs = jobs[5:] + jobs[:5]
    for _, job in (head, *jobs):
        job()
    got = outcome(list(session.respond(**PLAIN)))
    features = model.processor([{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2}]}])
    grid = features.video_grid_thw[0].tolist()
    video = Video((0.0, 1.0, 2.0), grid[1] // 2, grid[2] // 2)
    tokens = MediaTokens(275, 265, 266, 269, 262)
    expected = placeholder_ids(AudioVideo(video, Audio(13 * 2 + 8)), tokens, 13)
    prompt = session.ids[: got["end"].usage["prompt_tokens"]]
    start = prompt.index(269) + 1
    assert prompt[start : start + len(expected)] == expected
    window = model.audio_encoder.config.n_window_infer
    object.__setattr__(model.audio_encoder.config, "n_window_infer", 100)  # the fresh run with the same window
    try:
        check_fresh(
            model,
            session,
            got,
            {
                **mel(model, clip),
                "pixel_values_videos": features.pixel_values_videos,
                "video_grid_thw": features.video_grid_thw,
                "video_grid_times": [torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)],
            },
        )
    finally:
        object.__setattr__(model.audio_encoder.config, "n_window_infer", window)


def test_interrupt_keeps_what_was_heard(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("tell me a long story")
    events = session.respond(**{**PLAIN, "max_new_tokens": 20, "max_frames": 30})
    frames = 0
    for event in events:
        if isinstance(event, AudioChunk):
            frames += 1
        if frames == 3:
            break
    turn = session._turn
    reply, heard = list(turn.text.ids), heard_ids(turn, model.code2wav, 2 * 80)
    kept = session.interrupt(played_ms=2 * 80)
    assert kept.token_ids == heard == reply[: len(heard)] and len(heard) < len(reply)
    assert kept.text == model.processor.decode(kept.token_ids)
    rest = list(events)
    assert [e.reason for e in rest] == ["interrupted"] and isinstance(rest[0], TurnEnd)
    assert session.ids[-2 - len(kept.token_ids) :] == [*kept.token_ids, 258, 10]
    session.push_text("stop, something else")
    got = outcome(list(session.respond(**PLAIN)))
    check_fresh(model, session, got, {})
    assert session._reader.rows.text.decoder.cache.lengths[0] == session._reader.thinker.tokens


def test_interrupt_before_the_first_event_and_after_the_last(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("hi")
    events = session.respond(**PLAIN)
    assert session.interrupt().token_ids == []
    assert [type(e) for e in events] == [TurnEnd]
    session.push_text("again")
    got = outcome(list(session.respond(**PLAIN)))
    check_fresh(model, session, got, {})
    kept = session.interrupt(played_ms=80)  # the sound is still playing
    assert len(kept.token_ids) < len(got["ids"])
    session.push_text("third")
    check_fresh(model, session, outcome(list(session.respond(**PLAIN))), {})
    session.push_text("new input")  # clients cut what was heard after the next input has begun
    assert session.interrupt(played_ms=0).token_ids == []
    check_fresh(model, session, outcome(list(session.respond(**PLAIN))), {})
    with pytest.raises(ValueError, match="no reply to interrupt"):
        OmniSession(model).interrupt()


def test_closing_the_iterator_early_interrupts(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("hi")
    for event in session.respond(**PLAIN):
        if isinstance(event, AudioChunk):
            break
    del event
    import gc

    gc.collect()
    assert not session.responding
    session.push_text("go on")
    check_fresh(model, session, outcome(list(session.respond(**PLAIN))), {})


def test_input_during_a_response_belongs_to_the_next_turn(model: OmniModel) -> None:
    session, twin = OmniSession(model), OmniSession(model)
    replies = []
    for one in (session, twin):
        one.push_text("hi")
        events = one.respond(**PLAIN)
        got = [next(events)]
        if one is session:
            one.push_text("x")
            one.push_audio(wave(0.6))
            with pytest.raises(ValueError, match="responding"):
                one.respond()
        got += list(events)
        if one is twin:
            one.push_text("x")
            one.push_audio(wave(0.6))
        replies.append((outcome(got), outcome(list(one.respond(**PLAIN)))))
    for mine, theirs in zip(*replies):
        assert mine["ids"] == theirs["ids"] and torch.equal(mine["audio"], theirs["audio"])
    check_fresh(model, session, replies[0][1], mel(model, wave(0.6)))


def test_fork_gives_two_continuations_of_one_past(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("one")
    list(session.respond(**PLAIN))
    session.push_audio(wave(1.7, 8))
    other = session.fork()
    session.push_audio(wave(0.6, 9))
    other.push_text("instead of more sound")
    first, second = outcome(list(session.respond(**PLAIN))), outcome(list(other.respond(**PLAIN)))
    check_fresh(model, session, first, mel(model, torch.cat((wave(1.7, 8), wave(0.6, 9)))))
    check_fresh(model, other, second, mel(model, wave(1.7, 8)))


def test_interleaved_sessions_equal_separate_ones(model: OmniModel) -> None:
    def sessions() -> list[OmniSession]:
        made = [OmniSession(model, speaker=name) for name in ("ethan", "aiden")]
        for i, session in enumerate(made):
            session.push_text(f"question {i}")
        return made

    separate = [outcome(list(s.respond(**PLAIN))) for s in sessions()]
    streams = [s.respond(**PLAIN) for s in sessions()]
    together: list[list[Any]] = [[], []]
    open_streams = [0, 1]
    while open_streams:
        for i in list(open_streams):
            event = next(streams[i], None)
            if event is None:
                open_streams.remove(i)
            else:
                together[i].append(event)
    for a, b in zip(separate, map(outcome, together)):
        assert a["ids"] == b["ids"] and torch.equal(a["audio"], b["audio"])


def test_respond_without_input_and_text_only(model: OmniModel) -> None:
    session = OmniSession(model)
    got = outcome(list(session.respond(**PLAIN)))
    check_fresh(model, session, got, {})
    silent = outcome(list(session.respond(**{**PLAIN, "return_audio": False})))
    assert silent["audio"].numel() == 0 and silent["ids"]


def test_async_events(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("hi")

    async def listen() -> list[Any]:
        return [event async for event in session.respond_async(**PLAIN)]

    check_fresh(model, session, outcome(asyncio.run(listen())), {})


@pytest.mark.parametrize(
    ("push", "error", "message"),
    [
        (lambda s: s.push_text(3), TypeError, "string"),
        (lambda s: s.push_audio(torch.tensor([float("nan")])), ValueError, "NaN"),
        (lambda s: s.push_audio(wave(0.1), 3), ValueError, "sample_rate"),
        (lambda s: s.push_image("nowhere.png"), FileNotFoundError, "nowhere.png"),
        (lambda s: s.push_video_frame(picture(), float("nan")), ValueError, "time_s"),
        (lambda s: s.respond(max_tokens=3), TypeError, "max_tokens"),
        (lambda s: s.respond(speaker="nobody"), ValueError, "nobody"),
    ],
)
def test_bad_input_leaves_the_session_as_it_was(model: OmniModel, push: Any, error: type, message: str) -> None:
    session = OmniSession(model)
    session.push_text("hi")
    before = session.ids
    with pytest.raises(error, match=message):
        push(session)
    assert session.ids == before
    check_fresh(model, session, outcome(list(session.respond(**PLAIN))), {})


def test_a_full_session_says_so(model: OmniModel) -> None:
    session = OmniSession(model)
    session.push_text("word " * 8000)
    with pytest.raises(ValueError, match="session is full"):
        session.respond(**PLAIN)


@pytest.mark.parametrize("stage", ["between turns", "in a clip", "in a video", "in text"])
def test_a_saved_session_goes_on_bit_for_bit(model: OmniModel, tmp_path: Path, stage: str) -> None:
    session = OmniSession(model, speaker="aiden", use_audio_in_video=stage == "in a video")
    session.push_text("first")
    list(session.respond(**PLAIN))
    if stage == "in a clip":
        session.push_audio(wave(1.77, 3), 22050)
    elif stage == "in a video":
        session.push_video_frame(picture(1, 32, 32), 0.0)
        session.push_audio(wave(1.2, 4))
        session.push_video_frame(picture(2, 32, 32), 0.5)
        session.push_video_frame(picture(3, 32, 32), 1.0)
    elif stage == "in text":
        session.push_text("half a sen")
    session.save(tmp_path / "kept")
    session.save(tmp_path / "kept")  # over an older one
    loaded = OmniSession.load(tmp_path / "kept", model)
    assert loaded.ids == session.ids
    ends = []
    for one in (session, loaded):
        if stage == "in a clip":
            one.push_audio(wave(0.9, 5), 22050)
        one.push_text("tence")
        ends.append((outcome(list(one.respond(**PLAIN))), outcome(list(one.respond(**PLAIN)))))
    for a, b in zip(*ends):
        assert a["ids"] == b["ids"] and torch.equal(a["audio"], b["audio"])
    assert loaded.ids == session.ids


def test_saved_sessions_that_cannot_be_read(model: OmniModel, tmp_path: Path) -> None:
    session = OmniSession(model)
    session.push_text("x")
    events = session.respond(**PLAIN)
    with pytest.raises(ValueError, match="responding"):
        session.save(tmp_path / "a")
    list(events)
    with pytest.raises(FileNotFoundError, match=r"session\.json does not exist; a saved session"):
        OmniSession.load(tmp_path / "a", model)
    session.save(tmp_path / "a")
    path = tmp_path / "a" / "session.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="whole session"):
        OmniSession.load(tmp_path / "a", model)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"session\.safetensors"):
        OmniSession.load(tmp_path / "a", model)


@pytest.mark.parametrize("media", [False, True])
def test_dropping_the_oldest_turns_equals_never_having_had_them(model: OmniModel, media: bool) -> None:
    def later(session: OmniSession) -> None:
        session.push_text("second")
        if media:
            session.push_image(picture(3))
            session.push_audio(wave(0.7, 2))

    session = OmniSession(model, system="be kind", keep_media=media)
    session.push_text("first, soon forgotten")
    list(session.respond(**PLAIN))
    later(session)
    first = outcome(list(session.respond(**PLAIN)))
    assert session.drop_oldest_turns() > 0
    session.push_text("third")
    got = outcome(list(session.respond(**PLAIN)))
    features: dict[str, Any] = {}
    if media:
        image = model.processor([{"role": "user", "content": [{"type": "image", "image": picture(3)}]}])
        features = {
            **mel(model, wave(0.7, 2)),
            "pixel_values": image.pixel_values,
            "image_grid_thw": image.image_grid_thw,
        }
    check_fresh(model, session, got, features)
    text = model.processor.decode(session.ids)
    assert "be kind" in text and "second" in text and "third" in text and "forgotten" not in text
    assert first["ids"] in [session.ids[i : i + len(first["ids"])] for i in range(len(session.ids))]


def test_turns_that_cannot_be_dropped(model: OmniModel) -> None:
    session = OmniSession(model, keep_media=False)
    session.push_text("one")
    list(session.respond(**PLAIN))
    with pytest.raises(ValueError, match="at most 0"):
        session.drop_oldest_turns()
    session.push_audio(wave(0.5))
    list(session.respond(**PLAIN))
    with pytest.raises(ValueError, match="keep_media=True"):
        session.drop_oldest_turns()
