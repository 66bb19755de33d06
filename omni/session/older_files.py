"""Saved sessions of formats 1 to 3, one list of what had been read, as sessions of today: a list of messages.

Formats 1 and 2 did not name the model, and had nothing queued: it was read before saving. Format 1 had no media of the
past, and other names for what is open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omni.session.items import COMPLETED, new_id
from omni.session.options import MEDIA_BYTES
from omni.session.row_reader import Read, RowReader
from omni.session.saved_values import OLDER, check, check_ids, require
from omni.talker.layout import PromptEnd

if TYPE_CHECKING:
    from omni.session.session import OmniSession

_KINDS = ("audio", "image", "video")
Tensors = dict[str, Tensor]


@dataclass
class _Turn:
    """A turn of the list. entries: as a message has them; names: where the tensors of each lie, "" for none; tail: text
    that waits."""

    by_user: bool
    entries: list[tuple[list[int], bool, float, bool]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tail: list[Any] = field(default_factory=list)

    def add(self, ids: list[int], length: float = 0.0, *, media: bool = False, name: str = "") -> None:
        self.entries.append((ids, self.by_user, length, media))
        self.names.append(name)


class OlderSession:
    """A session of an older format. values: under today's names; the messages follow once the model is known."""

    def __init__(self, older: dict[str, Any]) -> None:
        self.older = older
        names = ("model", "speaker", "streaming", "use_audio_in_video", "keep_media")
        self.values = {name: older[name] for name in names}
        self.values |= {"media_bytes": MEDIA_BYTES, "make_room": None, "tools": None}
        self.values |= {"beginning": [], "messages": [], "open": None}
        self.read = 0  # entries that the caches hold

    def complete(self, session: OmniSession, tensors: Tensors) -> None:
        """Make messages of the list."""
        vocabulary, older = session.model.config.thinker.text_config.vocab_size, self.older
        pieces = [piece for piece, _ in older["queued"]] + older["text"]
        for name, ids in (("ids", older["ids"]), ("owed", older["owed"]), *(("queued", piece) for piece in pieces)):
            check_ids([] if isinstance(ids, str) else ids, vocabulary, name)
        past = [token for entry in older["past"] for token in entry[0]]
        require(past == older["ids"], "past and ids disagree")
        beginning, turns = self._turns(session)
        self.values["beginning"] = beginning
        self.read += bool(beginning)
        is_open = older["in_user"] and bool(turns)
        for number, turn in enumerate(turns[: len(turns) - is_open]):
            self.values["messages"].append(_message(session, turn))
            _move(f"message.{number}", turn, tensors)
        if is_open:
            self.values["open"] = self._open(session, turns[-1])
            _move("open", turns[-1], tensors)

    def _turns(self, session: OmniSession) -> tuple[list[int], list[_Turn]]:
        """What stands before the first turn, and the turns. Each begins with `<|im_start|>`."""
        start, older = session.model.config.im_start_token_id, self.older
        beginning: list[int] = []
        turns: list[_Turn] = []
        begun = False

        def text(ids: list[int], by_user: bool) -> None:
            nonlocal begun
            if not begun:
                beginning.extend(ids)
                return
            for opens, run in groupby(_numbered(ids, start), key=lambda pair: pair[0]):
                own = [token for _, token in run]
                if own[0] == start and (opens or not turns):
                    turns.append(_Turn(by_user))
                turns[-1].add(own)

        past = older["past"]
        for i, (ids, length, media, by_user, begins) in enumerate(past):
            begun = begun or begins
            if media:
                turns[-1].add(ids, media=True, name=f"past.{i}")
            elif ids:
                text(ids, by_user)
            elif not begins:
                turns[-1].add([], length)
        self.read = sum(len(turn.entries) for turn in turns)
        if older["owed"]:
            text(older["owed"], False)
        for piece, by_user in [*older["queued"], *((piece, True) for piece in older["text"])]:
            begun = begun or not piece
            if piece and begun and turns and (isinstance(piece, str) or start not in piece):
                turns[-1].tail.append(piece)
            elif piece:
                text(session.processor.encode_text(piece) if isinstance(piece, str) else piece, by_user)
        return beginning, turns

    def _open(self, session: OmniSession, turn: _Turn) -> dict[str, Any]:
        """The turn that was open."""
        tokens, older = session.processor.tokens, self.older
        mark = tokens.audio_start if older["clip"] is not None else tokens.vision_start
        begun = older["video"] is not None or (older["clip"] is not None and older["clip"]["begun"])
        marks = [i for i, entry in enumerate(turn.entries) if mark in entry[0]]
        start = marks[-1] if begun and marks else len(turn.entries)
        return {
            "id": new_id(),
            "parts": _parts(session, turn, start),
            "entries": turn.entries,
            "tail": turn.tail,
            "before_medium": (start, []),
            "medium_start": start,
            "clip": older["clip"],
            "video": older["video"],
        }

    def check_ends(self, reader: RowReader) -> None:
        """The ends of the prompts are those of the file."""
        for name in ("thinker", "talker"):
            end, saved = getattr(reader, name), PromptEnd(**self.older[name])
            require(end.tokens == saved.tokens, f"the {name} cache ends after {saved.tokens} tokens, not {end.tokens}")
        if reader.done:
            ends = (PromptEnd(**self.older[name]) for name in ("thinker", "talker"))
            reader.done[-1] = Read(reader.done[-1].entry, *ends)


