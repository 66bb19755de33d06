"""Seeing, first step: each token of the vision encoder comes to name what is drawn where it looks.

    python recipes/nano/name_cells.py MODEL FOLDER [--pictures 160000]

A picture of the small world is 3 x 3 tokens, one a cell; a frame of a clip is 6 x 6. A token is trained towards the sum
of the Thinker's embeddings of what is there: colour and shape, and in a picture the words of the place; towards
`world.NO_WORD` where nothing is. As with hearing, the Thinker then meets tokens that point where words point that it
knows. It takes no part in this, so a core looks at sixty pictures a second instead of seven.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import world
from pictures import CLIP_FPS, CLIP_SECONDS, draw_clip, draw_picture, track
from torch import Tensor, nn
from torch.nn import functional as F

from omni import OmniModel
from omni.training.run.optimiser import lr_factor

_BATCH = 32  # pictures, or as many frames of clips
# Kinds of batches in turn. In a clip one token of 36 has a name, and two frames half a second apart share it: harder.
_KINDS = ("clips", "pictures", "clips", "digits", "clips", "pictures", "clips", "clips")
_NAMED = {"clips": 6.0, "pictures": 2.0, "digits": 2.0}  # weight of a token that has a name
_LEARNING_RATE, _WARMUP = 2e-3, 50
_LOGGED = 20  # steps
_VIDEO_SIDE = 6  # tokens of a frame's side


def words_of(picture: world.Picture) -> list[list[str]]:
    """What the token of each cell is to name; a digit fills the picture and is named in its middle."""
    places = {cell: place for place, cell in world.CORNERS.items()}
    cells: list[list[str]] = [[] for _ in range(9)]
    for item in picture.items:
        kind = world.NUMBERS[int(item.shape)] if item.shape.isdigit() else item.shape
        cells[item.cell] = [item.color, kind, *places.get(item.cell, "").split()]
    return cells


def words_of_frames(clip: world.Clip, middle: tuple[float, float]) -> list[list[str]]:
    """What the tokens of one grid step of a clip are to name: the shape, where its middle is."""
    side = _VIDEO_SIDE
    cells: list[list[str]] = [[] for _ in range(side * side)]
    x, y = (min(side - 1, int(place * side)) for place in middle)
    cells[y * side + x] = [clip.color, clip.shape]
    return cells


Batch = tuple[Tensor, Tensor, list[list[str]]]  # patches, grids, and what each token is to name


class Namer:
    """Draws batches and says what their tokens are to be."""

    def __init__(self, model: OmniModel) -> None:
        assert model.processor is not None
        self.processor, self.table = model.processor, model.thinker.embed_tokens.weight.detach()
        self.size = float(self.table.square().mean().sqrt())
        self._known: dict[str, Tensor] = {}

    def embedding(self, word: str) -> Tensor:
        """The Thinker's embedding of a word behind a space, or of `world.NO_WORD`."""
        if word not in self._known:
            text = word if word == world.NO_WORD else f" {word}"
            (token,) = self.processor.encode_text(text)
            self._known[word] = self.table[token]
        return self._known[word]

    def targets(self, cells: Sequence[list[str]]) -> Tensor:
        """[cells, D]: sums of embeddings."""
        return torch.stack([sum(map(self.embedding, words or [world.NO_WORD]), 0 * self.table[0]) for words in cells])

    def pictures(self, rng: random.Random, skills: Sequence[str]) -> Batch:
        """Pictures that such questions are asked about."""
        drawn = [world.SKILLS[rng.choice(skills)](rng).picture for _ in range(_BATCH)]
        asked = [[{"role": "user", "content": [{"type": "image", "image": draw_picture(p)}]}] for p in drawn]
        inputs = self.processor(asked)
        return inputs.pixel_values, inputs.image_grid_thw, [words for p in drawn for words in words_of(p)]

    def frames(self, rng: random.Random) -> Batch:
        """Grid steps of clips: two frames half a second apart."""
        patches, grids, cells = [], [], []
        for _ in range(_BATCH // 4):
            clip = world.moving(rng).clip
            assert clip is not None
            seconds = rng.uniform(CLIP_SECONDS, 2 * CLIP_SECONDS)
            frames = draw_clip(clip, seconds)
            _, places = track(clip, seconds, random.Random(clip.seed))
            first = rng.randrange(len(frames) - CLIP_FPS // 2)
            both = (first, first + CLIP_FPS // 2)
            pixels, grid = self.processor.vision.grid_step(
                [self.processor.vision.frame(frames[number]) for number in both]
            )
            patches.append(pixels)
            grids.append(grid)
            cells += words_of_frames(clip, tuple(sum(places[n][axis] for n in both) / 2 for axis in (0, 1)))
        return torch.cat(patches), torch.tensor(grids), cells


def batches(namer: Namer) -> Iterator[tuple[str, Batch]]:
    """Endless: kinds and batches."""
    skills = {"pictures": (*world.PICTURE_SKILLS, "dialogue"), "digits": ("digit",)}
    number = 0
    while True:
        rng, kind = random.Random(f"cells {number}"), _KINDS[number % len(_KINDS)]
        yield kind, namer.frames(rng) if kind == "clips" else namer.pictures(rng, skills[kind])
        number += 1


def name_cells(source: Path, folder: Path, pictures: int) -> float:
    """Train the vision encoder of `source` on so many pictures, write the model and, beside it, log.jsonl. Returns the
    share of tokens named right in the end: nearer to their own sum than to any other of the batch."""
    model = OmniModel.from_pretrained(source, parts=["thinker"], dtype="float32", device="cpu")
    eyes, namer, steps = model.vision_encoder, Namer(model), max(1, pictures // _BATCH)
    with torch.no_grad():  # DeepStack begins silent: what is named is in the tokens
        for merger in eyes.merger_list:
            merger.mlp[-1].weight.zero_()
            merger.mlp[-1].bias.zero_()
    learner = torch.optim.AdamW(eyes.parameters(), lr=_LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    folder.parent.mkdir(parents=True, exist_ok=True)
    log: list[dict[str, object]] = []
    logged = min(_LOGGED, max(1, steps // 10))
    recent: list[tuple[float, float]] = []
    start = time.perf_counter()
    for step, (kind, (patches, grids, cells)) in zip(range(steps), batches(namer)):
        wanted = namer.targets(cells) / namer.size
        seen = eyes(patches, grids).embeds / namer.size
        weights = torch.tensor([_NAMED[kind] if words else 1.0 for words in cells])
        loss = (weights * F.mse_loss(seen, wanted, reduction="none").mean(1)).sum() / weights.sum()
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(eyes.parameters(), 1.0)
        for group in learner.param_groups:
            group["lr"] = _LEARNING_RATE * lr_factor(step, steps=steps, warmup_steps=_WARMUP, min_lr_ratio=0.03)
        learner.step()
        recent = [*recent, (loss.item(), named_right(seen.detach(), wanted, cells))][-logged:]
        if (step + 1) % logged == 0 or step + 1 == steps:
            error, right = (sum(values) / len(recent) for values in zip(*recent))
            seconds = (time.perf_counter() - start) / (step + 1)
            log.append(
                {"step": step + 1, "losses": {"cells": error, "named": right}, "loss": error, "seconds": seconds}
            )
            (folder.parent / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n", encoding="utf-8")
    model.save_pretrained(folder)
    return sum(right for _, right in recent) / len(recent)


def named_right(seen: Tensor, wanted: Tensor, cells: Sequence[list[str]]) -> float:
    """Share of the tokens with words whose nearest sum among those of the batch is their own."""
    kinds, which = torch.unique(wanted, dim=0, return_inverse=True)
    named = torch.tensor([bool(words) for words in cells])
    return float((torch.cdist(seen, kinds).argmin(1) == which)[named].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=160_000)
    args = parser.parse_args()
    print(f"named right: {name_cells(args.model, args.folder, args.pictures):.3f}")


if __name__ == "__main__":
    main()
