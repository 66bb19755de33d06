"""Heads that let the audio encoder be trained alone, on speech and its text (Qwen3-Omni, section 2.2).

`CTCHead` reads each token by itself (Graves et al., 2006); `AttentionDecoder` writes the text from all of them, as the
encoder of the release was trained. `EmbeddingHead` is a CTC head that compares with given embeddings, the Thinker's:
the encoder then learns to say a word as the Thinker reads it. `SpellingHead` stands beside a head of longer labels and
reads letters, which are found sooner (Sanabria and Metze, 2018). All stand behind the encoder's whole forward pass, its
projections included, so that every parameter of it learns. They are thrown away afterwards; the encoder is kept.

Shapes: C clips, N tokens of all clips (packed), n tokens of the longest, D encoder output width, L labels of the
longest text, V labels; W decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from omni.encoders.audio import sinusoids
from omni.encoders.contract import EncoderOutput
from omni.training.data.samples import IGNORED
from omni.training.objectives.losses import Loss

_STD = 0.02  # of all matrices, the encoder's own initializer_range


class CTCHead(nn.Module):
    """Logits of V labels and, last, the blank, for each token of the encoder. [N, D] -> [N, V + 1]."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.blank = vocab
        self.proj = nn.Linear(width, vocab + 1)
        _initialise(self)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(embeds)


class EmbeddingHead(CTCHead):
    """A CTC head whose logits are cosines with fixed embeddings, times a learnt scale, plus a learnt prior a label.
    [N, D] -> [N, V + 1].

    embeddings [V, D], one a label; blank: the label whose embedding stands for no label instead. Cosines are largest
    for tokens that point where an embedding points, so the encoder's output becomes the embedding's direction; the
    smaller `scale` is, the closer it has to come.
    """

    def __init__(self, embeddings: Tensor, blank: int, scale: float = 12.0) -> None:
        """Raises ValueError for a blank that is no label."""
        nn.Module.__init__(self)
        if not 0 <= blank < len(embeddings):
            raise ValueError(f"blank {blank} is none of the {len(embeddings)} labels")
        self.blank = len(embeddings)
        directions = F.normalize(torch.cat((embeddings, embeddings[blank : blank + 1])).detach().float(), dim=1)
        directions[blank] = 0  # a label of its own no more
        self.register_buffer("directions", directions)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.prior = nn.Parameter(torch.zeros(len(directions)))

    directions: Tensor

    def forward(self, embeds: Tensor) -> Tensor:
        return self.scale * (F.normalize(embeds, dim=1) @ self.directions.t()) + self.prior


class SpellingHead(nn.Module):
    """Logits of A characters and, last, the blank, `slots` times for each token: characters come faster than tokens.
    [N, D] -> [N * slots, A + 1]."""

    def __init__(self, width: int, alphabet: int, slots: int = 3) -> None:
        super().__init__()
        self.blank, self.slots = alphabet, slots
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, slots * (alphabet + 1))
        _initialise(self)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(self.norm(embeds)).view(-1, self.blank + 1)


class AttentionDecoder(nn.Module):
    """A transformer that writes a clip's labels one after the other, looking at all of the clip's tokens.

    Layers are pre-norm. Label V both starts and ends a text.
    """

    def __init__(self, width: int, vocab: int, dim: int = 256, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"decoder width {dim} must be a multiple of twice its {heads} heads")
        self.end = vocab
        self.embedding = nn.Embedding(vocab + 1, dim)
        self.memory_proj = nn.Linear(width, dim)
        layer = nn.TransformerDecoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(dim))
        self.head = nn.Linear(dim, vocab + 1)
        _initialise(self)

    def memory(self, output: EncoderOutput) -> tuple[Tensor, Tensor]:
        """The encoder's tokens by clip: memory [C, n, W], and padding bool [C, n], True where there is no token."""
        clips = self.memory_proj(output.embeds).split(output.lengths)
        padded = pad_sequence(list(clips), batch_first=True)
        lengths = torch.tensor(output.lengths, device=padded.device)
        return padded, torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]

    def forward(self, labels: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """labels int64 [C, L], each text behind its start; memory and padding of `memory` -> logits [C, L, V + 1].

        Entry i predicts the label that follows label i; it sees no later one.
        """
        x = self.embedding(labels)
        x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.layers(x, memory, tgt_mask=later, memory_key_padding_mask=padding))


