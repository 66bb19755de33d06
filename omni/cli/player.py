"""Sound played while more of it is made: what of it has been heard, and how to fall silent at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from omni.generation.events import AudioChunk

if TYPE_CHECKING:
    from rich.console import Console

PIECE_S = 0.02  # the device gets sound in pieces of this length, so that `cut` is heard soon


class Player:
    """Plays the sound of one reply: a thread hands it to the device. Raises what `sounddevice` raises.

    error: what ended the playing early, such as a device that was unplugged.
    """

    def __init__(self, sample_rate: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        import sounddevice

        self._stream = sounddevice.OutputStream(samplerate=sample_rate, channels=1, dtype="float32")
        self._stream.start()
        self._rate_hz, self._piece, self._clock = sample_rate, max(1, round(PIECE_S * sample_rate)), clock
        self._waiting: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._written, self._written_at, self._cut = 0, 0.0, False
        self.error: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="omni-player", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._cut and (samples := self._waiting.get()) is not None:
                self._play(samples)
            if self._cut:
                self._written = self.played_samples
                self._stream.abort()
            else:
                self._stream.stop()  # returns when the device has played what it holds
            self._written_at = -float("inf")
        except Exception as error:
            self.error = error
        finally:
            self._over.set()

    def _play(self, samples: Tensor) -> None:
        for piece in samples.split(self._piece):
            if self._cut:
                return
            self._stream.write(piece[:, None].numpy())
            self._written += len(piece)
            self._written_at = self._clock()

    def __call__(self, chunk: AudioChunk) -> None:
        """Play a chunk after those before it; returns at once."""
        self._waiting.put(chunk.samples)

    @property
    def played_samples(self) -> int:
        """How many samples have been heard: those that the device took, without those that it still holds."""
        held_s = self._stream.latency - (self._clock() - self._written_at)
        return max(0, self._written - max(0, round(held_s * self._rate_hz))) if held_s > 0 else self._written

    @property
    def played_ms(self) -> float:
        """How much has been heard, in milliseconds."""
        return 1000 * self.played_samples / self._rate_hz

    def cut(self) -> None:
        """Fall silent; returns at once, and may be called by a signal handler."""
        self._cut = True
        self._waiting.put(None)

    def finish(self) -> None:
        """Wait until all has been played, or until `cut` has silenced it, and give the device back; again: nothing."""
        self._waiting.put(None)
        while not self._over.wait(0.1):  # with a limit, so that Ctrl-C comes through on every system
            pass
        self._thread.join()
        self._stream.close()


def open_player(sample_rate: int, progress: Console) -> Player | None:
    """A player, or None and one line that says why there is none."""
    try:
        return Player(sample_rate)
    except ModuleNotFoundError:
        reason = "the package sounddevice is not installed (pip install 'thinker-talker[play]')"
    except Exception as error:  # PortAudio missing, no device, a device that refuses the rate
        reason = "no sound device answers (" + " ".join(str(error).split()) + ")"
    progress.out(f"nothing is played: {reason}", highlight=False)
    return None
