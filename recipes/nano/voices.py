"""Synthetic voices: text spoken by flite or espeak-ng, at a speed and pitch, in a room, with noise.

The programs are needed while data is made, never to run the model. Sounds are float32 [n] in -1 .. 1.
"""

from __future__ import annotations

import functools
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from omni.encoders.resample import StreamingResampler

RATE_HZ = 16_000
ANSWER_VOICE = "slt"
SPEAKERS = {  # name -> program and its voice
    "slt": ("flite", "slt"),
    "awb": ("flite", "awb"),
    "kal": ("flite", "kal16"),
    "american": ("espeak-ng", "en-us"),
    "british": ("espeak-ng", "en-gb"),
    "scottish": ("espeak-ng", "en-gb-scotland"),
    "ann": ("espeak-ng", "en-us+f2"),
    "beth": ("espeak-ng", "en-gb+f4"),
    "carl": ("espeak-ng", "en-us+m3"),
    "dan": ("espeak-ng", "en-gb+m7"),
    "eve": ("espeak-ng", "en-us+f5"),
}
HELD_OUT_SPEAKERS = {"rms": ("flite", "rms"), "max": ("espeak-ng", "en-us+m1")}  # never heard in training
TRAINED_STRETCH = (0.85, 1.2)
HELD_OUT_STRETCH = (0.8, 0.84, 1.22, 1.28)  # durations that training does not have
_WORDS_A_MINUTE = 165  # of espeak-ng at stretch 1
_SILENCE = 0.01  # amplitude
_WORD_STRETCH = 0.85  # of words alone: they are longer than words in a sentence
_FRAME = 1920  # samples of a frame of codes at 24 kHz


@dataclass(frozen=True)
class Manner:
    """How a text is spoken. stretch: of durations; pitch: of the fundamental, 1 is the voice's own."""

    speaker: str
    stretch: float = 1.0
    pitch: float = 1.0


def random_manner(rng: random.Random, speakers: list[str], stretches: tuple[float, ...] = ()) -> Manner:
    """A speaker with a speed, one of `stretches` or any that training uses, and a pitch."""
    stretch = rng.choice(stretches) if stretches else rng.uniform(*TRAINED_STRETCH)
    return Manner(rng.choice(speakers), round(stretch, 3), round(rng.uniform(0.88, 1.14), 3))


def speak(text: str, manner: Manner) -> np.ndarray:
    """The text as sound at 16 kHz, silence at both ends cut off.

    Raises FileNotFoundError where flite or espeak-ng is not installed.
    """
    program, voice = (SPEAKERS | HELD_OUT_SPEAKERS)[manner.speaker]
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        if program == "flite":
            settings = ["--setf", f"duration_stretch={manner.stretch}"]
            command = ["flite", "-voice", voice, *settings, "-t", text, "-o", str(wav)]
        else:
            speed, pitch = round(_WORDS_A_MINUTE / manner.stretch), round(50 * manner.pitch)
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(wav), text]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{program} is not installed; on Debian: apt-get install flite espeak-ng"
            ) from error
        samples, rate_hz = soundfile.read(wav, dtype="float32")
    if rate_hz != RATE_HZ:
        samples = to_rate(samples, rate_hz, RATE_HZ)
    if program == "flite" and manner.pitch != 1:
        samples = _play_faster(samples, manner.pitch)
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def to_rate(samples: np.ndarray, rate_hz: int, target_hz: int) -> np.ndarray:
    """Samples [n] at another rate."""
    return _resampler(rate_hz, target_hz)(torch.from_numpy(samples)).numpy()


_resampler = functools.lru_cache(StreamingResampler)


def _play_faster(samples: np.ndarray, factor: float) -> np.ndarray:
    """Played `factor` times as fast: pitch and formants rise together, as of a smaller speaker."""
    places = np.arange(0, len(samples) - 1, factor)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def answer_sound(text: str) -> np.ndarray:
    """An answer in the model's voice at 24 kHz, word by word: every word has frames of 80 ms of its own, so the same
    word is always the same codes. 0.04 s of silence before it and 0.12 s behind."""
    words = [_word_alone(word) for word in text.split()]
    return np.concatenate([np.zeros(960, np.float32), *words, np.zeros(2880, np.float32)])


@functools.lru_cache(None)
def _word_alone(word: str) -> np.ndarray:
    spoken = to_rate(speak(word, Manner(ANSWER_VOICE, _WORD_STRETCH)), RATE_HZ, 24_000)
    spoken = spoken * (0.5 / max(np.abs(spoken).max(), 1e-3))
    return np.pad(spoken, (0, -len(spoken) % _FRAME))


def surround(spoken: np.ndarray, rng: random.Random) -> np.ndarray:
    """What a microphone hears: a room now and then, noise, some gain, silence before and after."""
    noise = np.random.default_rng(rng.getrandbits(32))
    sound = np.pad(spoken, (int(rng.uniform(0.05, 0.3) * RATE_HZ), int(rng.uniform(0.1, 0.3) * RATE_HZ)))
    if rng.random() < 0.3:
        sound = _in_room(sound, rng.uniform(0.05, 0.3), noise)
    level = float(np.sqrt(np.mean(sound**2))) * 10 ** (-rng.uniform(10, 40) / 20)
    hiss = noise.standard_normal(len(sound)).astype(np.float32)
    if rng.random() < 0.5:  # a low rumble instead
        hiss = np.convolve(hiss, np.ones(8, np.float32) / 8**0.5, "same")
    sound = sound + level * hiss
    return (sound * (rng.uniform(0.1, 0.9) / np.abs(sound).max())).astype(np.float32)


def _in_room(sound: np.ndarray, decay_s: float, noise: np.random.Generator) -> np.ndarray:
    """With the echoes of a room whose sound falls by 60 dB in about `decay_s`."""
    size = int(decay_s * RATE_HZ)
    echo = noise.standard_normal(size) * np.exp(-6.9 * np.arange(size) / size) * 0.08
    echo[0] = 1.0
    length = len(sound) + size
    return np.fft.irfft(np.fft.rfft(sound, length) * np.fft.rfft(echo, length), length)[: len(sound)].astype(np.float32)
