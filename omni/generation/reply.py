"""What of a reply is reasoning, what is the answer, and what is spoken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Reply(NamedTuple):
    """A reply taken apart, all as token ids without the stop id. `reasoning` is None where there was none."""

    reasoning: list[int] | None
    answer: list[int]


def split_reply(ids: Sequence[int], think: tuple[int, int] | None, opened: bool) -> Reply:
    """Tell the reasoning from the answer.

    think: ids of `<think>` and `</think>`, None if the vocabulary has none. `opened`: the prompt ends inside a think
    block. A block that is never closed is all reasoning; `<think>` anywhere but at the start is ordinary text.
    """
    ids = list(ids)
    if think is None or not (opened or (ids and ids[0] == think[0])):
        return Reply(None, ids)
    start = 0 if opened and (not ids or ids[0] != think[0]) else 1
    if think[1] not in ids:
        return Reply(ids[start:], [])
    end = ids.index(think[1])
    return Reply(ids[start:end], ids[end + 1 :])


class AssistantHead(NamedTuple):
    """The assistant's turn as far as the prompt holds it.

    header: the three ids `<|im_start|>assistant\\n`, None if the prompt has none. prefill: ids of the reply that the
    prompt already holds (spoken like the rest), reasoning left out. opened: it ends inside a think block.
    """

    header: list[int] | None
    prefill: list[int]
    opened: bool


def assistant_head(ids: Sequence[int], im_start: int, assistant: int, think: tuple[int, int] | None) -> AssistantHead:
    """Read the assistant's head from the ids of one prompt."""
    starts = [i for i, token in enumerate(ids) if token == im_start and i + 2 < len(ids)]
    headers = [i for i in starts if ids[i + 1] == assistant]
    if not headers:
        newline = [ids[i + 2] for i in starts]
        header = [im_start, assistant, newline[-1]] if newline else None
        return AssistantHead(header, [], False)
    header = list(ids[headers[-1] : headers[-1] + 3])
    if headers[-1] != max(i for i, token in enumerate(ids) if token == im_start):
        return AssistantHead(header, [], False)  # the assistant's turn is not the open one
    content = list(ids[headers[-1] + 3 :])
    reply = split_reply(content, think, opened=False)
    opened = reply.reasoning is not None and think is not None and think[1] not in content
    return AssistantHead(header, reply.answer, opened)


def drop_leading_space(ids: Sequence[int], decode: Callable[[Sequence[int]], str] | None) -> list[int]:
    """The answer without the blank lines that separate it from the reasoning."""
    start = 0
    while decode is not None and start < len(ids) and not decode(ids[start : start + 1]).strip():
        start += 1
    return list(ids[start:])
