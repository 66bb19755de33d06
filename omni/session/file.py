"""A session on disk: a folder with `session.json` and `session.safetensors`, written all or nothing.

Tensors keep their dtype, so that on the same device and backend a loaded session goes on bit for bit as the saved one.
No pickles: what is not a tensor is JSON. Format 1 had no media of the past, and other names for what is open.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.checkpoint.atomic import atomic_folder
from omni.config.reading import read_json
from omni.encoders.resample import StreamingResampler
from omni.generation.streaming_config import StreamingConfig
from omni.layers.cache import KVCache
from omni.layers.state import State
from omni.session.conversation import Entry
from omni.session.live_media import SAMPLE_RATE_HZ, AudioFrontEnd, GridStep, OpenClip, OpenVideo
from omni.talker.layout import PromptEnd

if TYPE_CHECKING:
    from omni.session.session import OmniSession

FORMAT = 2
_ORDER = ("done", "placed", "video_chunk", "sound_chunk", "piece")  # the rest follows from what waits
_KEPT = ("offsets", "embeds", "taps")  # of media of the past
Tensors = dict[str, Tensor]


def save_session(session: OmniSession, folder: str | Path) -> None:
    """Write a session that is not responding; see `OmniSession.save`."""
    if session.responding:
        raise ValueError("the session is responding; take all its events before saving it")
    conversation = session._conversation
    conversation.flush()
    tensors: Tensors = {}
    values: dict[str, Any] = {
        "format": FORMAT,
        "ids": conversation.ids,
        "owed": conversation.pending,
        "in_user": conversation.in_user,
        "thinker": conversation.thinker._asdict(),
        "talker": conversation.talker._asdict(),
        "past": [_put_entry(f"past.{i}", entry, tensors) for i, entry in enumerate(conversation.past)],
        "keep_media": conversation.keep_media,
        "text": "".join(session._text),
        "control_tokens": session._control_tokens,
        "speaker": session.speaker,
        "streaming": dataclasses.asdict(session.streaming),
        "use_audio_in_video": session.use_audio_in_video,
        "clip": None,
        "video": None,
    }
    rows, row = conversation.rows, conversation.row
    _put_cache("text", rows.text.decoder.cache, row, tensors)
    if rows.speech is not None:
        _put_cache("speech", rows.speech.decoder.cache, row, tensors)
    if session._clip is not None:
        front_end = _put_front_end("clip", session._clip.front_end, tensors)
        values["clip"] = {"begun": session._clip.begun, "front_end": front_end}
    if session._video is not None:
        values["video"] = _put_video(session._video, tensors)
    with atomic_folder(folder) as target:
        (target / "session.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, target / "session.safetensors")


def load_session(session: OmniSession, folder: str | Path) -> None:
    """Fill a new session of the same model with what `save_session` wrote; see `OmniSession.load`."""
    folder = Path(folder).expanduser()
    values, path = read_json(folder / "session.json"), folder / "session.safetensors"
    if values.get("format") not in (1, FORMAT):
        raise ValueError(f"{folder} holds a session of format {values.get('format')!r}; this version reads {FORMAT}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a saved session needs it")
    try:
        tensors = load_file(path)
        _fill(session, _from_format_1(values) if values["format"] == 1 else values, tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a whole session: {error}; save it again") from error


def _fill(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> None:
    model = session.model
    conversation = session._conversation
    conversation.ids, conversation.pending = list(values["ids"]), list(values["owed"])
    conversation.thinker, conversation.talker = PromptEnd(**values["thinker"]), PromptEnd(**values["talker"])
    conversation.in_user = values["in_user"]
    past = enumerate(values["past"])
    conversation.past = [_take_entry(f"past.{i}", entry, tensors, model.device, model.dtype) for i, entry in past]
    rows = conversation.rows
    if len(values["ids"]) != tensors["text.keys"].shape[2]:
        raise ValueError(
            f"the saved session has {len(values['ids'])} ids for {tensors['text.keys'].shape[2]} cached tokens"
        )
    if (rows.speech is None) != ("speech.keys" not in tensors):
        raise ValueError("the session was saved with another variant: only one of the two models has a Talker")
    _take_cache("text", rows.text.decoder.cache, tensors)
    if rows.speech is not None:
        _take_cache("speech", rows.speech.decoder.cache, tensors)
    rows.text.seen[0, torch.tensor(values["ids"], dtype=torch.int64, device=model.device)] = True
    session._text = [values["text"]] if values["text"] else []
    session._control_tokens = values.get("control_tokens") is True
    if values["clip"] is not None:
        front_end = _take_front_end("clip", session, values["clip"]["front_end"], tensors)
        session._clip = OpenClip(front_end, values["clip"]["begun"])
    if values["video"] is not None:
        session._video = _take_video(session, values["video"], tensors)


def streaming_of(folder: str | Path) -> dict[str, Any]:
    """The options with which the session in a folder was made."""
    values = read_json(Path(folder).expanduser() / "session.json")
    options = dict(values.get("streaming") or {})
    options["chunk_frames"] = tuple(options.get("chunk_frames", ()))
    return {
        "speaker": values.get("speaker"),
        "streaming": StreamingConfig(**options),
        "use_audio_in_video": bool(values.get("use_audio_in_video")),
        "keep_media": bool(values.get("keep_media")),
    }


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a session of format 1, under today's names."""
    clip, video = values["clip"], values["video"]
    if clip is not None:
        clip = {**clip, "front_end": clip["ear"]}
    if video is not None:
        turns, (kind, *chunk) = video["turns"], video["last_kind"].split() or [""]
        order = {
            "done": turns["done"],
            "placed": video["heard"],
            "video_chunk": turns["chunk"] - (not turns["begun"]),  # of the video's last token
            "sound_chunk": turns["chunk"],
            "piece": [kind == "video", int(chunk[0]) if chunk else 0] if kind else None,
        }
        video = {**video, "front_end": video["ear"], "order": order}
    return {**values, "clip": clip, "video": video}


