"""Fits the codes of omni-nano's voice to its recordings: components and codebooks of mel patches (a minute).

python recipes/nano/fit_codes.py DATA/answers.jsonl FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from make_model import nano_config

from omni.training.codec.mel_codec import MelCodec
from omni.training.data.sound import read_speech


def fit_codes(manifest: Path, folder: Path) -> torch.Tensor:
    """Fit on all recordings of a manifest and save. Returns what is left over behind each codebook, as a share."""
    config = nano_config()["code2wav_config"]
    codec = MelCodec(config["num_quantizers"], config["codebook_size"], config["hidden_size"])
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    recordings = (read_speech(str(manifest.parent / row["audio"]), codec.sample_rate) for row in rows)
    left = codec.fit(recordings, generator=torch.Generator().manual_seed(0))
    codec.save(folder)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    left = fit_codes(args.manifest, args.folder)
    print("share of energy left behind each codebook:", ", ".join(f"{share:.3f}" for share in left.tolist()))


if __name__ == "__main__":
    main()
