"""The forms that rows come in, as columns: what each is recognised by, and how it becomes a row of messages.

`FORMS` is the table. A form turns its columns into those of the first, `messages`, which `omni.training.data.manifest`
reads. A column that no form of the row understands is an error, unless its name or its kind says that nothing could be
learnt from it (`_HARMLESS`, numbers, empty values); those of `REFUSED` never are harmless.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePath
from typing import Any, NamedTuple

from omni.config.keywords import nearest
from omni.training.data.failures import RunValueError
from omni.training.data.row_stores import Cell, kind_of
from omni.training.data.turns import answer, plain, read_turns

Columns = dict[str, Any]
MEDIA = {"image": "images", "audio": "audios", "video": "videos"}
COMMON = (*MEDIA.values(), "speech", "codes", "speaker", "system", "tools", "use_audio_in_video", "category")
REFUSED = {
    **dict.fromkeys(
        ("label", "labels", "kto_tag"), "no objective learns from single answers that are called good or bad"
    ),
    **dict.fromkeys(("rejected_images", "rejected_audios", "rejected_videos"), "both answers see the same media"),
    **dict.fromkeys(("weight", "loss", "loss_scale", "loss_mask", "margin"), "whole rows count alike"),
    "objects": "boxes are not written into texts",
    "chat_template_kwargs": "templates get the run's options, not a row's",
}
_BEGINS = ("offset", "start", "start_time")
_PARTS = (*_BEGINS, "end", "end_time")
REFUSED |= dict.fromkeys(_PARTS, "recordings are read whole")
_CLOSE = 0.8  # how alike an unknown column and a known one are before it counts as misspelt
_TEXTS = (
    "text", "sentence", "transcript", "transcription", "caption", "normalized_text", "text_normalized",
)  # fmt: skip
_FILES = ("audio_filepath", "audio_path", "audio_file", "image_path", "video_path", "file_name", "path", "file")
_HARMLESS = (
    "id", "*_id", "*_ids", "idx", "*_idx", "index", "*_index", "uid", "uuid", "guid", "key", "__*__", "name", "source",
    "data_source", "source_url", "url", "dataset", "dataset_name", "subset", "split", "domain", "*_domain", "language",
    "*_language", "lang", "locale", "license", "author", "annotator", "date", "timestamp", "created_at", "updated_at",
    "model", "*_model", "generator", "topic", "task", "tags", "type", "difficulty", "md5", "sha*", "hash", "*_hash",
    "gender", "age", "accent", "accents", "dialect", "variant", "segment", "duration", "sample_rate", "sampling_rate",
    "meta", "metadata", "info", "comment", "comments", "note", "notes", "parallel_tool_calls",
)  # fmt: skip


class NotUnderstood(RunValueError):
    """What the rows of a set hold is not what the run can learn from; such a row is never passed over as a bad one."""


class Incomplete(NotUnderstood):
    """A row that a form would read whole if it had one more column; where that one is empty, the row alone is bad."""


class Form(NamedTuple):
    """needs: columns that make a row one of this form; takes: others that it understands; make: the columns as those
    of `messages`."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    make: Callable[[Columns], Columns]


def _messages(row: Columns) -> Columns:
    row["messages"] = messages = read_turns(row["messages"])
    worse = next((key for key in ("rejected", "rejected_response") if key in row), "rejected")
    if isinstance(row.get("chosen"), list) or isinstance(row.get(worse), list):
        prompt = messages if "chosen" in row else messages[:-1]
        return _pair(row, prompt, row.pop("chosen", messages[-1:]), row.pop(worse, None))
    if "rejected_messages" in row:
        given = read_turns(row["rejected_messages"])
        while messages and messages[-1]["role"] in ("assistant", "tool"):
            messages = messages[:-1]
        row["rejected_messages"] = [*messages, *given] if given[0]["role"] == "assistant" else given
    return row


def _query(row: Columns) -> Columns:
    """ms-swift's older rows; media without a tag stand before the first question."""
    turns = [*_history(row), ("user", row.pop("query")), ("assistant", row.pop("response"))]
    row["messages"] = messages = plain(turns)
    for kind, key in MEDIA.items():
        media = row.get(key, [])
        count = len(media) if isinstance(media, list) else 1
        if count and not any(f"<{kind}>" in str(message["content"]) for message in messages):
            messages[0]["content"] = f"<{kind}>" * count + str(messages[0]["content"])
    return row


