"""How the vision encoder of omni-nano learns to name things: what its tokens say, training, and in which vectors."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from omni.config.qwen3_omni import VisionEncoderConfig
from omni.encoders.vision import VisionEncoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "nano"))

import name_things
from scenes import Clip, Item, Picture
from seeing_data import KINDS_OF_THINGS, NOTHING, WORD, WORDS, Show, packed, tokens_of, told

SMALL = name_things.VISION | {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}


def said_in(row: torch.Tensor) -> dict[str, float]:
    return {word: round(float(row[place]), 3) for word, place in WORD.items() if row[place] > 0}


def test_a_token_says_what_it_holds() -> None:
    """The thing in the middle of a token is said there alone; at an edge two tokens, at a corner four share it."""
    wanted, things = tokens_of([((0.625, 0.375), ("red", "star"))], 4, 4)
    assert things == [(6, ("red", "star"))]
    assert said_in(wanted[6]) == {"red": 1, "star": 1}
    assert all(said_in(wanted[place]) == {NOTHING: 1} for place in range(16) if place != 6)
    wanted, _ = tokens_of([((0.5, 0.375), ("blue",)), ((0.999, 0.001), ("green",))], 4, 4)
    assert [said_in(wanted[place]) for place in (5, 6)] == [{NOTHING: 0.5, "blue": 0.5}] * 2
    assert said_in(wanted[3]) == {"green": 1}
    wanted, _ = tokens_of([((0.5, 0.5), ("pink",))], 2, 8)
    assert [said_in(row).get("pink", 0) for row in wanted] == [0, 0, 0, 0.25, 0.25, 0, 0, 0] * 2


def test_shares_add_up_to_the_number_of_things() -> None:
    rng = random.Random(0)
    for _ in range(50):
        middles = [(rng.random(), rng.random()) for _ in range(3)]
        wanted, _ = tokens_of([(middle, ("grey", "heart")) for middle in middles], 5, 9)
        assert float(wanted[:, WORD["heart"]].sum()) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize(
    ("pixels", "grid"),
    [
        ((256, 256), (16, 16)),
        ((64, 64), (14, 14)),
        ((2000, 1000), (10, 22)),
        ((200, 800), (32, 8)),
        ((224, 224), (14, 14)),
    ],
)
def test_pictures_of_all_sizes_take_about_as_many_tokens(pixels: tuple[int, int], grid: tuple[int, int]) -> None:
    picture = Picture((Item("circle", "red", 2),), 1, ground="white", pixels=pixels)
    shown = Show().picture(picture)
    assert shown.grid[1:] == grid and len(shown.patches) == grid[0] * grid[1]
    assert len(shown.wanted) == grid[0] * grid[1] // 4
    wanted, shape = told(picture)
    assert torch.equal(wanted, shown.wanted) and shape == (grid[0] // 2, grid[1] // 2)
    ((token, words),) = shown.things
    assert words == ("red", "circle", "top", "right")
    columns = grid[1] // 2
    assert token % columns >= columns // 2 and token // columns <= grid[0] // 4


def test_parts_of_tokens_are_covered_by_things() -> None:
    """As much as the thing is large, where it is; its kind is said wherever it covers a good part of a token."""
    item = Item("square", "red", 4, middle=(0.5, 0.25), size=0.4, turn=0.0)
    shown = Show().picture(Picture((item,), 1, ground="white", pixels=(256, 256)))
    area = (0.4 * 0.85) ** 2
    assert float(shown.covered.mean()) == pytest.approx(area, rel=0.1)
    assert int(shown.covered.mean(1).argmax()) in (11, 12, 19, 20)
    kinds = shown.kinds.unflatten(0, (8, 8))
    assert (kinds[0:3, 3:5] == KINDS_OF_THINGS.index("square")).all() and (kinds[4:] == -1).all()
    line = Show().picture(Picture((replace(item, outline=True),), 1, ground="white", pixels=(256, 256)))
    assert float(line.covered.mean()) == pytest.approx(area, rel=0.1)


def test_what_is_said_aside_is_not_kept() -> None:
    encoder = name_things.new_encoder(SMALL, aside=True)
    kept = name_things.new_encoder(SMALL)
    kept.load_state_dict(name_things.without_asides(encoder.state_dict()))
    batch = Show().batch(3, 2)
    with torch.no_grad():
        more, said = encoder(batch.patches, batch.grids).embeds, kept(batch.patches, batch.grids).embeds
    assert said.shape[1] == len(WORDS) and more.shape[1] == len(WORDS) + name_things.ASIDE
    assert torch.allclose(more[:, : len(WORDS)], said, atol=1e-6)
    assert name_things.loss_of(more, batch) > name_things.loss_of(said, batch)


def test_frames_say_which_way_a_thing_moves() -> None:
    for direction, words in (("to the left", ("to", "left")), ("down", ("down",)), ("still", None)):
        clip = Clip("star", "blue", direction, 3, ground="white", pixels=(320, 180))
        shown = Show().clip(clip, random.Random(1))
        assert shown.grid == (1, 12, 12)
        ((_, said),) = shown.things
        assert said[:2] == ("blue", "star") and (words is None or said[2:] == words)
        frames = shown.patches.unflatten(1, (3, 2, -1)).unbind(2)
        assert torch.equal(*frames) == (direction == "still")


def test_batches_are_the_same_every_time() -> None:
    one, other = (Show().batch(9000, 6) for _ in range(2))
    assert torch.equal(one.patches, other.patches) and one.things == other.things
    assert len(one.grids) in (6, 10) and len(one.wanted) * 4 == len(one.patches)
    tokens = (one.grids[:, 1] * one.grids[:, 2]).tolist()
    assert tokens == sorted(tokens)


def test_training_lowers_the_loss_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps are enough to see it learn; a run that was cut gives the same weights as one that was not."""
    monkeypatch.setattr(name_things, "_SAVED", 6)
    monkeypatch.setattr(name_things, "_WARMUP", 4)
    monkeypatch.setattr(name_things, "_EXAMPLES", 1)
    name_things.train(tmp_path / "whole", 24, config=SMALL, batch=4)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 24
    test = Show().batch(9001, 12)
    before, after = name_things.new_encoder(SMALL), name_things.new_encoder(SMALL)
    after.load_state_dict(name_things.trained(tmp_path / "whole"))
    with torch.no_grad():
        first, last = (float(name_things.loss_of(name_things.says(e, test), test)) for e in (before, after))
    assert last < 0.93 * first

    measure, calls = name_things.names_right, []

    def cut(said: torch.Tensor, batch: object) -> list[bool]:
        calls.append(batch)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return measure(said, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(name_things, "names_right", cut)
    with pytest.raises(KeyboardInterrupt):
        name_things.train(tmp_path / "cut", 24, config=SMALL, batch=4)
    assert not (tmp_path / "cut" / "vision.safetensors").exists()
    name_things.train(tmp_path / "cut", 24, config=SMALL, batch=4)
    assert len(calls) == 15 + 12
    whole, went_on = (name_things.trained(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.allclose(whole[name], went_on[name], atol=1e-6) for name in whole)


def test_every_condition_is_judged() -> None:
    encoder = name_things.new_encoder(SMALL)
    judged = name_things.judge(encoder, 1)
    assert {"photographed", "small", "turned", "outlines", "clips", "digits"} <= set(judged)
    assert all(0 <= share <= 1 for shares in judged.values() for share in shares.values())


def test_the_encoder_says_its_words_in_the_vectors_of_a_table() -> None:
    """After `put_into` a token is the sum of the embeddings of the words, each as much as it was said."""
    table, ids = torch.randn(len(WORDS) + 5, SMALL["out_hidden_size"]) * 0.02, {}
    for place, word in enumerate(WORDS):
        ids[word if word == NOTHING else f" {word}"] = place + 3
    target = VisionEncoder(VisionEncoderConfig(**SMALL))
    model = SimpleNamespace(
        processor=SimpleNamespace(encode_text=lambda text: [ids[text]]),
        thinker=SimpleNamespace(embed_tokens=SimpleNamespace(weight=table)),
        vision_encoder=target,
    )
    encoder = name_things.new_encoder(SMALL)
    torch.nn.init.normal_(encoder.merger.mlp[-1].weight)
    name_things.put_into(model, encoder.state_dict())  # type: ignore[arg-type]
    shown = packed([Show().picture(Picture((Item("heart", "pink", 4),), 2))])
    said, told = (module(shown.patches, shown.grids).embeds for module in (encoder, target))
    assert torch.allclose(said @ table[3:-2], told, atol=1e-4)
    other = VisionEncoder(VisionEncoderConfig(**(SMALL | {"depth": 1})))
    with pytest.raises(ValueError, match="vision_config is not that of the training"):
        name_things.put_into(SimpleNamespace(**{**vars(model), "vision_encoder": other}), encoder.state_dict())


def test_the_encoder_is_small() -> None:
    encoder = VisionEncoder(VisionEncoderConfig(**name_things.VISION))
    assert sum(value.numel() for value in encoder.parameters()) <= 1_200_000
