"""Manifests: conversations to train on, one a row, in the files and forms that trainers and data sets come in.

Files are those of `omni.training.data.row_sources`, forms those of `omni.training.data.row_forms`. The first form is

    messages            [{"role", "content"}, …]; content is a string or a list of items as `OmniProcessor` takes them;
                        an answer may say with `loss` (or `weight`) whether it is learnt
    images, audios, videos   what the tags <image>, <audio>, <video> of string contents stand for, in order
    speech              how the last answer sounds ("answer.wav"), or one entry for each assistant message, null: silent
    codes               ready codes instead of speech: [[…], …] of K rows, or a .safetensors file; lists as in speech
    speaker             a voice of the model, or one for each assistant message
    rejected            a worse last answer: its text, or {"content", "speech" or "codes"}; also rejected_response
    chosen              the better one, where messages end before it (absent: the last message is it)
    rejected_messages   a worse conversation, or its end, that answers the same prompt
    system, tools, use_audio_in_video   a system prompt, tool schemas, and whether videos are heard
    text                what a recording says, for `transcription`
    category            a group of rows, for evaluation

Paths are relative to the manifest's folder; in a tar file the names of the sample's members come first.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from omni.config.keywords import nearest
from omni.training.data.row_forms import MEDIA, WORSE, Incomplete, NotUnderstood, as_heard, as_messages
from omni.training.data.row_sources import FORMATS, open_rows
from omni.training.data.row_stores import Checksum, Locate, RowStore, parse_json

_ANSWER_KEYS = ("role", "content", "speech", "codes", "speaker")
_SOURCE_KEYS = ("image", "audio", "video", "input_audio", "image_url", "audio_url", "video_url", "url", "path")
_TAG = re.compile("<(image|audio|video)>")


@dataclass(frozen=True)
class Voice:
    """How one answer sounds: `speech` to be encoded or ready `codes` (both None: silent), and whose voice it is."""

    speech: Any = None
    codes: Any = None
    speaker: str | None = None


class Answer(NamedTuple):
    """One of two last answers; without a content only the voice differs."""

    content: Any
    voice: Voice


@dataclass(frozen=True)
class Row:
    """One checked row: messages as `OmniProcessor` takes them, one voice for each assistant message, options.

    learn: whether each assistant message is learnt, None where the run decides; empty: it decides for all.
    number: of the draw that reads it, from 1 (0: none does).
    rejected_messages, rejected_voices: the worse conversation, where more than the last answer's content differs.
    """

    messages: list[dict[str, Any]]
    voices: list[Voice]
    rejected: Answer | None = None
    tools: list[Any] | None = None
    use_audio_in_video: bool | None = None
    name: str = ""
    learn: Sequence[bool | None] = ()
    rejected_messages: list[dict[str, Any]] | None = None
    rejected_voices: list[Voice] = field(default_factory=list)
    number: int = 0

    def worse(self) -> tuple[list[dict[str, Any]], list[Voice]]:
        """Messages and voices of the conversation with the rejected answer. Only for rows that have one."""
        assert self.rejected is not None
        if self.rejected_messages is not None:
            return self.rejected_messages, self.rejected_voices
        messages = [*self.messages[:-1], {"role": "assistant", "content": self.rejected.content}]
        return messages, [*self.voices[:-1], self.rejected.voice]


class Manifest:
    """The rows of a file, of several that a pattern names, or of a dataset (`row_sources`), read when they are asked
    for. Places of rows are kept in memory and nothing else.

    ignore: columns to leave out of every row; read: columns that something else reads, such as filters. contents: a
    number that changes when rows change or change places.

    Raises FileNotFoundError for a missing file, ValueError for another format or a file without rows, ImportError
    where `datasets` is needed and not there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        ignore: Collection[str] = (),
        read: Collection[str] = (),
        open_store: Callable[[str | Path, Checksum], RowStore] = open_rows,
    ) -> None:
        self.path, seen = Path(path), Checksum()
        self.store = open_store(path, seen)
        self.ignore, self.read, self.contents = tuple(ignore), tuple(read), seen.value
        self._warned = False
        if not len(self.store):
            raise ValueError(f"manifest {str(path)!r} holds no rows; it must be one of {FORMATS}")

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        """Where a row is, for messages: its file and the line from 1 ("data.jsonl:17"), or the sample's key."""
        return self.store.name(index)

    def raw(self, index: int) -> dict[str, Any]:
        """A row as it is written. Raises ValueError where it is no JSON object, IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path.name}")
        row = self.store.read(index)
        if not isinstance(row, dict):
            raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")
        return {key: value for key, value in row.items() if value is not None}

    def columns(self, index: int) -> dict[str, Any]:
        """A row's columns as those of the form `messages`. Raises as `__getitem__`, for a column that the row's form
        does not understand `NotUnderstood`."""
        columns, unread = self._read_as(as_messages, index, self.read)
        if unread and not self._warned:
            self._warned = True
            warnings.warn(f"{self.name(index)}: nothing but filters reads {unread}", stacklevel=3)
        return columns

    def heard(self, index: int) -> dict[str, Any]:
        """A row's columns for what hears its recordings and knows no conversation (`as_heard`)."""
        return self._read_as(as_heard, index)

    def _read_as(self, form: Callable[..., Any], index: int, *options: Any) -> Any:
        try:
            return form(self.raw(index), self.ignore, *options)
        except NotUnderstood as error:
            if (
                isinstance(error, Incomplete) and None in self.store.read(index).values()
            ):  # that row alone has no answer
                raise ValueError(str(error)) from error
            raise NotUnderstood(f"{self.name(index)}: {error}") from error

    def __getitem__(self, index: int) -> Row:
        """A checked row. Raises ValueError or TypeError that says what is wrong with it."""
        alone = not set(WORSE).isdisjoint(self.ignore)
        return _row_of(self.columns(index), self.store.locate(index), self.name(index), alone=alone)


