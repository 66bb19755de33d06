"""Measures omni-nano on fresh questions: what it understands, how it speaks, how fast.

    python recipes/nano/evaluate.py MODEL [--codes FOLDER] [--questions 200] [--out report.json]

Questions come from seeds, voices, speeds and words outside the training data. Speech is judged by PocketSphinx with
the small world's grammar, always beside what it makes of the original synthetic voice. Needs flite, espeak-ng and
pocketsphinx. Every figure is a share of right answers unless it says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import world
from pictures import CLIP_SECONDS, draw_clip, draw_picture, write_clip
from recogniser import Recogniser, word_accuracy
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from voices import (
    HELD_OUT_STRETCH,
    RATE_HZ,
    SPEAKERS,
    answer_sound,
    random_manner,
    speak,
    surround,
)
from world import SKILLS, Task

from omni import AudioChunk, OmniEngine, OmniModel, TextDelta, TurnEnd
from omni.metrics.scores import mel_distance
from omni.training.codec.speech_codes import load_codec_encoder

TARGETS = {  # what the project asks for, by group
    "typed": 0.97,
    "spoken": 0.92,
    "spoken, other speeds": 0.92,
    "held-out speaker": 0.75,
    "pictures": 0.97,
    "clips": 0.92,
}
PLAIN_SKILLS = ("repeat", "arithmetic", "unknown")
_MAX_TOKENS, _MAX_FRAMES = 24, 100
_SPEECH_SAMPLE = 200
_TIMED = 12


@dataclass(frozen=True)
class Voices:
    """Who asks: the speakers, and speeds outside those of training (none: those of training)."""

    speakers: tuple[str, ...]
    stretches: tuple[float, ...] = ()


TRAINED = Voices(tuple(SPEAKERS))
VOICES = {
    "spoken": TRAINED,
    "spoken, other speeds": Voices(tuple(SPEAKERS), HELD_OUT_STRETCH),
    "held-out speaker": Voices(("rms",)),
    "held-out speaker, known synthesiser": Voices(("max",)),
}


class Asker:
    """Turns tasks into conversations, their media in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, 0

    def path(self, suffix: str) -> Path:
        self.files += 1
        return self.folder / f"{self.files}{suffix}"

    def sound(self, text: str, rng: random.Random, voices: Voices) -> np.ndarray:
        """A text as the microphone hears it."""
        return surround(speak(text, random_manner(rng, list(voices.speakers), voices.stretches)), rng)

    def ask(self, text: str, rng: random.Random, voices: Voices | None) -> dict[str, Any]:
        """A question as an item: text, or sound where there are voices."""
        if voices is None:
            return {"type": "text", "text": text}
        soundfile.write(path := self.path(".wav"), self.sound(text, rng, voices), RATE_HZ, subtype="PCM_16")
        return {"type": "audio", "audio": str(path)}

    def shown(self, task: Task, rng: random.Random, voices: Voices) -> list[dict[str, Any]]:
        """The picture or clip of a task."""
        if task.picture is not None:
            draw_picture(task.picture).save(path := self.path(".png"))
            return [{"type": "image", "image": str(path)}]
        if task.clip is None:
            return []
        sound = None if task.clip.said is None else self.sound(task.clip.said, rng, voices)
        seconds = CLIP_SECONDS if sound is None else max(CLIP_SECONDS, len(sound) / RATE_HZ)
        write_clip(path := self.path(".mp4"), draw_clip(task.clip, seconds), sound)
        return [{"type": "video", "video": str(path), "use_audio_in_video": sound is not None}]

    def conversation(self, task: Task, rng: random.Random, voices: Voices | None) -> list[list[dict[str, Any]]]:
        """The user's turns, each a list of items."""
        asked = [question for question, _ in task.earlier]
        turns = [[self.ask(question, rng, voices)] for question in asked]
        if task.sound_asks:
            turns.append([])
        else:
            turns.append([self.ask(world.written(task, rng) if voices is None else task.question, rng, voices)])
        turns[0] = self.shown(task, rng, voices or TRAINED) + turns[0]
        return turns


def answers(model: OmniModel, conversations: Sequence[list[list[dict[str, Any]]]], batch: int = 16) -> list[str]:
    """The model's last answers in text, its own earlier ones in between."""
    given: list[str] = []
    for start in range(0, len(conversations), batch):
        rows = conversations[start : start + batch]
        talks: list[list[dict[str, Any]]] = [[] for _ in rows]
        for turn in range(len(rows[0])):
            for talk, items in zip(talks, rows):
                talk.append({"role": "user", "content": items[turn]})
            assert model.processor is not None
            out = model.generate(model.processor(talks), max_new_tokens=_MAX_TOKENS, return_audio=False)
            assert out.text is not None
            for talk, text in zip(talks, out.text):
                talk.append({"role": "assistant", "content": text})
        given += [str(talk[-1]["content"]) for talk in talks]
    return given


