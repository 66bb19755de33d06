"""Lets the audio encoder speak the Thinker's language before they meet: a linear map, in closed form.

    python recipes/nano/bridge.py hearing_alone data/sentences.jsonl bridged

The CTC head of the stage before knows which word a token of sound is. Least squares find the map from the encoder's
output to the Thinker's embedding of that word (or of `world.NO_WORD`), and it is folded into the encoder's last
projection, so that joint training begins near to what the Thinker has read. The map is a start, not the skill: in a
trial it explained 58 % of the embeddings, and no spoken question was understood yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from world import NO_WORD

from omni import OmniModel
from omni.encoders.mel import LogMel
from omni.training.speech_codes import read_speech

_CLIPS = 600
_NO_WORD = 0.3  # weight of tokens without a word: there are more of them


@torch.no_grad()
def bridge(run: Path, manifest: Path, folder: Path) -> float:
    """Write the model of a CTC run with its encoder mapped. Returns the share of the embeddings' variance that the
    map explains at words."""
    model = OmniModel.from_pretrained(run / "model", parts=["thinker"], dtype="float32", device="cpu")
    encoder, thinker = model.audio_encoder, model.thinker
    assert encoder is not None and thinker is not None
    weight, bias = ctc_head(run / "checkpoints")
    blank, mel = len(bias) - 1, LogMel(num_mels=encoder.config.num_mel_bins)
    rows = manifest.read_text(encoding="utf-8").splitlines()[:_CLIPS]
    heard = []
    for row in rows:
        path = manifest.parent / json.loads(row)["audios"][0]
        features = mel(read_speech(str(path), mel.sample_rate))
        heard.append(encoder(features[None], [features.shape[1]]).embeds)
    tokens = torch.cat(heard)
    words = (tokens @ weight.t() + bias).argmax(1)
    spoken = words != blank
    assert model.processor is not None
    silence = model.processor.encode_text(NO_WORD)[0]
    targets = thinker.embed_tokens.weight[words.where(spoken, silence)]
    inputs = torch.cat((tokens, torch.ones(len(tokens), 1)), dim=1)
    share = torch.where(spoken, 1.0, _NO_WORD)[:, None]
    found = torch.linalg.lstsq((inputs * share).double(), (targets * share).double()).solution.float()
    errors = (inputs @ found - targets)[spoken].square().sum()
    explained = 1 - errors / targets[spoken].square().sum()
    proj = encoder.proj2
    proj.weight.copy_(found[:-1].t() @ proj.weight)
    proj.bias.copy_(proj.bias @ found[:-1] + found[-1])
    model.save_pretrained(folder)
    return float(explained)


def ctc_head(checkpoints: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the head in the newest checkpoint of the run."""
    newest = sorted(checkpoints.glob("step_*/tensors.safetensors"))[-1:]
    if not newest:
        raise FileNotFoundError(f"{checkpoints} holds no checkpoint of a run; run the stage 3_hearing_alone")
    tensors = load_file(newest[0])
    return tensors["/parameters/head.proj.weight"], tensors["/parameters/head.proj.bias"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(f"explained at words: {bridge(args.run, args.manifest, args.folder):.2f}")


if __name__ == "__main__":
    main()
