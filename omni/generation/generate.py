"""Whole replies: the steps of the Thinker, then those of the Talker, collected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omni.generation.arguments import TurnArguments, resolve
from omni.generation.decode import draw_token, prefill_text, read_token
from omni.generation.output import OmniOutput
from omni.generation.prompt import Prompt, encode_prompt
from omni.generation.reply import assistant_head, drop_leading_space, split_reply
from omni.generation.sampling import TEXT_STREAM, RowSampling
from omni.generation.speech import SpeechRequest, decode_audio, user_part, write_codes
from omni.processing.inputs import OmniInputs

if TYPE_CHECKING:
    from omni.model import OmniModel


class StageClock:
    """Seconds spent in each named stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@torch.no_grad()
def generate(model: OmniModel, inputs: OmniInputs, **arguments: Any) -> OmniOutput:
    """Answer a batch of prompts; see `OmniModel.generate`."""
    args = resolve(model, len(inputs.input_ids), **arguments)
    clock = StageClock(model.device)
    with clock.stage("encoders"):
        prompt = encode_prompt(model, inputs)
    replies, reasons, hidden = write_text(model, prompt, args, clock)
    spoken, reasoning, text = _take_apart(model, prompt, replies, args.stop_ids)
    codes = audio = None
    if args.speakers is not None:
        codes = _speak(model, prompt, hidden, spoken, args, reasons, clock)
        if model.code2wav is not None:
            with clock.stage("code2wav"):
                audio = decode_audio(model.code2wav, codes)
    return OmniOutput(
        sequences=_sequences(inputs.input_ids, replies, model.config.im_end_token_id),
        replies=replies,
        text=text,
        reasoning=reasoning,
        codes=codes,
        audio=audio,
        sample_rate=None if model.code2wav is None else int(model.code2wav.sample_rate),
        reason=reasons,
        timing=clock.seconds,
    )


def write_text(
    model: OmniModel, prompt: Prompt, args: TurnArguments, clock: StageClock
) -> tuple[list[list[int]], list[str], Tensor]:
    """The Thinker's part of a turn -> reply ids a row (stop id included), why each ended, hidden states [B, T, D]."""
    thinker = model.thinker
    room = model.config.thinker_config.text_config.max_position_embeddings
    limits = [min(args.max_new_tokens, max(1, room - length)) for length in prompt.lengths]
    sampling = RowSampling(args.text, args.seeds, TEXT_STREAM)
    with clock.stage("thinker_prefill"):
        state, hidden = prefill_text(thinker, prompt, reserve=max(limits))
    replies: list[list[int]] = [[] for _ in limits]
    reasons = [""] * len(limits)
    with clock.stage("thinker_decode"):
        while True:
            ids = draw_token(state, sampling)
            for row, token in enumerate(ids.tolist()):
                if reasons[row]:
                    continue
                replies[row].append(token)
                if token in args.stop_ids:
                    reasons[row] = "stop"
                elif len(replies[row]) == limits[row]:
                    reasons[row] = "max_new_tokens"
            if all(reasons):
                return replies, reasons, hidden
            read_token(thinker, state, ids)


def _take_apart(
    model: OmniModel, prompt: Prompt, replies: Sequence[Sequence[int]], stops: frozenset[int]
) -> tuple[list[list[int]], list[str | None], list[str] | None]:
    """Of each row: the ids to speak, its reasoning and its answer as text (None without a processor)."""
    processor, c = model.processor, model.config
    think = processor.think_token_ids if processor is not None else None
    decode = processor.decode if processor is not None else None
    spoken, reasoning, text = [], [], []
    for row, ids in enumerate(replies):
        head = assistant_head(prompt.row_ids(row), c.im_start_token_id, c.assistant_token_id, think)
        kept = [*ids[:-1]] if ids and ids[-1] in stops else [*ids]
        reply = split_reply(kept, think, head.opened)
        answer = reply.answer if reply.reasoning is None else drop_leading_space(reply.answer, decode)
        spoken.append([*head.prefill, *answer] if answer else [])
        reasoning.append(decode(reply.reasoning).strip() if decode and reply.reasoning is not None else None)
        text.append(decode(answer) if decode else "")
    return spoken, reasoning, text if decode else None


def _speak(
    model: OmniModel,
    prompt: Prompt,
    hidden: Tensor,
    spoken: list[list[int]],
    args: TurnArguments,
    reasons: list[str],
    clock: StageClock,
) -> list[Tensor]:
    """Codes int64 [K, n] of every row; a row without text to speak has n = 0. Marks rows that reach `max_frames`."""
    assert args.speakers is not None
    requests = {}
    with clock.stage("talker"):
        for row, ids in enumerate(spoken):
            if not ids:
                continue
            user, segments = user_part(model, prompt, hidden, row)
            requests[row] = SpeechRequest(
                header=assistant_header(model, prompt.row_ids(row)),
                spoken=ids,
                speaker=args.speakers[row],
                seed=int(args.seeds[row]),
                codes=args.codes[row],
                residual=args.residual[row],
                user=user,
                segments=segments,
            )
        empty = torch.zeros(model.talker.config.num_code_groups, 0, dtype=torch.int64, device=model.device)
        codes = [empty] * len(spoken)
        if requests:
            written, ended = write_codes(model, list(requests.values()), args.max_frames)
            for row, row_codes, complete in zip(requests, written, ended):
                codes[row] = row_codes
                if not complete and reasons[row] == "stop":
                    reasons[row] = "max_frames"
    return codes


def assistant_header(model: OmniModel, ids: Sequence[int]) -> list[int]:
    """The three ids that open an assistant turn: the prompt's own, else the processor's. Raises ValueError."""
    c = model.config
    header = assistant_head(ids, c.im_start_token_id, c.assistant_token_id, None).header
    if header is None and model.processor is not None:
        newline = model.processor.encode_text("\n")
        header = [c.im_start_token_id, c.assistant_token_id, newline[0]]
    if header is None:
        raise ValueError(
            "the prompt holds no chat turn and the model has no processor, so the Talker's assistant header is "
            "unknown; build the inputs with OmniProcessor, or pass return_audio=False"
        )
    return header


def _sequences(prompt_ids: Tensor, replies: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Prompt ids as given and reply ids, int64 [B, T] on the CPU or wherever the prompt was."""
    longest = max(len(ids) for ids in replies)
    filled = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in replies], device=prompt_ids.device)
    return torch.cat((prompt_ids, filled), dim=1)


@torch.no_grad()
def speak(model: OmniModel, texts: Sequence[str], **arguments: Any) -> list[Tensor]:
    """Speech for given texts; see `OmniModel.speak`."""
    for part in ("thinker", "talker", "code2wav"):
        model.require(part)
    if model.processor is None:
        raise ValueError(
            "speak needs a tokenizer: load the model from a folder with tokenizer files, or set model.processor"
        )
    args = resolve(model, len(texts), max_new_tokens=1, text_sampling=None, return_audio=True, **arguments)
    assert args.speakers is not None
    requests = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"speak takes text, got {type(text).__name__}")
        ids = model.processor.encode_text(text)
        if not ids:
            raise ValueError("the text to speak is empty")
        requests.append(
            SpeechRequest(
                header=assistant_header(model, []),
                spoken=ids,
                speaker=args.speakers[row],
                seed=int(args.seeds[row]),
                codes=args.codes[row],
                residual=args.residual[row],
            )
        )
    codes, _ = write_codes(model, requests, args.max_frames)
    return decode_audio(model.code2wav, codes)
