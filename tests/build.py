"""What many test files are made of: seeds, tiny models of both families, processor files, voices, sounds, pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

SEED = int(os.environ.get("OMNI_TEST_SEED") or 0)


def seeded(number: int) -> torch.Generator:
    """A generator of its own, which OMNI_TEST_SEED changes too."""
    return torch.Generator().manual_seed(number + 1_000_000 * SEED)


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call it once for the same arguments, and leave the global generator alone: it must not matter who asks first."""

    @cache
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return make(*args, **kwargs)

    return made
