"""From codes to sound while a turn runs: the chunks that are due, rows of equal length together.

What a codec decoder has to do, and which rows can be decoded together, says `omni.code2wav.contract`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omni.code2wav.contract import CodecDecoder, CodecState
from omni.generation.events import AudioChunk, Event
from omni.generation.runner import Runner
from omni.generation.sampling import SOUND_STREAM, stream_seed
from omni.generation.turn import IN_RUNNER, SPEECH_OVER, SPEECH_RUNS, Turn
from omni.generation.turn_request import TurnRequest
from omni.layers.state import join_rows, split_rows

_Due = list[tuple[int, Turn]]  # rows and their turns


def decode_sound(runner: Runner, running: Callable[[], _Due], events: list[Event]) -> None:
    """Decode what is due in all running rows, which `running` tells."""
    due: dict[tuple[Any, ...], _Due] = {}
    for row, turn in running():
        if runner.model.code2wav is None:
            turn.sound.frames = len(turn.speech.codes)
        frames = turn.sound.chunk_due(turn.speech)
        if frames:
            s, state = turn.request.streaming, turn.sound.codec
            alike = (
                frames,
                state is None,
                state.received if isinstance(state, CodecState) else 0,
                s.codec_schedule,
                s.codec_ode,
            )
            due.setdefault(alike, []).append((row, turn))
    for (frames, *_), group in due.items():
        with runner.times.stage("codec"):
            waves = _decode(runner, group, frames)
        for (row, turn), wave in zip(group, waves):
            _emit(runner, row, turn, wave, events)
    for row, turn in running():
        speech, sound = turn.speech, turn.sound
        if sound.unfinished and speech.state == SPEECH_OVER and sound.frames == len(speech.codes):
            with runner.times.stage("codec"):
                rest = runner.model.require("code2wav").finish(sound.codec)[0].float().cpu()
            sound.unfinished = False
            _emit(runner, row, turn, rest, events)


def init_codec(codec: CodecDecoder, request: TurnRequest) -> Any:
    """The codec's state for one turn."""
    if not codec.needs_voice:
        return codec.init_state(1)
    s, seed = request.streaming, stream_seed(request.seed, SOUND_STREAM)
    return codec.init_state(1, request.voice, seed=seed, schedule=s.codec_schedule, ode=s.codec_ode)


def _decode(runner: Runner, group: _Due, frames: int) -> list[Tensor]:
    """The next so many frames of each turn -> its samples [m] on the CPU."""
    codec = runner.model.require("code2wav")
    own = [(row, turn) for row, turn in group if turn.sound.codec is not IN_RUNNER]
    states = [t.sound.codec if t.sound.codec is not None else init_codec(codec, t.request) for _, t in own]
    codes = [torch.stack(t.speech.codes[t.sound.frames : t.sound.frames + frames], dim=1) for _, t in own]
    if len(states) > 1 and all(isinstance(state, CodecState) for state in states):
        joined = join_rows(states)
        waves = list(runner.decode(torch.stack(codes), joined).float().cpu())
        states = split_rows(joined, len(states))
    else:  # a codec of one's own keeps its state to itself
        waves = [runner.decode(c[None], state)[0].float().cpu() for c, state in zip(codes, states)]
    decoded = {row: wave for (row, _), wave in zip(own, waves)}
    for (row, turn), state in zip(own, states):
        turn.sound.codec, turn.sound.unfinished = state, True
        if runner.decodes_sound and state.started and turn.sound.frames + frames == len(turn.speech.codes):
            runner.adopt_sound(row, state)
            turn.sound.codec, turn.sound.unfinished = IN_RUNNER, False  # a captured step holds nothing back
    out = []
    for row, turn in group:
        sound = turn.sound
        if row in decoded:
            wave = decoded[row]
        else:  # decoded as it was drawn
            wave, sound.waves = torch.cat(sound.waves[:frames]), sound.waves[frames:]
        sound.frames += frames
        sound.chunks += 1
        out.append(wave)
    return out


def _emit(runner: Runner, row: int, turn: Turn, wave: Tensor, events: list[Event]) -> None:
    """The event of decoded samples; none if there are none yet."""
    if not wave.numel():
        return
    sound, rate = turn.sound, int(runner.model.require("code2wav").sample_rate)
    if sound.samples == 0:
        turn.record_times(runner.times.seconds)
        turn.timing["first_audio"] = time.perf_counter() - turn.started
    if turn.times is not None:
        turn.times.hear(wave.numpy(), rate)
    events.append(AudioChunk(row, wave.clone(), rate, sound.samples))
    sound.record(wave.numel(), quiet=float(wave.abs().max()) < 1e-3)  # 60 dB below full scale
    _watch_silence(turn, rate)


def _watch_silence(turn: Turn, sample_rate: int) -> None:
    """End speech that has been silent for too long; what is left of it is dropped."""
    limit, speech, sound = turn.request.streaming.silence_s, turn.speech, turn.sound
    if limit is not None and sound.quiet > limit * sample_rate and speech.state == SPEECH_RUNS:
        speech.stop("silence")
        sound.frames, sound.unfinished = len(speech.codes), False
