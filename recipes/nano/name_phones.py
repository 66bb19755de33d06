"""Hearing, first: the audio encoder learns to name the phone that it hears, at each moment.

    python recipes/nano/name_phones.py train START FOLDER data/heard_flite.jsonl data/heard_festival.jsonl
    python recipes/nano/name_phones.py judge START FOLDER data/heard_flite.jsonl data/heard_festival.jsonl

flite and festival say when they speak which phone. So each token of the encoder is told four times what is said in its
80 ms, and nothing has to be found out about where in the sound a text is: 300 steps from nothing, in which CTC has not
yet begun to hear, name 58 % of the phones of many voices. The head that names is thrown away. Clips are heard in noise
and rooms, but not faster or later: their phones would be elsewhere.

Shapes: N tokens of all clips, S = SLOTS moments of a token, P phones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import PAUSE, PHONES
from heard_bank import CHUNKS_S
from steps import Learning, take_steps
from torch import Tensor, nn
from torch.nn import functional as F

from omni import OmniModel
from omni.encoders.contract import chosen_cuts
from omni.encoders.mel import LogMel
from omni.processing.audio_file import join_clips
from omni.training.data.augmentation import SpeechAugmentation
from omni.training.data.sound import read_speech
from omni.training.data.surroundings import Surroundings, recorded_noise

SLOTS = 4
TOKEN_S = 0.08
_RATE_HZ = 16_000
_BATCH = 26
_HELD_OUT = 100  # rows of each manifest, the last ones
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 6e-4, 100, 0.05
_LOGGED, _SAVED = 50, 500  # steps


class PhoneHead(nn.Module):
    """[N, D] -> logits [N, S, P]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, SLOTS * len(PHONES))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(self.norm(embeds)).unflatten(1, (SLOTS, len(PHONES)))


def said_in(phones: Sequence[Sequence[Any]], tokens: int, chunk_s: float, per_chunk: int) -> Tensor:
    """Which phone is said in each moment of a clip's tokens, int64 [tokens, S]. phones: each with the second in which
    it ends; per_chunk: tokens of a chunk of `chunk_s` seconds."""
    number = np.arange(tokens)
    starts = number // per_chunk * chunk_s + number % per_chunk * TOKEN_S
    moments = starts[:, None] + (np.arange(SLOTS) + 0.5) * (TOKEN_S / SLOTS)
    names = [PHONES.index(name) for name, _ in phones] + [PHONES.index(PAUSE)]
    places = np.searchsorted([end for _, end in phones], moments, side="right")
    return torch.from_numpy(np.array(names)[places])


class Clips:
    """Clips with phones, and how they are heard."""

    def __init__(self, manifests: Sequence[Path], noises: Sequence[str] = (), *, held_out: bool = False) -> None:
        self.rows: list[list[dict[str, Any]]] = []
        for manifest in manifests:
            lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
            told = [line | {"folder": str(manifest.parent)} for line in lines if line.get("phones")]
            kept = min(_HELD_OUT, len(told) // 2)
            self.rows.append(told[len(told) - kept :] if held_out else told[: len(told) - kept])
        around = Surroundings(
            noise=0.0 if held_out else 0.4, noises=recorded_noise(noises) if noises else None, noise_db=(8.0, 40.0),
            room=0.0 if held_out else 0.15, equaliser=0.0 if held_out else 0.3,
        )  # fmt: skip
        self.heard = SpeechAugmentation(surroundings=around, frequency_masks=0 if held_out else 1)

    def draw(self, step: int, count: int) -> list[tuple[Tensor, list[Any]]]:
        """Samples and phones of the clips of a step, manifests in turn."""
        rng = random.Random(f"phones {step}")
        found = []
        for place in range(count):
            row = rng.choice(self.rows[place % len(self.rows)])
            sound = read_speech(f"{row['folder']}/{row['audio']}", _RATE_HZ)
            found.append((self.heard.sound(sound, _RATE_HZ, rng.getrandbits(30)), row["phones"]))
        return found


def named(
    encoder: Any, head: PhoneHead, mel: LogMel, clips: Sequence[tuple[Tensor, list[Any]]], chunk_s: float
) -> tuple[Tensor, Tensor]:
    """Logits [N, S, P] of clips that are heard in such chunks, and what is said."""
    features, mask = join_clips([mel(samples) for samples, _ in clips])
    cuts = chosen_cuts(encoder, chunk_s, None)
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(features, mask.sum(1).tolist(), **cuts)
    frames = round(chunk_s * 100)
    per_chunk = encoder.num_tokens(frames, chunk_frames=frames)
    said = [said_in(phones, count, chunk_s, per_chunk) for (_, phones), count in zip(clips, out.lengths)]
    return head(out.embeds.float()), torch.cat(said)


def train(model: OmniModel, manifests: Sequence[Path], folder: Path, steps: int, noises: Sequence[str] = ()) -> float:
    """Train a model's audio encoder and write `folder/model`, see `take_steps`. Returns the share of moments named
    right at last."""
    torch.manual_seed(0)
    encoder = model.audio_encoder
    assert encoder is not None
    encoder.requires_grad_(True)
    head, mel = PhoneHead(encoder.config.output_dim), LogMel(num_mels=encoder.config.num_mel_bins)
    clips = Clips(manifests, noises)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, said = named(encoder, head, mel, clips.draw(step, _BATCH), random.Random(step).choice(CHUNKS_S))
        loss = F.cross_entropy(logits.flatten(0, 1), said.flatten())
        return loss, {"phones": loss, "right": (logits.argmax(-1) == said).float().mean()}

    learning = Learning(_LEARNING_RATE, _WARMUP, _LEAST_RATE, (0.9, 0.98), 0.01, 5.0, _LOGGED, _SAVED)
    mean = take_steps(nn.ModuleDict({"encoder": encoder, "head": head}), loss_of, folder, steps, learning)
    model.save_pretrained(folder / "model")
    torch.save(head.state_dict(), folder / "head.pt")
    return mean.get("right", 0.0)


@torch.no_grad()
def judge(encoder: Any, head: PhoneHead, manifests: Sequence[Path], chunk_s: float = 1.0) -> dict[str, float]:
    """Share of moments named right in clips that were kept, by manifest; pauses are not counted."""
    mel, shares = LogMel(num_mels=encoder.config.num_mel_bins), {}
    for manifest in manifests:
        clips = Clips([manifest], held_out=True)
        logits, said = named(encoder, head, mel, clips.draw(0, _HELD_OUT), chunk_s)
        spoken = said != PHONES.index(PAUSE)
        shares[manifest.stem] = float((logits.argmax(-1) == said)[spoken].float().mean())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("train", "train the audio encoder, or go on"), ("judge", "how much it names right")):
        command = commands.add_parser(name, help=what)
        command.add_argument("start", type=Path)
        command.add_argument("folder", type=Path)
        command.add_argument("manifests", type=Path, nargs="+")
        if name == "train":
            command.add_argument("--steps", type=int, default=3000)
            command.add_argument("--noises", nargs="*", default=(), help="manifests of noises")
    args = parser.parse_args()
    source = args.start if args.command == "train" else args.folder / "model"
    model = OmniModel.from_pretrained(source, dtype="float32", device="cpu")
    if args.command == "train":
        print(f"named right: {train(model, args.manifests, args.folder, args.steps, args.noises):.3f}")
        return
    head = PhoneHead(model.audio_encoder.config.output_dim)
    head.load_state_dict(torch.load(args.folder / "head.pt"))
    for name, share in judge(model.audio_encoder, head, args.manifests).items():
        print(f"{name:20} {share:.3f}")


if __name__ == "__main__":
    main()
