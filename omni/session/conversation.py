"""A conversation as the list of its messages: what a session changes, and a row is made equal to.

No state of a model is touched here. Messages and their entries are never changed in place but for the reply that is
being given, so a list may be kept to go back to, and shared between sessions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from omni.session.entries import Entry, end_of, ids_of
from omni.session.items import IN_PROGRESS, Message
from omni.session.open_turn import OpenTurn
from omni.talker.layout import PromptEnd


@dataclass
class Conversation:
    """The messages so far.

    beginning: entries of what the chat template writes before the first turn; a system message that stands first is
    part of it and has no entries of its own. messages: those that are complete, and the reply that is being given.
    open: the user's turn that is being written, which comes last. limit: positions of the model; allow_long: more may
    be used, until the next reply.
    """

    limit: int
    beginning: tuple[Entry, ...] = ()
    messages: tuple[Message, ...] = ()
    open: OpenTurn | None = None
    allow_long: bool = False
    _counted: tuple[tuple[Message, ...], tuple[Entry, ...], int, PromptEnd] | None = field(default=None, repr=False)
    _counted_open: tuple[PromptEnd, int, object, PromptEnd] | None = field(default=None, repr=False)

    @property
    def all(self) -> tuple[Message, ...]:
        """The messages, the open turn included."""
        return self.messages if self.open is None else (*self.messages, self.open.message)

    @property
    def system(self) -> Message | None:
        """The system message that is part of the beginning."""
        return self.messages[0] if self.messages and self.messages[0].role == "system" else None

    @property
    def entries(self) -> list[Entry]:
        """All that is decided, in order. The text at the end of the open turn is not: its last tokens may change."""
        closed = [*self.beginning, *(entry for message in self.messages for entry in message.entries)]
        return closed if self.open is None else closed + self.open.writing.entries

    @property
    def ids(self) -> list[int]:
        """All token ids; open media and text are not among them."""
        closed = [*self.beginning, *(entry for message in self.messages for entry in message.entries)]
        return ids_of(closed if self.open is None else closed + self.open.entries)

    @property
    def end(self) -> PromptEnd:
        """Where the Thinker's prompt ends once all is read."""
        closed = self._closed_end()
        if self.open is None:
            return closed
        writing = self.open.writing
        return end_of(writing.tail_entries(), self._open_end(closed, writing.entries))

    def _open_end(self, closed: PromptEnd, entries: Sequence[Entry]) -> PromptEnd:
        """Where it ends after what is decided of the open turn, which grows at its end: what was counted is kept."""
        known = self._counted_open
        first, end = 0, closed
        there = known is not None and known[0] == closed and known[1] <= len(entries)
        if known is not None and there and entries[known[1] - 1].medium is known[2]:
            first, end = known[1], known[3]
        end = end_of(entries[first:], end)
        self._counted_open = (closed, len(entries), entries[-1].medium, end) if entries else None
        return end

    def _closed_end(self) -> PromptEnd:
        """Where it ends before the open turn; the same list is counted once."""
        known = self._counted
        count = sum(len(message.entries) for message in self.messages)  # a reply grows
        if known is None or known[0] is not self.messages or known[1] is not self.beginning or known[2] != count:
            end = end_of([*self.beginning, *(entry for message in self.messages for entry in message.entries)])
            self._counted = known = self.messages, self.beginning, count, end
        return known[3]

    def check_room(self, before: PromptEnd, more: int = 1) -> None:
        """Raise ValueError if so many more tokens have no position left. before: the end when there was room."""
        if self.room(more) >= 0 or self.allow_long:
            return
        used, needed = reach(before), reach(self.end) + more - 1
        raise ValueError(
            f"the session is full: {used} of {self.limit} positions are used and {max(needed - used, 0)} more are "
            "needed; make room with drop_oldest_turns(), or start a new session with a summary of this one"
        )

    def room(self, more: int = 1) -> int:
        """Positions that are left after so many more tokens; below 0 if there are not so many."""
        return self.limit - reach(self.end) - more

    def index(self, id: str) -> int:
        """The place of a message. Raises ValueError for an unknown one."""
        for place, message in enumerate(self.messages):
            if message.id == id:
                return place
        names = ", ".join(message.id for message in self.messages[-5:]) or "none"
        raise ValueError(f"there is no item {id!r}; the last ones are: {names}")

    def replaced(self, id: str, *messages: Message) -> tuple[Message, ...]:
        """The list with these messages in the place of one."""
        place = self.index(id)
        return (*self.messages[:place], *messages, *self.messages[place + 1 :])

    def without_oldest(self, count: int) -> tuple[Message, ...]:
        """The list without the oldest user turns and what follows each. Raises ValueError if there are not so many."""
        begins = [place for place, message in enumerate(self.messages) if message.role == "user"]
        turns = len(begins) + (self.open is not None)
        if not 1 <= count < turns:
            raise ValueError(f"cannot drop {count} of {turns} turns; the last one stays, so at most {turns - 1}")
        stop = begins[count] if count < len(begins) else len(self.messages)
        return (*self.messages[: begins[0]], *self.messages[stop:])

    @property
    def reply_in_progress(self) -> Message | None:
        """The reply that is being given."""
        last = [message for message in self.messages if message.status == IN_PROGRESS]
        return last[-1] if last else None

    def forget_media(self, read: int, limit: int) -> None:
        """Keep embeddings of at most `limit` bytes, of what was read last. read: entries that have been read, which
        alone may be forgotten."""
        kept = [(i, entry) for i, entry in enumerate(self.entries) if entry.embeds is not None]
        surplus = sum(entry.bytes for _, entry in kept) - limit
        stale = set()
        for place, entry in kept:
            if surplus <= 0 or place >= read:
                break
            stale.add(entry.medium)
            surplus -= entry.bytes
        if not stale:
            return
        self.messages = tuple(
            message.forgotten(stale) if any(entry.medium in stale for entry in message.entries) else message
            for message in self.messages
        )
        if self.open is not None:
            self.open.forget(stale)

    def fork(self) -> Conversation:
        """The same past, to go on from independently."""
        return dataclasses.replace(self, open=None if self.open is None else self.open.clone())


def reach(end: PromptEnd) -> int:
    """Positions that a prompt with this end uses."""
    return max(end.tokens, math.ceil(max(end.start, end.highest + 1)))


def without_orphans(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The list without results of tools whose call was cut off."""
    waiting: list[str] = []
    out = []
    for message in messages:
        waiting += message.calls
        answered = [part["call_id"] for part in message.parts if part["type"] == "tool_result"]
        if all(call in waiting for call in answered):
            waiting = [call for call in waiting if call not in answered]
            out.append(message)
    return tuple(out)


def lay_out_results(
    messages: Sequence[Message], results_ids: Callable[[Sequence[str]], Sequence[int]]
) -> tuple[Message, ...]:
    """Tool results that follow each other are one turn, which the first of them holds.

    results_ids: the ids of the turn of these outputs.
    """
    out: list[Message] = []
    for is_tool, run in groupby(messages, key=lambda message: message.role == "tool"):
        group = list(run)
        if is_tool:
            ids = tuple(results_ids([part["output"] for message in group for part in message.parts]))
            turns = [(Entry(ids, by_user=True),), *[()] * (len(group) - 1)]
            group = [_with_entries(message, own) for message, own in zip(group, turns)]
        out += group
    return tuple(out)


def _with_entries(message: Message, entries: tuple[Entry, ...]) -> Message:
    same = ids_of(entries) == ids_of(message.entries)
    return message if same else dataclasses.replace(message, entries=entries)
