"""Turns of a batch of prompts: streamed as events, or collected into one output. Both are the same steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from omni.generation.arguments import TurnArguments, resolve
from omni.generation.events import AudioChunk, Event
from omni.generation.output import OmniOutput
from omni.generation.prompt import Prompt, encode_prompt, warn_beyond
from omni.generation.reply import ANSWER, ReplyReader, assistant_head
from omni.generation.rows import Rows
from omni.generation.streaming_config import OFFLINE, UNWATCHED, StreamingConfig
from omni.generation.turn import Turn
from omni.generation.turn_request import TurnRequest
from omni.parts import ModelParts
from omni.processing.inputs import OmniInputs
from omni.processing.text_stream import TextStream
from omni.processing.token_budget import TokenBudget
from omni.talker.layout import PromptEnd, TurnLayout, turn_layout

if TYPE_CHECKING:
    from omni.processing.processor import OmniProcessor


def stream(
    model: ModelParts, inputs: OmniInputs, streaming: StreamingConfig | None = None, **arguments: Any
) -> Iterator[Event]:
    """Answer a batch of prompts event by event; see `OmniModel.stream`."""
    args = resolve(model, len(inputs.input_ids), **arguments)
    rows = start(model, inputs, args, streaming or UNWATCHED)

    def events() -> Iterator[Event]:
        while rows.running():
            happened = rows.tick()
            rows.raise_errors()
            yield from happened

    return events()


def generate(model: ModelParts, inputs: OmniInputs, **arguments: Any) -> OmniOutput:
    """Answer a batch of prompts at once; see `OmniModel.generate`."""
    args = resolve(model, len(inputs.input_ids), **arguments)
    rows = start(model, inputs, args, OFFLINE)
    sounds = run_to_end(rows)
    turns = [turn for turn in rows.turns if turn is not None]
    replies = [turn.text.ids for turn in turns]
    spoken = args.speakers is not None
    codec = model.code2wav
    prompts = inputs.input_ids.repeat_interleave(args.answers, dim=0)
    return OmniOutput(
        sequences=_sequences(prompts, replies, model.config.im_end_token_id),
        replies=replies,
        text=[turn.text.answer for turn in turns] if model.processor is not None else None,
        reasoning=[turn.text.reasoning.strip() if turn.text.reader.reasoned else None for turn in turns],
        codes=[join_codes(model, turn) for turn in turns] if spoken else None,
        audio=sounds if spoken and codec is not None else None,
        sample_rate=None if codec is None else int(codec.sample_rate),
        reason=[turn.reason for turn in turns],
        timing=dict(rows.seconds),
        logprobs=None if args.options[0].logprobs is None else [turn.text.logprobs for turn in turns],
    )


@torch.no_grad()
def start(model: ModelParts, inputs: OmniInputs, args: TurnArguments, streaming: StreamingConfig) -> Rows:
    """Read each prompt once and begin a turn for each of its answers."""
    if model.processor is None and any(options.stop for options in args.options):
        raise ValueError("stop needs text: load the model with its tokenizer files, or set model.processor")
    if model.processor is None and args.tools:
        raise ValueError("tools need text: load the model with its tokenizer files, or set model.processor")
    if (chunk_s := streaming.audio_chunk_s) is not None and any(own != chunk_s for own, _ in inputs.audio_cuts()):
        raise ValueError(
            f"streaming.audio_chunk_s is {chunk_s:g} s, and the inputs hold sound laid out in other chunks; make them "
            f"with processor(..., audio_chunk_s={chunk_s:g})"
        )
    with model.reading_threads(inputs.input_ids.numel()):
        return _start(model, inputs, args, streaming)


def _start(model: ModelParts, inputs: OmniInputs, args: TurnArguments, streaming: StreamingConfig) -> Rows:
    began, prompts, speaks = time.perf_counter(), len(inputs.input_ids), args.speakers is not None
    rows = Rows(model, prompts)
    with rows.stage("encoders"):
        prompt = encode_prompt(model, inputs, allow_long=args.allow_long)
    with rows.stage("thinker_prefill"):
        hidden = rows.prefill_batch(prompt)
    following, turns = prompt.next_position.tolist(), []
    args.warned = max(*following, *prompt.lengths) > model.config.thinker.text_config.max_position_embeddings
    for row in range(prompts):
        ids, prompt_end = prompt.row_ids(row), PromptEnd()
        begins = None if prompt.reply_start is None else prompt.reply_start[row]
        beginning = reply_beginning(model, ids, speaks=speaks, start=begins)
        given = beginning.given if speaks and args.speak_prefill else 0
        spoken: Sequence[Any] = ids[len(ids) - given :]
        if speaks:
            with rows.stage("talker_prefill"):
                prompt_end = _prefill_talker(rows, prompt, hidden[row], row, given)
            spoken = given_texts(rows, spoken, prompt.embeds[row, : len(ids)], hidden[row, : len(ids)])
        for answer in range(row * args.answers, (row + 1) * args.answers):
            request = make_request(model, args, answer, streaming, ids, following[row], beginning.header, prompt_end)
            answered = ids[len(ids) - beginning.given :]
            turns.append(make_turn(request, copy.copy(beginning.reader), model.processor, spoken, answered))
    rows = rows if args.answers == 1 else rows.repeated(args.answers)
    for row, turn in enumerate(turns):
        rows.begin(row, turn, began, {})
    return rows


def given_texts(rows: Rows, ids: Sequence[int], embeds: Tensor, hidden: Tensor) -> Sequence[Any]:
    """The texts of a reply's given beginning as a Talker takes them; embeds and hidden [T, D] end with its `ids`."""
    if rows.layout is None or not rows.layout.text_by_hidden or not ids:
        return ids
    return list(rows.model.require("talker").text_vectors(embeds[-len(ids) :], hidden[-len(ids) :]))


