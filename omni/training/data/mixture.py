"""Which row comes next: an endless, seeded draw from several manifests, the same after every restart.

The draws are counter-based: number t of a process depends on (seed, rank, t) alone, and so does the order of a
manifest's rows in each epoch on (seed, manifest, epoch). The state is therefore a few integers.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import isfinite
from typing import Any, NamedTuple

from omni.training.data.manifest import Manifest, Row

_ROUNDS = 6  # of the Feistel network; four give a pseudo-random permutation (Luby and Rackoff 1988)
_DRAWS, _ORDER = 0, 1  # what a random number is for


class Draw(NamedTuple):
    """One row, not yet read."""

    manifest: Manifest
    row: int

    @property
    def name(self) -> str:
        """Where the row is ("data.jsonl:17")."""
        return self.manifest.name(self.row)

    def read(self) -> Row:
        """The checked row; raises as `Manifest` does."""
        return self.manifest[self.row]


class Mixture:
    """An endless iterator of `Draw`: each comes from a manifest with the chance its weight gives it.

    A manifest's rows are shuffled anew in every epoch and read once each; processes read different ones (row numbers
    rank, rank + world_size, … of the shuffled order).

    Args:
        manifests: where rows come from.
        weights: shares of the draws, of any sum (None: as many as each has rows).
        seed: everything drawn follows from it.
        rank, world_size: this process among those that train together.
        keep: takes a row as it is written and says whether to use it; one that is turned down is replaced by the next
            of the same manifest, so shares stay, and counted in `dropped`. A row that cannot be read is passed on, so
            that its error is told where it is read.

    Raises ValueError for weights, ranks or counts that make no sense, and while iterating where `keep` accepts nothing.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        self.manifests = list(manifests)
        shares = [float(len(manifest)) for manifest in self.manifests] if weights is None else list(weights)
        if not self.manifests or len(shares) != len(self.manifests):
            raise ValueError(f"a mixture needs one weight for each manifest, got {len(shares)} for {len(manifests)}")
        if not all(isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
            raise ValueError(f"weights must be finite, not negative and not all zero, got {shares}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1 = {world_size - 1}, got {rank}")
        self._bounds = [bound / sum(shares) for bound in accumulate(shares)]
        self._last = max(i for i, share in enumerate(shares) if share > 0)  # takes what rounding leaves over
        self.seed, self.rank, self.world_size, self.keep = seed, rank, world_size, keep
        self.draws = 0
        self.taken = [0] * len(shares)
        self.dropped = [0] * len(shares)

    def __len__(self) -> int:
        """Rows of all manifests."""
        return sum(map(len, self.manifests))

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        share = random_number(self.seed, _DRAWS, self.rank, self.draws) / 2**64
        self.draws += 1
        number = min(bisect_right(self._bounds, share), self._last)
        for _ in range(2 * len(self.manifests[number]) + 1):
            draw = self._take(number)
            if self.keeps(draw):
                return draw
            self.dropped[number] += 1
        raise ValueError(
            f"keep turned down {2 * len(self.manifests[number]) + 1} rows of {self.manifests[number].path.name} one "
            "after the other; loosen it, or leave the manifest out"
        )

    def _take(self, number: int) -> Draw:
        """The next of this process's rows of one manifest."""
        manifest = self.manifests[number]
        epoch, place = divmod(self.taken[number] * self.world_size + self.rank, len(manifest))
        self.taken[number] += 1
        return Draw(manifest, shuffled(place, len(manifest), self.seed, _ORDER, number, epoch))

    def keeps(self, draw: Draw) -> bool:
        """Whether a row is used."""
        if self.keep is None:
            return True
        try:
            row = draw.manifest.raw(draw.row)
        except ValueError:
            return True
        return self.keep(row)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands: integers only, as many as there are manifests."""
        return {
            "draws": self.draws,
            "taken": list(self.taken),
            "dropped": list(self.dropped),
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "rows": [len(manifest) for manifest in self.manifests],
            "contents": [manifest.contents for manifest in self.manifests],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands. Raises ValueError where it belongs to other manifests, seeds or processes; warns
        where rows of a manifest were changed or put into another order since."""
        own = self.state_dict()
        for key in ("rows", "seed", "rank", "world_size"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the saved data position has {key} {state[key]}, this run {own[key]}; resume with the same "
                    "manifests, seed and number of processes, or start the data afresh"
                )
        before = state.get("contents", own["contents"])
        changed = [str(m.path) for m, was in zip(self.manifests, before) if m.contents != was]
        if changed:
            warnings.warn(
                f"the rows of {', '.join(changed)} were changed or reordered since the saved run read them: it goes on "
                "at the same places, where other rows may stand now, so some come twice and some not at all this epoch",
                stacklevel=4,
            )
        self.draws, self.taken, self.dropped = state["draws"], list(state["taken"]), list(state["dropped"])


def random_number(*key: int) -> int:
    """64 random bits that depend on the integers of `key` alone."""
    return int.from_bytes(hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest(), "little")


def shuffled(place: int, count: int, *key: int) -> int:
    """Where `place` of 0..count - 1 goes in the permutation that `key` names, without making the permutation.

    A Feistel network over the next power of four, walked until it falls inside (Black and Rogaway 2002).
    """
    bits = max(2, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (random_number(*key, number, right) & mask)
        place = left << bits | right
        if place < count:
            return place
