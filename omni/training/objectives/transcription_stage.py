"""Pre-training of the audio encoder on speech and its text (Qwen3-Omni, section 2.2): module, data, objective, WER.

The encoder is the model's own part, so training here trains it there, and it is saved with the model; the head is
thrown away. The text of a clip becomes labels of characters, or of the model's tokenizer.

Shapes: C clips of M mel bins and at most F frames, V labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from omni.config.keywords import nearest
from omni.encoders.contract import EncoderOutput, chosen_cuts
from omni.encoders.mel import LogMel
from omni.metrics.scores import character_error_rate, word_error_rate
from omni.metrics.text_normaliser import normalise
from omni.processing.audio_file import join_clips
from omni.processing.processor import OmniProcessor
from omni.training.data.augmentation import PLAIN, SpeechAugmentation
from omni.training.data.conversation_samples import SkipRow
from omni.training.data.hearing import AS_RELEASED, HearingDraws
from omni.training.data.mixture import Draw, Mixture
from omni.training.data.recordings import HEARD, DrawnBatches, sounds_of
from omni.training.data.sound import read_speech
from omni.training.objectives.losses import Loss
from omni.training.objectives.transcription import (
    AttentionDecoder,
    CTCHead,
    EmbeddingHead,
    SpellingHead,
    attention_loss,
    attention_transcribe,
    ctc_length,
    ctc_loss,
    ctc_transcribe,
    spelling_loss,
)

HEADS = ("ctc", "attention", "embeddings")
ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"  # all that `normalise` leaves of English


class Labels(Protocol):
    """Text as labels 0 .. size - 1 and back."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, labels: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class CharacterLabels:
    """A label for each character of `alphabet`; a checkpoint of the head goes with one alphabet in one order."""

    alphabet: str = ENGLISH

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharacterLabels:
        """The characters of these texts, sorted. Raises ValueError where there is none."""
        alphabet = "".join(sorted({character for text in texts for character in text}))
        if not alphabet:
            raise ValueError("the texts hold no character, so there is nothing to transcribe")
        return cls(alphabet)

    @property
    def size(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a character that has no label."""
        places = {character: label for label, character in enumerate(self.alphabet)}
        for character in text:
            if character not in places:
                raise ValueError(
                    f"character {character!r} of the text {text[:60]!r} is not in the alphabet {self.alphabet!r}; "
                    "normalise the text, or make the labels with CharacterLabels.of all texts"
                )
        return [places[character] for character in text]

    def decode(self, labels: Sequence[int]) -> str:
        return "".join(self.alphabet[label] for label in labels)


@dataclass(frozen=True)
class TokenLabels:
    """The ids of the model's tokenizer as labels."""

    processor: OmniProcessor

    @property
    def size(self) -> int:
        return len(self.processor.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode_text(text)

    def decode(self, labels: Sequence[int]) -> str:
        return self.processor.decode(list(labels))


@dataclass(frozen=True)
class Clip:
    """Mel features [M, F] of one clip, its text and the text's labels; number: of its draw, from 1."""

    features: Tensor
    text: str
    labels: list[int]
    name: str = ""
    number: int = 0


@dataclass(frozen=True)
class ClipBatch:
    """Clips side by side: features [C, M, F], lengths in frames, and the text and labels of each; in which chunks and
    attention window they are heard, in seconds (None: the checkpoint's)."""

    features: Tensor
    lengths: list[int]
    labels: list[list[int]]
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    audio_chunk_s: float | None = None
    audio_window_s: float | None = None

    @property
    def tokens(self) -> int:
        """Mel frames of all clips, padding left out."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> ClipBatch:
        """The same with its features on a device."""
        return replace(self, features=self.features.to(device))


def join(clips: Sequence[Clip], hearing: HearingDraws = AS_RELEASED, *, draws: bool = True) -> ClipBatch:
    """Clips as a batch. What `hearing` draws follows from the number of its last draw; draws: False takes number 0."""
    features, mask = join_clips([clip.features for clip in clips])
    return ClipBatch(
        features, mask.sum(1).tolist(), [c.labels for c in clips], [c.text for c in clips], [c.name for c in clips],
        **hearing.of(max(clip.number for clip in clips) if draws else 0),
    )  # fmt: skip


class Transcriber(nn.Module):
    """An audio encoder (`OmniModel.audio_encoder`, or one of the same contract) and a new head for V labels."""

    audio_encoder: Any

    def __init__(
        self,
        audio_encoder: nn.Module,
        num_labels: int,
        head: Literal["ctc", "attention", "embeddings"] = "ctc",
        *,
        spelling: int = 0,
        **options: Any,
    ) -> None:
        """options: those of `AttentionDecoder` (dim, layers, heads) or of `EmbeddingHead` (embeddings, blank, scale).
        spelling: so many letters a token, of `ENGLISH`, are read by a head beside it; 0 for none. Raises ValueError for
        another head."""
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; {nearest(str(head), HEADS)}")
        if head == "ctc" and options:
            raise ValueError(f"a CTC head has no options, got {', '.join(options)}; use head = 'attention' for them")
        self.audio_encoder = audio_encoder
        width: int = self.audio_encoder.config.output_dim
        like = next(audio_encoder.parameters())
        made: nn.Module
        if head == "embeddings":
            made = EmbeddingHead(**options)
        else:
            made = CTCHead(width, num_labels) if head == "ctc" else AttentionDecoder(width, num_labels, **options)
        kind = torch.promote_types(like.dtype, torch.float32)
        self.head = made.to(like.device, kind)
        self.spelling = SpellingHead(width, len(ENGLISH), spelling).to(like.device, kind) if spelling else None

    def forward(
        self,
        features: Tensor,
        lengths: Sequence[int],
        audio_chunk_s: float | None = None,
        audio_window_s: float | None = None,
    ) -> EncoderOutput:
        """features [C, M, F], lengths in frames, chunk and attention window (None: the encoder's own) -> what the head
        reads. Raises ValueError for a chunk or a window that the encoder cannot have."""
        cuts = chosen_cuts(self.audio_encoder, audio_chunk_s, audio_window_s)
        output = self.audio_encoder(features, lengths, **cuts)
        return output._replace(embeds=output.embeds.to(next(self.head.parameters()).dtype))

    def shortest(self, labels: Sequence[int]) -> int:
        """Tokens of audio that a text needs at least."""
        return ctc_length(labels) if isinstance(self.head, CTCHead) else 1

    @torch.no_grad()
    def transcribe(
        self,
        features: Tensor,
        lengths: Sequence[int],
        max_length: int = 256,
        audio_chunk_s: float | None = None,
        audio_window_s: float | None = None,
    ) -> list[list[int]]:
        """The labels of each clip, the likeliest at each place; max_length: of the attention decoder; chunk and window
        as in `forward`."""
        output = self(features, lengths, audio_chunk_s, audio_window_s)
        if isinstance(self.head, CTCHead):
            return ctc_transcribe(self.head, output)
        return attention_transcribe(self.head, output, max_length)


class ClipMaker:
    """Makes a clip of a row: its one recording and its text.

    The recording is the row's one of `audio` or `audios`, or, where there is none, `speech`; the text is that under
    `text`, else the last assistant message; an empty one says that there is nothing to hear, of which the encoder is to
    make blanks. language: texts are normalised for it first (None: taken as they are).
    max_s: longer recordings are left out. transcriber: texts that a clip is too short for are left out as well.
    augmentation: what happens to a recording before it is heard. hearing: the chunks in which it may be heard.
    """

    def __init__(
        self,
        labels: Labels,
        transcriber: Transcriber,
        *,
        language: str | None = "en",
        max_s: float = 30.0,
        mel: LogMel | None = None,
        augmentation: SpeechAugmentation = PLAIN,
        hearing: HearingDraws = AS_RELEASED,
    ) -> None:
        self.augmentation, self.hearing = augmentation, hearing
        self.labels, self.transcriber, self.language, self.max_s = labels, transcriber, language, max_s
        self.mel = mel or LogMel(num_mels=transcriber.audio_encoder.config.num_mel_bins)

    def __call__(self, draw: Draw, number: int = 0) -> Clip:
        """Raises SkipRow for a row to be left out; ValueError, TypeError or OSError for a bad one."""
        sounds = sounds_of(draw, HEARD) or sounds_of(draw, ("speech",))
        if len(sounds) != 1:
            raise ValueError(f"a row to transcribe has one recording, this one has {len(sounds)}; split it, or add one")
        written = text_of(draw.manifest.heard(draw.row))
        text = written if self.language is None else normalise(written, self.language)
        if written and not text.strip():
            raise SkipRow("nothing of its text can be said")
        labels = self.labels.encode(text)
        samples = read_speech(sounds[0], self.mel.sample_rate)
        samples = self.augmentation.sound(samples, self.mel.sample_rate, number)
        if len(samples) > self.max_s * self.mel.sample_rate:
            raise SkipRow(f"more than {self.max_s} s")
        features = self.augmentation.features(self.mel(samples), number)
        tokens = self.hearing.fewest_tokens(self.transcriber.audio_encoder, features.shape[1])
        if self.transcriber.shortest(labels) > tokens:
            raise SkipRow(
                f"its text needs {self.transcriber.shortest(labels)} tokens of audio, it has {tokens}",
                "its text needs more tokens of audio than it has",
            )
        return Clip(features, text, labels, draw.name, number)


def text_of(row: Mapping[str, Any]) -> str:
    """What is said in a row's recording. Raises ValueError where no text is to be found."""
    if isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(item.get("text", "")) for item in content if isinstance(item, Mapping))
        if isinstance(content, str):
            return content
    raise ValueError("the row has no text: it needs a key 'text', or an assistant message")


def clip_batches(
    mixture: Mixture,
    labels: Labels,
    transcriber: Transcriber,
    *,
    language: str | None = "en",
    max_s: float = 30.0,
    batch_size: int = 16,
    skip_limit: int = 100,
    workers: int = 0,
    augmentation: SpeechAugmentation = PLAIN,
    hearing: HearingDraws = AS_RELEASED,
    draws: bool = True,
) -> DrawnBatches[Clip, ClipBatch]:
    """Endless batches of a mixture's clips, see `ClipMaker`, `join` and `DrawnBatches`.

    The release's encoder learnt from 80 % pseudo-labelled Chinese and English speech, 10 % speech in other languages
    and 10 % audio understanding: a mixture of three manifests with weights 8, 1 and 1.
    """
    make: Callable[[Draw, int], Clip] = ClipMaker(
        labels, transcriber, language=language, max_s=max_s, augmentation=augmentation, hearing=hearing
    )
    joined = partial(join, hearing=hearing, draws=draws)
    return DrawnBatches(mixture, make, joined, batch_size=batch_size, skip_limit=skip_limit, workers=workers)


def spelled(text: str) -> list[int]:
    """The letters of a text in `ENGLISH`, as labels; other characters are left out."""
    return [ENGLISH.index(letter) for letter in text.lower() if letter in ENGLISH]


class TranscriptionObjective:
    """Trains the parameters of a `Transcriber` that require gradients.

    Its losses: "ctc" over clips, or "attention" over labels and ends, and "spelling" over clips where it has such a
    head. given: other weights than 1. Raises ValueError for a weight of a loss that it has not.
    """

    def __init__(self, transcriber: Transcriber, given: Mapping[str, float] | None = None) -> None:
        self.name = "ctc" if isinstance(transcriber.head, CTCHead) else "attention"
        known = {self.name: 1.0} if transcriber.spelling is None else {self.name: 1.0, "spelling": 1.0}
        for name in given or {}:
            if name not in known:
                raise ValueError(f"[loss] has {name!r}, but this objective's losses are {', '.join(map(repr, known))}")
        self.weights = {**known, **(given or {})}
        self.device = next(transcriber.parameters()).device

    def prepare(self, model: Transcriber, batch: ClipBatch) -> ClipBatch:
        """The batch on the model's device."""
        return batch.to(self.device)

    def counts(self, batch: ClipBatch) -> dict[str, float]:
        """Clips, or labels and ends."""
        clips = len(batch.labels)
        counts = {"ctc": clips, "attention": clips + sum(map(len, batch.labels)), "spelling": clips}
        return {name: float(counts[name]) for name in self.weights}

    def losses(self, model: Any, batch: ClipBatch) -> dict[str, Loss]:
        """The head's loss, gradients attached."""
        output = model(batch.features, batch.lengths, batch.audio_chunk_s, batch.audio_window_s)
        loss = ctc_loss if self.name == "ctc" else attention_loss
        losses = {self.name: loss(model.head, output, batch.labels)}
        if model.spelling is not None:
            losses["spelling"] = spelling_loss(model.spelling, output, [spelled(text) for text in batch.texts])
        return losses


@torch.no_grad()
def evaluate_transcriber(
    transcriber: Transcriber, batches: Sequence[ClipBatch], labels: Labels, *, language: str | None = "en"
) -> dict[str, float]:
    """ "wer" and "cer" of greedy transcriptions against the clips' texts."""
    device = next(transcriber.parameters()).device
    texts, written = [], []
    for batch in batches:
        found = transcriber.transcribe(
            batch.features.to(device),
            batch.lengths,
            audio_chunk_s=batch.audio_chunk_s,
            audio_window_s=batch.audio_window_s,
        )
        written += [labels.decode(row) for row in found]
        texts += batch.texts
    return {
        "wer": word_error_rate(texts, written, language),
        "cer": character_error_rate(texts, written, language),
    }