def groups(held_out: bool = True) -> Iterator[tuple[str, str, Callable[[random.Random], Task], Voices | None]]:
    """(group, skill, maker of tasks, voices) of everything that is asked."""
    makers: dict[str, Callable[[random.Random], Task]] = {
        **SKILLS,
        "unknown": lambda rng: world.unknown(rng, held_out=held_out),
    }
    for skill in PLAIN_SKILLS:
        yield "typed", skill, makers[skill], None
    for group, voices in VOICES.items():
        for skill in PLAIN_SKILLS:
            yield group, skill, makers[skill], voices
    for skill in (*world.PICTURE_SKILLS, "dialogue"):
        yield "pictures", skill, makers[skill], None
    for skill in (*world.PICTURE_SKILLS, "dialogue"):
        yield "pictures, spoken", skill, makers[skill], TRAINED
    for skill in world.CLIP_SKILLS:
        yield "clips", skill, makers[skill], None


def understanding(folder: Path, questions: int, workers: int, partial: Path | None) -> dict[str, dict[str, float]]:
    """Share of right answers by group and skill, measured by so many processes. partial: a file that keeps what is
    measured, for a run on the same weights and as many questions that goes on from there."""
    of = f"{_weights_hash(folder)}, {questions} questions"
    kept = json.loads(partial.read_text(encoding="utf-8")) if partial is not None and partial.exists() else {}
    known = kept["shares"] if kept.get("of") == of else {}
    left = [place for place, (group, skill, _, _) in enumerate(groups()) if f"{group}: {skill}" not in known]
    with ProcessPoolExecutor(workers, get_context("spawn"), _load, (folder,)) as pool:
        waiting = [pool.submit(_score, place, questions) for place in left]
        for done in tqdm(as_completed(waiting), "understanding", len(waiting)):
            name, share = done.result()
            known[name] = share
            if partial is not None:
                partial.write_text(json.dumps({"of": of, "shares": known}, indent=1) + "\n", encoding="utf-8")
    scores: dict[str, dict[str, float]] = {}
    for group, skill, _, _ in groups():
        scores.setdefault(group, {})[skill] = known[f"{group}: {skill}"]
    for skills in scores.values():
        skills["all"] = sum(skills.values()) / len(skills)
    return scores