def _put_entry(name: str, entry: Entry, tensors: Tensors) -> tuple[Any, ...]:
    """What the past keeps of media goes to `tensors`, the rest is returned."""
    for part in _KEPT:
        value = getattr(entry, part)
        if value is not None:
            tensors[f"{name}.{part}"] = value.clone()  # parts of a grid step may share memory, which the file must not
    return entry.ids, entry.length, entry.media, entry.in_user, entry.begins_turn


def _take_entry(name: str, values: Sequence[Any], tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Entry:
    ids, length, media, in_user, begins_turn = values
    kept = {part: tensors[f"{name}.{part}"] for part in _KEPT if f"{name}.{part}" in tensors}
    kept = {part: kept[part] if part == "offsets" else kept[part].to(device, dtype) for part in kept}
    return Entry(ids, length=length, media=media, in_user=in_user, begins_turn=begins_turn, **kept)


def _put_cache(name: str, cache: KVCache, row: int, tensors: Tensors) -> None:
    used = cache.lengths[row]
    tensors[f"{name}.keys"] = cache.keys[:, row, :, :used]
    tensors[f"{name}.values"] = cache.values[:, row, :, :used]


def _take_cache(name: str, cache: KVCache, tensors: Tensors) -> None:
    keys, values = tensors[f"{name}.keys"], tensors[f"{name}.values"]
    layers, _, heads, _, dim = cache.keys.shape
    if keys.dim() != 4 or (keys.shape[0], keys.shape[1], keys.shape[3]) != (layers, heads, dim):
        raise ValueError(
            f"the session was saved with another model: its {name} cache is {list(keys.shape)}, this model's "
            f"[{layers}, {heads}, tokens, {dim}]"
        )
    cache.reserve(keys.shape[2])
    cache.keys[:, 0, :, : keys.shape[2]] = keys.to(cache.keys)
    cache.values[:, 0, :, : keys.shape[2]] = values.to(cache.values)
    cache.grow(0, keys.shape[2])


def _put_state(name: str, state: State, tensors: Tensors) -> dict[str, Any]:
    """Tensors of a flat state go to `tensors`, the rest is returned."""
    rest = {}
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, Tensor):
            tensors[f"{name}.{f.name}"] = value
        else:
            rest[f.name] = value
    return rest


