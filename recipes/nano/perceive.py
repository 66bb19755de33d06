"""Gives the trained encoders to the model that the Thinker is trained in.

    python recipes/nano/perceive.py START HEARING SEEING FOLDER data/heard_*.jsonl

What the audio encoder says points where the embeddings of the spoken subwords point, but only directions were trained:
its last projection is scaled so that its tokens are also as large. The vision encoder's words are put into the same
embeddings (`name_things.put_into`). START has the embeddings that all parts share; HEARING is a model, SEEING a folder
of `name_things.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from name_things import put_into, trained

from omni import OmniModel
from omni.encoders.mel import LogMel
from omni.training.data.sound import read_speech

_CLIPS = 60


@torch.no_grad()
def perceive(start: Path, hearing: Path, seeing: Path | None, folder: Path, manifests: Sequence[Path]) -> float:
    """Write the model of `start` with these encoders; returns the factor of the audio encoder's last projection.

    seeing: None leaves the vision encoder as it is.
    """
    model = OmniModel.from_pretrained(start, dtype="float32", device="cpu")
    heard = OmniModel.from_pretrained(hearing, parts=["thinker"], dtype="float32", device="cpu")
    encoder = model.audio_encoder
    encoder.load_state_dict(heard.audio_encoder.state_dict())
    rows = [(m.parent, json.loads(line)) for m in manifests for line in m.read_text(encoding="utf-8").splitlines()]
    said = [(where, row) for where, row in rows if row["text"]]
    mel, found = LogMel(num_mels=encoder.config.num_mel_bins), []
    for where, row in random.Random(0).sample(said, min(_CLIPS, len(said))):
        features = mel(read_speech(str(where / row["audio"]), mel.sample_rate))
        found.append(encoder(features[None], [features.shape[1]]).embeds)
    factor = float(_size(model.thinker.embed_tokens.weight) / _size(torch.cat(found)))
    encoder.proj2.weight.mul_(factor)
    encoder.proj2.bias.mul_(factor)
    if seeing is not None:
        put_into(model, trained(seeing))
    model.save_pretrained(folder)
    return factor


def _size(vectors: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of all values."""
    return vectors.square().mean().sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("start", "hearing", "seeing", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("manifests", type=Path, nargs="+")
    args = parser.parse_args()
    factor = perceive(args.start, args.hearing, args.seeing, args.folder, args.manifests)
    print(f"the audio encoder's tokens are scaled by {factor:.3g}")


if __name__ == "__main__":
    main()
