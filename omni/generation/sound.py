"""From codes to sound while a turn runs: the chunks that are due, rows of equal length together.

What a codec decoder has to do, and which rows can be decoded together, says `omni.code2wav.contract`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omni.code2wav.contract import CodecDecoder, CodecState
from omni.generation.events import AudioChunk, Event
from omni.generation.sampling import SOUND_STREAM, stream_seed
from omni.generation.turn import IN_RUNNER, SPEECH_OVER, SPEECH_RUNS, Turn
from omni.layers.state import join_rows, split_rows

if TYPE_CHECKING:
    from omni.generation.rows import Rows

_Due = list[tuple[int, Turn]]


def write_sound(rows: Rows, events: list[Event]) -> None:
    """Decode what is due in all running rows."""
    due: dict[tuple[Any, ...], _Due] = {}
    for row, turn in rows.running():
        if rows.model.code2wav is None:
            turn.decoded = len(turn.codes)
        frames = turn.chunk_due()
        if frames:
            s, received = turn.streaming, turn.codec.received if isinstance(turn.codec, CodecState) else 0
            alike = frames, turn.codec is None, received, s.codec_schedule, s.codec_ode
            due.setdefault(alike, []).append((row, turn))
    for (frames, *_), group in due.items():
        with rows.stage("codec"):
            waves = _decode(rows, group, frames)
        for (row, turn), wave in zip(group, waves):
            _hand_out(rows, row, turn, wave, events)
    for row, turn in rows.running():
        if turn.unfinished and turn.speech == SPEECH_OVER and turn.decoded == len(turn.codes):
            with rows.stage("codec"):
                rest = rows.model.require("code2wav").finish(turn.codec)[0].float().cpu()
            turn.unfinished = False
            _hand_out(rows, row, turn, rest, events)


def init_codec(codec: CodecDecoder, turn: Turn) -> Any:
    """The codec's state for one turn."""
    if not codec.needs_voice:
        return codec.init_state(1)
    s, seed = turn.streaming, stream_seed(turn.seed, SOUND_STREAM)
    return codec.init_state(1, turn.voice, seed=seed, schedule=s.codec_schedule, ode=s.codec_ode)


def _decode(rows: Rows, group: _Due, frames: int) -> list[Tensor]:
    """The next so many frames of each turn -> its samples [m] on the CPU."""
    codec, runner = rows.model.require("code2wav"), rows.runner
    waiting = [(row, turn) for row, turn in group if turn.codec is not IN_RUNNER]
    states = [turn.codec if turn.codec is not None else init_codec(codec, turn) for _, turn in waiting]
    codes = [torch.stack(turn.codes[turn.decoded : turn.decoded + frames], dim=1) for _, turn in waiting]
    if len(states) > 1 and all(isinstance(state, CodecState) for state in states):
        joined = join_rows(states)
        waves = list(runner.decode(torch.stack(codes), joined).float().cpu())
        states = split_rows(joined, len(states))
    else:  # a codec of one's own keeps its state to itself
        waves = [runner.decode(c[None], state)[0].float().cpu() for c, state in zip(codes, states)]
    decoded = {row: wave for (row, _), wave in zip(waiting, waves)}
    for (row, turn), state in zip(waiting, states):
        turn.codec, turn.unfinished = state, True
        if runner.decodes_sound and state.started and turn.decoded + frames == len(turn.codes):
            runner.adopt_sound(row, state)
            turn.codec, turn.unfinished = IN_RUNNER, False  # a step that can be captured holds nothing back
    out = []
    for row, turn in group:
        if row in decoded:
            wave = decoded[row]
        else:  # decoded as it was drawn
            wave, turn.waves = torch.cat(turn.waves[:frames]), turn.waves[frames:]
        turn.decoded += frames
        turn.chunks += 1
        out.append(wave)
    return out


def _hand_out(rows: Rows, row: int, turn: Turn, wave: Tensor, events: list[Event]) -> None:
    """The event of decoded samples; none if there are none yet."""
    if not wave.numel():
        return
    if turn.samples == 0:
        rows.note_times(turn)
        turn.timing["first_audio"] = time.perf_counter() - turn.started
    rate = int(rows.model.require("code2wav").sample_rate)
    events.append(AudioChunk(row, wave.clone(), rate, turn.samples))
    turn.samples += wave.numel()
    _watch_silence(turn, wave, rate)


def _watch_silence(turn: Turn, wave: Tensor, sample_rate: int) -> None:
    """End speech that has been silent for too long; what is left of it is dropped."""
    limit = turn.streaming.silence_s
    quiet = float(wave.abs().max()) < 1e-3  # 60 dB below full scale
    turn.quiet = turn.quiet + wave.numel() if quiet else 0
    if limit is not None and turn.quiet > limit * sample_rate and turn.speech == SPEECH_RUNS:
        turn.stop_speech("silence")
        turn.decoded, turn.unfinished = len(turn.codes), False
