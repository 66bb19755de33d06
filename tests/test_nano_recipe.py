"""The recipe of omni-nano: its small world is consistent, and every stage of it learns on the bundled clips."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nano"
sys.path.insert(0, str(RECIPE))

import make_model  # noqa: E402
import model_card  # noqa: E402
import run  # noqa: E402
import world  # noqa: E402
from pictures import SIZE, draw_clip, draw_picture  # noqa: E402

from omni.packaged.nano import NANO_DATA  # noqa: E402


@pytest.mark.parametrize("skill", world.SKILLS)
def test_questions_follow_from_their_seed(skill: str) -> None:
    """The same seed gives the same task, and every word of question and answer is in the vocabulary."""
    known = set(world.vocabulary())
    for seed in range(60):
        task = world.SKILLS[skill](random.Random(seed))
        assert task == world.SKILLS[skill](random.Random(seed))
        assert {*task.question.split(), *task.answer.split()} <= known
        assert task.skill == skill


def test_arithmetic_is_right() -> None:
    for seed in range(300):
        task = world.arithmetic(random.Random(seed))
        words = task.question.split()
        first, sign, second = words[-3:]
        a, b = world.NUMBERS.index(first), world.NUMBERS.index(second)
        assert world.NUMBERS.index(task.answer) == {"plus": a + b, "minus": a - b, "times": a * b}[sign]


def test_held_out_words_are_not_trained_on() -> None:
    trained = {world.unknown(random.Random(seed)).question for seed in range(3000)}
    asked = {world.unknown(random.Random(seed), held_out=True).question for seed in range(300)}
    assert asked and not asked & trained


def test_further_questions_fit_the_picture() -> None:
    """What else is asked about a picture has one right answer, and never what was not drawn."""
    for seed in range(200):
        rng = random.Random(seed)
        task = world.SKILLS[rng.choice((*world.PICTURE_SKILLS, *world.CLIP_SKILLS))](rng)
        for skill, tasks in world.further(task, rng).items():
            for other in tasks:
                assert (other.picture, other.clip) == (task.picture, task.clip) and other.answer
                asked = [word for word in other.question.split() if word in world.SHAPES]
                if skill in ("color", "position"):
                    (item,) = [item for item in task.picture.items if item.shape == asked[-1]]
                    assert other.answer in (item.color, {v: k for k, v in world.CORNERS.items()}.get(item.cell))
                elif skill == "shape":
                    (item,) = [item for item in task.picture.items if item.color in other.question.split()]
                    assert other.answer == item.shape
                elif skill == "everything":
                    assert other.answer.count("the ") == len(task.picture.items)


def test_drawings() -> None:
    """A circle at the top left is there and nowhere else; a clip moves the way that it says."""
    picture = draw_picture(world.Picture((world.Item("circle", "red", 0),), seed=1))
    assert picture.size == (SIZE, SIZE)
    red = [(x, y) for x in range(SIZE) for y in range(SIZE) if is_red(picture.getpixel((x, y)))]
    assert red and max(x for x, _ in red) < SIZE / 2 and max(y for _, y in red) < SIZE / 2
    for direction, axis, sign in (("to the left", 0, -1), ("to the right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        frames = draw_clip(world.Clip("square", "red", direction, seed=2), seconds=2.0)
        centres = [
            sum(place[axis] for place in places) / len(places)
            for places in (
                [(x, y) for x in range(SIZE) for y in range(SIZE) if is_red(frame.getpixel((x, y)))]
                for frame in (frames[0], frames[-1])
            )
        ]
        assert (centres[1] - centres[0]) * sign > SIZE / 4


def is_red(pixel: object) -> bool:
    r, g, b = pixel  # type: ignore[misc]
    return r > 150 and g < 110 and b < 110


def test_the_tokenizer_knows_every_word(tmp_path: Path) -> None:
    from omni import OmniProcessor

    make_model.make_model(tmp_path)
    processor = OmniProcessor.from_pretrained(tmp_path)
    for word in world.vocabulary():
        text = f"say {word}"
        ids = processor.encode_text(text)
        assert processor.decode(ids) == text and len(ids) == 2 + word.count("'")
    assert set(make_model.GENERATION["speakable_words"]) <= set(world.vocabulary())
    assert processor.decode(processor.encode_text("WHAT is Xyz, 12?")) == "what is xyz, 12?"


def test_the_packaged_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    """Sizes of pictures, voices and words that it says: what the recipe writes and what ships are the same."""
    from omni.config.model import OmniConfig

    make_model.make_model(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((NANO_DATA / name).read_text()), name
    made, packaged = (OmniConfig.from_pretrained(folder).talker_config for folder in (tmp_path, NANO_DATA))
    assert made is not None and packaged is not None
    assert made.speaker_id == packaged.speaker_id == {"slt": 318}
    assert packaged.speaker_id["slt"] < packaged.text_config.vocab_size


def test_the_card_is_what_the_recipe_writes(tmp_path: Path) -> None:
    """All that the recipe says of any model stands on the packaged card, and so do its figures on others' material."""
    packaged = (NANO_DATA / "README.md").read_text()
    size = sum(path.stat().st_size for path in NANO_DATA.glob("*.safetensors"))
    for fixed in re.split(r"\{[a-z]+\}", model_card.CARD.replace("{megabytes:.0f}", f"{size / 1e6:.0f}")):
        assert fixed.strip() in packaged, fixed
    figures = json.loads(model_card.STRANGERS.read_text())
    assert figures and model_card.strangers_table(figures) in packaged


