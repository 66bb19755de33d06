"""Hearing, first: the audio encoder is told at each moment what is said.

    python recipes/nano/timed_hearing.py train START FOLDER MANIFEST ... [--subwords]
    python recipes/nano/timed_hearing.py judge FOLDER MANIFEST ...

Phones come first: flite and festival say when they speak which, and each token of the encoder names the four phones of
its 80 ms. By them `find_subwords` finds what is said when in the clips of all voices. Then (--subwords) a layer in the
middle names the phones and the subword that are being said, and each token says the subword that has just ended, or
"~": what CTC would have it say, without having to find out where. 300 steps from nothing, in which CTC has not yet
begun to hear, name 58 % of the phones of many voices.

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
from omni.encoders.audio import split_blocks
from omni.encoders.contract import EncoderOutput, chosen_cuts
from omni.encoders.mel import LogMel
from omni.layers.packing import BlockPasses
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
NAMING = 3  # the layer, counted from 0, that names what is being said
_NAMED = 0.5  # the weight of each of its losses beside that of the subwords that the tokens say
_HEAD = "head.pt"
_MASKS = SpeechAugmentation(frequency_masks=1)


class PhoneHead(nn.Module):
    """[N, D] -> logits [N, S, P]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, SLOTS * len(PHONES))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(self.norm(embeds)).unflatten(1, (SLOTS, len(PHONES)))


class Naming(nn.Module):
    """Names the subword that is being said and the phones, from a layer [N, D]; a blank is named in pauses."""

    def __init__(self, width: int, subwords: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, subwords + 1)
        self.phones = PhoneHead(width)

    def losses(self, hidden: Tensor, subwords: Tensor, phones: Tensor) -> dict[str, Tensor]:
        """Cross-entropies with the subwords [N], the last label in pauses, and the phones [N, S]."""
        named, pronounced = self.proj(self.norm(hidden.float())), self.phones(hidden.float())
        return {"named": F.cross_entropy(named, subwords),
                "phones": F.cross_entropy(pronounced.flatten(0, 1), phones.flatten())}  # fmt: skip


def subword_head(model: OmniModel) -> EmbeddingHead:
    """Cosines with the embeddings of the model's Thinker."""
    assert model.processor is not None
    (blank,) = model.processor.encode_text(BLANK)
    return EmbeddingHead(model.thinker.embed_tokens.weight.detach(), blank)


def subword_heads(model: OmniModel) -> nn.ModuleDict:
    """What is thrown away when the encoder is trained: what its tokens say, what a layer names."""
    says = subword_head(model)
    return nn.ModuleDict({"says": says, "names": Naming(model.config.thinker.audio_config.d_model, says.blank)})


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


def windows_of(encoder: Any, lengths: Sequence[int], chunk_s: float, window_s: float) -> list[int]:
    """Tokens of each attention window of clips of so many tokens."""
    frames = round(chunk_s * 100)
    most = round(window_s / chunk_s) * encoder.num_tokens(frames, chunk_frames=frames)
    return [block for tokens in lengths for block in split_blocks(tokens, most)]


def in_order(hidden: Tensor, windows: Sequence[int]) -> Tensor:
    """What a layer gives [N, D], in the order of the clips: in the encoder windows of one length are side by side."""
    return BlockPasses(windows, None).join([hidden])


