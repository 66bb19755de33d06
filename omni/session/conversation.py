"""One conversation in one row: pieces of the prompt go into the caches of Thinker and Talker as they come.

The position rules are those of `omni.rope.positions`, carried from piece to piece: `start` is where the next segment
begins, `highest` the largest position so far, after which a reply begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.generation.rows import Rows
from omni.parts import ModelParts
from omni.rope.positions import Segment, segment_positions


@dataclass
class Place:
    """Where a decoder's prompt stands: start of the next segment, largest position, tokens read."""

    start: float = 0.0
    highest: float = -1.0
    tokens: int = 0

    def copy(self) -> Place:
        return Place(self.start, self.highest, self.tokens)


@dataclass(frozen=True)
class Entry:
    """One step of a conversation's past, enough to read it again.

    ids and offsets of a piece (empty: none), its media embeddings and taps (None: text, or media that were not kept),
    how far the next segment moves on, whether a user turn begins with it, whether it belongs to the user.
    """

    ids: list[int]
    offsets: Tensor | None = None
    embeds: Tensor | None = None
    taps: Tensor | None = None
    length: float = 0.0
    media: bool = False
    in_user: bool = False
    begins_turn: bool = False


@dataclass
class Conversation:
    """What a row has read so far.

    ids: all token ids in the Thinker's cache; thinker and talker: where their prompts stand (a Talker may hear the
    user's turns only); in_user: whether a user turn is open; owed: ids of the last reply that are still to be read;
    waiting: text to be read with what follows, and whether the user said it; past: what was read, for `drop_turns`,
    with media embeddings only if `keep_media`.
    """

    rows: Rows
    row: int
    prefill_tokens: int = 512
    ids: list[int] = field(default_factory=list)
    thinker: Place = field(default_factory=Place)
    talker: Place = field(default_factory=Place)
    in_user: bool = False
    owed: list[int] = field(default_factory=list)
    waiting: list[tuple[list[int], bool]] = field(default_factory=list)
    between: Callable[[], None] | None = None  # called between the pieces of a long prompt
    keep_media: bool = False
    past: list[Entry] = field(default_factory=list)
    before_reply: int = 0  # entries of the past when the last reply began
    heard_before: Place = field(default_factory=Place)  # where the Talker's prompt stood then

    @property
    def model(self) -> ModelParts:
        return self.rows.model

    def check_room(self, tokens: int) -> None:
        """Raise ValueError if that many more tokens have no position left."""
        config = self.model.config
        limit = config.thinker.text_config.max_position_embeddings
        used = len(self.ids) + sum(len(ids) for ids, _ in self.waiting)
        if used + tokens >= limit:
            raise ValueError(
                f"the session is full: {used} of {limit} positions are used and {tokens} more are needed; "
                "make room with drop_oldest_turns(), or start a new session with a summary of this one"
            )

    def write_text(self, ids: list[int]) -> None:
        """Take text tokens; they are read together with what comes before a medium or the reply."""
        self.check_room(len(ids))
        if ids:
            self.waiting.append((list(ids), self.in_user))

    @torch.no_grad()
    def flush(self) -> None:
        """Read the text that waits, in as few passes as `prefill_tokens` allows."""
        waiting, self.waiting = self.waiting, []
        ids = [token for piece, _ in waiting for token in piece]
        said = [by_user for piece, by_user in waiting for _ in piece]
        self.past += [Entry(piece, in_user=by_user, begins_turn=not piece) for piece, by_user in waiting]
        for first in range(0, len(ids), self.prefill_tokens):
            part = slice(first, first + self.prefill_tokens)
            self._read_text(ids[part], said[part])
            if self.between is not None:
                self.between()

    def _read_text(self, ids: list[int], said: list[bool]) -> None:
        """One pass over text; `said` tells which tokens are the user's."""
        embeds = self.model.require("thinker").embed_tokens(torch.tensor(ids, device=self.model.device))
        offsets = torch.arange(len(ids), dtype=torch.float32).expand(3, -1)
        hidden = self._think(ids, offsets, embeds, None)
        self.thinker.start += len(ids)
        if heard := [i for i, by_user in enumerate(said) if self.in_talker_prompt(by_user)]:
            at = torch.tensor(heard, device=embeds.device)
            self._hear(offsets[:, : len(heard)], self.model.require("talker").text_vectors(embeds[at], hidden[at]))
            self.talker.start += len(heard)

    def in_talker_prompt(self, by_user: bool) -> bool:
        """Whether the user's tokens, or those that are not the user's, belong to the Talker's prompt."""
        return self.rows.layout is not None and self.rows.layout.in_prompt(by_user)

    def write(self, ids: list[int], segment: Segment, embeds: Tensor, taps: Tensor | None = None) -> None:
        """Read a whole media segment: embeds [n, D], taps [n_taps, n, D]."""
        offsets, length = segment_positions(segment, 0.0, self._rule)
        self.write_at(ids, offsets, embeds, taps)
        self.move_on(length)

    @torch.no_grad()
    def write_at(self, ids: list[int], offsets: Tensor, embeds: Tensor, taps: Tensor | None = None) -> None:
        """Read a piece of the current media segment, whose positions are `offsets` [3, n] from its start."""
        self.flush()
        self.check_room(len(ids))
        for first in range(0, len(ids), self.prefill_tokens):
            part = slice(first, first + self.prefill_tokens)
            hidden = self._think(ids[part], offsets[:, part], embeds[part], None if taps is None else taps[:, part])
            if self.in_talker_prompt(self.in_user):
                self._hear(offsets[:, part], self.model.require("talker").media_vectors(hidden))
            if self.between is not None:
                self.between()
        entry = Entry(list(ids), media=True, in_user=self.in_user)
        if self.keep_media:
            entry = replace(entry, offsets=offsets, embeds=embeds, taps=taps)
        self.past.append(entry)

    def move_on(self, length: float) -> None:
        """End the current media segment: the next segment begins `length` positions further on."""
        self.flush()
        self.past.append(Entry([], length=length, in_user=self.in_user))
        self.thinker.start += length
        if self.in_talker_prompt(self.in_user):
            self.talker.start += length

    def _think(self, ids: list[int], offsets: Tensor, embeds: Tensor, taps: Tensor | None) -> Tensor:
        """The Thinker reads a piece -> hidden states [n, D]."""
        positions = offsets + torch.tensor(self.thinker.start, dtype=torch.float32)
        with self.rows.stage("thinker_prefill"):
            hidden = self.rows.read_text(self.row, ids, embeds, positions.to(embeds.device), taps)
        self.ids += ids
        self.thinker.highest = max(self.thinker.highest, float(positions.max()))
        self.thinker.tokens += len(ids)
        return hidden

    def _hear(self, offsets: Tensor, vectors: Tensor) -> None:
        """The Talker reads a piece of what it hears: vectors [n, Di]."""
        positions = offsets + torch.tensor(self.talker.start, dtype=torch.float32)
        with self.rows.stage("talker_prefill"):
            self.rows.read_speech(self.row, vectors, positions.to(vectors.device))
        self.talker.highest = max(self.talker.highest, float(positions.max()))
        self.talker.tokens += len(vectors)

    def open_user_turn(self) -> None:
        """What follows is said by the user."""
        self.in_user = True
        self.waiting.append(([], True))  # an empty text marks the place

    def fork(self, rows: Rows, row: int) -> Conversation:
        """The same past in another, empty row."""
        self.flush()
        self.rows.copy_row(self.row, rows, row)
        return Conversation(
            rows,
            row,
            self.prefill_tokens,
            list(self.ids),
            self.thinker.copy(),
            self.talker.copy(),
            self.in_user,
            list(self.owed),
            [],
            self.between,
            self.keep_media,
            list(self.past),
        )

    def begin_reply(self) -> None:
        """Read what waits and say where the reply's first token stands."""
        self.flush()
        self.before_reply, self.heard_before = len(self.past), self.talker.copy()
        self.rows.text.decoder.next_position[self.row] = self.thinker.highest + 1

    @torch.no_grad()
    def end_reply(
        self, prompt: Place, reply: list[int], read: int, tail: list[int], vectors: Sequence[Tensor] = ()
    ) -> None:
        """Take over a reply of which the Thinker has read the first `read` ids; `tail` closes it.

        vectors: of what was read, for a Talker that hears everything. What is not read yet is owed and read before
        anything else. `prompt`: where the prompt stood. A reply begins after the largest position, the same ids in a
        prompt where the last segment ended; where these differ the reply is read again, so that what follows equals a
        run on the whole history.
        """
        del self.past[self.before_reply :]  # a reply may be cut a second time
        if self.rows.speech is not None:
            self.talker = self.heard_before.copy()
            self.rows.speech.decoder.cache.truncate(self.row, self.talker.tokens)
        if prompt.highest + 1 != prompt.start:
            read = 0
        self.rows.text.decoder.cache.truncate(self.row, prompt.tokens + read)
        kept = reply[:read]
        self.ids = self.ids[: prompt.tokens] + kept
        self.thinker.tokens = len(self.ids)
        self.thinker.start = prompt.start + len(kept)
        self.thinker.highest = max(prompt.highest, self.thinker.start - 1)
        if kept:
            self.past.append(Entry(kept))
            if self.in_talker_prompt(False):
                self._hear(torch.arange(read, dtype=torch.float32).expand(3, -1), torch.stack(list(vectors[:read])))
                self.talker.start += read
        self.owed = reply[read:] + tail
        seen = self.rows.text.seen
        seen[self.row] = False
        seen[self.row, torch.tensor(self.ids, device=seen.device)] = True

    def pay(self) -> None:
        """Read what is owed of the last reply."""
        self.write_text(self.owed)
        self.owed = []

    def drop_turns(self, count: int) -> int:
        """Forget the oldest `count` user turns with their replies and read the rest again; returns the ids freed.

        What came before the first user turn (the system text) stays. Raises ValueError if there are not so many turns,
        or if media that must be read again were not kept.
        """
        self.flush()
        begins = [i for i, entry in enumerate(self.past) if entry.begins_turn]
        if not 1 <= count < len(begins):
            raise ValueError(
                f"cannot drop {count} of {len(begins)} turns; the last one stays, so at most {len(begins) - 1}"
            )
        kept = self.past[: begins[0]] + self.past[begins[count] :]
        if any(entry.media and entry.embeds is None for entry in kept):
            raise ValueError(
                "the turns that stay hold sound or pictures, whose embeddings were not kept; make the session with "
                "keep_media=True, or drop more turns"
            )
        before, in_user = len(self.ids), self.in_user
        self.rows.clear(self.row)
        self.ids, self.thinker, self.talker, self.past = [], Place(), Place(), []
        for entry in kept:
            self.in_user = entry.in_user
            if entry.begins_turn:
                self.open_user_turn()
            elif not entry.ids:
                self.move_on(entry.length)
            elif entry.media:
                assert entry.offsets is not None and entry.embeds is not None
                self.write_at(entry.ids, entry.offsets, entry.embeds, entry.taps)
            else:
                self.write_text(entry.ids)
        self.flush()
        self.in_user = in_user
        return before - len(self.ids)

    @property
    def _rule(self) -> PositionRule:
        return self.model.config.thinker.position_rule
