"""What callers see of a conversation's past, and every change of it: one operation on the list of its messages.

A change makes another list, checks that it can be read, and lets the row be made equal to it: the longest common
beginning of the caches stays, the rest is read again from the embeddings that were kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omni.session import options
from omni.session.attached import Attached
from omni.session.conversation import lay_out_results, reach, without_orphans
from omni.session.heard import check_played
from omni.session.items import IN_PROGRESS, INCOMPLETE, Item, KeptMedia, Message, new_id
from omni.session.render import render
from omni.session.replies import Kept, cut_undelivered, fill
from omni.session.undo import whole


class _Unchanged:
    def __repr__(self) -> str:
        return "unchanged"


UNCHANGED: Any = _Unchanged()  # an argument that was left out


class History(Attached):
    """The editing half of a session."""

    @property
    def items(self) -> tuple[Item, ...]:
        """The messages of the conversation: the system message if there is one, turns, replies and tool results.

        The turn that the user is writing and the reply that is being given are in_progress. What media hold is not
        here: they are `KeptMedia`, whose embeddings are kept as far as `keep_media` allows.
        """
        self._settle_if_free()
        return tuple(message.item for message in self._conversation.all)

    @whole
    def become(self, items: Sequence[Item]) -> None:
        """Let these be the conversation. Items of a session stand for what it has read; others are read anew.

        An open turn of the user's stays open, after them. A reply that is being given must be among them. Raises
        TypeError or ValueError, and nothing has changed, also where media would have to be read again that were not
        kept.
        """
        self._become_items(items)

    @whole
    def insert(self, item: Item, after: str | None = None) -> str:
        """Add an item behind that with the id `after`; returns its id.

        None is the end: behind all but the turn that the user is writing. "root" is the beginning, where a system item
        opens the conversation and others follow it. Raises as `become`, and ValueError for an unknown id.
        """
        messages, message = list(self._conversation.messages), self._message(item)
        if message is None:
            raise ValueError("the turn that is being written is in the conversation already")
        if after == "root":
            place = 1 if self._conversation.system is not None and message.role != "system" else 0
        else:
            place = len(messages) if after is None else self._conversation.index(after) + 1
        self._become([*messages[:place], message, *messages[place:]])
        return message.id

    @whole
    def replace(self, id: str, item: Item) -> str:
        """Put another item in the place of one, under its id unless it has its own; returns the id.

        Raises as `insert`.
        """
        self._editable(id)
        message = self._message(item)
        if message is None:
            raise ValueError("the turn that is being written is in the conversation already")
        message = message if item.id is not None else message.named(id)
        self._become(self._conversation.replaced(id, message))
        return message.id

    @whole
    def delete(self, id: str) -> None:
        """Take an item out; the user's open turn is discarded.

        Raises as `insert`, and for a reply that is being given.
        """
        if self._conversation.open is not None and self._conversation.open.id == id:
            self._conversation.open = None
            self._read_ahead()
            return
        self._editable(id)
        self._become(self._conversation.replaced(id))

    @whole
    def truncate(self, id: str, played_ms: float | None) -> Kept:
        """Cut a reply, also an earlier one, to what was heard after so many milliseconds of its sound; returns that.

        At or beyond its end all of it is kept, and so it is of a silent one that is complete. Calls of tools that are
        cut off take their results with them. Raises ValueError for an
        unknown id, another role than assistant, or a time that is none.
        """
        message = self._conversation.messages[self._conversation.index(id)]
        if message.role != "assistant":
            raise ValueError(f"only a reply can be truncated, item {id!r} is of the {message.role}")
        return self._truncate(message, played_ms)

    @whole
    def interrupt(self, played_ms: float | None = None) -> Kept:
        """Cut the last reply to what was heard and return that; input may have been pushed since.

        played_ms: how much of its sound was played (None: all that was yielded). A reply counts as heard by words, see
        `docs/heard.md`; a silent one as far as it was yielded. During `respond` the turn ends, its iterator yields
        `TurnEnd("interrupted")` and stops. Raises ValueError if no reply was given.
        """
        replies = [message for message in self._conversation.messages if message.role == "assistant"]
        if not replies:
            raise ValueError("there is no reply to interrupt: none was given")
        return self._truncate(replies[-1], played_ms)

    @whole
    def configure(self, *, system: Any = UNCHANGED, tools: Any = UNCHANGED) -> None:
        """Change the system text, or the tools that the model may call; what is left out stays as it is.

        system: None or "" removes it. tools: JSON schemas or documented functions, None or [] removes them. Raises as
        `become`.
        """
        before, conversation = self._conversation.end, self._conversation
        rest = list(conversation.messages[conversation.system is not None :])
        if tools is not UNCHANGED:
            self.tools = options.tool_list(tools)
        text = self.system if system is UNCHANGED else system
        options.check_text("system", text)
        if system is not UNCHANGED:
            first = conversation.system
            id = new_id() if first is None else first.id
            parts = ({"type": "text", "text": text},)
            opening = [Message(id, "system", parts, ())] if text else []
        else:
            opening = [] if conversation.system is None else [conversation.system]
        self._put_messages([*opening, *rest], before)

    @whole
    def push_tool_result(self, call_id: str, output: str) -> str:
        """Answer a call of a tool; returns the item's id. `respond` goes on from there.

        Raises ValueError for an id that no reply has called, or that has been answered.
        """
        part = {"type": "tool_result", "call_id": call_id, "output": output}
        message = self._message(Item(role="tool", parts=part))
        assert message is not None
        messages = self._conversation.messages
        called = max((i for i, m in enumerate(messages) if call_id in m.calls), default=len(messages))
        place = next((i for i in range(called + 1, len(messages)) if messages[i].role != "tool"), len(messages))
        self._become([*messages[:place], message, *messages[place:]])
        return message.id

    @whole
    def drop_oldest_turns(self, count: int = 1) -> int:
        """Make room: forget the oldest user turns with what follows each, read the rest again, return the ids freed.

        What follows equals a session that never had those turns. The system text stays. Raises ValueError while it
        responds, if fewer turns are there, or if what stays holds media that were not kept.
        """
        if self.responding:
            raise ValueError("the session is responding; take all its events before dropping turns")
        count = options.whole_count(count)
        before = len(self._conversation.ids)
        self._become(self._conversation.without_oldest(count))
        return before - len(self._conversation.ids)

    # the one operation

    def _become_items(self, items: Sequence[Item]) -> None:
        if isinstance(items, (str, Item)) or not isinstance(items, Sequence):
            raise TypeError(f"the items of a conversation must be a list of Item, got {type(items).__name__}")
        self._become([message for item in items if (message := self._message(item)) is not None])

    def _message(self, item: Item) -> Message | None:
        """An item as a message of this session; None for the turn that is being written here."""
        if not isinstance(item, Item):
            raise TypeError(f"an item of a conversation must be an Item, got {type(item).__name__}")
        open_turn, own = self._conversation.open, item._message
        if open_turn is not None and item.id == open_turn.id:
            return None
        for message in self._conversation.messages:
            if message is own or (item.status == IN_PROGRESS and message.id == item.id):
                return message
        if own is not None and own.status != IN_PROGRESS and self._fits(own):
            return own
        return render(self, item)

    def _fits(self, message: Message) -> bool:
        """Whether another session's message can be read here: it is no beginning, and its width is the model's."""
        width = self.model.config.thinker.text_config.hidden_size
        return all(entry.embeds is None or entry.embeds.shape[1] == width for entry in message.entries)

    def _editable(self, id: str) -> None:
        """Raise ValueError for an unknown item, or one that is being written."""
        if self._conversation.open is not None and self._conversation.open.id == id:
            raise ValueError(f"item {id!r} is the turn that the user is writing; respond first, or delete it")
        if self._conversation.messages[self._conversation.index(id)].status == IN_PROGRESS:
            raise ValueError(f"item {id!r} is the reply that is being given; interrupt it first")

    def _become(self, messages: Sequence[Message]) -> None:
        """Let these be the messages, and the row be made equal to them."""
        before = self._conversation.end
        seen: set[str] = set()
        for message in messages:
            if message.id in seen:
                raise ValueError(f"two items have the id {message.id!r}; ids must differ")
            seen.add(message.id)
        reply = self._conversation.reply_in_progress
        if reply is not None and reply not in messages:
            raise ValueError(f"item {reply.id!r} is the reply that is being given; interrupt it first")
        _check_calls(messages)
        self._put_messages(messages, before)

    def _put_messages(self, messages: Sequence[Message], before: Any) -> None:
        self._forget_media()
        conversation = self._conversation
        own = [self._in_place(message, opens=place == 0) for place, message in enumerate(messages)]
        conversation.messages = lay_out_results(own, lambda outputs: self.processor.tool_results_ids(outputs))
        first = conversation.system
        conversation.beginning = self._beginning(None if first is None else first.item.text)
        if reach(conversation.end) > reach(before):  # what makes a full session shorter may be done
            self._check_room(before)
        if self._media_lost(conversation.entries):
            raise ValueError(
                "the turns that stay hold sound or pictures, whose embeddings were not kept; make the session with "
                "keep_media=True, or drop more turns"
            )
        self._read_ahead()

    def _in_place(self, message: Message, *, opens: bool) -> Message:
        """A message in its place: the system message that opens a conversation is written by the chat template."""
        if message.role != "system" or opens == (not message.entries):
            return message
        if opens and any(isinstance(value, KeptMedia) for part in message.parts for value in part.values()):
            raise ValueError("the system item that opens a conversation holds text alone; put media into a user's item")
        if opens:
            return dataclasses.replace(message, entries=())
        return dataclasses.replace(render(self, message.item), id=message.id)

    def _truncate(self, message: Message, played_ms: float | None) -> Kept:
        """Cut a reply; see `truncate`."""
        check_played(played_ms)
        reply = self._reply
        if message.status == IN_PROGRESS and reply is not None:
            kept = self._end_early(reply, played_ms)
            if kept is not None:
                rest = without_orphans(self._conversation.messages)
                if len(rest) < len(self._conversation.messages):
                    self._put_messages(rest, self._conversation.end)
                return Kept(kept, self.processor.decode(kept))
        if reply is not None and reply.message is message and not reply.turn.delivered_end:
            kept = cut_undelivered(self, reply, played_ms)
        else:
            assert message.times is not None, "every reply has times"
            kept = message.times.heard(played_ms)
        if message.times is not None and len(kept) < len(message.times.token_ids):
            cut = fill(self, message, kept, message.times, INCOMPLETE, message.call_parts)
            rest = without_orphans(self._conversation.replaced(message.id, cut))
            self._put_messages(rest, self._conversation.end)
        return Kept(kept, self.processor.decode(kept))


def _check_calls(messages: Sequence[Message]) -> None:
    """Raise ValueError for a tool result that answers no call before it, or one that is answered."""
    waiting: list[str] = []
    for message in messages:
        waiting += message.calls
        for part in message.parts:
            if part["type"] != "tool_result":
                continue
            if part["call_id"] not in waiting:
                known = f"; calls that wait for one: {', '.join(waiting)}" if waiting else "; no call waits for one"
                raise ValueError(f"there is no tool call {part['call_id']!r} to answer{known}")
            waiting.remove(part["call_id"])
