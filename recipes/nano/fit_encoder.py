"""Makes the codec encoder that goes with a finished omni-nano, from its own speech (two minutes).

    python recipes/nano/fit_encoder.py MODEL            # writes MODEL/codec_encoder

The model repeats sentences of the small world; the encoder learns to hear in Code2Wav's sound which codes it was. So it
also fits a model whose Code2Wav was trained on after its codebooks were fitted, or whose codebooks are lost.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import world

from omni import OmniModel
from omni.metrics.scores import mel_distance
from omni.training.codec.mel_codec import MelCodec
from omni.training.codec.speech_codes import OWN_FOLDER

_SENTENCES, _AT_ONCE, _KEPT_BACK = 256, 16, 16
_MAX_FRAMES = 100


def speak(model: OmniModel, texts: list[str]) -> list[torch.Tensor]:
    """The codes [K, T] of each text, repeated on request."""
    asked = [[{"role": "user", "content": f"repeat after me {text}"}] for text in texts]
    out = model.generate(model.processor(asked), max_frames=_MAX_FRAMES)
    return list(out.codes)


@torch.no_grad()
def fit_encoder(folder: Path, sentences: int = _SENTENCES) -> tuple[float, float]:
    """Fit and write the encoder, in bfloat16. Returns, of sentences that were kept back, the share of codes of the
    first codebook that it hears right, and the mel distance in dB of their sound from itself, encoded and decoded."""
    model = OmniModel.from_pretrained(folder, dtype="float32", device="cpu")
    rng = random.Random("encoder")
    texts = [world.jumble(rng).answer if i % 2 else world.sentence(rng) for i in range(sentences + _KEPT_BACK)]
    said = [codes for i in range(0, len(texts), _AT_ONCE) for codes in speak(model, texts[i : i + _AT_ONCE])]
    MelCodec.of_decoder(model.code2wav, said[:sentences]).bfloat16().save(folder / OWN_FOLDER)
    codec, right, distances = MelCodec.load(folder / OWN_FOLDER), [], []
    for codes in said[sentences:]:
        wave = model.code2wav(codes[None])[0]
        heard = codec.encode(wave)[:, : codes.shape[1]]
        right.append((heard[0] == codes[0, : heard.shape[1]]).float().mean())
        distances.append(mel_distance(model.code2wav(heard[None])[0], wave, codec.sample_rate).decibels)
    return float(torch.stack(right).mean()), sum(distances) / len(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sentences", type=int, default=_SENTENCES, help=f"spoken for it (default {_SENTENCES})")
    args = parser.parse_args()
    right, distance = fit_encoder(args.model, args.sentences)
    print(f"first codes heard right: {right:.1%}; its own speech through encoder and Code2Wav: {distance:.2f} dB")


if __name__ == "__main__":
    main()
