"""A reply that a session gives: how it begins, is recorded in the history, cut, or forgotten."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from omni.generation.arguments import resolve
from omni.generation.events import Event, ToolCall
from omni.generation.generate import assistant_header, make_request, make_turn, reply_beginning
from omni.generation.streaming_config import StreamingConfig
from omni.generation.tool_calls import CLOSE, OPEN, MalformedCallError
from omni.generation.turn import Turn
from omni.session.conversation import lay_out_results, without_orphans
from omni.session.entries import Entry, end_of
from omni.session.heard import ReplyTimes, heard_ids, reply_times
from omni.session.items import COMPLETED, IN_PROGRESS, INCOMPLETE, Message, new_id
from omni.session.jobs import Job, Steps
from omni.session.undo import Undo, put_back

if TYPE_CHECKING:
    from omni.session.attached import Attached


THINK_END = "</think>"
_CALL = re.compile(rf'{OPEN}(?:"(?:[^"\\]|\\.)*"|[^"])*?{CLOSE}', re.DOTALL)  # marks in a JSON string are part of it


class Kept(NamedTuple):
    """What a cut reply leaves in the history: the ids that count as heard, and their text."""

    token_ids: list[int]
    text: str


@dataclass(eq=False)
class Reply:
    """A reply that is being given, or was given last.

    message: its place in the list, which it fills when it ends. before: the session before `respond`, as long as the
    reply may be forgotten; listed: the list of messages right after. calls: parts of the tools that it has called.
    recorded: the message holds it. failed: why it did not come to its end. left: nobody reads its events any more.
    ticking: a step is being made.
    """

    turn: Turn
    message: Message
    before: Undo | None
    listed: tuple[Message, ...]
    calls: list[dict[str, Any]] = field(default_factory=list)
    recorded: bool = False
    failed: BaseException | None = None
    left: bool = False
    ticking: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more of it will come."""
        return self.turn.delivered_end or self.left or self.failed is not None


def begin_reply(session: Attached, arguments: dict[str, Any]) -> tuple[Reply, Job[None]]:
    """Write the beginning of the reply that `OmniSession.respond` asks for into the list.

    Returns the reply, and what is to be done in the row: read the prompt and start the turn. Raises ValueError or
    TypeError.
    """
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
    args = resolve(model, 1, tools=session.tools is not None, **arguments)
    header = assistant_header(model, None, processor)
    opened, given = processor.begin_reply(prefill or "")
    opened = opened or header
    began, spent = time.perf_counter(), dict(session._reader.rows.seconds)
    conversation, end_before = session._conversation, session._conversation.end
    conversation.allow_long = args.allow_long
    session._close_user_turn()
    beginning = reply_beginning(model, [*opened, *given], speaks=False, start=len(opened), processor=processor)
    speaks = args.speakers is not None
    given_aloud = beginning.given if speaks and args.speak_prefill else 0
    message = Message(new_id(), "assistant", (), _entries(opened, given), IN_PROGRESS, tuple(given))
    conversation.messages = (*conversation.messages, message)
    session._check_room(end_before)
    reader = session._reader
    aloud = given[len(given) - given_aloud :] if reader.by_hidden else []
    entries = conversation.entries
    prompt = entries if not aloud else [*entries[:-1], *_entries(given[: len(given) - len(aloud)])]
    thinker, talker = conversation.end, end_of(e for e in prompt if reader.in_talker_prompt(e.by_user))
    position = thinker.highest + 1
    request = make_request(model, args, 0, streaming, conversation.ids, position, header, talker)
    answered = given[len(given) - beginning.given :]
    turn = make_turn(request, beginning.reader, processor, given[len(given) - given_aloud :], answered)
    undo = session._undo
    assert undo is not None, "a reply begins inside a call"
    reply = Reply(turn, message, undo, conversation.messages)

    def read_and_start() -> Steps[None]:
        spoken = yield from reader.begin_reply(prompt, aloud)
        if aloud:
            turn.speech.spoken = list(spoken)
        reader.rows.begin(reader.row, turn, began, spent)  # the input's tail is part of the answer's delay

    return reply, read_and_start


def _entries(*texts: Sequence[int]) -> tuple[Entry, ...]:
    """Entries of an assistant's turn."""
    return tuple(Entry(tuple(ids)) for ids in texts if ids)


def record(session: Attached, reply: Reply, kept: Sequence[int] | None = None) -> None:
    """Take a turn out of its row and let its message hold it, or the ids that are kept of it. Row-side.

    If this fails for a reply that is cut, it runs on.
    """
    turn, reader = reply.turn, session._reader
    text = turn.text
    ids = list(text.kept if kept is None else kept)
    reader.rows.release(reader.row)
    try:
        reader.end_reply(ids, min(text.read, len(ids)), text.vectors, revocable=kept is not None)
    except BaseException:
        if kept is not None:
            reader.rows.put(reader.row, turn)
        raise
    _hold(session, reply, ids, COMPLETED if kept is None and turn.reason == "stop" else INCOMPLETE)


def _hold(session: Attached, reply: Reply, ids: Sequence[int], status: str) -> None:
    """Let the message of a reply hold these ids."""
    message, times = reply.message, reply_times(reply.turn, session.model.code2wav)
    whole = fill(session, message, ids, times, status, reply.calls)
    message.entries, message.parts, message.times = whole.entries, whole.parts, whole.times
    message.status, reply.recorded = status, True
    reply.before = None  # it holds the reply before this one


