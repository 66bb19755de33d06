"""How a session's reply begins: the user's turn is closed, the assistant's opened, and a turn is started in the row."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from omni.generation.arguments import resolve
from omni.generation.generate import assistant_header, check_talker_room, make_request, make_turn, reply_beginning
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
    opening = processor.begin_reply(prefill) if prefill else header
    header, given = opening[: len(header)], opening[len(header) :]
    conversation, speaks = session._conversation, args.speakers is not None
    began, spent = time.perf_counter(), dict(conversation.rows.seconds)
    conversation.allow_long = args.allow_long
    _check_room(session, speaks, len(given))
    session._open_user_turn()
    session._close_media()
    session._flush_text()
    conversation.write_text(session._closing())
    conversation.in_user = False
    conversation.write_text(header)
    beginning = reply_beginning(model, opening, speaks=False, start=len(header), processor=processor)
    spoken = conversation.begin_reply(given, beginning.given if speaks and args.speak_prefill else 0)
    session._prompt = conversation.thinker
    ids, position = conversation.ids, conversation.thinker.highest + 1
    request = make_request(model, args, 0, streaming, ids, position, header, conversation.talker)
    turn = make_turn(request, beginning.reader, processor, spoken)
    conversation.rows.begin(conversation.row, turn, began, spent)  # the input's tail is part of the answer's delay
    session._turn = turn
    return turn


def _check_room(session: OmniSession, speaks: bool, given: int) -> None:
    """Raise ValueError, before anything is changed, if the reply cannot begin for want of positions.

    given: tokens of its beginning.
    """
    conversation, closing = session._conversation, len(session._closing())
    user = len(session.processor.encode_text("".join(session._text))) + closing
    user += 0 if conversation.in_user else 2 + closing
    conversation.check_room(user + len(conversation.pending) + 2 + closing + given)
    layout = conversation.rows.layout
    if speaks and layout is not None and not conversation.allow_long:
        tokens = user + sum(len(ids) for ids, by_user in conversation.queued if layout.in_prompt(by_user))
        if layout.in_prompt(False):
            tokens += len(conversation.pending) + 2 + closing + given
        end = conversation.talker.moved(tokens)
        check_talker_room(layout, end._replace(tokens=end.tokens + tokens))
