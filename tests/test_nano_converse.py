"""How omni-nano's Thinker reads conversations that no encoder heard or saw: laid out as the processor lays them out."""

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

import converse
import heard_bank
import make_start
import parts
import perceive
import talk
import timed_clips
import tokens
from drawing import draw_clip, draw_picture
from heard_bank import Bank
from pictures import write_clip
from scenes import clip_from_talk, from_talk
from seeing_data import told

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.generation.prompt import encode_prompt
from omni.training.data.samples import IGNORED

BLANK = 93  # "~"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OmniModel:
    """A model of the recipe's start with fewer layers, and the fixed vectors."""
    folder = tmp_path_factory.mktemp("start")
    make_start.write_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 2
    config["thinker_config"]["audio_config"]["encoder_layers"] = 1
    config["talker_config"]["accept_hidden_layer"] = 1
    made = OmniModel(OmniConfig.from_dict(config))
    with torch.no_grad():
        made.thinker.embed_tokens.weight.copy_(tokens.vectors())
    made.processor = OmniProcessor.from_pretrained(folder)
    return made


class Echo(Bank):
    """A bank whose clips are the vectors of what is said, one token a subword, a second at least."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def said(self, text: str, ids: Any, rng: random.Random) -> torch.Tensor:
        return torch.cat((self.table[list(ids)], self.table[[BLANK]].expand(13, -1)))

    def nothing(self, rng: random.Random) -> torch.Tensor:
        return self.table[[BLANK]].expand(13, -1)

    def any_clip(self, rng: random.Random) -> tuple[str, torch.Tensor]:
        return "the tea is cold", self.said("", [300, 301, 302], rng)


@pytest.fixture
def source(model: OmniModel) -> converse.Conversations:
    return converse.Conversations(model, Echo(model.thinker.embed_tokens.weight.detach()), ["the dog sleeps"])


def sound_of(model: OmniModel, count: int) -> np.ndarray:
    """Quiet sound of which the audio encoder makes so many tokens."""
    encoder = model.audio_encoder
    frames = next(n for n in range(1, 4000) if encoder.num_tokens(n) == count)
    return np.zeros(frames * 160, np.float32)


def messages_of(model: OmniModel, source: converse.Conversations, turns: Any, folder: Path, aloud: bool) -> list[Any]:
    """The same conversation with real media."""
    messages: list[Any] = []
    draw = random.Random(0)
    for number, turn in enumerate(turns):
        content: list[Any] = []
        if turn.sound is not None:
            said = turn.sound.said
            count = len(source.bank.nothing(draw) if said is None else source._said(said, draw))
            content.append({"type": "audio", "audio": sound_of(model, count)})
        if turn.media == "picture":
            content.append({"type": "image", "image": draw_picture(from_talk(turn.picture))})
        if turn.media == "clip":
            words = turn.clip.said
            track = None if words is None else sound_of(model, len(source._said(words, draw)))
            seconds = 2.0 if track is None else max(2.0, len(track) / 16000)
            path = folder / f"{number}.mp4"
            write_clip(path, draw_clip(clip_from_talk(turn.clip), seconds), track)
            content.append({"type": "video", "video": str(path)})
        if turn.question and not turn.sound_asks:
            if aloud and turn.sound is None:
                count = len(source._said(turn.question, draw))
                content.append({"type": "audio", "audio": sound_of(model, count)})
            else:
                content.append({"type": "text", "text": turn.question})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return messages


@pytest.mark.parametrize("aloud", [False, True])
@pytest.mark.parametrize("skill", ["sum", "color", "dictation", "silence", "direction", "clip speech"])
def test_a_conversation_is_laid_out_as_by_the_processor(
    model: OmniModel, source: converse.Conversations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skill: str,
    aloud: bool,
) -> None:  # fmt: skip
    for name, value in (("_INSTRUCTED", 0.0), ("_BEHIND", 0.0), ("_DRAWN", 0.0), ("_WRITTEN_DOWN", 0.0),
                        ("_CLIP_S", (2.0, 2.0))):  # fmt: skip
        monkeypatch.setattr(converse, name, value)
    monkeypatch.setattr(talk, "written", lambda turn, rng: turn.question)
    monkeypatch.setattr(talk, "spoken", lambda turn, rng: turn.question)
    turns = [
        talk.turn(skill, random.Random(3)),
        talk.turn("sum", random.Random(4)),
        talk.turn("hello", random.Random(5)),
    ]
    mine = source.told(turns, random.Random(1), "spoken" if aloud else "typed")
    messages = messages_of(model, source, turns, tmp_path, aloud)
    sounding = any(turn.clip is not None and turn.clip.said is not None for turn in turns)
    inputs = model.processor(messages, use_audio_in_video=sounding, add_generation_prompt=False)
    prompt = encode_prompt(model, inputs)
    ids = prompt.row_ids(0)
    length = len(mine.labels)
    assert ids[length:] in ([], source.newline)
    torch.testing.assert_close(mine.positions, prompt.positions[:, 0, :length])
    text = ~prompt.media[0, :length]
    torch.testing.assert_close(mine.embeds[text], prompt.embeds[0, :length][text])
    learnt = mine.labels != IGNORED
    assert mine.labels[learnt].tolist() == [ids[n + 1] for n in learnt.nonzero().flatten().tolist()]
    answers = model.processor.decode(mine.labels[learnt].tolist())
    assert "".join(answers.split("<|im_end|>")) == "".join(turn.answer for turn in turns)


def test_pictures_are_told_on_the_grid_that_is_drawn(model: OmniModel, source: converse.Conversations) -> None:
    for seed in range(6):
        picture = from_talk(talk.turn("color", random.Random(seed)).picture)
        shown = source.show.picture(picture)
        wanted, (rows, columns) = told(picture)
        assert (1, 2 * rows, 2 * columns) == shown.grid
        torch.testing.assert_close(wanted, shown.wanted)


def test_the_same_seed_gives_the_same_conversation_and_all_skills_can_be_laid_out(
    source: converse.Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converse, "_DRAWN", 0.0)
    first, again = source.draw(random.Random(5)), source.draw(random.Random(5))
    torch.testing.assert_close(first.embeds, again.embeds)
    rng = random.Random(2)
    for number, name in enumerate(
        skill for group, skills in talk.GROUPS.items() if group != "follow" for skill in skills
    ):
        told_once = source.told([talk.turn(name.name, random.Random(number))], rng, "both")
        assert told_once.positions.shape == (3, len(told_once.labels)) and (told_once.labels != IGNORED).any()


def test_it_learns_and_goes_on_where_it_was(model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = model.thinker.embed_tokens.weight.detach().clone()
    for name, value in (("_DRAWN", 0.0), ("_SAVED", 4), ("Bank", lambda path, table: Echo(table)),
                        ("_plain_sentences", lambda: ["the dog sleeps"])):  # fmt: skip
        monkeypatch.setattr(converse, name, value)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = converse.train(model, Path(), tmp_path / "whole", 8, 256)
    rows = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1 and whole == rows[-1]["loss"]
    torch.testing.assert_close(model.thinker.embed_tokens.weight, table, rtol=0, atol=0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "half").mkdir()
    real, count = torch.save, 0

    class Stopped(Exception):
        pass

    def save_once(*args: Any) -> None:
        nonlocal count
        real(*args)
        count += 1
        if count == 1:
            Path(args[1]).rename(tmp_path / "half/state.pt")
            raise Stopped

    model.load_state_dict(start)
    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(Stopped):
        converse.train(model, Path(), tmp_path / "half", 8, 256)
    model.load_state_dict(start)
    converse.train(model, Path(), tmp_path / "half", 8, 256)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], msg=name)


# ---- the bank ----


def test_pieces_of_a_clip_are_the_tokens_up_to_the_one_that_says_them() -> None:
    ends = [(300, 0.5), (301, 0.7), (301, 0.9)]
    assert heard_bank.cut(ends, [6, 8, 11], 20) == [(300, 3, 7), (301, 7, 9), (301, 9, 14)]
    assert heard_bank.cut(ends, [1, 2], 4) == [(300, 0, 2), (301, 2, 4)]  # what did not fit has no piece
    assert heard_bank.cut([], [], 4) == []


def test_a_bank_says_whole_clips_pieces_and_nothing(
    model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(("one two", "three", "", "one")):
        soundfile.write(tmp_path / f"{number}.wav", rng.standard_normal(24_000).astype(np.float32) * 0.1, 16_000)
        ids = model.processor.encode_text(f" {text}") if text else []
        ends = [(label, 0.4 * place + 0.4) for place, label in enumerate(ids)]
        rows.append({"audio": f"{number}.wav", "text": text, "phones": [], "subwords": ends})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(timed_clips, "_HELD_OUT", 0)
    path = tmp_path / "bank.safetensors"
    assert heard_bank.make_bank(model, [tmp_path / "clips.jsonl"], path, 10) == 4
    bank = Bank(path, tokens.vectors())
    assert sorted(bank.texts) == sorted(row["text"] for row in rows) and len(bank.silence) == 3
    assert bank.tokens.shape == (bank.starts[-1], tokens.WIDTH)
    draw = random.Random(1)
    encode = model.processor.encode_text
    assert any(
        torch.equal(bank.said("three", encode(" three"), draw), bank.clip(bank.whole["three"][0])) for _ in range(8)
    )
    pieces = bank.said("two three one", encode(" two three one"), draw)
    assert len(pieces) >= 3 and pieces.shape[1] == tokens.WIDTH
    unknown = bank.said("seven", encode(" seven"), draw)
    assert any(torch.equal(row, bank.table[encode(" seven")[0]]) for row in unknown)
    assert torch.equal(bank.nothing(draw), bank.clip(bank.whole[""][0]))
    text, clip = bank.any_clip(draw)
    assert text and len(clip) == len(bank.clip(bank.whole[text][0]))


def test_encoders_are_given_to_the_start_and_speak_as_loud_as_its_embeddings(model: OmniModel, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for number, text in enumerate(("one", "", "two")):
        soundfile.write(tmp_path / f"{number}.wav", rng.standard_normal(16_000).astype(np.float32) * 0.1, 16_000)
        rows.append({"audio": f"{number}.wav", "text": text})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        model.audio_encoder.proj2.weight.mul_(7.0)
    model.save_pretrained(tmp_path / "hearing")
    factor = perceive.perceive(
        tmp_path / "start", tmp_path / "hearing", None, tmp_path / "out", [tmp_path / "clips.jsonl"]
    )
    made = OmniModel.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    torch.testing.assert_close(made.audio_encoder.proj2.weight, model.audio_encoder.proj2.weight * factor)
    heard = []
    for row in rows[::2]:
        inputs = made.processor(
            [{"role": "user", "content": [{"type": "audio", "audio": str(tmp_path / row["audio"])}]}]
        )
        heard.append(made.encode_audio(inputs.input_features, inputs.feature_attention_mask.sum(1)).embeds)
    size = torch.cat(heard).square().mean().sqrt()
    torch.testing.assert_close(size, tokens.vectors().square().mean().sqrt(), rtol=0.02, atol=0)


def test_the_start_is_a_whole_model_within_its_size(tmp_path: Path) -> None:
    made = make_start.make_start(tmp_path)
    total = sum(parameter.numel() for parameter in made.parameters())
    assert total <= 24_000_000
    again = OmniModel.from_pretrained(tmp_path, dtype="float32", device="cpu")
    torch.testing.assert_close(again.thinker.embed_tokens.weight.detach(), tokens.vectors(), rtol=0, atol=0)
    assert again.thinker.lm_head.weight is again.thinker.embed_tokens.weight
    picture = draw_picture(from_talk(talk.turn("color", random.Random(0)).picture))
    inputs = again.processor([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    assert 49 <= int((inputs.input_ids == again.config.thinker.image_token_id).sum()) <= 64


def test_parts_are_files_of_a_checkpoint(tmp_path: Path) -> None:
    """Some parts make a start to train from, all of them a model; each is a shard of its own."""
    whole = make_start.make_start(tmp_path / "start")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.bfloat16())  # the start's own are finer
    whole.save_pretrained(tmp_path / "trained")
    parts.split(tmp_path / "trained", tmp_path / "parts", ["audio_encoder", "vision_encoder"])
    assert parts.join(tmp_path / "start", tmp_path / "parts", tmp_path / "some") == ["audio_encoder", "vision_encoder"]
    some = OmniModel.from_pretrained(tmp_path / "some", dtype="float32", device="cpu")
    torch.testing.assert_close(some.audio_encoder.state_dict(), whole.audio_encoder.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(some.thinker.embed_tokens.weight.detach(), tokens.vectors(), rtol=0, atol=0)
    parts.split(tmp_path / "trained", tmp_path / "parts", ["thinker", "talker", "code2wav"])
    assert set(parts.join(tmp_path / "start", tmp_path / "parts", tmp_path / "all")) == set(parts.PREFIXES)
    assert not (tmp_path / "all/model.safetensors").exists()
    every = OmniModel.from_pretrained(tmp_path / "all", dtype="float32", device="cpu")
    torch.testing.assert_close(every.state_dict(), whole.state_dict(), rtol=0, atol=0)
    size = sum(path.stat().st_size for path in (tmp_path / "all").glob("*.safetensors"))
    assert size < 48_100_000


def test_parts_of_another_model_are_refused(model: OmniModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "small")
    make_start.make_start(tmp_path / "start")
    parts.split(tmp_path / "small", tmp_path / "parts", ["audio_encoder"])
    with pytest.raises(ValueError, match="of another model"):
        parts.join(tmp_path / "start", tmp_path / "parts", tmp_path / "out")
    with pytest.raises(ValueError, match="belongs to none of"):
        parts.part_of("ear.weight")
