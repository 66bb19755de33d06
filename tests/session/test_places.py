"""More sessions than rows: who has a row, who waits for one, and whose caches move."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from omni.session.places import EngineFullError, Place, Places
from omni.session.scheduler import WAIT


class Rows:
    """Rows that hold one word each; `busy` places have something to do."""

    def __init__(self, rows: int, parked: int) -> None:
        self.words = [""] * rows
        self.busy: set[Place] = set()
        self.broken: set[str] = set()
        self.places = Places(
            rows, parked, save=self.save, load=self.load, clear=self.clear, idle=lambda place: place not in self.busy
        )

    def save(self, row: int) -> str:
        assert "save" not in self.broken or self.fail()
        return self.words[row]

    def load(self, row: int, word: str) -> None:
        assert not self.words[row], "a row is empty before something is put into it"
        self.words[row] = word
        assert "load" not in self.broken or self.fail()

    def fail(self) -> bool:
        raise MemoryError("no memory")

    def clear(self, row: int) -> None:
        self.words[row] = ""

    def write(self, place: Place, word: str) -> Generator[Any, None, str]:
        assert place.row is not None
        self.words[place.row] += word
        return self.words[place.row]
        yield

    def job(self, place: Place, word: str = "", *, ahead: bool = False) -> Generator[Any, None, Any]:
        """A job that writes a word into the place's row and returns what stands there."""
        return self.places.with_row(place, lambda: self.write(place, word), ahead=ahead)


def finish(job: Generator[Any, None, Any]) -> Any:
    """Run a job to its end -> its result; WAIT if it has to wait."""
    while True:
        try:
            if next(job) is WAIT:
                return WAIT
        except StopIteration as end:
            return end.value


def test_an_idle_session_used_least_recently_makes_room_and_comes_back_as_it_was() -> None:
    rows = Rows(2, 2)
    a, b, c, d = (rows.places.add() for _ in range(4))
    for place, word in ((a, "a"), (b, "b"), (a, "A"), (c, "c"), (d, "d")):
        finish(rows.job(place, word))
    assert (a.saved, b.saved, rows.words) == ("aA", "b", ["d", "c"])
    assert finish(rows.job(b)) == "b" and (c.row, c.saved, b.saved) == (None, "c", None)
    assert [finish(rows.job(place)) for place in (a, b, c, d)] == ["aA", "b", "c", "d"]


def test_only_so_many_sessions() -> None:
    rows = Rows(2, 1)
    places = [rows.places.add() for _ in range(3)]
    with pytest.raises(EngineFullError, match="all 2 sessions and 1 parked"):
        rows.places.add()
    finish(rows.job(places[0], "x"))
    rows.places.remove(places[0])
    rows.places.remove(places[0])
    assert rows.words == ["", ""] and finish(rows.job(rows.places.add())) == ""
    with pytest.raises(ValueError, match="closed"):
        finish(rows.job(places[0]))


def test_those_that_wait_get_rows_in_order_and_nobody_overtakes() -> None:
    rows = Rows(1, 3)
    first, second, third, fourth = (rows.places.add() for _ in range(4))
    finish(rows.job(first, "1"))
    rows.busy |= {first, second, third}
    waiting = [rows.job(place, word) for place, word in ((second, "2"), (third, "3"))]
    assert [finish(job) for job in waiting] == [WAIT, WAIT]
    rows.busy -= {first}
    assert finish(rows.job(fourth, "4")) is WAIT  # a row could be had, but others were first
    assert finish(waiting[1]) is WAIT
    assert finish(waiting[0]) == "2" and finish(waiting[1]) is WAIT
    rows.busy -= {second}
    assert finish(waiting[1]) == "3"


def test_who_leaves_the_queue_lets_the_next_one_through() -> None:
    rows = Rows(1, 2)
    first, second, third = (rows.places.add() for _ in range(3))
    finish(rows.job(first))
    rows.busy |= {first}
    waiting = [rows.job(second), rows.job(third, "3")]
    assert [finish(job) for job in waiting] == [WAIT, WAIT]
    waiting[0].close()
    rows.busy.clear()
    assert finish(waiting[1]) == "3"


def test_the_row_that_was_to_be_had_is_busy_again_when_leave_is_given() -> None:
    rows = Rows(1, 1)
    first, second = (rows.places.add() for _ in range(2))
    finish(rows.job(first, "1"))
    job = rows.job(second, "2")
    assert next(job) is None  # asks for leave to move
    rows.busy.add(first)
    assert next(job) is WAIT and first.row == 0
    rows.busy.clear()
    assert finish(job) == "2"


def test_what_is_read_in_advance_is_dropped_rather_than_made_to_wait() -> None:
    rows = Rows(1, 2)
    first, second, third = (rows.places.add() for _ in range(3))
    assert finish(rows.job(first, "1", ahead=True)) == "1"
    assert finish(rows.job(second, "2", ahead=True)) is None and first.row == 0  # it was used just now
    for _ in range(3):
        finish(rows.job(first, ".", ahead=True))
    assert finish(rows.job(second, "2", ahead=True)) is None
    finish(rows.job(first))
    for _ in range(4):
        rows.places._clock += 1  # others' jobs
    assert finish(rows.job(second, "2", ahead=True)) == "2" and first.saved == "1..."
    rows.busy.add(second)
    assert finish(rows.job(third, "3")) is WAIT
    assert finish(rows.job(first, ahead=True)) is None


@pytest.mark.parametrize("part", ["save", "load"])
def test_a_move_that_fails_changes_nothing(part: str) -> None:
    rows = Rows(1, 1)
    first, second = (rows.places.add() for _ in range(2))
    finish(rows.job(first, "1"))
    finish(rows.job(second, "2"))
    rows.broken = {part}
    with pytest.raises(MemoryError):
        finish(rows.job(first))
    rows.broken = set()
    assert finish(rows.job(first)) == "1" and finish(rows.job(second)) == "2"
