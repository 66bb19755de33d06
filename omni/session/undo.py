"""A call of a session happens as a whole or not at all, whatever fails in it and whenever it is cut.

Before a call `Undo` notes where the session stands. That is little: caches and lists only grow while input is read, so
their lengths are enough; what changes in place (open sound and video, and whatever a call writes over) is copied. If
the call ends by an exception, the session is put back. A second one may cut that short (Ctrl-C may come at any moment),
therefore the note stays with the session until the call is over, and the next call finds it and puts the session back
first. A session that cannot be put back is closed and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from omni.layers.cache import KVCache

if TYPE_CHECKING:
    from omni.session.session import OmniSession

F = TypeVar("F", bound=Callable[..., Any])
_SESSION = ("_turn", "_prompt", "_before_reply", "_text", "_clip", "_video")
_OF_TURN = ("over", "interruption", "delivered_end")
_FIXED = ("rows", "row", "encode", "between", "prefill_tokens", "keep_media")  # of a conversation


class Undo:
    """Where a session stands.

    text_from, speech_from: the first slots of the caches whose contents the call may write over (None: it only adds).
    parked: the call lets others go on for a while; it is neither over nor cut.
    """

    def __init__(
        self, session: OmniSession, call: str, text_from: int | None = None, speech_from: int | None = None
    ) -> None:
        self.session, self.call, self.parked = session, call, False
        conversation = session._conversation
        self.rows, self.row = conversation.rows, conversation.row
        self.own = {name: _note(getattr(session, name)) for name in _SESSION}
        names = [f.name for f in dataclasses.fields(conversation) if f.name not in _FIXED]
        self.conversation = {name: _note(getattr(conversation, name)) for name in names}
        self.turn = {} if session._turn is None else {name: getattr(session._turn, name) for name in _OF_TURN}
        self.running = self.rows.turns[self.row]
        states = ((self.rows.text, text_from), (self.rows.speech, speech_from))
        self.states = [_RowNote(state, self.row, first) for state, first in states if state is not None]
        self.rewrites = text_from is not None or speech_from is not None

    @torch.no_grad()
    def apply(self) -> None:
        """Put the session back. It may be called again, if it was cut itself."""
        session, rows, row = self.session, self.rows, self.row
        for owner, notes in ((session, self.own), (session._conversation, self.conversation)):
            for name, note in notes.items():
                setattr(owner, name, _take(note))
        for name, value in self.turn.items():
            setattr(session._turn, name, value)
        rows.put(row, self.running)
        for state in self.states:
            state.apply()
        if not self.rewrites:
            rows.mark_seen(row, session._conversation.ids)


class _RowNote:
    """One row of a decoder's state: the cache's length and, if slots from `first` on may change, what they hold."""

    def __init__(self, state: Any, row: int, first: int | None) -> None:
        self.state, self.row, self.first = state, row, first
        self.cache: KVCache = state.decoder.cache
        self.length = self.cache.lengths[row]
        self.kept: dict[str, Tensor] = {}
        if first is not None:
            for name in ("keys", "values"):
                self.kept[name] = getattr(self.cache, name)[:, row, :, first : self.length].to("cpu", copy=True)
            for f in dataclasses.fields(state):
                if isinstance(value := getattr(state, f.name), Tensor):
                    self.kept[f.name] = value[row].clone()

    def apply(self) -> None:
        self.cache.grow(self.row, self.length)
        for name, value in self.kept.items():
            if name in ("keys", "values"):
                getattr(self.cache, name)[:, self.row, :, self.first : self.length] = value.to(self.cache.keys)
            else:
                getattr(self.state, name)[self.row] = value


def _note(value: Any) -> tuple[Any, int | None]:
    """A value to go back to. Lists are only appended to or replaced, so that their length is enough."""
    if isinstance(value, list):
        return value, len(value)
    return (value.note() if hasattr(value, "note") else value), None


def _take(note: tuple[Any, int | None]) -> Any:
    value, length = note
    if length is not None:
        del value[length:]
        return value
    return value.note() if hasattr(value, "note") else value  # the note stays as it is: it may be taken again


def whole(rewrites: Callable[[OmniSession], tuple[int, int]] | None = None) -> Callable[[F], F]:
    """Let a method of a session happen as a whole or not at all, and one call at a time.

    rewrites: tells from which slots of Thinker's and Talker's cache on the call may write over what is there.
    """

    def decorate(method: F) -> F:
        @wraps(method)
        def run(session: OmniSession, *args: Any, **kwargs: Any) -> Any:
            with session._lock:
                settle(session)
                session._undo = Undo(session, method.__name__, *(rewrites(session) if rewrites else ()))
                try:
                    result = method(session, *args, **kwargs)
                except BaseException as error:
                    put_back(session, error)
                    raise
                session._undo = None
                return result

        return run  # type: ignore[return-value]

    return decorate


def settle(session: OmniSession) -> None:
    """Finish what an earlier call left: put the session back if it was cut. Raises ValueError for a closed session."""
    undo = session._undo
    if undo is not None and undo.parked:
        raise ValueError(f"{undo.call} is still reading in another thread; a session takes one call at a time")
    if undo is None and not session.responding:
        undo = session._before_reply  # a reply that ended without having been recorded
    if undo is not None and not session.closed:
        session._undo = undo
        put_back(session, None)
    if session.closed:
        raise ValueError(f"the session is closed: {session.closed_because}")


def put_back(session: OmniSession, error: BaseException | None) -> None:
    """Undo the call that `error` has ended (None: it was cut), or close the session if that fails too."""
    undo = session._undo
    if undo is None or session.closed:
        return
    try:
        undo.apply()
    except Exception as second:
        reason = "was cut" if error is None else f"failed ({type(error).__name__}: {error})"
        session.closed_because = (
            f"{undo.call} {reason} and could not be undone ({type(second).__name__}: {second}); start a new session"
        )
    session._undo = None
