"""The messages of a conversation, as callers see them (`Item`) and as a session keeps them (`Message`)."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni.config.keywords import nearest
from omni.processing.messages import ROLES
from omni.session.entries import Entry
from omni.session.heard import ReplyTimes

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"
STATUSES = (IN_PROGRESS, COMPLETED, INCOMPLETE)


@dataclass(frozen=True, eq=False)
class KeptMedia:
    """Sound, a picture or a video as a session has read it: the value beside a part's type, in place of the medium.

    It may be used in other items, also of other sessions of the same model. `kept` is False once its embeddings are
    gone: then it can stay where it is, but it cannot be read again. kind: audio, image or video.
    """

    kind: str
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def tokens(self) -> int:
        """How many tokens it takes in the prompt, its marks included."""
        return sum(len(entry.ids) for entry in self.entries)

    @property
    def kept(self) -> bool:
        """Whether it can be read again."""
        return all(entry.embeds is not None for entry in self.entries if entry.media)

    @property
    def ended(self) -> bool:
        """Whether it is whole: not a clip or video that is still open."""
        return any(entry.media for entry in self.entries) and bool(self.entries[-1].ids) and not self.entries[-1].media

    def forgotten(self, media: set[object]) -> KeptMedia:
        """The same without the embeddings of these pieces."""
        return KeptMedia(self.kind, forget(self.entries, media))

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.tokens} tokens, {'kept' if self.kept else 'not kept'}>"


@dataclass(frozen=True)
class Item:
    """A message of a conversation.

    id: names it in a session (None: the session gives it one). role: system, user, assistant or tool. parts: content
    items as the processor takes them, such as {"type": "text", "text": …} or {"type": "audio", "audio": …}, where media
    that a session has read are `KeptMedia`; an assistant's also {"type": "tool_call", "id", "name", "arguments"}, a
    tool's {"type": "tool_result", "call_id", "output"}. A string or a single part is taken as a list of one. Of a reply
    that was cut the parts hold what was heard. status: in_progress, completed, or incomplete for a reply that was cut.

    Raises TypeError or ValueError.
    """

    id: str | None = None
    role: str = "user"
    parts: Any = ()
    status: str = COMPLETED
    _message: Message | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.id is not None and (not isinstance(self.id, str) or self.id in ("", "root")):
            raise ValueError(f"an item's id must be a string other than '' and 'root', or None, got {self.id!r}")
        if self.role not in ROLES:
            raise ValueError(f"an item has the unknown role {self.role!r}; {nearest(str(self.role), ROLES)}")
        if self.status not in STATUSES:
            raise ValueError(f"an item has the unknown status {self.status!r}; {nearest(str(self.status), STATUSES)}")
        object.__setattr__(self, "parts", _as_parts(self.parts))

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


def _as_parts(parts: Any) -> tuple[dict[str, Any], ...]:
    """Parts as dicts with a type. Raises TypeError."""
    listed = [parts] if isinstance(parts, (str, Mapping)) else parts
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise TypeError(f"an item's parts must be a text, a dict or a list of them, got {type(parts).__name__}")
    out = []
    for part in listed:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise TypeError(f"a part of an item must be a text or a dict, got {type(part).__name__}")
        kinds = [key for key in ("text", "audio", "image", "video") if key in part]
        out.append({"type": kinds[0], **part} if "type" not in part and len(kinds) == 1 else dict(part))
    return tuple(out)


@dataclass(eq=False)
class Message:
    """A message of a session's conversation, with the entries that a model reads.

    Never changed once it is complete: an edit makes another. given: of a reply, ids of its beginning that were given;
    times: of what follows, which ids were heard when.
    """

    id: str
    role: str
    parts: tuple[dict[str, Any], ...]
    entries: tuple[Entry, ...]
    status: str = COMPLETED
    given: tuple[int, ...] = ()
    times: ReplyTimes | None = None

    @property
    def calls(self) -> list[str]:
        """Ids of the tools that it calls."""
        return [part["id"] for part in self.call_parts]

    @property
    def call_parts(self) -> list[dict[str, Any]]:
        """Its parts that call tools."""
        return [part for part in self.parts if part["type"] == "tool_call"]

    @property
    def item(self) -> Item:
        """What callers see of it."""
        item = Item(self.id, self.role, self.parts, self.status)
        object.__setattr__(item, "_message", self)
        return item

    def named(self, id: str) -> Message:
        """The same under another id."""
        return self if id == self.id else dataclasses.replace(self, id=id)

    def forgotten(self, media: set[object]) -> Message:
        """The same without embeddings of these pieces of media."""
        return dataclasses.replace(self, parts=forget_parts(self.parts, media), entries=forget(self.entries, media))


def forget(entries: Sequence[Entry], media: set[object]) -> tuple[Entry, ...]:
    """Entries without the embeddings of these pieces of media."""
    return tuple(entry.forgotten() if entry.media and entry.medium in media else entry for entry in entries)


def forget_parts(parts: Sequence[dict[str, Any]], media: set[object]) -> tuple[dict[str, Any], ...]:
    """Content items without the embeddings of these pieces of media."""
    return tuple(
        {key: value.forgotten(media) if isinstance(value, KeptMedia) else value for key, value in part.items()}
        for part in parts
    )


def new_id() -> str:
    """A name for an item that nobody can guess."""
    return f"item_{uuid.uuid4().hex}"
