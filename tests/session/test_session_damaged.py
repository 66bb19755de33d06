"""A saved session that is damaged, or another model's, is a ValueError that names its folder."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import noise, speckle, tiny_model
from safetensors.torch import load_file, save_file
from test_session_file import as_format

from omni import OmniConfig, OmniModel, OmniSession, StreamingConfig

PLAIN = {"max_new_tokens": 2, "return_audio": False}


def opened(model: OmniModel, what: str) -> OmniSession:
    """A session after a turn with a picture, in which something is open."""
    session = OmniSession(
        model,
        keep_media=True,
        use_audio_in_video=what == "sound of a video",
        streaming=StreamingConfig(audio_window_s=1.0),
    )
    session.push_image(speckle(32, 32))
    list(session.respond(**PLAIN))
    if what == "clip":
        session.push_audio(noise(30000), 22050)
    elif what == "text":
        session.push_text("half a sen")
    elif what != "nothing":
        for number in range(5):
            session.push_video_frame(speckle(32, 32, seed=number), 0.7 * number)
            if what == "sound of a video":
                session.push_audio(noise(8000, number))
    return session


OPEN = ("nothing", "text", "clip", "video", "sound of a video")


@pytest.fixture(scope="module", params=OPEN)
def saved(request: pytest.FixtureRequest, model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "kept"
    opened(model, request.param).save(folder)
    return folder


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested values; a list gives its first and last."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else sorted({0, len(value) - 1})
        if isinstance(value, list) and value
        else []
    )
    return [place for key in keys for place in ((value, key), *places(value[key]))]


ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    10**9,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    {},
    [1],
    [[2]],
]


def change_values(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    container, key = rng.choice(places(values))
    kind = rng.choice(("odd", "odd", "delete", "double", "number"))
    if kind == "delete":
        del container[key]
    elif kind == "double" and isinstance(container, list):
        container.append(container[key])
    elif kind == "number" and isinstance(container[key], (int, float)):
        container[key] += rng.choice((-1, 1, 3, 1000))
    else:
        container[key] = rng.choice(ODD)
    return values


def change_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensor[:-1] if tensor.dim() else tensor[None],
        lambda: torch.cat((tensor, tensor)) if tensor.dim() else tensor.repeat(2),
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.to(rng.choice((torch.float16, torch.int32, torch.bool, torch.float64, torch.complex64))),
        lambda: torch.zeros(0),
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
    ]
    if rng.random() < 0.2:
        del tensors[name]
    elif rng.random() < 0.1:
        tensors[rng.choice(sorted(tensors))] = tensors.pop(name)
    else:
        tensors[name] = rng.choice(changes)().clone().contiguous()
    return tensors


def use(session: OmniSession) -> None:
    """Whatever a loaded session holds, it can be gone on with."""
    session.push_text("?")
    list(session.respond(**PLAIN))
    session.push_audio(noise(3000))
    session.push_video_frame(speckle(32, 32), 99.0)


@pytest.mark.parametrize("older", [False, True])
def test_files_changed_at_random(model: OmniModel, saved: Path, older: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{saved.name} {older}")
    whole = saved
    if older:
        whole = Path(shutil.copytree(saved, tmp_path / "older"))
        as_format(whole, 1, chunked=False)
    values, tensors = json.loads((whole / "session.json").read_text()), load_file(whole / "session.safetensors")
    refused = 0
    for _ in range(25):
        changed = change_values(rng, values) if rng.random() < 0.6 else values
        parts = change_tensors(rng, tensors) if changed is values else tensors
        (tmp_path / "session.json").write_text(json.dumps(changed))
        save_file(parts, tmp_path / "session.safetensors")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                session = OmniSession.load(tmp_path, model)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
            continue
        use(session)
    assert refused > 3


@pytest.mark.parametrize("name", ["session.json", "session.safetensors"])
def test_bytes_changed_at_random(model: OmniModel, saved: Path, name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    for other in ("session.json", "session.safetensors"):
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    whole = (saved / name).read_bytes()
    for _ in range(12):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256) if data else 0
        (tmp_path / name).write_bytes(bytes(data))
        try:
            use(OmniSession.load(tmp_path, model))
        except ValueError as error:
            assert str(tmp_path) in str(error)


NAMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an id beyond the vocabulary": lambda v: v["messages"][0]["entries"][0][0].__setitem__(0, 10**6),
    "an id below 0": lambda v: v["messages"][0]["entries"][0][0].__setitem__(0, -1),
    "ids that are text": lambda v: v["messages"][0]["entries"].__setitem__(0, ["12", True, 0.0, False]),
    "fewer ids than the cache": lambda v: v["messages"].pop(),
    "two items of one name": lambda v: v["messages"].append(v["messages"][0]),
    "a role that there is not": lambda v: v["messages"][0].update(role="robot"),
    "a reply that is being given": lambda v: v["messages"][1].update(status="in_progress"),
    "more times than ids": lambda v: v["messages"][1]["times"].update(token_ids=[5] * 99, ends_ms=[0.0] * 99),
    "times of a question": lambda v: v["messages"][0].update(times={"token_ids": [], "ends_ms": []}),
    "a medium without entries": lambda v: v["messages"][0].update(
        parts=[{"type": "image", "image": {"kept": "image", "first": 0, "count": 99}}]
    ),
    "a part of no type": lambda v: v["messages"][0].update(parts=[{}]),
    "text that is no list": lambda v: v["open"].update(tail="ab"),
    "a medium beyond the turn": lambda v: v["open"].update(medium_start=99),
    "a beginning beyond the vocabulary": lambda v: v.update(beginning=[10**6]),
    "a bound that is a share": lambda v: v.update(media_bytes=0.5),
    "a share above 1": lambda v: v.update(make_room=3.0),
    "no messages": lambda v: v.pop("messages"),
    "messages that are no list": lambda v: v.update(messages=3),
    "a voice that the model does not have": lambda v: v.update(speaker="nobody"),
    "knobs that there are not": lambda v: v["streaming"].update(fast=True),
    "a window that the encoder cannot have": lambda v: v["streaming"].update(audio_window_s=0.5),
    "knobs of a wrong type": lambda v: v["streaming"].update(silence_s="1"),
    "a format to come": lambda v: v.update(format=99),
    "a format that is no number": lambda v: v.update(format=True),
}
OLDER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an id beyond the vocabulary": lambda v: v["ids"].__setitem__(0, 10**6),
    "an id below 0": lambda v: v["ids"].__setitem__(3, -1),
    "ids that are text": lambda v: v.update(ids="12"),
    "fewer ids than the cache": lambda v: v["ids"].pop(),
    "ids that the past does not have": lambda v: v["ids"].reverse(),
    "pending ids beyond the vocabulary": lambda v: v.update(owed=[10**6]),
    "an end beyond the cache": lambda v: v["thinker"].update(tokens=v["thinker"]["tokens"] + 1),
    "a place that is no number": lambda v: v["thinker"].update(start="0"),
    "a place that is infinite": lambda v: v["talker"].update(start=float("inf")),
    "no past": lambda v: v.pop("past"),
    "a past that is no list": lambda v: v.update(past=3),
}


@pytest.mark.parametrize(("older", "name"), [*((False, name) for name in NAMED), *((True, name) for name in OLDER)])
def test_values_that_cannot_be(model: OmniModel, older: bool, name: str, tmp_path: Path) -> None:
    opened(model, "text").save(tmp_path)
    if older:
        as_format(tmp_path, 3)
    values = json.loads((tmp_path / "session.json").read_text())
    (OLDER if older else NAMED)[name](values)
    (tmp_path / "session.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:
        OmniSession.load(tmp_path, model)
    assert str(tmp_path) in str(caught.value)


def other_seed(model: OmniModel) -> OmniModel:
    torch.manual_seed(5)
    other = OmniModel(model.config)
    other.processor = model.processor
    return other


def one_matrix(model: OmniModel) -> OmniModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.thinker.layers[-1].self_attn.o_proj.weight.mul_(1.5)
    return other


def other_talker(model: OmniModel) -> OmniModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.talker.codec_head.weight.add_(0.1)
    return other


def other_rotary(model: OmniModel) -> OmniModel:
    values = model.config.to_dict()
    text = values["thinker_config"]["text_config"]
    for key in ("rope_parameters", "rope_scaling"):
        if key in text and "rope_theta" in text[key]:
            text[key]["rope_theta"] = 77.0
    if "rope_theta" in text:
        text["rope_theta"] = 77.0
    other = OmniModel(OmniConfig.from_dict(values))
    other.load_state_dict(model.state_dict())
    other.processor = model.processor
    return other


@pytest.mark.parametrize("make", [other_seed, one_matrix, other_talker, other_rotary])
def test_another_model_of_the_same_shape(
    model: OmniModel, make: Callable[[OmniModel], OmniModel], tmp_path: Path
) -> None:
    opened(model, "clip").save(tmp_path)
    with pytest.raises(ValueError, match="saved with another model") as caught:
        OmniSession.load(tmp_path, make(model))
    assert str(tmp_path) in str(caught.value)
    OmniSession.load(tmp_path, model)


def test_the_same_model_elsewhere(model: OmniModel, tmp_path: Path) -> None:
    """Another dtype, a copy, a saved and loaded checkpoint are the same model."""
    session = opened(model, "clip")
    session.save(tmp_path / "kept")
    model.save_pretrained(tmp_path / "model")
    for same in (copy.deepcopy(model), OmniModel.from_pretrained(tmp_path / "model"), copy.deepcopy(model).bfloat16()):
        loaded = OmniSession.load(tmp_path / "kept", same)
        assert loaded.ids == session.ids
        use(loaded)


def test_a_small_difference_of_many_is_counted(tmp_path: Path) -> None:
    model = tiny_model()
    OmniSession(model).save(tmp_path)
    with torch.no_grad():
        for weight in model.talker.parameters():
            weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"another model: \d+ of \d+ weights"):
        OmniSession.load(tmp_path, model)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (0, {"id": ""}),
        (0, {"parts": [{"type": "text"}]}),
        (0, {"parts": [{"type": "text", "text": None}]}),
        (0, {"parts": [{"type": "tool_call"}]}),
        (0, {"parts": [{"type": "tool_result", "call_id": "a", "output": "b"}]}),
        (0, {"role": "tool"}),
        (1, {"parts": [{"type": "tool_call", "id": "a", "name": "b"}]}),
        (1, {"given": [10**6]}),
        (1, {"times": {"token_ids": [10**6], "ends_ms": [0.0]}}),
    ],
)
def test_messages_that_no_session_has(model: OmniModel, tmp_path: Path, message: int, change: dict[str, Any]) -> None:
    session = OmniSession(model)
    session.push_text("hi")
    list(session.respond(**PLAIN))
    session.save(tmp_path / "kept")
    path = tmp_path / "kept" / "session.json"
    values = json.loads(path.read_text())
    values["messages"][message] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="does not hold a whole session"):
        OmniSession.load(tmp_path / "kept", model)