def run_to_end(rows: Rows) -> list[Tensor]:
    """Tick until every turn is over; the sound of each row, float32 [samples]."""
    sounds: list[list[Tensor]] = [[] for _ in rows.turns]
    while rows.running():
        for event in rows.tick():
            if isinstance(event, AudioChunk):
                sounds[event.row].append(event.samples)
        rows.raise_errors()
    return [torch.cat(pieces) if pieces else torch.zeros(0) for pieces in sounds]


def join_codes(model: ModelParts, turn: Turn) -> Tensor:
    """All codes of a turn, int64 [K, n]."""
    if turn.speech.codes:
        return torch.stack(turn.speech.codes, dim=1)
    return torch.zeros(model.require("talker").config.num_code_groups, 0, dtype=torch.int64, device=model.device)


class ReplyBeginning(NamedTuple):
    """What a prompt says of the reply that follows it.

    header: the ids that the Talker's prefix needs (none for a silent reply); given: how many of the prompt's last ids
    are the beginning of the answer; reader: of what follows.
    """

    header: list[int]
    given: int
    reader: ReplyReader


def reply_beginning(
    model: ModelParts,
    ids: list[int],
    *,
    speaks: bool,
    start: int | None = None,
    processor: OmniProcessor | None = None,
) -> ReplyBeginning:
    """Read the beginning of a reply from the ids of its prompt, of which those from `start` on belong to it.

    start: None finds it. Raises ValueError as `assistant_header`.
    """
    processor, c = processor if processor is not None else model.processor, model.config
    think = processor.think_token_ids if processor is not None else None
    decode = processor.decode if processor is not None else None
    head = assistant_head(ids, c.im_start_token_id, c.assistant_token_id, think, decode, start)
    reader = ReplyReader(think, opened=head.opened, decode=decode)
    if head.prefill:
        reader.state, reader.first = ANSWER, False
    needs_header = speaks and not turn_layout(c).whole_prompt
    return ReplyBeginning(assistant_header(model, head.header) if needs_header else [], len(head.prefill), reader)


