"""From a manifest's row to what training reads: the processor's inputs, labels on what the assistant wrote, codes.

Shapes: T tokens of a conversation, K codebooks, n frames of one answer's speech.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.config.keywords import nearest
from omni.config.model import OmniConfig
from omni.config.qwen3_omni import TalkerConfig
from omni.generation.reply import ANSWER, ReplyReader
from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.processing.token_budget import TooLongError
from omni.rope.positions import prompt_positions, reply_position
from omni.talker.layout import HEADER_LENGTH, turn_layout
from omni.training.data.hearing import AS_RELEASED, HearingDraws
from omni.training.data.manifest import Row, Voice
from omni.training.data.row_forms import NotUnderstood
from omni.training.data.samples import IGNORED, Pair, Sample, SpokenTurn
from omni.training.data.whole_answers import whole_answer, without_opening_breaks

LOSS_ON = ("assistant", "last")
OPTIONS = ("enable_thinking", "fps", "min_pixels", "max_pixels", "total_pixels", "max_frames", "mel_level")


BEYOND = "longer than the model's positions"  # why a row is left out, whatever a run sets


class SkipRow(Exception):
    """The row is sound but not to be used here; the text says why, and `kind` in words that all such rows share."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind or text


class SampleMaker:
    """Makes a `Sample` of a row, or a `Pair` where the row has a rejected answer.

    Args:
        processor: writes the conversation as ids and features, as it does for `generate`.
        config: the model's, for ids, voices and the sizes of codebooks.
        codes: encodes speech (a path, address, bytes or array, as the row has it) to codes int64 [K, n].
        max_tokens: rows with more Thinker tokens are skipped (None: as many as the model has positions).
        max_frames: rows with a longer answer in speech are skipped (None: as many as the Talker has positions for).
        loss_on: "assistant", every answer is learnt, or "last", only the last one; a row's own `learn` goes before it.
        speech: False leaves speech and codes out, to train the Thinker on the same manifests.
        hearing: the chunks and attention windows in which sound is heard, drawn by the row's number.
        options: further arguments of the processor for every row, those of `OPTIONS`.
        pairs: whether rows have to have a rejected answer, or must have none (None: either).

    What an answer says is learnt as a whole: reasoning that the chat template leaves out is written into it, and a row
    of which the template leaves out anything else is a bad one. Line breaks that open an answer are left out: the
    tokenizer would merge them with the one of the turn's header, which is written before the model answers.
    """

    def __init__(
        self,
        processor: OmniProcessor,
        config: OmniConfig,
        codes: Callable[[Any], Tensor] | None = None,
        *,
        max_tokens: int | None = None,
        max_frames: int | None = None,
        loss_on: str = "assistant",
        speech: bool = True,
        options: Mapping[str, Any] | None = None,
        hearing: HearingDraws = AS_RELEASED,
        pairs: bool | None = None,
    ) -> None:
        if loss_on not in LOSS_ON:
            raise ValueError(f"unknown loss_on {loss_on!r}; {nearest(str(loss_on), LOSS_ON)}")
        for name, value in (("max_tokens", max_tokens), ("max_frames", max_frames)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in options or {}:
            if name not in OPTIONS:
                raise ValueError(f"unknown option {name!r} of the processor; {nearest(name, OPTIONS)}")
        positions = config.thinker.text_config.max_position_embeddings
        self.processor, self.config, self.codes = processor, config, codes
        self.max_tokens = min(positions, max_tokens or positions)
        self.max_frames, self.hearing = max_frames, hearing
        self.loss_on, self.speech, self.options, self.pairs = loss_on, speech, dict(options or {}), pairs
        self._media = torch.tensor([*processor.tokens, processor.audio_end_id, processor.vision_end_id])
        self._newline = processor.encode_text("\n")[-1]

    def __call__(self, row: Row) -> Sample | Pair:
        """Read the row's media, and its speech if it has any.

        Raises SkipRow for a row that is too long; ValueError, TypeError, FileNotFoundError or OSError for a bad one,
        NotUnderstood for one with or without a rejected answer where `pairs` says otherwise.
        """
        self.check(row)
        chosen = self._sample(row, row.messages, row.voices, row.learn)
        if row.rejected is None:
            return chosen
        messages, voices = row.worse()
        return Pair(chosen, self._sample(row, messages, voices, row.learn[: len(voices) - 1]), row.name)

    def check(self, row: Row) -> None:
        """Raises NotUnderstood for a row that is no pair where pairs are compared, or is one where they are not."""
        if self.pairs is True and row.rejected is None:
            raise NotUnderstood(
                f"{row.name}: the row has one answer, and the objective compares a chosen with a rejected one; give "
                "the row a rejected answer, or use another objective"
            )
        if self.pairs is False and row.rejected is not None:
            raise NotUnderstood(
                f"{row.name}: the row has a rejected answer, which this objective would learn like the chosen one; use "
                "objective 'dpo', or list the rejected column in data.ignore_columns to learn the chosen answer alone"
            )

    def _sample(
        self,
        row: Row,
        messages: Sequence[Mapping[str, Any]],
        voices: Sequence[Voice],
        learn: Sequence[bool | None],
    ) -> Sample:
        messages = [without_opening_breaks(message) for message in messages]
        try:
            inputs = self.processor(
                messages,
                add_generation_prompt=False,
                tools=row.tools,
                use_audio_in_video=row.use_audio_in_video,
                **self.options,
                **self.hearing.of(row.number),
            )
        except TooLongError as error:
            raise self._too_long() from error
        ids = self._short_enough(inputs.input_ids[0].tolist())
        spans = answer_spans(ids, self.config)
        if len(spans) != len(voices) or any(ids[start - 1] != self._newline for start, _ in spans):
            raise ValueError(
                f"the chat template wrote {len(spans)} turns '<|im_start|>assistant\\n' for {len(voices)} assistant "
                "messages; use one that writes each in a turn of its own"
            )
        learnt = learnt_answers(len(voices), learn, self.loss_on)
        answers = [message for message in messages if message["role"] == "assistant"]
        for own, (start, stop), message in reversed(list(zip(learnt, spans, answers))):
            if own:
                ids[start:stop] = whole_answer(ids[start:stop], message, self.processor)
        if len(self._short_enough(ids)) != inputs.input_ids.shape[1]:
            row_ids = torch.tensor([ids])
            inputs = replace(inputs, input_ids=row_ids, attention_mask=torch.ones_like(row_ids))
            spans = answer_spans(ids, self.config)
        hears = self.config.thinker.audio_config is not None
        segments = inputs.segments(self.config.thinker, self.processor.audio_tokens if hears else None)
        reach = reply_position(prompt_positions(segments[0], self.config.thinker.position_rule)[0])
        if reach > self.config.thinker.text_config.max_position_embeddings:
            raise SkipRow(f"reaches position {math.ceil(reach)}, beyond those of the model", BEYOND)
        learnt_spans = [(span, voice) for span, voice, own in zip(spans, voices, learnt) if own]
        labels = self._labels(inputs, [span for span, _ in learnt_spans])
        return Sample(inputs, labels, self._spoken(ids, learnt_spans), row.name)

    def _short_enough(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            raise self._too_long()
        return ids

    def _too_long(self) -> SkipRow:
        positions = self.config.thinker.text_config.max_position_embeddings
        if self.max_tokens < positions:
            return SkipRow(f"more than {self.max_tokens} tokens")
        return SkipRow(f"more than {positions} tokens, for which the model has positions", BEYOND)

    def _labels(self, inputs: OmniInputs, spans: Sequence[tuple[int, int]]) -> Tensor:
        """int64 [T]: the ids of the answers that are learnt, `IGNORED` elsewhere and at media."""
        ids = inputs.input_ids[0]
        labels = torch.full_like(ids, IGNORED)
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        return labels.masked_fill(torch.isin(ids, self._media), IGNORED)

    def _spoken(self, ids: Sequence[int], answers: Sequence[tuple[tuple[int, int], Voice]]) -> list[SpokenTurn]:
        """The turns of learnt answers, (span, voice) each, that are spoken."""
        talker = self.config.talker_config
        if not self.speech or talker is None or not self.config.has_talker:
            return []
        turns = []
        for (start, stop), voice in answers:
            if voice.codes is None and voice.speech is None:
                continue
            codes = check_codes(self._codes(voice), talker)
            self._check_frames(ids[:start], codes.shape[1])
            end = stop - (ids[stop - 1] == self.config.im_end_token_id)
            spoken = spoken_ids(ids[start:end], self.processor)
            if not spoken:
                raise ValueError("an answer has speech but no text to speak; write what is said as its content")
            turns.append(SpokenTurn(start - HEADER_LENGTH, spoken, codes, check_speaker(voice.speaker, talker)))
        return turns

    def _codes(self, voice: Voice) -> Tensor:
        if voice.codes is not None:
            return read_codes(voice.codes)
        if self.codes is None:
            raise ValueError(
                "the row has speech but there is no codec to encode it; give SampleMaker codes=, write codes into the "
                "manifest, or set speech=False"
            )
        return self.codes(voice.speech)

    def _check_frames(self, prompt: Sequence[int], frames: int) -> None:
        """Skip what is longer than asked for, or than the Talker has positions for after its prompt."""
        layout = turn_layout(self.config)
        room = layout.room(sum(stop - start for start, stop in layout.spans(prompt)))
        limit = room if self.max_frames is None else min(room, self.max_frames)
        if frames > limit:
            raise SkipRow(f"more than {self.max_frames or 'the positions of the Talker in'} frames")


def learnt_answers(count: int, learn: Sequence[bool | None], loss_on: str) -> list[bool]:
    """Which of a row's answers are learnt: those that it says itself, the others as the run wants it.

    Raises ValueError where none is left.
    """
    own = [*learn, *[None] * (count - len(learn))][:count]
    found = [loss_on == "assistant" or i == count - 1 if wanted is None else wanted for i, wanted in enumerate(own)]
    if not any(found):
        raise ValueError("no answer of the row is learnt, its losses are all false or 0; leave the row out")
    return found


def answer_spans(ids: Sequence[int], config: OmniConfig) -> list[tuple[int, int]]:
    """Token ranges [start, stop) of what the assistant wrote: after `<|im_start|>assistant\\n`, through `<|im_end|>`.

    Text that users write cannot form these ids (`omni.processing.template`), so they mark turns and nothing else.
    """
    starts = [i for i, token in enumerate(ids) if token == config.im_start_token_id]
    spans = []
    for header, following in zip(starts, [*starts[1:], len(ids)]):
        if header + HEADER_LENGTH > following or ids[header + 1] != config.assistant_token_id:
            continue
        start = header + HEADER_LENGTH
        ends = [i for i in range(start, following) if ids[i] == config.im_end_token_id]
        spans.append((start, ends[0] + 1 if ends else following))
    return spans


def spoken_ids(reply: Sequence[int], processor: OmniProcessor) -> list[int]:
    """What of a reply's ids is spoken: all but its reasoning, told apart as while it is generated."""
    reader = ReplyReader(processor.think_token_ids, decode=processor.decode)
    return [token for token in reply if reader.feed(token) == ANSWER]


def read_codes(value: Any) -> Tensor:
    """Codes from a list [K][n], a tensor, or a safetensors file (its path or bytes) with one tensor or one named codes.

    Raises FileNotFoundError or ValueError.
    """
    if not isinstance(value, (str, Path, bytes)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"codes must be K lists of n integers each: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(value if isinstance(value, bytes) else Path(value).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"codes file {str(value)!r} does not exist; check the path") from error
    except SafetensorError as error:
        raise ValueError(f"the codes cannot be read as safetensors: {error}") from error
    if "codes" not in tensors and len(tensors) != 1:
        raise ValueError(f"a codes file must hold one tensor, or one named 'codes'; it holds {', '.join(tensors)}")
    return tensors["codes"] if "codes" in tensors else next(iter(tensors.values()))


def check_codes(codes: Tensor, talker: TalkerConfig) -> Tensor:
    """The codes as int64 [K, n] on the CPU. Raises ValueError where they are not what the Talker can write."""
    groups = talker.num_code_groups
    if codes.dim() != 2 or codes.shape[0] != groups or codes.shape[1] == 0:
        raise ValueError(f"codes must be [{groups} codebooks, at least one frame], got shape {tuple(codes.shape)}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    codes = codes.to("cpu", torch.int64)
    books = [("codebook 0", codes[:1], talker.num_codes)]
    if groups > 1:
        books.append(("a residual codebook", codes[1:], talker.code_predictor_config.vocab_size))
    for what, rows, size in books:
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= size:
            raise ValueError(f"{what} holds code {low if low < 0 else high}; its codes lie in 0..{size - 1}")
    return codes


def check_speaker(name: str | None, talker: TalkerConfig) -> str | None:
    """The voice as the config spells it; names are case-insensitive. Raises ValueError that lists the voices."""
    if name is None:
        return None
    voices = {voice.lower(): voice for voice in talker.speaker_id or {}}
    if name.lower() not in voices:
        raise ValueError(f"unknown speaker {name!r}; the model has {', '.join(sorted(voices)) or 'none'}")
    return voices[name.lower()]
