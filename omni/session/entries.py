"""What a conversation is made of, as a model reads it: pieces of text, media as embeddings, steps of the position.

The position rules are those of `omni.rope.positions`, carried from entry to entry by a `PromptEnd`: `start` is where
the next segment begins, `highest` the largest position so far, after which a reply begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import numpy as np
from torch import Tensor

from omni.parts import ModelParts
from omni.talker.layout import PromptEnd


@dataclass(frozen=True, eq=False)
class Entry:
    """One step of a conversation; never changed once it is made.

    ids: tokens int64 as numbers. by_user: whether they belong to a user's turn. offsets fp32 [3, n]: of media, the
    positions from where their segment begins (None: text, one position a token). embeds [n, D] and taps [n_taps, n, D]
    of media, on the host (None: they were not kept). length: how far the next segment moves on, for an entry without
    ids. medium: which piece of media this is; copies without embeddings are the same piece.
    """

    ids: Sequence[int] = ()
    by_user: bool = False
    offsets: Tensor | None = None
    embeds: Tensor | None = None
    taps: Tensor | None = None
    length: float = 0.0
    medium: object = field(default_factory=object)

    @property
    def media(self) -> bool:
        """Whether it is a piece of sound or a picture."""
        return self.offsets is not None

    @cached_property
    def largest(self) -> np.float32:
        """The largest offset of media."""
        assert self.offsets is not None
        return np.float32(float(self.offsets.max()))

    @cached_property
    def bytes(self) -> int:
        """Of the embeddings that are kept."""
        kept = [tensor for tensor in (self.embeds, self.taps) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def forgotten(self) -> Entry:
        """The same piece of media without its embeddings."""
        return dataclasses.replace(self, embeds=None, taps=None)

    def same(self, other: Entry) -> bool:
        """Whether both are read alike."""
        if self is other:
            return True
        if self.media or other.media:
            return self.medium is other.medium
        return (self.ids, self.by_user, self.length) == (other.ids, other.by_user, other.length)

    def split(self, first: int) -> tuple[Entry, Entry]:
        """Text before and after its first so many tokens."""
        assert not self.media
        return Entry(self.ids[:first], self.by_user), Entry(self.ids[first:], self.by_user)


NOTHING = PromptEnd()


def after(end: PromptEnd, entry: Entry) -> PromptEnd:
    """Where a prompt ends once this entry is read."""
    if entry.offsets is not None:  # without tensors: this is asked of every entry of a long conversation
        if not entry.ids:
            return end
        highest = float(entry.largest + np.float32(end.start))  # as the positions are, in fp32
        return PromptEnd(end.start, max(end.highest, highest), end.tokens + len(entry.ids))
    if not entry.ids:
        return end.moved(entry.length)
    tokens, last = len(entry.ids), end.start + len(entry.ids) - 1
    return PromptEnd(end.start + tokens, max(end.highest, last), end.tokens + tokens)


def end_of(entries: Iterable[Entry], end: PromptEnd = NOTHING) -> PromptEnd:
    """Where a prompt ends after these entries, which follow one that ended at `end`."""
    for entry in entries:
        end = after(end, entry)
    return end


def ids_of(entries: Iterable[Entry]) -> list[int]:
    """All token ids."""
    return list(chain.from_iterable(entry.ids for entry in entries))


Encode = Callable[[str], list[int]]
Piece = str | Sequence[int]  # text, or tokens by their ids


class Writing:
    """Entries while they are written. Texts in a row become tokens together, so text at the end waits.

    entries: what is decided; tail: pieces that wait for what follows them.
    """

    def __init__(self, model: ModelParts, encode: Encode, *, by_user: bool = False) -> None:
        self.model, self.encode, self.by_user = model, encode, by_user
        self.entries: list[Entry] = []
        self.tail: tuple[Piece, ...] = ()

    def wait(self, piece: Piece) -> None:
        """Append a piece that is not decided before something else follows."""
        self.tail += (piece,) if piece else ()

    def write_text(self, piece: Piece) -> None:
        """Append text, or tokens by their ids, which decide the text before them."""
        self.wait(piece)
        if not isinstance(piece, str):
            self.flush()

    def write_at(self, ids: Sequence[int], offsets: Tensor, embeds: Tensor, taps: Tensor | None = None) -> None:
        """Append a piece of the current media segment: offsets [3, n], embeds [n, D], taps [n_taps, n, D].

        Raises ValueError for embeddings of another number or width.
        """
        width = self.model.config.thinker.text_config.hidden_size
        if embeds.shape != (len(ids), width):
            raise ValueError(
                f"{len(ids)} media tokens of {width} values are due, the encoder gave {list(embeds.shape)}"
            )
        self.flush()
        embeds, taps = self._on_host(embeds), None if taps is None else self._on_host(taps)
        self.entries.append(Entry(tuple(ids), self.by_user, offsets, embeds, taps))

    def _on_host(self, values: Tensor) -> Tensor:
        return values.detach().to("cpu", self.model.dtype)

    def keep(self, entries: Sequence[Entry]) -> None:
        """Append entries that were made before."""
        self.flush()
        self.entries.extend(dataclasses.replace(entry, by_user=self.by_user) for entry in entries)

    def move_on(self, length: float) -> None:
        """End the current media segment: the next segment begins `length` positions further on."""
        self.flush()
        self.entries.append(Entry((), self.by_user, length=length))

    def flush(self) -> None:
        """Turn the text that waits into tokens: what follows is no text."""
        if tail := self.tail_entries():
            self.entries.extend(tail)
        self.tail = ()

    def tail_entries(self) -> list[Entry]:
        """What waits, as it is if no more text follows."""
        return self.encoded(self.tail)

    def encoded(self, pieces: Sequence[Piece]) -> list[Entry]:
        """Pieces as entries; texts in a row become tokens together."""
        out = []
        for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            group: list[Any] = list(run)
            decided = [self.encode("".join(group))] if is_text else group
            out += [Entry(tuple(ids), self.by_user) for ids in decided if ids]
        return out

    def clone(self) -> Writing:
        """An independent copy."""
        new = Writing(self.model, self.encode, by_user=self.by_user)
        new.entries, new.tail = list(self.entries), self.tail
        return new
