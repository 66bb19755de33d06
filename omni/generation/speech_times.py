"""When each word of a reply is spoken, estimated while its text and its sound come.

A hidden Markov model walks through the sounds that the text stands for (`omni.generation.spoken_words`), each about as
long as such a sound usually is at the pace so far, and hears of the speech how loud and how bright it is. Nothing is
learnt from a voice and no model is run. What it says depends only on what has come so far: the forward pass runs along
with the sound, the backward pass goes from the last sound that has come.

Times are milliseconds from the first sample. Shapes: T hops of sound, U sounds expected of the text so far.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omni.generation.speech_marks import HOP_MS, SpeechMarks
from omni.generation.spoken_words import SILENCE, Word, split_words

Numbers = NDArray[np.float64]

_LEAD_MS = 60.0  # of silence before the first word
_USUAL_MS = 1000.0  # of speech at the usual pace, which the estimate of the pace begins with
_PACES = (0.6, 2.5)  # slowest and fastest speech that is believed, in usual lengths
_REACH = 4  # sounds that one hop may go on by, and one more: up to two that may be missing are passed over
_FASTEST = 0.95  # chance of leaving half a sound in a hop, at most
_UNLIKELY = 1e-7  # places that are forgotten
_UNSAID_MS = 70.0  # a letter, where the word is not complete yet


class _Step(NamedTuple):
    """A hop: where the speech may be after it. Sounds from `low` on, in their first and second halves [u]; the pace."""

    low: int
    first: Numbers
    second: Numbers
    pace: float

    @property
    def high(self) -> int:
        return self.low + len(self.first)


class SpeechTimes:
    """The times of the words of one reply.

    `push_text` and `hear` take text and sound as they come, in any pieces; text is to be ahead of the sound that speaks
    it. given: the beginning of the text, which the prompt holds already. words: those that are complete.
    """

    def __init__(self, given: str = "") -> None:
        self.text = given
        self.given = len(given)
        self.text_over = False
        self.words: list[Word] = []
        self._begins: list[int] = []  # the first sound of each word
        self._kind = np.array([SILENCE])  # [U] of the sounds expected
        self._mean_ms = np.array([_LEAD_MS])
        self._often = np.array([1.0])
        self._until_ms = np.array([0.0, _LEAD_MS])  # [U + 1] usual time before each sound
        self._marks = SpeechMarks()
        self._steps: list[_Step] = []
        self._now = _Step(0, np.array([1.0]), np.array([0.0]), 1.0)
        self._last_begin_ms = 0.0
        self._add_words()

    def push_text(self, text: str) -> float:
        """More of what is spoken -> where it is expected to begin, as far as can be said now."""
        at = len(self.text)
        self.text += text
        self._add_words()
        self._listen()
        self._last_begin_ms = max(self._last_begin_ms, self._expected_ms(at + len(text) - len(text.lstrip())))
        return self._last_begin_ms

    def end_text(self) -> None:
        """No more text will come."""
        self.text_over = True
        self._add_words()

    def hear(self, samples: NDArray[np.float32], sample_rate: int) -> None:
        """More sound: samples [n] in -1 .. 1."""
        self._marks.hear(samples, sample_rate)
        self._listen()

    def word_at(self, character: int) -> int:
        """The number of the word that a character belongs to; that of the next one where it is not complete yet."""
        if self.words and not self.text_over and character >= self.words[-1].stop:
            return len(self.words)
        return max(0, bisect_right(self.words, character, key=lambda word: word.start) - 1)

    def word_ends_ms(self, certainty: float, *, sound_over: bool = False) -> list[float]:
        """When each word has ended with that certainty; `inf` where it has not, by the sound that has come.

        sound_over: the speech is complete, and has said all of a complete text.
        """
        return self._crossings(certainty, sound_over)[1]

    def word_spans_ms(self, *, sound_over: bool = False) -> list[tuple[float, float]]:
        """When each word probably begins and ends; `inf` where it has not, by the sound that has come."""
        return list(zip(*self._crossings(0.5, sound_over)))

    # the text

    def _add_words(self) -> None:
        new = split_words(self.text, self.words[-1].stop if self.words else 0, complete=self.text_over)
        for word in new:
            self._begins.append(len(self._kind))
            self._kind = np.append(self._kind, [sound.kind for sound in word.sounds])
            self._mean_ms = np.append(self._mean_ms, [sound.mean_ms for sound in word.sounds])
            self._often = np.append(self._often, [sound.often for sound in word.sounds])
        if new:
            self.words += new
            self._until_ms = np.concatenate(([0.0], np.cumsum(self._mean_ms * self._often)))

    def _expected_ms(self, character: int) -> float:
        """Where a character is expected, from the place that the speech has probably reached."""
        now, usual = self._now, None
        for word, begin in zip(reversed(self.words), reversed(self._begins)):
            if word.start <= character < word.stop:
                usual = self._until_ms[begin] + word.mean_ms * (character - word.start) / (word.stop - word.start)
                break
        if usual is None:
            start = self.words[-1].stop if self.words else 0
            said = self.text[start:character].strip()
            usual = self._until_ms[-1] + _UNSAID_MS * len(said)
        return max(0.0, len(self._steps) * HOP_MS + float(usual - self._place_ms(now)) * now.pace)

    # forward

    def _listen(self) -> None:
        """Take the hops that have come, as far as the text is ahead of them."""
        while len(self._steps) < len(self._marks.likely) and (self.text_over or self._now.high + 2 < len(self._kind)):
            self._take_hop()

    def _take_hop(self) -> None:
        now, low = self._now, self._now.low
        high = min(now.high + _REACH, len(self._kind))
        size = len(now.first)
        first, second = np.zeros(high - low), np.zeros(high - low)
        first[:size], second[:size] = now.first, now.second
        leave = self._leave(low, high, now.pace)
        left = second * leave
        entered = self._enter(left, low, high)
        second += first * leave - left
        first += entered - first * leave
        second[-1] += max(0.0, float(left.sum() - entered.sum()))  # nothing is known to follow
        likely = self._marks.likely[len(self._steps)][self._kind[low:high]]
        first *= likely
        second *= likely
        total = first + second
        whole = float(total.sum())
        near = np.flatnonzero(total > _UNLIKELY * whole)
        begin, end = int(near[0]), int(near[-1]) + 1
        step = _Step(low + begin, first[begin:end] / whole, second[begin:end] / whole, now.pace)
        self._steps.append(step)
        heard_ms, usual_ms = len(self._steps) * HOP_MS, self._place_ms(step)
        pace = (_USUAL_MS + heard_ms) / (_USUAL_MS + usual_ms)
        self._now = step._replace(pace=min(max(pace, _PACES[0]), _PACES[1]))

    def _place_ms(self, step: _Step) -> float:
        """The usual time of where the speech probably is."""
        middle = self._until_ms[step.low : step.high] + 0.5 * self._mean_ms[step.low : step.high]
        return float((step.first + step.second) @ middle)

    def _leave(self, low: int, high: int, pace: float) -> Numbers:
        """The chance that half a sound ends in a hop [u]."""
        return np.minimum(_FASTEST, 2 * HOP_MS / (self._mean_ms[low:high] * pace))

    def _enter(self, left: Numbers, low: int, high: int) -> Numbers:
        """Which sounds begin where others have ended [u] -> [u]; some may be missing."""
        often, begun = self._often[low:high], np.zeros_like(left)
        begun[1:] = left[:-1] * often[1:]
        missing = left[:-1] * (1 - often[1:])
        begun[2:] += missing[:-1] * often[2:]
        begun[3:] += missing[:-2] * (1 - often[2:-1])
        return begun

    # backward

    def _follow(self, begun: Numbers, low: int, high: int) -> Numbers:
        """What an end of each sound makes of the chances `begun` of what begins then: `_enter`, backwards."""
        often, ended = self._often[low:high], np.zeros_like(begun)
        ended[:-1] = often[1:] * begun[1:]
        ended[:-2] += (1 - often[1:-1]) * often[2:] * begun[2:]
        ended[:-3] += (1 - often[1:-2]) * (1 - often[2:-1]) * begun[3:]
        return ended

    def _crossings(self, certainty: float, sound_over: bool) -> tuple[list[float], list[float]]:
        """When each word has begun, and ended, with that certainty."""
        kept = len(self._steps), self._now
        while len(self._steps) < len(self._marks.likely):  # as if no more text came
            self._take_hop()
        begins = np.array(self._begins, dtype=np.int64)
        ends = np.array([begin + len(word.sounds) - 1 for begin, word in zip(self._begins, self.words)], dtype=np.int64)
        begun_ms, ended_ms = np.full(len(ends), math.inf), np.full(len(ends), math.inf)
        for hop, low, places in self._smoothed(sound_over and self.text_over):
            reached = np.cumsum(places[::-1])[::-1]  # the chance of being at a sound or after it
            for which, times in ((begins, begun_ms), (ends, ended_ms)):
                near = slice(0, int(np.searchsorted(which, low + len(reached))))
                sure = np.append(reached, 0.0)[np.maximum(which[near] - low, 0)] >= certainty
                times[near][sure] = hop * HOP_MS
        del self._steps[kept[0] :]
        self._now = kept[1]
        return (begun_ms).tolist(), (ended_ms + HOP_MS).tolist()

    def _smoothed(self, all_said: bool) -> Iterator[tuple[int, int, Numbers]]:
        """From the last hop to the first: its number, and the chances of sounds from `low` on, given all hops."""
        after: _Step | None = None
        first_after = second_after = np.zeros(0)
        for hop in range(len(self._steps) - 1, -1, -1):
            step = self._steps[hop]
            low, high = step.low, min(step.high + _REACH, len(self._kind))
            if after is None:
                first_after = second_after = np.ones(len(step.first))
                if all_said:
                    last = np.arange(step.low, step.high) >= len(self._kind) - 2
                    first_after = second_after = np.where(last, 1.0, 1e-9)
            else:
                begun, gone = np.zeros(high - low), np.zeros(high - low)
                likely = self._marks.likely[hop + 1][self._kind[after.low : after.high]]
                at = slice(after.low - low, min(after.high, high) - low)
                size = at.stop - at.start
                begun[at], gone[at] = (first_after * likely)[:size], (second_after * likely)[:size]
                leave = self._leave(low, high, self._paces(hop))
                following = self._follow(begun, low, high)
                if high == len(self._kind):
                    following[-1] += gone[-1]
                size = len(step.first)
                first_after = ((1 - leave) * begun + leave * gone)[:size]
                second_after = ((1 - leave) * gone + leave * following)[:size]
                most = max(float(first_after.max()), float(second_after.max()), 1e-300)
                first_after, second_after = first_after / most, second_after / most
            places = step.first * first_after + step.second * second_after
            total = float(places.sum())
            yield hop, low, places / total if total > 0 else step.first + step.second
            after = step

    def _paces(self, hop: int) -> float:
        """The pace that the hop after this one was taken at."""
        return self._steps[hop + 1].pace
