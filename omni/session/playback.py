"""What of a reply has been played, by the clock of the input: samples of the microphone pass as fast as those played.

Sound is taken to be played from the moment it is sent, each piece after the one before; what a listener's player
reports corrects that. The sound itself is kept as band powers, for the echo guard, until it has been played.
Positions are samples at 16 kHz, of the input ("now") or of the reply.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.layers.state import State
from omni.session.echo_guard import BANDS, HOP, band_powers
from omni.session.sample_stream import SampleStream

_MOST_STEPS = 37_500  # of band powers waiting to be played: ten minutes, 2.4 MB


@dataclass
class Playback(State):
    """The sound of a reply, and of replies that were begun before it had all been played.

    begins: the input's position at which sample 0 was (or would have been) played; clock: the same for the echo guard,
    which finds out delays by itself and is better off without the jumps of reports; sent: samples; open: more is to
    come; starts: number and first sample of each reply; paused: the player stopped at stopped_at; waiting: sent samples
    that do not fill a step yet; powers [T, B] of the steps from first_step.
    """

    starts: tuple[tuple[int, int], ...]
    begins: int = 0
    clock: int = 0
    sent: int = 0
    open: bool = True
    paused: bool = False
    stopped_at: int = 0
    stream: SampleStream = field(default_factory=SampleStream)
    waiting: Tensor = field(default_factory=lambda: torch.zeros(HOP))
    powers: Tensor = field(default_factory=lambda: torch.zeros(0, BANDS))
    first_step: int = 0

    def clone(self) -> Playback:
        """An independent copy. Tensors are replaced, never changed, so both may hold them."""
        new = copy.copy(self)
        new.stream = self.stream.clone()
        return new

    def follow(self, number: int) -> None:
        """Another reply, whose sound is played after what was sent so far."""
        self.starts, self.open = (*self.starts[-1:], (number, self.sent)), True

    def send(self, samples: Tensor, rate_hz: int, now: int) -> None:
        """Sound [n] was sent at `now`. What is sent while the reply is paused is not played."""
        if self.paused:
            return
        self.begins, self.clock = max(self.begins, now - self.sent), max(self.clock, now - self.sent)
        before, done = self.stream.length, self.stream.push(samples, rate_hz)
        self.sent += self.stream.length - before
        waiting = torch.cat((self.waiting, done))
        steps = len(waiting) // HOP - 1
        if steps > 0:
            new = band_powers(waiting[: (steps + 1) * HOP])
            self.powers, waiting = torch.cat((self.powers, new))[:_MOST_STEPS], waiting[steps * HOP :]
        self.waiting = waiting.clone()

    def played(self, now: int) -> tuple[int, int]:
        """The number of the reply that is being played by then, and how many of its samples were."""
        place = self.stopped_at if self.paused else min(max(now - self.begins, 0), self.sent)
        number, start = next(entry for entry in reversed((self.starts[0], *self.starts)) if entry[1] <= place)
        return number, place - start

    def report(self, samples: int, now: int) -> None:
        """The player has played so many samples of the newest reply; more than was sent counts as all of it."""
        if not self.paused:
            self.begins = now - min(self.starts[-1][1] + samples, self.sent)

    def sounding(self, now: int) -> bool:
        """Is sent sound being played, or was it and more is to come?"""
        return not self.paused and self.sent > self.starts[0][1] and not self.over(now)

    def over(self, now: int) -> bool:
        """Has everything been sent and played?"""
        return not self.open and not self.paused and now - self.begins >= self.sent

    def pause(self, now: int) -> tuple[int, int]:
        """The player stops and forgets what it has not played yet. Returns what was `played`."""
        number, samples = self.played(now)
        self.starts = tuple(entry for entry in self.starts if entry[0] <= number)
        self.stopped_at, self.paused = self.starts[-1][1] + samples, True
        self.powers = self.powers[:0]
        return number, samples

    def resumed(self, now: int) -> Playback:
        """The reply goes on: what has not been played will be sent again."""
        begins = now - self.stopped_at
        return Playback(self.starts, begins, begins, self.stopped_at, first_step=self.stopped_at // HOP)

    def powers_at(self, now: int, steps: int) -> Tensor:
        """Powers [steps, B] of the sound that was played in the `steps` steps up to `now`, zeros for none. What was
        played before that is forgotten."""
        first = (now - self.clock) // HOP - steps
        passed = min(max(first - self.first_step, 0), len(self.powers))
        self.powers, self.first_step = self.powers[passed:], self.first_step + passed
        rows = torch.zeros(steps, BANDS)
        ready = self.powers[: max(0, steps - max(self.first_step - first, 0))]
        if len(ready):
            start = max(self.first_step - first, 0)
            rows[start : start + len(ready)] = ready
        return rows