def _weights_hash(folder: Path) -> str:
    """Of the bytes of a checkpoint's weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_loaded: list[OmniModel] = []  # of a worker


def _load(folder: Path) -> None:
    torch.set_num_threads(1)
    _loaded.append(OmniModel.from_pretrained(folder, parts=["thinker"], dtype="float32"))


def _score(place: int, questions: int) -> tuple[str, float]:
    """One skill of one group, by its place among `groups`."""
    group, skill, make, voices = list(groups())[place]
    with tempfile.TemporaryDirectory() as media:
        asker = Asker(Path(media))
        rngs = [random.Random(f"evaluation {group} {skill} {number}") for number in range(questions)]
        tasks = [make(rng) for rng in rngs]
        found = answers(_loaded[0], [asker.conversation(task, rng, voices) for task, rng in zip(tasks, rngs)])
    return f"{group}: {skill}", sum(answer == task.answer for answer, task in zip(found, tasks)) / questions


def speech(model: OmniModel, codes: Path | None, count: int = _SPEECH_SAMPLE) -> dict[str, float]:
    """How its speech, and the codec alone, compare with the original voice."""
    assert model.code2wav is not None and model.processor is not None
    judge, rate_hz = Recogniser(), int(model.code2wav.sample_rate)
    rng = random.Random("evaluation of speech")
    closed = world.all_answers()
    texts = [world.sentence(rng) if rng.random() < 0.6 else rng.choice(closed) for _ in range(count)]
    encoder = None if codes is None else load_codec_encoder("mel", codes, code2wav=model.code2wav)
    heard: dict[str, list[tuple[str, str]]] = {"original": [], "codec": [], "model": []}
    ratios, distances, ended = [], [], 0
    for text in tqdm(texts, "speech"):
        original = answer_sound(text)
        heard["original"].append((text, judge(original, rate_hz)))
        asked = [{"role": "user", "content": f"repeat after me {text}"}]
        out = model.generate(model.processor(asked), max_new_tokens=_MAX_TOKENS, max_frames=_MAX_FRAMES)
        assert out.audio is not None and out.text is not None
        heard["model"].append((out.text[0], judge(out.audio[0].numpy(), rate_hz)))
        ended += out.reason[0] == "stop"
        ratios.append(len(out.audio[0]) / len(original if out.text[0] == text else answer_sound(out.text[0])))
        if encoder is not None:
            recorded = torch.from_numpy(original)
            with torch.no_grad():
                decoded = model.code2wav(encoder(recorded)[None])[0].float()
            heard["codec"].append((text, judge(decoded.numpy(), rate_hz)))
            length = min(len(decoded), len(recorded))
            distances.append(mel_distance(decoded[:length], recorded[:length], rate_hz).decibels)
    base = word_accuracy(heard["original"])
    figures = {
        "recogniser on the original voice": base,
        "model's speech, of that": word_accuracy(heard["model"]) / base,
        "codec alone, of that": word_accuracy(heard["codec"]) / base if encoder is not None else float("nan"),
        "codec's mel distance, dB": float(np.mean(distances)) if distances else float("nan"),
        "ended by itself": ended / count,
        "length within 30 %": float(np.mean([0.7 <= ratio <= 1.3 for ratio in ratios])),
        "shortest, of the original": min(ratios),
        "longest, of the original": max(ratios),
    }
    return figures


def speed(model: OmniModel, folder: Path) -> dict[str, float]:
    """Real-time factor of whole answers and time to the first sound, of spoken questions; seconds are medians."""
    assert model.processor is not None
    asker, first, factors = Asker(folder), [], []
    for number in range(_TIMED + 2):  # two to warm up
        rng = random.Random(f"evaluation of speed {number}")
        task = world.repeat(rng)
        items = asker.conversation(task, rng, TRAINED)[0]
        start = time.perf_counter()
        sound, sounded = 0.0, 0.0
        for event in model.stream(model.processor([{"role": "user", "content": items}]), max_frames=_MAX_FRAMES):
            if isinstance(event, AudioChunk):
                sounded = sounded or time.perf_counter() - start
                sound += len(event.samples) / event.sample_rate
        if number >= 2 and sound:
            first.append(sounded)
            factors.append((time.perf_counter() - start) / sound)
    return {
        "first sound, s": float(np.median(first)),
        "real-time factor": float(np.median(factors)),
        "threads": float(torch.get_num_threads()),
    }


def agreement(model: OmniModel, folder: Path, count: int = 20) -> float:
    """Share of questions whose greedy answer, text and sound, is the same from generate, stream and OmniEngine."""
    assert model.processor is not None
    asker, same = Asker(folder), 0
    engine = OmniEngine(model, max_sessions=2)
    with engine:
        for number in range(count):
            rng = random.Random(f"evaluation of agreement {number}")
            task = SKILLS[rng.choice((*PLAIN_SKILLS, *world.PICTURE_SKILLS))](rng)
            items = asker.conversation(task, rng, TRAINED if number % 2 else None)[0]
            inputs = model.processor([{"role": "user", "content": items}])
            out = model.generate(inputs, max_new_tokens=_MAX_TOKENS, max_frames=_MAX_FRAMES)
            assert out.text is not None and out.audio is not None
            with engine.session() as session:
                for item in items:
                    push(session, item)
                served = said(session.respond(max_new_tokens=_MAX_TOKENS, max_frames=_MAX_FRAMES))
            streamed = said(model.stream(inputs, max_new_tokens=_MAX_TOKENS, max_frames=_MAX_FRAMES))
            same += all(
                text == out.text[0]
                and sound.shape == out.audio[0].shape
                and bool((sound - out.audio[0]).abs().max() < 1e-3)
                for text, sound in (streamed, served)
            )
    return same / count


def push(session: Any, item: dict[str, Any]) -> None:
    """Hand one item of a message to a session."""
    if item["type"] == "text":
        session.push_text(item["text"])
    elif item["type"] == "audio":
        samples, rate_hz = soundfile.read(item["audio"], dtype="float32")
        session.push_audio(torch.from_numpy(samples), rate_hz)
    else:
        session.push_image(item["image"])


def said(events: Any) -> tuple[str, torch.Tensor]:
    """Text and sound of a reply's events."""
    text, sound = "", []
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, AudioChunk):
            sound.append(event.samples)
        elif isinstance(event, TurnEnd):
            break
    return text, torch.cat(sound) if sound else torch.zeros(0)


def evaluate(folder: Path, codes: Path | None, questions: int, partial: Path | None = None) -> dict[str, Any]:
    """All figures of a checkpoint. partial: as for `understanding`."""
    report: dict[str, Any] = {"questions of each skill": questions}
    report["understanding"] = understanding(folder, questions, os.cpu_count() or 1, partial)
    model = OmniModel.from_pretrained(folder, dtype="float32")
    with tempfile.TemporaryDirectory() as media:
        report["speech"] = speech(model, codes)
        report["speed"] = speed(model, Path(media))
        report["generate, stream and engine agree"] = agreement(model, Path(media))
    return report


def show(console: Console, report: dict[str, Any]) -> None:
    """The figures as tables."""
    table = Table("group", "skill", "right", "target", title=f"{report['questions of each skill']} questions a skill")
    for group, skills in report["understanding"].items():
        for skill, share in skills.items():
            target = f"{TARGETS[group]:.0%}" if skill == "all" and group in TARGETS else ""
            table.add_row(group, skill, f"{share:.1%}", target, end_section=skill == "all")
    console.print(table)
    table = Table("figure", "value", title="speech, speed, agreement")
    for name, value in {**report["speech"], **report["speed"]}.items():
        table.add_row(name, f"{value:.3f}")
    table.add_row("generate, stream and engine agree", f"{report['generate, stream and engine agree']:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--codes", type=Path, help="folder of fit_codes.py, to judge the codec alone")
    parser.add_argument("--questions", type=int, default=200, help="of each skill (default 200)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    partial = None if args.out is None else args.out.with_suffix(".partial.json")
    report = evaluate(args.model, args.codes, args.questions, partial)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(Console(), report)


if __name__ == "__main__":
    main()
