"""Conversations side by side: the states of all parts for B rows, and the tick that moves every row one step.

Rows are independent: each has its own positions, lengths, samplings and seeds, and stands still while others move. A
tick is at most one speech frame a row: the Thinker draws what is needed, the Talker reads the pending frame and draws
the next one, and the codec decodes the chunks that are due.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.generation.events import Event, TextDelta, ToolCall, TurnEnd
from omni.generation.prompt import Prompt
from omni.generation.reply import ANSWER, MARKER, REASONING
from omni.generation.runner import Runner
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, TEXT_STREAM, RowSampling
from omni.generation.sound import decode_sound
from omni.generation.text_options import token_logprob
from omni.generation.tool_calls import Piece
from omni.generation.turn import IN_RUNNER, SPEECH_RUNS, SPEECH_WAITS, Turn
from omni.generation.turn_request import GREEDY
from omni.parts import ModelParts
from omni.talker.layout import PAD

STEP_STAGES = ("thinker", "talker", "residual_codes", "codec", "frame")  # what every frame of a running reply costs


class SavedRow(NamedTuple):
    """All that a row has read, on the host: tensors by name of the Thinker's state and, if there is one, the Talker's.

    keys, values [L, Hkv, n, hd] of the n tokens in the cache; seen [V], logits [V], next_position [].
    """

    states: tuple[dict[str, Tensor], ...]


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

    @torch.no_grad()
    def begin(
        self, row: int, turn: Turn, started: float | None = None, seconds_before: dict[str, float] | None = None
    ) -> None:
        """Start a turn in a row whose prompt has been read.

        started, seconds_before: when it began and the seconds of each stage then, if that was before this call.
        """
        assert self.turns[row] is None, "a turn is running in this row"
        self.turns[row] = turn
        if self.model.code2wav is None:
            turn.times = None
        self.runner.steps.begin_turn()
        self._samplings = None
        self.text.steps[row] = 0
        if self.speech is not None:
            self.speech.steps[row] = 0
            assert self.runner.seen_at_first is not None
            self.speech.seen[row] = self.runner.seen_at_first
            self._lay_out_texts(turn)
        turn.started = turn.started if started is None else started
        turn.seconds_before = dict(self.seconds) if seconds_before is None else seconds_before

    def release(self, row: int) -> Turn | None:
        """Take the turn out of a row."""
        turn = self.turns[row]
        self.put(row, None)
        return turn

    def running(self) -> list[tuple[int, Turn]]:
        """Rows with a turn that is not over."""
        return [(row, turn) for row, turn in enumerate(self.turns) if turn is not None and not turn.over]

    @torch.no_grad()
    def tick(self) -> list[Event]:
        """One step of every running row; what happened, row by row in order of time."""
        with self.model.decoding_threads():
            return self._step()

    def _step(self) -> list[Event]:
        events: list[Event] = []
        self._decode_text(events)
        if self.speech is not None:
            self._prefill_prefixes()
            self._decode_frames()
            decode_sound(self.runner, self.running, events)
        for row, turn in self.running():
            if turn.complete:
                if rest := turn.text.flush():
                    events.append(TextDelta(row, rest, ()))
                events.append(self.end(row, turn))
        return events

    def raise_errors(self) -> None:
        """Raise what ended a turn by an error: a caller's function of the logits, or a malformed tool call.

        `tick` has ended that turn alone.
        """
        for turn in self.turns:
            if turn is not None and turn.error is not None:
                raise turn.error

    def end(self, row: int, turn: Turn, reason: str | None = None) -> TurnEnd:
        """The last event of a row, with the times of the whole turn."""
        if turn.sound.samples == 0:
            turn.record_times(self.seconds)
        codec = self.model.code2wav
        if turn.sound.samples and codec is not None:
            total = time.perf_counter() - turn.started
            steps = sum(self.seconds.get(name, 0.0) - turn.seconds_before.get(name, 0.0) for name in STEP_STAGES)
            turn.timing["rtf"] = total * codec.sample_rate / turn.sound.samples
            turn.timing["rtf_step"] = steps / len(turn.speech.codes) * codec.frame_rate
        return turn.end(row, reason)

    # text

    def _decode_text(self, events: list[Event]) -> None:
        drawn = [0] * len(self.turns)
        while any(active := [t is not None and t.wants_token(n) for t, n in zip(self.turns, drawn)]):
            first = any(t is not None and a and not t.text.ids for t, a in zip(self.turns, active))
            with self.stage("thinker_first_token" if first else "thinker"):
                log_probs = self._shape_logits(active, events)
                if not any(active):
                    continue
                unread, kinds = [False] * len(active), [""] * len(active)
                for row, token in enumerate(self.runner.draw_token(self.sampling[0], active)):
                    turn = self.turns[row]
                    if turn is not None and active[row]:
                        drawn[row] += 1
                        kinds[row], text, unread[row] = turn.append_token(token)
                        likely = None
                        if (own := log_probs.get(row)) is not None:
                            likely = (token_logprob(own, token, turn.request.options.logprobs or 0),)
                            turn.text.logprobs += likely
                        begin, reasoning = turn.time_text(text, kinds[row]), kinds[row] == REASONING
                        events.append(TextDelta(row, text, (token,), reasoning, likely, begin))
                        if turn.request.tools:
                            self._note_calls(row, turn, events)
                            unread[row] &= not turn.over
                        if turn.text.rest and turn.request.text_by_hidden and turn.speech.expected:
                            self._read_rest(row, turn)
                if any(unread):
                    self._read_tokens(unread, kinds)

    def _shape_logits(self, active: list[bool], events: list[Event]) -> dict[int, Tensor]:
        """Change the logits of the rows that ask for it; the model's own log-probabilities where they are wanted.

        A row whose function raises ends, and is active no more.
        """
        log_probs: dict[int, Tensor] = {}
        for row, turn in enumerate(self.turns):
            if turn is None or not active[row]:
                continue
            options, reply, logits = turn.request.options, turn.text.ids, self.text.logits[row]
            if options.logprobs is not None:
                log_probs[row] = logits.float().log_softmax(-1)
            if options.shapes(reply):
                try:
                    logits.copy_(options.shape(logits, turn.request.prompt_ids, reply, turn.request.stop_ids))
                except BaseException as error:  # the caller's, and no matter of the other rows
                    turn.error, active[row] = error, False
                    events.append(self.end(row, turn, "error"))
        return log_probs

    def _read_tokens(self, unread: list[bool], kinds: list[str]) -> None:
        """Let the Thinker read what was drawn, and the turns have its vectors where text enters by hidden states."""
        self.runner.read_token(unread)
        if self.layout is not None and self.layout.text_by_hidden:
            for turn, vector, kind, read in zip(self.turns, self.runner.reply_vectors(len(unread)), kinds, unread):
                if turn is not None and read:
                    turn.append_vector(vector.clone(), kind)

    def _read_rest(self, row: int, turn: Turn) -> None:
        """Let the Thinker read what stays of the token in which a stop string begins, in place of what was cut off."""
        cache, text = self.text.decoder.cache, turn.text
        ids = torch.tensor(text.rest, device=self.model.device)
        surplus = cache.lengths[row] - turn.request.prompt_tokens - text.read
        cache.truncate(row, turn.request.prompt_tokens + text.read)
        positions = self.text.decoder.next_position[row] - surplus + torch.arange(len(ids), device=ids.device)
        embeds = self.model.require("thinker").embed_tokens(ids)
        hidden = self.prefill_thinker(row, text.rest, embeds, positions.expand(3, -1))
        for i, vector in enumerate(self.model.require("talker").text_vectors(embeds, hidden)):
            turn.append_vector(vector, MARKER if i < text.unspoken else ANSWER)
        text.read += len(ids)

    def _note_calls(self, row: int, turn: Turn, events: list[Event]) -> None:
        """Tell of the calls that have become complete; a malformed one ends the turn."""
        calls, turn.text.calls = turn.text.calls, []
        events += [ToolCall(row, f"call_{uuid.uuid4().hex}", *call) for call in calls]
        if turn.error is not None:
            events.append(self.end(row, turn, "error"))
        elif turn.request.text_by_hidden and turn.speech.expected:
            while torn := turn.torn:
                self._read_torn(row, turn, [piece for piece in torn if piece.index == torn[0].index])

    def _read_torn(self, row: int, turn: Turn, pieces: list[Piece]) -> None:
        """Let the Thinker read texts that share one id of the reply with a call, in place of that id, for the Talker
        alone: what the row had read before, it has read after."""
        state, cache, start = self.text, self.text.decoder.cache, turn.request.prompt_tokens + pieces[0].index
        length, kept = cache.lengths[row], (state.logits, state.seen, state.decoder.next_position)
        slots = [each[:, row, :, start:length].clone() for each in (cache.keys, cache.values)]
        values = [each[row].clone() for each in kept]
        cache.truncate(row, start)
        ids = torch.tensor([piece.token for piece in pieces], device=self.model.device)
        positions = state.decoder.next_position[row] - (length - start) + torch.arange(len(ids), device=ids.device)
        embeds = self.model.require("thinker").embed_tokens(ids)
        hidden = self.prefill_thinker(row, ids.tolist(), embeds, positions.expand(3, -1))
        turn.speak_torn(pieces, [v.clone() for v in self.model.require("talker").text_vectors(embeds, hidden)])
        cache.grow(row, length)
        for each, slot in zip((cache.keys, cache.values), slots):
            each[:, row, :, start:length] = slot
        for each, value in zip(kept, values):
            each[row] = value

    # speech

    def _prefill_prefixes(self) -> None:
        """Let the Talker read the prefix once the first word is there."""
        assert self.speech is not None and self.layout is not None
        for row, turn in self.running():
            text, speech, request = turn.text, turn.speech, turn.request
            if speech.state != SPEECH_WAITS or not (speech.spoken or text.reason):
                continue
            if not speech.spoken or request.frame_limit < 1:  # nothing to speak
                speech.stop("stop" if not speech.spoken else "max_frames")
                continue
            assert request.speaker is not None
            with self.stage("talker_first_code"):
                prefix = self._prefix(turn, request.speaker)
                positions = self.layout.prefix_positions(request.prompt_end).expand(3, -1)
                self.prefill_talker(row, prefix, positions.to(prefix.device))
                self.speech.decoder.next_position[row] = self.layout.frame_position(request.prompt_end)
                speech.state = SPEECH_RUNS

    def _lay_out_texts(self, turn: Turn) -> None:
        """Give a spoken turn the texts around its reply: ids or, where text enters by hidden states too, vectors."""
        request, layout = turn.request, turn.request.layout
        if request.speaker is None or layout is None:
            return
        opening, closing = layout.opening(request.header, request.speaker), layout.closing()
        texts: list[Any] = [*opening, *closing]
        if layout.text_by_hidden:
            texts = list(self.runner.project_text(texts))
        turn.speech.opening, turn.speech.closing = texts[: len(opening)], texts[len(opening) :]
        self._padding = turn.speech.text(PAD)

    def _prefix(self, turn: Turn, speaker: int) -> Tensor:
        """The Talker's inputs between its prompt and the first frame [P, Di]."""
        assert self.layout is not None
        names = list(dict.fromkeys(self.layout.prefix_texts))  # each text is projected once
        text = self.runner.text_vectors([turn.speech.text(name) for name in names])
        slots = text[[names.index(name) for name in self.layout.prefix_texts]]
        codes = torch.tensor(self.layout.prefix_codes(speaker), device=text.device)
        talker = self.model.require("talker")
        return talker.prefix_vectors(slots, talker.codec_embedding(codes))

    def _decode_frames(self) -> None:
        """Read the pending frames whose text is there, then draw the next frame of every row that can."""
        following = [None if t is None else t.next_text() for t in self.turns]
        reads = [text is not None for text in following]
        for turn, read in zip(self.turns, reads):
            if turn is not None and read:
                turn.speech.pending = False
        draws = [t is not None and t.wants_frame for t in self.turns]
        if not any(reads) and not any(draws):
            return
        sounds = [draw and t is not None and t.sound.codec is IN_RUNNER for draw, t in zip(draws, self.turns)]
        texts = [self._padding if t is None else t for t in following]
        frame = self.runner.frame(texts, reads, draws, sounds, self.sampling[1:])
        for row, turn in enumerate(self.turns):
            if frame is not None and turn is not None and draws[row]:
                speaks = turn.speech.append(frame.codes[row], frame.first[row])
                if speaks and sounds[row] and frame.wave is not None:
                    turn.sound.waves.append(frame.wave[row])

    # prefill

    def prefill_batch(self, prompt: Prompt) -> Tensor:
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

    def prefill_thinker(
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
        taps = None if taps is None else taps[:, None]
        with self.model.reading_threads(len(ids)):
            out = thinker(embeds[None], positions[:, None], view, taps=taps, logits="last")
        state.decoder.cache.adopt(row, view.cache)
        state.logits[row] = out.logits[0, 0]
        state.seen[row, torch.tensor(list(ids), device=state.seen.device)] = True
        if next_position is not None:
            state.decoder.next_position[row] = next_position
        return out.hidden[0]

    def prefill_talker(self, row: int, embeds: Tensor, positions: Tensor) -> None:
        """Read a piece of one row's Talker prompt: embeds [T, D], positions [3, T]."""
        assert self.speech is not None
        state = self.speech
        state.decoder.cache.reserve(len(embeds))
        view = state.decoder.rows(row, row + 1)
        with self.model.reading_threads(len(embeds)):
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
        """Copy all that a row has read into an empty row `to` of `other`, where no turn may be running."""
        assert other.turns[to] is None
        for own, new in ((self.text, other.text), (self.speech, other.speech)):
            if own is None or new is None:
                continue
            tokens, source, target = own.decoder.cache.lengths[row], own.decoder.cache, new.decoder.cache
            target.truncate(to, 0)
            target.reserve(tokens)
            target.keys[:, to, :, :tokens] = source.keys[:, row, :, :tokens]
            target.values[:, to, :, :tokens] = source.values[:, row, :, :tokens]
            target.grow(to, tokens)
            new.seen[to], new.logits[to] = own.seen[row], own.logits[row]
            new.decoder.next_position[to] = own.decoder.next_position[row]

    @torch.no_grad()
    def save_row(self, row: int) -> SavedRow:
        """A copy on the host of all that a row has read, from which `load_row` goes on bit for bit."""
        saved: list[dict[str, Tensor]] = []
        for state in self._states():
            tokens, cache = state.decoder.cache.lengths[row], state.decoder.cache
            own = {"keys": cache.keys[:, row, :, :tokens], "values": cache.values[:, row, :, :tokens]}
            own |= {"seen": state.seen[row], "logits": state.logits[row]}
            own |= {"next_position": state.decoder.next_position[row]}
            saved.append({name: value.to("cpu", copy=True) for name, value in own.items()})
        return SavedRow(tuple(saved))

    @torch.no_grad()
    def load_row(self, row: int, saved: SavedRow) -> None:
        """Put what `save_row` has copied into an empty row, where no turn may be running."""
        assert self.turns[row] is None
        for state, own in zip(self._states(), saved.states):
            cache, tokens = state.decoder.cache, own["keys"].shape[2]
            cache.truncate(row, 0)
            cache.reserve(tokens)
            cache.keys[:, row, :, :tokens] = own["keys"].to(cache.keys.device)
            cache.values[:, row, :, :tokens] = own["values"].to(cache.values.device)
            cache.grow(row, tokens)
            for whole, name in ((state.seen, "seen"), (state.logits, "logits")):
                whole[row] = own[name].to(whole.device)
            state.decoder.next_position[row] = own["next_position"].to(state.decoder.next_position.device)

    def _states(self) -> list[Any]:
        return [state for state in (self.text, self.speech) if state is not None]

    @torch.no_grad()
    def repeated(self, times: int) -> Rows:
        """Rows in which each of these stands so many times, one after the other, with all that it has read."""
        rows = Rows(self.model, len(self.turns) * times, max(256, self.text.decoder.cache.longest + 1))
        rows.seconds.update(self.seconds)
        for to in range(len(rows.turns)):
            self.copy_row(to // times, rows, to)
        return rows

    def mark_seen(self, row: int, ids: Sequence[int]) -> None:
        """Let exactly these tokens count as seen in a row."""
        seen = self.text.seen
        seen[row] = False
        seen[row, torch.tensor(list(ids), dtype=torch.int64, device=seen.device)] = True

    def put(self, row: int, turn: Turn | None) -> None:
        """Let this turn be the one of a row, or none."""
        self.turns[row], self._samplings = turn, None

    @property
    def sampling(self) -> tuple[RowSampling, RowSampling, RowSampling]:
        """The draws of text, codebook 0 and residual codes for the turns that run now."""
        if self._samplings is None:
            requests = [None if turn is None else turn.request for turn in self.turns]
            seeds = torch.tensor([0 if r is None else r.seed for r in requests], device=self.model.device)
            columns = [
                (r.text_sampling, r.code_sampling, r.residual_sampling) if r is not None else (GREEDY,) * 3
                for r in requests
            ]
            streams = (TEXT_STREAM, CODE_STREAM, RESIDUAL_STREAM)
            text, codes, residual = (RowSampling.of(c, seeds, s) for c, s in zip(zip(*columns), streams))
            self._samplings = (text, codes, residual)
        return self._samplings
