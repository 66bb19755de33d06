"""How far speech has come in the sounds that its text stands for: a hidden Markov model of two halves a sound.

Forward: after each hop of sound, the chances of where the speech is, given the hops so far. Backward: the chances given
the later hops too. The numbers are few (about ten sounds are in question at a time), so this is plain Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from omni.generation.speech_marks import HOP_MS
from omni.generation.spoken_words import Sound

_USUAL_MS = 1000.0  # of speech at the usual pace, which the estimate of the pace begins with
_SLOWEST, _FASTEST = 2.5, 0.6  # paces that are believed: lengths, of the usual ones
_REACH = 4  # sounds that one hop may go on by
_THERE = 0.97  # no sound is more certain: letters may be silent, and speech ahead of what is believed
_LEAVES = 0.95  # chance of leaving half a sound in a hop, at most
_UNLIKELY = 1e-6  # places that are forgotten
_BLOCK, _LAG = 100, 150  # hops that are settled together, and how many more have to come before that
CERTAINTIES = SURE, PROBABLE = 0.8, 0.5

Likely = Sequence[float]  # how well each kind of sound fits a hop


class _Step(NamedTuple):
    """Chances after a hop: of being in the first and second half of the sounds from `low` on; at which pace it went."""

    low: int
    first: list[float]
    second: list[float]
    pace: float


class SpeechWalk:
    """The walk of one reply's speech through its sounds.

    hops: how many it has taken. text_over: no sounds will be added. Chances of hops are settled 1.5 to 2.5 s later, and
    then all that is kept of a hop is one number for each of `CERTAINTIES`: how many sounds have been entered by then
    with that certainty.
    """

    def __init__(self, lead: Sound) -> None:
        self.hops = 0
        self.text_over = False
        self.until_ms = [0.0]  # usual time before each sound, and of all
        self._sounds: list[Sound] = []
        self._likely: dict[int, Likely] = {}  # by hop; those that are settled are forgotten
        self._steps: dict[int, _Step] = {}
        self._now = _Step(0, [1.0], [0.0], 1.0)
        self._settled: dict[float, list[int]] = {certainty: [] for certainty in CERTAINTIES}
        self.add([lead])

    def add(self, sounds: Sequence[Sound]) -> None:
        """More sounds that are expected."""
        for sound in sounds:
            self.until_ms.append(self.until_ms[-1] + sound.mean_ms * sound.often)
            self._sounds.append(sound._replace(often=min(sound.often, _THERE)))

    @property
    def may_go_on(self) -> bool:
        """Whether enough sounds are known for another hop."""
        return self.text_over or self._now.low + len(self._now.first) + 2 < len(self._sounds)

    def expected_ms(self, usual_ms: float) -> float:
        """When the speech is expected where it would be after so long at the usual pace."""
        return max(0.0, self.hops * HOP_MS + (usual_ms - self._place_ms(self._now)) * self._now.pace)

    def entered(self, certainty: float, following: Sequence[Likely], *, all_said: bool) -> list[int]:
        """How many sounds have been entered by the end of each hop, with that certainty; never falling.

        following: hops that the walk has not taken, for want of text. all_said: with them it came to its end.
        """
        hops, now = self.hops, self._now
        for likely in following:  # as if no more text came
            self._take(likely)
        rest = [entered[certainty] for entered in self._smoothed(all_said=all_said and self.text_over)]
        for hop in range(hops, self.hops):
            del self._steps[hop], self._likely[hop]
        self.hops, self._now = hops, now
        return list(accumulate([*self._settled[certainty], *reversed(rest)], max))

    def take(self, likely: Likely) -> None:
        """Go on by one hop."""
        self._take(likely)
        settled = len(self._settled[SURE])
        if self.hops == settled + _BLOCK + _LAG:
            block = [*self._smoothed(all_said=False)][: -_BLOCK - 1 : -1]
            for certainty in CERTAINTIES:
                self._settled[certainty] += [entered[certainty] for entered in block]
            for hop in range(settled, settled + _BLOCK):
                del self._steps[hop], self._likely[hop]

    def _take(self, likely: Likely) -> None:
        low, first_before, second_before, pace = self._now
        known, more = len(first_before), min(_REACH, len(self._sounds) - self._now.low - len(first_before))
        first, second, leaving = [], [], 0.0
        turn = 2 * HOP_MS / pace
        for at, (kind, mean_ms, often) in enumerate(self._sounds[low : low + known + more]):
            entering, fits = leaving * often, likely[kind]
            leaving -= entering
            if at < known:
                leave = min(_LEAVES, turn / mean_ms)
                turned, left = first_before[at] * leave, second_before[at] * leave
                first.append((first_before[at] - turned + entering) * fits)
                second.append((second_before[at] - left + turned) * fits)
                leaving += left
            else:
                first.append(entering * fits)
                second.append(0.0)
        second[-1] += leaving * fits  # nothing is known to follow
        total = sum(first) + sum(second)
        near = [at for at, (a, b) in enumerate(zip(first, second)) if a + b > _UNLIKELY * total]
        begin, end = near[0], near[-1] + 1
        step = _Step(low + begin, [a / total for a in first[begin:end]], [b / total for b in second[begin:end]], pace)
        self._steps[self.hops], self._likely[self.hops] = step, likely
        self.hops += 1
        pace = (_USUAL_MS + self.hops * HOP_MS) / (_USUAL_MS + self._place_ms(step))
        self._now = step._replace(pace=min(max(pace, _FASTEST), _SLOWEST))

    def _place_ms(self, step: _Step) -> float:
        """The usual time of where the speech probably is."""
        place = 0.0
        for at, (a, b) in enumerate(zip(step.first, step.second), step.low):
            place += (a + b) * (self.until_ms[at] + 0.5 * self._sounds[at].mean_ms)
        return place

    def _smoothed(self, *, all_said: bool) -> Iterator[dict[float, int]]:
        """From the last hop to the first that is not settled: sounds entered by then, by certainty."""
        after = self._steps.get(self.hops - 1)
        if after is None:
            return
        first = second = [1.0] * len(after.first)  # what follows from each half of a sound
        if all_said:  # only the last word's last sound, and the silence after it, are ends
            first = second = [
                float(at >= len(self._sounds) - 2) or 1e-9 for at in range(after.low, after.low + len(first))
            ]
        yield _entered(after, first, second)
        for hop in range(self.hops - 2, len(self._settled[SURE]) - 1, -1):
            step = self._steps[hop]
            first, second = self._before(step, after, first, second, self._likely[hop + 1])
            yield _entered(step, first, second)
            after = step

    def _before(
        self, step: _Step, after: _Step, first: list[float], second: list[float], likely: Likely
    ) -> tuple[list[float], list[float]]:
        """What follows from each half sound of a step, by what follows from those of the step after it."""
        low, stop, shift = step.low, step.low + len(step.first), after.low
        high, top = min(max(stop, step.low + len(step.first) + _REACH), len(self._sounds)), shift + len(first)
        ahead, turn = 0.0, 2 * HOP_MS / after.pace  # ahead: what follows from leaving the sound
        before_first, before_second = [0.0] * (stop - low), [0.0] * (stop - low)
        for at in range(high - 1, low - 1, -1):
            kind, mean_ms, often = self._sounds[at]
            inside = shift <= at < top
            begun = first[at - shift] * likely[kind] if inside else 0.0
            gone = second[at - shift] * likely[kind] if inside else 0.0
            if at == len(self._sounds) - 1:
                ahead = gone
            if at < stop:
                leave = min(_LEAVES, turn / mean_ms)
                before_first[at - low] = begun + leave * (gone - begun)
                before_second[at - low] = gone + leave * (ahead - gone)
            ahead += often * (begun - ahead)
        most = max(*before_first, *before_second) or 1.0
        return [chance / most for chance in before_first], [chance / most for chance in before_second]


def _entered(step: _Step, first: Sequence[float], second: Sequence[float]) -> dict[float, int]:
    """How many sounds have been entered, by certainty, given what follows from each half sound."""
    places = [a * f + b * s for a, b, f, s in zip(step.first, step.second, first, second)]
    total = sum(places)
    if total <= 0:
        places, total = [a + b for a, b in zip(step.first, step.second)], 1.0
    entered, wanted = dict.fromkeys(CERTAINTIES, step.low), sorted(CERTAINTIES)
    reached, at = 0.0, step.low + len(places)
    for chance in reversed(places):
        reached, at = reached + chance, at - 1
        while wanted and reached >= wanted[0] * total:
            entered[wanted.pop(0)] = at
    return entered
