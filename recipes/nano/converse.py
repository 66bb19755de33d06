"""The Thinker alone learns to hold conversations, from what the finished encoders say.

    python recipes/nano/converse.py MODEL BANK FOLDER [--steps 30000]

The encoders say what they hear and see in the Thinker's own embeddings (`tokens.vectors`), so they need not run: a
spoken question is a clip of `heard_bank`, or put together of pieces of such clips, and a picture is what its tokens
are to say (`seeing_data.told`), with noise, or now and then is drawn and looked at. What is typed needs neither. All is
made as it is needed from `talk`, and a step's conversations follow from its number. Embeddings and head stay as they
are.

Shapes: T tokens of a conversation, D Thinker width.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import talk
import torch
from english import sentences
from heard_bank import Bank
from name_things import WORDS
from scenes import clip_from_talk, from_talk
from seeing_data import Show, told, told_clip
from steps import Learning, take_steps
from torch import Tensor, nn

from omni import OmniModel
from omni.layers.packing import PackedBlocks
from omni.rope.positions import Audio, AudioVideo, Image, Segment, Text, Video, interleave, prompt_positions
from omni.training.data.samples import IGNORED
from omni.training.objectives.losses import linear_cross_entropy, router_balance

TYPED, SPOKEN, BOTH = "typed", "spoken", "both"
MODES = {TYPED: 0.45, SPOKEN: 0.4, BOTH: 0.15}
_TOKENS = 2048  # of a step
_LEARNING_RATE, _WARMUP, _LEAST_RATE = 1e-3, 200, 0.02
_LOGGED, _SAVED = 50, 500  # steps
_NOISES = (0.0, 0.1, 0.2, 0.3)  # of the size of an embedding
_DRAWN = 0.35  # of pictures are drawn and looked at
_BEHIND = 0.2  # of media come behind the question
_INSTRUCTED = 0.08  # of conversations begin with a system message
_WRITTEN_DOWN = 0.7  # of dictations are a whole clip of the bank
_SYSTEM = ("you are a helpful assistant", "you are omni", "be brief", "answer in one sentence", "be friendly",
           "you are a small voice assistant who answers questions", "please help the user")  # fmt: skip
_STEP_S, _CLIP_S = 1.0, (2.0, 5.0)  # of the grid steps of a clip, and of clips
_TOKENS_PER_S = 13


@dataclass
class Told:
    """One conversation as the Thinker reads it: embeds [T, D], positions fp32 [3, T], and labels int64 [T], the id that
    follows or `IGNORED`."""

    embeds: Tensor
    positions: Tensor
    labels: Tensor


@dataclass
class _Laid:
    """A conversation as it is laid out: ids, which of them are learnt, media vectors and what lies where."""

    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    media: list[Tensor] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def text(self, ids: Sequence[int], *, learnt: bool = False) -> None:
        """Ordinary tokens."""
        self.ids += ids
        self.learnt += [learnt] * len(ids)
        if self.segments and isinstance(last := self.segments[-1], Text):
            self.segments[-1] = Text(last.length + len(ids))
        elif ids:
            self.segments.append(Text(len(ids)))

    def medium(self, segment: Segment, placeholder: int, vectors: Tensor) -> None:
        """Tokens of an encoder."""
        self.ids += [placeholder] * len(vectors)
        self.learnt += [False] * len(vectors)
        self.media.append(vectors)
        self.segments.append(segment)


class Conversations:
    """Conversations of `talk` as the Thinker reads them."""

    def __init__(self, model: OmniModel, bank: Bank, english: Sequence[str] = ()) -> None:
        """english: free sentences that are repeated and written down."""
        assert model.processor is not None
        self.model, self.processor, self.bank, self.english = model, model.processor, bank, english
        c = model.config
        self.table, self.rule = model.thinker.embed_tokens.weight.detach(), c.thinker.position_rule
        self.encode, self.thinker = model.processor.encode_text, c.thinker
        self.newline = self.encode("\n")
        self.heads = {
            role: [c.im_start_token_id, token, *self.newline]
            for role, token in (
                ("user", c.user_token_id), ("assistant", c.assistant_token_id), ("system", c.system_token_id),
            )
        }  # fmt: skip
        self.end = [c.im_end_token_id, *self.newline]
        self.words = torch.stack([self.table[self.encode(w if place == 0 else f" {w}")[0]] for place, w in
                                  enumerate(WORDS)])  # fmt: skip
        self.size = float(self.table.square().mean().sqrt())
        self.show = Show()

    def draw(self, rng: random.Random) -> Told:
        """Any conversation."""
        drawn = talk.conversation(rng, sentences=self.english)
        return self.told(drawn.turns, rng, rng.choices(list(MODES), list(MODES.values()))[0])

    def told(self, turns: Sequence[talk.Turn], rng: random.Random, mode: str) -> Told:
        """These turns, typed, spoken, or some of them each."""
        laid = _Laid()
        if rng.random() < _INSTRUCTED:
            laid.text([*self.heads["system"], *self.encode(rng.choice(_SYSTEM)), *self.end])
        for turn in turns:
            laid.text(self.heads["user"])
            answer = self._asked(laid, turn, rng, mode == SPOKEN or (mode == BOTH and rng.random() < 0.5))
            laid.text([*self.end, *self.heads["assistant"]])
            laid.text([*self.encode(answer), self.end[0]], learnt=True)
            laid.text(self.newline)
        ids = torch.tensor(laid.ids[: -len(self.newline)])
        learnt = torch.tensor(laid.learnt[: len(ids)])
        embeds = self.table[ids]
        if laid.media:
            pads = [self.thinker.audio_token_id, self.thinker.image_token_id, self.thinker.video_token_id]
            embeds[torch.isin(ids, torch.tensor(pads))] = torch.cat(laid.media)
        labels = ids.masked_fill(~learnt, IGNORED)
        positions = prompt_positions(laid.segments, self.rule)[0][:, : len(ids)]
        return Told(embeds, positions, torch.cat((labels[1:], labels.new_full((1,), IGNORED))))

    def _asked(self, laid: _Laid, turn: talk.Turn, rng: random.Random, aloud: bool) -> str:
        """Lay out a user's turn; returns the answer to it."""
        answer, behind = turn.answer, rng.random() < _BEHIND
        if turn.sound is not None and turn.sound.said is not None and rng.random() < _WRITTEN_DOWN:
            answer, heard = self.bank.any_clip(rng)
            said: Tensor | None = heard
        elif turn.sound is not None:
            said = self.bank.nothing(rng) if turn.sound.said is None else self._said(turn.sound.said, rng)
        else:
            said = None
        media = [lambda: self._sound(laid, said)] if said is not None else []
        if turn.picture is not None and turn.media == "picture":
            media.append(lambda: self._picture(laid, turn.picture, rng))
        if turn.clip is not None and turn.media == "clip":
            media.append(lambda: self._clip(laid, turn.clip, rng))
        for medium in () if behind else media:
            medium()
        if turn.question and not turn.sound_asks:
            if aloud and turn.sound is None:
                self._sound(laid, self._said(talk.spoken(turn, rng), rng))
            else:
                laid.text(self.encode(talk.written(turn, rng)))
        for medium in media if behind else ():
            medium()
        return answer

    def _said(self, text: str, rng: random.Random) -> Tensor:
        return self.bank.said(text, self.encode(f" {text}"), rng)

    def _sound(self, laid: _Laid, said: Tensor | None) -> None:
        assert said is not None
        laid.text([self.thinker.audio_start_token_id])
        laid.medium(Audio(len(said)), self.thinker.audio_token_id, said)
        laid.text([self.processor.audio_end_id])

    def _picture(self, laid: _Laid, picture: Any, rng: random.Random) -> None:
        drawn = from_talk(picture)
        wanted, (rows, columns) = told(drawn)
        seen = self._named(wanted, rng)
        if rng.random() < _DRAWN:
            shown = self.show.picture(drawn)
            _, height, width = shown.grid
            with torch.no_grad():
                seen = self.model.encode_vision(shown.patches, torch.tensor([shown.grid])).embeds
            rows, columns = height // 2, width // 2
        laid.text([self.thinker.vision_start_token_id])
        laid.medium(Image(rows, columns), self.thinker.image_token_id, seen)
        laid.text([self.processor.vision_end_id])

    def _clip(self, laid: _Laid, clip: Any, rng: random.Random) -> None:
        drawn, t = clip_from_talk(clip), self.thinker
        said = None if clip.said is None else self._said(clip.said, rng)
        seconds = rng.uniform(*_CLIP_S) if said is None else max(_CLIP_S[0], len(said) / _TOKENS_PER_S)
        count = max(1, int(2 * seconds)) // 2
        times = tuple(step * seconds / count for step in range(count))
        seen = self._named(told_clip(drawn, times, seconds), rng)
        side = int((len(seen) // count) ** 0.5)
        video = Video(times, side, side)
        if said is None:
            laid.text([t.vision_start_token_id])
            laid.medium(video, t.video_token_id, seen)
            laid.text([self.processor.vision_end_id])
            return
        laid.text([t.vision_start_token_id, t.audio_start_token_id])
        both = AudioVideo(video, Audio(len(said)))
        order = torch.tensor(interleave(both, self.rule))
        vectors = torch.empty(len(order), seen.shape[1])
        vectors[order], vectors[~order] = seen, said
        first = len(laid.ids)
        laid.medium(both, t.video_token_id, vectors)
        for place in (~order).nonzero().flatten().tolist():
            laid.ids[first + place] = t.audio_token_id
        laid.text([self.processor.audio_end_id, self.processor.vision_end_id])

    def _named(self, wanted: Tensor, rng: random.Random) -> Tensor:
        """Weights of words as the vision encoder would say them [n, D], not quite right."""
        noise = torch.randn(
            len(wanted), self.table.shape[1], generator=torch.Generator().manual_seed(rng.getrandbits(32))
        )
        return wanted @ self.words + noise * self.size * rng.choice(_NOISES)


def batch(source: Conversations, rng: random.Random, tokens: int) -> list[Told]:
    """Conversations of about so many tokens; sorted, so that neighbours of one length are read together."""
    told: list[Told] = []
    while sum(len(one.labels) for one in told) < tokens:
        told.append(source.draw(rng))
    return sorted(told, key=lambda one: len(one.labels))


def losses(thinker: nn.Module, told: list[Told]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and the routers' balance, of conversations in one packed row."""
    blocks = PackedBlocks([len(one.labels) for one in told], told[0].embeds.device, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = thinker(
            torch.cat([one.embeds for one in told])[None],
            torch.cat([one.positions for one in told], dim=1)[:, None],
            blocks=blocks,
            logits="none",
            with_router_logits=True,
        )
    labels = torch.cat([one.labels for one in told])
    text = linear_cross_entropy(out.final[0].float(), thinker.lm_head.weight, labels)
    balance = router_balance(out.router_logits, thinker.config.text_config.num_experts_per_tok)
    return text.total / text.count, balance.total / balance.count


def train(model: OmniModel, bank: Path, folder: Path, steps: int, tokens: int = _TOKENS) -> float:
    """Train a model's Thinker and write `folder/model`, see `take_steps`. Returns the last loss that was logged."""
    thinker = model.thinker
    thinker.embed_tokens.requires_grad_(False)
    source = Conversations(model, Bank(bank, thinker.embed_tokens.weight.detach()), _plain_sentences())
    weight = model.config.thinker.text_config.router_aux_loss_coef

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, balance = losses(thinker, batch(source, random.Random(f"converse {step}"), tokens))
        return loss + weight * balance, {"text": loss}

    learning = Learning(_LEARNING_RATE, _WARMUP, _LEAST_RATE, logged=_LOGGED, saved=_SAVED)
    mean = take_steps(thinker, loss_of, folder, steps, learning)
    model.save_pretrained(folder / "model")
    return mean.get("text", 0.0)


def _plain_sentences() -> list[str]:
    """English sentences, words only."""
    found = []
    for text in sentences():
        try:
            found.append(talk.chat.plain(text))
        except ValueError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("bank", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=30_000)
    args = parser.parse_args()
    model = OmniModel.from_pretrained(args.model, parts=["thinker"], dtype="float32", device="cpu")
    print(f"loss: {train(model, args.bank, args.folder, args.steps):.4f}")


if __name__ == "__main__":
    main()