def test_a_card_keeps_the_rows_that_nobody_measured(tmp_path: Path) -> None:
    report = {"questions of each skill": 3, "understanding": {"typed": {"all": 1.0}}, "speech": {"ended": 1.0},
              "speed": {"threads": 1.0}, "generate, stream and engine agree": 1.0}  # fmt: skip
    rows = json.loads(model_card.STRANGERS.read_text())
    first, *others = rows
    model_card.write_card(tmp_path, report, "Some notes.", {first: "12 %", "songs, right": "3 %"})
    card = (tmp_path / "README.md").read_text()
    assert f"| {first} | 12 % |" in card and "| songs, right | 3 % |" in card and "Some notes." in card
    assert all(f"| {name} | not measured |" in card for name in others)
    assert "| typed | **all** | 100.0% | 97% |" in card


def test_the_smoke_recipe_learns(tmp_path: Path) -> None:
    """Every stage for a few steps on bundled clips: losses fall, and the parts make a whole checkpoint."""
    command = [sys.executable, str(RECIPE / "run.py"), "--smoke", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "what each stage bought" in done.stdout
    for name in ("1_code2wav", "2_text", "3_hearing", "3_cells", "3_thinking", "4_talker_pairs"):
        folder = name.split("_", 1)[1]
        rows = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        totals = [row["loss"] for row in rows if "losses" in row]
        third = len(totals) // 3
        assert sum(totals[-third:]) / third < 0.95 * sum(totals[:third]) / third, (name, totals)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size <= 40_000_000
    again = subprocess.run([*command, "--list"], capture_output=True, text=True, cwd=ROOT)
    assert all(line.endswith("done") for line in again.stdout.splitlines()) and len(again.stdout.splitlines()) >= 9


def test_the_recipe_refuses_a_step_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE / "run.py"), "--work", str(tmp_path), "--only", "singing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "singing" in done.stderr and "1_code2wav" in done.stderr


def test_steps_stand_in_order() -> None:
    names = [step.name for step in run.steps()]
    assert names[0] == "data" and names[-1] == "card" and len(set(names)) == len(names)
    assert [step.name for step in run.steps(smoke=True)] == [n for n in names if n not in ("data", "report", "card")]
