"""The speech that omni-nano's hearing is learnt from: who speaks, what is said, what is heard without speech.

No synthesiser is needed: a tone stands for what one says.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import clip_files
import engines
import english
import noises
import speakers
import speech_data
from engines import STYLES, Manner, Spoken, mixed
from speakers import RATE_HZ, Speaker, all_speakers, draw_speaker, move_formants, say


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dictionary of 40 examples, of which the last eight are kept for evaluation."""
    words = [first + rest for first in "abcdefgh" for rest in ("at", "on", "in", "up", "by")]
    examples = '"number {0} is the {0} one here"; "short"; "with 3 figures in it"'
    lines = [f"0001 n 1 | a thing; {examples.format(word)}" for word in words]
    (tmp_path / "data.noun").write_text('  licence of "somebody in capitals"\n' + "\n".join(lines), encoding="latin-1")
    monkeypatch.setattr(english, "WORDNET", tmp_path)
    monkeypatch.setattr(english, "HELD_OUT", 8)
    for kept in (english.sentences, english._vocabulary):
        kept.cache_clear()
    yield
    for kept in (english.sentences, english._vocabulary):
        kept.cache_clear()


def pitch_hz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return float(spectrum.argmax()) * RATE_HZ / (1 << 18)


def tone(text: str, manner: Manner) -> tuple[np.ndarray, int]:
    """An engine: a letter lasts 0.05 s at its own speed, behind and before silence."""
    count = int(24_000 * 0.05 * len(text) / manner.speed)
    return np.pad(np.sin(2 * np.pi * 300 * np.arange(count) / 24_000), 5000).astype(np.float32) * 0.2, 24_000


def vowel(pitch: float, formant: float, seconds: float = 0.5) -> np.ndarray:
    """A pulse train through one resonance."""
    hz = np.fft.rfftfreq(int(RATE_HZ * seconds), 1 / RATE_HZ)
    pulses = np.zeros(int(RATE_HZ * seconds))
    pulses[:: round(RATE_HZ / pitch)] = 1
    curve = np.exp(-(((hz - formant) / 300) ** 2)) + 0.02
    return np.fft.irfft(np.fft.rfft(pulses) * curve, len(pulses)).astype(np.float32)