def subwords_at(clip: Heard, starts: np.ndarray, phones: Tensor, blank: int) -> Tensor:
    """Which subword is being said in each of a clip's tokens, int64 [tokens]; `blank` where all phones are pauses."""
    said = torch.tensor(said_at(starts + TOKEN_S / 2, clip.subwords, blank))
    return said.masked_fill((phones == PHONES.index(PAUSE)).all(1), blank)


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
    and the share that is named right, of moments or of the tokens that are to say a subword."""
    torch.manual_seed(0)
    encoder = model.audio_encoder
    assert encoder is not None
    encoder.requires_grad_(True)
    heads = nn.ModuleDict()
    if subwords:
        heads = subword_heads(model)
    else:
        heads["phones"] = PhoneHead(encoder.config.output_dim)
    mel = LogMel(num_mels=encoder.config.num_mel_bins)
    clips = TimedClips(manifests, "subwords" if subwords else "phones", noises)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random.Random(f"heard {step}")
        some = clips.draw(rng, _BATCH, step / (_HARD_AFTER * steps))
        chunk_s = rng.choice(CHUNKS_S)
        window_s = draw_window(rng, chunk_s)
        seen: list[Tensor] = []
        with encoder.layers[NAMING].register_forward_hook(lambda _, __, hidden: seen.append(hidden)):
            out, starts = hear(encoder, mel, some, chunk_s, window_s, masks=1 + step * _BATCH)
        hidden = in_order(seen[0], windows_of(encoder, out.lengths, chunk_s, window_s))
        return losses(heads, out.embeds, hidden, some, starts)

    parts = nn.ModuleDict({"encoder": encoder, "heads": heads})
    mean = take_steps(parts, loss_of, folder, steps, _LEARNING)
    model.save_pretrained(folder / "model")
    if not subwords:
        torch.save(heads["phones"].state_dict(), folder / _HEAD)
    return mean


def losses(
    heads: nn.ModuleDict, embeds: Tensor, hidden: Tensor, clips: Sequence[Heard], starts: Sequence[np.ndarray]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is lowered, and what is logged, of clips of which it is known when what is said."""
    phones = [phones_at(clip, one) for clip, one in zip(clips, starts)]
    if "phones" in heads:
        named, said = heads["phones"](embeds), torch.cat(phones)
        loss = F.cross_entropy(named.flatten(0, 1), said.flatten())
        return loss, {"phones": loss, "right": (named.argmax(-1) == said).float().mean()}
    blank = heads["says"].blank
    being = [subwords_at(clip, one, pauses, blank) for clip, one, pauses in zip(clips, starts, phones)]
    labels = [labels_at(one, clip.subwords, blank) for clip, one in zip(clips, starts)]
    return subword_losses(heads, embeds, hidden, *map(torch.cat, (labels, being, phones)))


def subword_losses(
    heads: nn.ModuleDict, embeds: Tensor, hidden: Tensor, labels: Tensor, being: Tensor, phones: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of tokens: what they are to say [N], and which subword [N] and phones [N, S] are being said."""
    shown: dict[str, Tensor] = heads["names"].losses(hidden, being, phones)
    logits = heads["says"](embeds)
    loss, ended = F.cross_entropy(logits, labels), labels != heads["says"].blank
    right = (logits.argmax(-1) == labels)[ended].float().mean().nan_to_num()
    return loss + _NAMED * (shown["named"] + shown["phones"]), {"subwords": loss, "right": right, **shown}


def phone_head(folder: Path, encoder: Any) -> PhoneHead:
    """The head that was trained with the encoder of `folder/model`."""
    head = PhoneHead(encoder.config.output_dim)
    head.load_state_dict(torch.load(folder / _HEAD))
    return head


@torch.no_grad()
def phones_right(model: OmniModel, head: PhoneHead, manifest: Path, chunk_s: float = 1.0) -> float:
    """The share of moments named right in the clips that were kept, pauses not counted."""
    clips = TimedClips([manifest], "phones", kept=True).all()
    out, starts = _hear_all(model, clips, chunk_s)
    said = torch.cat([phones_at(clip, one) for clip, one in zip(clips, starts)])
    return float((head(out.embeds).argmax(-1) == said)[said != PHONES.index(PAUSE)].float().mean())


@torch.no_grad()
def words_wrong(model: OmniModel, manifest: Path, chunk_s: float = 1.0) -> float:
    """The word error rate of CTC's greedy reading of the tokens, in the clips that were kept."""
    assert model.processor is not None
    clips = TimedClips([manifest], "text", kept=True).all()
    read = ctc_transcribe(subword_head(model), _hear_all(model, clips, chunk_s)[0])
    texts = [model.processor.decode(ids).strip() for ids in read]
    return word_error_rate([clip.text for clip in clips], texts, "en")


def _hear_all(model: OmniModel, clips: Sequence[Heard], chunk_s: float) -> tuple[EncoderOutput, list[np.ndarray]]:
    encoder = model.audio_encoder
    assert encoder is not None
    return hear(encoder, LogMel(num_mels=encoder.config.num_mel_bins), clips, chunk_s)


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
    for manifest in args.manifests:
        if (args.folder / _HEAD).exists():
            right = phones_right(model, phone_head(args.folder, model.audio_encoder), manifest)
            print(f"{manifest.stem:20} phones named right {right:.3f}")
        else:
            print(f"{manifest.stem:20} word error rate {words_wrong(model, manifest):.3f}")


if __name__ == "__main__":
    main()
