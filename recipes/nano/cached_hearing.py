"""Hearing, in between: the upper layers of the audio encoder learn subwords from what the lower ones make of clips.

    python recipes/nano/cached_hearing.py cache MODEL FILE data/timed_*.jsonl [--clips 40000]
    python recipes/nano/cached_hearing.py train MODEL FILE FOLDER [--steps 4000]

Which phones are said, the lower layers hear after some hundred steps. Which of two thousand subwords they make takes
many times the examples, and three quarters of a step are convolutions, noise and layers that hardly change meanwhile.
So those run once, on clips in all surroundings, and the layers above are trained on what they gave. The losses are
those of `timed_hearing`, which then goes on with the whole encoder.

Shapes: N tokens of all clips, D encoder width, S moments of a token.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timed_hearing
import torch
from safetensors.torch import load_file, save_file
from steps import Learning, take_steps
from timed_clips import TimedClips, labels_at
from timed_hearing import (
    CHUNKS_S,
    draw_window,
    hear,
    in_order,
    phones_at,
    subword_heads,
    subword_losses,
    subwords_at,
    windows_of,
)
from torch import Tensor, nn
from tqdm import tqdm

from omni import OmniModel
from omni.encoders.mel import LogMel

LOWER = 3  # layers that run once
_TOGETHER = 16  # clips
_BATCH = 128
_LEARNING = Learning(8e-4, 100, 0.05, (0.9, 0.98), 0.01, 5.0, 50, 500)
_OF_TOKENS = ("hidden", "labels", "being", "phones")


@torch.no_grad()
def make_cache(model: OmniModel, manifests: Sequence[Path], path: Path, clips: int, noises: Sequence[str] = ()) -> None:
    """Write what the lower layers make of so many clips, and what is to be said of them."""
    encoder = model.audio_encoder
    assert encoder is not None
    source, mel = TimedClips(manifests, "subwords", noises), LogMel(num_mels=encoder.config.num_mel_bins)
    blank = len(model.thinker.embed_tokens.weight)
    found: dict[str, list[Tensor]] = {name: [] for name in (*_OF_TOKENS, "lengths", "windows", "counts")}
    for step in tqdm(range(-(-clips // _TOGETHER)), "clips heard"):
        rng = random.Random(f"cached {step}")
        some, chunk_s = source.draw(rng, _TOGETHER), rng.choice(CHUNKS_S)
        window_s = draw_window(rng, chunk_s)
        with only(encoder, slice(LOWER), LOWER - 1) as seen:
            out, starts = hear(encoder, mel, some, chunk_s, window_s, masks=1 + step * _TOGETHER)
        windows = [windows_of(encoder, [tokens], chunk_s, window_s) for tokens in out.lengths]
        every = [window for clip in windows for window in clip]
        phones = [phones_at(clip, one) for clip, one in zip(some, starts)]
        found["hidden"].append(in_order(seen[0], every).half())
        found["phones"].append(torch.cat(phones).byte())
        found["being"] += [subwords_at(*three, blank).short() for three in zip(some, starts, phones)]
        found["labels"] += [labels_at(one, clip.subwords, blank).short() for clip, one in zip(some, starts)]
        found["lengths"].append(torch.tensor(out.lengths))
        found["windows"].append(torch.tensor(every))
        found["counts"].append(torch.tensor([len(one) for one in windows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.cat(parts) for name, parts in found.items()}, path)


@contextmanager
def only(encoder: Any, layers: slice, read: int) -> Iterator[list[Tensor]]:
    """Only these layers run; gives a list that gets what one of them, `read`, gives."""
    every, seen = encoder.layers, []
    encoder.layers = every[layers]
    with every[read].register_forward_hook(lambda _, __, hidden: seen.append(hidden)):
        try:
            yield seen
        finally:
            encoder.layers = every


def above(encoder: Any, lower: Tensor, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the upper layers make of what the lower ones gave [N, D]: the encoder's tokens, and the layer that names."""
    with only(encoder, slice(LOWER, None), timed_hearing.NAMING) as seen, torch.autocast("cpu", torch.bfloat16):
        embeds = encoder._transform(lower.float(), windows)
    return embeds.float(), in_order(seen[0], windows)


class Cache:
    """A file of `make_cache`."""

    def __init__(self, path: Path) -> None:
        parts = load_file(path)
        lengths, counts = parts["lengths"].tolist(), parts["counts"].tolist()
        self.tokens = [parts[name].split(lengths) for name in _OF_TOKENS]
        self.windows = [one.tolist() for one in parts["windows"].split(counts)]

    def draw(self, rng: random.Random, count: int) -> tuple[list[Tensor], list[int]]:
        """`_OF_TOKENS` of so many clips, and the lengths of their attention windows."""
        clips = rng.sample(range(len(self.windows)), min(count, len(self.windows)))
        drawn = [torch.cat([part[clip] for clip in clips]) for part in self.tokens]
        return drawn, [window for clip in clips for window in self.windows[clip]]


def train(model: OmniModel, path: Path, folder: Path, steps: int) -> dict[str, float]:
    """Train the layers above those of a cache, and write `folder/model`, see `take_steps`. Returns what was logged
    last."""
    torch.manual_seed(0)
    encoder, cache = model.audio_encoder, Cache(path)
    assert encoder is not None
    heads = subword_heads(model)
    upper = nn.ModuleList([encoder.layers[LOWER:], encoder.ln_post, encoder.proj1, encoder.proj2])
    upper.requires_grad_(True)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        (lower, *said), windows = cache.draw(random.Random(f"cached {step}"), _BATCH)
        embeds, hidden = above(encoder, lower, windows)
        return subword_losses(heads, embeds, hidden, *(one.long() for one in said))

    parts = nn.ModuleDict({"upper": upper, "heads": heads})
    mean = take_steps(parts, loss_of, folder, steps, _LEARNING)
    model.save_pretrained(folder / "model")
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    caching = commands.add_parser("cache", help="run the lower layers")
    training = commands.add_parser("train", help="train the layers above, or go on")
    for command in (caching, training):
        command.add_argument("model", type=Path)
        command.add_argument("file", type=Path)
    caching.add_argument("manifests", type=Path, nargs="+")
    caching.add_argument("--clips", type=int, default=40_000)
    caching.add_argument("--noises", nargs="*", default=(), help="manifests of noises")
    training.add_argument("folder", type=Path)
    training.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    model = OmniModel.from_pretrained(args.model, parts=["thinker"], dtype="float32", device="cpu")
    if args.command == "cache":
        make_cache(model, args.manifests, args.file, args.clips, args.noises)
    else:
        print(train(model, args.file, args.folder, args.steps))


if __name__ == "__main__":
    main()
