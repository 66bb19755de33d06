"""Fits the codes of omni-nano's voices to their recordings: components and codebooks of mel patches (a minute).

python recipes/nano/fit_codes.py START FOLDER data/lines_*.jsonl      # START: a model with the sizes of its Code2Wav
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from omni.training.codec.mel_codec import MelCodec
from omni.training.data.sound import read_speech

RECORDINGS = 6000


def fit_codes(
    code2wav: Mapping[str, Any], manifests: Sequence[Path], folder: Path, recordings: int = RECORDINGS
) -> torch.Tensor:
    """Fit on so many recordings of manifests and save. code2wav: its config. Returns what is left over behind each
    codebook, as a share."""
    codec = MelCodec(code2wav["num_quantizers"], code2wav["codebook_size"], code2wav["hidden_size"])
    paths = [
        manifest.parent / json.loads(line)["audio"]
        for manifest in manifests
        for line in manifest.read_text(encoding="utf-8").splitlines()
    ]
    picked = random.Random(0).sample(paths, min(recordings, len(paths)))
    sounds = (read_speech(str(path), codec.sample_rate) for path in picked)
    left = codec.fit(sounds, generator=torch.Generator().manual_seed(0))
    codec.save(folder)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("manifests", type=Path, nargs="+")
    args = parser.parse_args()
    config = json.loads((args.start / "config.json").read_text(encoding="utf-8"))
    left = fit_codes(config["code2wav_config"], args.manifests, args.folder)
    print("share of energy left behind each codebook:", ", ".join(f"{share:.3f}" for share in left.tolist()))


if __name__ == "__main__":
    main()