def read_row(raw: Mapping[str, Any], locate: Locate, name: str = "") -> Row:
    """Check one row as it is written. `locate` turns a medium's name into what is opened (a whole path, or bytes).

    Raises ValueError or TypeError that says what is wrong; what the messages hold is checked by the processor.
    """
    return _row_of(as_messages({key: value for key, value in raw.items() if value is not None})[0], locate, name)


def _row_of(raw: Mapping[str, Any], locate: Locate, name: str, *, alone: bool = False) -> Row:
    """A row of columns of the form `messages`. alone: a chosen answer needs no rejected one."""
    messages = _read_messages(raw, raw["messages"], locate)
    chosen, rejected = _read_preference(raw, messages, locate, alone=alone)
    own = sum(message["role"] == "assistant" for message in messages)
    voices = _read_voices(raw, own, locate)
    if chosen is not None:
        messages.append({"role": "assistant", "content": chosen.content})
        voices.append(chosen.voice)
    if not voices:
        raise ValueError("messages hold no assistant message, so there is nothing to learn; add one, or chosen")
    if rejected is not None and messages[-1]["role"] != "assistant":
        raise ValueError("rejected needs an answer to compare with: end messages with it, or give chosen")
    if rejected is not None and rejected.content is None:
        rejected = rejected._replace(content=messages[-1]["content"])
    use = raw.get("use_audio_in_video")
    use = {"true": True, "false": False}.get(use.lower(), use) if isinstance(use, str) else use
    if not isinstance(use, (bool, type(None))):
        raise TypeError(f"use_audio_in_video must be true or false, got {use!r}")
    learn = _read_learn(messages)
    if learn and learn[-1] is False and (rejected is not None or "rejected_messages" in raw):
        raise ValueError("the answer that is compared with a rejected one says that it is not learnt; drop its loss")
    row = Row(messages, voices, rejected, _read_tools(raw), use, name, learn)
    return row if "rejected_messages" not in raw else _with_worse(row, raw, locate)


def _read_learn(messages: list[dict[str, Any]]) -> tuple[bool | None, ...]:
    """Whether each answer is learnt, taken out of the messages; empty where none of them says so."""
    learn = tuple(message.pop("loss", None) for message in messages if message["role"] == "assistant")
    return () if set(learn) == {None} else learn


