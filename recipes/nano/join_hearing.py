"""Gives the trained audio encoder to the Thinker that it was trained for.

    python recipes/nano/join_hearing.py hearing/model text/model data/sentences.jsonl FOLDER

The encoder's tokens already point where the Thinker's embeddings of the spoken words point (`head = "embeddings"`), but
only directions were trained. Its last projection is scaled so that they are also as large.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from omni import OmniModel
from omni.encoders.mel import LogMel
from omni.training.data.sound import read_speech

_CLIPS = 60


@torch.no_grad()
def join_hearing(hearing: Path, thinker: Path, manifest: Path, folder: Path) -> float:
    """Write the model `thinker` with the audio encoder of `hearing`. Returns the factor of its last projection."""
    model = OmniModel.from_pretrained(thinker, parts=["thinker"], dtype="float32", device="cpu")
    heard = OmniModel.from_pretrained(hearing, parts=["thinker"], dtype="float32", device="cpu")
    encoder = model.audio_encoder
    encoder.load_state_dict(heard.audio_encoder.state_dict())
    mel = LogMel(num_mels=encoder.config.num_mel_bins)
    tokens = []
    for row in manifest.read_text(encoding="utf-8").splitlines()[:_CLIPS]:
        sound = read_speech(str(manifest.parent / json.loads(row)["audios"][0]), mel.sample_rate)
        features = mel(sound)
        tokens.append(encoder(features[None], [features.shape[1]]).embeds)
    factor = float(_size(model.thinker.embed_tokens.weight) / _size(torch.cat(tokens)))
    encoder.proj2.weight.mul_(factor)
    encoder.proj2.bias.mul_(factor)
    model.save_pretrained(folder)
    return factor


def _size(vectors: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of all values."""
    return vectors.square().mean().sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hearing", "thinker", "manifest", "folder"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    factor = join_hearing(args.hearing, args.thinker, args.manifest, args.folder)
    print(f"the audio encoder's tokens are scaled by {factor:.3g}")


if __name__ == "__main__":
    main()
