"""When words are spoken, on sound that is made of the sounds of its words, at known times."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.generation.speech_times import SpeechTimes
from omni.generation.spoken_words import ANY, FRICATIVE, SILENCE, SONORANT, STOP, VOWEL, split_words

TEXT = "the old king follows your blue fish, and 12 happy birds remember the quiet garden. she paints a small star"
TONES = {VOWEL: (0.3, 500.0), SONORANT: (0.2, 300.0), ANY: (0.15, 400.0)}  # amplitude and Hz


def said(
    text: str, pace: float = 1.0, rate: int = 24000, seed: int = 0
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Sound of a text, and when its words begin and end in milliseconds; sounds are up to a third longer or shorter."""
    rng, pieces, spans = np.random.default_rng(seed), [np.zeros(rate // 20)], list[tuple[float, float]]()
    at = len(pieces[0])
    for word in split_words(text, complete=True):
        begin = at
        for sound in word.sounds:
            if sound.often < 0.5:
                continue
            size = int(rate * sound.mean_ms * pace * rng.uniform(0.67, 1.33) / 1000)
            if sound.kind in TONES:
                amplitude, hz = TONES[sound.kind]
                wave = amplitude * np.sin(2 * np.pi * hz * np.arange(size) / rate)
            elif sound.kind == FRICATIVE:
                wave = np.diff(rng.normal(0, 0.03, size + 1))
            else:
                wave = np.zeros(size)
                wave[-size // 4 :] += rng.normal(0, 0.02, len(wave[-size // 4 :])) * (sound.kind == STOP)
            pieces.append(wave)
            end = at if sound.kind == SILENCE else at + size
            at += size
        spans.append((1000 * begin / rate, 1000 * (end if word.sounds[-1].often >= 0.5 else at) / rate))
    wave = np.concatenate([*pieces, np.zeros(rate // 10)])
    return (wave + rng.normal(0, 1e-4, len(wave))).astype(np.float32), spans


def listened(text: str, wave: np.ndarray, rate: int, piece: int = 1920) -> SpeechTimes:
    """The times after text and sound, a word ahead of each piece."""
    times = SpeechTimes()
    words = [text[word.start : word.stop] for word in split_words(text, complete=True)]
    for i in range(0, len(wave), piece):
        for _ in range(2):
            if words:
                times.push_text(words.pop(0))
        if not words:
            times.end_text()
        times.hear(wave[i : i + piece], rate)
    return times


@pytest.mark.parametrize(("pace", "rate"), [(1.0, 24000), (0.8, 16000), (1.5, 24000), (1.2, 44100), (1.0, 8000)])
def test_words_are_found(pace: float, rate: int) -> None:
    wave, spans = said(TEXT, pace, rate)
    found = listened(TEXT, wave, rate).word_spans_ms(sound_over=True)
    errors = np.array(found) - np.array(spans)
    assert len(found) == len(spans) == len(TEXT.split())
    assert np.sqrt((errors**2).mean()) < 100
    assert all(b <= e for b, e in found) and all(a[1] <= b[1] for a, b in pairwise(found))


def test_what_is_almost_certain_comes_later_than_what_is_probable() -> None:
    wave, _ = said(TEXT)
    times = listened(TEXT, wave, 24000)
    sure, probable = times.word_ends_ms(sound_over=True), [end for _, end in times.word_spans_ms(sound_over=True)]
    assert all(a >= b for a, b in zip(sure, probable)) and sure == sorted(sure)
    assert max(sure) <= 1000 * len(wave) / 24000


def test_words_that_were_not_reached_have_no_end() -> None:
    wave, spans = said(TEXT)
    half = next(end for _, end in spans[9:])
    times = SpeechTimes()
    times.push_text(TEXT)
    times.hear(wave[: int(half * 24)], 24000)
    ends = times.word_ends_ms()
    assert 7 <= sum(math.isfinite(end) for end in ends) <= 10 and ends == sorted(ends)
    assert SpeechTimes().word_ends_ms() == [] and SpeechTimes("no sound yet").word_ends_ms() == [math.inf, math.inf]


@settings(max_examples=15)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=12), st.integers(0, 3))
def test_neither_pieces_nor_questions_change_the_answer(sizes: list[int], seed: int) -> None:
    """Sound may be cut anyhow, and what is asked on the way has no effect: times depend on what has come alone."""
    text = "the old king follows your blue fish"
    wave, _ = said(text, seed=seed)
    whole, parts = SpeechTimes(), SpeechTimes()
    for times in (whole, parts):
        times.push_text(text)
        times.end_text()
    at, told = 0, []
    for size in sizes:
        parts.hear(wave[at : at + size], 24000)
        at = min(at + size, len(wave))
        told.append((at, parts.word_ends_ms()))
    whole.hear(wave[:at], 24000)
    assert whole.word_ends_ms() == told[-1][1]
    early, before = SpeechTimes(text), told[len(told) // 2]
    early.end_text()
    early.hear(wave[: before[0]], 24000)  # what was said half way did not know what came later
    assert early.word_ends_ms() == before[1]


def test_settled_times_stay_and_earlier_sound_is_not_kept() -> None:
    text = " ".join([TEXT] * 3)
    wave, spans = said(text)
    times, settled = SpeechTimes(text), 0.0
    times.end_text()
    for i in range(0, len(wave), 24000):
        before = times.word_ends_ms()
        times.hear(wave[i : i + 24000], 24000)
        after = times.word_ends_ms()
        settled = max(settled, i / 24 - 2500)
        assert [end for end in before if end <= settled] == [end for end in after if end <= settled]
    assert len(times._walk._steps) <= 250 and len(times._walk._likely) <= 250
    assert np.sqrt(np.mean((np.array(times.word_spans_ms(sound_over=True)) - np.array(spans)) ** 2)) < 60


def test_text_is_placed_where_it_is_expected() -> None:
    wave, spans = said(TEXT, 1.3)
    times, given = SpeechTimes(), SpeechTimes("the old king follows")
    placed = []
    for i, word in enumerate(split_words(TEXT, complete=True)):
        placed.append(times.push_text(TEXT[word.start : word.stop]))
        times.hear(wave[i * 4000 : (i + 1) * 4000], 24000)  # a sixth of a second a word: text runs ahead
    assert placed == sorted(placed) and placed[0] < 150
    begins = np.array([begin for begin, _ in spans])
    assert np.abs(np.array(placed)[:4] - begins[:4]).max() < 250
    assert np.abs(np.array(placed) / begins.clip(300) - 1)[4:].max() < 0.45  # the pace is not known at first
    assert given.push_text(" your") > 500 and given.given == 20  # what was given is spoken first


def test_part_of_a_word_is_placed_inside_it() -> None:
    times = SpeechTimes()
    first, second, third = times.push_text("re"), times.push_text("member"), times.push_text("s the")
    assert first < second < third


def test_silence_noise_and_broken_samples_are_taken() -> None:
    for wave in (np.zeros(48000), np.random.default_rng(0).normal(0, 0.3, 48000), np.full(48000, np.nan), np.zeros(0)):
        times = SpeechTimes("anything at all")
        times.end_text()
        times.hear(wave.astype(np.float32), 24000)
        assert len(times.word_ends_ms(sound_over=True)) == 3 and times.push_text(" more") >= 0
