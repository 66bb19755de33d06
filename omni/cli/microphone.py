"""Sound from a microphone, handed on while it is recorded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK_S = 0.1  # a push for each block of this length


def record(push: Callable[[Tensor, int], None], wait: Callable[[], object]) -> float:
    """Record until `wait` returns, and hand each block to `push(samples [n], rate_hz)` -> seconds recorded.

    `push` runs in a thread of its own: what is recorded while it works waits, and all of it is pushed before this
    returns. If `wait` raises (Ctrl-C), so does this, and nothing is pushed any more. Raises what `push` raises,
    ValueError without the package sounddevice, OSError if no microphone answers.
    """
    blocks: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()

    def hear(data: Any, *_: Any) -> None:  # called by the sound card's thread, which reuses `data`
        blocks.put(torch.from_numpy(data[:, 0].copy()))

    stream, rate_hz = _open(hear)
    pushing = _Pushing(blocks, lambda block: push(block, rate_hz))
    try:
        stream.start()
        wait()
    except BaseException:
        pushing.given_up = True
        raise
    finally:
        stream.stop()
        stream.close()
        blocks.put(None)
        pushing.thread.join()
    if pushing.error is not None:
        raise pushing.error
    return pushing.samples / rate_hz


class _Pushing:
    """The thread that pushes the blocks until None comes."""

    def __init__(self, blocks: queue.SimpleQueue[Tensor | None], push: Callable[[Tensor], None]) -> None:
        self.samples, self.given_up = 0, False
        self.error: Exception | None = None
        self._blocks, self._push = blocks, push
        self.thread = threading.Thread(target=self._work, name="omni-microphone", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self.error is not None or self.given_up:
                continue
            try:
                self._push(block)
                self.samples += len(block)
            except Exception as error:
                self.error = error


def _open(hear: Callable[..., None]) -> tuple[Any, int]:
    """The default microphone at its own rate."""
    try:
        import sounddevice

        rate_hz = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        stream = sounddevice.InputStream(
            samplerate=rate_hz, channels=1, dtype="float32", blocksize=round(BLOCK_S * rate_hz), callback=hear
        )
    except ModuleNotFoundError:
        raise ValueError(
            "a microphone needs the package sounddevice (pip install 'thinker-talker[play]'); "
            "a recording can be given as a file: /audio F"
        ) from None
    except Exception as error:  # PortAudio missing, no device, no permission
        raise OSError(
            f"no microphone answers ({' '.join(str(error).split())}); a recording can be given as a file: /audio F"
        ) from error
    return stream, rate_hz