def make_request(
    model: ModelParts,
    args: TurnArguments,
    row: int,
    streaming: StreamingConfig,
    ids: Sequence[int],
    position: float,
    header: Sequence[int],
    prompt_end: PromptEnd,
) -> TurnRequest:
    """What `row` of the arguments asks for, after a prompt of `ids` that has been read; the reply begins at `position`.

    prompt_end: the Talker's. There are no more ids than the Thinker, and no more frames than the Talker has positions
    for, unless that is allowed. Raises ValueError if the Talker has none.
    """
    layout = None if model.talker is None else turn_layout(model.config)
    limit = model.config.thinker.text_config.max_position_embeddings
    begin, text_limit, frame_limit = max(len(ids), math.ceil(position)), args.max_new_tokens, args.max_frames
    if not args.allow_long:
        text_limit = min(text_limit, max(1, limit - begin))
    elif begin + text_limit > limit:
        _warn_once(args, f"the reply may reach position {begin + text_limit}", limit)
    if args.speakers is not None and layout is not None:
        room = layout.room(prompt_end)
        if not args.allow_long:
            frame_limit = min(frame_limit, check_talker_room(layout, prompt_end))
        elif frame_limit > room:
            _warn_once(args, f"the speech may take {frame_limit - room} positions more than the Talker has", room)
    return TurnRequest(
        prompt_tokens=len(ids),
        stop_ids=args.stop_ids,
        text_limit=text_limit,
        frame_limit=frame_limit,
        options=args.options[row],
        prompt_ids=tuple(ids),
        seed=args.seeds[row],
        streaming=streaming,
        text_sampling=args.text[row],
        code_sampling=args.codes[row],
        residual_sampling=args.residual[row],
        layout=layout,
        speaker=None if args.speakers is None else args.speakers[row],
        header=tuple(header),
        prompt_end=prompt_end,
        voice=args.voices[row],
        tools=args.tools,
    )


def _warn_once(args: TurnArguments, what: str, limit: int) -> None:
    """Warn of positions that the caller has allowed, in one place of a call."""
    if not args.warned:
        args.warned = True
        warn_beyond(what, limit)


def make_turn(
    request: TurnRequest,
    reader: ReplyReader,
    processor: OmniProcessor | None,
    spoken: Sequence[Any] = (),
    given: Sequence[int] = (),
) -> Turn:
    """A turn at its beginning; its text is decoded by `processor`, if any.

    given: the ids of the answer that the prompt holds, in which a call of a tool may be open.
    """
    turn = Turn(request, reader, None if processor is None else TextStream(processor), spoken)
    if turn.text.call_reader is not None and processor is not None and given:
        turn.text.call_reader.go_on_from(processor.decode(given))
    return turn


def _prefill_talker(
    rows: Rows, prompt: Prompt, hidden: Tensor, row: int, given: int = 0, to_row: int | None = None
) -> PromptEnd:
    """Let the Talker read its prompt; the prefix follows with the first word of the reply.

    hidden [T, D] of the prompt's `row`, which is read in `to_row` (None: the same) but for its last `given` tokens.
    """
    assert rows.layout is not None
    ids = prompt.row_ids(row)
    tokens, positions, end = rows.layout.prompt(ids[: len(ids) - given], prompt.segments[row])
    at = tokens.to(prompt.ids.device)
    if len(at):
        vectors = rows.model.require("talker").prompt_vectors(prompt.embeds[row, at], hidden[at], prompt.media[row, at])
        rows.prefill_talker(row if to_row is None else to_row, vectors, positions.to(vectors.device))
    return end


def check_talker_room(layout: TurnLayout, end: PromptEnd) -> int:
    """Frames that the Talker has positions for after the end of its prompt. Raises ValueError if none."""
    room = layout.room(end)
    if room < 1:
        part = "prompt" if layout.whole_prompt else "user's part"
        raise ValueError(
            f"the {part} has {end.tokens} tokens up to position {math.ceil(end.start)}, which leaves the Talker no "
            "position to speak at; shorten the conversation, or pass return_audio=False or allow_long=True"
        )
    return room


