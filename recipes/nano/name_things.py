"""Seeing: the vision encoder learns to say, in each token, what thing is there.

    python recipes/nano/name_things.py train FOLDER [--steps 20000] [--workers 1]
    python recipes/nano/name_things.py judge FOLDER            # how often it is right, by condition
    python recipes/nano/name_things.py put FOLDER MODEL OUT    # into a model, in the vectors of its Thinker's words

The encoder's last layer gives a weight for each word (`seeing_data.WORDS`), and is trained towards those that
`seeing_data` asks for, on pictures that are drawn as they are needed and never come twice. Only then is that layer
multiplied with the Thinker's embeddings of the words: a token becomes the sum of the embeddings of what it says,
whatever those are, and this training does not depend on them. Least squares make a weight the encoder's belief: of two
colours that it hesitates between, a token says some of each.

Training goes on from its last checkpoint, and a batch is the same in every run. Products are computed in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import OTHER, SHAPES
from grounds import KINDS
from safetensors.torch import load_file, save_file
from scenes import Clip, Picture, any_pixels, random_clip, random_picture
from seeing_data import (
    COLOR_WORDS,
    KIND_WORDS,
    KINDS_OF_THINGS,
    MERGE,
    NOTHING,
    PARTS,
    PATCH,
    WHERE,
    WORD,
    WORDS,
    Batch,
    Show,
    packed,
)
from shades import COLORS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from omni import OmniModel
from omni.config.qwen3_omni import VisionEncoderConfig
from omni.encoders.vision import VisionEncoder
from omni.layers.attention_backends import use_attention
from omni.training.run.optimiser import lr_factor

VISION: dict[str, Any] = {  # vision_config of the model; no DeepStack: all that is seen is said in the tokens
    "depth": 5, "hidden_size": 112, "num_heads": 4, "intermediate_size": 336, "out_hidden_size": 320,
    "hidden_act": "gelu",  # several times faster here than its approximation by tanh
    "num_position_embeddings": 64, "deepstack_visual_indexes": (), "patch_size": PATCH, "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}  # fmt: skip
_BATCH = 16  # pictures, or pairs of frames
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 1e-3, 100, 0.02
_THING = 4.0  # weight of a token that holds a thing
_CHOICE, _SHARPNESS = 0.2, 8.0  # of the cross-entropy of colour and kind beside least squares; of its logits
ASIDE = PARTS + len(KINDS_OF_THINGS)
_AREA, _PART = 4.0, 0.5  # weight of what is covered, and of what kind it is
_EXAMPLES, _FIRST_EXAMPLE = 4, 10**9  # batches, and where they are numbered from: none of the training
_DULLEST = 0.01  # components of less than this share of the mean variance are not brought to one: they are noise
_LOGGED, _SAVED = 50, 500  # steps


def new_encoder(
    config: Mapping[str, Any] = VISION, seed: int = 0, examples: Tensor | None = None, *, aside: bool = False
) -> VisionEncoder:
    """An untrained encoder that says weights of `WORDS`.

    examples: patches, whose principal components it then begins to look at, each as strong as the others. aside: it
    also says what only training asks for, behind the words.
    """
    torch.manual_seed(seed)
    encoder = VisionEncoder(VisionEncoderConfig(**{**config, "out_hidden_size": len(WORDS) + (ASIDE if aside else 0)}))
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    encoder.pos_embed.weight.data.copy_(_waves(encoder.config.num_position_embeddings, encoder.config.hidden_size))
    nn.init.trunc_normal_(encoder.patch_embed.proj.weight, std=0.02)
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    nn.init.zeros_(encoder.merger.mlp[-1].weight)
    with torch.no_grad():
        if examples is not None:
            _look_at_components(encoder.patch_embed.proj, examples)
        encoder.merger.mlp[-1].bias[WORD[NOTHING]] = 1.0  # most tokens
    return encoder


def _look_at_components(proj: nn.Conv3d, examples: Tensor) -> None:
    """Whitens: each output is one principal component of patches, of variance about one."""
    middle = examples.mean(0)
    spread = examples - middle
    sizes, directions = torch.linalg.eigh(spread.T @ spread / len(examples))  # rising
    kept = proj.out_channels
    weight = directions[:, -kept:].T / (sizes[-kept:, None] + _DULLEST * sizes[-kept:].mean()).sqrt()
    proj.weight.copy_(weight.view_as(proj.weight))
    assert proj.bias is not None
    proj.bias.copy_(-weight @ middle)


def _waves(positions: int, width: int) -> Tensor:
    """Learned positions to begin with: [side * side, width] of a square, each channel a wave about as long as the
    square, as strong as what is seen. From small random ones it had not found out after 1500 steps where things are."""
    side = int(positions**0.5)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    slopes, phases = torch.pi * (2 * torch.rand(2, width) - 1), 2 * torch.pi * torch.rand(width)
    return torch.cos(rows.reshape(-1, 1) * slopes[0] + columns.reshape(-1, 1) * slopes[1] + phases)


class _Batches(Dataset):
    """Number of a step -> its batch; the processor is made by the process that draws."""

    def __init__(self, steps: int, size: int) -> None:
        self.steps, self.size, self.show = steps, size, None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        self.show = self.show or Show()
        return self.show.batch(step, self.size)


def says(encoder: VisionEncoder, batch: Batch) -> Tensor:
    """fp32 [tokens, K]: the weight of each word in each token."""
    with torch.autocast("cpu", torch.bfloat16):
        return encoder(batch.patches, batch.grids).embeds.float()


def loss_of(said: Tensor, batch: Batch) -> Tensor:
    """Squares between what tokens say and are to say, and the cross-entropy of colour and kind where things are."""
    said, aside = said[:, : len(WORDS)], said[:, len(WORDS) :]
    named = 1 - batch.wanted[:, WORD[NOTHING]]
    weights = 1 + (_THING - 1) * named
    squares = (said - batch.wanted).square().sum(1)
    loss = (weights * squares).sum() / weights.sum()
    if aside.shape[1]:
        loss = loss + _AREA * (aside[:, :PARTS] - batch.covered).square().mean()
        loss = loss + _PART * F.cross_entropy(aside[:, PARTS:], batch.kinds, ignore_index=-1)
    if batch.things:
        places = torch.tensor([place for place, _ in batch.things])
        for part in (COLOR_WORDS, KIND_WORDS):
            logits, right = said[places, part] * _SHARPNESS, batch.wanted[places, part].argmax(1)
            loss = loss + _CHOICE * F.cross_entropy(logits, right)
    return loss


def names_right(said: Tensor, batch: Batch) -> list[bool]:
    """For each thing, whether the token that holds its middle says its colour and its kind before all others."""
    return [all(pair) for pair in zip(*names(said, batch))]


def names(said: Tensor, batch: Batch) -> tuple[list[bool], list[bool]]:
    """For each thing, whether its token says its colour before all others, and its kind."""
    colors = (said[:, COLOR_WORDS].argmax(1) + COLOR_WORDS.start).tolist()
    kinds = (said[:, KIND_WORDS].argmax(1) + KIND_WORDS.start).tolist()
    return (
        [WORDS[colors[at]] == words[0] for at, words in batch.things],
        [WORDS[kinds[at]] == words[1] for at, words in batch.things],
    )


def train(
    folder: Path,
    steps: int,
    *,
    config: Mapping[str, Any] = VISION,
    batch: int = _BATCH,
    workers: int = 0,
    seed: int = 0,
) -> float:
    """Train an encoder for so many steps; the folder gets `vision.safetensors`, `log.jsonl`, and the state that the
    same call goes on from. workers: processes that draw. Returns the share of things named right in the end."""
    show = Show()
    examples = torch.cat([show.batch(_FIRST_EXAMPLE + number, batch).patches for number in range(_EXAMPLES)])
    encoder = new_encoder(config, seed, examples, aside=True)
    learner = torch.optim.AdamW(encoder.parameters(), lr=_LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    folder.mkdir(parents=True, exist_ok=True)
    state, first = folder / "state.pt", 0
    if state.exists():
        kept = torch.load(state)
        encoder.load_state_dict(kept["encoder"])
        learner.load_state_dict(kept["learner"])
        first = kept["step"]
    source = DataLoader(_Batches(steps, batch), batch_size=None, sampler=range(first, steps), num_workers=workers)  # type: ignore[arg-type]  # a range is a sampler
    recent: list[tuple[float, float, float, float]] = []
    logged, start = min(_LOGGED, max(1, steps // 10)), time.perf_counter()
    for step, shown in zip(range(first, steps), source):
        with use_attention("plain"):  # backwards its products are faster here than the fused kernel
            said = says(encoder, shown)
        loss = loss_of(said, shown)
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for group in learner.param_groups:
            factor = lr_factor(step, steps=steps, warmup_steps=_WARMUP, min_lr_ratio=_LEAST_RATE)
            group["lr"] = _LEARNING_RATE * factor
        learner.step()
        colors, kinds = names(said.detach(), shown)
        both = names_right(said.detach(), shown)
        shares = [sum(right) / max(1, len(right)) for right in (both, colors, kinds)]
        recent = [*recent, (loss.item(), *shares)][-logged:]
        if (step + 1) % logged == 0 or step + 1 == steps:
            error, *means = (sum(values) / len(recent) for values in zip(*recent))
            seconds = (time.perf_counter() - start) / (step + 1 - first)
            found = dict(zip(("named", "colors", "kinds"), means))
            row = {"step": step + 1, "losses": {"words": error, **found}, "loss": error, "seconds": seconds}
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % _SAVED == 0:
            partial = state.with_suffix(".part")
            torch.save({"encoder": encoder.state_dict(), "learner": learner.state_dict(), "step": step + 1}, partial)
            partial.replace(state)
    save_file(without_asides(encoder.state_dict()), folder / "vision.safetensors")
    return sum(share for _, share, *_ in recent) / max(1, len(recent))


# ---- how well ----


def conditions(most: int = 4) -> dict[str, Callable[[random.Random], Picture | Clip]]:
    """Kinds of pictures to be judged by: one to `most` things, all else as it comes."""

    def pictures(**asked: Any) -> Callable[[random.Random], Picture]:
        def draw(rng: random.Random) -> Picture:
            fixed = {"count": rng.randint(1, most), "shapes": SHAPES, "pixels": any_pixels(rng, largest=640), **asked}
            return random_picture(rng, **fixed)

        return draw

    def clips(**asked: Any) -> Callable[[random.Random], Clip]:
        return lambda rng: random_clip(rng, **asked)

    found: dict[str, Callable[[random.Random], Picture | Clip]] = {kind: pictures(ground=kind) for kind in KINDS}
    found |= {
        "small": pictures(size=(0.125, 0.15), pixels=(256, 256)),
        "large": pictures(size=(0.5, 0.85), count=1),
        "turned": pictures(turned=True),
        "outlines": pictures(outline=True),
        "64 pixels": pictures(pixels=(64, 64), count=1),
        "2000 pixels": pictures(pixels=(2000, 1500)),
        "four times as wide": pictures(pixels=(640, 160)),
        "four times as tall": pictures(pixels=(160, 640)),
        "digits": pictures(shapes=tuple("0123456789"), count=1),
        "other": pictures(shapes=(OTHER,), count=1),
        "clips": clips(),
        "clips, photographed": clips(ground="photographed"),
    }
    return found


@torch.no_grad()
def judge(encoder: VisionEncoder, pictures: int, seed: int = 1) -> dict[str, dict[str, float]]:
    """By condition: the share of things whose colour, kind and both are named right, of pictures in which as many
    things are said to be as there are, and of clips whose direction is."""
    show, result = Show(), {}
    for name, draw in conditions().items():
        rng = random.Random(f"judge {seed} {name}")
        tally: dict[str, list[bool]] = {"right": [], "color": [], "kind": [], "place": [], "counted": []}
        for _ in range(pictures):
            drawn = draw(rng)
            one = packed([show.clip(drawn, rng) if isinstance(drawn, Clip) else show.picture(drawn)])
            said = says(encoder, one)
            there = (1 - said[:, WORD[NOTHING]]).clamp(0, 1).sum()
            tally["counted"].append(round(float(there)) == len(one.things))
            tally["right"] += names_right(said, one)
            for at, words in one.things:
                tally["color"].append(_first(said[at], COLORS) == words[0])
                tally["kind"].append(_first(said[at], KINDS_OF_THINGS) == words[1])
                tally["place"].append({w for w in WHERE if said[at, WORD[w]] > 0.5} == set(words[2:]))
        result[name] = {measure: sum(values) / max(1, len(values)) for measure, values in tally.items()}
    return result


def _first(said: Tensor, words: Sequence[str]) -> str:
    return max(words, key=lambda word: float(said[WORD[word]]))


# ---- into a model ----


def put_into(model: OmniModel, weights: Mapping[str, Tensor]) -> None:
    """Give a model's vision encoder what `train` has made: it says the words in the embeddings of the Thinker, as they
    are behind a space.

    Raises ValueError for a model whose vision encoder is of another config.
    """
    assert model.processor is not None
    table, vectors = model.thinker.embed_tokens.weight.detach().float(), []
    for word in WORDS:
        (token,) = model.processor.encode_text(word if word == NOTHING else f" {word}")
        vectors.append(table[token])
    said = torch.stack(vectors)  # [K, D]
    own, last = dict(weights), "merger.mlp.2"
    own[f"{last}.weight"] = said.T @ own[f"{last}.weight"]
    own[f"{last}.bias"] = said.T @ own[f"{last}.bias"]
    try:
        model.vision_encoder.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(
            f"the model's vision_config is not that of the training, name_things.VISION: {error}"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train the encoder, or go on")
    command.add_argument("folder", type=Path)
    command.add_argument("--steps", type=int, default=20_000)
    command.add_argument("--workers", type=int, default=0, help="processes that draw")
    command = commands.add_parser("judge", help="how often things are named right, by condition")
    command.add_argument("folder", type=Path)
    command.add_argument("--pictures", type=int, default=100, help="of each condition")
    command = commands.add_parser("put", help="write a model with the trained encoder")
    for name in ("folder", "model", "out"):
        command.add_argument(name, type=Path)
    args = parser.parse_args()
    if args.command == "train":
        print(f"named right: {train(args.folder, args.steps, workers=args.workers):.3f}")
        return
    weights = trained(args.folder)
    if args.command == "judge":
        encoder = new_encoder()
        encoder.load_state_dict(weights)
        for name, shares in judge(encoder, args.pictures).items():
            print(f"{name:20}", *(f"{measure} {share:4.0%}" for measure, share in shares.items()), sep="  ")
        return
    model = OmniModel.from_pretrained(args.model, dtype="float32", device="cpu")
    put_into(model, weights)
    model.save_pretrained(args.out)


def trained(folder: Path) -> dict[str, Tensor]:
    """The weights that `train` has written, or those of its last checkpoint."""
    done = folder / "vision.safetensors"
    return load_file(done) if done.exists() else without_asides(torch.load(folder / "state.pt")["encoder"])


def without_asides(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what was said aside."""
    last = ("merger.mlp.2.weight", "merger.mlp.2.bias")
    return {name: (value[: len(WORDS)] if name in last else value).contiguous() for name, value in weights.items()}


if __name__ == "__main__":
    main()
