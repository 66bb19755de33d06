"""From noise to mel: the flow's ODE, integrated with guidance; noise that depends on the seed and the frame alone.

Sources: flow matching (Lipman et al., 2023); classifier-free guidance (Ho and Salimans, 2022); the warped time grid of
F5-TTS (Chen et al., 2024, "sway sampling"); Kutta's 3/8 rule (1901).
Shapes: B rows, N mel frames, M mel bins, D width of the DiT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.code2wav.dit import DiT
from omni.layers.splitmix import GOLDEN, mix, shift_right, signed

Velocity = Callable[[Tensor, Tensor], Tensor]  # (time [], state) -> slope of the state


def euler(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """One step of Euler's method: one evaluation."""
    return x + (end - start) * velocity(start, x)


def midpoint(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """One step of the midpoint rule, of second order: two evaluations."""
    step = end - start
    return x + step * velocity(start + step / 2, x + step / 2 * velocity(start, x))


def rk4(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """One step of Kutta's 3/8 rule, of fourth order: four evaluations."""
    step = end - start
    a = velocity(start, x)
    b = velocity(start + step / 3, x + step * a / 3)
    c = velocity(start + step * 2 / 3, x + step * (b - a / 3))
    d = velocity(end, x + step * (a - b + c))
    return x + step * (a + 3 * (b + c) + d) / 8


SOLVERS = {"euler": euler, "midpoint": midpoint, "rk4": rk4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}  # a step


@dataclass(frozen=True)
class ODEConfig:
    """How the flow is integrated. The defaults are the release's.

    num_steps: points of the time grid, hence one step less. guidance_scale: how far the velocity is pushed away from
    the one without a condition (0: not, and half the work). sway_coefficient: bends the grid towards the start where
    negative, in -1 .. 1 (None: even). solver: "rk4", "midpoint" or "euler".
    """

    num_steps: int = 10
    guidance_scale: float = 0.5
    sway_coefficient: float | None = -1.0
    solver: str = "rk4"

    def __post_init__(self) -> None:
        if type(self.num_steps) is not int or self.num_steps < 2:
            raise ValueError(f"num_steps {self.num_steps!r} must be a whole number of at least 2 points in time")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be 0 (off) or more")
        if self.sway_coefficient is not None and not -1 <= self.sway_coefficient <= 1:
            raise ValueError(f"sway_coefficient {self.sway_coefficient} must lie in -1 .. 1, else time runs backwards")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is not known; choose from {', '.join(SOLVERS)}")

    @property
    def evaluations(self) -> int:
        """Evaluations of the DiT (released: 36, each of the doubled batch)."""
        return (self.num_steps - 1) * EVALUATIONS[self.solver]


def time_grid(num_points: int, sway: float | None, device: torch.device | str = "cpu") -> Tensor:
    """Times fp32 [num_points] from 0 to 1: t + sway * (cos(pi t / 2) - 1 + t). At sway -1 it is 1 - cos(pi t / 2)."""
    t = torch.linspace(0, 1, num_points, device=device)
    return t if sway is None else t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)


def integrate(velocity: Velocity, x: Tensor, times: Tensor, solver: str = "rk4") -> Tensor:
    """The state at times[-1] of dx/dt = velocity(t, x) that is x at times[0]; one step between neighbouring times."""
    step = SOLVERS[solver]
    for start, end in itertools.pairwise(times):
        x = step(velocity, x, start, end)
    return x


def sample_mel(
    dit: DiT, noise: Tensor, condition: Tensor, null: Tensor, ode: ODEConfig, lengths: Tensor | None = None
) -> Tensor:
    """Noise [B, N, M] to a log-amplitude mel [B, N, M].

    condition [B, N, D] is `DiT.condition` of codes and voice, null [B or 1, N or 1, D] that of none.
    """
    rows = noise.shape[0]
    guided = ode.guidance_scale >= 1e-5  # the reference's threshold
    if guided:
        condition = torch.cat((condition, null.expand_as(condition)))
        lengths = None if lengths is None else torch.cat((lengths, lengths))

    def velocity(time: Tensor, x: Tensor) -> Tensor:
        if not guided:
            return dit(x, time[None], condition, lengths)
        steered, free = dit(torch.cat((x, x)), time[None], condition, lengths).split(rows)
        return steered + ode.guidance_scale * (steered - free)

    times = time_grid(ode.num_steps, ode.sway_coefficient, noise.device).to(noise.dtype)
    return integrate(velocity, noise, times, ode.solver)


def position_noise(
    seeds: Sequence[int], start: int, stop: int, bins: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of frames start .. stop - 1, fp32 [B, stop - start, bins], one seed a row.

    A value is a function of its row's seed, its frame and its bin: any window of a signal gets the same noise as the
    whole. Counters go through splitmix64, pairs of uniforms through Box and Muller's transform (1958).
    """
    keys = mix(torch.tensor([signed(seed) for seed in seeds], dtype=torch.int64, device=device) + GOLDEN)
    frames = torch.arange(start, stop, device=device)
    keys = mix(keys[:, None] + (frames + 1) * GOLDEN)[:, :, None]
    columns = 2 * torch.arange(bins, device=device)
    radius, angle = (_uniform(mix(keys + (columns + i + 1) * GOLDEN)) for i in range(2))
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).float()


def _uniform(bits: Tensor) -> Tensor:
    """int64 -> fp64 in (0, 1], from the upper 53 bits."""
    return (shift_right(bits, 11).double() + 1) * 2.0**-53
