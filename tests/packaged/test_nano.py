"""omni-nano, the packaged trained model: it answers, streams what it generates, and opens in transformers."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni import AudioChunk, OmniEngine, OmniModel, OmniOutput, TextDelta
from omni.cli.main import main
from omni.packaged.nano import NANO_DATA, QUESTIONS, nano_model

Capture = pytest.CaptureFixture[str]
DEMO_ANSWERS = ("the old king follows your blue fish", "purple", "to the left")
MAX_FRAMES = 100


@pytest.fixture(scope="module")
def nano() -> OmniModel:
    return nano_model()


def ask(nano: OmniModel, messages: object, **arguments: object) -> OmniOutput:
    return nano.generate(nano.processor(messages), max_frames=MAX_FRAMES, **arguments)  # type: ignore[misc]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_weights_are_small_and_finite(nano: OmniModel) -> None:
    weights = list(NANO_DATA.glob("*.safetensors"))
    assert len(weights) == 1 and weights[0].stat().st_size <= 40_000_000
    assert all(torch.isfinite(parameter).all() for parameter in nano.parameters())
    card = (NANO_DATA / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "pocketsphinx" in card.lower() and "real-time factor" in card


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_it_hears_sees_and_speaks(nano: OmniModel, number: int) -> None:
    """The demo's questions, answered in text and in speech that ends by itself."""
    out = ask(nano, QUESTIONS[number].messages())
    assert out.text == [DEMO_ANSWERS[number]] and out.reason == ["stop"]
    assert out.audio is not None and out.sample_rate == 24000
    words = len(DEMO_ANSWERS[number].split())
    assert 0.15 * words < len(out.audio[0]) / 24000 < 0.6 * words + 0.6
    assert 0.02 < float(out.audio[0].square().mean().sqrt()) < 0.5


def test_it_reads(nano: OmniModel) -> None:
    questions = {
        "What is seven plus five?": "twelve",
        "say the small dog sees a tree": "the small dog sees a tree",
        "what is the capital of france?": "i don't know",
    }
    out = ask(nano, [user(question) for question in questions], return_audio=False)
    assert out.text == list(questions.values())


@pytest.mark.parametrize("size", [(16, 16), (100, 100), (224, 224), (1000, 1000), (640, 480), (3000, 500), (90, 1600)])
def test_it_sees_pictures_of_any_size(nano: OmniModel, size: tuple[int, int]) -> None:
    """A picture fills nine tokens, whatever its size and shape; this is the demo's, enlarged or stretched."""
    with Image.open(NANO_DATA / "demo" / "picture.png") as image:
        shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    content = [{"type": "image", "image": shown}, {"type": "text", "text": "what color is the star"}]
    inputs = nano.processor([{"role": "user", "content": content}])  # type: ignore[misc]
    assert inputs.image_grid_thw.tolist() == [[1, 6, 6]]
    assert size == (16, 16) or nano.generate(inputs, return_audio=False).text == ["purple"]


def test_it_sees_clips_of_any_size(nano: OmniModel) -> None:
    with av.open(str(NANO_DATA / "demo" / "clip.mp4")) as clip:
        frames = [frame.to_image() for frame in clip.decode(video=0)][::4]  # two a second
    for size in ((128, 128), (640, 480), (200, 1000)):
        film = np.stack([frame.resize(size, Image.Resampling.BICUBIC) for frame in frames])
        content = [{"type": "video", "video": film, "fps": 2.0}, {"type": "text", "text": "which way does it move"}]
        inputs = nano.processor([{"role": "user", "content": content}])  # type: ignore[misc]
        assert inputs.video_grid_thw.tolist()[0][1:] == [12, 12]
        assert nano.generate(inputs, return_audio=False).text == ["to the left"], size


def test_it_has_one_voice(nano: OmniModel, capsys: Capture) -> None:
    """The one that it was trained on, by its name and without one; no others are listed anywhere."""
    spoken = nano.speak("the small dog", seed=0)
    assert torch.equal(spoken, nano.speak("the small dog", speaker="SLT", seed=0)) and len(spoken) > 0.8 * 24000
    with pytest.raises(ValueError, match=r"unknown speaker 'ethan'; this checkpoint has slt$"):
        nano.speak("the small dog", speaker="ethan")
    assert main(["info", "omni-nano"]) == 0
    assert "speakers: slt\n" in capsys.readouterr().out


def test_stream_and_engine_say_what_generate_says(nano: OmniModel) -> None:
    """Greedy ids, codes and sound are the same three ways."""
    messages = QUESTIONS[1].messages()
    whole = ask(nano, messages)
    assert whole.audio is not None
    text, sound = "", []
    for event in nano.stream(nano.processor(messages), max_frames=MAX_FRAMES):  # type: ignore[misc]
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, AudioChunk):
            sound.append(event.samples)
    assert text == DEMO_ANSWERS[1]
    torch.testing.assert_close(torch.cat(sound), whole.audio[0], atol=1e-4, rtol=0)
    samples, rate_hz = soundfile.read(NANO_DATA / "demo" / "question.wav", dtype="float32")
    with OmniEngine(nano, max_sessions=2) as engine, engine.session() as session:
        session.push_image(NANO_DATA / "demo" / "picture.png")
        session.push_audio(torch.from_numpy(samples), rate_hz)
        events = list(session.respond(max_frames=MAX_FRAMES))
    served = torch.cat([event.samples for event in events if isinstance(event, AudioChunk)])
    torch.testing.assert_close(served, whole.audio[0], atol=1e-4, rtol=0)


def test_the_demo(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--out-dir", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert all(answer in printed for answer in DEMO_ANSWERS)
    assert "first sound" in printed and "real-time factor" in printed
    assert printed.splitlines()[-1].startswith("Talk with it yourself: ") and printed.endswith(" chat\n")
    assert sorted(os.listdir(tmp_path / "new")) == [
        "answer_1.wav",
        "answer_2.wav",
        "answer_3.wav",
        "out.png",
        "out.wav",
    ]
    with Image.open(tmp_path / "new" / "out.png") as image:
        assert image.format == "PNG"


def test_chat_and_speak_without_a_model(tmp_path: Path, capsys: Capture) -> None:
    """They use omni-nano, and say so on stderr; results stay alone on stdout."""
    wav = tmp_path / "answer.wav"
    assert main(["chat", "--out", str(wav), "what is two plus two"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "four" and "omni-nano answers" in captured.err and wav.exists()
    assert main(["speak", "--out", str(wav), "to the right"]) == 0
    said = capsys.readouterr().err
    assert "omni-nano" in said and "cannot say" not in said and soundfile.info(wav).duration > 0.4


def test_speak_names_words_that_it_cannot_say(tmp_path: Path, capsys: Capture) -> None:
    """On stderr, before it speaks, with those that it can say; it speaks all the same."""
    wav = tmp_path / "said.wav"
    assert main(["speak", "--out", str(wav), "The dog sees hello World, hello 7!"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert "omni-nano cannot say: hello, world, 7" in lines and "cannot say" not in captured.out
    known = next(line for line in lines if line.startswith("It can say: ")).partition(": ")[2].split(", ")
    assert {"dog", "sees", "seven", "don't"} <= set(known) and "what" not in known and wav.exists()


def test_it_opens_by_name(nano: OmniModel) -> None:
    model = OmniModel.from_pretrained("omni-nano", parts=["thinker"])
    assert model.thinker is not None and model.thinker.embed_tokens.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.thinker.embed_tokens.weight.float(), nano.thinker.embed_tokens.weight)  # type: ignore[union-attr]
