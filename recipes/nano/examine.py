"""Examines omni-nano: what it hears, understands, sees and says, and how fast, on what no training has.

    python recipes/nano/examine.py MODEL EXAM FOLDER [--items 200] [--only sums repeated ...]

EXAM is the folder of `exam_data.py`. Every figure goes to FOLDER/figures.json as soon as it is there; what is measured
is not measured again. Speech is written to FOLDER as sound with its text, for `judges.py`, whose recogniser and quality
model are no part of omni's environment. An answer is right if it holds the asked word and no rival (`talk.right`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import exam_data
import numpy as np
import soundfile
import talk
import torch
from clip_files import write_rows
from drawing import CLIP_SECONDS, draw_clip, draw_picture
from english import words_of
from figures import OTHER
from name_things import conditions
from pictures import write_clip
from scenes import Clip, clip_scene_of, scene_of
from seeing_data import item_words
from talk.sum_forms import sum_forms, typed_sum
from tqdm import tqdm

from omni import AudioChunk, OmniEngine, OmniModel, TurnEnd
from omni.metrics.scores import word_error_rate

ITEMS = 200
_BATCH = 16
_MAX_TOKENS, _MAX_FRAMES = 48, 200
_SPOKEN_S = 24_000
_STREAMS, _TIMED = 8, 20

Content = list[dict[str, Any]]


class Examiner:
    """One model and the material; each method measures one row of the card."""

    def __init__(self, model: OmniModel, exam: Path, folder: Path, items: int = ITEMS) -> None:
        self.model, self.exam, self.folder, self.items = model, exam, folder, items
        assert model.processor is not None
        self.processor = model.processor

    def answers(self, conversations: Sequence[Sequence[Content]]) -> list[list[str]]:
        """The model's answers to every turn of conversations, its own earlier ones in between."""
        found: list[list[str]] = [[] for _ in conversations]
        order = sorted(range(len(conversations)), key=lambda place: len(conversations[place]))
        for first in range(0, len(order), _BATCH):
            some = order[first : first + _BATCH]
            talks: dict[int, list[dict[str, Any]]] = {place: [] for place in some}
            for turn in range(max(len(conversations[place]) for place in some)):
                asked = [place for place in some if turn < len(conversations[place])]
                for place in asked:
                    talks[place].append({"role": "user", "content": conversations[place][turn]})
                inputs = self.processor([talks[place] for place in asked])
                out = self.model.generate(inputs, max_new_tokens=_MAX_TOKENS, return_audio=False)
                for place, text in zip(asked, out.text or ()):
                    talks[place].append({"role": "assistant", "content": text})
                    found[place].append(text)
        return found

    # ---- hearing ----

    def sums(self) -> dict[str, float]:
        rows = exam_data.read(self.exam, "sums")[: self.items]
        found = self.answers([[[heard(row["audio"])]] for row in rows])
        right = []
        for number, (row, (answer,)) in enumerate(zip(rows, found)):
            rng = random.Random(f"sums {number}")
            turn = talk.turn(rng.choice(("sum", "difference", "product", "quotient")), rng)
            assert turn.question == row["text"], "the exam was made by another version of talk"
            right.append(talk.right(answer, turn))
        return {"sums by unseen synthetic speakers": mean(right)}

    def recorded(self) -> dict[str, float]:
        rows = exam_data.read(self.exam, "recorded")[: self.items]
        asked = [[[heard(row["audio"])] + ([] if row["asks"] else [written("what did you hear")])] for row in rows]
        found = self.answers(asked)
        right = [row["answer"].split() == words_of(answer)[-len(row["answer"].split()) :]
                 for row, (answer,) in zip(rows, found)]  # fmt: skip
        return {"digits and sums by recorded people": mean(right)}

    def repeated(self) -> dict[str, float]:
        return {"sentences repeated, unseen speakers, WER": self._word_errors("repeated", [])}

    def dictated(self) -> dict[str, float]:
        asked = [written("write down what you hear")]
        return {"dictation of unseen sentences, unseen speakers, WER": self._word_errors("dictated", asked)}

    def _word_errors(self, kind: str, asked: Content) -> float:
        rows = exam_data.read(self.exam, kind)[: self.items]
        found = [answer for (answer,) in self.answers([[[heard(row["audio"]), *asked]] for row in rows])]
        return word_error_rate([row["answer"] for row in rows], found, "en")

    def unsaid(self) -> dict[str, float]:
        rows = exam_data.read(self.exam, "unsaid")[: self.items]
        found = self.answers([[[heard(row["audio"])]] for row in rows])
        invented = [talk.chat.NOTHING_HEARD not in answer for (answer,) in found]
        return {"words invented on silence, noise, music": mean(invented)}

    # ---- conversation ----

    def typed(self) -> dict[str, float]:
        rngs = [random.Random(f"examined typed {number}") for number in range(self.items)]
        drawn = [talk.conversation(rng, turns=rng.randint(2, 8), media=False) for rng in rngs]
        asked = [[[written(talk.written(turn, rng))] for turn in one.turns] for one, rng in zip(drawn, rngs)]
        return {"turns two to eight right, typed": self._later_turns(drawn, asked)}

    def conversations(self) -> dict[str, float]:
        rows = exam_data.read(self.exam, "conversations")
        drawn = [exam_data.conversation_of(row) for row in rows]
        asked = [[[heard(path)] for path in row["audios"]] for row in rows]
        return {"turns two to eight right, spoken": self._later_turns(drawn, asked)}

    def _later_turns(self, drawn: Sequence[talk.Conversation], asked: Sequence[Sequence[Content]]) -> float:
        found = self.answers(asked)
        return mean([talk.right(answer, turn) for one, given in zip(drawn, found)
                     for turn, answer in list(zip(one.turns, given))[1:]])  # fmt: skip

    def forms(self) -> dict[str, float]:
        """Each way to type a sum, by itself; the ways that are never trained are among them."""
        ways = sorted({form for held_out in (False, True) for form in sum_forms("plus", held_out=held_out)})
        shares = {}
        for form in tqdm(ways, "ways to type a sum"):
            rngs = [random.Random(f"form {form} {number}") for number in range(max(5, self.items // 10))]
            turns = [talk.turn("sum", rng) for rng in rngs]
            texts = [typed_sum(form, "plus", int(turn.about.key[1]), int(turn.about.key[2]), rng)
                     for turn, rng in zip(turns, rngs) if turn.about is not None]  # fmt: skip
            found = self.answers([[[written(text)]] for text in texts])
            shares[form] = mean([talk.right(answer, turn) for (answer,), turn in zip(found, turns)])
        worst = sorted(shares.values())
        figures = {f"typed sum: {form}": share for form, share in shares.items()}
        return figures | {"typed forms of a sum, mean": mean(worst), "typed forms of a sum, worst": worst[0]}

    # ---- seeing ----

    def pictures(self) -> dict[str, float]:
        """What the one thing in a picture or clip is, by condition."""
        figures, scratch = {}, self.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        for name, draw in tqdm(conditions(most=1).items(), "pictures"):
            rngs = [random.Random(f"examined {name} {number}") for number in range(max(5, self.items // 4))]
            drawn = [draw(rng) for rng in rngs]
            asked: list[list[Content]] = []
            for number, one in enumerate(drawn):
                if isinstance(one, Clip):
                    write_clip(path := scratch / f"{number}.mp4", draw_clip(one, CLIP_SECONDS), None)
                    asked.append([[{"type": "video", "video": str(path)}, written("what moves")]])
                else:
                    draw_picture(one).save(path := scratch / f"{number}.png")
                    asked.append([[{"type": "image", "image": str(path)}, written("what do you see")]])
            found = self.answers(asked)
            right = []
            for one, (answer,) in zip(drawn, found):
                scene = clip_scene_of(one).scene if isinstance(one, Clip) else scene_of(one)
                color, kind = item_words(scene.items[0])
                wanted = {kind} if kind in talk.numerals.NUMBERS else {color, "thing" if kind == OTHER else kind}
                right.append(wanted <= set(words_of(answer)))
            figures[f"pictures: {name}"] = mean(right)
        return figures

    # ---- speaking ----

    def speech(self) -> dict[str, float]:
        """Answers of the world, and English sentences read aloud: written as sound for the judges."""
        rng, answers = random.Random("examined speech"), talk.all_answers()
        ended = []
        for kind, draw in (("answers", lambda: rng.choice(answers)), ("read", lambda: exam_data.sentence(rng))):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            rows = []
            for number in tqdm(range(self.items), kind):
                text = draw()
                sound = self.model.speak(text, max_frames=_MAX_FRAMES)
                ended.append(len(sound) < _MAX_FRAMES * self.model.code2wav.hop_length)
                soundfile.write(self.folder / kind / f"{number}.wav", sound.numpy(), _SPOKEN_S)
                rows.append({"audio": f"{kind}/{number}.wav", "text": text})
            write_rows(self.folder / f"{kind}.jsonl", rows)
        return {"speech ends by itself": mean(ended)}

    # ---- speed ----

    def speed(self) -> dict[str, float]:
        """First sound and real-time factor of one stream, and seconds of sound a second of eight; one thread."""
        torch.set_num_threads(1)
        question = [{"role": "user", "content": [written("how are you")]}]
        inputs = self.processor([question])
        list(self.model.stream(inputs))
        firsts, factors = [], []
        for _ in range(_TIMED):
            start, first, samples = time.perf_counter(), None, 0
            for event in self.model.stream(inputs):
                if isinstance(event, AudioChunk):
                    first = first or time.perf_counter() - start
                    samples += len(event.samples)
            firsts.append(first or float("nan"))
            factors.append((time.perf_counter() - start) / max(1, samples) * _SPOKEN_S)
        return {
            "first sound, s": statistics.median(firsts),
            "real-time factor": statistics.median(factors),
            "eight streams, s of sound a second": self._together(),
        }

    def _together(self) -> float:
        engine = OmniEngine(self.model, max_sessions=_STREAMS)
        try:
            samples, start = 0, time.perf_counter()
            sessions = [engine.session() for _ in range(_STREAMS)]
            streams: list[Iterator[Any]] = []
            for session in sessions:
                session.push_text("how are you")
                streams.append(iter(session.respond()))
            left = list(streams)
            while left:
                for stream in list(left):
                    event = next(stream, None)
                    if event is None or isinstance(event, TurnEnd):
                        left.remove(stream)
                    elif isinstance(event, AudioChunk):
                        samples += len(event.samples)
            return samples / _SPOKEN_S / (time.perf_counter() - start)
        finally:
            engine.close()

    def ends(self) -> dict[str, float]:
        """A thousand answers: how many end before a limit stops them."""
        rngs = [random.Random(f"examined end {number}") for number in range(5 * self.items)]
        turns = [talk.conversation(rng, turns=1, media=False).turns[0] for rng in rngs]
        asked = [[[written(talk.written(turn, rng))]] for turn, rng in zip(turns, rngs)]
        ended = []
        for first in tqdm(range(0, len(asked), _BATCH), "answers end"):
            inputs = self.processor([[{"role": "user", "content": one[0]}] for one in asked[first : first + _BATCH]])
            out = self.model.generate(inputs, max_new_tokens=200, max_frames=600)
            ended += [reason == "stop" for reason in out.reason]
        return {"answers that end by themselves": mean(ended)}


MEASURES: tuple[str, ...] = (
    "sums", "recorded", "repeated", "dictated", "unsaid", "typed", "conversations", "forms", "pictures", "speech",
    "speed", "ends",
)  # fmt: skip


def heard(path: str) -> dict[str, Any]:
    """An item of sound."""
    return {"type": "audio", "audio": path}


def written(text: str) -> dict[str, Any]:
    """An item of text."""
    return {"type": "text", "text": text}


def mean(values: Sequence[float | bool]) -> float:
    """Of numbers, or the share of what is true."""
    return float(np.mean(values)) if len(values) else float("nan")


def examine(
    model: OmniModel, exam: Path, folder: Path, items: int = ITEMS, only: Sequence[str] = MEASURES
) -> dict[str, float]:
    """Measure what is not measured yet; returns all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path, examiner = folder / "figures.json", Examiner(model, exam, folder, items)
    kept: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in only:
        if name not in kept:
            measure: Callable[[], dict[str, float]] = getattr(examiner, name)
            kept[name] = measure()
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return {name: value for part in kept.values() for name, value in part.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "exam", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of each row (default {ITEMS})")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="some of the measures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = OmniModel.from_pretrained(args.model, device="cpu")
    for name, value in examine(model, args.exam, args.folder, args.items, args.only).items():
        print(f"{name:60} {value:.3f}")


if __name__ == "__main__":
    main()
