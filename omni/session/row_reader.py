"""What a row has read, and how its caches are made equal to a list of entries: keep what is the same, read the rest.

All that is here touches the row's states, so in an engine it runs in the engine's thread. Work comes in pieces: the
generators yield before each, and may be closed there. What has been read is noted after the caches hold it, so that the
row is sound wherever a piece is cut: what lies beyond the note is written over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.generation.rows import Rows
from omni.parts import ModelParts
from omni.session.entries import Entry, after, ids_of
from omni.session.jobs import Steps
from omni.talker.layout import PromptEnd


class Read(NamedTuple):
    """An entry that the caches hold, and where the Thinker's and the Talker's prompts end after it."""

    entry: Entry
    thinker: PromptEnd
    talker: PromptEnd


class RowReader:
    """One row of `rows`.

    done: the entries that its caches hold, in order. given: vectors [Di] of the beginning of a reply that a Talker of
    the whole prompt speaks, and what the Thinker has read of it, which the Talker has not.
    """

    def __init__(self, rows: Rows, row: int, prefill_tokens: int) -> None:
        self.rows, self.row, self.prefill_tokens = rows, row, prefill_tokens
        self.done: list[Read] = []
        self.given: tuple[Entry, list[Tensor]] | None = None
        self._note: RowNote | None = None  # of what is being written over

    @property
    def model(self) -> ModelParts:
        return self.rows.model

    @property
    def thinker(self) -> PromptEnd:
        """Where the Thinker's prompt ends."""
        return self.done[-1].thinker if self.done else PromptEnd()

    @property
    def talker(self) -> PromptEnd:
        """Where the Talker's prompt ends, which may be the user's turns alone."""
        return self.done[-1].talker if self.done else PromptEnd()

    @property
    def by_hidden(self) -> bool:
        """Whether a Talker reads what the Thinker has made of a text, so that the Thinker reads it first."""
        return self.rows.layout is not None and self.rows.layout.text_by_hidden

    def in_talker_prompt(self, by_user: bool) -> bool:
        """Whether the user's tokens, or those that are not the user's, belong to the Talker's prompt."""
        return self.rows.layout is not None and self.rows.layout.in_prompt(by_user)

    # reading

    @torch.no_grad()
    def read(self, entries: Sequence[Entry]) -> Steps[None]:
        """Let the row hold exactly these entries, in as few passes as `prefill_tokens` allows; yields before each.

        If it fails or is closed, the row holds a beginning of what it held before or of the entries; media that could
        not be read again are put back.
        """
        self.settle()
        whole, tokens = self._common(entries)
        lost = [read.entry for read in self.done[whole:] if read.entry.media and read.entry.embeds is None]
        if lost:
            self._note = RowNote(self, self._ends(entries, whole, tokens))
        self._cut(entries, whole, tokens)
        try:
            first = entries[whole].split(tokens)[1:] if tokens else ()
            yield from self._in_pieces(self._read_on([*first, *entries[whole + bool(tokens) :]]))
        except BaseException:
            self.settle()
            raise
        self._note = None
        self._cut(entries, len(entries), 0)  # the pieces become the entries again

    def read_entries(self, entries: Sequence[Entry]) -> int:
        """How many of these the row has read from the beginning."""
        return self._common(entries)[0]

    def hold(self, entries: Sequence[Entry]) -> None:
        """Note that the caches, which are filled from outside, hold these entries."""
        self.done = []
        self._note_read(entries)

    def lost(self, entries: Sequence[Entry]) -> bool:
        """Whether media among these would have to be read again and were not kept."""
        return any(entry.media and entry.embeds is None for entry in entries[self._common(entries)[0] :])

    def settle(self) -> None:
        """Put back what was being written over when it failed or was cut."""
        if self._note is not None:
            self._note.apply(self)
            self._note = None

    def _common(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """How much of what is read may stay: so many whole entries, and so many tokens of the text after them."""
        done = [read.entry for read in self.done]
        whole = _identical(entries, done)
        while whole < min(len(done), len(entries)) and entries[whole].same(done[whole]):
            whole += 1
        tokens, there = 0, 0  # of entries[whole], and of done[at]
        at = whole
        while at < len(done) and whole < len(entries):
            mine, other = entries[whole], done[at]
            if mine.media or other.media or not (mine.ids and other.ids):
                if tokens or there or not mine.same(other):
                    break
                whole, at = whole + 1, at + 1
                continue
            if mine.by_user != other.by_user:
                break
            count = min(len(mine.ids) - tokens, len(other.ids) - there)
            alike = 0
            while alike < count and mine.ids[tokens + alike] == other.ids[there + alike]:
                alike += 1
            tokens, there = tokens + alike, there + alike
            stop = alike < count
            if tokens == len(mine.ids):
                whole, tokens = whole + 1, 0
            if there == len(other.ids):
                at, there = at + 1, 0
            if stop:
                break
        return whole, tokens

    def _ends(self, entries: Sequence[Entry], whole: int, tokens: int) -> list[Read]:
        """The notes of so many entries and tokens of the next one, which are read."""
        kept = [*entries[:whole], *([entries[whole].split(tokens)[0]] if tokens else [])]
        done = self.done[: _identical(kept, [read.entry for read in self.done])]
        thinker, talker = (done[-1].thinker, done[-1].talker) if done else (PromptEnd(), PromptEnd())
        for entry in kept[len(done) :]:
            thinker = after(thinker, entry)
            talker = after(talker, entry) if self.in_talker_prompt(entry.by_user) else talker
            done.append(Read(entry, thinker, talker))
        return done

    def _cut(self, entries: Sequence[Entry], whole: int, tokens: int) -> None:
        """Forget all but so many entries and tokens, which are read."""
        self.done = self._ends(entries, whole, tokens)
        self.given = None
        self.set_lengths()

    def set_lengths(self) -> None:
        """Let the caches hold what is noted, and no more."""
        self.rows.text.decoder.cache.grow(self.row, self.thinker.tokens)
        if self.rows.speech is not None:
            self.rows.speech.decoder.cache.grow(self.row, self.talker.tokens)

    def _in_pieces(self, passes: Iterator[int]) -> Steps[None]:
        """Yield before each pass which share of a piece it is. passes: yields how many tokens.

        A piece has `prefill_tokens`; a short pass counts as a quarter of that, since it costs time of its own.
        """
        for tokens in passes:
            yield max(tokens / self.prefill_tokens, 0.25)

    def _read_on(self, entries: Sequence[Entry]) -> Iterator[int]:
        at = 0
        while at < len(entries):
            entry = entries[at]
            if entry.media:
                yield from self._read_media(entry)
                at += 1
            elif entry.ids:
                stop = next((i for i in range(at, len(entries)) if not _is_text(entries[i])), len(entries))
                yield from self._read_texts(entries[at:stop])
                at = stop
            else:
                self._note_read([entry])
                at += 1

    def _read_texts(self, entries: Sequence[Entry]) -> Iterator[int]:
        """Texts one after the other, several of them in one pass."""
        parts: list[Entry] = []
        for entry in entries:
            rest = entry
            while rest.ids:
                room = self.prefill_tokens - sum(len(part.ids) for part in parts)
                part, rest = rest.split(room) if len(rest.ids) > room else (rest, Entry())
                parts.append(part)
                if len(part.ids) == room:
                    yield self.prefill_tokens
                    self._read_text(parts)
                    parts = []
        if parts:
            yield sum(len(part.ids) for part in parts)
            self._read_text(parts)

    def _read_text(self, parts: list[Entry]) -> None:
        """One pass over texts."""
        ids = ids_of(parts)
        with self.model.reading_threads(len(ids)):
            self._prefill_text(ids, [part.by_user for part in parts for _ in part.ids])
        self._note_read(parts)

    def _prefill_text(self, ids: list[int], users: list[bool]) -> None:
        """Both models read ids; `users` tells which are the user's."""
        embeds = self.model.require("thinker").embed_tokens(torch.tensor(ids, device=self.model.device))
        offsets = one_each(len(ids))
        hidden = self._prefill_thinker(ids, offsets, embeds, None)
        if own := [i for i, by_user in enumerate(users) if self.in_talker_prompt(by_user)]:
            at = torch.tensor(own, device=embeds.device)
            vectors = self.model.require("talker").text_vectors(embeds[at], hidden[at])
            self._prefill_talker(offsets[:, : len(own)], vectors)

    def _read_media(self, entry: Entry) -> Iterator[int]:
        """A piece of a media segment; what was read of it counts once it is whole."""
        assert entry.offsets is not None
        if entry.embeds is None:
            raise ValueError(
                "sound or pictures that must be read again were not kept; make the session with keep_media"
            )
        device = self.model.device
        for first in range(0, len(entry.ids), self.prefill_tokens):
            yield min(len(entry.ids) - first, self.prefill_tokens)
            part = slice(first, first + self.prefill_tokens)
            taps = None if entry.taps is None else entry.taps[:, part].to(device, self.model.dtype)
            embeds, offsets = entry.embeds[part].to(device, self.model.dtype), entry.offsets[:, part]
            hidden = self._prefill_thinker(entry.ids[part], offsets, embeds, taps)
            if self.in_talker_prompt(entry.by_user):
                self._prefill_talker(offsets, self.model.require("talker").media_vectors(hidden))
        self._note_read([entry])

    def _note_read(self, entries: Sequence[Entry]) -> None:
        """Note what the caches hold."""
        thinker, talker, new = self.thinker, self.talker, []
        for entry in entries:
            thinker = after(thinker, entry)
            talker = after(talker, entry) if self.in_talker_prompt(entry.by_user) else talker
            new.append(Read(entry, thinker, talker))
        self.done += new

    def _prefill_thinker(self, ids: Sequence[int], offsets: Tensor, embeds: Tensor, taps: Tensor | None) -> Tensor:
        """The Thinker reads a piece -> hidden states [n, D]."""
        positions = offsets + torch.tensor(self.thinker.start, dtype=torch.float32)
        with self.rows.stage("thinker_prefill"):
            return self.rows.prefill_thinker(self.row, ids, embeds, positions.to(embeds.device), taps)

    def _prefill_talker(self, offsets: Tensor, vectors: Tensor) -> None:
        """The Talker reads a piece of its prompt: vectors [n, Di]."""
        positions = offsets + torch.tensor(self.talker.start, dtype=torch.float32)
        with self.rows.stage("talker_prefill"):
            self.rows.prefill_talker(self.row, vectors, positions.to(vectors.device))

    # replies

    @torch.no_grad()
    def begin_reply(self, entries: Sequence[Entry], aloud: Sequence[int]) -> Steps[Sequence[Any]]:
        """Read the prompt and set the position of the reply's first token.

        aloud: ids of its beginning that the Thinker reads and the Talker is to speak -> their texts, as it takes them.
        """
        self.settle()
        if self._common(entries)[0] == len(
            entries
        ):  # read for a reply that failed: the next token's logits are its own
            self._cut(entries, len(entries) - 1, 0)
        yield from self.read(entries)
        end, spoken = self.thinker, []
        if aloud:
            yield
            entry = Entry(tuple(aloud))
            embeds = self.model.require("thinker").embed_tokens(torch.tensor(aloud, device=self.model.device))
            hidden = self._prefill_thinker(aloud, one_each(len(aloud)), embeds, None)
            spoken = list(self.model.require("talker").text_vectors(embeds, hidden))
            self.given, end = (entry, spoken), after(end, entry)
        self.rows.text.decoder.next_position[self.row] = end.highest + 1
        self.rows.mark_seen(self.row, [*ids_of(entries), *aloud])
        return spoken

    @torch.no_grad()
    def end_reply(self, reply: Sequence[int], read: int, vectors: Sequence[Tensor], *, revocable: bool) -> None:
        """Note what the caches hold of a reply, of which the Thinker has read the first `read` ids.

        vectors: of what was read, for a Talker whose prompt is everything. A reply begins after the largest position,
        the same ids in a prompt where the last segment ended; where these differ nothing is noted and the reply is read
        again, so that what follows equals a run on the whole history. revocable: if it fails the reply can run on.
        """
        self.settle()
        self._note = RowNote(self, self.done) if revocable else None
        try:
            self._end_reply(reply, read, vectors)
        except BaseException:
            self.settle()
            raise
        self._note = None

    def _end_reply(self, reply: Sequence[int], read: int, vectors: Sequence[Tensor]) -> None:
        given, vectors = (self.given[0].ids, [*self.given[1], *vectors]) if self.given else ((), vectors)
        self.given = None
        end = after(self.thinker, Entry(given)) if given else self.thinker
        tokens = [*given, *(reply[:read] if end.highest + 1 == end.start else ())]
        if self.rows.speech is not None:
            self.rows.speech.decoder.cache.grow(self.row, self.talker.tokens)
        if tokens and self.in_talker_prompt(False):
            self._prefill_talker(one_each(len(tokens)), torch.stack(list(vectors[: len(tokens)])))
        if tokens:
            self._note_read([Entry(tuple(tokens))])
        self.set_lengths()


class RowNote:
    """One row as it is: what its caches hold behind `kept`, which a call may write over, on the host."""

    def __init__(self, reader: RowReader, kept: Sequence[Read]) -> None:
        self.done, self.given = list(reader.done), reader.given
        first = (kept[-1].thinker.tokens, kept[-1].talker.tokens) if kept else (0, 0)
        states = zip((reader.rows.text, reader.rows.speech), first)
        self.states = [
            (state, slot, self._take(state, reader.row, slot)) for state, slot in states if state is not None
        ]

    def _take(self, state: Any, row: int, first: int) -> tuple[int, dict[str, Tensor]]:
        cache, kept = state.decoder.cache, {}
        length = cache.lengths[row]
        for name in ("keys", "values"):
            kept[name] = getattr(cache, name)[:, row, :, first:length].to("cpu", copy=True)
        for f in dataclasses.fields(state):
            if isinstance(value := getattr(state, f.name), Tensor):
                kept[f.name] = value[row].clone()
        kept["next_position"] = state.decoder.next_position[row].clone()
        return length, kept

    @torch.no_grad()
    def apply(self, reader: RowReader) -> None:
        """Put the row back. It may be called again, if it was cut itself."""
        row = reader.row
        for state, first, (length, kept) in self.states:
            cache = state.decoder.cache
            cache.grow(row, length)
            for name, value in kept.items():
                if name in ("keys", "values"):
                    getattr(cache, name)[:, row, :, first:length] = value.to(cache.keys)
                elif name == "next_position":
                    state.decoder.next_position[row] = value
                else:
                    getattr(state, name)[row] = value
        reader.done, reader.given = list(self.done), self.given


def one_each(tokens: int) -> Tensor:
    """Offsets fp32 [3, n] of text: one position a token."""
    return torch.arange(tokens, dtype=torch.float32).expand(3, -1)


def _identical(entries: Sequence[Entry], others: Sequence[Entry]) -> int:
    """How many entries at the beginning of both are one object; quick, since it is asked with every push."""
    return next((i for i, same in enumerate(map(is_, entries, others)) if not same), min(len(entries), len(others)))


def _is_text(entry: Entry) -> bool:
    return bool(entry.ids) and not entry.media
