"""Hearing, first: the audio encoder is told at each moment what is said.

    python recipes/nano/timed_hearing.py train START FOLDER MANIFEST ... [--subwords]
    python recipes/nano/timed_hearing.py judge FOLDER MANIFEST ...

Phones come first: flite and festival say when they speak which, and each token of the encoder names the four phones of
its 80 ms. With those, `find_subwords` finds what is said when in the clips of all voices, and then (--subwords) each
token also says the subword that ends in it, or "~": what CTC would have it say, without having to find out where. 300
steps from nothing, in which CTC has not yet begun to hear, name 58 % of the phones of many voices.

Shapes: N tokens of all clips, S = SLOTS moments of a token, P phones, V subwords.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import PAUSE, PHONES
from steps import Learning, take_steps
from timed_clips import TOKEN_S, Heard, TimedClips, labels_at, said_at, token_starts
from torch import Tensor, nn
from torch.nn import functional as F

from omni import OmniModel
from omni.encoders.contract import EncoderOutput, chosen_cuts
from omni.encoders.mel import LogMel
from omni.metrics.scores import word_error_rate
from omni.processing.audio_file import join_clips
from omni.training.data.augmentation import SpeechAugmentation
from omni.training.objectives.transcription import EmbeddingHead, ctc_transcribe

BLANK = "~"
SLOTS = 4
CHUNKS_S = (0.48, 1.0)
WINDOWS_S = (0.96, 8.0)
_BATCH = 26
_LEARNING = Learning(6e-4, 100, 0.03, (0.9, 0.98), 0.01, 5.0, 50, 500)
_HARD_AFTER = 0.4  # of the steps, from where on clips are heard in all noise
_PHONES = 0.3  # the weight of their loss beside that of the subwords
_MASKS = SpeechAugmentation(frequency_masks=1)


class PhoneHead(nn.Module):
    """[N, D] -> logits [N, S, P]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, SLOTS * len(PHONES))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(self.norm(embeds)).unflatten(1, (SLOTS, len(PHONES)))


def subword_head(model: OmniModel) -> EmbeddingHead:
    """Cosines with the embeddings of the model's Thinker."""
    assert model.processor is not None
    (blank,) = model.processor.encode_text(BLANK)
    head = EmbeddingHead(model.thinker.embed_tokens.weight.detach(), blank)
    head.prior.requires_grad_(False)  # what the Thinker reads has none
    return head


def draw_window(rng: random.Random, chunk_s: float) -> float:
    """Seconds of a whole number of chunks, as far back as attention sees."""
    least, most = (round(limit / chunk_s) for limit in WINDOWS_S)
    return chunk_s * rng.randint(least, most)


def hear(
    encoder: Any, mel: LogMel, clips: Sequence[Heard], chunk_s: float, window_s: float | None = None, masks: int = 0
) -> tuple[EncoderOutput, list[np.ndarray]]:
    """The encoder's tokens of clips that are heard in such chunks, and when each token of each clip begins.

    masks: a number that bands of the spectra are masked by; 0 for none."""
    spectra = [mel(clip.samples) for clip in clips]
    if masks:
        spectra = [_MASKS.features(one, masks + place) for place, one in enumerate(spectra)]
    features, mask = join_clips(spectra)
    cuts = chosen_cuts(encoder, chunk_s, window_s)
    with torch.autocast("cpu", torch.bfloat16):
        out: EncoderOutput = encoder(features, mask.sum(1).tolist(), **cuts)
    frames = round(chunk_s * 100)
    per_chunk = encoder.num_tokens(frames, chunk_frames=frames)
    starts = [token_starts(count, chunk_s, per_chunk) for count in out.lengths]
    return out._replace(embeds=out.embeds.float()), starts


def phones_at(clip: Heard, starts: np.ndarray) -> Tensor:
    """Which phone is said in each moment of a clip's tokens, int64 [tokens, S]."""
    moments = starts[:, None] + (np.arange(SLOTS) + 0.5) * (TOKEN_S / SLOTS)
    names = said_at(moments.ravel(), clip.phones, PAUSE)
    return torch.tensor([PHONES.index(name) for name in names]).view(-1, SLOTS)


