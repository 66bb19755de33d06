"""One conversation in one row: pieces of the prompt go into the caches of Thinker and Talker as they come.

The position rules are those of `omni.rope.positions`, carried from piece to piece by a `PromptEnd`: `start` is where
the next segment begins, `highest` the largest position so far, after which a reply begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from omni.config.positions import PositionRule
from omni.generation.rows import Rows
from omni.parts import ModelParts
from omni.rope.positions import Segment, segment_positions
from omni.talker.layout import PromptEnd


def _one_each(tokens: int) -> Tensor:
    """Offsets fp32 [3, n] of text: one position a token."""
    return torch.arange(tokens, dtype=torch.float32).expand(3, -1)


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


Piece = str | list[int]  # text, or tokens by their ids


@dataclass
class Conversation:
    """What a row has read so far.

    encode: text to ids; ids: all token ids in the Thinker's cache; thinker and talker: where their prompts end (the
    Talker's may be the user's turns alone); in_user: whether a user turn is open; pending: ids of the last reply that
    are still to be read; queued: pieces to be read with what follows, and whether they are the user's; past: what was
    read, for `drop_turns`, with media embeddings only if `keep_media`; allow_long: positions beyond the model's may be
    used; given: vectors [Di] of the beginning of a reply that the Talker speaks instead of reading it.
    """

    rows: Rows
    row: int
    encode: Callable[[str], list[int]]
    prefill_tokens: int = 512
    ids: list[int] = field(default_factory=list)
    thinker: PromptEnd = PromptEnd()
    talker: PromptEnd = PromptEnd()
    in_user: bool = False
    pending: list[int] = field(default_factory=list)
    queued: list[tuple[Piece, bool]] = field(default_factory=list)
    between: Callable[[], None] | None = None  # called between the pieces of a long prompt
    keep_media: bool = False
    past: list[Entry] = field(default_factory=list)
    allow_long: bool = False
    given: list[Tensor] = field(default_factory=list)
    past_before_reply: int = 0  # entries of the past when the last reply began
    talker_before_reply: PromptEnd = PromptEnd()

    @property
    def model(self) -> ModelParts:
        return self.rows.model

    @property
    def queued_ids(self) -> list[int]:
        """Ids of what is queued, as they are if no more text follows."""
        return [token for ids, _ in self._encoded(self.queued) for token in ids]

    def _encoded(self, queued: Sequence[tuple[Piece, bool]]) -> list[tuple[list[int], bool]]:
        """Pieces as ids; texts in a row become tokens together, as in a whole prompt."""
        out: list[Any] = []
        for is_text, run in groupby(queued, key=lambda piece: isinstance(piece[0], str)):
            if not is_text:
                out += run
                continue
            texts, users = zip(*run)
            if ids := self.encode("".join(texts)):
                out.append((ids, users[0]))
        return out

    def check_room(self, tokens: int, length: float | None = None) -> None:
        """Raise ValueError if that many more tokens have no position left.

        length: the positions that they take from where the next segment begins (None: one each).
        """
        limit = self.model.config.thinker.text_config.max_position_embeddings
        queued = len(self.queued_ids)
        begin = self.thinker.start + queued
        used = max(len(self.ids) + queued, math.ceil(max(begin, self.thinker.highest + 1)))
        needed = max(len(self.ids) + queued + tokens, math.ceil(begin + (tokens if length is None else length)))
        if max(used, needed) >= limit and not self.allow_long:
            raise ValueError(
                f"the session is full: {used} of {limit} positions are used and {max(needed - used, 0)} more are "
                "needed; make room with drop_oldest_turns(), or start a new session with a summary of this one"
            )

    def write_text(self, piece: Piece) -> None:
        """Append text, or tokens by their ids; they are read together with what comes before a medium or the reply.

        Texts in a row are one text. Raises ValueError if there is no room.
        """
        if not piece:
            return
        queued = [*self.queued, (piece, self.in_user)]
        self.check_room(sum(len(ids) for ids, _ in self._encoded(queued)) - len(self.queued_ids))
        self.queued = queued

    @torch.no_grad()
    def flush(self, *, more_text: bool = True) -> None:
        """Read what is queued, in as few passes as `prefill_tokens` allows.

        more_text: text may follow, whose first characters can change the last tokens: text at the end stays queued.
        """
        end = len(self.queued)
        while more_text and end and isinstance(self.queued[end - 1][0], str):
            end -= 1
        queued, self.queued = self._encoded(self.queued[:end]), self.queued[end:]
        ids = [token for piece, _ in queued for token in piece]
        users = [by_user for piece, by_user in queued for _ in piece]
        self.past += [Entry(piece, in_user=by_user, begins_turn=not piece) for piece, by_user in queued]
        for first in range(0, len(ids), self.prefill_tokens):
            part = slice(first, first + self.prefill_tokens)
            self._prefill_text(ids[part], users[part])
            if self.between is not None:
                self.between()

    def _prefill_text(self, ids: list[int], users: list[bool]) -> None:
        """One pass over text; `users` tells which tokens are the user's."""
        embeds = self.model.require("thinker").embed_tokens(torch.tensor(ids, device=self.model.device))
        offsets = _one_each(len(ids))
        hidden = self._prefill_thinker(ids, offsets, embeds, None)
        self.thinker = self.thinker.moved(len(ids))
        if own := [i for i, by_user in enumerate(users) if self.in_talker_prompt(by_user)]:
            at = torch.tensor(own, device=embeds.device)
            self._prefill_talker(
                offsets[:, : len(own)], self.model.require("talker").text_vectors(embeds[at], hidden[at])
            )
            self.talker = self.talker.moved(len(own))

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
        """Read a piece of the current media segment, whose positions are `offsets` [3, n] from its start.

        Raises ValueError for embeddings of another number or width, before anything is read.
        """
        width = self.model.config.thinker.text_config.hidden_size
        if embeds.shape != (len(ids), width):
            raise ValueError(
                f"{len(ids)} media tokens of {width} values are due, the encoder gave {list(embeds.shape)}"
            )
        embeds = embeds.to(self.model.dtype)
        self.flush()
        assert not self.queued, "a mark stands before a medium, so no text is open"
        self.check_room(len(ids), float(offsets.max()) + 1 if len(ids) else 0.0)
        for first in range(0, len(ids), self.prefill_tokens):
            part = slice(first, first + self.prefill_tokens)
            own_taps = None if taps is None else taps[:, part]
            hidden = self._prefill_thinker(ids[part], offsets[:, part], embeds[part], own_taps)
            if self.in_talker_prompt(self.in_user):
                self._prefill_talker(offsets[:, part], self.model.require("talker").media_vectors(hidden))
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
        self.thinker = self.thinker.moved(length)
        if self.in_talker_prompt(self.in_user):
            self.talker = self.talker.moved(length)

    def _prefill_thinker(self, ids: list[int], offsets: Tensor, embeds: Tensor, taps: Tensor | None) -> Tensor:
        """The Thinker reads a piece -> hidden states [n, D]."""
        positions = offsets + torch.tensor(self.thinker.start, dtype=torch.float32)
        with self.rows.stage("thinker_prefill"):
            hidden = self.rows.prefill_thinker(self.row, ids, embeds, positions.to(embeds.device), taps)
        self.ids += ids
        self.thinker = self.thinker.after(positions)
        return hidden

    def _prefill_talker(self, offsets: Tensor, vectors: Tensor) -> None:
        """The Talker reads a piece of its prompt: vectors [n, Di]."""
        positions = offsets + torch.tensor(self.talker.start, dtype=torch.float32)
        with self.rows.stage("talker_prefill"):
            self.rows.prefill_talker(self.row, vectors, positions.to(vectors.device))
        self.talker = self.talker.after(positions)

    def open_user_turn(self) -> None:
        """What follows is the user's."""
        self.in_user = True
        self.queued.append(([], True))  # an empty text marks the beginning

    def fork(self, rows: Rows, row: int) -> Conversation:
        """The same past in another, empty row."""
        self.rows.copy_row(self.row, rows, row)
        ids, pending, queued, past = list(self.ids), list(self.pending), list(self.queued), list(self.past)
        return replace(self, rows=rows, row=row, ids=ids, pending=pending, queued=queued, past=past)

    @property
    def reply_slots(self) -> tuple[int, int]:
        """The first slots of Thinker's and Talker's cache that the end of a reply may write over."""
        return len(self.ids), self.talker_before_reply.tokens

    @torch.no_grad()
    def begin_reply(self, given: list[int], spoken: int) -> Sequence[Any]:
        """Read the queued text and `given`, the beginning of the reply, and set the position of the rest's first token.

        spoken: how many of the last ids of `given` the Talker is to speak -> their texts, as it takes them.
        """
        silent, aloud = given[: len(given) - spoken], given[len(given) - spoken :]
        layout = self.rows.layout
        by_hidden = layout is not None and layout.text_by_hidden
        self.write_text(silent if by_hidden else given)
        self.flush(more_text=False)
        self.past_before_reply, self.talker_before_reply, self.given = len(self.past), self.talker, []
        if by_hidden and aloud:
            ids = torch.tensor(aloud, device=self.model.device)
            embeds = self.model.require("thinker").embed_tokens(ids)
            hidden = self._prefill_thinker(aloud, _one_each(len(aloud)), embeds, None)
            self.thinker = self.thinker.moved(len(aloud))
            self.past.append(Entry(aloud))
            self.past_before_reply = len(self.past)
            self.given = list(self.model.require("talker").text_vectors(embeds, hidden))
        self.rows.text.decoder.next_position[self.row] = self.thinker.highest + 1
        return self.given if by_hidden else aloud

    @torch.no_grad()
    def end_reply(
        self, prompt: PromptEnd, reply: list[int], read: int, tail: list[int], vectors: Sequence[Tensor] = ()
    ) -> None:
        """Append a reply of which the Thinker has read the first `read` ids to the history; `tail` closes it.

        vectors: of what was read, for a Talker whose prompt is everything. What is not read yet is pending and read
        before anything else. `prompt`: where the Thinker's prompt ended. A reply begins after the largest position, the
        same ids in a prompt where the last segment ended; where these differ the reply is read again, so that what
        follows equals a run on the whole history.
        """
        self.past = self.past[: self.past_before_reply]  # a reply may be cut a second time
        if self.rows.speech is not None:
            self.talker = self.talker_before_reply
            self.rows.speech.decoder.cache.truncate(self.row, self.talker.tokens)
            if self.given:
                self._prefill_talker(_one_each(len(self.given)), torch.stack(self.given))
                self.talker = self.talker.moved(len(self.given))
        if prompt.highest + 1 != prompt.start:
            read = 0
        self.rows.text.decoder.cache.truncate(self.row, prompt.tokens + read)
        kept = reply[:read]
        self.ids = self.ids[: prompt.tokens] + kept
        start = prompt.start + len(kept)
        self.thinker = PromptEnd(start, max(prompt.highest, start - 1), len(self.ids))
        if kept:
            self.past.append(Entry(kept))
            if self.in_talker_prompt(False):
                self._prefill_talker(_one_each(read), torch.stack(list(vectors[:read])))
                self.talker = self.talker.moved(read)
        self.pending = reply[read:] + tail
        self.rows.mark_seen(self.row, self.ids)

    def read_pending(self) -> None:
        """Queue what is pending of the last reply, before anything else."""
        self.write_text(self.pending)
        self.pending = []

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
        text, self.queued = self.queued, []
        self.rows.clear(self.row)
        self.ids, self.thinker, self.talker, self.past = [], PromptEnd(), PromptEnd(), []
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
        self.in_user, self.queued = in_user, text
        return before - len(self.ids)

    @property
    def _rule(self) -> PositionRule:
        return self.model.config.thinker.position_rule
