"""One turn of one row: what was asked for and how far it has come. Host-side bookkeeping, no tensors of a model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from omni.generation.events import TurnEnd
from omni.generation.reply import ANSWER, ReplyReader
from omni.generation.sampling import SamplingConfig
from omni.generation.streaming_config import StreamingConfig
from omni.talker.layout import PromptEnd, TurnLayout

GREEDY = SamplingConfig(temperature=0.0)
IN_RUNNER = object()  # a turn's codec state once the runner decodes its frames as it draws them
SPEECH_OFF, SPEECH_WAITS, SPEECH_RUNS, SPEECH_OVER = "off", "waits", "runs", "over"


@dataclass
class Turn:
    """A row's turn.

    The first fields are what was asked for: header holds the ids of `<|im_start|>assistant\\n`, spoken starts as the
    part of the reply that the prompt already holds, speaker is None for a silent turn, prompt_tokens, text_limit and
    frame_limit count the row; layout is the family's (None without a Talker) and prompt_end where the Talker's prompt
    ends; voice is what the codec needs of the speaker, if anything. The texts [*opening, *spoken, *closing], by the
    names that the layout gives them, are token ids or, where text enters by hidden states too, vectors. The rest
    changes while the turn runs.
    """

    header: list[int]
    spoken: list[Any]
    reader: ReplyReader
    stop_ids: frozenset[int]
    prompt_tokens: int
    text_limit: int
    frame_limit: int
    speaker: int | None
    seed: int
    streaming: StreamingConfig
    layout: TurnLayout | None = None
    prompt_end: PromptEnd = PromptEnd()
    text_sampling: SamplingConfig = GREEDY
    code_sampling: SamplingConfig = GREEDY
    residual_sampling: SamplingConfig = GREEDY
    text_stream: Any = None
    voice: Any = None

    opening: list[Any] = field(default_factory=list)
    closing: list[Any] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)  # of the reply tokens read, where text enters by hidden states
    read_tokens: int = 0  # reply tokens that the Thinker has read
    reply: list[int] = field(default_factory=list)
    reasoning_text: str = ""
    answer_text: str = ""
    text_reason: str = ""
    speech: str = SPEECH_OFF
    speech_reason: str = ""
    codes: list[Tensor] = field(default_factory=list)
    frame_waits: bool = False  # a frame is drawn that the Talker has not read yet
    chunks: int = 0
    decoded: int = 0
    samples: int = 0
    quiet: int = 0
    codec: Any = None
    unfinished: bool = False  # the codec holds back sound until it is told that no more codes will come
    waves: list[Tensor] = field(default_factory=list)  # decoded with their frames, not handed out yet
    first_codes: list[int] = field(default_factory=list)
    over: bool = False
    paused: bool = False  # its events are not taken fast enough
    cut: TurnEnd | None = None  # the end of an interrupted turn
    taken: bool = False  # its end has been handed out
    shown_ids: int = 0  # handed out so far
    shown_frames: int = 0
    started: float = field(default_factory=time.perf_counter)
    timing: dict[str, float] = field(default_factory=dict)
    spent_before: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.speaker is not None:
            self.speech = SPEECH_WAITS

    @property
    def answered(self) -> bool:
        """Whether the reply has a word of answer yet (a prefilled beginning alone is none)."""
        return self.reader.state == ANSWER

    def wants_token(self, drawn: int) -> bool:
        """Whether the Thinker is to draw a token now; `drawn` counts those of the same tick."""
        if self.text_reason or self.over or self.paused:
            return False
        if self.speech in (SPEECH_OFF, SPEECH_OVER):
            return drawn == 0
        if not self.codes:  # nothing spoken yet: no further than the first word
            return not self.answered and drawn == 0
        return len(self.spoken) - len(self.codes) < self.streaming.text_ahead

    @property
    def reads_frame(self) -> bool:
        """Whether a frame waits that the Talker may read once the text after it is there."""
        return self.frame_waits and not (self.over or self.paused)

    @property
    def wants_frame(self) -> bool:
        """Whether the Talker is to draw a frame now."""
        return self.speech == SPEECH_RUNS and not (self.frame_waits or self.over or self.paused)

    def take_token(self, token: int) -> tuple[str, bool]:
        """Note a drawn token: (what it is, whether the Thinker has to read it).

        The last token of a reply is read only if it could not be spoken otherwise.
        """
        self.reply.append(token)
        if token in self.stop_ids:
            self.text_reason = "stop"
            return "stop", False
        kind = self.reader.feed(token)
        by_hidden = self.layout is not None and self.layout.text_by_hidden
        if kind == ANSWER and not by_hidden:
            self.spoken.append(token)
        if len(self.reply) >= self.text_limit:
            self.text_reason = "max_new_tokens"
        spoken_later = by_hidden and kind == ANSWER and self.speech in (SPEECH_WAITS, SPEECH_RUNS)
        reads = not self.text_reason or spoken_later
        self.read_tokens += reads
        return kind, reads

    def take_vector(self, vector: Tensor, kind: str) -> None:
        """Note the vector of a reply token that the Thinker has read, where text enters by hidden states."""
        self.vectors.append(vector)
        if kind == ANSWER:
            self.spoken.append(vector)

    def text(self, name: int) -> Any:
        """The text that the layout calls so."""
        if name < 0:
            return self.closing[name]
        return self.opening[name] if name < len(self.opening) else self.spoken[name - len(self.opening)]

    def next_text(self) -> Any:
        """What follows the last frame; None while the Thinker has still to write it."""
        assert self.layout is not None
        name = self.layout.text_after(len(self.codes) - 1, len(self.spoken), complete=bool(self.text_reason))
        return None if name is None else self.text(name)

    def take_frame(self, codes: Tensor, first: int, ends: frozenset[int]) -> None:
        """Note a drawn frame: codes [K], its code 0 as a number, the ids that end speech."""
        if first in ends:
            self.stop_speech("stop")
            return
        self.codes.append(codes)
        self.first_codes.append(first)
        if len(self.codes) >= self.frame_limit:
            self.stop_speech("max_frames")
        else:
            self.frame_waits = True
        if repeats(self.first_codes, self.streaming.loop_frames):
            self.stop_speech("code_loop")

    def stop_speech(self, reason: str) -> None:
        """End the speech; what has been drawn is still decoded."""
        self.speech, self.speech_reason, self.frame_waits = SPEECH_OVER, reason, False

    def chunk_due(self) -> int:
        """Frames to decode now, 0 for none."""
        pending = len(self.codes) - self.decoded
        wanted = self.streaming.chunk(self.chunks)
        return min(pending, wanted) if pending >= wanted or self.speech == SPEECH_OVER else 0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        decoded = self.decoded == len(self.codes) and not self.unfinished
        return bool(self.text_reason) and (self.speech == SPEECH_OFF or (self.speech == SPEECH_OVER and decoded))

    @property
    def reason(self) -> str:
        """Why the turn ended."""
        if self.text_reason == "stop" and self.speech_reason not in ("", "stop"):
            return self.speech_reason
        return self.text_reason

    def end(self, row: int, reason: str | None = None) -> TurnEnd:
        """The turn's last event; marks it as over."""
        self.over = True
        usage = {"prompt_tokens": self.prompt_tokens, "reply_tokens": len(self.reply), "frames": len(self.codes)}
        timing = {**self.timing, "total": time.perf_counter() - self.started}
        return TurnEnd(row, reason or self.reason, self.answer_text, usage, timing)


def repeats(codes: list[int], frames: int | None, longest_period: int = 8) -> bool:
    """Whether the last `frames` codes repeat with one period of up to `longest_period` frames (None: never)."""
    if frames is None or len(codes) < frames or len(codes) % 25:  # looked at every two seconds
        return False
    last = codes[-frames:]
    return any(last[p:] == last[:-p] for p in range(1, min(longest_period, frames - 1) + 1))
