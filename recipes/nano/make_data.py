"""Makes all data of omni-nano: recordings, pictures, clips, and the manifests that the stages train on.

    python recipes/nano/make_data.py data [--scale 1.0] [--only answers]

Each part ends with its manifest, so a run that was interrupted goes on with the part that is missing. Every part has
a seed of its own. Needs flite and espeak-ng.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import world
from pictures import CLIP_SECONDS, draw_clip, draw_picture, write_clip
from tqdm import tqdm
from voices import RATE_HZ, SPEAKERS, answer_sound, random_manner, speak, surround
from world import SKILLS, Task

SIZES = {  # rows of each manifest at scale 1
    "answers": 6000,
    "text": 120_000,
    "sentences": 9000,
    "questions": 16_000,
    "pictures": 10_000,
    "clips": 7000,
    "spoken_pairs": 6000,
    "spoken_fours": 10_000,
    "spoken_answers": 16_000,
    "spoken_context": 6000,
}
LEAST = {"answers": 40}  # rows whatever the scale; of other manifests 8. The codebooks need some frames to start from
_WORKERS = 2


class Maker:
    """The folder of data and what is in it."""

    def __init__(self, folder: Path, scale: float = 1.0, suffix: str = "wav") -> None:
        self.folder, self.scale, self.suffix = folder, scale, suffix
        for name in ("answers", "heard", "pictures", "clips"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def rows(self, part: str) -> int:
        return max(LEAST.get(part, 8), round(SIZES[part] * self.scale))

    def write(self, part: str, rows: Iterable[dict[str, Any]]) -> None:
        """One manifest, all or nothing."""
        partial = self.folder / f".{part}.jsonl"
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
        partial.replace(self.folder / f"{part}.jsonl")

    def each(self, part: str, make: Callable[[random.Random, int], Any]) -> Iterator[Any]:
        """`make` for every row of a part, each with a generator of its own, on several threads in order."""
        count = self.rows(part)
        jobs = [(random.Random(f"{part} {number}"), number) for number in range(count)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            yield from tqdm(pool.map(lambda job: make(*job), jobs), part, count)

    def answer(self, text: str) -> str:
        """The file of an answer in the model's voice; made at its first use."""
        path = self.folder / "answers" / f"{hashlib.sha1(text.encode()).hexdigest()[:16]}.{self.suffix}"
        if not path.exists():
            _write(path, answer_sound(text), 24_000)
        return f"answers/{path.name}"

    def answers(self) -> None:
        """Every closed answer, sentences, and words in no order, in the model's voice."""
        closed = world.all_answers()

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            text = world.jumble(rng).answer if number % 2 else world.sentence(rng)
            text = closed[number] if number < len(closed) else text
            return {"audio": self.answer(text), "text": text}

        self.write("answers", self.each("answers", make))

    def text(self) -> None:
        """Typed questions that need no picture, two in five as the audio encoder will spell them."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            question, task = world.language(rng)
            return conversation(question, task)

        self.write("text", self.each("text", make))

    def heard(self, text: str, rng: random.Random) -> np.ndarray:
        """A text as the microphone hears it."""
        return surround(speak(text, random_manner(rng, list(SPEAKERS))), rng)

    def hear(self, text: str, rng: random.Random, name: str) -> str:
        """Write a spoken text; its path from the folder of data."""
        path = f"heard/{name}.{self.suffix}"
        _write(self.folder / path, self.heard(text, rng), RATE_HZ)
        return path

    def sentences(self) -> None:
        """Spoken sentences with a typed request to write them down."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            skill = rng.choices(("sentence", *SKILLS), (len(SKILLS) * 1.5, *[1] * len(SKILLS)))[0]
            said = world.sentence(rng) if skill == "sentence" else SKILLS[skill](rng).question
            path = self.hear(said, rng, f"s{number}")
            asked = rng.choice(world.QUESTIONS["clip speech"])
            task = Task("clip speech", asked, said)
            return conversation("<audio>" + world.written(task, rng), task) | {"audios": [path]}

        self.write("sentences", self.each("sentences", make))

    def questions(self) -> None:
        """Spoken questions that need no picture."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            task = SKILLS[rng.choices(("repeat", "arithmetic", "unknown"), (4, 5, 2))[0]](rng)
            path = self.hear(task.question, rng, f"q{number}")
            return conversation("<audio>", task) | {"audios": [path], "text": task.question}

        self.write("questions", self.each("questions", make))

    def picture(self, rng: random.Random, name: str) -> tuple[Task, dict[str, Any]]:
        """A question about a new picture, and its keys of a manifest's row."""
        task = SKILLS[rng.choices((*world.PICTURE_SKILLS, "dialogue"), (2, 2, 3, 2, 2, 2))[0]](rng)
        assert task.picture is not None
        draw_picture(task.picture).save(self.folder / (path := f"pictures/{name}.png"), compress_level=1)
        return task, {"images": [path]}

    def pictures(self) -> None:
        """Questions about pictures, most of them spoken, and dialogues of two turns."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            task, shown = self.picture(rng, str(number))
            return self.ask(task, rng, f"p{number}", shown, "<image>", spoken=rng.random() < 0.7)

        self.write("pictures", self.each("pictures", make))

    def clips(self) -> None:
        """Questions about clips, typed, spoken, or asked in the clip's sound track; more of them typed."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            task = SKILLS[rng.choices(world.CLIP_SKILLS, (3, 1, 2))[0]](rng)
            film = self.film(task, rng, f"clips/{number}.mp4")
            if task.sound_asks or rng.random() < 0.8:
                return interview(task, rng, "<video>", 2) | film
            return self.ask(task, rng, f"c{number}", film, "<video>", spoken=True)

        self.write("clips", self.each("clips", make))

    def film(self, task: Task, rng: random.Random, path: str) -> dict[str, Any]:
        """Write a task's clip; its keys of a manifest's row."""
        assert task.clip is not None
        sound = None if task.clip.said is None else self.heard(task.clip.said, rng)
        seconds = CLIP_SECONDS if sound is None else max(CLIP_SECONDS, len(sound) / RATE_HZ)
        write_clip(self.folder / path, draw_clip(task.clip, seconds), sound)
        return {"videos": [path], "use_audio_in_video": sound is not None}

    def ask(
        self, task: Task, rng: random.Random, name: str, media: dict[str, Any], tag: str, *, spoken: bool
    ) -> dict[str, Any]:
        """A row about a picture or clip, its questions typed or spoken."""
        texts = [question for question, _ in task.earlier] + [task.question]
        if not spoken:
            asked = [*texts[:-1], world.written(task, rng)]
            return conversation(asked[-1], task, asked[:-1], tag) | media
        paths = [self.hear(text, rng, f"{name}_{turn}") for turn, text in enumerate(texts)]
        row = conversation("<audio>", task, ["<audio>"] * (len(texts) - 1), tag) | media | {"audios": paths}
        if rng.random() < 0.5:  # `omni chat` puts the sound first, a session what was pushed first
            first = row["messages"][0]
            first["content"] = "<audio>" + first["content"].removesuffix("<audio>")
        return row

    def spoken_pairs(self) -> None:
        """Two words each: where there are two, the Talker finds that the second one is to be read."""
        self._spoken("spoken_pairs", lambda rng: world.words(rng, 2, 2))

    def spoken_fours(self) -> None:
        """Two to four words each."""
        self._spoken("spoken_fours", lambda rng: world.words(rng, 2, 4))

    def spoken_answers(self) -> None:
        """What the model is to say: sentences, closed answers, and words in no order, which no one can learn by
        heart."""
        closed = world.all_answers()

        def draw(rng: random.Random) -> str:
            chance = rng.random()
            if chance < 0.12:
                return rng.choice(closed)
            return world.sentence(rng) if chance < 0.6 else world.jumble(rng).answer

        self._spoken("spoken_answers", draw)

    def _spoken(self, part: str, draw: Callable[[random.Random], str]) -> None:
        """Answers and how they sound, behind questions that they do not belong to: the Talker is to speak the answer's
        text, and would otherwise find the words that are to be repeated in the question."""

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            said = draw(rng)
            asked = SKILLS[rng.choice(tuple(SKILLS))](rng).question
            return conversation(asked, Task("repeat", "", said)) | {"speech": self.answer(said)}

        self.write(part, self.each(part, make))

    def spoken_context(self) -> None:
        """Rows of all other manifests, their answers recorded: what the Talker learns from in the end."""
        parts = ("questions", "questions", "sentences", "pictures", "pictures", "clips")
        sources = {part: (self.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines() for part in parts}

        def make(rng: random.Random, number: int) -> dict[str, Any]:
            lines = sources[parts[number % len(parts)]]
            row: dict[str, Any] = json.loads(lines[rng.randrange(len(lines))])
            said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            return row | {"speech": [self.answer(text) for text in said]}

        self.write("spoken_context", self.each("spoken_context", make))


def conversation(asked: str, task: Task, earlier: Iterable[str] = (), tag: str = "") -> dict[str, Any]:
    """The messages of a row; `tag` opens the first question."""
    messages = []
    for question, (_, answer) in zip(earlier, task.earlier):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": task.answer}]
    messages[0]["content"] = tag + messages[0]["content"]
    return {"messages": messages, "category": task.skill}


def interview(task: Task, rng: random.Random, tag: str, more: int) -> dict[str, Any]:
    """The messages of a row with up to `more` further typed questions about a task's picture or clip."""
    asked = [*(question for question, _ in task.earlier), "" if task.sound_asks else world.written(task, rng)]
    row = conversation(asked[-1], task, asked[:-1], tag)
    left = {
        skill: tasks for skill, tasks in world.further(task, rng).items() if task.clip is None or skill != task.skill
    }
    for _ in range(more):
        if not left:
            break
        tasks = left[skill := rng.choice(list(left))]
        other = tasks.pop(rng.randrange(len(tasks)))
        if not tasks:
            del left[skill]
        row["messages"] += conversation(world.written(other, rng), other)["messages"]
    return row


def _write(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    soundfile.write(path, samples, rate_hz, subtype="PCM_16" if path.suffix == ".wav" else None)


PARTS = tuple(SIZES)


def make_data(folder: Path, scale: float = 1.0, only: Iterable[str] = PARTS, suffix: str = "wav") -> None:
    """Make every part that is not there yet; sounds are files with that suffix."""
    maker = Maker(folder, scale, suffix)
    for part in only:
        if not (folder / f"{part}.jsonl").exists():
            getattr(maker, part)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the data goes")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows (default 1)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts of it")
    parser.add_argument("--sound", choices=("wav", "ogg"), default="wav", help="files of sounds (default wav)")
    args = parser.parse_args()
    make_data(args.folder, args.scale, args.only, args.sound)


if __name__ == "__main__":
    main()