def _with_worse(row: Row, raw: Mapping[str, Any], locate: Locate) -> Row:
    """The row with its rejected conversation, which has to part from the chosen one at an answer."""
    if row.rejected is not None:
        raise ValueError("rejected and rejected_messages mean the same; give one of them")
    worse = _read_messages(raw, raw["rejected_messages"], locate)
    _read_learn(worse)
    pairs = zip(row.messages, worse)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row.messages), len(worse)))
    tails = row.messages[shared:], worse[shared:]
    if any(not tail or tail[0]["role"] != "assistant" or tail[-1]["role"] != "assistant" for tail in tails):
        raise ValueError(
            f"the chosen and the rejected conversation part at message {shared}, which is not an answer of both; they "
            "must share their prompt and end with different answers"
        )
    last, before = worse[-1], sum(message["role"] == "assistant" for message in worse[:shared])
    rejected = Answer(last["content"], Voice())
    if len(worse) == len(row.messages) == shared + 1 and set(last) == {"role", "content"}:
        return replace(row, rejected=rejected)
    answers = sum(message["role"] == "assistant" for message in worse)
    voices = [*row.voices[:before], *[Voice()] * (answers - before)]
    return replace(row, rejected=rejected, rejected_messages=worse, rejected_voices=voices)


def _read_messages(raw: Mapping[str, Any], given: Any, locate: Locate) -> list[dict[str, Any]]:
    """The messages with media in the place of their tags."""
    system = raw.get("system")
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be a string, got {type(system).__name__}")
    queues = {kind: _read_media(raw, kind, locate) for kind in MEDIA}
    tags = dict.fromkeys(MEDIA, 0)

    def take(kind: str) -> Any:
        tags[kind] += 1
        return queues[kind][tags[kind] - 1] if tags[kind] <= len(queues[kind]) else None

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in given:
        messages.append({**message, "content": _read_content(message.get("content"), take, locate)})
    for kind, written in tags.items():
        if written != len(queues[kind]):
            raise ValueError(
                f"the messages hold {written} <{kind}> tag(s) for {len(queues[kind])} entries of {MEDIA[kind]}; they "
                f"must agree (a tag that is meant as text goes into an item {{'type': 'text', 'text': '<{kind}>'}})"
            )
    return messages


def _read_media(raw: Mapping[str, Any], kind: str, locate: Locate) -> list[Any]:
    value = raw.get(MEDIA[kind], [])
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{MEDIA[kind]} must be a list, got {type(value).__name__}")
    return [_find(medium, locate) for medium in value]


def _find(medium: Any, locate: Locate) -> Any:
    """A medium with its path made whole; a stored file of Parquet becomes its bytes."""
    if isinstance(medium, str):
        return locate(medium)
    if isinstance(medium, list) and medium and isinstance(medium[0], (str, Mapping)):
        return [_find(frame, locate) for frame in medium]
    if isinstance(medium, Mapping) and medium.get("bytes") is not None:
        return medium["bytes"]
    if isinstance(medium, Mapping) and isinstance(medium.get("path"), str) and medium.get("array") is None:
        return locate(medium["path"])
    if isinstance(medium, Mapping) and isinstance(medium.get("url"), str):
        return {**medium, "url": locate(medium["url"])}
    return medium


def _read_content(content: Any, take: Callable[[str], Any], locate: Locate) -> Any:
    """A content with media where tags, or items without a source, stood."""
    if isinstance(content, str):
        pieces = _TAG.split(content)  # text, kind, text, …
        if len(pieces) == 1:
            return content
        items = [{"type": kind, kind: take(kind)} if i % 2 else kind for i, kind in enumerate(pieces)]
        return [item for item in items if item != ""]
    if not isinstance(content, (list, tuple)):
        return content  # the processor says what it may be
    items = []
    for item in content:
        if isinstance(item, Mapping):
            kind = item.get("type")
            item = {k: _find(v, locate) if k in _SOURCE_KEYS else v for k, v in item.items() if v is not None}
            if kind in MEDIA and not any(key in item for key in (*_SOURCE_KEYS, "base64")):
                item[kind] = take(kind)
        items.append(item)
    return items


