"""What every test starts from (seed, threads), and fixtures that several test files share.

OMNI_TEST_SEED (default 0) and OMNI_TEST_THREADS (default 1) change both; processes that tests start inherit them.
"""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from build import SEED, tiny_model

from omni import OmniModel
from omni.layers import threads
from omni.packaged.toy import toy_model

THREADS = int(os.environ.get("OMNI_TEST_THREADS") or 1)
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of processes that tests start
# The same examples in every run, however slow the machine; another seed draws others.
hypothesis.settings.register_profile("omni", derandomize=SEED == 0, database=None, deadline=None)
hypothesis.settings.load_profile("omni")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # under nohup, and in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests press Ctrl-C


# Files that take longest come first, so that no process is left with one of them at the end.
LONGEST = (
    "test_item_law", "test_nano_recipe", "test_distributed_run", "test_parallel", "test_trainer", "test_run_checks",
    "test_conversation", "test_engine_law", "test_overfit", "test_import_time", "test_readme", "test_training_page",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem) in LONGEST else len(LONGEST))
    for item in items:
        if SEED and getattr(item, "function", None) and hypothesis.is_hypothesis_test(item.function):
            hypothesis.seed(SEED)(item.function)


def _seed(name: str) -> None:
    """Seed the global generators from OMNI_TEST_SEED and a name, so that neither order nor neighbours matter."""
    number = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    _seed(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """What a module or a session shares is drawn the same, whichever test asks first."""
    if fixturedef.scope != "function":
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder: the packaged tiny model with random weights, and its processor files."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    toy_model(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> OmniModel:
    """The tiny random model, far enough from uniform that greedy choices differ between prompts, with its processor."""
    return tiny_model()


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if torch had chosen three threads by itself, and the user none."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "TORCH_NUMBERS", frozenset({3}))
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