def _conversations(row: Columns) -> Columns:
    for kind, key in MEDIA.items():
        if kind in row:
            row[key] = row.pop(kind)
    for key in ("chosen", "rejected"):
        if isinstance(row.get(key), Mapping):
            row[key] = {k: v for k, v in read_turns([row[key]])[0].items() if k != "role"}
    return {**row, "messages": read_turns(row.pop("conversations"))}


def _exchanges(row: Columns) -> Columns:
    """ms-swift's {"human", "assistant"}, one object a question and its answer; turns with roles as well."""
    given, turns = row.pop("conversation"), []
    if not isinstance(given, list) or not all(
        isinstance(e, Mapping) and e.keys() == {"human", "assistant"} for e in given
    ):
        return {**row, "messages": read_turns(given)}
    for exchange in given:
        turns += [("user", exchange["human"]), ("assistant", exchange["assistant"])]
    return {**row, "messages": plain(turns)}


def _alpaca(row: Columns) -> Columns:
    parts = plain([("user", row.pop(key)) for key in ("instruction", "input") if row.get(key) not in (None, "")])
    turns = [*_history(row), ("user", "\n".join(part["content"] for part in parts))]
    if "output" in row:
        turns.append(("assistant", row.pop("output")))
    return {**row, "messages": plain(turns)}


def _history(row: Columns) -> list[tuple[str, Any]]:
    pairs = row.pop("history", None) or []
    if not isinstance(pairs, list) or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"history must be a list of [question, answer], got {str(pairs)[:80]}")
    return [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]


def _two_outputs(row: Columns) -> Columns:
    asked = row.pop("input")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("messages"), list):
        raise ValueError(f"input must be an object with 'messages', got {str(asked)[:80]}")
    for key in asked:
        if key not in ("messages", "tools", "parallel_tool_calls"):
            raise NotUnderstood(
                f"input has the unknown key {key!r}; {nearest(key, ('messages', 'tools', 'parallel_tool_calls'))}"
            )
    row |= {key: asked[key] for key in ("tools",) if asked.get(key)}
    prompt = read_turns(asked["messages"])
    return _pair(row, prompt, row.pop("preferred_output"), row.pop("non_preferred_output", None))


def _completion(row: Columns) -> Columns:
    return {**row, "messages": [*_prompt(row), *answer(row.pop("completion"))]}


def _preference(row: Columns) -> Columns:
    return _pair(row, _prompt(row), row.pop("chosen"), row.pop("rejected", None))


def _prompt(row: Columns) -> list[Columns]:
    prompt = row.pop("prompt")
    return read_turns(prompt) if isinstance(prompt, list) else plain([("user", prompt)])


def _pair(row: Columns, prompt: list[Columns], better: Any, worse: Any) -> Columns:
    """Both conversations, whether the answers are texts, messages, or messages with the prompt before them."""
    whole = [answer(value) for value in (better, worse) if value is not None]
    whole = [turns if turns[0]["role"] != "assistant" else [*prompt, *turns] for turns in whole]
    for turns in whole:
        if not all(message in turns for message in prompt):
            raise ValueError("chosen and rejected do not begin with the prompt; leave it out of them")
    return {**row, **dict(zip(("messages", "rejected_messages"), whole))}


def _implicit(row: Columns) -> Columns:
    """Two conversations, or two texts whose common beginning is the prompt."""
    pair = [row.pop("chosen"), row.pop("rejected", None)]
    if all(isinstance(value, str) for value in pair):
        pair = _texts_alike(*pair)
    whole = [read_turns(value) for value in pair if value is not None]
    if any(turns[0]["role"] == "assistant" for turns in whole):
        raise ValueError("chosen and rejected hold no prompt, and the row has none; add one under 'prompt'")
    return {**row, **dict(zip(("messages", "rejected_messages"), whole))}


def _texts_alike(better: str, worse: str) -> list[list[Columns]]:
    if better.lstrip().startswith("Human:"):  # "\n\nHuman: …\n\nAssistant: …", as Anthropic's sets are written
        return [_spoken_to(text) for text in (better, worse)]
    stop = next((i for i, (a, b) in enumerate(zip(better, worse)) if a != b), min(len(better), len(worse)))
    stop = better.rfind(" ", 0, stop) + 1  # answers begin with whole words
    if not better[:stop].strip():
        raise ValueError("chosen and rejected have no beginning in common that could be the prompt; add 'prompt'")
    return [plain([("user", text[:stop].rstrip()), ("assistant", text[stop:])]) for text in (better, worse)]


