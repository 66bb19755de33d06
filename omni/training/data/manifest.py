"""Manifests: conversations to train on, one a row, in JSONL, WebDataset tar or Parquet files.

A row is a JSON object, in the format that ms-swift and LLaMA-Factory read:

    messages            [{"role", "content"}, …]; content is a string or a list of items as `OmniProcessor` takes them
    images, audios, videos   what the tags <image>, <audio>, <video> of string contents stand for, in order
    speech              how the last answer sounds ("answer.wav"), or one entry for each assistant message, null: silent
    codes               ready codes instead of speech: [[…], …] of K rows, or a .safetensors file; lists as in speech
    speaker             a voice of the model, or one for each assistant message
    rejected            a worse last answer: its text, or {"content", "speech" or "codes"}; also rejected_response
    chosen              the better one, where messages end before it (absent: the last message is it)
    system, tools, use_audio_in_video   a system prompt, tool schemas, and whether videos are heard
    category            a group of rows, for evaluation

Paths are relative to the manifest's folder; in a tar file the names of the sample's members come first.
"""

from __future__ import annotations

import json
import re
import tarfile
import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from omni.config.keywords import nearest

MEDIA = {"image": "images", "audio": "audios", "video": "videos"}
_KEYS = (
    "messages", *MEDIA.values(), "speech", "codes", "speaker", "chosen", "rejected", "rejected_response", "system",
    "tools", "use_audio_in_video", "category",
)  # fmt: skip
_ANSWER_KEYS = ("role", "content", "speech", "codes", "speaker")
_CLOSE = 0.8  # how alike an unknown key and a known one are before it counts as misspelt
_SOURCE_KEYS = ("image", "audio", "video", "input_audio", "image_url", "audio_url", "video_url", "url", "path")
_TAG = re.compile("<(image|audio|video)>")
_ADDRESS = re.compile("(data|https?|file):|~", re.IGNORECASE)

Locate = Callable[[str], Any]


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
    """One checked row: messages as `OmniProcessor` takes them, one voice for each assistant message, options."""

    messages: list[dict[str, Any]]
    voices: list[Voice]
    rejected: Answer | None = None
    tools: list[Any] | None = None
    use_audio_in_video: bool | None = None
    name: str = ""


class Manifest:
    """The rows of one file, read when they are asked for.

    `.jsonl` keeps the byte offset of every line in memory and nothing else; `.tar` (uncompressed WebDataset, a row in
    the `.json` member of each sample) keeps the members' places; `.parquet` is read through `datasets`, which keeps a
    copy in its cache.

    Raises FileNotFoundError for a missing file, ValueError for another format or a file without rows, ImportError
    where `datasets` is needed and not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"manifest {str(path)!r} does not exist; check the path")
        suffix = self.path.suffix.lower()
        if suffix not in _STORES:
            raise ValueError(f"manifest {str(path)!r} must be one of {', '.join(_STORES)}, got {suffix!r}")
        self.store = _STORES[suffix](self.path)
        self._warned = False
        if not len(self.store):
            raise ValueError(f"manifest {str(path)!r} holds no rows")

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        """Where a row is, for messages: its file and the line from 1 ("data.jsonl:17"), or the sample's key."""
        return f"{self.path}:{self.store.label(index)}"

    def raw(self, index: int) -> dict[str, Any]:
        """A row as it is written. Raises ValueError where it is no JSON object, IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path.name}")
        row = self.store.read(index)
        if not isinstance(row, dict):
            raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")
        return {key: value for key, value in row.items() if value is not None}

    def __getitem__(self, index: int) -> Row:
        """A checked row. Raises ValueError or TypeError that says what is wrong with it."""
        raw = self.raw(index)
        unknown = [key for key in raw if key not in _KEYS]
        for key in unknown:
            if hint := nearest(key, _KEYS, "", _CLOSE):
                raise ValueError(f"the row has the unknown key {key!r}; {hint}")
        if unknown and not self._warned:
            self._warned = True
            warnings.warn(f"{self.name(index)}: nothing but filters reads {', '.join(unknown)}", stacklevel=2)
        return read_row(raw, self.store.locate(index), self.name(index))


class RowStore(ABC):
    """A file of rows: what is in it, and where the media of a row are."""

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    def label(self, index: int) -> str:
        """The row's place in the file."""
        return str(index)

    @abstractmethod
    def read(self, index: int) -> Any:
        """The row as it is written."""

    def locate(self, index: int) -> Locate:
        """What finds the row's media."""
        return _beside(self.path.parent)