def older_session(values: dict[str, Any], found: int, tensors: Tensors) -> OlderSession:
    """Read a session of format `found`, below 4. Raises ValueError for what is of another kind."""
    if found == 1:
        values = from_format_1(values)
    if found < 3:
        values = {"queued": [], "keep_media": False, "speaker": None, **values, "model": None}
        values["text"] = [values["text"]] if values.get("text") else []
    if values.get("video") is not None:
        values["video"] = {"size": None, **values["video"]}
    check(values, OLDER, "session.json")
    for i, (ids, _, media, _, begins) in enumerate(values["past"]):
        require(not (begins and ids), f"past.{i} begins a turn and has ids")
        if media and f"past.{i}.offsets" not in tensors:
            tensors[f"past.{i}.offsets"] = _offsets(values["past"], i)
    return OlderSession(values)


def _offsets(past: list[Any], place: int) -> Tensor:
    """Positions of media that were not kept: what counts of them is the largest, right before the next segment."""
    length = next((float(entry[1]) for entry in past[place + 1 :] if not entry[0] and not entry[4]), 0.0)
    offsets = torch.zeros(3, len(past[place][0]))
    offsets[:, -1:] = max(0.0, length - 1)
    return offsets


def _numbered(ids: list[int], start: int) -> list[tuple[int, int]]:
    """Each token with the number of `start` tokens up to it."""
    out, count = [], 0
    for token in ids:
        count += token == start
        out.append((count, token))
    return out


def _move(name: str, turn: _Turn, tensors: Tensors) -> None:
    """Give the tensors of a turn's media the names of today."""
    for i, own in enumerate(turn.names):
        for part in ("offsets", "embeds", "taps"):
            if own and f"{own}.{part}" in tensors:
                tensors[f"{name}.{i}.{part}"] = tensors.pop(f"{own}.{part}")


def _message(session: OmniSession, turn: _Turn) -> dict[str, Any]:
    for is_text, run in groupby(turn.tail, key=lambda piece: isinstance(piece, str)):
        for own in [session.processor.encode_text("".join(run))] if is_text else run:
            turn.add(own)
    ids = [token for entry in turn.entries for token in entry[0]]
    config, end = session.model.config, session._closing()
    role = "user" if turn.by_user else "assistant" if config.assistant_token_id in ids[1:2] else "system"
    said = ids[3 : len(ids) - len(end)] if ids[-len(end) :] == end else ids[3:]
    return {
        "id": new_id(),
        "role": role,
        "status": COMPLETED,
        "parts": _parts(session, turn, len(turn.entries)),
        "entries": turn.entries,
        "given": [],
        "times": {"token_ids": said, "ends_ms": [0.0] * len(said)} if role == "assistant" else None,
    }


def _parts(session: OmniSession, turn: _Turn, stop: int) -> list[dict[str, Any]]:
    """Content items: texts, and media with the marks beside them."""
    processor = session.processor
    kinds = {getattr(processor.tokens, kind): kind for kind in _KINDS}
    ends = (processor.audio_end_id, processor.vision_end_id)
    marks = {processor.tokens.audio_start, processor.tokens.vision_start, *ends}

    def is_media(entry: Any) -> bool:
        return entry[3] or not entry[0] or set(entry[0]) <= marks

    parts: list[dict[str, Any]] = []
    place = 0
    for media, run in groupby(turn.entries[:stop], key=is_media):
        own = list(run)
        if media:
            found = [kinds[token] for entry in own if entry[3] for token in entry[0] if token in kinds]
            if found:
                kind = "video" if "video" in found else found[0]
                parts.append({"type": kind, kind: {"kept": kind, "first": place, "count": len(own)}})
        else:
            text = processor.decode([token for entry in own for token in entry[0]])
            if place == 0:
                text = text.partition("\n")[2]
            if text := text.removesuffix("\n") if place + len(own) == len(turn.entries) else text:
                parts.append({"type": "text", "text": text})
        place += len(own)
    return parts


def from_format_1(values: dict[str, Any]) -> dict[str, Any]:
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
