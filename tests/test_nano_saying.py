"""The lines that omni-nano's voices say, and how its Talker learns to say them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import clip_files
import context_data
import english
import make_start
import say_lines
import tokens
import voice_data
from engines import PHONES, Manner

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.training.codec.mel_codec import MelCodec
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.manifest import Manifest, read_row
from omni.training.objectives.passes import talker_pass, thinker_pass

SENTENCES = ("the dog sleeps in the sun.", "she never said that, did she?", "a dream of green hills")


@pytest.fixture(autouse=True)
def wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english, "sentences", lambda held_out=False: SENTENCES)
    monkeypatch.setattr(voice_data, "sentences", lambda held_out=False: SENTENCES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """The recipe's start with fewer layers; its encoder of 80 ms a token is not trained."""
    folder = tmp_path_factory.mktemp("start")
    make_start.write_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 1
    config["thinker_config"]["audio_config"]["encoder_layers"] = 1
    config["talker_config"]["accept_hidden_layer"] = 0
    config["talker_config"]["text_config"]["num_hidden_layers"] = 2
    torch.manual_seed(0)
    made = OmniModel(OmniConfig.from_dict(config))
    with torch.no_grad():
        made.thinker.embed_tokens.weight.copy_(tokens.vectors())
    made.processor = OmniProcessor.from_pretrained(folder)
    return made


def test_lines_are_of_all_kinds_and_follow_from_their_number() -> None:
    lines = [voice_data.draw_line(random.Random(f"line heart {number}")) for number in range(400)]
    assert lines == [voice_data.draw_line(random.Random(f"line heart {number}")) for number in range(400)]
    assert any("," in text for text, _ in lines) and any(text[0].isupper() for text, _ in lines)
    assert any(text.split()[0].isdigit() for text, _ in lines)
    for text, said in lines:
        assert said and not any(letter.isdigit() for letter in said)
        assert len(english.words_of(text)) <= len(english.words_of(said)) or "-" in said