def _spoken_to(text: str) -> list[Columns]:
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return plain([(roles[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2])])


def _recording(row: Columns) -> Columns:
    """A recording (or picture, or film) and its text: heard without a question, the text is the answer."""
    row = named_plainly(row)
    kind = next(kind for kind in MEDIA if kind in row)
    media = row.pop(kind)
    asked = [{"type": kind, kind: medium} for medium in (media if isinstance(media, list) else [media])]
    said = [{"type": "text", "text": row.pop("text")}]
    return {**row, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def named_plainly(row: Mapping[str, Any]) -> Columns:
    """The columns with a recording under its kind and its text under "text", as `_FILES` and `_TEXTS` name them too."""
    row = dict(row)
    texts = [key for key in _TEXTS if isinstance(row.get(key), str)]
    if len({row[key] for key in texts}) > 1:
        raise NotUnderstood(f"{' and '.join(texts)} both say what the text is; list one in data.ignore_columns")
    if texts:
        said = [row.pop(key) for key in texts]
        row["text"] = said[0]
    for kind, key in MEDIA.items():
        if key in row and kind not in row and "messages" not in row:
            row[kind] = row.pop(key)
    files = [key for key in _FILES if isinstance(row.get(key), str) and kind_of(PurePath(row[key]).suffix)]
    if files and not any(kind in row for kind in MEDIA):
        row[str(kind_of(PurePath(row[files[0]]).suffix))] = row[files[0]]
    return {key: value for key, value in row.items() if key not in files}


FORMS = (
    Form(
        "messages",
        ("messages",),
        (*COMMON, "text", "chosen", "rejected", "rejected_response", "rejected_messages"),
        _messages,
    ),
    Form("query", ("query", "response"), (*COMMON, "history", "rejected_response"), _query),
    Form("conversations", ("conversations",), (*COMMON, *MEDIA, "chosen", "rejected"), _conversations),
    Form("conversation", ("conversation",), COMMON, _exchanges),
    Form("instruction", ("instruction", "output"), (*COMMON, "input", "history"), _alpaca),
    Form("instruction pair", ("instruction", "chosen", "rejected"), (*COMMON, "input", "history"), _alpaca),
    Form("two outputs", ("input", "preferred_output", "non_preferred_output"), COMMON, _two_outputs),
    Form("prompt and completion", ("prompt", "completion"), COMMON, _completion),
    Form("prompt pair", ("prompt", "chosen", "rejected"), COMMON, _preference),
    Form("pair", ("chosen", "rejected"), COMMON, _implicit),
    Form("recording", ("audio", "text"), (*COMMON, *MEDIA), _recording),
)
WORSE = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
_OR_TEXT = ("input", "prompt", "completion", "chosen", "rejected")
_NESTED = (
    *_OR_TEXT, "messages", "conversations", "conversation", "history", "rejected_messages", "preferred_output",
    "non_preferred_output", *MEDIA.values(), *MEDIA,
)  # fmt: skip


def as_messages(
    raw: Mapping[str, Any], ignore: Collection[str] = (), read: Collection[str] = ()
) -> tuple[Columns, str]:
    """A row's columns as those of the form `messages`, and the columns, with commas between, that nothing reads.

    ignore: columns to leave out; read: columns that something else reads. Raises ValueError for a row of no form, and
    `NotUnderstood` for a column that the row's form does not understand.
    """
    row = {key: _nested(key, value) for key, value in raw.items() if key not in ignore}
    form = form_of(row, ignore)
    known = {*form.needs, *form.takes, *read}
    if form.name == "recording":
        row = named_plainly(row)
    unknown = [key for key in row if key not in known]
    for key in unknown:
        _check_unknown(key, row[key], form)
    rest = {key: row.pop(key) for key in unknown}
    return form.make(row), ", ".join(rest)


def as_heard(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> Columns:
    """A row's columns for what hears recordings and knows no conversation: those of a recording under plain names
    ("audio", "text"), those of conversations as messages. Raises as `as_messages`."""
    row = {key: value for key, value in raw.items() if key not in ignore}
    if "messages" not in row and any(not set(row).isdisjoint(form.needs) for form in FORMS[1:-1]):
        return as_messages(row)[0]
    for key in _PARTS:
        if row.get(key) and _is_part(key, row[key]):
            raise NotUnderstood(f"the row has the column {key!r}, but {REFUSED[key]}; cut the recording, or list it in "
                                "data.ignore_columns")  # fmt: skip
    return row if "messages" in row else named_plainly(row)


def form_of(row: Mapping[str, Any], ignore: Collection[str] = ()) -> Form:
    """The form that a row's columns make. Raises ValueError where they make none, or two."""
    spare = set(ignore) & set(WORSE)  # a pair without its worse answer is still one of its form
    found = [form for form in FORMS[:-1] if all(key in row or key in spare for key in form.needs)]
    found = [
        form
        for form in found
        if not any(other is not form and set(form.needs) <= {*other.needs, *other.takes} for other in found)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(f"{form.name!r} ({', '.join(form.needs)})" for form in found)
        raise NotUnderstood(f"the row is of the forms {both} at once; list the columns of one in data.ignore_columns")
    plainly = named_plainly(row)
    if any(kind in plainly for kind in MEDIA) and "text" in plainly:
        return FORMS[-1]
    begun = max(FORMS, key=lambda form: sum(key in row for key in form.needs) / len(form.needs))
    missing = [key for key in begun.needs if key not in row]
    if len(missing) == len(begun.needs) and not MEDIA.keys().isdisjoint(plainly):
        begun, missing, row = FORMS[-1], ["text"], plainly
    texts = [key for key, value in row.items() if not _is_harmless(key, value)]
    if not texts:
        raise ValueError(f"the row needs messages, a list of {{'role', 'content'}}, got {str(dict(row))[:80]}")
    every = {key for form in FORMS for key in form.needs}
    strange = [key for key in texts if key not in {*every, *begun.takes}]
    near = [f"{key!r}: {hint}" for key in strange if (hint := nearest(key, every, "", 0.6))]
    told = [f"the form {begun.name!r} also needs {' and '.join(missing)}"] if len(missing) < len(begun.needs) else []
    raise (Incomplete if told and not strange else NotUnderstood)(
        f"the columns {', '.join(texts)} are of no known form; {', '.join((*told, *near)) or 'rename them'} "
        f"(forms: {'; '.join(', '.join(form.needs) for form in FORMS)})"
    )


def _check_unknown(key: str, value: Any, form: Form) -> None:
    """Pass over a column that changes nothing; NotUnderstood for any other."""
    end = f"; the row is of the form {form.name!r}. List the column in data.ignore_columns if nothing depends on it"
    if value in ("", [], {}) or not _is_part(key, value):
        return
    if key in REFUSED:
        raise NotUnderstood(f"the row has the column {key!r}, but {REFUSED[key]}{end}")
    hint = _misspelt(key, form.name)
    if _named_harmless(key) or (_is_harmless(key, value) and not (hint and _is_number(value))):
        return
    hint = hint or nearest(key, {known for other in FORMS for known in other.needs}, "no form knows it", 0.6)
    raise NotUnderstood(f"the row has the unknown key {key!r}; {hint}{end}")


def _is_part(key: str, value: Any) -> bool:
    """Whether a column may say something: a part of a recording that begins at 0 says nothing."""
    return not (key in _BEGINS and _is_number(value) and float(value) == 0)


def _is_harmless(key: str, value: Any) -> bool:
    """Whether nothing could be learnt from a column: by its name, or since it is a number or empty."""
    if key in REFUSED:
        return False
    return _named_harmless(key) or _is_number(value) or value in ("", [], {})


@lru_cache(1000)
def _named_harmless(key: str) -> bool:
    return any(fnmatchcase(key.lower(), pattern) for pattern in _HARMLESS)


@lru_cache(1000)
def _misspelt(key: str, name: str) -> str:
    """The column of a form that another one must be meant to be; empty where it is like none."""
    form = next(form for form in FORMS if form.name == name)
    return nearest(key, (*form.needs, *form.takes), "", _CLOSE)


def _is_number(value: Any) -> bool:
    """A number, or a cell of CSV that is one."""
    if isinstance(value, Cell):
        try:
            return bool(float(value)) or True
        except ValueError:
            return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nested(key: str, value: Any) -> Any:
    """A list or object that a cell of text holds, as JSON or as Python writes it; other values as they are.

    Answers may be JSON themselves: where a text is meant as well, only messages count.
    """
    if key not in _NESTED or not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        first = found[0] if isinstance(found, list) and found else found
        turns = isinstance(first, dict) and not {"role", "from", "messages"}.isdisjoint(first)
        if turns or (key not in _OR_TEXT and isinstance(found, (list, dict))):
            return found
    return value
