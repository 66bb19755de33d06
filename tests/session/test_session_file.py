"""Saved sessions and forks: nothing that a session goes on with is lost, and files of format 1 are still read."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omni import AudioChunk, OmniEngine, OmniModel, OmniSession, StreamingConfig
from omni.session.entries import Entry, end_of
from omni.session.older_files import from_format_1

PLAIN: dict[str, Any] = {
    "audio_sampling": {"temperature": 0, "repetition_penalty": 1.3},
    "residual_sampling": {"temperature": 0},
    "max_new_tokens": 5,
    "max_frames": 4,
}


def wave(seconds: float, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)


def reply(session: OmniSession, **changes: Any) -> tuple[list[int], torch.Tensor]:
    """All ids after a reply, and its sound."""
    chunks = [event.samples for event in session.respond(**{**PLAIN, **changes}) if isinstance(event, AudioChunk)]
    return session.ids, torch.cat(chunks) if chunks else torch.zeros(0)


def show(session: OmniSession, first: int, last: int, gap_s: float = 0.7, sound_s: float = 0.4) -> None:
    for i in range(first, last):
        session.push_video_frame(picture(i), gap_s * i)
        session.push_audio(wave(sound_s, i))


def as_format(folder: Path, number: int, *, chunked: bool = True) -> None:
    """Rewrite a saved session as an older version of the file had it: one list of what had been read."""
    values, tensors = json.loads((folder / "session.json").read_text()), load_file(folder / "session.safetensors")
    turns = [(f"message.{i}", message) for i, message in enumerate(values.pop("messages"))]
    opened = values.pop("open")
    past: list[Any] = [[ids, 0.0, False, False, False] for ids in [values.pop("beginning")] if ids]
    for name, turn in turns + ([("open", opened)] if opened else []):
        by_user = turn.get("role", "user") == "user"
        past += [[[], 0.0, False, True, True]] if by_user else []
        for i, (ids, user, length, media) in enumerate(turn["entries"]):
            for part in ("offsets", "embeds", "taps"):
                if f"{name}.{i}.{part}" in tensors:
                    tensors[f"past.{len(past)}.{part}"] = tensors.pop(f"{name}.{i}.{part}")
            past.append([ids, length, media, user, False])
    made: dict[str, list[Entry]] = {"thinker": [], "talker": []}
    for i, (ids, length, media, user, _) in enumerate(past):
        entry = Entry(tuple(ids), user, tensors[f"past.{i}.offsets"] if media else None, length=length)
        made["thinker"].append(entry)
        made["talker"] += [entry] if user or tensors["speech.keys"].shape[2] == tensors["text.keys"].shape[2] else []
    del values["make_room"], values["tools"], values["media_bytes"]
    values |= {"format": number, "past": past, "ids": [i for entry in past for i in entry[0]], "owed": []}
    values |= {name: end_of(entries)._asdict() for name, entries in made.items()}
    values |= {"in_user": bool(opened), "queued": [], "text": opened["tail"] if opened else []}
    values |= {"clip": opened and opened["clip"], "video": opened and opened["video"], "keep_media": True}
    if number < 3:
        values["text"] = "".join(values["text"])
        del values["queued"], values["speaker"], values["model"]
    if number == 1:
        _as_first_format(values, chunked)
        tensors = {k: v for k, v in tensors.items() if not k.startswith("past.")}
    (folder / "session.json").write_text(json.dumps(values))
    save_file(tensors, folder / "session.safetensors")


def _as_first_format(values: dict[str, Any], chunked: bool) -> None:
    values.pop("keep_media")
    if values["clip"] is not None:
        values["clip"]["ear"] = values["clip"].pop("front_end")
    if (video := values["video"]) is not None:
        video["ear"], order = video.pop("front_end"), video.pop("order")
        chunk = max(order["video_chunk"], order["sound_chunk"])
        begun = order["video_chunk"] == chunk
        video["turns"] = {"chunk": chunk, "in_sound": False, "begun": begun, "done": order["done"]}
        video["heard"], kind = order["placed"], ""
        if order["piece"] is not None:
            kind = "video" if order["piece"][0] else "audio"
        video["last_kind"] = f"{kind} {order['piece'][1]}" if kind and chunked else kind


@pytest.mark.parametrize("how", ["save", "fork", "fork in an engine"])
def test_media_of_the_past_go_along(model: OmniModel, how: str, tmp_path: Path) -> None:
    """A copy of a session that keeps its media can drop turns and read the rest again, as the session can."""
    with OmniEngine(model, max_sessions=2) as engine:
        make = engine.session if how == "fork in an engine" else lambda **options: OmniSession(model, **options)
        session = make(keep_media=True, use_audio_in_video=True)
        session.push_text("first, soon forgotten")
        reply(session)
        session.push_image(picture(0))
        session.push_audio(wave(0.7, 1))
        reply(session)
        show(session, 0, 5)
        reply(session)
        if how == "save":
            session.save(tmp_path / "kept")
            other = OmniSession.load(tmp_path / "kept", model)
            other.save(tmp_path / "again")
            other = OmniSession.load(tmp_path / "again", model)
        else:
            other = session.fork()
        results = []
        for one in (session, other):
            freed = one.drop_oldest_turns()
            one.push_text("and now?")
            results.append((freed, *reply(one), one.drop_oldest_turns(), *reply(one)))
        for mine, theirs in zip(*results):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("stage", ["between turns", "in a clip", "in a video", "in a video with sound"])
def test_files_of_older_formats_are_read(model: OmniModel, stage: str, number: int, tmp_path: Path) -> None:
    follow, with_sound = StreamingConfig(audio_window_s=1.0), stage == "in a video with sound"
    session = OmniSession(model, streaming=follow, use_audio_in_video=with_sound, keep_media=number > 1)
    session.push_image(picture(0))
    reply(session)
    if stage == "in a clip":
        session.push_audio(wave(1.2, 1), 22050)
    elif stage == "in a video":
        session.push_video_frame(picture(1), 0.0)
        session.push_video_frame(picture(2), 0.5)
        session.push_video_frame(picture(3), 1.5)
    elif stage == "in a video with sound":
        show(session, 0, 5, sound_s=1.0)
        video = session._conversation.open.video
        assert video is not None and video.order.placed > 0 and video.sounds
    session.save(tmp_path)
    as_format(tmp_path, number, chunked=False)
    loaded = OmniSession.load(tmp_path, model)
    for one in (session, loaded):
        if stage == "in a clip":
            one.push_audio(wave(0.4, 2), 22050)
        if stage == "in a video with sound":
            show(one, 5, 8)
        one.push_text("?")
    for mine, theirs in zip(reply(session), reply(loaded)):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    for one in (session, loaded):
        with (
            pytest.raises(ValueError, match="keep_media=True")
            if number == 1 and stage != "between turns"
            else nullcontext()
        ):
            one.drop_oldest_turns()
        one.push_text("more")
    assert reply(session)[0] == reply(loaded)[0]


@pytest.mark.parametrize(
    ("turns", "last_kind", "expected"),
    [  # as sessions of the second family wrote them
        ({"chunk": 0, "in_sound": False, "begun": True, "done": 0}, "", (0, 0, None)),
        ({"chunk": 1, "in_sound": True, "begun": True, "done": 1}, "video 1", (1, 1, [True, 1])),
        ({"chunk": 2, "in_sound": True, "begun": True, "done": 0}, "audio 2", (2, 2, [False, 2])),
        ({"chunk": 2, "in_sound": False, "begun": False, "done": 0}, "audio 1", (1, 2, [False, 1])),
        ({"chunk": 0, "in_sound": False, "begun": True, "done": 0}, "audio", (0, 0, [False, 0])),  # without chunks
    ],
)
def test_where_a_video_of_format_1_stood(turns: dict[str, Any], last_kind: str, expected: tuple[Any, ...]) -> None:
    video = {"turns": turns, "last_kind": last_kind, "heard": 70, "ear": None}
    order = from_format_1({"clip": None, "video": video})["video"]["order"]
    assert (order["video_chunk"], order["sound_chunk"], order["piece"]) == expected
    assert (order["placed"], order["done"]) == (70, turns["done"])
