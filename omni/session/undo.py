"""A call of a session happens as a whole or not at all, whatever fails in it and whenever it is cut.

Before a call `Undo` notes where the session stands. That is little: the list of messages is never changed in place, and
what is (open sound and video) is copied. If the call ends by an exception, the list is put back. What the caches hold
need not be: a row knows what it has read, and is made equal to the list by the next call. An exception may come while
the session is being put back (Ctrl-C may come at any moment), therefore the note stays with the session until the call
is over, and the next call finds it and puts the session back first. A session that cannot be put back is closed and
says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from omni.session.attached import Attached

F = TypeVar("F", bound=Callable[..., Any])
_OF_SESSION = ("tools", "_reply")
_OF_TURN = ("over", "interruption", "delivered_end", "delivered_ids", "delivered_frames")


class Undo:
    """Where a session stands before a call."""

    def __init__(self, session: Attached, call: str) -> None:
        self.call = call
        self.own = {name: getattr(session, name) for name in _OF_SESSION}
        conversation = session._conversation
        self.conversation = {f.name: getattr(conversation, f.name) for f in dataclasses.fields(conversation)}
        self.open = None if conversation.open is None else conversation.open.note()
        self.recorded = session._reply is not None and session._reply.recorded
        turn = session._turn if session._turn_is_own else None
        self.turn = {} if turn is None else {name: getattr(turn, name) for name in _OF_TURN}

    def apply(self, session: Attached) -> None:
        """Put the session back. It may be called again, if it was cut itself."""
        for name, value in self.own.items():
            setattr(session, name, value)
        for name, value in self.conversation.items():
            setattr(session._conversation, name, value)
        session._conversation.open = None if self.open is None else self.open.note()  # the note may be taken again
        reply = session._reply
        for name, value in self.turn.items() if reply is not None and reply.recorded == self.recorded else ():
            setattr(reply.turn, name, value)  # type: ignore[union-attr]


def whole(method: F) -> F:
    """Let a method of a session happen as a whole or not at all, and one call at a time."""

    @torch.no_grad()
    def attempt(session: Attached, *args: Any, **kwargs: Any) -> Any:
        settle(session)
        session._undo = Undo(session, method.__name__)
        try:
            result = method(session, *args, **kwargs)
        except BaseException as error:
            put_back(session, error)
            raise
        session._undo = None
        return result

    @wraps(method)
    def run(session: Attached, *args: Any, **kwargs: Any) -> Any:
        session._check_usable()
        with session._lock:
            return attempt(session, *args, **kwargs)

    return run  # type: ignore[return-value]


def settle(session: Attached) -> None:
    """Finish what an earlier call left: put the session back if it was cut. Raises ValueError for a closed session."""
    if session._undo is not None and not session.closed:
        put_back(session, None)
    session._settle_reply()
    if session.closed:
        raise ValueError(f"the session is closed: {session.closed_because}")


def put_back(session: Attached, error: BaseException | None) -> None:
    """Undo the call that `error` has ended (None: it was cut), or close the session if that fails too."""
    undo = session._undo
    if undo is None or session.closed:
        return
    try:
        undo.apply(session)
        session._settle_row()
    except Exception as second:
        reason = "was cut" if error is None else f"failed ({type(error).__name__}: {error})"
        session.closed_because = (
            f"{undo.call} {reason} and could not be undone ({type(second).__name__}: {second}); start a new session"
        )
    session._undo = None