class _Lines(RowStore):
    """JSONL: one row a line; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts, self.lines = path, array("q"), array("q")
        start, number = 0, 1
        with (
            path.open("rb") as file,
            tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=2, leave=False) as bar,
        ):
            for line in file:
                if line.strip():
                    self.starts.append(start)
                    self.lines.append(number)
                start, number = start + len(line), number + 1
                bar.update(len(line))

    def __len__(self) -> int:
        return len(self.starts)

    def label(self, index: int) -> str:
        return str(self.lines[index])

    def read(self, index: int) -> Any:
        with self.path.open("rb") as file:  # opened anew: threads and processes share nothing
            file.seek(self.starts[index])
            line = file.readline()
        return _parse(line)


class _Tar(RowStore):
    """WebDataset: members with one name before the first dot form a sample, whose `.json` member is the row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tqdm(tar, desc=path.name, unit="member", delay=2, leave=False):
                    if member.isfile():
                        folder, _, file = member.name.rpartition("/")
                        key, _, extension = file.partition(".")
                        place = (member.offset_data, member.size)
                        samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension] = place
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read as a tar file ({error}); compressed ones must be unpacked"
            ) from error
        self.keys, self.samples = list(samples), list(samples.values())

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> str:
        return self.keys[index]

    def read(self, index: int) -> Any:
        if "json" not in self.samples[index]:
            raise ValueError(f"the sample has no .json member, only {', '.join(self.samples[index])}")
        return _parse(self._member(index, "json"))

    def locate(self, index: int) -> Locate:
        outside, key = _beside(self.path.parent), self.keys[index]

        def locate(name: str) -> Any:
            extension = name.removeprefix(f"{key}.")
            return self._member(index, extension) if extension in self.samples[index] else outside(name)

        return locate

    def _member(self, index: int, extension: str) -> bytes:
        offset, size = self.samples[index][extension]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class _Parquet(RowStore):
    """Parquet through `datasets`, which maps it into memory; media stay as they are stored."""

    def __init__(self, path: Path) -> None:
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ImportError(
                f"{path.name}: Parquet is read with the package datasets; install it (pip install datasets), or "
                "convert the file to JSONL"
            ) from error
        self.path = path
        self.table: Any = Dataset.from_parquet(str(path)).with_format("arrow")  # decodes nothing

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Any:
        return self.table[index : index + 1].to_pylist()[0]


_STORES: dict[str, Callable[[Path], RowStore]] = {".jsonl": _Lines, ".tar": _Tar, ".parquet": _Parquet}


def _parse(text: bytes, what: str = "the row") -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read as JSON: {error}") from error


def _beside(folder: Path) -> Locate:
    """Makes paths relative to `folder` whole; addresses stay."""

    def locate(name: str) -> str:
        return name if _ADDRESS.match(name) else str(folder / name)

    return locate


def read_row(raw: Mapping[str, Any], locate: Locate, name: str = "") -> Row:
    """Check one row as it is written. `locate` turns a medium's name into what is opened (a whole path, or bytes).

    Raises ValueError or TypeError that says what is wrong; what the messages hold is checked by the processor.
    """
    messages = _read_messages(raw, locate)
    chosen, rejected = _read_preference(raw, messages, locate)
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
    if not isinstance(use, (bool, type(None))):
        raise TypeError(f"use_audio_in_video must be true or false, got {use!r}")
    return Row(messages, voices, rejected, _read_tools(raw), use, name)


def _read_messages(raw: Mapping[str, Any], locate: Locate) -> list[dict[str, Any]]:
    """The messages with media in the place of their tags."""
    given = raw.get("messages")
    if not isinstance(given, list) or not given:
        raise ValueError(f"the row needs messages, a list of {{'role', 'content'}}, got {_show(given)}")
    system = raw.get("system")
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be a string, got {type(system).__name__}")
    queues = {kind: _read_media(raw, kind, locate) for kind in MEDIA}
    tags = dict.fromkeys(MEDIA, 0)

    def take(kind: str) -> Any:
        tags[kind] += 1
        return queues[kind][tags[kind] - 1] if tags[kind] <= len(queues[kind]) else None

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"message {number} must be an object with 'role' and 'content', got {_show(message)}")
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
    raw: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], locate: Locate
) -> tuple[Answer | None, Answer | None]:
    """(chosen, rejected), None where the row has none."""
    if "rejected" in raw and "rejected_response" in raw:
        raise ValueError("rejected and rejected_response mean the same; give one of them")
    worse = raw.get("rejected", raw.get("rejected_response"))
    better = raw.get("chosen")
    if better is None:
        return None, None if worse is None else _read_answer("rejected", worse, locate)
    if worse is None:
        raise ValueError("chosen is given without rejected; a preference needs both")
    if messages[-1]["role"] == "assistant":
        raise ValueError("messages end with an answer and chosen is given too; leave one of them out")
    chosen = _read_answer("chosen", better, locate)
    if chosen.content is None:
        raise ValueError("chosen has no content; give the answer's text")
    return chosen, _read_answer("rejected", worse, locate)


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
        tools = _parse(tools.encode(), "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise TypeError(f"tools must be a list of schemas, got {type(tools).__name__}")
    return tools or None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