def ctc_length(labels: Sequence[int]) -> int:
    """Tokens that a text needs at least: one a label, and a blank between two equal neighbours."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


def ctc_loss(head: CTCHead, output: EncoderOutput, targets: Sequence[Sequence[int]]) -> Loss:
    """Negative log-probability of each clip's labels, summed over all alignments (Graves et al., 2006); counts clips.

    targets: labels in 0 .. V - 1, one list a clip of `output`. Computed in fp32 at least. Raises ValueError for labels
    that do not fit the head, and for a text longer than its clip (see `ctc_length`), which has no alignment.
    """
    _check(targets, output, head.blank)
    for clip, (labels, tokens) in enumerate(zip(targets, output.lengths)):
        if ctc_length(labels) > tokens:
            raise ValueError(
                f"the text of clip {clip} needs {ctc_length(labels)} tokens of audio, but the clip has {tokens}; leave "
                "such clips out (ctc_length tells), or use longer labels"
            )
    return _alignments(head(output.embeds), output.lengths, targets, head.blank)


def spelling_loss(head: SpellingHead, output: EncoderOutput, spelled: Sequence[Sequence[int]]) -> Loss:
    """As `ctc_loss`, of characters 0 .. A - 1; a clip too short for its characters counts nothing. Counts clips."""
    _check(spelled, output, head.blank)
    return _alignments(head(output.embeds), [n * head.slots for n in output.lengths], spelled, head.blank, lenient=True)


def _alignments(
    logits: Tensor, counts: Sequence[int], targets: Sequence[Sequence[int]], blank: int, *, lenient: bool = False
) -> Loss:
    """CTC of packed logits, `counts` of each clip; lenient: what has no alignment counts nothing."""
    logits, lengths = _wide(logits), torch.tensor(counts)
    places = torch.arange(int(lengths.max()))[:, None] + (lengths.cumsum(0) - lengths)  # [n, C], of each clip's tokens
    scores = logits.log_softmax(-1)[places.clamp(max=len(logits) - 1)]  # behind a clip's end nothing is read
    flat = torch.tensor([label for text in targets for label in text], dtype=torch.long, device=logits.device)
    total = F.ctc_loss(
        scores, flat, lengths, torch.tensor([len(text) for text in targets]), blank=blank, reduction="sum",
        zero_infinity=lenient,
    )  # fmt: skip
    return Loss(total, torch.tensor(float(len(targets)), device=logits.device))


def attention_loss(decoder: AttentionDecoder, output: EncoderOutput, targets: Sequence[Sequence[int]]) -> Loss:
    """Teacher-forced cross-entropy of each clip's labels and its end; counts labels, ends included.

    targets: labels in 0 .. V - 1, one list a clip of `output`. Computed in fp32 at least. ValueError for labels that do
    not fit the decoder.
    """
    _check(targets, output, decoder.end)
    device = output.embeds.device
    rows = [torch.tensor([*text, decoder.end], dtype=torch.long, device=device) for text in targets]
    expected = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    shifted = F.pad(expected[:, :-1], (1, 0), value=decoder.end)
    logits = _wide(decoder(shifted.where(shifted != IGNORED, decoder.end), *decoder.memory(output)))
    total = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, torch.tensor(float(sum(len(row) for row in rows)), device=device))


@torch.no_grad()
def ctc_transcribe(head: CTCHead, output: EncoderOutput) -> list[list[int]]:
    """The labels of each clip: the likeliest of every token, repetitions merged, blanks dropped."""
    texts = []
    for best in head(output.embeds).argmax(-1).split(output.lengths):
        merged = best.unique_consecutive().tolist()
        texts.append([label for label in merged if label != head.blank])
    return texts


@torch.no_grad()
def attention_transcribe(decoder: AttentionDecoder, output: EncoderOutput, max_length: int = 256) -> list[list[int]]:
    """The labels of each clip, the likeliest next one at a time, `max_length` at most."""
    memory, padding = decoder.memory(output)
    labels = torch.full((len(output.lengths), 1), decoder.end, device=memory.device)
    for _ in range(max_length):
        following = decoder(labels, memory, padding)[:, -1].argmax(-1)
        labels = torch.cat((labels, following[:, None]), dim=1)
        if (labels[:, 1:] == decoder.end).any(1).all():
            break
    rows = labels[:, 1:].tolist()
    return [row[: row.index(decoder.end)] if decoder.end in row else row for row in rows]


def _initialise(module: nn.Module) -> None:
    """Matrices are normal, biases zero; norms keep their ones and zeros."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(targets: Sequence[Sequence[int]], output: EncoderOutput, vocab: int) -> None:
    if len(targets) != len(output.lengths) or not targets:
        raise ValueError(f"{len(output.lengths)} clips need as many texts, and at least one; got {len(targets)}")
    for clip, labels in enumerate(targets):
        for label in labels:
            if not 0 <= label < vocab:
                raise ValueError(f"label {label} of clip {clip} lies outside 0 .. {vocab - 1}")