def _take_state(name: str, state: State, rest: dict[str, Any], tensors: Tensors) -> None:
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, Tensor):
            setattr(state, f.name, tensors[f"{name}.{f.name}"].to(value))
        else:
            setattr(state, f.name, rest[f.name])


def _put_front_end(name: str, front_end: AudioFrontEnd, tensors: Tensors) -> dict[str, Any]:
    resampler = None
    if front_end.resampler_state is not None:
        resampler = _put_state(f"{name}.resampler", front_end.resampler_state, tensors)
    return {
        "rate_hz": front_end.rate_hz,
        "samples": front_end.samples,
        "mel": _put_state(f"{name}.mel", front_end.mel_state, tensors),
        "encoder": _put_state(f"{name}.encoder", front_end.encoder_state, tensors),
        "resampler": resampler,
    }


def _take_front_end(name: str, session: OmniSession, values: dict[str, Any], tensors: Tensors) -> AudioFrontEnd:
    front_end = session._new_front_end()
    front_end.rate_hz, front_end.samples = values["rate_hz"], values["samples"]
    _take_state(f"{name}.mel", front_end.mel_state, values["mel"], tensors)
    _take_state(f"{name}.encoder", front_end.encoder_state, values["encoder"], tensors)
    if values["resampler"] is not None:
        front_end.resampler = StreamingResampler(front_end.rate_hz, SAMPLE_RATE_HZ)
        front_end.resampler_state = front_end.resampler.init_state()
        _take_state(f"{name}.resampler", front_end.resampler_state, values["resampler"], tensors)
    return front_end


def _put_video(video: OpenVideo, tensors: Tensors) -> dict[str, Any]:
    for i, (_, frame) in enumerate(video.frames):
        tensors[f"video.frame.{i}"] = frame
    for i, step in enumerate(video.steps):
        tensors[f"video.grid.{i}.embeds"] = step.embeds
        if step.taps is not None:
            tensors[f"video.grid.{i}.taps"] = step.taps
    if video.sounds:
        tensors["video.sounds"] = torch.stack(list(video.sounds))
    return {
        "first_s": video.first_s,
        "last_s": video.last_s,
        "tail": video.tail,
        "order": {name: getattr(video.order, name) for name in _ORDER},
        "front_end": None if video.front_end is None else _put_front_end("video", video.front_end, tensors),
        "frames": [time_s for time_s, _ in video.frames],
        "grids": [(step.time_s, step.height, step.width) for step in video.steps],
    }


def _take_video(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> OpenVideo:
    device, dtype, front_end = session.model.device, session.model.dtype, None
    if values["front_end"] is not None:
        front_end = _take_front_end("video", session, values["front_end"], tensors)
    video = OpenVideo.open(values["first_s"], front_end, session._rule)
    video.last_s, video.tail = values["last_s"], values["tail"]
    video.frames = [(time_s, tensors[f"video.frame.{i}"]) for i, time_s in enumerate(values["frames"])]
    order = dict(values["order"])
    piece = order.pop("piece")
    video.order = dataclasses.replace(video.order, **order, piece=None if piece is None else tuple(piece))
    for i, (time_s, height, width) in enumerate(values["grids"]):
        taps = tensors.get(f"video.grid.{i}.taps")
        embeds = tensors[f"video.grid.{i}.embeds"].to(device, dtype)
        video.add_step(GridStep(time_s, embeds, None if taps is None else taps.to(device, dtype), height, width))
    if "video.sounds" in tensors:
        video.add_sound(tensors["video.sounds"].to(device, dtype))
    return video
