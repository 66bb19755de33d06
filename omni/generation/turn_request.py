"""What a turn was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni.generation.sampling import SamplingConfig
from omni.generation.streaming_config import StreamingConfig
from omni.generation.text_options import TextOptions
from omni.talker.layout import PromptEnd, TurnLayout

GREEDY = SamplingConfig(temperature=0.0)


@dataclass(frozen=True)
class TurnRequest:
    """What was asked for.

    prompt_tokens: ids that the Thinker has read; stop_ids end the reply; text_limit: reply ids at most, frame_limit:
    frames at most. options: of its text; prompt_ids: those ids. layout: the family's
    (None without a Talker); speaker: None for a silent turn; header: the ids of `<|im_start|>assistant\\n` as the
    prefix needs them; prompt_end: where the Talker's prompt ends; voice: what the codec needs of the speaker, if
    anything. tools: whether calls of tools are told from the text of the reply.
    """

    prompt_tokens: int
    stop_ids: frozenset[int]
    text_limit: int
    frame_limit: int
    seed: int
    streaming: StreamingConfig
    text_sampling: SamplingConfig = GREEDY
    code_sampling: SamplingConfig = GREEDY
    residual_sampling: SamplingConfig = GREEDY
    options: TextOptions = TextOptions()
    prompt_ids: tuple[int, ...] = ()
    layout: TurnLayout | None = None
    speaker: int | None = None
    header: tuple[int, ...] = ()
    prompt_end: PromptEnd = PromptEnd()
    voice: Any = None
    tools: bool = False

    @property
    def text_by_hidden(self) -> bool:
        """Whether a reply token has to be read by the Thinker before it is spoken."""
        return self.layout is not None and self.layout.text_by_hidden
