"""From an item that a caller wrote to the message that a model reads: texts encoded, media through the encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omni.processing.audio_file import load_audio
from omni.processing.messages import Medium, read_conversation
from omni.processing.vision import PixelBudget
from omni.session.entries import Entry
from omni.session.heard import ReplyTimes
from omni.session.items import COMPLETED, IN_PROGRESS, Item, KeptMedia, Message, new_id
from omni.session.open_turn import OpenTurn

if TYPE_CHECKING:
    from omni.session.attached import Attached

_PARTS = {  # which kinds of parts a role may have beside those of the processor
    "assistant": ("tool_call",),
    "tool": ("tool_result",),
}


def render(session: Attached, item: Item) -> Message:
    """A message of its own for an item. Raises TypeError or ValueError, naming the part and the remedy."""
    status = COMPLETED if item.status == IN_PROGRESS else item.status
    own = [part for part in item.parts if part.get("type") in _PARTS.get(item.role, ())]
    others = [part for part in item.parts if part not in own]
    id = item.id or new_id()
    if item.role == "tool":
        return Message(id, "tool", (_result(own, others),), (), status)
    if item.role == "assistant":
        return _reply(session, id, others, [_call(part) for part in own], status)
    turn = OpenTurn(session._encoders, item.role, id)
    for part in item.parts:
        _add(session, turn, part, item.role)
    return turn.finish(status)


def _add(session: Attached, turn: OpenTurn, part: Mapping[str, Any], role: str) -> None:
    """Add a content item as the processor takes it, or media that a session has read."""
    kept = [value for value in part.values() if isinstance(value, KeptMedia)]
    if kept:
        if not kept[0].kept:
            raise ValueError(
                f"the {kept[0]!r} of a part was not kept and cannot be read again; give the medium itself, or make the "
                "session with keep_media=True"
            )
        _check_kept(session, kept[0])
        turn.add_kept(kept[0])
        return
    conversation = read_conversation([{"role": role, "content": [part]}])
    if not conversation.media:
        turn.add_text(conversation.messages[0]["content"])
        return
    _add_medium(session, turn, conversation.media[0])


def _check_kept(session: Attached, media: KeptMedia) -> None:
    """Raise ValueError for media that this model cannot read, or that are not whole."""
    text = session.model.config.thinker.text_config
    if not media.ended:
        raise ValueError(f"the {media.kind} of a part is still open; push something else or respond, then use the item")
    if any(entry.embeds is not None and entry.embeds.shape[1] != text.hidden_size for entry in media.entries):
        raise ValueError(f"the {media!r} of a part is another model's; give the medium itself")
    if any(token >= text.vocab_size for entry in media.entries for token in entry.ids):
        raise ValueError(f"the {media!r} of a part has ids of another model; give the medium itself")


def _add_medium(session: Attached, turn: OpenTurn, medium: Medium) -> None:
    processor, own = session.processor, medium.options
    if medium.kind == "audio":
        span = own.get("audio_start", 0.0), own.get("audio_end")
        samples = load_audio(medium.source, own.get("sampling_rate"), None, processor.media_budget, *span)
        turn.close_media()
        turn.add_sound(samples, processor.log_mel.sample_rate)
        turn.close_media()
    elif medium.kind == "image":
        session.model.require("vision_encoder")
        limits = PixelBudget(own.get("min_pixels"), own.get("max_pixels"))
        pixels, grid = processor.vision.image(medium.source, limits, media_budget=processor.media_budget)
        turn.add_picture(pixels, grid)
    else:
        session.model.require("vision_encoder")
        limits = PixelBudget(own.get("min_pixels"), own.get("max_pixels"))
        want_sound = own.get("use_audio_in_video", session.use_audio_in_video)
        film = processor.vision.video(medium.source, own, limits, bool(want_sound), media_budget=processor.media_budget)
        turn.add_film(film)


def _result(own: Sequence[Mapping[str, Any]], others: Sequence[Any]) -> dict[str, Any]:
    """The one part of a tool's message, checked."""
    if len(own) != 1 or others:
        raise ValueError("a tool's item has one part {'type': 'tool_result', 'call_id': …, 'output': …}")
    for key in ("call_id", "output"):
        if not isinstance(own[0].get(key), str):
            raise TypeError(f"{key} of a tool_result must be a string, got {type(own[0].get(key)).__name__}")
    return dict(own[0])


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    """A tool_call part, checked."""
    id, name, arguments = part.get("id"), part.get("name"), part.get("arguments", "{}")
    if not isinstance(id, str) or not isinstance(name, str):
        raise TypeError(f"a tool_call has an id and a name, both strings, got {id!r} and {name!r}")
    if not isinstance(arguments, (str, Mapping)):
        raise TypeError(f"arguments of a tool_call must be JSON text or a dict, got {type(arguments).__name__}")
    text = arguments if isinstance(arguments, str) else json.dumps(dict(arguments), ensure_ascii=False)
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"arguments of the tool_call {id!r} are no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"arguments of the tool_call {id!r} must be a JSON object, got {text:.60}")
    return {**part, "arguments": text}


def _reply(
    session: Attached, id: str, texts: Sequence[Mapping[str, Any]], calls: Sequence[dict[str, Any]], status: str
) -> Message:
    """An assistant's message, as the chat template writes one."""
    if any(part["type"] != "text" for part in texts if isinstance(part, Mapping)):
        raise ValueError("an assistant's item holds texts and tool calls only")
    said = [read_conversation([{"role": "assistant", "content": [part]}]).messages[0]["content"] for part in texts]
    text = "".join(said)
    if calls:
        own = [{"function": {"name": call["name"], "arguments": json.loads(call["arguments"])}} for call in calls]
        ids = session.processor.assistant_ids(text, own)
    else:
        ids = session.processor.encode_text(text)
    opened, _ = session.processor.begin_reply("")
    opened = opened or session._header("assistant")
    entries = tuple(Entry(tuple(own)) for own in (opened, ids, session._closing()) if own)
    parts = (*([{"type": "text", "text": text}] if text else []), *calls)
    return Message(id, "assistant", tuple(parts), entries, status, times=ReplyTimes(tuple(ids), (0.0,) * len(ids)))
