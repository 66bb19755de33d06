"""How far a changed model (rounded weights, another dtype or backend) is from its reference, word by word and code by
code: both read the same prompts, replies and codes, so that one early difference does not hide all that follow.

Shapes: T reply tokens, n frames, K codebooks, V text vocabulary, C codec vocabulary, Dt Thinker width, Di width of the
Talker's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from omni.generation.arguments import PerRow, per_row, speaker_id, stop_ids
from omni.generation.generate import reply_beginning
from omni.generation.prompt import Prompt, encode_prompt
from omni.generation.reply import ANSWER
from omni.processing.inputs import OmniInputs
from omni.talker.layout import turn_layout

if TYPE_CHECKING:
    from omni.model import OmniModel


class Speech(NamedTuple):
    """The spoken side of a turn: codes int64 [K, n]; the ids that are spoken, and which of the reply's tokens those are
    that the model wrote; the assistant's header, the speaker."""

    codes: Tensor
    spoken: list[int]
    written: list[int]
    header: list[int]
    speaker: int


class TeacherForced(NamedTuple):
    """Logits of a model that reads a given turn: text [T, V], codes one [n, C] a codebook (none without speech)."""

    text: Tensor
    codes: list[Tensor]


@dataclass(frozen=True)
class Agreement:
    """Means over all positions. KL is the divergence of the model's next-token distribution from the reference's, in
    nats; agreement the share of positions where both find the same id likeliest. Codes: one value a codebook.
    """

    tokens: int
    frames: int
    text_kl: float
    text_agreement: float
    code_kl: tuple[float, ...]
    code_agreement: tuple[float, ...]

    def table(self) -> str:
        """One line for the text and one a codebook, in Markdown."""
        rows = [("text", self.tokens, self.text_kl, self.text_agreement)]
        rows += [
            (f"codebook {k}", self.frames, kl, share)
            for k, (kl, share) in enumerate(zip(self.code_kl, self.code_agreement))
        ]
        lines = ["| | positions | KL, nats | same choice |", "|---|---|---|---|"]
        return "\n".join([*lines, *(f"| {a} | {n} | {kl:.5f} | {share:.1%} |" for a, n, kl, share in rows)])


