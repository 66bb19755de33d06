"""The Talker and its residual head learn to say lines: any English, as subwords, in the model's voices.

    python recipes/nano/say_lines.py encode MODEL CODEC FILE data/timed_lines_*.jsonl   # codes, and what is said when
    python recipes/nano/say_lines.py train MODEL FILE FOLDER [--steps 45000]

When a line says which subword and which phone is known (`find_subwords`). While the Talker learns, one of its layers
must name both for each frame that it is about to draw. So it first finds out where in the text it is, how that is
pronounced, and what that sounds like only then: codes alone tell it so little about reading that it recites before it
reads. The heads that name are thrown away. Lines are short at first.

Shapes: K codebooks, F frames, S moments of a frame, V subwords.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import talk
import tokens
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import Learning, take_steps
from timed_clips import TOKEN_S, Heard
from timed_hearing import Naming, phones_at, subwords_at
from torch import Tensor, nn
from tqdm import tqdm

from omni import OmniInputs, OmniModel, OmniProcessor
from omni.training.codec.mel_codec import MelCodec
from omni.training.data.batches import collate
from omni.training.data.samples import IGNORED, Sample, SpokenTurn
from omni.training.data.sound import read_speech
from omni.training.objectives.passes import talker_pass, thinker_pass
from omni.training.objectives.supervised import speech_losses

_FRAMES = 1200  # of a step
_SHORT = ((2000, 2), (5000, 5))  # until a step, lines of so many subwords at most
_NAMING = 1  # the layer, counted from 0, that says which subword and phone is spoken
_NAMED = 0.3  # weight of each of both
_RESIDUAL, _RESIDUAL_SHARE = 0.5, 0.25
_ASKED = 0.5  # of lines follow a user's turn, the others nothing, as in `OmniModel.speak`
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 1.5e-3, 200, 0.02
_LOGGED, _SAVED = 50, 500  # steps


def encode(processor: OmniProcessor, codec: MelCodec, manifests: Sequence[Path], path: Path) -> int:
    """Write codes, texts and voices of the lines of manifests, and what they say when; returns how many lines."""
    rows = [json.loads(line) | {"folder": str(m.parent)} for m in manifests for line in m.read_text().splitlines()]
    codes, said, phones = [], [], []
    for row in tqdm(rows, "lines encoded"):
        codes.append(codec.encode(read_speech(f"{row['folder']}/{row['audio']}", codec.sample_rate)))
        starts = np.arange(codes[-1].shape[1]) * TOKEN_S
        clip = Heard(codes[-1], row["phones"], row["subwords"], row["text"])
        phones.append(phones_at(clip, starts))
        said.append(subwords_at(clip, starts, phones[-1], tokens.SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"codes": torch.cat(codes, 1).short(), "said": torch.cat(said).short(), "phones": torch.cat(phones).byte(),
             "lengths": torch.tensor([len(one) for one in said])}  # fmt: skip
    about = {"texts": json.dumps([row["text"] for row in rows]), "voices": json.dumps([r["speaker"] for r in rows])}
    save_file(parts, path, about)
    return len(rows)


@dataclass(frozen=True)
class Line:
    """A line: its subwords, codes int64 [K, F], what each frame says, int64 [F] and [F, S], and the voice."""

    ids: list[int]
    codes: Tensor
    said: Tensor
    phones: Tensor
    voice: str


class Lines:
    """A file of `encode`, and the conversations in which its lines are said."""

    def __init__(self, model: OmniModel, path: Path) -> None:
        assert model.processor is not None
        self.model, self.encode, c = model, model.processor.encode_text, model.config
        parts = load_file(path)
        with safe_open(path, "pt") as file:
            texts, voices = (json.loads(file.metadata()[name]) for name in ("texts", "voices"))
        cuts = parts["lengths"].tolist()
        said, phones = (parts[name].long().split(cuts) for name in ("said", "phones"))
        found = zip(map(self.encode, texts), parts["codes"].long().split(cuts, 1), said, phones, voices)
        self.lines = [Line(*line) for line in found]
        self.lines.sort(key=lambda line: len(line.ids))
        self.newline = self.encode("\n")
        self.user, self.assistant = (
            [c.im_start_token_id, token, *self.newline] for token in (c.user_token_id, c.assistant_token_id)
        )
        self.end = [c.im_end_token_id, *self.newline]

    def draw(self, step: int) -> list[Line]:
        """The lines of a step."""
        rng, drawn = random.Random(f"say {step}"), []
        longest = next((count for until, count in _SHORT if step < until), None)
        count = len(self.lines) if longest is None else sum(len(line.ids) <= longest for line in self.lines)
        while sum(line.codes.shape[1] for line in drawn) < _FRAMES:
            drawn.append(self.lines[rng.randrange(max(1, count))])
        return drawn

    def sample(self, line: Line, rng: random.Random) -> Sample:
        """A conversation in which a line is said."""
        asked: list[int] = []
        if rng.random() < _ASKED:
            turn = rng.choice(talk.conversation(rng, turns=1, media=False).turns)
            asked = [*self.user, *self.encode(talk.written(turn, rng)), *self.end]
        ids = [*asked, *self.assistant, *line.ids, self.end[0]]
        turn = SpokenTurn(len(asked), line.ids, line.codes, line.voice)
        return Sample(OmniInputs(torch.tensor([ids])), torch.full((len(ids),), IGNORED), [turn])


def losses(model: OmniModel, naming: Naming, lines: Sequence[Line], samples: list[Sample]) -> dict[str, Tensor]:
    """Means of the losses of some lines, in the conversations of `samples`."""
    batch, seen = collate(samples), []
    layer = model.talker.layers[_NAMING]
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with hook, torch.autocast("cpu", torch.bfloat16):
        thought = thinker_pass(model, batch, needed=False)
        spoken = talker_pass(model, batch, thought, residual_share=_RESIDUAL_SHARE)
    found = speech_losses(model, spoken, 1.0)
    means = {name: loss.total / loss.count for name, loss in found.items()}
    hidden = seen[0].reshape(-1, seen[0].shape[-1])[spoken.places]
    drawn = torch.cat([part for turn in spoken.turns for part in (torch.ones(turn), torch.zeros(1))]).bool()
    said = torch.cat([line.said for line in lines])
    return means | naming.losses(hidden[drawn], said, torch.cat([line.phones for line in lines]))


def train(model: OmniModel, path: Path, folder: Path, steps: int) -> dict[str, float]:
    """Train the Talker of a model and write `folder/model`, see `take_steps`. Returns the losses that were logged
    last."""
    torch.manual_seed(0)
    talker = model.talker
    assert model.processor is not None
    model.requires_grad_(False)
    lines = Lines(model, path)
    text = model.config.talker_config.text_config
    naming = Naming(text.hidden_size, tokens.SIZE)
    talker.requires_grad_(True)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(step)  # of the frames whose residual codes are learnt
        rng, drawn = random.Random(f"say after {step}"), lines.draw(step)
        found = losses(model, naming, drawn, [lines.sample(line, rng) for line in drawn])
        balance = text.router_aux_loss_coef * found.get("talker_balance", 0.0)
        named = _NAMED * (found["named"] + found["phones"])
        return found["codebook_0"] + _RESIDUAL * found["residual"] + named + balance, found

    learning = Learning(_LEARNING_RATE, _WARMUP, _LEAST_RATE, logged=_LOGGED, saved=_SAVED)
    mean = take_steps(nn.ModuleDict({"talker": talker, "naming": naming}), loss_of, folder, steps, learning)
    model.save_pretrained(folder / "model")
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("encode", help="write codes of lines, and what they say when")
    for name in ("model", "codec", "file"):
        command.add_argument(name, type=Path)
    command.add_argument("manifests", type=Path, nargs="+")
    command = commands.add_parser("train", help="train the Talker, or go on")
    for name in ("model", "file", "folder"):
        command.add_argument(name, type=Path)
    command.add_argument("--steps", type=int, default=45_000)
    args = parser.parse_args()
    if args.command == "encode":
        processor = OmniProcessor.from_pretrained(args.model)
        print(f"{encode(processor, MelCodec.load(args.codec), args.manifests, args.file)} lines")
        return
    model = OmniModel.from_pretrained(args.model, dtype="float32", device="cpu")
    print(", ".join(f"{name} {value:.3f}" for name, value in train(model, args.file, args.folder, args.steps).items()))


if __name__ == "__main__":
    main()
