"""A session on disk: a folder with `session.json` and `session.safetensors`, written all or nothing.

Tensors keep their dtype, so that on the same device and backend a loaded session goes on bit for bit as the saved one.
No pickles: what is not a tensor is JSON. The file says which model it belongs to, and all in it is checked before use.
Formats 1 to 3 had no messages: see `omni.session.older_files`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.config.reading import read_json
from omni.config.writing import atomic_folder, recover
from omni.encoders.mel import LogMel, LogMelState
from omni.encoders.resample import StreamingResampler
from omni.generation.streaming_config import StreamingConfig
from omni.layers.cache import KVCache
from omni.layers.state import State
from omni.processing.messages import ROLES
from omni.session.entries import Entry, ids_of
from omni.session.heard import ReplyTimes
from omni.session.items import COMPLETED, INCOMPLETE, KeptMedia, Message
from omni.session.jobs import Steps, at_once
from omni.session.live_media import SAMPLE_RATE_HZ, AudioFrontEnd, GridStep, OpenClip, OpenVideo
from omni.session.older_files import older_session
from omni.session.open_turn import OpenTurn
from omni.session.saved_values import (
    SESSION,
    check,
    check_ids,
    check_message,
    check_model,
    model_values,
    require,
    take_tensor,
    weight_marks,
)

if TYPE_CHECKING:
    from omni.session.session import OmniSession

FORMAT = 4
_ORDER = ("done", "placed", "video_chunk", "sound_chunk", "piece")  # the rest follows from what waits
_KEPT = ("offsets", "embeds", "taps")  # of media of the past
Tensors = dict[str, Tensor]


def save_session(session: OmniSession, folder: Path) -> None:
    """Write a session that is not responding; see `OmniSession.save`."""
    if session.responding:
        raise ValueError("the session is responding; take all its events before saving it")
    conversation, reader = session._conversation, session._reader
    tensors: Tensors = {}
    values: dict[str, Any] = {
        "format": FORMAT,
        "model": model_values(session.model),
        "beginning": ids_of(conversation.beginning),
        "messages": [_put_message(f"message.{i}", m, tensors) for i, m in enumerate(conversation.messages)],
        "open": None if conversation.open is None else _put_turn(conversation.open, tensors),
        "tools": session.tools,
        "speaker": session.speaker,
        "streaming": _put_streaming(session.streaming),
        "use_audio_in_video": session.use_audio_in_video,
        "keep_media": session.keep_media,
        "media_bytes": session.media_bytes,
        "make_room": session.make_room,
    }
    tensors["model.weights"] = weight_marks(session.model)

    def put_caches() -> Steps[None]:
        yield from reader.read(conversation.entries)
        _put_cache("text", reader.rows.text.decoder.cache, reader.row, tensors)
        if reader.rows.speech is not None:
            _put_cache("speech", reader.rows.speech.decoder.cache, reader.row, tensors)

    session._run(put_caches)
    with atomic_folder(folder) as target:
        (target / "session.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, target / "session.safetensors")


def _put_streaming(streaming: StreamingConfig) -> dict[str, Any]:
    """Without a chunk that is not chosen: such a file is one that versions without chunks write and read."""
    values = dataclasses.asdict(streaming)
    return {name: value for name, value in values.items() if name != "audio_chunk_s" or value is not None}


class SavedSession:
    """A session's file, read and checked as far as that can be done without its model.

    `options`: those with which the session was made, as far as `OmniSession` takes them. Raises FileNotFoundError, or
    inside `naming` ValueError.
    """

    def __init__(self, folder: Path) -> None:
        recover(folder)
        path = folder / "session.safetensors"
        for file in (folder / "session.json", path):
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; a saved session needs it")
        values = read_json(folder / "session.json")
        found = values.get("format")
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise ValueError(f"it is of format {found!r}; this version reads 1 to {FORMAT}")
        self.tensors = load_file(path)
        self.older = older_session(values, found, self.tensors) if found < FORMAT else None
        self.values = values if self.older is None else self.older.values
        check(self.values, SESSION, "session.json")

    @property
    def options(self) -> dict[str, Any]:
        """The options with which the session was made."""
        streaming = dict(self.values["streaming"])
        streaming["chunk_frames"] = tuple(streaming.get("chunk_frames", ()))
        names = ("speaker", "tools", "use_audio_in_video", "keep_media", "media_bytes", "make_room")
        return {"streaming": StreamingConfig(**streaming)} | {name: self.values[name] for name in names}

    def fill(self, session: OmniSession) -> None:
        """Put everything into a new session of the same model."""
        values, tensors = self.values, self.tensors
        conversation, reader = session._conversation, session._reader
        if values["model"] is not None:
            require("model.weights" in tensors, "the tensor model.weights is missing")
            check_model(session.model, values["model"], tensors["model.weights"])
        if self.older is not None:
            self.older.complete(session, tensors)
        check_ids(values["beginning"], session.model.config.thinker.text_config.vocab_size, "beginning")
        conversation.beginning = (Entry(tuple(values["beginning"])),) if values["beginning"] else ()
        made = [_take_message(f"message.{i}", m, tensors, session) for i, m in enumerate(values["messages"])]
        conversation.messages = tuple(made)
        require(len({message.id for message in made}) == len(made), "two messages have one id")
        if values["open"] is not None:
            conversation.open = _take_turn(session, values["open"], tensors)
        rows = reader.rows
        require(
            (rows.speech is None) == ("speech.keys" not in tensors),
            "it was saved with another variant: only one of the two models has a Talker",
        )

        def take_caches() -> None:
            reader.hold(conversation.entries[: None if self.older is None else self.older.read])
            if self.older is not None:
                self.older.check_ends(reader)
            _take_cache("text", rows.text.decoder.cache, reader.row, tensors, reader.thinker.tokens)
            if rows.speech is not None:
                _take_cache("speech", rows.speech.decoder.cache, reader.row, tensors, reader.talker.tokens)

        session._run(at_once(take_caches))


def _put_entries(name: str, entries: Sequence[Entry], tensors: Tensors) -> list[Any]:
    """What is kept of media goes to `tensors`, the rest is returned."""
    out = []
    for i, entry in enumerate(entries):
        for part in _KEPT:
            value = getattr(entry, part)
            if value is not None:
                tensors[f"{name}.{i}.{part}"] = value.clone()  # parts of a grid step may share memory
        out.append((list(entry.ids), entry.by_user, float(entry.length), entry.media))
    return out


def _take_entries(name: str, values: list[Any], tensors: Tensors, session: OmniSession) -> list[Entry]:
    vocabulary, out = session.model.config.thinker.text_config.vocab_size, []
    for i, (ids, by_user, length, media) in enumerate(values):
        own = f"{name}.{i}"
        check_ids(ids, vocabulary, own)
        kept: Tensors = {}
        if media:
            kept["offsets"] = take_tensor(tensors, f"{own}.offsets", 3, len(ids))
            if f"{own}.embeds" in tensors:
                kept |= {part: value.cpu() for part, value in _take_media(own, tensors, len(ids), session).items()}
        out.append(Entry(tuple(ids), by_user, length=length, **kept))
    return out


def _put_parts(parts: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Content items for JSON: media by the place of their entries."""

    def put(value: Any) -> Any:
        if not isinstance(value, KeptMedia):
            return value
        first = next(i for i, entry in enumerate(entries) if entry.medium is value.entries[0].medium)
        return {"kept": value.kind, "first": first, "count": len(value.entries)}

    return [{key: put(value) for key, value in part.items()} for part in parts]


