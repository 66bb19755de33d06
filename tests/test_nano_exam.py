"""The exam of omni-nano: that its sound is made once, and that its figures are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import english
import exam_data
import examine
import judges
import make_start
import talk

from omni import OmniModel

SENTENCES = ("the dog sleeps in the sun.", "she never said that, did she?", "a dream of green hills")


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exam of four items a kind, whose voice is a tone, and whose person reads tones too."""
    folder, recorded = tmp_path_factory.mktemp("exam"), tmp_path_factory.mktemp("recorded")
    tone = np.sin(np.arange(8000) * 0.2).astype(np.float32)
    for name in (*(f"digits/{n}" for n in range(21)), "digits/minus", "letters/plus"):
        (recorded / name).parent.mkdir(exist_ok=True)
        soundfile.write(recorded / f"{name}.wav", tone, 8000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam_data, "RECORDED", recorded)
        patch.setattr(exam_data, "sentences", lambda held_out=False: SENTENCES)
        patch.setattr(exam_data, "spoken", lambda text, rng, folder: tone)
        exam_data.make_exam(folder, 4)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.wav")}
        exam_data.make_exam(folder, 4)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.wav")}
    return folder


def test_rows_name_sounds_and_right_answers(exam: Path) -> None:
    for kind, count in (("sums", 4), ("repeated", 4), ("dictated", 4), ("recorded", 4), ("unsaid", 4)):
        rows = exam_data.read(exam, kind)
        assert len(rows) == count
        assert all(len(soundfile.read(row["audio"])[0]) > 0 for row in rows)
    for row in exam_data.read(exam, "recorded"):
        words = row["text"].split()
        if row["asks"]:
            a, b = (talk.numerals.NUMBERS.index(word) for word in (words[0], words[-1]))
            assert row["answer"] == talk.numerals.NUMBERS[a + b if words[1] == "plus" else a - b]
        else:
            assert row["answer"] == row["text"]
    (row,) = exam_data.read(exam, "conversations")
    drawn = exam_data.conversation_of(row)
    assert [turn.question for turn in drawn.turns] == row["texts"] and len(row["audios"]) == len(drawn.turns)