@torch.no_grad()
def agreement(
    model: OmniModel,
    reference: OmniModel,
    inputs: OmniInputs,
    *,
    max_new_tokens: int = 64,
    max_frames: int = 64,
    speaker: PerRow = None,
    return_audio: bool | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare two models of one config on replies that `reference` gives to `inputs`, the release's way of sampling.

    Deterministic for a seed. Each model's Talker is conditioned on its own Thinker, and its residual codes follow its
    own Talker, so that errors add up as they do in use. Raises ValueError as `OmniModel.generate`.
    """
    out = reference.generate(
        inputs,
        max_new_tokens=max_new_tokens,
        max_frames=max_frames,
        speaker=speaker,
        return_audio=return_audio,
        seed=seed,
    )
    speakers = per_row(speaker, len(out.replies), "speaker")
    sides = [(side, encode_prompt(side, inputs)) for side in (model, reference)]
    totals: dict[str, list[Tensor]] = {}
    for row, reply in enumerate(out.replies):
        speech = None
        if out.codes is not None and out.codes[row].shape[1]:
            speech = _speech(reference, sides[1][1].row_ids(row), reply, out.codes[row], speakers[row])
        own, true = (teacher_forced(side, prompt, row, reply, speech) for side, prompt in sides)
        totals.setdefault("text", []).append(_compare(own.text, true.text))
        for codebook, logits in enumerate(zip(own.codes, true.codes)):
            totals.setdefault(str(codebook), []).append(_compare(*logits))
    means = {name: torch.cat(parts).mean(0).tolist() for name, parts in totals.items()}
    codebooks = [means[name] for name in sorted(means.keys() - {"text"}, key=int)]
    return Agreement(
        tokens=sum(len(part) for part in totals["text"]),
        frames=sum(len(part) for part in totals.get("0", [])),
        text_kl=means["text"][0],
        text_agreement=means["text"][1],
        code_kl=tuple(kl for kl, _ in codebooks),
        code_agreement=tuple(share for _, share in codebooks),
    )


def _speech(model: OmniModel, ids: list[int], reply: list[int], codes: Tensor, speaker: str | None) -> Speech:
    """What was spoken in a turn, from the ids of its prompt and reply."""
    beginning, stops = reply_beginning(model, ids, speaks=True), stop_ids(model)
    written = [i for i, token in enumerate(reply) if token not in stops and beginning.reader.feed(token) == ANSWER]
    spoken = [reply[i] for i in written]
    return Speech(codes, spoken, written, beginning.header, speaker_id(model, speaker))


@torch.no_grad()
def teacher_forced(
    model: OmniModel, prompt: Prompt, row: int, reply: list[int], speech: Speech | None
) -> TeacherForced:
    """Logits of the turn in one row: those that chose each of the reply's ids and each of the codes."""
    device, length, thinker = model.device, prompt.lengths[row], model.require("thinker")
    written = thinker.embed_tokens(torch.tensor(reply, device=device))
    embeds = torch.cat((prompt.embeds[row, :length], written))
    following = prompt.next_position[row] + torch.arange(len(reply), device=device)
    positions = torch.cat((prompt.positions[:, row, :length], following.expand(3, -1)), dim=1)
    taps = None if prompt.taps is None else prompt.taps[:, row, :length]
    if taps is not None:
        taps = torch.cat((taps, taps.new_zeros(len(taps), len(reply), taps.shape[2])), dim=1)[:, None]
    out = thinker(embeds[None], positions[:, None], taps=taps)
    text = out.logits[0, length - 1 : -1]
    if speech is None:
        return TeacherForced(text, [])
    codes = speech.codes.to(device).T  # [n, K]
    x, positions = _talker_inputs(model, prompt, row, out.hidden[0], written, speech)
    talker = model.require("talker")
    read = talker(x[None], positions[:, None])
    hidden, logits = read.hidden[0, -len(codes) :], [read.logits[0, -len(codes) :]]
    if codes.shape[1] > 1:
        logits += talker.mtp(hidden, talker.codec_embedding(codes[:, 0]), codes[:, 1:]).unbind(1)
    return TeacherForced(text, logits)


def _talker_inputs(
    model: OmniModel, prompt: Prompt, row: int, hidden: Tensor, written: Tensor, speech: Speech
) -> tuple[Tensor, Tensor]:
    """The Talker's prompt and all frames but the last: vectors [m, Di] and positions fp32 [3, m].

    hidden [prompt + T, Dt] of the whole turn, written [T, Dt]: embeddings of the reply.
    """
    talker, layout, codes = model.require("talker"), turn_layout(model.config), speech.codes.to(model.device).T
    ids, segments, device = prompt.row_ids(row), prompt.segments[row], codes.device
    turn = layout.lay_out(ids, segments, speech.header, speech.speaker, len(speech.spoken), len(codes) - 1)

    def embed(ids: list[int]) -> Tensor:
        vectors: Tensor = talker.text_vectors(model.require("thinker").embed_tokens(torch.tensor(ids, device=device)))
        return vectors

    if layout.text_by_hidden:
        at = torch.tensor(speech.written, device=device)
        spoken = talker.text_vectors(written[at], hidden[prompt.lengths[row] + at])
    else:
        spoken = embed(speech.spoken)
    text = torch.cat((embed(turn.opening), spoken, embed(turn.closing)))
    control = talker.codec_embedding(torch.tensor(turn.prefix_codes, device=device))
    prefix = talker.prefix_vectors(text[list(layout.prefix_texts)], control)
    frames = talker.embed_frames(codes[:-1]) + text[turn.following.to(device)]
    at = turn.tokens.to(device)
    conditioning = talker.prompt_vectors(prompt.embeds[row, at], hidden[at], prompt.media[row, at])
    return torch.cat((conditioning, prefix, frames)), turn.positions.to(device)


def _compare(own: Tensor, true: Tensor) -> Tensor:
    """(KL, same choice) of each position: logits [n, V] and [n, V] -> fp64 [n, 2]."""
    true = true.to(own.device)
    p, q = true.double().log_softmax(-1), own.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack((kl, (own.argmax(-1) == true.argmax(-1)).double()), dim=-1)
