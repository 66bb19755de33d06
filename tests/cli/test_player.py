"""Playing a reply: all of it in order, how much of it was heard, silence at once."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from talking import SoundDevice

from omni import AudioChunk
from omni.cli.player import Player

RATE = 24000


class SlowDevice(SoundDevice):
    """Takes pieces only as the test lets it."""

    def __init__(self, latency: float = 0.0) -> None:
        super().__init__()
        self.latency = latency
        self.may_take, self.took = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, samples: np.ndarray) -> None:
        self.may_take.acquire()
        super().write(samples)
        self.took.release()

    def take(self, pieces: int) -> None:
        for _ in range(pieces):
            self.may_take.release()
            self.took.acquire()


def chunk(samples: torch.Tensor) -> AudioChunk:
    return AudioChunk(0, samples, RATE, 0)


def test_all_is_played_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SoundDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    player, wave = Player(RATE), torch.arange(1001.0)
    for piece in wave.split((1, 600, 400)):
        player(chunk(piece))
    player.finish()
    assert device.samples == wave.tolist() and device.calls == ["start", "stop", "close"]
    assert player.played_samples == 1001 and player.played_ms == pytest.approx(1001 / 24) and player.error is None
    player.finish()
    player.cut()
    assert player.played_samples == 1001


def test_a_cut_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The piece that the device is taking is its last, and what it still holds was not heard."""
    now = [10.0]
    device = SlowDevice(latency=0.03)
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    player = Player(RATE, clock=lambda: now[0])
    assert player.played_samples == 0
    player(chunk(torch.ones(RATE)))
    device.take(4)
    player.cut()
    device.may_take.release()
    player.finish()
    taken = len(device.samples)
    assert taken in (4 * 480, 5 * 480) and device.calls == ["start", "abort", "close"]
    assert player.played_samples == taken - 720, "30 ms were still in the device"
    now[0] += 5
    assert player.played_samples == taken - 720


def test_what_the_device_holds_is_heard_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    device = SlowDevice(latency=0.05)
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    player = Player(RATE, clock=lambda: now[0])
    player(chunk(torch.ones(960)))
    player(chunk(torch.ones(480)))
    device.take(2)
    while player._written < 960:  # the thread notes it after the device took it
        pass
    assert player.played_samples == 0
    now[0] += 0.02
    assert player.played_samples == 960 - 720
    now[0] += 1
    assert player.played_samples == 960
    player.cut()
    device.may_take.release()
    player.finish()


def test_a_cut_while_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SoundDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)  # type: ignore[arg-type]
    player = Player(RATE)
    player.cut()
    player.finish()
    assert player.played_samples == 0 and device.calls == ["start", "abort", "close"]


def test_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the playing, not the program; nobody waits for ever."""

    class Lost(SoundDevice):
        def write(self, samples: np.ndarray) -> None:
            raise OSError("unplugged")

    monkeypatch.setitem(sys.modules, "sounddevice", Lost())  # type: ignore[arg-type]
    player = Player(RATE)
    player(chunk(torch.ones(1000)))
    player.finish()
    assert str(player.error) == "unplugged" and player.played_samples == 0