def _read_preference(
    raw: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], locate: Locate, *, alone: bool
) -> tuple[Answer | None, Answer | None]:
    """(chosen, rejected), None where the row has none."""
    if "rejected" in raw and "rejected_response" in raw:
        raise ValueError("rejected and rejected_response mean the same; give one of them")
    worse = raw.get("rejected", raw.get("rejected_response"))
    better = raw.get("chosen")
    if better is None:
        return None, None if worse is None else _read_answer("rejected", worse, locate)
    if worse is None and not alone:
        raise ValueError("chosen is given without rejected; a preference needs both")
    if messages[-1]["role"] == "assistant":
        raise ValueError("messages end with an answer and chosen is given too; leave one of them out")
    chosen = _read_answer("chosen", better, locate)
    if chosen.content is None:
        raise ValueError("chosen has no content; give the answer's text")
    return chosen, None if worse is None else _read_answer("rejected", worse, locate)


def _read_answer(key: str, value: Any, locate: Locate) -> Answer:
    if isinstance(value, str):
        return Answer(value, Voice())
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be a text or an object with 'content', got {_show(value)}")
    answer = {name: item for name, item in value.items() if item is not None}
    for name in answer:
        if name not in _ANSWER_KEYS:
            raise ValueError(f"{key} has the unknown key {name!r}; {nearest(str(name), _ANSWER_KEYS)}")
    if answer.get("role", "assistant") != "assistant":
        raise ValueError(f"{key} must be an answer of the assistant, its role is {answer['role']!r}")
    voice = _read_voices(answer, 1, locate)[0]
    if "content" not in answer and voice.speech is None and voice.codes is None:
        raise ValueError(f"{key} has neither content nor speech")
    return Answer(answer.get("content"), voice)


def _read_voices(raw: Mapping[str, Any], count: int, locate: Locate) -> list[Voice]:
    """One voice for each of `count` assistant messages."""
    speech, codes, speaker = raw.get("speech"), raw.get("codes"), raw.get("speaker")
    sounds = _per_answer("speech", speech, count, (str, bytes, Mapping), single=not isinstance(speech, list))
    ready = _per_answer("codes", codes, count, (str, list), single=isinstance(codes, str) or _is_codes(codes))
    if isinstance(speaker, str):
        speaker = [speaker] * count
    speakers = _per_answer("speaker", speaker, count, (str,), single=False)
    for i, pair in enumerate(zip(sounds, ready)):
        if None not in pair:
            raise ValueError(f"answer {i} has both speech and codes; give one of them")
    ready = [locate(value) if isinstance(value, str) else value for value in ready]
    return [Voice(_find(sound, locate), own, who) for sound, own, who in zip(sounds, ready, speakers)]


def _per_answer(key: str, value: Any, count: int, kinds: tuple[type, ...], *, single: bool) -> list[Any]:
    """A value for each answer; a single one belongs to the last."""
    if value is None:
        return [None] * count
    values = [None] * (count - 1) + [value] if single else value
    for item in values if isinstance(values, list) else [values]:
        if item is not None and not isinstance(item, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{key} must be {names}, or a list of them with null between, got {_show(item)}")
    if not isinstance(values, list) or len(values) != count:
        entries = len(values) if isinstance(values, list) else 1
        raise ValueError(f"{key} holds {entries} entries for {count} assistant message(s); write null where silent")
    return values


def _is_codes(value: Any) -> bool:
    """Whether it is one answer's codes [K][n], not a list with an entry for each answer."""
    rows = isinstance(value, list) and value and all(isinstance(row, list) for row in value)
    return bool(rows) and not any(isinstance(item, list) for row in value for item in row[:1])


def _read_tools(raw: Mapping[str, Any]) -> list[Any] | None:
    tools = raw.get("tools")
    if isinstance(tools, str):  # as ms-swift and LLaMA-Factory write them
        tools = parse_json(tools.encode(), "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise TypeError(f"tools must be a list of schemas, got {type(tools).__name__}")
    return [parse_json(tool.encode(), "a tool") if isinstance(tool, str) else tool for tool in tools or ()] or None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
