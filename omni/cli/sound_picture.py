"""A picture of a sound: its waveform above its log-mel spectrogram, on one time axis. Drawn with Pillow alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from omni.encoders.mel import LogMel, hz_to_mel

WIDTH, LEFT, RIGHT = 1000, 64, 20  # pixels; the panels lie between the margins
TITLE, WAVE, GAP, MEL, BOTTOM = 36, 180, 28, 260, 48
NUM_MELS = 80
INK, GRID, TRACE = (40, 40, 48), (222, 222, 228), (38, 92, 168)
# Dark to bright, in even steps of lightness, so that a grey print reads the same.
_COLOURS = np.array(((8, 6, 24), (72, 18, 104), (162, 48, 104), (236, 106, 68), (252, 232, 164)), dtype=np.float32)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_sound_picture(path: Path, samples: Tensor, sample_rate: int, title: str) -> None:
    """Write a PNG of samples [n] (float, full scale -1 .. 1) at `sample_rate` in Hz; silence and [0] are fine."""
    samples = samples.detach().float().cpu().clamp(-1, 1)
    samples = torch.nn.functional.pad(samples, (0, max(0, 1024 - len(samples))))
    duration_s = len(samples) / sample_rate
    image = Image.new("RGB", (WIDTH, TITLE + WAVE + GAP + MEL + BOTTOM), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((LEFT, TITLE / 2), title, INK, ImageFont.load_default(16), anchor="lm")
    wave_top, mel_top = TITLE, TITLE + WAVE + GAP
    _draw_waveform(draw, font, samples.numpy(), wave_top, duration_s)
    image.paste(_spectrogram(samples, sample_rate), (LEFT, mel_top))
    _draw_mel_axis(draw, font, mel_top, sample_rate)
    _draw_time_axis(draw, font, mel_top + MEL, duration_s)
    image.save(path, format="PNG", optimize=True)


def _panel_width() -> int:
    return WIDTH - LEFT - RIGHT


def _draw_waveform(draw: ImageDraw.ImageDraw, font: Font, samples: np.ndarray, top: int, duration_s: float) -> None:
    """One vertical stroke a pixel column, from the lowest to the highest sample that falls into it."""
    peak = float(np.abs(samples).max())
    scale = _round_up(peak) if peak > 0 else 1.0  # a quiet sound is drawn enlarged; the axis says how much
    middle, half = top + WAVE / 2, WAVE / 2
    for value, label in ((scale, f"{scale:g}"), (0.0, "0"), (-scale, f"-{scale:g}")):
        y = middle - value / scale * half
        draw.line((LEFT, y, WIDTH - RIGHT, y), GRID)
        draw.text((LEFT - 8, y), label, INK, font, anchor="rm")
    for x, _ in _time_ticks(duration_s):
        draw.line((x, top, x, top + WAVE), GRID)
    edges = np.linspace(0, len(samples), _panel_width() + 1).astype(int)
    for column in range(_panel_width()):
        # One sample more than the column's own, so that neighbouring strokes join.
        part = samples[edges[column] : max(edges[column + 1], edges[column] + 1) + 1]
        low, high = float(part.min()) / scale, float(part.max()) / scale
        draw.line((LEFT + column, middle - high * half, LEFT + column, middle - low * half), TRACE)


def _spectrogram(samples: Tensor, sample_rate: int) -> Image.Image:
    """The panel's picture: time to the right, mel bins upwards, the loudest 80 dB from dark to bright."""
    levels = LogMel(sample_rate, n_fft=1024, hop_length=256, num_mels=NUM_MELS)(samples)
    span = float(levels.max() - levels.min())
    shade = ((levels - levels.min()) / span if span > 0 else torch.zeros_like(levels)).flip(0).numpy()
    steps = np.linspace(0, 1, len(_COLOURS))
    pixels = np.stack([np.interp(shade, steps, channel) for channel in _COLOURS.T], axis=-1)
    picture = Image.fromarray(pixels.round().astype(np.uint8), "RGB")
    return picture.resize((_panel_width(), MEL), Image.Resampling.BILINEAR)


def _draw_mel_axis(draw: ImageDraw.ImageDraw, font: Font, top: int, sample_rate: int) -> None:
    """Frequencies in kHz at their places on the mel scale."""
    nyquist_khz = sample_rate / 2000
    for khz in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        if khz < nyquist_khz:
            y = top + MEL * (1 - hz_to_mel(1000 * khz) / hz_to_mel(sample_rate / 2))
            draw.line((LEFT - 4, y, LEFT, y), INK)
            draw.text((LEFT - 8, y), f"{khz:g} kHz" if khz else "0", INK, font, anchor="rm")


def _draw_time_axis(draw: ImageDraw.ImageDraw, font: Font, y: int, duration_s: float) -> None:
    for x, label in _time_ticks(duration_s):
        draw.line((x, y, x, y + 4), INK)
        draw.text((x, y + 8), label, INK, font, anchor="mt")
    draw.text((LEFT + _panel_width() / 2, y + 28), "time in s", INK, font, anchor="mt")


def _time_ticks(duration_s: float) -> list[tuple[float, str]]:
    """About ten round times, as (x in pixels, label)."""
    step_s = _round_up(duration_s / 10)
    count = int(duration_s / step_s + 1e-9)
    return [(LEFT + _panel_width() * i * step_s / duration_s, f"{i * step_s:g}") for i in range(count + 1)]


def _round_up(value: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
