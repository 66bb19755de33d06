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
from collections.abc import Iterable, Iterator
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
_THERE = 0.99  # no sound is more certain: letters are silent, and speech may be ahead of what is believed
_SURE, _PROBABLE = 0.8, 0.5
_BLOCK, _LAG = 100, 150  # hops whose times are settled together, and how many more have to come before that


class _Step(NamedTuple):
    """A hop: where the speech may be after it. Sounds from `low` on, in their first and second halves [u]; the pace."""

    low: int
    first: Numbers
    second: Numbers
    pace: float

    @property
    def high(self) -> int:
        return self.low + len(self.first)


class _Crossed(NamedTuple):
    """When words have begun, and ended, with a certainty; `inf` where they have not."""

    begun: Numbers = np.zeros(0)
    ended: Numbers = np.zeros(0)

    def extended(self, later: _Crossed) -> _Crossed:
        """With what is known of later hops, and more words."""
        own = len(self.begun)
        begun, ended = later.begun.copy(), later.ended.copy()
        begun[:own] = np.minimum(self.begun, begun[:own])
        ended[:own] = np.minimum(self.ended, ended[:own])
        return _Crossed(begun, ended)


class SpeechTimes:
    """The times of the words of one reply.

    `push_text` and `hear` take text and sound as they come, in any pieces; text is to be ahead of the sound that speaks
    it. given: the beginning of the text, which the prompt holds already. words: those that are complete. Times of a
    word are settled 1.5 to 2.5 s after it; sound that follows later does not change them, and is not kept.
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
        self._next = np.zeros((3, 1))  # [3, U] how often a sound comes after the one before it, two or three before
        self._marks = SpeechMarks()
        self._steps: dict[int, _Step] = {}  # by hop; those that are settled are forgotten
        self._hops = self._settled = 0
        self._crossed = {_SURE: _Crossed(), _PROBABLE: _Crossed()}
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

    def word_ends_ms(self, *, sound_over: bool = False) -> list[float]:
        """When each word has almost certainly ended; `inf` where it has not, by the sound that has come.

        sound_over: the speech is complete, and has said all of a complete text.
        """
        return self._crossings(_SURE, sound_over).ended.tolist()

    def word_spans_ms(self, *, sound_over: bool = False) -> list[tuple[float, float]]:
        """When each word probably begins and ends; `inf` where it has not, by the sound that has come."""
        found = self._crossings(_PROBABLE, sound_over)
        return list(zip(found.begun.tolist(), found.ended.tolist()))

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
            often = np.minimum(self._often, _THERE)
            self._next = np.tile(often, (3, 1))
            self._next[1, 1:] *= 1 - often[:-1]
            self._next[2, 1:] *= 1 - often[:-1]
            self._next[2, 2:] *= 1 - often[:-2]

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
        return max(0.0, self._hops * HOP_MS + float(usual - self._place_ms(now)) * now.pace)

    # forward

    def _listen(self) -> None:
        """Take the hops that have come, as far as the text is ahead of them."""
        while self._hops < self._marks.hops and (self.text_over or self._now.high + 2 < len(self._kind)):
            self._take_hop()
            if self._hops == self._settled + _BLOCK + _LAG:
                self._settle()

    def _take_hop(self) -> None:
        now, low = self._now, self._now.low
        high, size = min(now.high + _REACH, len(self._kind)), len(now.first)
        first, second = np.zeros(high - low), np.zeros(high - low)
        first[:size], second[:size] = now.first, now.second
        leave = self._leave(low, high, now.pace)
        left, turned = second * leave, first * leave
        entered = np.zeros_like(left)
        for skipped, often in enumerate(self._next[:, low:high], 1):
            entered[skipped:] += left[:-skipped] * often[skipped:]
        second += turned - left
        first += entered - turned
        second[-1] += max(0.0, float(left.sum() - entered.sum()))  # nothing is known to follow
        likely = self._marks.likely[self._hops][self._kind[low:high]]
        first *= likely
        second *= likely
        total = first + second
        whole = float(total.sum())
        near = np.flatnonzero(total > _UNLIKELY * whole)
        begin, end = int(near[0]), int(near[-1]) + 1
        step = _Step(low + begin, first[begin:end] / whole, second[begin:end] / whole, now.pace)
        self._steps[self._hops] = step
        self._hops += 1
        pace = (_USUAL_MS + self._hops * HOP_MS) / (_USUAL_MS + self._place_ms(step))
        self._now = step._replace(pace=min(max(pace, _PACES[0]), _PACES[1]))

    def _place_ms(self, step: _Step) -> float:
        """The usual time of where the speech probably is."""
        middle = self._until_ms[step.low : step.high] + 0.5 * self._mean_ms[step.low : step.high]
        return float((step.first + step.second) @ middle)

    def _leave(self, low: int, high: int, pace: float) -> Numbers:
        """The chance that half a sound ends in a hop [u]."""
        return np.minimum(_FASTEST, 2 * HOP_MS / (self._mean_ms[low:high] * pace))

    # backward

    def _settle(self) -> None:
        """Settle the times in the next block of hops, and forget these."""
        stop = self._settled + _BLOCK
        places = [found for found in self._smoothed(all_said=False) if found[0] < stop]
        for certainty, crossed in self._crossed.items():
            self._crossed[certainty] = crossed.extended(self._find(places, certainty))
        for hop in range(self._settled, stop):
            del self._steps[hop], self._marks.likely[hop]
        self._settled = stop

    def _crossings(self, certainty: float, sound_over: bool) -> _Crossed:
        """When each word has begun, and ended, with that certainty."""
        hops, now = self._hops, self._now
        while self._hops < self._marks.hops:  # as if no more text came
            self._take_hop()
        found = self._find(self._smoothed(all_said=sound_over and self.text_over), certainty)
        for hop in range(hops, self._hops):
            del self._steps[hop]
        self._hops, self._now = hops, now
        return self._crossed[certainty].extended(found)

    def _find(self, places: Iterable[tuple[int, int, Numbers]], certainty: float) -> _Crossed:
        """The first of some hops at which each word has begun, and ended, with that certainty."""
        begins = np.array(self._begins, dtype=np.int64)
        silences = begins + np.array([len(word.sounds) - 1 for word in self.words], dtype=np.int64)
        begun, ended = np.full(len(begins), math.inf), np.full(len(begins), math.inf)
        for hop, low, place in places:
            reached = np.cumsum(place[::-1])[::-1]  # the chance of being at a sound or after it
            for sounds, times in ((begins, begun), (silences, ended)):
                near = int(np.searchsorted(sounds, low + len(reached)))
                sure = reached[np.maximum(sounds[:near] - low, 0)] >= certainty
                times[:near][sure] = hop * HOP_MS
        return _Crossed(begun, ended + HOP_MS)

    def _smoothed(self, *, all_said: bool) -> Iterator[tuple[int, int, Numbers]]:
        """From the last hop to the first: its number, and the chances of sounds from `low` on, given all hops."""
        after = self._steps.get(self._hops - 1)
        if after is None:
            return
        first = second = np.ones(len(after.first))
        if all_said:  # only the last word's last sound, and the silence after it, are ends
            first = second = np.where(np.arange(after.low, after.high) >= len(self._kind) - 2, 1.0, 1e-9)
        yield self._hops - 1, after.low, _chances(after, first, second)
        for hop in range(self._hops - 2, self._settled - 1, -1):
            step = self._steps[hop]
            likely = self._marks.likely[hop + 1][self._kind[after.low : after.high]]
            low, high = step.low, max(step.high, min(step.high + _REACH, len(self._kind)))
            begun, gone = np.zeros(high - low), np.zeros(high - low)
            shift, size = after.low - low, min(after.high, high) - after.low
            begun[shift : shift + size] = (first * likely)[:size]
            gone[shift : shift + size] = (second * likely)[:size]
            following = np.zeros_like(begun)
            for skipped, often in enumerate(self._next[:, low:high], 1):
                following[:-skipped] += often[skipped:] * begun[skipped:]
            if high == len(self._kind):
                following[-1] += gone[-1]
            leave = self._leave(low, high, after.pace)
            size = len(step.first)
            first = (begun + leave * (gone - begun))[:size]
            second = (gone + leave * (following - gone))[:size]
            most = max(float(first.max()), float(second.max())) or 1.0
            first, second, after = first / most, second / most, step
            yield hop, low, _chances(step, first, second)


def _chances(step: _Step, first: Numbers, second: Numbers) -> Numbers:
    """Where the speech is, by the hops up to a step and by `first` and `second`, what follows from each half sound."""
    places = step.first * first + step.second * second
    total = float(places.sum())
    return places / total if total > 0 else step.first + step.second
