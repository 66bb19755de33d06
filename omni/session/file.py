"""A session on disk: a folder with `session.json` and `session.safetensors`, written all or nothing.

Tensors keep their dtype, so that on the same device and backend a loaded session goes on bit for bit as the saved one.
No pickles: what is not a tensor is JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.checkpoint.atomic import atomic_folder
from omni.config.reading import read_json
from omni.encoders.resample import StreamingResampler
from omni.generation.rows import Rows
from omni.generation.streaming_config import StreamingConfig
from omni.layers.cache import KVCache
from omni.layers.state import State
from omni.session.conversation import Conversation, Entry
from omni.session.live_media import SAMPLE_RATE_HZ, ChunkTurns, Ear, OpenClip, OpenVideo
from omni.talker.layout import PromptEnd

if TYPE_CHECKING:
    from omni.session.session import OmniSession

FORMAT = 1
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
        "past": [(e.ids, e.length, e.media, e.in_user, e.begins_turn) for e in conversation.past],
        "text": "".join(session._text),
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
        values["clip"] = {"begun": session._clip.begun, "ear": _put_ear("clip", session._clip.ear, tensors)}
    if session._video is not None:
        values["video"] = _put_video(session._video, tensors)
    with atomic_folder(folder) as target:
        (target / "session.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, target / "session.safetensors")


def load_session(session: OmniSession, folder: str | Path) -> None:
    """Fill a new session of the same model with what `save_session` wrote; see `OmniSession.load`."""
    folder = Path(folder).expanduser()
    values, path = read_json(folder / "session.json"), folder / "session.safetensors"
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder} holds a session of format {values.get('format')!r}; this version reads {FORMAT}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a saved session needs it")
    try:
        tensors = load_file(path)
        _fill(session, values, tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a whole session: {error}; save it again") from error


def _fill(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> None:
    model = session.model
    session._conversation = conversation = Conversation(
        Rows(model, 1),
        0,
        session.streaming.prefill_tokens,
        list(values["ids"]),
        PromptEnd(**values["thinker"]),
        PromptEnd(**values["talker"]),
        values["in_user"],
        list(values["owed"]),
        past=[Entry(ids, length=n, media=m, in_user=u, begins_turn=b) for ids, n, m, u, b in values["past"]],
    )
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
    if values["clip"] is not None:
        session._clip = OpenClip(_take_ear("clip", session, values["clip"]["ear"], tensors), values["clip"]["begun"])
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
    }


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


def _put_ear(name: str, ear: Ear, tensors: Tensors) -> dict[str, Any]:
    resampler = None
    if ear.resampler_state is not None:
        resampler = _put_state(f"{name}.resampler", ear.resampler_state, tensors)
    return {
        "rate_hz": ear.rate_hz,
        "samples": ear.samples,
        "mel": _put_state(f"{name}.mel", ear.mel_state, tensors),
        "encoder": _put_state(f"{name}.encoder", ear.encoder_state, tensors),
        "resampler": resampler,
    }


def _take_ear(name: str, session: OmniSession, values: dict[str, Any], tensors: Tensors) -> Ear:
    ear = session._new_ear()
    ear.rate_hz, ear.samples = values["rate_hz"], values["samples"]
    _take_state(f"{name}.mel", ear.mel_state, values["mel"], tensors)
    _take_state(f"{name}.encoder", ear.encoder_state, values["encoder"], tensors)
    if values["resampler"] is not None:
        ear.resampler = StreamingResampler(ear.rate_hz, SAMPLE_RATE_HZ)
        ear.resampler_state = ear.resampler.init_state()
        _take_state(f"{name}.resampler", ear.resampler_state, values["resampler"], tensors)
    return ear


def _put_video(video: OpenVideo, tensors: Tensors) -> dict[str, Any]:
    for i, (_, frame) in enumerate(video.frames):
        tensors[f"video.frame.{i}"] = frame
    for i, (_, embeds, taps, _, _) in enumerate(video.grids):
        tensors[f"video.grid.{i}.embeds"] = embeds
        if taps is not None:
            tensors[f"video.grid.{i}.taps"] = taps
    if video.sounds:
        tensors["video.sounds"] = torch.stack(list(video.sounds))
    plain = ("first_s", "last_s", "heard", "last_kind", "tail")
    return {
        **{name: getattr(video, name) for name in plain},
        "turns": vars(video.turns),
        "ear": None if video.ear is None else _put_ear("video", video.ear, tensors),
        "frames": [time_s for time_s, _ in video.frames],
        "grids": [(time_s, height, width) for time_s, _, _, height, width in video.grids],
    }


def _take_video(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> OpenVideo:
    plain: dict[str, Any] = {name: values[name] for name in ("first_s", "last_s", "heard", "last_kind", "tail")}
    plain["turns"] = ChunkTurns(**values["turns"])
    device, dtype = session.model.device, session.model.dtype
    ear = None if values["ear"] is None else _take_ear("video", session, values["ear"], tensors)
    grids: deque[Any] = deque()
    for i, (time_s, height, width) in enumerate(values["grids"]):
        taps = tensors.get(f"video.grid.{i}.taps")
        embeds = tensors[f"video.grid.{i}.embeds"].to(device, dtype)
        grids.append((time_s, embeds, None if taps is None else taps.to(device, dtype), height, width))
    frames = [(time_s, tensors[f"video.frame.{i}"]) for i, time_s in enumerate(values["frames"])]
    sounds = deque(tensors["video.sounds"].to(device, dtype)) if "video.sounds" in tensors else deque()
    return OpenVideo(ear=ear, frames=frames, grids=grids, sounds=sounds, **plain)
