"""When each word of a reply is spoken, estimated while its text and its sound come.

Each word is expected to take as long as its sounds usually do, at the pace so far (`spoken_words`); what of the sound
is loud or quiet, bright or dull tells how far it has come (`speech_marks`, `speech_walk`). Nothing is
learnt from a voice and no model is run. What is said at any time depends only on what has come until then.

Times are milliseconds from the first sample of the turn's sound.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from omni.generation.speech_marks import HOP_MS, SpeechMarks
from omni.generation.speech_walk import PROBABLE, SURE, SpeechWalk
from omni.generation.spoken_words import SILENCE, Sound, Word, split_words

_LEAD = Sound(SILENCE, 60.0)  # before the first word
_LETTER_MS = 70.0  # of a word that is not complete yet


class SpeechTimes:
    """The times of the words of one reply.

    `push_text` and `hear` take text and sound as they come, in any pieces; text is to be ahead of the sound that speaks
    it. given: the beginning of the text, which the prompt holds already. words: those that are complete. The time of a
    word is settled 1.5 to 2.5 s after it: later sound does not change it, and earlier sound is not kept.
    """

    def __init__(self, given: str = "") -> None:
        self.text = given
        self.given = len(given)
        self.words: list[Word] = []
        self._begins: list[int] = []  # the first sound of each word
        self._sounds = 1  # of words, and the silence before them
        self._marks = SpeechMarks()
        self._walk = SpeechWalk(_LEAD)
        self._last_begin_ms = 0.0
        self._add_words()

    def push_text(self, text: str) -> float:
        """More of what is spoken -> where it is expected to begin, as far as can be said now."""
        begin = len(self.text) + len(text) - len(text.lstrip())
        self.text += text
        self._add_words()
        self._listen()
        self._last_begin_ms = max(self._last_begin_ms, self._expected_ms(begin))
        return self._last_begin_ms

    def end_text(self) -> None:
        """No more text will come."""
        self._walk.text_over = True
        self._add_words()

    def hear(self, samples: NDArray[np.float32], sample_rate: int) -> None:
        """More sound: samples [n] in -1 .. 1."""
        self._marks.hear(samples, sample_rate)
        self._listen()

    def word_at(self, character: int) -> int:
        """The number of the word that a character belongs to; that of the next one where it is not complete yet."""
        if self.words and not self._walk.text_over and character >= self.words[-1].stop:
            return len(self.words)
        return max(0, bisect_right(self.words, character, key=lambda word: word.start) - 1)

    def word_ends_ms(self, *, sound_over: bool = False) -> list[float]:
        """When each word has almost certainly ended; `inf` where it has not, by the sound that has come.

        sound_over: the speech is complete, and has said all of a complete text.
        """
        entered = self._walk.entered(SURE, self._marks.waiting, all_said=sound_over)
        return [_first(entered, silence) for _, silence in self._places()]

    def word_spans_ms(self, *, sound_over: bool = False) -> list[tuple[float, float]]:
        """When each word probably begins and ends; `inf` where it has not, by the sound that has come."""
        entered = self._walk.entered(PROBABLE, self._marks.waiting, all_said=sound_over)
        return [(_first(entered, begin) - HOP_MS, _first(entered, silence)) for begin, silence in self._places()]

    def _places(self) -> list[tuple[int, int]]:
        """The number of each word's first sound, and of the silence after it."""
        return [(begin, begin + len(word.sounds) - 1) for begin, word in zip(self._begins, self.words)]

    def _add_words(self) -> None:
        start = self.words[-1].stop if self.words else 0
        for word in split_words(self.text, start, complete=self._walk.text_over):
            self.words.append(word)
            self._begins.append(self._sounds)
            self._sounds += len(word.sounds)
            self._walk.add(word.sounds)

    def _listen(self) -> None:
        """Take the hops that have come, as far as the text is ahead of them."""
        while self._marks.waiting and self._walk.may_go_on:
            self._walk.take(self._marks.waiting.popleft())

    def _expected_ms(self, character: int) -> float:
        """Where a character is expected, from the place that the speech has probably reached."""
        until_ms, number = self._walk.until_ms, self.word_at(character)
        if number < len(self.words):
            word = self.words[number]
            part = (character - word.start) / (word.stop - word.start)
            return self._walk.expected_ms(until_ms[self._begins[number]] + part * word.mean_ms)
        start = self.words[-1].stop if self.words else 0
        return self._walk.expected_ms(until_ms[-1] + _LETTER_MS * len(self.text[start:character].strip()))


def _first(entered: list[int], sound: int) -> float:
    """When a sound has been entered: the end of the hop."""
    hop = bisect_left(entered, sound)
    return (hop + 1) * HOP_MS if hop < len(entered) else math.inf
