"""The order of the pictures and the sound of a video, for a whole clip and for pieces that arrive in any order.

Each track is a row of tokens, and each token has a key that never falls along its track. The tracks are merged by their
keys, the picture's token first where keys are equal (Qwen3-Omni and Qwen2.5-Omni, 2.2):

- token by token, a key is the token's time, in positions: one a sound token, `rate` of them a second;
- by chunks of time, it is the number of the token's chunk. Chunk k ends before the first token at or beyond k + 1 times
  its length. So after a gap of several chunks each chunk gets one token, until their number has caught up with the time
  (as released).

A token is decided when no token still to come can have a lower key; so a live track says how far it has come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from omni.config.positions import PositionRule


class Run(NamedTuple):
    """`tokens` tokens of one track, from token `first` on, which counts in its grid step or in the whole sound.

    chunk: theirs (0 without chunks). joins: whether they continue the piece of the run before. A piece is what stands
    together of one track, within a chunk where there are chunks; what follows the video begins after the largest
    position of the last piece.
    """

    video: bool
    first: int
    tokens: int
    chunk: int
    joins: bool


@dataclass
class Interleave:
    """Which of the tokens that were offered come next: `next_run` says, `take` goes on.

    steps: place and token count of the grid steps that wait; done: tokens of the first one that are in order already;
    sounds: sound tokens that wait; placed: those that are in order; next_place: no grid step still to come has a lower
    place; sound_over: no sound is still to come; video_chunk, sound_chunk: of each track's last token in order; piece:
    track and chunk of the last run.
    """

    rule: PositionRule
    steps: deque[tuple[float, int]] = field(default_factory=deque)
    done: int = 0
    sounds: int = 0
    placed: int = 0
    next_place: float = -math.inf
    sound_over: bool = False
    video_chunk: int = 0
    sound_chunk: int = 0
    piece: tuple[bool, int] | None = None

    def clone(self) -> Interleave:
        """An independent copy."""
        return replace(self, steps=deque(self.steps))

    def offer_steps(self, times_s: Sequence[float], tokens: int) -> None:
        """The next grid steps, of `tokens` tokens each (seconds from the video's start)."""
        if tokens:
            self.steps.extend((place, tokens) for place in self._places(times_s))

    def offer_sound(self, tokens: int) -> None:
        """The next tokens of the sound."""
        self.sounds += tokens

    def expect_steps(self, time_s: float) -> None:
        """No grid step that is still to be offered begins before `time_s`."""
        self.next_place = self._places((time_s,))[0]

    def close(self) -> None:
        """Nothing more will be offered."""
        self.next_place, self.sound_over = math.inf, True

    def next_run(self) -> Run | None:
        """The next tokens in order; None if they depend on what is still to come, or if nothing waits."""
        video_place = self.steps[0][0] if self.steps else self.next_place
        sound_place = math.inf if self.sound_over and not self.sounds else self.placed
        video_key, sound_key = self._key(video_place, self.video_chunk), self._key(sound_place, self.sound_chunk)
        by_chunks = self.rule.chunk_s is not None
        if self.steps and video_key <= sound_key:
            chunk = int(video_key) if by_chunks else 0
            left = self.steps[0][1] - self.done
            late = by_chunks and video_place >= self._end(chunk)  # after a gap: a chunk's only token
            return Run(True, self.done, 1 if late else left, chunk, self.piece == (True, chunk))
        if self.sounds and sound_key < video_key:
            chunk = int(sound_key) if by_chunks else 0
            end = self._end(chunk) if by_chunks else video_key
            fits = self.placed + self.sounds <= end
            count = self.sounds if fits else max(1, math.ceil(end) - self.placed)
            return Run(False, self.placed, count, chunk, self.piece == (False, chunk))
        return None

    def take(self, run: Run) -> None:
        """The tokens of `next_run` are in order now."""
        self.piece = (run.video, run.chunk)
        if not run.video:
            self.placed += run.tokens
            self.sounds -= run.tokens
            self.sound_chunk = run.chunk
            return
        self.done += run.tokens
        self.video_chunk = run.chunk
        if self.done == self.steps[0][1]:
            self.steps.popleft()
            self.done = 0

    def _key(self, place: float, chunk: int) -> float:
        """The key of a token at `place`, if the last one of its track is in `chunk`; of no token, if infinite."""
        if self.rule.chunk_s is None or place == math.inf:
            return place
        return chunk + (place >= self._end(chunk))

    def _end(self, chunk: int) -> int:
        """The first place beyond a chunk."""
        assert self.rule.chunk_s is not None
        return int(self.rule.rate * self.rule.chunk_s) * (chunk + 1)

    def _places(self, times_s: Sequence[float]) -> list[float]:
        """Where grid steps stand among the sound's tokens: by chunks their positions, else their exact times."""
        if self.rule.chunk_s is None:
            return [time_s * self.rule.rate for time_s in times_s]
        return step_positions(times_s, self.rule).tolist()


def step_positions(times_s: Sequence[float], rule: PositionRule) -> Tensor:
    """fp32 [steps]: positions of a video's grid steps from its start, whole where the rule says so."""
    positions = torch.tensor(times_s, dtype=torch.float32) * rule.rate
    return positions.floor() if rule.whole else positions
