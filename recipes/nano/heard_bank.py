"""What the trained audio encoder makes of clips, kept in a file; and texts "spoken" out of pieces of it.

    python recipes/nano/heard_bank.py MODEL FILE data/timed_*.jsonl [--clips 12000]

The encoder is finished, so its tokens are computed once. Each clip is heard somewhere (noise, rooms, levels) and in one
of the chunks that live use chooses from. Where its subwords end is known (`find_subwords`): a piece is the tokens that
belong to one subword. What was never said as a whole can so be put together of pieces that were, errors of hearing
included, and a conversation needs no voice to speak all its questions.

Shapes: N tokens of all clips, D their width.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timed_clips import RATE_HZ, Ends, TimedClips, tokens_at
from timed_hearing import CHUNKS_S, draw_window, hear
from torch import Tensor
from tqdm import tqdm

from omni import OmniModel
from omni.encoders.mel import LogMel

_TOGETHER = 16  # clips
_LONGEST_S = 20.0
_AROUND = 3  # tokens of the first subword before the one that says it
_BEHIND = 2  # tokens of the last one behind it


@torch.no_grad()
def make_bank(model: OmniModel, manifests: Sequence[Path], path: Path, clips: int, noises: Sequence[str] = ()) -> int:
    """Write what the audio encoder makes of so many clips, from the manifests in turn; returns how many."""
    encoder = model.audio_encoder
    assert encoder is not None
    mel, rng = LogMel(num_mels=encoder.config.num_mel_bins), random.Random(f"bank {path.name}")
    source = TimedClips(manifests, "subwords", noises)
    for part in source.rows:
        rng.shuffle(part)
    longest = max(map(len, source.rows))
    picked = [part[place] for place in range(longest) for part in source.rows if place < len(part)][:clips]
    found: list[Tensor] = []
    pieces: list[tuple[int, int, int, int]] = []
    for first in tqdm(range(0, len(picked), _TOGETHER), "clips heard"):
        some = [source.heard(row, rng) for row in picked[first : first + _TOGETHER]]
        some = [one._replace(samples=one.samples[: int(_LONGEST_S * RATE_HZ)]) for one in some]
        chunk_s = rng.choice(CHUNKS_S)
        out, starts = hear(encoder, mel, some, chunk_s, draw_window(rng, chunk_s))
        for number, (clip, at) in enumerate(zip(some, starts), len(found)):
            pieces += [(number, *piece) for piece in cut(clip.subwords, tokens_at(at, clip.subwords), len(at))]
        found += out.embeds.split(out.lengths)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "tokens": torch.cat(found).half(),
            "lengths": torch.tensor([len(one) for one in found]),
            "pieces": torch.tensor(pieces).view(-1, 4),
        },
        path,
        {"texts": json.dumps([row["text"] for row in picked])},
    )
    return len(picked)


def cut(subwords: Ends, said_at: Sequence[int], tokens: int) -> list[tuple[int, int, int]]:
    """Which of a clip's tokens are whose: (id, first, end) of each subword. `said_at`: the token that says it, which is
    the last of its own; around all of them is some silence."""
    if not said_at:
        return []
    ends = [token + 1 for token in said_at]
    starts = [max(0, said_at[0] - _AROUND), *ends[:-1]]
    ends[-1] = min(tokens, ends[-1] + _BEHIND)
    return [(label, start, end) for (label, _), start, end in zip(subwords, starts, ends)]


class Bank:
    """A file of `make_bank`."""

    def __init__(self, path: Path, table: Tensor) -> None:
        """table [V, D]: what stands for a subword that no clip has."""
        from safetensors import safe_open

        parts = load_file(path)
        with safe_open(path, "pt") as file:
            self.texts: list[str] = json.loads(file.metadata()["texts"])
        self.tokens, self.table = parts["tokens"], table
        self.starts = [0, *parts["lengths"].cumsum(0).tolist()]
        self.pieces: dict[int, list[tuple[int, int]]] = {}
        self.whole: dict[str, list[int]] = {}
        for clip, text in enumerate(self.texts):
            self.whole.setdefault(text, []).append(clip)
        first: dict[int, int] = {}
        for clip, label, start, end in parts["pieces"].tolist():
            self.pieces.setdefault(label, []).append((self.starts[clip] + start, self.starts[clip] + end))
            first.setdefault(clip, start)
        self.silence = [(self.starts[clip], self.starts[clip] + start) for clip, start in first.items() if start]

    def clip(self, number: int) -> Tensor:
        """The tokens of one clip, fp32 [n, D]."""
        return self.tokens[self.starts[number] : self.starts[number + 1]].float()

    def said(self, text: str, ids: Sequence[int], rng: random.Random) -> Tensor:
        """Somebody says a text, whose subwords are `ids`: a whole clip where there is one, mostly; else pieces."""
        if (clips := self.whole.get(text)) and rng.random() < 0.8:
            return self.clip(rng.choice(clips))
        parts = [rng.choice(self.pieces[label]) if label in self.pieces else label for label in ids]
        if self.silence:
            parts = [rng.choice(self.silence), *parts, rng.choice(self.silence)]
        return torch.cat([self.table[one][None] if isinstance(one, int) else self._between(*one) for one in parts])

    def nothing(self, rng: random.Random) -> Tensor:
        """Sound in which nothing is said."""
        return self.clip(rng.choice(self.whole[""]))

    def any_clip(self, rng: random.Random) -> tuple[str, Tensor]:
        """A clip in which something is said, and its text."""
        while not (text := self.texts[number := rng.randrange(len(self.texts))]):
            pass
        return text, self.clip(number)

    def _between(self, start: int, end: int) -> Tensor:
        return self.tokens[start:end].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--clips", type=int, default=12_000)
    parser.add_argument("--noises", nargs="*", default=(), help="manifests of noises")
    args = parser.parse_args()
    model = OmniModel.from_pretrained(args.model, parts=["thinker"], dtype="float32", device="cpu")
    print(f"{make_bank(model, args.manifests, args.file, args.clips, args.noises)} clips")


if __name__ == "__main__":
    main()
