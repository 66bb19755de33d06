"""A session on disk: a folder with `session.json` and `session.safetensors`, written all or nothing.

Tensors keep their dtype, so that on the same device and backend a loaded session goes on bit for bit as the saved one.
No pickles: what is not a tensor is JSON. The file says which model it belongs to, and all in it is checked before use.
Formats 1 and 2 did not name the model, and had nothing queued: it was read before saving. Format 1 had no media of the
past, and other names for what is open.
"""

from __future__ import annotations

import dataclasses
import json
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
from omni.session.conversation import Entry
from omni.session.live_media import SAMPLE_RATE_HZ, AudioFrontEnd, GridStep, OpenClip, OpenVideo
from omni.session.saved_values import (
    SESSION,
    check,
    check_ids,
    check_model,
    model_values,
    require,
    take_tensor,
    weight_marks,
)
from omni.talker.layout import PromptEnd

if TYPE_CHECKING:
    from omni.session.session import OmniSession

FORMAT = 3
_ORDER = ("done", "placed", "video_chunk", "sound_chunk", "piece")  # the rest follows from what waits
_KEPT = ("offsets", "embeds", "taps")  # of media of the past
Tensors = dict[str, Tensor]


def save_session(session: OmniSession, folder: Path) -> None:
    """Write a session that is not responding; see `OmniSession.save`."""
    if session.responding:
        raise ValueError("the session is responding; take all its events before saving it")
    conversation = session._conversation
    tensors: Tensors = {}
    values: dict[str, Any] = {
        "format": FORMAT,
        "model": model_values(session.model),
        "ids": conversation.ids,
        "owed": conversation.pending,
        "queued": conversation.queued,
        "in_user": conversation.in_user,
        "thinker": conversation.thinker._asdict(),
        "talker": conversation.talker._asdict(),
        "past": [_put_entry(f"past.{i}", entry, tensors) for i, entry in enumerate(conversation.past)],
        "keep_media": conversation.keep_media,
        "text": session._text,
        "speaker": session.speaker,
        "streaming": dataclasses.asdict(session.streaming),
        "use_audio_in_video": session.use_audio_in_video,
        "clip": None,
        "video": None,
    }
    tensors["model.weights"] = weight_marks(session.model)
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


class SavedSession:
    """A session's file, read and checked as far as that can be done without its model.

    `options`: those with which the session was made, as far as `OmniSession` takes them. Raises FileNotFoundError, or
    inside `naming` ValueError.
    """

    def __init__(self, folder: Path) -> None:
        recover(folder)
        values, path = read_json(folder / "session.json"), folder / "session.safetensors"
        found = values.get("format")
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise ValueError(f"it is of format {found!r}; this version reads 1 to {FORMAT}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a saved session needs it")
        self.tensors = load_file(path)
        if found == 1:
            values = _from_format_1(values)
        if found < FORMAT:
            values = {"queued": [], "keep_media": False, "speaker": None, **values, "model": None}
            values["text"] = [values["text"]] if values.get("text") else []
        if values.get("video") is not None:
            values["video"] = {"size": None, **values["video"]}
        check(values, SESSION, "session.json")
        self.values = values

    @property
    def options(self) -> dict[str, Any]:
        """The options with which the session was made."""
        streaming = dict(self.values["streaming"])
        streaming["chunk_frames"] = tuple(streaming.get("chunk_frames", ()))
        made = {"streaming": StreamingConfig(**streaming)}
        return made | {name: self.values[name] for name in ("speaker", "use_audio_in_video", "keep_media")}

    def fill(self, session: OmniSession) -> None:
        """Put everything into a new session of the same model."""
        values, tensors = self.values, self.tensors
        conversation, text = session._conversation, session.model.config.thinker.text_config
        if values["model"] is not None:
            require("model.weights" in tensors, "the tensor model.weights is missing")
            check_model(session.model, values["model"], tensors["model.weights"])
        for name in ("ids", "owed"):
            check_ids(values[name], text.vocab_size, name)
        for piece, name in [(one, "queued") for one, _ in values["queued"]] + [(one, "text") for one in values["text"]]:
            check_ids([] if isinstance(piece, str) else piece, text.vocab_size, name)
        conversation.queued = [(piece, by_user) for piece, by_user in values["queued"]]
        conversation.ids, conversation.pending = values["ids"], values["owed"]
        conversation.thinker, conversation.talker = PromptEnd(**values["thinker"]), PromptEnd(**values["talker"])
        conversation.in_user = values["in_user"]
        conversation.past = [_take_entry(f"past.{i}", e, tensors, session) for i, e in enumerate(values["past"])]
        require([i for entry in conversation.past for i in entry.ids] == values["ids"], "past and ids disagree")
        rows = conversation.rows
        limit = text.max_position_embeddings
        require(len(values["ids"]) <= limit, f"it has {len(values['ids'])} ids, the model has positions for {limit}")
        require(
            (rows.speech is None) == ("speech.keys" not in tensors),
            "it was saved with another variant: only one of the two models has a Talker",
        )
        _take_cache("text", rows.text.decoder.cache, tensors, len(values["ids"]), conversation.thinker)
        if rows.speech is not None:
            _take_cache("speech", rows.speech.decoder.cache, tensors, conversation.talker.tokens, conversation.talker)
        rows.mark_seen(0, values["ids"])
        session._text = values["text"]
        if values["clip"] is not None:
            front_end = _take_front_end("clip", session, values["clip"]["front_end"], tensors)
            session._clip = OpenClip(front_end, values["clip"]["begun"])
        if values["video"] is not None:
            session._video = _take_video(session, values["video"], tensors)


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


def _take_entry(name: str, values: list[Any], tensors: Tensors, session: OmniSession) -> Entry:
    ids, length, media, in_user, begins_turn = values
    require(not (begins_turn and ids), f"{name} begins a turn and has ids")
    kept: Tensors = {}
    if media and f"{name}.embeds" in tensors:
        kept["offsets"] = take_tensor(tensors, f"{name}.offsets", 3, len(ids))
        kept |= _take_media(name, tensors, len(ids), session)
    return Entry(ids, length=length, media=media, in_user=in_user, begins_turn=begins_turn, **kept)


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
    tensors[f"{name}.keys"] = cache.keys[:, row, :, :used]
    tensors[f"{name}.values"] = cache.values[:, row, :, :used]


def _take_cache(name: str, cache: KVCache, tensors: Tensors, tokens: int, end: PromptEnd) -> None:
    require(end.tokens == tokens, f"the {name} cache ends after {end.tokens} tokens and has {tokens}")
    layers, _, heads, _, dim = cache.keys.shape
    cache.reserve(tokens)
    for part, own in (("keys", cache.keys), ("values", cache.values)):
        own[:, 0, :, :tokens] = take_tensor(tensors, f"{name}.{part}", layers, heads, tokens, dim).to(own)
    cache.grow(0, tokens)


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
    front_end = session._new_front_end()
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
    video = OpenVideo.open(values["first_s"], front_end, session._rule)
    vision, width = session.processor.vision, session.model.config.thinker.text_config.hidden_size
    side = vision.video_processor.patch_size * vision.merge_size
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
