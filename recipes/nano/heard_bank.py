"""What the trained audio encoder makes of clips, kept in a file; and texts "spoken" out of pieces of it.

    python recipes/nano/heard_bank.py MODEL FILE data/heard_*.jsonl data/unsaid.jsonl [--clips 12000]

The encoder is finished, so its tokens are computed once. Each clip is heard somewhere (noise, rooms, levels) and in one
of the chunks that live use chooses from. The subwords of a clip's text are then found in its tokens by forced alignment
(CTC's likeliest path): a piece is the tokens that belong to one subword. What was never said as a whole can so be put
together of pieces that were, errors of hearing included, and a conversation needs no voice to speak all its questions.

Shapes: N tokens of all clips, D their width.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchaudio.functional import forced_align
from tqdm import tqdm

from omni import OmniModel
from omni.encoders.contract import chosen_cuts
from omni.encoders.mel import LogMel
from omni.processing.audio_file import join_clips
from omni.training.data.augmentation import SpeechAugmentation
from omni.training.data.sound import read_speech
from omni.training.data.surroundings import Noise, Surroundings, recorded_noise

CHUNKS_S = (0.48, 1.0)
WINDOWS_S = (0.96, 8.0)
RATE_HZ = 16_000
_TOGETHER = 16  # clips
_SCALE = 12.0  # of the cosines that are aligned
BLANK = "~"
_CLEAN = 0.35  # of clips have nothing around them but silence
_LONGEST_S = 20.0
_PAD_S = ((0.05, 0.5), (0.5, 4.0))  # of silence around speech: usually, and in one of eight clips


def surroundings(rng: random.Random, noises: Noise | None) -> Surroundings:
    """Where a clip is heard."""
    silence_s = _PAD_S[rng.random() < 1 / 8]
    if rng.random() < _CLEAN:
        return Surroundings(silence_s=silence_s, gain_db=(-30.0, 0.0))
    return Surroundings(
        noise=0.6, noises=noises, room=0.3, telephone=0.1, overload=0.04,
        equaliser=0.4, gain_db=(-50.0, 0.0), silence_s=silence_s,
    )  # fmt: skip


@torch.no_grad()
def make_bank(model: OmniModel, manifests: Sequence[Path], path: Path, clips: int, noises: Sequence[str] = ()) -> int:
    """Write what the audio encoder makes of so many clips, from the manifests in turn; returns how many."""
    encoder, processor = model.audio_encoder, model.processor
    assert encoder is not None and processor is not None
    mel, rng = LogMel(num_mels=encoder.config.num_mel_bins), random.Random(f"bank {path.name}")
    rows = [[json.loads(line) | {"folder": str(m.parent)} for line in m.read_text().splitlines()] for m in manifests]
    for part in rows:
        rng.shuffle(part)
    noise = recorded_noise(noises) if noises else None
    table = model.thinker.embed_tokens.weight.float()
    (blank,) = processor.encode_text(BLANK)
    picked = [part[place] for place in range(max(map(len, rows))) for part in rows if place < len(part)][:clips]
    found: list[Tensor] = []
    labels: list[list[int]] = []
    for first in tqdm(range(0, len(picked), _TOGETHER), "clips heard"):
        some = picked[first : first + _TOGETHER]
        features = []
        for number, row in enumerate(some):
            sound = read_speech(f"{row['folder']}/{row['audio']}", RATE_HZ)
            heard = SpeechAugmentation(surroundings=surroundings(rng, noise), seed=first + number)
            features.append(mel(heard.sound(sound, RATE_HZ, first + number)[: int(_LONGEST_S * RATE_HZ)]))
        joined, mask = join_clips(features)
        chunk_s = rng.choice(CHUNKS_S)
        window_s = chunk_s * rng.randint(*(round(limit / chunk_s) for limit in WINDOWS_S))
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(joined, mask.sum(1).tolist(), **chosen_cuts(encoder, chunk_s, window_s))
        found += out.embeds.float().split(out.lengths)
        labels += [processor.encode_text(f" {row['text']}") if row["text"] else [] for row in some]
    pieces = [aligned(one, ids, table, blank) for one, ids in zip(found, labels)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "tokens": torch.cat(found).half(),
            "lengths": torch.tensor([len(one) for one in found]),
            "pieces": torch.tensor([(clip, *piece) for clip, some in enumerate(pieces) for piece in some]).view(-1, 4),
        },
        path,
        {"texts": json.dumps([row["text"] for row in picked])},
    )
    return len(picked)


def aligned(heard: Tensor, ids: Sequence[int], table: Tensor, blank: int) -> list[tuple[int, int, int]]:
    """Where the subwords of a text are in the tokens [N, D] of a clip: (id, first token, end), which cover the clip but
    for the silence around; nothing for a clip that is too short."""
    if not ids or len(heard) < len(ids) + sum(a == b for a, b in pairwise(ids)):
        return []
    logits = _SCALE * torch.nn.functional.normalize(heard, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    path, _ = forced_align(logits.log_softmax(-1)[None], torch.tensor([list(ids)], dtype=torch.int32), blank=blank)
    said = path[0].tolist()
    starts = [n for n, label in enumerate(said) if label != blank and (n == 0 or said[n - 1] != label)]
    ends = [next((m for m in range(n, len(said)) if said[m] != said[n]), len(said)) for n in starts]
    middles = [(end + start + 1) // 2 for end, start in zip(ends, starts[1:])]  # silence between two belongs to both
    return list(zip(ids, [max(0, starts[0] - 1), *middles], [*middles, min(len(said), ends[-1] + 1)]))


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
