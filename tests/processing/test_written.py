"""Users' text in a template's hands: it is read as any other string, and what is made of it stays the user's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.processing.written import Alphabet, Written

text = st.text(alphabet="ab <|>\n\t/éß😀İ\ue0001", max_size=8)
number = st.integers(-3, 9)
METHODS: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    **dict.fromkeys(
        ("strip", "lstrip", "rstrip", "split", "rsplit"), st.one_of(st.just(()), st.tuples(text), st.none())
    ),
    **dict.fromkeys(("startswith", "endswith", "find", "rfind", "index", "count", "removeprefix"), st.tuples(text)),
    **dict.fromkeys(("removesuffix", "partition", "rpartition", "__contains__", "__add__", "__eq__"), st.tuples(text)),
    **dict.fromkeys(("__lt__", "__radd__"), st.tuples(text)),
    **dict.fromkeys(("upper", "lower", "title", "capitalize", "swapcase", "casefold"), st.just(())),
    **dict.fromkeys(("isdigit", "isspace", "isalpha", "islower", "__len__", "__hash__", "__iter__"), st.just(())),
    **dict.fromkeys(("center", "ljust", "zfill", "__mul__"), st.tuples(number)),
    "splitlines": st.tuples(st.booleans()),
    "__getitem__": st.tuples(st.one_of(st.integers(-9, 9), st.builds(slice, number, number))),
    "replace": st.tuples(text, text),
}


def plain(value: Any, alphabet: Alphabet) -> Any:
    """What stands in a result for a reader."""
    if isinstance(value, Written):
        return alphabet.restore(value)
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item, alphabet) for item in value)
    return value


def outcome(text: str, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "__radd__":  # which plain strings do not have
        return arguments[0] + text
    try:
        result = getattr(text, method)(*arguments)
        return list(result) if method == "__iter__" else result
    except (ValueError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mine", [False, True])
@given(data=st.data())
def test_a_written_text_reads_as_any_string(method: str, mine: bool, data: st.DataObject) -> None:
    alphabet = Alphabet(reserved="\ue000")  # a template's own
    written, arguments = data.draw(text), data.draw(METHODS[method]) or ()
    given_ = tuple(alphabet.write(a) if mine and isinstance(a, str) else a for a in arguments)
    result = outcome(alphabet.write(written), method, given_)
    assert plain(result, alphabet) == outcome(written, method, arguments)


@given(left=text, right=text, cut=number)
def test_the_parts_of_a_mixed_text_stay_whose_they_were(left: str, right: str, cut: int) -> None:
    alphabet = Alphabet(reserved=left)
    mixed = left + alphabet.write(right) + left
    assert isinstance(mixed, Written) and alphabet.restore(mixed) == left + right + left
    held = str.__str__(mixed)
    assert held.startswith(left) and held.endswith(left)
    middle = held[len(left) : len(held) - len(left)]
    assert len(middle) == len(right) and not set(middle) & set(left)
    for part in (mixed[cut:], *mixed.split("<"), *mixed.partition("|"), mixed.strip(), mixed.replace("a", left)):
        assert isinstance(part, Written)
        mine = [character for character in str.__iter__(part) if alphabet.holds(character)]
        assert alphabet.restore("".join(mine)) in right or "a" in right


def test_an_alphabet_that_is_used_up_says_so() -> None:
    alphabet = Alphabet()
    everything = "".join(map(chr, range(32, 0xD800)))
    assert alphabet.restore(alphabet.write(everything)) == everything
    with pytest.raises(ValueError, match="different characters"):
        alphabet.write("".join(map(chr, range(0x10000, 0x20000))))
