"""One turn of one row: how far its text, its speech and its sound have come.

Host-side bookkeeping, no tensors of a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from omni.generation.events import TokenLogprob, TurnEnd
from omni.generation.reply import ANSWER, REASONING, ReplyReader
from omni.generation.speech_times import SpeechTimes
from omni.generation.stop_strings import Decided, StopStrings
from omni.generation.streaming_config import OFFLINE
from omni.generation.tool_calls import CALL_TOKENS, CallReader, MalformedCallError, Piece, WrittenCall
from omni.generation.turn_request import TurnRequest
from omni.processing.text_stream import TextStream

IN_RUNNER = object()  # a turn's codec state once the runner decodes its frames as it draws them
SPEECH_OFF, SPEECH_WAITS, SPEECH_RUNS, SPEECH_OVER = "off", "waits", "runs", "over"


@dataclass
class TextProgress:
    """The reply as text.

    reader tells reasoning from answer; stream makes text of ids, None without a processor. ids: drawn so far; read: how
    many of them the Thinker has read; vectors [Di]: of those, where text enters the Talker by hidden states too;
    reason: why the reply ended, "" while it goes on. stops: the search for stop strings, None without any; decided:
    tokens of the answer that are certain to stay and have not been given to the Talker; cut: whether a stop string was
    found, rest: the ids of what stays of the token in which it begins, the first `unspoken` of them in front of the
    text; logprobs: of all ids, if asked for. call_reader: None without tools; pieces: of the text beside calls, new,
    and waiting: those that the search for stop strings holds; calls: that are complete, new; error: a malformed one.
    kinds: of all ids, as `append` tells.
    """

    request: TurnRequest
    reader: ReplyReader
    stream: TextStream | None = None
    ids: list[int] = field(default_factory=list)
    read: int = 0
    vectors: list[Tensor] = field(default_factory=list)
    reasoning: str = ""
    answer: str = ""
    reason: str = ""
    stops: StopStrings | None = None
    decided: int = 0
    cut: bool = False
    rest: list[int] = field(default_factory=list)
    unspoken: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    call_reader: CallReader | None = None
    pieces: list[Piece] = field(default_factory=list)
    waiting: list[Piece] = field(default_factory=list)
    calls: list[WrittenCall] = field(default_factory=list)
    error: MalformedCallError | None = None
    kinds: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.options.stop and self.stream is not None:
            self.stops = StopStrings(self.request.options.stop)
        if self.request.tools and self.stream is not None:
            self.call_reader = CallReader(self.stream)

    @property
    def kept(self) -> list[int]:
        """The ids that count: of what a stop string has not cut off, and cannot any more, without an open call."""
        if self.call_reader is not None and self.stream is not None:
            first, before = self.call_reader.undecided or (len(self.ids), "")
            if self.waiting:
                first, before = self.waiting[0].index, self.waiting[0].before
            return [*self.ids[:first], *(self.rest if self.cut else self.stream.processor.encode_text(before))]
        return self.ids if self.stops is None else [*self.ids[: self._whole(self.stops)], *self.rest]

    def _whole(self, stops: StopStrings) -> int:
        """How many ids count whole."""
        if self.waiting:
            return self.waiting[0].index
        return len(self.ids) - stops.tokens - (self.cut and self.ids[-1] in self.request.stop_ids)

    def wants_token(self, drawn: int, speech: SpeechProgress) -> bool:
        """Whether the Thinker is to draw a token now; `drawn` counts those of the same tick."""
        if self.reason:
            return False
        if not speech.expected:
            return drawn == 0
        if not speech.codes:  # nothing spoken yet: no further than the first word
            return not speech.spoken and drawn == 0
        ahead = self.request.streaming.text_ahead
        if drawn >= max(ahead, CALL_TOKENS) and self.call_reader is not None and self.call_reader.undecided:
            return False
        return len(speech.spoken) - len(speech.codes) < ahead

    def append(self, token: int) -> tuple[str, str]:
        """Record a drawn token: (what it is, "stop" for one that ends the reply; the text that it completes).

        The text is empty while a character is incomplete, or while it may begin a stop string or a call.
        """
        self.ids.append(token)
        if token in self.request.stop_ids:
            kind, self.reason = "stop", "stop"
        else:
            kind = self.reader.feed(token)
            if len(self.ids) >= self.request.text_limit:
                self.reason = "max_new_tokens"
        self.kinds.append(kind)
        text = self.stream.push(token) if self.stream is not None and kind in (ANSWER, REASONING) else ""
        if kind == REASONING:
            self.reasoning += text
            return kind, text
        if self.call_reader is not None:
            text = self._tell_calls(self.call_reader, token, text, kind)
        elif self.stops is not None:
            text = self._search(self.stops, text, kind)
        else:
            self.decided += kind == ANSWER
        self.answer += text
        return kind, text

    def _search(self, stops: StopStrings, text: str, kind: str) -> str:
        """Look for stop strings in what a token adds to the answer; the text that is certain to stay."""
        assert self.stream is not None
        counts, certain = len(self.ids) >= self.request.options.min_new_tokens, ""
        if kind == ANSWER:
            certain = self._take(stops.push(text, whole=self.stream.whole, counts=counts))
        if self.reason and not self.cut:
            certain += self._take(stops.finish(self.stream.finish(), counts=counts))
        return certain

    def _tell_calls(self, reader: CallReader, token: int, text: str, kind: str) -> str:
        """Tell calls from text in what a token adds to the answer; the text that is certain to stay."""
        assert self.stream is not None
        counts, certain = len(self.ids) >= self.request.options.min_new_tokens, ""
        found = reader.push(len(self.ids) - 1, token, text, whole=self.stream.whole) if kind == ANSWER else []
        if self.reason and not (found and isinstance(found[-1], MalformedCallError)):
            found += reader.finish(self.stream.finish(), self.reason)
        for each in found:
            if isinstance(each, MalformedCallError):
                self.error = each
            elif isinstance(each, WrittenCall):
                self.calls.append(each)
            elif each is None:  # a call begins: no stop string goes on behind it
                if self.stops is not None:
                    certain += self._take(self.stops.finish("", counts=counts))
            elif self.stops is None:
                self.pieces.append(each)
                self.decided += 1
                certain += each.text
            else:
                self.pieces.append(each)
                self.waiting.append(each)
                certain += self._take(self.stops.push(each.text, whole=each.whole, counts=counts))
            if self.cut:
                return certain
        if self.reason and self.stops is not None:
            certain += self._take(self.stops.finish("", counts=counts))
        return certain

    def _take(self, decided: Decided) -> str:
        """Note what has been decided; its text."""
        self.decided += decided.tokens
        del self.waiting[: decided.tokens]
        if decided.cut is not None:
            assert self.stops is not None and self.stream is not None
            self.cut, self.reason = True, "stop"
            before = self.waiting[0].before if self.waiting else ""
            first, rest = (self.stream.processor.encode_text(text) for text in (before, decided.cut))
            self.rest, self.unspoken = first + rest, len(first)
            whole = self._whole(self.stops)
            self.read = min(self.read, whole)
            del self.vectors[whole:]
        return decided.text

    def flush(self) -> str:
        """The end of a reply that stops inside a character."""
        rest = self.stream.finish() if self.stream is not None else ""
        self.answer += rest
        return rest


@dataclass
class SpeechProgress:
    """The reply as codes.

    The texts [*opening, *spoken, *closing], by the names that the layout gives them, are token ids or, where text
    enters by hidden states too, vectors; spoken: of the reply so far. codes: int64 [K] of each frame, first_codes:
    their codes 0 as numbers; pending: whether the last frame has been drawn but not read by the Talker; reason: why the
    speech ended, "" before.
    """

    request: TurnRequest
    spoken: list[Any] = field(default_factory=list)
    opening: list[Any] = field(default_factory=list)
    closing: list[Any] = field(default_factory=list)
    state: str = SPEECH_OFF
    codes: list[Tensor] = field(default_factory=list)
    first_codes: list[int] = field(default_factory=list)
    pending: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        if self.request.speaker is not None:
            self.state = SPEECH_WAITS

    @property
    def expected(self) -> bool:
        """Whether speech is still to come."""
        return self.state in (SPEECH_WAITS, SPEECH_RUNS)

    @property
    def wants_frame(self) -> bool:
        """Whether the Talker is to draw a frame now."""
        return self.state == SPEECH_RUNS and not self.pending

    def text(self, name: int) -> Any:
        """The text that the layout calls so."""
        if name < 0:
            return self.closing[name]
        return self.opening[name] if name < len(self.opening) else self.spoken[name - len(self.opening)]

    def next_text(self, complete: bool) -> Any:
        """What follows the last frame; None while the Thinker has still to write it. complete: no more will come."""
        assert self.request.layout is not None
        name = self.request.layout.text_after(len(self.codes) - 1, len(self.spoken), complete)
        return None if name is None else self.text(name)

    def append(self, codes: Tensor, first: int) -> bool:
        """Record a drawn frame, codes int64 [K] and its code 0 as a number; False if it is the end of speech."""
        assert self.request.layout is not None
        if first in self.request.layout.stop_codes:
            self.stop("stop")
            return False
        self.codes.append(codes)
        self.first_codes.append(first)
        if len(self.codes) >= self.request.frame_limit:
            self.stop("max_frames")
        else:
            self.pending = True
        if repeats(self.first_codes, self.request.streaming.loop_frames):
            self.stop("code_loop")
        return True

    def stop(self, reason: str) -> None:
        """End the speech; what has been drawn is still decoded."""
        self.state, self.reason, self.pending = SPEECH_OVER, reason, False


@dataclass
class SoundProgress:
    """The reply as sound.

    codec: the decoder's state, None before the first chunk; chunks and frames decoded so far; samples emitted, quiet of
    them in a row at the end; waves: of frames that the runner has decoded as it drew them, not emitted yet; unfinished:
    whether the codec holds back sound until it is told that no more codes will come.
    """

    request: TurnRequest
    codec: Any = None
    chunks: int = 0
    frames: int = 0
    samples: int = 0
    quiet: int = 0
    waves: list[Tensor] = field(default_factory=list)
    unfinished: bool = False

    def chunk_due(self, speech: SpeechProgress) -> int:
        """Frames to decode now, 0 for none."""
        pending = len(speech.codes) - self.frames
        wanted = self.request.streaming.chunk(self.chunks)
        return min(pending, wanted) if pending >= wanted or speech.state == SPEECH_OVER else 0

    def complete(self, speech: SpeechProgress) -> bool:
        """Whether all frames of speech that is over have become sound."""
        return speech.state == SPEECH_OVER and self.frames == len(speech.codes) and not self.unfinished

    def record(self, samples: int, quiet: bool) -> None:
        """Count emitted samples, and the silence that they prolong or end."""
        self.samples += samples
        self.quiet = self.quiet + samples if quiet else 0


class Turn:
    """A row's turn: the request, and the progress of text, speech and sound.

    spoken: the part of the reply that the prompt already holds and that is to be spoken, `given` texts; held: texts of
    the answer that are not decided (pieces whose vectors are still to come, too). paused: its events are not read fast
    enough; over: no step is left to do; error: what the caller's function of the logits raised, or a malformed call.
    times: of its words, None where none are spoken or nobody reads its events. interruption: the last event of a turn
    that was interrupted.
    delivered_ids, delivered_frames and delivered_end: what of the reply has reached the reader of its events. timing:
    seconds by name.
    """

    def __init__(
        self, request: TurnRequest, reader: ReplyReader, stream: TextStream | None = None, spoken: Sequence[Any] = ()
    ) -> None:
        self.request = request
        self.text = TextProgress(request, reader, stream)
        self.speech = SpeechProgress(request, list(spoken))
        self.sound = SoundProgress(request)
        self.given = len(spoken)
        self.times = _times(request, stream, len(spoken))
        self.held: list[Any] = []
        self.error: BaseException | None = None
        self.paused = False
        self.over = False
        self.interruption: TurnEnd | None = None
        self.delivered_ids = 0
        self.delivered_frames = 0
        self.delivered_end = False
        self.started = time.perf_counter()
        self.timing: dict[str, float] = {}
        self.seconds_before: dict[str, float] = {}  # of each stage when the turn began

    @property
    def runs(self) -> bool:
        """Whether it takes part in steps now."""
        return not (self.over or self.paused)

    def wants_token(self, drawn: int) -> bool:
        """Whether the Thinker is to draw a token now; `drawn` counts those of the same tick."""
        return self.runs and self.text.wants_token(drawn, self.speech)

    @property
    def wants_frame(self) -> bool:
        """Whether the Talker is to draw a frame now."""
        return self.runs and self.speech.wants_frame

    def append_token(self, token: int) -> tuple[str, str, bool]:
        """Record a drawn token: (what it is, the text that it completes, whether the Thinker has to read it).

        The last token of a reply is read only if it could not be spoken otherwise.
        """
        by_hidden, text = self.request.text_by_hidden, self.text
        kind, certain = text.append(token)
        if text.call_reader is not None:
            self.held += text.pieces if by_hidden else [piece.token for piece in text.pieces]
            text.pieces, self.error = [], text.error
        elif kind == ANSWER and not by_hidden:
            self.held.append(token)
        if text.cut:
            self.held[text.decided :] = [] if by_hidden else text.rest[text.unspoken :]
            text.decided += len(text.rest) - text.unspoken
        self._speak_decided()
        read_to_speak = kind == ANSWER and by_hidden and self.speech.expected and not text.cut
        reads = not text.reason or read_to_speak
        text.read += reads
        return kind, certain, reads

    def append_vector(self, vector: Tensor, kind: str) -> None:
        """Record the vector of a reply token that the Thinker has read, where text enters by hidden states too."""
        self.text.vectors.append(vector)
        if self.text.call_reader is not None:
            self.held += [vector] if kind == ANSWER and self.text.cut else []
            self._speak_decided()
        elif kind == ANSWER:
            self.held.append(vector)
            self._speak_decided()

    @property
    def torn(self) -> list[Piece]:
        """Texts that share their id with a call, and whose vectors are still to come."""
        return [text for text in self.held if isinstance(text, Piece) and not text.own and text.vector is None]

    def speak_torn(self, pieces: Sequence[Piece], vectors: Sequence[Tensor]) -> None:
        """The vectors of such texts are there."""
        for piece, vector in zip(pieces, vectors):
            piece.vector = vector
        self._speak_decided()

    def _ready(self, text: Any) -> Any:
        """What the Talker takes of a held text; None while the Thinker has not read it."""
        if not isinstance(text, Piece):
            return text
        vectors = self.text.vectors[text.index :][:1] if text.own else [text.vector]
        return vectors[0] if vectors else None

    def _speak_decided(self) -> None:
        """Give the Talker the texts that are certain to stay."""
        free = list(takewhile(lambda text: text is not None, map(self._ready, self.held[: self.text.decided])))
        self.speech.spoken += free
        self.text.decided -= len(free)
        del self.held[: len(free)]

    def time_text(self, text: str, kind: str) -> float | None:
        """Where in the sound the text of a new delta is expected to begin; None where nothing of it is spoken."""
        if self.times is None or kind == REASONING:
            return None
        begin = self.times.push_text(text) if text else None
        if self.text.reason:
            self.times.end_text()
        return begin

    def next_text(self) -> Any:
        """The text that the Talker is to read now with the pending frame; None if it cannot or has none to read."""
        return self.speech.next_text(bool(self.text.reason)) if self.runs and self.speech.pending else None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        silent = self.speech.state == SPEECH_OFF
        return bool(self.text.reason) and (silent or self.sound.complete(self.speech))

    @property
    def reason(self) -> str:
        """Why the turn ended."""
        if self.text.reason == "stop" and self.speech.reason not in ("", "stop"):
            return self.speech.reason
        return self.text.reason

    def record_times(self, seconds: Mapping[str, float]) -> None:
        """What each stage has taken since the turn began; what is in none of them is preprocessing.

        seconds: of each stage so far, whatever they were spent on.
        """
        elapsed = time.perf_counter() - self.started
        for name, value in seconds.items():
            if (spent := value - self.seconds_before.get(name, 0.0)) > 0:
                self.timing[name] = spent
        self.timing["preprocessing"] = max(0.0, elapsed - sum(self.timing.values()))

    def end(self, row: int, reason: str | None = None) -> TurnEnd:
        """The turn's last event; marks it as over."""
        self.over = True
        counts = {"prompt_tokens": self.request.prompt_tokens, "reply_tokens": len(self.text.ids)}
        usage = {**counts, "frames": len(self.speech.codes)}
        timing = {**self.timing, "total": time.perf_counter() - self.started}
        error = None if self.error is None else str(self.error)
        return TurnEnd(row, reason or self.reason, self.text.answer, usage, timing, error)


def _times(request: TurnRequest, stream: TextStream | None, given: int) -> SpeechTimes | None:
    """The times of a turn's words, of which the first `given` ids are the last ones of the prompt."""
    if stream is None or request.speaker is None or request.streaming is OFFLINE:
        return None
    return SpeechTimes(stream.processor.decode(list(request.prompt_ids[-given:])) if given else "")


def repeats(codes: list[int], frames: int | None, longest_period: int = 8) -> bool:
    """Whether the last `frames` codes repeat with one period of up to `longest_period` frames (None: never)."""
    if frames is None or len(codes) < frames or len(codes) % 25:  # looked at every two seconds
        return False
    last = codes[-frames:]
    return any(last[p:] == last[:-p] for p in range(1, min(longest_period, frames - 1) + 1))