def test_a_line_is_loud_trimmed_and_at_24_khz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(text: str, manner: Manner) -> tuple[np.ndarray, int]:
        tone = np.sin(np.arange(int(24_000 / manner.speed)) * 0.1).astype(np.float32) * 0.02
        return np.concatenate((np.zeros(24_000, np.float32), tone, np.zeros(24_000, np.float32))), 24_000

    class Now:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Now:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, function: Any, *args: Any) -> Any:
            value = function(*args)
            return type("Done", (), {"result": lambda _: value})()

    monkeypatch.setattr(voice_data, "heart", engine)
    monkeypatch.setattr(clip_files, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(clip_files, "ROWS", 3)
    voice_data.make_lines(tmp_path, 6)
    rows = {v: [json.loads(row) for row in (tmp_path / f"lines_{v}.jsonl").read_text().splitlines()]
            for v in voice_data.SHARES}  # fmt: skip
    assert len(rows["heart"]) == 6 and len(rows["oak"]) == 3
    for voice, turns_per_sample in (("heart", 0.1), ("oak", 0.085)):  # as long, and lower
        sound, rate_hz = soundfile.read(tmp_path / rows[voice][0]["audio"])
        assert rate_hz == 24_000 and 24_000 <= len(sound) < 30_000 and abs(np.abs(sound).max() - 0.6) < 0.01
        heard = np.fft.rfftfreq(len(sound))[np.abs(np.fft.rfft(sound)).argmax()] * 2 * np.pi
        assert heard == pytest.approx(turns_per_sample, rel=0.02)
        assert {row["speaker"] for row in rows[voice]} == {voice}


@pytest.fixture(scope="module")
def encoded(model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four lines, in two voices, as `say_lines.encode` writes them."""
    folder = tmp_path_factory.mktemp("lines")
    rng, rows = np.random.default_rng(0), []
    for number, text in enumerate(("one two", "three", "Hello, 4!", "green hills")):
        soundfile.write(folder / f"{number}.flac", rng.standard_normal(20_000 + 5000 * number) * 0.1, 24_000)
        ids = model.processor.encode_text(text)
        ends = [[label, round(0.2 + 0.1 * place, 3)] for place, label in enumerate(ids)]
        phones = [["pau", 0.1], ["hh", 0.2], ["aa", ends[-1][1]], ["pau", 1.0]]
        rows.append({"audio": f"{number}.flac", "text": text, "speaker": ("heart", "oak")[number % 2],
                     "phones": phones, "subwords": ends})  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = MelCodec(make_start.NUM_CODEBOOKS, make_start.CODEBOOK_SIZE, 16)
    codec.books.copy_(torch.randn(codec.books.shape, generator=torch.Generator().manual_seed(1)))
    codec.components.copy_(torch.randn(codec.components.shape, generator=torch.Generator().manual_seed(2)))
    assert say_lines.encode(model.processor, codec, [folder / "lines.jsonl"], folder / "lines.safetensors") == 4
    return folder / "lines.safetensors"


def test_lines_have_codes_and_say_a_subword_in_each_frame(model: OmniModel, encoded: Path) -> None:
    lines = say_lines.Lines(model, encoded).lines
    assert [len(line.ids) for line in lines] == sorted(len(line.ids) for line in lines)
    blank = tokens.SIZE
    for line in lines:
        assert line.codes.shape == (8, len(line.said)) and 10 <= len(line.said) <= 20
        assert line.said[[0, -1]].tolist() == [blank, blank] and set(line.said.tolist()) == {blank, *line.ids}
        assert [PHONES[phone] for phone in line.phones[1].tolist()] == ["pau", "hh", "hh", "hh"]
        assert line.phones.shape == (len(line.said), 4)
    assert {line.voice for line in lines} == {"heart", "oak"}


def test_a_line_is_read_as_a_row_of_a_manifest_is(model: OmniModel, encoded: Path) -> None:
    """The conversation that is put together here is what the library makes of the same messages."""
    lines = say_lines.Lines(model, encoded)
    line, rng = lines.lines[-1], random.Random(3)
    mine = next(s for s in (lines.sample(line, rng) for _ in range(20)) if s.speech[0].header)
    ids = mine.inputs.input_ids[0].tolist()
    asked = model.processor.decode(ids[3 : ids.index(model.config.im_end_token_id)])
    row = {
        "messages": [{"role": "user", "content": asked},
                     {"role": "assistant", "content": model.processor.decode(line.ids)}],
        "codes": line.codes.tolist(), "speaker": line.voice,
    }  # fmt: skip
    made = SampleMaker(model.processor, model.config)(read_row(row, lambda path: path))
    given = []
    for sample in (mine, made):
        batch = collate([sample])
        with torch.no_grad():
            spoken = talker_pass(model, batch, thinker_pass(model, batch, needed=False))
        given.append(spoken.logits)
    torch.testing.assert_close(*given)


def test_it_learns_and_goes_on_where_it_was(
    model: OmniModel, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(say_lines, "_FRAMES", 60)
    monkeypatch.setattr(say_lines, "_SAVED", 5)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    last = say_lines.train(model, encoded, tmp_path / "whole", 10)
    rows = [json.loads(row) for row in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert last == rows[-1]["losses"] and last["named"] < rows[0]["losses"]["named"]
    assert last["codebook_0"] < rows[0]["losses"]["codebook_0"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {name.split(".")[0] for name, value in start.items() if not torch.equal(value, weights[name])}
    assert changed == {"talker"}
    model.load_state_dict(start)
    real, kept = torch.save, []

    def save(value: Any, path: Path) -> None:
        real(value, path)
        kept.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        say_lines.train(model, encoded, tmp_path / "half", 10)
    kept[0].rename(tmp_path / "half/state.pt")
    monkeypatch.setattr(torch, "save", real)
    model.load_state_dict(start)
    say_lines.train(model, encoded, tmp_path / "half", 10)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], msg=name)


def test_short_lines_come_first(model: OmniModel, encoded: Path) -> None:
    lines = say_lines.Lines(model, encoded)
    shortest = min(len(line.ids) for line in lines.lines)
    assert all(len(line.ids) <= max(2, shortest) for line in lines.draw(0))
    later = [line for step in range(5000, 5005) for line in lines.draw(step)]
    assert max(len(line.ids) for line in later) == max(len(line.ids) for line in lines.lines)


def test_conversations_with_real_media_can_be_learnt_from(
    model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of row is one that the library's own stages read, with an answer's speech for each turn."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(48_000).astype(np.float32) * 0.1
    monkeypatch.setattr(context_data, "asked", lambda text, rng, folder: noise[: 2000 * len(text.split())])
    monkeypatch.setattr(voice_data, "said", lambda voice, text: noise[: 3000 * len(text.split())])
    context_data.make_context(tmp_path, 14)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "context").iterdir()}
    context_data.make_context(tmp_path, 14)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "context").iterdir()}
    manifest, kinds = Manifest(tmp_path / "context.jsonl"), set()
    codes = torch.zeros(8, 4, dtype=torch.int64)
    make = SampleMaker(model.processor, model.config, lambda speech: codes)
    for number in range(len(manifest)):
        sample = make(manifest[number])
        raw = manifest.raw(number)
        assert len(sample.speech) == len(raw["messages"]) // 2 == len(raw["speech"])
        kinds |= {item["type"] for message in raw["messages"][::2] for item in message["content"]}
    assert kinds >= {"text", "audio", "image"}
