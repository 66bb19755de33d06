"""Conversations side by side: the states of all parts for B rows, and the tick that moves every row one step.

Rows are independent: each has its own positions, lengths, samplings and seeds, and stands still while others move. A
tick is at most one speech frame a row: the Thinker draws what is needed, the Talker reads the waiting frame and draws
the next one, and the codec decodes the chunks that are due.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omni.generation.events import Event, TextDelta, TurnEnd
from omni.generation.prompt import Prompt
from omni.generation.reply import ANSWER, REASONING
from omni.generation.runner import Runner
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, TEXT_STREAM, RowSampling
from omni.generation.sound import write_sound
from omni.generation.turn import GREEDY, IN_RUNNER, SPEECH_RUNS, SPEECH_WAITS, Turn
from omni.parts import ModelParts
from omni.talker.layout import PAD

STEP_STAGES = ("thinker", "talker", "residual_codes", "codec", "frame")  # what every frame of a running reply costs


class Rows:
    """The turns that run in B rows, and the runner that holds the rows' states and moves them."""

    def __init__(self, model: ModelParts, rows: int, capacity: int = 256) -> None:
        model.require("thinker")
        self.model = model
        self.turns: list[Turn | None] = [None] * rows
        self.runner = (
            Runner(model, rows, capacity) if model.graphs is None else model.graphs.take(self, model, rows, capacity)
        )
        self.text, self.speech, self.layout = self.runner.text, self.runner.speech, self.runner.layout
        self.stage = self.runner.times.stage
        self._samplings: tuple[RowSampling, RowSampling, RowSampling] | None = None
        self._padding: Any = None  # text for rows that read none, as the turns have texts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage so far."""
        return self.runner.times.seconds

    def begin(self, row: int, turn: Turn) -> None:
        """Start a turn in a row whose prompt has been read."""
        assert self.turns[row] is None, "a turn is running in this row"
        self.turns[row] = turn
        self.runner.steps.begin_turn()
        self._samplings = None
        self.text.steps[row] = 0
        if self.speech is not None:
            self.speech.steps[row] = 0
            assert self.runner.seen_at_first is not None
            self.speech.seen[row] = self.runner.seen_at_first
            self._lay_out_texts(turn)
        turn.spent_before = dict(self.seconds)

    def release(self, row: int) -> Turn | None:
        """Take the turn out of a row."""
        turn, self.turns[row] = self.turns[row], None
        self._samplings = None
        return turn

    def running(self) -> list[tuple[int, Turn]]:
        """Rows with a turn that is not over."""
        return [(row, turn) for row, turn in enumerate(self.turns) if turn is not None and not turn.over]

    @torch.no_grad()
    def tick(self) -> list[Event]:
        """One step of every running row; what happened, row by row in order of time."""
        events: list[Event] = []
        self._write_text(events)
        if self.speech is not None:
            self._start_speech()
            self._write_frames()
            write_sound(self, events)
        for row, turn in self.running():
            if turn.complete:
                self._flush_text(row, turn, events)
                events.append(self.end(row, turn))
        return events

    def end(self, row: int, turn: Turn, reason: str | None = None) -> TurnEnd:
        """The last event of a row, with the times of the whole turn."""
        if turn.samples == 0:
            self.note_times(turn)
        codec = self.model.code2wav
        if turn.samples and codec is not None:
            total = time.perf_counter() - turn.started
            steps = sum(self.seconds.get(name, 0.0) - turn.spent_before.get(name, 0.0) for name in STEP_STAGES)
            turn.timing["rtf"] = total * codec.sample_rate / turn.samples
            turn.timing["rtf_step"] = steps / len(turn.codes) * codec.frame_rate
        return turn.end(row, reason)

    # text

    def _write_text(self, events: list[Event]) -> None:
        drawn = [0] * len(self.turns)
        while any(active := [t is not None and t.wants_token(n) for t, n in zip(self.turns, drawn)]):
            first = any(t is not None and a and not t.reply for t, a in zip(self.turns, active))
            with self.stage("thinker_first_token" if first else "thinker"):
                unread, kinds = [False] * len(active), [""] * len(active)
                for row, token in enumerate(self.runner.draw_token(self.sampling[0], active)):
                    turn = self.turns[row]
                    if turn is not None and active[row]:
                        drawn[row] += 1
                        kinds[row], unread[row] = turn.take_token(token)
                        self._say(row, turn, token, kinds[row], events)
                if any(unread):
                    self._read_tokens(unread, kinds)

    def _read_tokens(self, unread: list[bool], kinds: list[str]) -> None:
        """Let the Thinker read what was drawn, and the turns have its vectors where text enters by hidden states."""
        self.runner.read_token(unread)
        if self.layout is not None and self.layout.text_by_hidden:
            for turn, vector, kind, read in zip(self.turns, self.runner.reply_vectors(len(unread)), kinds, unread):
                if turn is not None and read:
                    turn.take_vector(vector.clone(), kind)

    def _say(self, row: int, turn: Turn, token: int, kind: str, events: list[Event]) -> None:
        """The event of a drawn token; its text is empty while a character is incomplete."""
        text = ""
        if turn.text_stream is not None and kind in (ANSWER, REASONING):
            text = turn.text_stream.push(token)
        if kind == REASONING:
            turn.reasoning_text += text
        else:
            turn.answer_text += text
        events.append(TextDelta(row, text, (token,), kind == REASONING))

    def _flush_text(self, row: int, turn: Turn, events: list[Event]) -> None:
        """The end of a reply that stops inside a character."""
        rest = turn.text_stream.finish() if turn.text_stream is not None else ""
        if rest:
            turn.answer_text += rest
            events.append(TextDelta(row, rest, ()))

    # speech

    def _start_speech(self) -> None:
        """Let the Talker read the prefix once the first word is there."""
        assert self.speech is not None and self.layout is not None
        for row, turn in self.running():
            if turn.speech != SPEECH_WAITS or not (turn.answered or turn.text_reason):
                continue
            if not turn.answered or turn.frame_limit < 1:  # nothing to say
                turn.stop_speech("stop" if not turn.answered else "max_frames")
                continue
            assert turn.speaker is not None
            with self.stage("talker_first_code"):
                prefix = self._prefix(turn, turn.speaker)
                positions = self.layout.prefix_positions(turn.prompt_end).expand(3, -1)
                self.read_speech(row, prefix, positions.to(prefix.device))
                self.speech.decoder.next_position[row] = self.layout.frame_position(turn.prompt_end)
                turn.speech = SPEECH_RUNS

    def _lay_out_texts(self, turn: Turn) -> None:
        """Give a spoken turn the texts around its reply: ids or, where text enters by hidden states too, vectors."""
        if turn.speaker is None or turn.layout is None:
            return
        opening, closing = turn.layout.opening(turn.header, turn.speaker), turn.layout.closing()
        texts: list[Any] = [*opening, *closing]
        if turn.layout.text_by_hidden:
            texts = list(self.runner.project_text(texts))
        turn.opening, turn.closing = texts[: len(opening)], texts[len(opening) :]
        self._padding = turn.text(PAD)

    def _prefix(self, turn: Turn, speaker: int) -> Tensor:
        """The Talker's inputs between its prompt and the first frame [P, Di]."""
        assert self.layout is not None
        names = list(dict.fromkeys(self.layout.prefix_texts))  # each text is projected once
        text = self.runner.text_vectors([turn.text(name) for name in names])
        slots = text[[names.index(name) for name in self.layout.prefix_texts]]
        codes = torch.tensor(self.layout.prefix_codes(speaker), device=text.device)
        talker = self.model.require("talker")
        return talker.prefix_vectors(slots, talker.codec_embedding(codes))

    def _write_frames(self) -> None:
        """Read the frames that wait for their text, then draw the next frame of every row that can."""
        following = [None if t is None or not t.reads_frame else t.next_text() for t in self.turns]
        reads = [text is not None for text in following]
        for turn, read in zip(self.turns, reads):
            if turn is not None and read:
                turn.frame_waits = False
        draws = [t is not None and t.wants_frame for t in self.turns]
        if not any(reads) and not any(draws):
            return
        assert self.layout is not None
        ends = self.layout.stop_codes
        sounds = [draw and t is not None and t.codec is IN_RUNNER for draw, t in zip(draws, self.turns)]
        texts = [self._padding if t is None else t for t in following]
        frame = self.runner.frame(texts, reads, draws, sounds, self.sampling[1:])
        for row, turn in enumerate(self.turns):
            if frame is not None and turn is not None and draws[row]:
                turn.take_frame(frame.codes[row], frame.first[row], ends)
                if sounds[row] and frame.wave is not None and frame.first[row] not in ends:
                    turn.waves.append(frame.wave[row])

    def note_times(self, turn: Turn) -> None:
        """What each stage has taken since the turn began; what is in none of them is preprocessing."""
        elapsed = time.perf_counter() - turn.started
        for name, seconds in self.seconds.items():
            if (spent := seconds - turn.spent_before.get(name, 0.0)) > 0:
                turn.timing[name] = spent
        turn.timing["preprocessing"] = max(0.0, elapsed - sum(turn.timing.values()))

    # reading prompts

    def read_batch(self, prompt: Prompt) -> Tensor:
        """Read the prompts of all rows, which are empty -> hidden states [B, T, D]."""
        state = self.text
        out = self.model.require("thinker")(
            prompt.embeds, prompt.positions, state.decoder, taps=prompt.taps, lengths=prompt.lengths, logits="last"
        )
        state.decoder.next_position.copy_(prompt.next_position)
        state.logits.copy_(out.logits[:, 0])
        for row in range(len(self.turns)):
            state.seen[row, prompt.ids[row, : prompt.lengths[row]]] = True
        return out.hidden

    def read_text(
        self,
        row: int,
        ids: Sequence[int],
        embeds: Tensor,
        positions: Tensor,
        taps: Tensor | None = None,
        next_position: float | None = None,
    ) -> Tensor:
        """Read a piece of one row's prompt: embeds [T, D], positions [3, T], taps [n, T, D] -> hidden [T, D]."""
        state, thinker = self.text, self.model.require("thinker")
        state.decoder.cache.reserve(len(ids))
        view = state.decoder.rows(row, row + 1)
        out = thinker(
            embeds[None], positions[:, None], view, taps=None if taps is None else taps[:, None], logits="last"
        )
        state.decoder.cache.adopt(row, view.cache)
        state.logits[row] = out.logits[0, 0]
        state.seen[row, torch.tensor(list(ids), device=state.seen.device)] = True
        if next_position is not None:
            state.decoder.next_position[row] = next_position
        return out.hidden[0]

    def read_speech(self, row: int, embeds: Tensor, positions: Tensor) -> None:
        """Read a piece of one row's Talker prompt: embeds [T, D], positions [3, T]."""
        assert self.speech is not None
        state = self.speech
        state.decoder.cache.reserve(len(embeds))
        view = state.decoder.rows(row, row + 1)
        out = self.model.require("talker")(embeds[None], positions[:, None], view)
        state.decoder.cache.adopt(row, view.cache)
        state.logits[row], state.hidden[row] = out.logits[0, -1], out.hidden[0, -1]

    def clear(self, row: int) -> None:
        """Forget all that a row has read. No turn may be running in it."""
        assert self.turns[row] is None
        for state in (self.text, self.speech):
            if state is not None:
                state.decoder.cache.truncate(row, 0)
                state.seen[row] = False

    @torch.no_grad()
    def copy_row(self, row: int, other: Rows, to: int) -> None:
        """Copy what a row has read into an empty row `to` of `other`. No turn may be running in either."""
        assert self.turns[row] is None and other.turns[to] is None
        for own, new in ((self.text, other.text), (self.speech, other.speech)):
            if own is None or new is None:
                continue
            tokens, source, target = own.decoder.cache.lengths[row], own.decoder.cache, new.decoder.cache
            target.truncate(to, 0)
            target.reserve(tokens)
            target.keys[:, to, :, :tokens] = source.keys[:, row, :, :tokens]
            target.values[:, to, :, :tokens] = source.values[:, row, :, :tokens]
            target.grow(to, tokens)
            new.seen[to] = own.seen[row]

    @property
    def sampling(self) -> tuple[RowSampling, RowSampling, RowSampling]:
        """The draws of text, codebook 0 and residual codes for the turns that run now."""
        if self._samplings is None:
            seeds = torch.tensor([0 if t is None else t.seed for t in self.turns], device=self.model.device)
            columns = [
                (t.text_sampling, t.code_sampling, t.residual_sampling) if t is not None else (GREEDY,) * 3
                for t in self.turns
            ]
            streams = (TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM)
            text, codes, residual = (RowSampling.of(c, seeds, s) for c, s in zip(zip(*columns), streams))
            self._samplings = (text, codes, residual)
        return self._samplings