def centre_hz(samples: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float((power * np.fft.rfftfreq(len(samples), 1 / RATE_HZ)).sum() / power.sum())


def test_speakers_are_many_and_always_the_same() -> None:
    assert sum(speakers.SHARES.values()) == pytest.approx(1)
    assert set(speech_data.CLIP_SHARES) == set(speakers.SHARES)
    assert sum(speech_data.CLIP_SHARES.values()) == pytest.approx(1)
    everyone = all_speakers()
    assert len(everyone) >= 250 and len(set(everyone)) == len(everyone) and everyone == all_speakers()
    assert len({speaker.manner.voice for speaker in everyone}) >= 12
    for speaker in everyone:
        assert 0.7 < speaker.size < 1.35 and 0.85 < speaker.tract < 1.15
        for shares in (speaker.manner.timbre, speaker.manner.melody):
            assert (sum(shares), len(shares)) == ((pytest.approx(1), STYLES) if speaker.engine == "kokoro" else (0, 0))


def test_styles_are_mixed_half_by_half() -> None:
    styles = np.arange(5 * 256, dtype=float).reshape(5, 256)
    style = mixed(styles, (1, 0, 0, 0, 0), (0, 0, 0.5, 0.5, 0))
    assert np.array_equal(style[:128], styles[0, :128])
    assert np.array_equal(style[128:], (styles[2, 128:] + styles[3, 128:]) / 2)


@pytest.mark.parametrize("factor", [0.88, 0.95, 1.07, 1.14])
@pytest.mark.parametrize("pitch", [100, 200])
def test_formants_move_and_the_pitch_stays(factor: float, pitch: int) -> None:
    before = vowel(pitch, 1500)
    after = move_formants(before, factor)
    assert len(after) == len(before)
    assert centre_hz(after) / centre_hz(before) == pytest.approx(factor, abs=0.04)  # harmonics are 100 or 200 Hz apart

    def period(samples: np.ndarray) -> int:
        least = RATE_HZ // 400
        return int(np.correlate(samples, samples, "full")[len(samples) - 1 :][least : RATE_HZ // 50].argmax()) + least

    assert period(after) == pytest.approx(period(before), abs=1)
    assert move_formants(before, 1.0) is before


def test_windows_add_up() -> None:
    """Hardly moved is hardly changed: analysis and synthesis lose nothing."""
    before = vowel(120, 900)
    assert np.abs(move_formants(before, 1.0 + 1e-9) - before).max() < 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("size", [0.8, 1.0, 1.25])
def test_size_raises_the_pitch_and_keeps_the_tempo(size: float) -> None:
    said = say({"tone": tone}, "abcdefgh", Speaker("tone", Manner(), size), tempo=1.25).samples
    assert pitch_hz(said) == pytest.approx(300 * size, rel=0.01)
    assert len(said) == pytest.approx(RATE_HZ * (8 * 0.05 / 1.25 + 0.06), abs=200)  # its edges are 0.03 s
    assert float(np.abs(said).max()) == pytest.approx(0.6, abs=0.01)


def test_who_says_nothing_gives_nothing() -> None:
    mute = {"mute": lambda *_: (np.zeros(1000, np.float32), 16_000)}
    assert len(say(mute, "a", Speaker("mute", Manner())).samples) == 0


def test_held_out_sentences_are_never_spoken(wordnet: None) -> None:
    kept, trained = english.sentences(held_out=True), english.sentences()
    assert len(kept) == 8 and len(trained) == 32 and not set(kept) & set(trained)
    texts = [english.draw_text(random.Random(number)) for number in range(400)]
    assert texts == [english.draw_text(random.Random(number)) for number in range(400)]
    assert len(set(texts)) > 200 and all(text and set(text) <= set(" 'abcdefghijklmnopqrstuvwxyz") for text in texts)
    only_kept = {word for text in kept for word in text.split()} - {word for text in trained for word in text.split()}
    assert len(only_kept) == 8 and not any(only_kept & set(text.split()) for text in texts)


def test_a_missing_dictionary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english.sentences.cache_clear()
    monkeypatch.setattr(english, "WORDNET", tmp_path)
    with pytest.raises(FileNotFoundError, match="wordnet-base"):
        english.sentences()


@pytest.mark.parametrize("kind", [*dict.fromkeys(noises.KINDS), "silence"])
@pytest.mark.parametrize("count", [1, 700, 16_000])
def test_noises(kind: str, count: int) -> None:
    made = noises.make(kind, count, np.random.default_rng(3))
    assert made.dtype == np.float32 and made.shape == (count,) and np.isfinite(made).all()
    assert np.array_equal(made, noises.make(kind, count, np.random.default_rng(3)))
    if count == 16_000 and kind != "silence":
        assert float(made.std()) == pytest.approx(1, abs=0.01)
        assert not np.array_equal(made, noises.make(kind, count, np.random.default_rng(4)))


def test_babble_is_of_voices_and_has_no_end_before_its_own() -> None:
    made = noises.babble(30_000, np.random.default_rng(0), lambda: vowel(150, 800))
    assert made.shape == (30_000,) and all(part.std() > 0.1 for part in np.split(made, 6))


def test_files_hold_all_kinds_of_speakers_from_the_beginning() -> None:
    order = list(clip_files.files(30_000, speech_data.CLIP_SHARES))
    assert len(set(order)) == len(order) and len(order) * clip_files.ROWS >= 30_000
    assert {name for name, _ in order[: len(speakers.SHARES)]} == set(speakers.SHARES)


def test_clips_go_on_where_they_were(wordnet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Now:
        """Jobs done at once, in this process."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Now:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, function: Any, *args: Any) -> Any:
            value = function(*args)
            return type("Done", (), {"result": lambda _: value})()

    monkeypatch.setattr(clip_files, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(clip_files, "ROWS", 3)
    monkeypatch.setattr(speech_data, "_engine", lambda name, folder: {name: tone})
    for name, value in (
        ("NOISES", 5),
        ("UNSAID", 4),
        ("_NOISE_S", (0.2, 0.3)),
        ("_UNSAID_S", (0.1, 0.2)),
    ):
        monkeypatch.setattr(speech_data, name, value)
    speech_data.make_speech(tmp_path, 20)

    def heard() -> list[dict[str, Any]]:
        files = [tmp_path / f"heard_{name}.jsonl" for name in speech_data.CLIP_SHARES]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    rows = heard()
    brief = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    seconds = {row["audio"]: soundfile.info(tmp_path / row["audio"]).duration for row in rows}
    assert brief == [row for row in rows if row["speaker"].startswith("heart") and seconds[row["audio"]] < 2.2]
    assert brief
    assert 15 <= len(rows) <= 30 and len({row["speaker"].split()[0] for row in rows}) == len(speakers.SHARES)
    for row in rows:
        assert len(soundfile.read(tmp_path / row["audio"])[0]) > 0 and row["text"]
    unsaid = [json.loads(line) for line in (tmp_path / "unsaid.jsonl").read_text().splitlines()]
    assert len(unsaid) == 4 and all(row["text"] == "" for row in unsaid)
    assert len((tmp_path / "noises.jsonl").read_text().splitlines()) == 5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("heard/*/*.wav")}
    next((tmp_path / "heard").glob("flite_000.jsonl")).unlink()
    speech_data.make_speech(tmp_path, 20)
    again = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {path.parent.name for path in again} == {"flite"}
    assert rows == heard()
    for engine in ("kokoro", "flite"):
        next((tmp_path / "heard").glob(f"{engine}_000.jsonl")).unlink()
    speech_data.make_speech(tmp_path, 20, only=["flite"])
    assert [path.name[:6] for path in (tmp_path / "heard").glob("*_000.jsonl")].count("kokoro") == 0
    assert (tmp_path / "heard/flite_000.jsonl").exists()


def test_a_joined_clip_has_pauses_between_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speech_data, "_engine", lambda name, folder: {name: tone})
    monkeypatch.setattr(speech_data, "_GAP_S", (0.3, 0.3))
    who = draw_speaker(random.Random(0), "heart")
    joined = speech_data.joined("heart", "aaaa bbbb cccc", who, 1.0, random.Random(0), tmp_path).samples
    silent = np.abs(joined) < 1e-4
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate(([0], silent, [0])).astype(int))))[::2]
    assert int((runs > 0.29 * RATE_HZ).sum()) == 2


def two_tones(text: str, manner: Manner) -> Spoken:
    """A tone of 500 Hz and one of 2000 Hz behind 0.2 s of silence, called "aa" and "s", as long as the speed says."""
    length = round(16_000 * 0.3 / manner.speed)
    hz = np.repeat((0.0, 500.0, 2000.0), (3200, length, length))
    samples = np.sin(2 * np.pi * np.cumsum(hz) / 16_000).astype(np.float32) * (hz > 0)
    ends = np.cumsum((3200, length, length)) / 16_000
    return Spoken(samples, 16_000, (("pau", ends[0]), ("aa", ends[1]), ("s", ends[2])))


def hz_at(samples: np.ndarray, second: float) -> float:
    part = samples[int((second - 0.03) * RATE_HZ) : int((second + 0.03) * RATE_HZ)]
    return float(np.fft.rfftfreq(len(part), 1 / RATE_HZ)[np.abs(np.fft.rfft(part * np.hanning(len(part)))).argmax()])


@pytest.mark.parametrize(("size", "tempo"), [(1.0, 1.0), (0.8, 1.1), (1.25, 0.9)])
def test_phones_stay_where_they_are_heard(size: float, tempo: float) -> None:
    said = say({"two": two_tones}, "ab", Speaker("two", Manner(), size), tempo)
    (_, silent), (_, first), (_, second) = said.phones
    assert silent < 0.05 and second == pytest.approx(len(said.samples) / RATE_HZ, abs=0.04)
    assert hz_at(said.samples, (silent + first) / 2) == pytest.approx(500 * size, rel=0.1)
    assert hz_at(said.samples, (first + second) / 2) == pytest.approx(2000 * size, rel=0.1)
    assert hz_at(said.samples, first - 0.04) < 1000 * size < hz_at(said.samples, first + 0.04)


def test_phones_of_joined_words_stay_where_they_are_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speech_data, "_engine", lambda name, folder: {name: two_tones})
    who = Speaker("two", Manner())
    joined = speech_data.joined("two", "ab cd", who, 1.0, random.Random(0), tmp_path)
    starts = (0.0, *(end for _, end in joined.phones))
    for (name, end), start in zip(joined.phones, starts):
        if name in ("aa", "s"):
            assert hz_at(joined.samples, (start + end) / 2) == pytest.approx(500 if name == "aa" else 2000, rel=0.1)
    assert [name for name, _ in joined.phones].count("s") == 2


@pytest.mark.parametrize("program", ["flite", "festival"])
def test_engines_tell_their_phones(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    engine = engines.open_engines([program], Path())[program]
    spoken = engine("three plus one", Manner("slt" if program == "flite" else "kal_diphone"))
    names = [name for name, _ in spoken.phones if name != "pau"]
    assert names[:3] == ["th", "r", "iy"] and set(names) <= set(engines.PHONES)
    ends = [end for _, end in spoken.phones]
    assert ends == sorted(ends) and ends[-1] == pytest.approx(len(spoken.samples) / spoken.rate_hz, abs=0.1)
    with pytest.raises(ValueError, match="no phone"):
        engines.phone_named("click")