def _take_parts(values: list[Any], entries: Sequence[Entry]) -> tuple[dict[str, Any], ...]:
    def take(value: Any) -> Any:
        if not isinstance(value, dict) or "kept" not in value:
            return value
        check(value, {"kept": str, "first": int, "count": int}, "a kept medium")
        first, count = value["first"], value["count"]
        require(first >= 0 and count > 0 and first + count <= len(entries), "a part names entries that are not there")
        return KeptMedia(value["kept"], tuple(entries[first : first + count]))

    parts = [{key: take(value) for key, value in part.items()} for part in values]
    require(all(isinstance(part.get("type"), str) for part in parts), "a part has no type")
    return tuple(parts)


def _put_message(name: str, message: Message, tensors: Tensors) -> dict[str, Any]:
    times = message.times
    return {
        "id": message.id,
        "role": message.role,
        "status": message.status,
        "parts": _put_parts(message.parts, message.entries),
        "entries": _put_entries(name, message.entries, tensors),
        "given": list(message.given),
        "times": None if times is None else dataclasses.asdict(times),
    }


def _take_message(name: str, values: dict[str, Any], tensors: Tensors, session: OmniSession) -> Message:
    entries = _take_entries(name, values["entries"], tensors, session)
    require(values["role"] in ROLES and values["status"] in (COMPLETED, INCOMPLETE), f"{name} is of no known kind")
    times = values["times"]
    if times is not None:
        times = ReplyTimes(times["token_ids"], times["ends_ms"])
        vocabulary = session.model.config.thinker.text_config.vocab_size
        check_ids([*times.token_ids, *values["given"]], vocabulary, f"{name}.times")
        require(bool(entries), f"{name} has no beginning")
        inside = [token for entry in entries for token in entry.ids]
        require(len(times.token_ids) + len(values["given"]) <= len(inside), f"{name}.times has too many ids")
    require((times is None) == (values["role"] != "assistant"), f"{name}.times belong to a reply")
    parts, given = _take_parts(values["parts"], entries), tuple(values["given"])
    check_message(values["id"], values["role"], parts, name)
    return Message(values["id"], values["role"], parts, tuple(entries), values["status"], given, times)


