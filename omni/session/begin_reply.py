"""How a session's reply begins: the user's turn is closed, the assistant's opened, and a turn is started in the row."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from omni.generation.arguments import resolve
from omni.generation.generate import assistant_header, make_request, make_turn, reply_beginning
from omni.generation.streaming_config import StreamingConfig
from omni.generation.turn import Turn

if TYPE_CHECKING:
    from omni.session.session import OmniSession


def begin_reply(session: OmniSession, arguments: dict[str, Any]) -> Turn:
    """Begin the reply that `OmniSession.respond` asks for with these arguments. Raises ValueError or TypeError."""
    model, processor = session.model, session.processor
    streaming, prefill = arguments.pop("streaming"), arguments.pop("prefill")
    streaming = session.streaming if streaming is None else streaming
    if not isinstance(streaming, StreamingConfig):
        raise TypeError(f"streaming must be a StreamingConfig, got {type(streaming).__name__}")
    if prefill is not None and not isinstance(prefill, str):
        raise TypeError(f"prefill must be a string, got {type(prefill).__name__}")
    if session.responding:
        raise ValueError("the session is responding already; take all its events, or interrupt it")
    if arguments["speaker"] is None:
        arguments["speaker"] = session.speaker
    args = resolve(model, 1, **arguments)
    header = assistant_header(model, None, processor)
    opened, given = processor.begin_reply(prefill or "")
    opened = opened or header
    conversation, speaks = session._conversation, args.speakers is not None
    began, spent = time.perf_counter(), dict(conversation.rows.seconds)
    conversation.allow_long = args.allow_long
    session._open_user_turn()
    session._close_media()
    session._flush_text()
    conversation.write_text(session._closing())
    conversation.in_user = False
    conversation.write_text(opened)
    opening = [*opened, *given]
    beginning = reply_beginning(model, opening, speaks=False, start=len(opened), processor=processor)
    spoken = conversation.begin_reply(given, beginning.given if speaks and args.speak_prefill else 0)
    session._prompt = conversation.thinker
    ids, position = conversation.ids, conversation.thinker.highest + 1
    request = make_request(model, args, 0, streaming, ids, position, header, conversation.talker)
    turn = make_turn(request, beginning.reader, processor, spoken)
    conversation.rows.begin(conversation.row, turn, began, spent)  # the input's tail is part of the answer's delay
    session._turn, session._before_reply = turn, session._undo
    return turn
