"""What of a reply is reasoning, what is the answer, and what is spoken; read one id at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

REASONING, ANSWER, MARKER = "reasoning", "answer", "marker"
Decode = Callable[[Sequence[int]], str]


class ReplyReader:
    """Tells reasoning from answer while a reply is written.

    think: ids of `<think>` and `</think>`, None if the vocabulary has none. `opened`: the prompt ends inside a think
    block. A block that is never closed is all reasoning; `<think>` anywhere but at the start is ordinary text. Blank
    tokens right after the block separate it from the answer and belong to neither.
    """

    def __init__(self, think: tuple[int, int] | None, *, opened: bool = False, decode: Decode | None = None) -> None:
        self.think = think
        self.decode = decode
        self.state = REASONING if opened and think is not None else "start"
        self.first = True
        self.reasoned = self.state == REASONING

    def feed(self, token: int) -> str:
        """What the next id of the reply is: reasoning, answer or marker."""
        first, self.first = self.first, False
        if first and self.think is not None and token == self.think[0]:
            self.state, self.reasoned = REASONING, True
            return MARKER
        if self.state == REASONING:
            assert self.think is not None
            if token != self.think[1]:
                return REASONING
            self.state = "gap"
            return MARKER
        if self.state == "gap" and self.decode is not None and not self.decode([token]).strip():
            return MARKER
        self.state = ANSWER
        return ANSWER


class AssistantHead(NamedTuple):
    """The assistant's turn as far as the prompt holds it.

    header: the three ids `<|im_start|>assistant\\n`, None if the prompt has none. prefill: the last ids of the prompt
    where they begin the answer, reasoning left out. opened: it ends inside a think block.
    """

    header: list[int] | None
    prefill: list[int]
    opened: bool


def assistant_head(
    ids: Sequence[int],
    im_start: int,
    assistant: int,
    think: tuple[int, int] | None,
    decode: Decode | None = None,
    start: int | None = None,
) -> AssistantHead:
    """Read the assistant's head from the ids of one prompt; start: where the reply begins, if that is known."""
    turns = [i for i, token in enumerate(ids) if token == im_start]
    starts = [i for i in turns if i + 2 < len(ids)]
    headers = [i for i in starts if ids[i + 1] == assistant]
    if headers:
        header: list[int] | None = list(ids[headers[-1] : headers[-1] + 3])
    else:
        header = [im_start, assistant, ids[starts[-1] + 2]] if starts else None  # the newline of another turn
    if start is None:
        if not headers or headers[-1] != turns[-1]:
            return AssistantHead(header, [], False)  # the assistant's turn is not the open one
        start = headers[-1] + 3
    reader = ReplyReader(think, decode=decode)
    prefill = [token for token in ids[start:] if reader.feed(token) == ANSWER]
    return AssistantHead(header, prefill, reader.state == REASONING)