def train(
    model: OmniModel,
    manifests: Sequence[Path],
    folder: Path,
    steps: int,
    noises: Sequence[str] = (),
    subwords: bool = False,
) -> dict[str, float]:
    """Train a model's audio encoder and write `folder/model`, see `take_steps`. Returns what was logged last: losses,
    and the share of moments whose phones (`phones_right`) are named right, and of tokens with a subword
    (`subwords_right`)."""
    torch.manual_seed(0)
    encoder = model.audio_encoder
    assert encoder is not None
    encoder.requires_grad_(True)
    heads = nn.ModuleDict({"phones": PhoneHead(encoder.config.output_dim)})
    if subwords:
        heads["subwords"] = subword_head(model)
    mel = LogMel(num_mels=encoder.config.num_mel_bins)
    clips = TimedClips(manifests, "subwords" if subwords else "phones", noises)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random.Random(f"heard {step}")
        some = clips.draw(rng, _BATCH, step / (_HARD_AFTER * steps))
        chunk_s = rng.choice(CHUNKS_S)
        window_s = draw_window(rng, chunk_s) if subwords else None
        out, starts = hear(encoder, mel, some, chunk_s, window_s, masks=1 + step * _BATCH)
        return losses(heads, out.embeds, some, starts)

    parts = nn.ModuleDict({"encoder": encoder, "heads": heads})
    mean = take_steps(parts, loss_of, folder, steps, _LEARNING)
    model.save_pretrained(folder / "model")
    torch.save(heads["phones"].state_dict(), folder / "head.pt")
    return mean


def losses(
    heads: nn.ModuleDict, embeds: Tensor, clips: Sequence[Heard], starts: Sequence[np.ndarray]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is lowered, and what is logged, of clips of which it is known when what is said."""
    phones = torch.cat([phones_at(clip, one) for clip, one in zip(clips, starts)])
    named = heads["phones"](embeds)
    loss = F.cross_entropy(named.flatten(0, 1), phones.flatten())
    shown = {"phones": loss, "phones_right": (named.argmax(-1) == phones).float().mean()}
    if "subwords" in heads:
        blank = heads["subwords"].blank
        labels = torch.cat([labels_at(one, clip.subwords, blank) for clip, one in zip(clips, starts)])
        logits = heads["subwords"](embeds)
        of_subwords = F.cross_entropy(logits, labels)
        said = labels != blank
        right = (logits.argmax(-1) == labels)[said].float().mean().nan_to_num()
        shown = {"subwords": of_subwords, "subwords_right": right, **shown}
        loss = of_subwords + _PHONES * loss
    return loss, shown


def phone_head(folder: Path, encoder: Any) -> PhoneHead:
    """The head that was trained with the encoder of `folder/model`."""
    head = PhoneHead(encoder.config.output_dim)
    head.load_state_dict(torch.load(folder / "head.pt"))
    return head


@torch.no_grad()
def judge(model: OmniModel, head: PhoneHead, manifests: Sequence[Path], chunk_s: float = 1.0) -> dict[str, Any]:
    """Of clips that were kept, by manifest: the share of moments named right, pauses not counted (None where no phones
    are told), and the word error rate of what CTC's greedy reading of the tokens gives."""
    encoder, reader, found = model.audio_encoder, subword_head(model), {}
    assert encoder is not None and model.processor is not None
    mel = LogMel(num_mels=encoder.config.num_mel_bins)
    for manifest in manifests:
        clips = TimedClips([manifest], "text", kept=True).all()
        out, starts = hear(encoder, mel, clips, chunk_s)
        read = ctc_transcribe(reader, out)
        wer = word_error_rate(
            [clip.text for clip in clips], [model.processor.decode(ids).strip() for ids in read], "en"
        )
        right = None
        if all(clip.phones for clip in clips):
            said = torch.cat([phones_at(clip, one) for clip, one in zip(clips, starts)])
            spoken = said != PHONES.index(PAUSE)
            right = float((head(out.embeds).argmax(-1) == said)[spoken].float().mean())
        found[manifest.stem] = {"phones_right": right, "wer": wer}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the audio encoder, or go on")
    training.add_argument("start", type=Path, help="a model")
    judging = commands.add_parser("judge", help="how much of the kept clips it names right")
    for command in (training, judging):
        command.add_argument("folder", type=Path)
        command.add_argument("manifests", type=Path, nargs="+")
    training.add_argument("--steps", type=int, default=2000)
    training.add_argument("--noises", nargs="*", default=(), help="manifests of noises")
    training.add_argument("--subwords", action="store_true", help="of manifests made by find_subwords.py")
    args = parser.parse_args()
    source = args.start if args.command == "train" else args.folder / "model"
    model = OmniModel.from_pretrained(source, parts=["thinker"], dtype="float32", device="cpu")
    if args.command == "train":
        print(train(model, args.manifests, args.folder, args.steps, args.noises, args.subwords))
        return
    for name, row in judge(model, phone_head(args.folder, model.audio_encoder), args.manifests).items():
        right = "" if row["phones_right"] is None else f"phones {row['phones_right']:.3f}"
        print(f"{name:20} WER {row['wer']:.3f} {right}")


if __name__ == "__main__":
    main()
