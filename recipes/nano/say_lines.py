"""The Talker and its residual head learn to say lines: any English, as subwords, in the model's voices.

    python recipes/nano/say_lines.py encode MODEL CODEC FILE data/lines_*.jsonl     # codes, and what is said when
    python recipes/nano/say_lines.py train MODEL FILE FOLDER [--steps 45000]

Which subword a frame says is found by the finished audio encoder, whose chunks of 0.48 s have as many tokens a second
as speech has frames, and forced alignment (`heard_bank.aligned`). While the Talker learns, one of its layers must name,
for each frame that it is about to draw, the subword that the frame says, as a vector of `tokens.vectors`. So it first
finds out where in the text it is, and what that sounds like only then: codes alone tell it so little about reading that
it recites before it reads. The head that names is thrown away. Lines are short at first.

Shapes: K codebooks, F frames, V subwords.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import talk
import torch
from heard_bank import BLANK, aligned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import Learning, take_steps
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import resample
from tqdm import tqdm

from omni import OmniInputs, OmniModel
from omni.encoders.contract import chosen_cuts
from omni.encoders.mel import LogMel
from omni.processing.audio_file import join_clips
from omni.training.codec.mel_codec import MelCodec
from omni.training.data.batches import collate
from omni.training.data.samples import IGNORED, Sample, SpokenTurn
from omni.training.data.sound import read_speech
from omni.training.objectives.passes import talker_pass, thinker_pass
from omni.training.objectives.supervised import speech_losses
from omni.training.objectives.transcription import EmbeddingHead

_HEARING_HZ = 16_000
_CHUNK_S = 0.48
_TOGETHER = 16  # lines that are heard at once
_FRAMES = 1200  # of a step
_SHORT = ((2000, 2), (5000, 5))  # until a step, lines of so many subwords at most
_NAMING = 1  # the layer, counted from 0, that says which subword is spoken
_NAMED = 0.5  # weight of that
_RESIDUAL, _RESIDUAL_SHARE = 0.5, 0.25
_ASKED = 0.5  # of lines follow a user's turn, the others nothing, as in `OmniModel.speak`
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 1.5e-3, 200, 0.02
_LOGGED, _SAVED = 50, 500  # steps


@torch.no_grad()
def encode(model: OmniModel, codec: MelCodec, manifests: Sequence[Path], path: Path) -> int:
    """Write codes, alignments, texts and voices of the lines of manifests; returns how many lines."""
    encoder, processor = model.audio_encoder, model.processor
    assert encoder is not None and processor is not None
    mel, table = LogMel(num_mels=encoder.config.num_mel_bins), model.thinker.embed_tokens.weight.float()
    (blank,) = processor.encode_text(BLANK)
    rows = [json.loads(line) | {"folder": str(m.parent)} for m in manifests for line in m.read_text().splitlines()]
    codes: list[Tensor] = []
    said: list[Tensor] = []
    for first in tqdm(range(0, len(rows), _TOGETHER), "lines encoded"):
        some = rows[first : first + _TOGETHER]
        sounds = [read_speech(f"{row['folder']}/{row['audio']}", codec.sample_rate) for row in some]
        codes += [codec.encode(sound) for sound in sounds]
        features = [mel(resample(sound, codec.sample_rate, _HEARING_HZ)) for sound in sounds]
        joined, mask = join_clips(features)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(joined, mask.sum(1).tolist(), **chosen_cuts(encoder, _CHUNK_S, None))
        for row, heard in zip(some, out.embeds.float().split(out.lengths)):
            labels = torch.full((codes[len(said)].shape[1],), blank)
            for label, start, end in aligned(heard, processor.encode_text(row["text"]), table, blank):
                labels[start:end] = label
            said.append(labels)
    lengths = torch.tensor([one.shape[1] for one in codes])
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"codes": torch.cat(codes, 1).short(), "said": torch.cat(said).short(), "lengths": lengths}
    about = {"texts": json.dumps([row["text"] for row in rows]), "voices": json.dumps([r["speaker"] for r in rows])}
    save_file(parts, path, about)
    return len(rows)


@dataclass(frozen=True)
class Line:
    """A line: its subwords, codes int64 [K, F], what each frame says int64 [F], and the voice."""

    ids: list[int]
    codes: Tensor
    said: Tensor
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
        found = zip(texts, parts["codes"].long().split(cuts, 1), parts["said"].long().split(cuts), voices)
        self.lines = [Line(self.encode(text), codes, said, voice) for text, codes, said, voice in found]
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


class Naming(nn.Module):
    """Says which subword is spoken, from a layer of the Talker. [F, D] -> logits [F, V + 1]; the blank of silence is
    the last."""

    def __init__(self, width: int, table: Tensor, blank: int) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(width, table.shape[1]), EmbeddingHead(table, blank)
        self.replaced = blank

    def loss(self, hidden: Tensor, said: Tensor) -> Tensor:
        """Cross-entropy with what is said, int64 [F]."""
        wanted = said.masked_fill(said == self.replaced, self.head.blank)
        return F.cross_entropy(self.head(self.project(hidden.float())), wanted)


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
    means["named"] = naming.loss(hidden[drawn], torch.cat([line.said for line in lines]))
    return means


def train(model: OmniModel, path: Path, folder: Path, steps: int) -> dict[str, float]:
    """Train the Talker of a model and write `folder/model`, see `take_steps`. Returns the losses that were logged
    last."""
    torch.manual_seed(0)
    talker, table = model.talker, model.thinker.embed_tokens.weight.detach()
    assert model.processor is not None
    model.requires_grad_(False)
    lines, (blank,) = Lines(model, path), model.processor.encode_text(BLANK)
    text = model.config.talker_config.text_config
    naming = Naming(text.hidden_size, table, blank)
    talker.requires_grad_(True)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(step)  # of the frames whose residual codes are learnt
        rng, drawn = random.Random(f"say after {step}"), lines.draw(step)
        found = losses(model, naming, drawn, [lines.sample(line, rng) for line in drawn])
        balance = text.router_aux_loss_coef * found.get("talker_balance", 0.0)
        return found["codebook_0"] + _RESIDUAL * found["residual"] + _NAMED * found["named"] + balance, found

    learning = Learning(_LEARNING_RATE, _WARMUP, _LEAST_RATE, logged=_LOGGED, saved=_SAVED)
    mean = take_steps(nn.ModuleDict({"talker": talker, "naming": naming}), loss_of, folder, steps, learning)
    model.save_pretrained(folder / "model")
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("encode", help="write codes and alignments of lines")
    for name in ("model", "codec", "file"):
        command.add_argument(name, type=Path)
    command.add_argument("manifests", type=Path, nargs="+")
    command = commands.add_parser("train", help="train the Talker, or go on")
    for name in ("model", "file", "folder"):
        command.add_argument(name, type=Path)
    command.add_argument("--steps", type=int, default=45_000)
    args = parser.parse_args()
    if args.command == "encode":
        model = OmniModel.from_pretrained(args.model, parts=["thinker"], dtype="float32", device="cpu")
        print(f"{encode(model, MelCodec.load(args.codec), args.manifests, args.file)} lines")
        return
    model = OmniModel.from_pretrained(args.model, dtype="float32", device="cpu")
    print(", ".join(f"{name} {value:.3f}" for name, value in train(model, args.file, args.folder, args.steps).items()))


if __name__ == "__main__":
    main()