def _put_turn(turn: OpenTurn, tensors: Tensors) -> dict[str, Any]:
    clip, entries = None, turn.writing.entries
    if turn.clip is not None:
        front_end = _put_front_end("clip", turn.clip.front_end, tensors)
        clip = {"begun": turn.clip.begun, "front_end": front_end}
    return {
        "id": turn.id,
        "parts": _put_parts(turn.parts, entries),
        "entries": _put_entries("open", entries, tensors),
        "tail": turn.writing.tail,
        "before_medium": turn.before_medium,
        "medium_start": turn.medium_start,
        "clip": clip,
        "video": None if turn.video is None else _put_video(turn.video, tensors),
    }


def _take_turn(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> OpenTurn:
    turn = OpenTurn(session._encoders, id=values["id"])
    entries = turn.writing.entries = _take_entries("open", values["entries"], tensors, session)
    for piece in [*values["tail"], *values["before_medium"][1]]:
        check_ids([] if isinstance(piece, str) else piece, session.model.config.thinker.text_config.vocab_size, "tail")
    turn.writing.tail, turn.parts = tuple(values["tail"]), _take_parts(values["parts"], entries)
    check_message(turn.id, turn.role, turn.parts, "open")
    before, tail = values["before_medium"]
    require(
        0 <= before <= values["medium_start"] <= len(entries) + len(tail),
        "open.before_medium names entries that are not there",
    )
    turn.before_medium, turn.medium_start = (before, tuple(tail)), values["medium_start"]
    if values["clip"] is not None:
        front_end = _take_front_end("clip", session, values["clip"]["front_end"], tensors)
        turn.clip = OpenClip(front_end, values["clip"]["begun"])
    if values["video"] is not None:
        require(turn.clip is None, "a clip and a video are open at once")
        turn.video = _take_video(session, values["video"], tensors)
    return turn


def _take_media(name: str, tensors: Tensors, tokens: int, session: OmniSession) -> Tensors:
    """Embeddings of so many tokens, and taps if there are any."""
    model, text = session.model, session.model.config.thinker.text_config
    media = {"embeds": take_tensor(tensors, f"{name}.embeds", tokens, text.hidden_size)}
    if f"{name}.taps" in tensors:
        media["taps"] = take_tensor(tensors, f"{name}.taps", None, tokens, text.hidden_size)
        require(len(media["taps"]) <= text.num_hidden_layers, f"{name}.taps are more than the Thinker has layers")
    return {part: value.to(model.device, model.dtype) for part, value in media.items()}


def _put_cache(name: str, cache: KVCache, row: int, tensors: Tensors) -> None:
    used = cache.lengths[row]
    for part, whole in (("keys", cache.keys), ("values", cache.values)):
        tensors[f"{name}.{part}"] = whole[:, row, :, :used].to("cpu", copy=True)  # others may go on meanwhile


def _take_cache(name: str, cache: KVCache, row: int, tensors: Tensors, tokens: int) -> None:
    layers, _, heads, _, dim = cache.keys.shape
    cache.reserve(tokens)
    for part, own in (("keys", cache.keys), ("values", cache.values)):
        own[:, row, :, :tokens] = take_tensor(tensors, f"{name}.{part}", layers, heads, tokens, dim).to(own)
    cache.grow(row, tokens)


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
    """Fill a new state, whose fields say of which kind the saved ones are."""
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, Tensor):
            saved = take_tensor(tensors, f"{name}.{f.name}", *[None] * value.dim())
            setattr(state, f.name, saved.to(value))
        else:
            check(rest.get(f.name), type(value), f"{name}.{f.name}")
            require(rest[f.name] >= 0, f"{name}.{f.name} is {rest[f.name]}, below 0")
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
    front_end = session._encoders.sound()
    front_end.rate_hz, front_end.samples = values["rate_hz"], values["samples"]
    sizes = [tuple(x.shape) for x in vars(front_end.encoder_state).values() if isinstance(x, Tensor) and x.numel()]
    _take_state(f"{name}.mel", front_end.mel_state, values["mel"], tensors)
    _take_state(f"{name}.encoder", front_end.encoder_state, values["encoder"], tensors)
    taken = [tuple(x.shape) for x in vars(front_end.encoder_state).values() if isinstance(x, Tensor)]
    require(not sizes or sizes == taken, f"{name}.encoder is {taken}, this model's {sizes}")
    resampled = values["rate_hz"] != SAMPLE_RATE_HZ
    require(
        resampled == (values["resampler"] is not None), f"{name}.rate_hz is {values['rate_hz']}, its state another's"
    )
    if resampled:
        front_end.resampler = StreamingResampler(front_end.rate_hz, SAMPLE_RATE_HZ)
        front_end.resampler_state = front_end.resampler.init_state()
        _take_state(f"{name}.resampler", front_end.resampler_state, values["resampler"], tensors)
        _check_resampler(name, front_end.resampler, front_end.resampler_state)
    _check_mel(name, front_end.log_mel, front_end.mel_state)
    heard = getattr(front_end.encoder_state, "frames", front_end.mel_state.emitted)
    require(
        heard == front_end.mel_state.emitted and front_end.samples == front_end.mel_state.received,
        f"{name}: resampler, mel and encoder have heard sound of different lengths",
    )
    front_end.clone().finish()  # raises where the encoder cannot go on from its state
    return front_end


