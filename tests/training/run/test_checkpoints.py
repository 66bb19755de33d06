"""Checkpoints of a run: broken ones passed over, old ones deleted, nests and random numbers as they were."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import same
from torch import Tensor

from omni.training.run import checkpoints
from omni.training.run.checkpoints import Checkpoints, pack, rng_state, set_rng_state, unpack


def test_broken_checkpoints_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3, 4):
        store.save(step, {"value": torch.tensor(step)})
    os.truncate(store.path(4) / checkpoints.TENSORS, 20)
    (store.path(3) / checkpoints.STATE).unlink()
    with pytest.warns(UserWarning, match="passed over") as warned:
        found = store.latest()
    assert found is not None and found[0] == 2 and int(found[1]["value"]) == 2 and len(warned) == 2
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 9, 3):  # 9: a broken one, say, of an earlier attempt
        store.save(step, {})
    assert store.steps() == [2, 3, 9]


def test_nests_of_tensors_come_back_as_they_were() -> None:
    state = {
        "a": [1, 2.5, None, True, "x"],
        "pairs": {0: torch.ones(2), "1": (torch.zeros((), dtype=torch.int64), [])},
        "array": np.arange(3, dtype=np.uint32),
        "$tensor": "not a mark",
        "random": random.getstate(),
    }
    tensors: dict[str, Tensor] = {}
    values = json.loads(json.dumps(pack(state, "", tensors)))
    assert same(unpack(values, tensors), state)
    with pytest.raises(TypeError, match="of type set"):
        pack({"a": {1}}, "", {})


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = rng_state()
    first = draw()
    set_rng_state(state)
    assert draw() == first