def assistant_header(model: ModelParts, found: list[int] | None, processor: OmniProcessor | None = None) -> list[int]:
    """The three ids that open an assistant turn: the prompt's own, else the processor's. Raises ValueError."""
    processor = processor if processor is not None else model.processor
    if found is not None:
        return found
    if processor is None:
        raise ValueError(
            "the prompt holds no chat turn and the model has no processor, so the Talker's assistant header is "
            "unknown; build the inputs with OmniProcessor, or pass return_audio=False"
        )
    newline = processor.encode_text("\n")
    return [model.config.im_start_token_id, model.config.assistant_token_id, newline[0]]


def _sequences(prompt_ids: Tensor, replies: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Prompt ids as given and reply ids, int64 [B, T], wherever the prompt was."""
    longest = max(len(ids) for ids in replies)
    filled = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in replies], device=prompt_ids.device)
    return torch.cat((prompt_ids, filled), dim=1)


@torch.no_grad()
def speak(model: ModelParts, texts: Sequence[str], *, control_tokens: bool = False, **arguments: Any) -> list[Tensor]:
    """Speech for given texts; see `OmniModel.speak`."""
    model.require("thinker")
    if not model.config.has_talker:
        raise ValueError("this variant has no talker: it answers in text only and cannot speak")
    for part in ("talker", "code2wav"):
        model.require(part)
    processor = model.processor
    if processor is None:
        raise ValueError(
            "speak needs a tokenizer: load the model from a folder with tokenizer files, or set model.processor"
        )
    args = resolve(model, len(texts), max_new_tokens=1, text_sampling=None, return_audio=True, **arguments)
    replies = [_ids_to_speak(processor, text, control_tokens) for text in texts]
    rows = Rows(model, len(texts))
    assert rows.layout is not None
    for row, ids in enumerate(replies):
        reader = ReplyReader(None)
        reader.state = ANSWER  # the whole text is the answer, and it is complete
        header, prompt_end, spoken = assistant_header(model, None), PromptEnd(), list[Any](ids)
        if rows.layout.text_by_hidden:
            prompt_end, spoken = _read_given_reply(rows, row, ids, processor)
        turn = make_turn(make_request(model, args, row, OFFLINE, [], 0, header, prompt_end), reader, processor, spoken)
        turn.text.reason = "stop"
        rows.begin(row, turn)
    return run_to_end(rows)


def _ids_to_speak(processor: OmniProcessor, text: str, control_tokens: bool) -> list[int]:
    """The ids of a text. Raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"speak takes text, got {type(text).__name__}")
    TokenBudget(processor.files.positions, allow_long=None).check_text(text, processor.encode_text)
    ids: list[int] = processor.encode_text(text, control_tokens=control_tokens)
    if not ids:
        raise ValueError("the text to speak is empty")
    return ids


def _read_given_reply(rows: Rows, row: int, ids: list[int], processor: OmniProcessor) -> tuple[PromptEnd, list[Tensor]]:
    """Let the Thinker read a text as its own reply to an empty user's turn, and the Talker its prompt.

    Returns the end of the Talker's prompt and the vectors of the reply.
    """
    model, system = rows.model, processor.speech_system
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompt = encode_prompt(model, processor([*messages, {"role": "user", "content": ""}]))
    hidden = rows.prefill_thinker(row, prompt.row_ids(0), prompt.embeds[0], prompt.positions[:, 0])
    end = _prefill_talker(rows, prompt, hidden, 0, to_row=row)
    embeds = model.require("thinker").embed_tokens(torch.tensor(ids, device=model.device))
    positions = (prompt.next_position + torch.arange(len(ids), device=model.device)).expand(3, -1)
    return end, list(model.require("talker").text_vectors(embeds, rows.prefill_thinker(row, ids, embeds, positions)))