class Knows:
    """A model that gives the answers it is told, turn by turn, and remembers what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []
        self.processor = lambda talks: talks

    def generate(self, talks: list[Any], **_: Any) -> Any:
        self.asked += [talk[-1]["content"] for talk in talks]
        texts = [self.answer(talk) for talk in talks]
        return type("Out", (), {"text": texts, "reason": ["stop"] * len(texts)})()


@pytest.mark.parametrize(
    ("measure", "row", "known"),
    [("sums", "sums by unseen synthetic speakers", "sums"), ("recorded", "digits and sums by recorded people",
     "recorded")],
)  # fmt: skip
def test_right_answers_count_and_wrong_ones_do_not(
    exam: Path, tmp_path: Path, measure: str, row: str, known: str
) -> None:
    answers = {one["audio"]: one["answer"] for one in exam_data.read(exam, known)}
    right = Knows(lambda talk: answers[talk[-1]["content"][0]["audio"]])
    assert getattr(examine.Examiner(right, exam, tmp_path, 4), measure)() == {row: 1.0}
    wrong = Knows(lambda talk: "i do not know")
    assert getattr(examine.Examiner(wrong, exam, tmp_path, 4), measure)() == {row: 0.0}


def test_word_errors_and_inventions(exam: Path, tmp_path: Path) -> None:
    said = {one["audio"]: one["answer"] for one in exam_data.read(exam, "dictated")}
    examiner = examine.Examiner(Knows(lambda talk: said[talk[-1]["content"][0]["audio"]]), exam, tmp_path, 4)
    assert list(examiner.dictated().values()) == [0.0]
    silent = examine.Examiner(Knows(lambda asked: talk.chat.NOTHING_HEARD), exam, tmp_path, 4)
    assert list(silent.unsaid().values()) == [0.0]
    loud = examine.Examiner(Knows(lambda talk: "a red circle"), exam, tmp_path, 4)
    assert list(loud.unsaid().values()) == [1.0] and next(iter(loud.dictated().values())) > 0.5


def test_only_later_turns_count(exam: Path, tmp_path: Path) -> None:
    """The first answer is wrong, all others right: every counted turn is right."""
    (row,) = exam_data.read(exam, "conversations")
    turns = exam_data.conversation_of(row).turns
    knows = Knows(lambda talk: "wrong" if len(talk) == 1 else turns[len(talk) // 2].answer)
    assert list(examine.Examiner(knows, exam, tmp_path, 4).conversations().values()) == [1.0]
    assert len(knows.asked) == len(turns)


def test_figures_are_kept_and_measured_once(exam: Path, tmp_path: Path) -> None:
    answers = {one["audio"]: one["answer"] for one in exam_data.read(exam, "sums")}
    right = Knows(lambda talk: answers[talk[-1]["content"][0]["audio"]])
    found = examine.examine(right, exam, tmp_path, 4, ["sums"])
    assert found == examine.examine(Knows(lambda talk: "no"), exam, tmp_path, 4, ["sums"])
    assert json.loads((tmp_path / "figures.json").read_text())["sums"] == found


def test_a_model_can_be_examined_whole(exam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model passes through every measure."""
    make_start.write_files(tmp_path / "model")
    torch.manual_seed(0)
    config = json.loads((tmp_path / "model/config.json").read_text())
    for part, layers in (("text_config", 1), ("audio_config", 1)):
        key = "num_hidden_layers" if part == "text_config" else "encoder_layers"
        config["thinker_config"][part][key] = layers
    config["talker_config"]["accept_hidden_layer"] = 0
    from omni import OmniConfig, OmniProcessor

    model = OmniModel(OmniConfig.from_dict(config))
    model.processor = OmniProcessor.from_pretrained(tmp_path / "model")
    for name, value in (("_MAX_TOKENS", 2), ("_MAX_FRAMES", 3), ("_TIMED", 1), ("_STREAMS", 2)):
        monkeypatch.setattr(examine, name, value)
    monkeypatch.setattr(exam_data, "sentences", lambda held_out=False: SENTENCES)
    monkeypatch.setattr(english, "sentences", lambda held_out=False: SENTENCES)
    monkeypatch.setattr(examine, "sum_forms", lambda operation, held_out: ("{a} + {b}",))
    kept = {name: draw for name, draw in examine.conditions(1).items() if name in ("white", "clips", "digits")}
    monkeypatch.setattr(examine, "conditions", lambda most: kept)
    generate = OmniModel.generate

    def brief(self: OmniModel, inputs: Any, **options: Any) -> Any:
        given = options | {"max_new_tokens": 2}
        return generate(self, inputs, **(given | {"max_frames": 3} if "max_frames" in options else given))

    monkeypatch.setattr(OmniModel, "generate", brief)
    stream = OmniModel.stream
    monkeypatch.setattr(OmniModel, "stream", lambda self, inputs: stream(self, inputs, max_new_tokens=2, max_frames=3))
    figures = examine.examine(model, exam, tmp_path / "out", 2, [n for n in examine.MEASURES if n != "speed"])
    assert {"pictures: white", "speech ends by itself", "answers that end by themselves"} <= set(figures)
    rows = [json.loads(row) for row in (tmp_path / "out/read.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and soundfile.info(tmp_path / "out" / rows[0]["audio"]).samplerate == 24_000


def test_word_errors_are_edits_of_words() -> None:
    assert judges.words("Okay, it's 12 o'clock; twenty-one!") == ["ok", "it's", "twelve", "o'clock", "twenty", "one"]
    assert judges.words("100 and 345") == ["one", "hundred", "and"]
    for wanted, found, count in (("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b", "a x b", 1), ("a b", "b a", 2)):
        assert judges.edits(wanted.split(), found.split()) == count


def test_judged_folders_have_their_figures(tmp_path: Path) -> None:
    class Ears:
        def hear(self, samples: np.ndarray) -> str:
            return "one two"

        def like(self, samples: np.ndarray) -> float:
            return 3.5

    soundfile.write(tmp_path / "a.wav", np.zeros(2400), 24_000)
    rows = [{"audio": "a.wav", "text": text} for text in ("one two", "one three four")]
    (tmp_path / "read.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = judges.judge(Ears(), tmp_path)  # type: ignore[arg-type]
    assert figures == {"read: WER of Whisper tiny.en": 2 / 5, "read: DistillMOS": 3.5}
