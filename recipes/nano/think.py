"""The Thinker alone: it learns to answer from what the encoders say, without running them.

    python recipes/nano/think.py encode MODEL MANIFEST FILE      # sounds, pictures, clips: encoded once
    python recipes/nano/think.py train MODEL FOLDER FILE=SHARE.. [--steps 6000]

By now the encoders spell what they hear and name what they see in the Thinker's own embeddings, so little is left for
them to learn, and most of the time of a step through them would be theirs. Their tokens are therefore kept, and what is
typed or drawn needs no file at all: typed questions are made as they are needed, and a picture is the words of its nine
cells (`name_cells.words_of`), with some noise. A step takes a quarter of the time of one with media (0.5 s instead of
1.9 s for 1024 tokens, one thread of a busy machine), and what is made as it goes hardly ever comes twice.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import world
from name_cells import Namer, words_of
from pictures import SIZE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni import OmniModel
from omni.generation.prompt import encode_prompt
from omni.layers.packing import PackedBlocks
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import SampleMaker, SkipRow
from omni.training.data.manifest import Manifest
from omni.training.data.samples import IGNORED, Sample
from omni.training.objectives.losses import linear_cross_entropy, router_balance
from omni.training.run.optimiser import lr_factor

TYPED, SUMS, SHOWN = "typed", "sums", "shown"  # made as they are needed; every other source is a file of `encode`
SHARES = {TYPED: 0.12, SUMS: 0.08, SHOWN: 0.35}
_TOKENS = 1024  # of a step
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 7e-4, 40, 0.02
_TOGETHER = 8  # rows that are encoded at once
_LOGGED, _SAVED = 20, 250  # steps
_NOISES = (0.0, 0.1, 0.2, 0.3)  # of the size of an embedding: what name_cells leaves is among them


@dataclass
class Told:
    """One conversation as the Thinker reads it: embeds [T, D], positions fp32 [3, T], and labels int64 [T], the id that
    follows or `IGNORED`."""

    embeds: Tensor
    positions: Tensor
    labels: Tensor


@torch.no_grad()
def encode(source: Path, manifest: Path, path: Path) -> int:
    """Write what the encoders make of every row of a manifest; returns the number of rows."""
    model = OmniModel.from_pretrained(source, parts=["thinker"], dtype="float32", device="cpu")
    assert model.processor is not None
    make, rows = SampleMaker(model.processor, model.config, speech=False), Manifest(manifest)
    parts: list[dict[str, Tensor]] = []
    waiting: list[Sample] = []
    for number in range(len(rows)):
        with suppress(SkipRow):
            waiting.append(make(rows[number]))  # type: ignore[arg-type]  # no row has a rejected answer
        if len(waiting) == _TOGETHER or number + 1 == len(rows):
            parts += _encoded(model, waiting)
            waiting = []
    joined = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0] if name != "tokens"}
    joined["tokens"] = torch.cat([part["tokens"] for part in parts])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in joined.items()}, path)
    return len(parts)


def _encoded(model: OmniModel, samples: list[Sample]) -> Iterator[dict[str, Tensor]]:
    if not samples:
        return
    batch = collate(samples)
    prompt = encode_prompt(model, batch.inputs)
    if prompt.taps is not None and bool(prompt.taps.any()):
        raise ValueError("the vision encoder has DeepStack taps that are not silent; take a model of name_cells.py")
    for row, length in enumerate(prompt.lengths):
        media = prompt.media[row, :length]
        yield {
            "lengths": torch.tensor([length]),
            "ids": prompt.ids[row, :length].to(torch.int32),
            "answers": batch.labels[row] != IGNORED,
            "media": media,
            "positions": prompt.positions[:, row, :length],
            "tokens": prompt.embeds[row, :length][media].half(),
        }


class Encoded:
    """A file of `encode`, row by row."""

    def __init__(self, path: Path, table: Tensor) -> None:
        self.table, self.parts = table, load_file(path)
        self.starts = [0, *self.parts["lengths"].cumsum(0).tolist()]
        self.media_starts = [0, *self.parts["media"].cumsum(0)[torch.tensor(self.starts[1:]) - 1].tolist()]

    def draw(self, rng: random.Random) -> Iterator[Told]:
        """Any row."""
        row = rng.randrange(len(self.starts) - 1)
        part = slice(self.starts[row], self.starts[row + 1])
        ids = self.parts["ids"][part].long()
        embeds = self.table[ids]
        embeds[self.parts["media"][part]] = self.parts["tokens"][
            self.media_starts[row] : self.media_starts[row + 1]
        ].float()
        yield Told(embeds, self.parts["positions"][:, part], _following(ids, self.parts["answers"][part]))


class Maker:
    """Conversations that need no file: typed ones, and ones about pictures that nobody has to draw."""

    def __init__(self, model: OmniModel) -> None:
        assert model.processor is not None
        self.namer, self.encode, c = Namer(model), model.processor.encode_text, model.config
        newline = self.encode("\n")
        self.user = [c.im_start_token_id, c.user_token_id, *newline]
        self.assistant = [c.im_end_token_id, *newline, c.im_start_token_id, c.assistant_token_id, *newline]
        self.end, self.newline = [c.im_end_token_id], newline
        blank = {"type": "image", "image": Image.new("RGB", (SIZE, SIZE))}
        inputs = model.processor([{"role": "user", "content": [blank, {"type": "text", "text": "what"}]}])
        prompt = encode_prompt(model, inputs)
        media = prompt.media[0].nonzero().flatten()
        until = int(media[-1]) + 2  # through the token that ends the picture
        self.head, self.head_positions = prompt.row_ids(0)[:until], prompt.positions[:, 0, :until]
        self.cells = media

    def typed(self, rng: random.Random) -> Iterator[Told]:
        """A question without a picture, some as the audio encoder would spell them."""
        question, task = world.language(rng)
        yield self._told([(question, task.answer)])

    def sums(self, rng: random.Random) -> Iterator[Told]:
        """Three sums: short, and many are needed."""
        for _ in range(3):
            task = world.arithmetic(rng)
            question = world.spelled(task.question, rng) if rng.random() < 0.4 else world.written(task, rng)
            yield self._told([(question, task.answer)])

    def shown(self, rng: random.Random) -> Iterator[Told]:
        """A picture and up to three questions, each by itself: told the answers to others, it need not look."""
        task = world.SKILLS[rng.choices((*world.PICTURE_SKILLS, "dialogue"), (2, 2, 3, 3, 2, 3))[0]](rng)
        assert task.picture is not None
        others = [other for tasks in world.further(task, rng).values() for other in tasks]
        others = [other for other in others if other.answer != "zero" or rng.random() < 0.3]  # most are not there
        seen = self.namer.targets(words_of(task.picture))
        for asked in (task, *rng.sample(others, min(2, len(others)))):
            spoken = rng.random() < 0.35
            last = world.spelled(asked.question, rng) if spoken else world.written(asked, rng)
            earlier = asked.earlier if asked is task else ()
            turns = [(world.spelled(question, rng) if spoken else question, answer) for question, answer in earlier]
            noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
            yield self._told([*turns, (last, asked.answer)], seen + noise * self.namer.size * rng.choice(_NOISES))

    def _told(self, turns: list[tuple[str, str]], seen: Tensor | None = None) -> Told:
        ids = list(self.user if seen is None else self.head)
        answers = [False] * len(ids)
        for number, (question, answer) in enumerate(turns):
            asked = [*(self.newline + self.user if number else ()), *self.encode(question), *self.assistant]
            said = [*self.encode(answer), *self.end]
            ids += asked + said
            answers += [False] * len(asked) + [True] * len(said)
        tokens = torch.tensor(ids)
        embeds, positions = self.namer.table[tokens], torch.arange(len(ids), dtype=torch.float32).expand(3, -1)
        if seen is not None:
            embeds[self.cells] = seen
            first = len(self.head)
            after = self.head_positions[:, -1:] + 1 + torch.arange(len(ids) - first, dtype=torch.float32)
            positions = torch.cat((self.head_positions, after), dim=1)
        return Told(embeds, positions, _following(tokens, torch.tensor(answers)))


def _following(ids: Tensor, answers: Tensor) -> Tensor:
    """Labels int64 [T]: the id after each token where it belongs to an answer."""
    labels = ids.masked_fill(~answers, IGNORED)
    return torch.cat((labels[1:], labels.new_full((1,), IGNORED)))


def batch(sources: Mapping[str, Any], shares: Mapping[str, float], rng: random.Random, tokens: int) -> list[Told]:
    """Conversations of about so many tokens, each source as often as its share says; sorted, so that neighbours of one
    length are read together."""
    told: list[Told] = []
    while sum(len(one.labels) for one in told) < tokens:
        told += sources[rng.choices(list(shares), list(shares.values()))[0]](rng)
    return sorted(told, key=lambda one: len(one.labels))


def think(source: Path, folder: Path, files: Mapping[Path, float], steps: int, tokens: int = _TOKENS) -> float:
    """Train the Thinker of `source`, all but its embeddings, and write the model; beside it log.jsonl and the state
    that the same call goes on from. files: of `encode`, with their shares. Returns the last loss that was logged."""
    model = OmniModel.from_pretrained(source, parts=["thinker"], dtype="float32", device="cpu")
    thinker, maker = model.thinker, Maker(model)
    sources: dict[str, Any] = {TYPED: maker.typed, SUMS: maker.sums, SHOWN: maker.shown}
    sources |= {str(path): Encoded(path, maker.namer.table).draw for path in files}
    shares = SHARES | {str(path): share for path, share in files.items()}
    learnt = [p for name, p in thinker.named_parameters() if name != "embed_tokens.weight"]
    thinker.embed_tokens.requires_grad_(False)
    learner = torch.optim.AdamW(learnt, lr=_LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.95))
    folder.parent.mkdir(parents=True, exist_ok=True)
    state, log = folder.parent / "state.pt", folder.parent / "log.jsonl"
    first, start = 0, time.perf_counter()
    recent: list[float] = []
    logged = min(_LOGGED, max(1, steps // 10))
    if state.exists():
        kept = torch.load(state)
        thinker.load_state_dict(kept["thinker"])
        learner.load_state_dict(kept["learner"])
        first = kept["step"]
    for step in range(first, steps):
        loss, balance = losses(thinker, batch(sources, shares, random.Random(f"think {step}"), tokens))
        learner.zero_grad()
        (loss + model.config.thinker_config.text_config.router_aux_loss_coef * balance).backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        for group in learner.param_groups:
            factor = lr_factor(step, steps=steps, warmup_steps=_WARMUP, min_lr_ratio=_LEAST_RATE)
            group["lr"] = _LEARNING_RATE * factor
        learner.step()
        recent = [*recent, loss.item()][-logged:]
        if (step + 1) % logged == 0 or step + 1 == steps:
            seconds, mean = (time.perf_counter() - start) / (step + 1 - first), sum(recent) / len(recent)
            row = {"step": step + 1, "losses": {"text": mean}, "loss": mean, "seconds": seconds}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % _SAVED == 0:
            partial = state.with_suffix(".part")
            torch.save({"thinker": thinker.state_dict(), "learner": learner.state_dict(), "step": step + 1}, partial)
            partial.replace(state)
    model.save_pretrained(folder)
    return sum(recent) / max(1, len(recent))


def losses(thinker: nn.Module, told: list[Told]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and the routers' balance, of conversations in one packed row."""
    blocks = PackedBlocks([len(one.labels) for one in told], told[0].embeds.device, causal=True)
    out = thinker(
        torch.cat([one.embeds for one in told])[None],
        torch.cat([one.positions for one in told], dim=1)[:, None],
        blocks=blocks,
        logits="none",
        with_router_logits=True,
    )
    text = linear_cross_entropy(out.final[0], thinker.lm_head.weight, torch.cat([one.labels for one in told]))
    balance = router_balance(out.router_logits, thinker.config.text_config.num_experts_per_tok)
    return text.total / text.count, balance.total / balance.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("encode", help="write what the encoders make of a manifest")
    for name in ("model", "manifest", "file"):
        command.add_argument(name, type=Path)
    command = commands.add_parser("train", help="train the Thinker")
    command.add_argument("model", type=Path)
    command.add_argument("folder", type=Path)
    command.add_argument("files", nargs="+", metavar="FILE=SHARE", help="of encode, and how often to take from each")
    command.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args()
    if args.command == "encode":
        print(f"{encode(args.model, args.manifest, args.file)} rows")
        return
    files = {Path(name): float(share) for name, _, share in (entry.rpartition("=") for entry in args.files)}
    print(f"loss: {think(args.model, args.folder, files, args.steps):.4f}")


if __name__ == "__main__":
    main()
