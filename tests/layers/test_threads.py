"""The number of CPU threads: the rule, what wins over it, and that it ends where it should."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from build import tiny_model

from omni import OmniModel
from omni.layers import threads
from omni.layers.threads import SHORT_TOKENS, SMALL_WIDTH, threads_for, using_threads

SEEN = """
import torch
{before}
from omni.layers.threads import TORCH_NUMBERS
from omni.packaged.toy import toy_model

model, own, seen = toy_model(), torch.get_num_threads(), set()
model.thinker.lm_head.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
for event in model.stream(model.processor([{{"role": "user", "content": "a"}}]), max_new_tokens=2, return_audio=False):
    assert torch.get_num_threads() == own
print(own, own in TORCH_NUMBERS, *seen)
"""


def new_thread() -> int:
    """The number that a thread begins with which uses torch for the first time."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_a_small_model_s_small_steps_take_one_thread(three_threads: None) -> None:
    assert threads_for(SMALL_WIDTH) == threads_for(SMALL_WIDTH, SHORT_TOKENS) == threads_for(1) == 1
    assert threads_for(SMALL_WIDTH + 1) is threads_for(SMALL_WIDTH, SHORT_TOKENS + 1) is None


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.parametrize("value", ["1", "3", "8"])
def test_a_variable_wins(three_threads: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert threads_for(1) is None


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_number_that_torch_does_not_choose_wins(three_threads: None, number: int) -> None:
    torch.set_num_threads(number)
    assert threads_for(1) is None


def test_the_number_is_put_back(three_threads: None) -> None:
    with using_threads(None):
        assert torch.get_num_threads() == 3
    with using_threads(1):
        assert torch.get_num_threads() == 1
        with using_threads(threads_for(1)), using_threads(2):  # inside, the number counts as chosen
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == new_thread() == 3
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), using_threads(1):
            raise error
        assert torch.get_num_threads() == new_thread() == 3


def test_other_threads_keep_theirs(three_threads: None) -> None:
    begun, changed, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        seen.append(torch.get_num_threads())
        begun.set()
        changed.wait(60)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    with using_threads(1):
        changed.set()
        thread.join()
    assert seen == [3, 3]


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "2"])
def test_a_wrong_number_is_refused(number: object) -> None:
    model = tiny_model("thinker")
    with pytest.raises(ValueError, match=r"decode_threads must be a whole number of at least 1 or None, got "):
        model.decode_threads = number  # type: ignore[assignment]
    assert model.decode_threads is None


def test_a_model_s_own_number_is_for_decoding_alone(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("thinker")
    model.decode_threads = 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with torch.no_grad(), model.decoding_threads():
        assert torch.get_num_threads() == 2
    with torch.no_grad(), model.reading_threads(1):
        assert torch.get_num_threads() == 3


def test_training_and_gpus_keep_their_number(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("thinker")
    with model.reading_threads(1):
        assert torch.get_num_threads() == 3
    with torch.no_grad(), model.reading_threads(1):
        assert torch.get_num_threads() == 1
    monkeypatch.setattr(OmniModel, "device", property(lambda _: torch.device("cuda")))
    model.decode_threads = 2
    with torch.no_grad(), model.reading_threads(1), model.decoding_threads():
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("variables", "before", "rule"),
    [
        ({}, "", True),
        ({"OMP_NUM_THREADS": "2"}, "", False),
        ({}, "torch.set_num_threads(99)", False),
    ],
    ids=["nothing chosen", "OMP_NUM_THREADS", "set_num_threads before omni is imported"],
)
def test_in_a_process_of_its_own(variables: dict[str, str], before: str, rule: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | variables
    out = subprocess.run(
        [sys.executable, "-c", SEEN.format(before=before)], env=environment, capture_output=True, text=True, check=True
    )
    own, is_torch_s, *seen = out.stdout.split()
    assert is_torch_s == str(not before)
    assert seen == ["1" if rule else own]


def test_cores_are_counted_where_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 8)
    lists = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}

    def listed(path: Path, encoding: str) -> str:
        return lists[int(path.parts[-3].removeprefix("cpu"))]

    monkeypatch.setattr(Path, "read_text", listed)
    monkeypatch.setattr(sys, "platform", "linux")
    assert threads.numbers_of_torch() == {2, 4}

    def hidden(path: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", hidden)
    assert threads.numbers_of_torch() == {4}