def _check_resampler(name: str, resampler: StreamingResampler, state: Any) -> None:
    """Its counts and what it keeps follow from the samples that it has received."""
    emitted = max(0, resampler.num_samples(state.received - resampler.reach))
    kept = resampler.reach - 1 + state.received - emitted * resampler.source // resampler.target
    require(
        (state.emitted, state.past.shape[0]) == (emitted, kept),
        f"{name}.resampler has given {state.emitted} of {emitted} samples and keeps {state.past.shape[0]} of {kept}",
    )


def _check_mel(name: str, mel: LogMel, state: LogMelState) -> None:
    """Its counts and what it keeps follow from the samples that it has received."""
    started = state.received > mel.edge
    samples = state.received + mel.edge * started
    frames = (samples - mel.n_fft) // mel.hop_length + 1 if started and samples >= mel.n_fft else 0
    due = [samples - frames * mel.hop_length, mel.num_mels, frames % mel.chunk_frames, frames // mel.chunk_frames]
    found = [*state.tail.shape, *state.chunk.shape, state.emitted // mel.chunk_frames]
    require(
        found == due and state.emitted % mel.chunk_frames == 0,
        f"{name}.mel keeps {found}, which {state.received} samples do not leave (tail, chunk, chunks given: {due})",
    )


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
        "size": video.size,
        "tail": video.tail,
        "order": {name: getattr(video.order, name) for name in _ORDER},
        "front_end": None if video.front_end is None else _put_front_end("video", video.front_end, tensors),
        "frames": [time_s for time_s, _ in video.frames],
        "grids": [(step.time_s, step.height, step.width) for step in video.steps],
    }


def _take_video(session: OmniSession, values: dict[str, Any], tensors: Tensors) -> OpenVideo:
    front_end = None
    if values["front_end"] is not None:
        front_end = _take_front_end("video", session, values["front_end"], tensors)
    video = OpenVideo.open(values["first_s"], front_end, session.model.config.thinker.position_rule)
    vision, width = session.processor.vision, session.model.config.thinker.text_config.hidden_size
    side = vision.factor
    waiting = len(values["frames"])
    require(waiting < vision.temporal_patch_size, f"{waiting} frames wait for a patch of {vision.temporal_patch_size}")
    for i, time_s in enumerate(values["frames"]):
        picture = take_tensor(tensors, f"video.frame.{i}", 3, None, None, floating=False)
        require(
            picture.shape[1] % side == picture.shape[2] % side == 0, f"a frame of {list(picture.shape)} has no grid"
        )
        video.add_frame(time_s, picture)
    if values["size"] is not None:
        size = (values["size"][0], values["size"][1])
        require(video.size in (None, size), f"frames of {video.size} wait in a video of {size}")
        video.size = size
    video.last_s, video.tail = values["last_s"], values["tail"]
    for i, (time_s, height, width_) in enumerate(values["grids"]):
        require(height > 0 and width_ > 0, f"a grid of {height} x {width_} has no tokens")
        media = _take_media(f"video.grid.{i}", tensors, height * width_, session)
        video.add_step(GridStep(time_s, media["embeds"], media.get("taps"), height, width_))
    order = dict(values["order"])
    piece = order.pop("piece")
    tokens = video.order.steps[0][1] if video.steps else 1
    require(0 <= order["done"] < tokens and order["placed"] >= 0, f"of {tokens} tokens {order['done']} are done")
    video.order = dataclasses.replace(video.order, **order, piece=None if piece is None else (piece[0], piece[1]))
    if "video.sounds" in tensors:
        require(front_end is not None, "its video has sound and hears none")
        sounds = take_tensor(tensors, "video.sounds", None, width)
        video.add_sound(sounds.to(session.model.device, session.model.dtype))
    return video
