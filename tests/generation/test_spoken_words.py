"""Text as words, and the sounds that they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.generation.spoken_words import SILENCE, VOWEL, Word, split_words


def written(text: str) -> list[str]:
    return [text[word.start : word.stop] for word in split_words(text, complete=True)]


def lasts(text: str) -> float:
    return sum(word.mean_ms for word in split_words(text, complete=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the old king", ["the", " old", " king"]),
        ("Yes, I do.  ", ["Yes,", " I", " do.  "]),
        ("(a) - b!", ["(a)", " - b!"]),
        ("don't e-mail 3.5%", ["don't", " e-mail", " 3.5%"]),
        ("now—then", ["now—", "then"]),
        ("你好，世界。", ["你", "好，", "世", "界。"]),  # noqa: RUF001
        ("我有12本", ["我", "有", "12", "本"]),
        ("カメラ", ["カ", "メ", "ラ"]),
        ("안녕 세계", ["안녕", " 세계"]),
        ("привет, мир", ["привет,", " мир"]),
        ("... !", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert written(text) == words


def test_every_word_has_a_vowel_and_a_silence_behind_it() -> None:
    text = "the rhythm hmm USA 12 1999 2026 1,000,000 0071 $5 & 7% naïve Straße Ελλάδα שלום नमस्ते 你 カ 한 ² x"
    for word in split_words(text, complete=True):
        kinds = [sound.kind for sound in word.sounds]
        assert kinds[-1] == SILENCE and SILENCE not in kinds[:-1], word
        assert VOWEL in kinds or text[word.start : word.stop].strip() in ("hmm", "x"), text[word.start : word.stop]
        assert all(sound.mean_ms > 0 and 0 < sound.often <= 1 for sound in word.sounds)
        assert len(kinds) > 1


def test_what_takes_longer() -> None:
    assert lasts("12") > lasts("to") and lasts("1999") > lasts("12") and lasts("1234567") > lasts("1999")
    assert lasts("remembers") > lasts("sees") > lasts("a")
    assert lasts("GPU") > lasts("gnu")
    assert lasts("now. then") > lasts("now, then") > lasts("now then")
    assert 150 < lasts("你") < 350  # a syllable
    assert lasts("你好吗") == pytest.approx(3 * lasts("你"))
    assert lasts("made") < lasts("made a")


@given(st.lists(st.text("ab é.,-—12 你カ\n'", max_size=5), max_size=8))
def test_a_text_that_grows_has_the_words_of_the_whole(pieces: list[str]) -> None:
    words: list[Word] = []
    text = ""
    for piece in pieces:
        text += piece
        words += split_words(text, words[-1].stop if words else 0, complete=False)
    words += split_words(text, words[-1].stop if words else 0, complete=True)
    assert words == split_words(text, complete=True)
    assert [word.start for word in words[1:]] == [word.stop for word in words[:-1]]
    assert not words or (words[0].start, words[-1].stop) == (0, len(text))