def note_events(reply: Reply, events: Sequence[Event]) -> None:
    """Note what has happened in a reply, before its events are handed out."""
    calls = [event for event in events if isinstance(event, ToolCall)]
    reply.calls += [{"type": "tool_call", "id": c.id, "name": c.name, "arguments": c.arguments} for c in calls]
    if not reply.recorded:
        reply.message.parts = tuple(reply.calls)  # they may be answered before the reply ends
    if isinstance(reply.turn.error, MalformedCallError):  # told as an event; the session forgets the reply
        reply.failed = reply.turn.error


def fill(
    session: Attached,
    message: Message,
    ids: Sequence[int],
    times: ReplyTimes,
    status: str,
    calls: Sequence[dict[str, Any]] = (),
) -> Message:
    """A reply's message with these ids, closed.

    calls: parts of the tools that it called; those stay that the ids hold whole, and no part of another.
    """
    closing, decode = session._closing(), session.processor.decode
    ids, given = list(ids), list(message.given)
    text = decode([*given, *ids])
    while calls and OPEN in _CALL.sub("", text):  # it was cut inside a call
        text = decode([*given, *(ids := ids[:-1])])
    closed = bool(ids) and ids[-1] in session._stop_ids
    entries = (message.entries[0], *_entries([*given, *ids], closing[1 if closed else 0 :]))
    parts = (*_texts(_answer(text, calls)), *(calls[: len(_CALL.findall(text)) - len(_CALL.findall(decode(given)))]))
    count = len(ids) - closed
    times = ReplyTimes(times.token_ids[:count], times.ends_ms[:count])
    return dataclasses.replace(message, entries=entries, parts=parts, times=times, status=status)


def _answer(text: str, calls: Sequence[Any]) -> str:
    """What of a reply is the answer: reasoning and calls left out."""
    answer = text.partition(THINK_END)[2].lstrip() if THINK_END in text else text
    return _CALL.sub("", answer).strip() if calls else answer


def _texts(text: str) -> tuple[dict[str, Any], ...]:
    return ({"type": "text", "text": text},) if text else ()


def end_early(session: Attached, reply: Reply, played_ms: float | None) -> list[int] | None:
    """End a reply that is being given and keep what was heard of it; None if it has ended in the meantime. Row-side."""
    if reply.recorded:
        return None
    turn, reader = reply.turn, session._reader
    kept = heard_ids(turn, session.model.code2wav, played_ms)
    turn.interruption = dataclasses.replace(reader.rows.end(reader.row, turn, "interrupted"), row=0)
    turn.delivered_end = True
    try:
        record(session, reply, kept)
    except BaseException:
        turn.interruption, turn.delivered_end, turn.over = None, False, False
        raise
    return kept


def end_unbegun(session: Attached, reply: Reply) -> None:
    """End a reply whose turn has not begun: nothing of it was heard. It touches no row."""
    interruption = reply.turn.end(0, "interrupted")
    _hold(session, reply, [], INCOMPLETE)
    reply.turn.interruption, reply.turn.delivered_end = interruption, True


def cut_undelivered(session: Attached, reply: Reply, played_ms: float | None) -> list[int]:
    """What was heard of a reply that is complete, but not all of whose events were taken; no more will be."""
    turn = reply.turn
    kept = heard_ids(turn, session.model.code2wav, played_ms)
    turn.interruption = turn.end(0, "interrupted")
    turn.delivered_end = True
    return kept


def settle_reply(session: Attached) -> None:
    """Finish what a reply has left undone: one that failed is forgotten, one that nobody reads is interrupted."""
    reply = session._reply
    if reply is None or session._undo is not None or session.closed:
        return
    if not reply.recorded and reply.left and not reply.ticking and reply.failed is None:
        try:
            session._end_early(reply, None)
        except Exception as error:  # the reply is lost
            reply.failed = error
    if reply.recorded:
        if reply.left and not reply.turn.delivered_end:
            reply.turn.delivered_end = True
            cut_to_delivered(session, reply)
    elif reply.ticking or reply.failed is not None:
        _forget(session, reply)


def _forget(session: Attached, reply: Reply) -> None:
    """Put the session back to where it was before a reply; where it was changed since, take the reply out."""
    conversation = session._conversation
    if conversation.messages is reply.listed and conversation.open is None and reply.before is not None:
        session._undo = reply.before
    else:
        session._undo = Undo(session, "respond")
        rest = (message for message in conversation.messages if message is not reply.message)
        session._undo.conversation["messages"] = without_orphans(tuple(rest))
        session._undo.own["_reply"] = None
        session._undo.turn = {}
    put_back(session, reply.failed)


def cut_to_delivered(session: Attached, reply: Reply) -> None:
    """Cut a complete reply, whose last events nobody took, to what was yielded."""
    message, times = reply.message, reply.message.times
    kept = heard_ids(reply.turn, session.model.code2wav, None)
    if times is not None and len(kept) < len(times.token_ids):
        cut = fill(session, message, kept, times, INCOMPLETE, message.call_parts)
        rest = without_orphans(session._conversation.replaced(message.id, cut))
        results_ids = session.processor.tool_results_ids
        session._conversation.messages = lay_out_results(rest, lambda outputs: results_ids(outputs))
