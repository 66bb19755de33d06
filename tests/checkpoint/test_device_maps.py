"""A model spread over places says what the undivided one says, however its parts and layers are spread."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from build import (
    FAST,
    PLAIN,
    SIZES,
    TOY_DATA,
    chat,
    config_values,
    draw_token2wav,
    fixed,
    make_voice,
    once,
    sound_item,
    tiny_model,
    tone,
    widen,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni import AudioChunk, OmniConfig, OmniEngine, OmniModel, OmniProcessor, OmniSession, StreamingConfig
from omni.checkpoint import load_weights, placement
from omni.checkpoint.placement import dispatch
from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.code2wav.contract import CodecDecoder
from omni.training.objectives.losses import router_balance

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin with the system message")
LIMITS: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 6, **PLAIN}
WINDOWS = StreamingConfig(codec_schedule=ChunkSchedule(4, 2, 2), codec_ode=FAST, silence_s=None)


def first_family() -> OmniModel:
    return tiny_model()


@fixed(1)
def second_family() -> OmniModel:
    values = {
        **config_values(1, vocabulary=640, audio={}, vision={}),
        "token2wav_config": SIZES,
        "system_token_id": 276,
    }
    model = widen(OmniModel(OmniConfig.from_dict(values)), 10)
    with torch.no_grad():
        draw_token2wav(model.code2wav)
        model.talker.codec_head.weight[[80, 82]] = 0  # greedy speech goes on to its limit
    model.processor = OmniProcessor.from_pretrained(TOY_DATA)
    model.voices = {"eve": make_voice(1), "bob": make_voice(2)}
    return model


FAMILIES = {"first": first_family, "second": second_family}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @once
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        FAMILIES[family]().save_pretrained(path)
        return path

    return folder


def said(model: OmniModel) -> list[Any]:
    """Everything that a model can be asked for: a batch, a stream, a session and an engine; ids, codes, sound."""
    streaming = WINDOWS if model.code2wav.needs_voice else StreamingConfig(silence_s=None)
    spoken = [*chat("hi"), {"role": "assistant", "content": "yes"}, *chat([sound_item(0.4), "what"])]
    out = model.generate(model.processor([chat("hi"), spoken]), seed=1, **LIMITS)
    found: list[Any] = [out.replies, *out.codes, *out.audio]
    events = list(model.stream(model.processor(chat("three")), seed=1, streaming=streaming, **LIMITS))
    with OmniEngine(model, max_sessions=2, streaming=streaming) as engine:
        for session in (OmniSession(model, streaming=streaming), engine.session()):
            session.push_audio(tone(0.4), 16000)
            session.push_text("well")
            events += [*session.respond(seed=2, **LIMITS)]
    found += [e.samples if isinstance(e, AudioChunk) else getattr(e, "token_ids", None) for e in events]
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


@pytest.fixture(scope="module")
def expected(folders) -> Callable[[str], list[Any]]:
    return once(lambda family: said(OmniModel.from_pretrained(folders(family), device="cpu")))


PARTS = [
    {"": "cpu", "code2wav": "disk"},
    {"": "disk"},
    {"": "cpu", "thinker": "disk"},
    {"": "disk", "code2wav": "cpu"},
    {"": "cpu", "audio_encoder": "disk", "vision_encoder": "disk"},
    {"": "cpu", "thinker.layers.1": "disk", "thinker.lm_head": "disk", "thinker.embed_tokens": "disk"},
    {"": "cpu", "talker.layers.0.self_attn": "disk", "talker.codec_head": "disk", "talker.codec_embedding": "disk"},
]
FIRST = [
    {"": "cpu", "talker.mtp": "disk", "talker.text_projection": "disk"},
    {"": "cpu", "code2wav.decoder.1": "disk", "code2wav.pre_transformer.layers": "disk"},
]
SECOND = [
    {"": "cpu", "code2wav.dit": "disk"},
    {"": "cpu", "code2wav.bigvgan.resblocks": "disk", "code2wav.dit.blocks.1": "disk"},
]
QUICK = [("first", m) for m in [*PARTS[:4], *FIRST]] + [("second", m) for m in [*PARTS[::3], *SECOND]]
MORE = [(family, m) for family in FAMILIES for m in PARTS if (family, m) not in QUICK]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("family", "places"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_a_model_partly_on_disk_says_what_it_says_in_memory(family, places, folders, expected, tmp_path) -> None:
    model = OmniModel.from_pretrained(folders(family), device_map=places, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in model.parameters())
    assert_same(said(model), expected(family))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_accelerate_plans_for_little_memory_says_the_same(
    family, folders, expected, tmp_path, monkeypatch
) -> None:
    whole = OmniModel.from_pretrained(folders(family), device="cpu")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    for share in (0.2, 0.9):
        memory = {"cpu": int(share * size)}
        monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *_, memory=memory, **__: memory)
        model = OmniModel.from_pretrained(folders(family), device_map="auto", offload_folder=tmp_path / str(share))
        on_disk = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_meta)
        assert on_disk > 0
        assert_same(said(model), expected(family))
    assert on_disk < size


class Copying(ModelHook):
    """What AlignDevicesHook does between two devices: arguments and results arrive as copies."""

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if hasattr(value, "to"):
            try:
                return value.to("cpu", non_blocking=False)
            except TypeError:
                return value.to("cpu")
        if isinstance(value, (tuple, list)):
            items = [self.copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return type(value)({k: self.copy(v) for k, v in value.items()}) if isinstance(value, dict) else value

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.copy(args), self.copy(kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return self.copy(output)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hooks_that_copy_arguments_change_nothing(family, folders, expected) -> None:
    model = OmniModel.from_pretrained(folders(family), device="cpu")
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or type(module).forward is not nn.ModuleList.forward:
            add_hook_to_module(module, Copying())
    assert_same(said(model), expected(family))


def test_router_logits_reach_the_caller_through_hooks_that_copy(folders) -> None:
    model = OmniModel.from_pretrained(folders("first"), device="cpu")
    inputs = model.processor(chat("hi"))
    plain = model.forward(inputs, with_router_logits=True)
    for layer in (*model.thinker.layers, *(layer.mlp for layer in model.thinker.layers)):
        add_hook_to_module(layer, Copying())
    out = model.forward(inputs, with_router_logits=True)
    assert_same(out.router_logits, plain.router_logits)
    assert torch.isfinite(router_balance(out.router_logits, 2).total)


class Echo(CodecDecoder):
    """A codec decoder of one's own that keeps a dict of tensors, which its submodule writes into."""

    sample_rate, hop_length, num_codebooks, lookahead = 24000, 4, 4, 0

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 0.01))

        def initialise(self, std: float) -> None:
            nn.init.constant_(self.weight, 0.01)

        def forward(self, x: Tensor, state: dict[str, Any]) -> Tensor:
            total = x.cumsum(-1) + state["sum"]
            state["sum"], state["calls"] = total[..., -1:].clone(), state["calls"] + 1
            return total

    def __init__(self) -> None:
        super().__init__()
        self.inner = Echo.Sum()

    def init_state(self, batch_size: int) -> dict[str, Any]:
        return {"sum": self.inner.weight.new_zeros(batch_size, 1), "calls": 0}

    def step(self, codes: Tensor, state: dict[str, Any]) -> Tensor:
        frames = (codes * self.inner.weight[:, None]).sum(1)
        return torch.tanh(self.inner(frames, state)).repeat_interleave(4, dim=1)


def test_a_codec_decoder_of_ones_own_keeps_its_state_on_disk(tmp_path: Path) -> None:
    with fixed(3):
        whole = OmniModel(first_family().config, code2wav=Echo())
    whole.processor = OmniProcessor.from_pretrained(TOY_DATA)
    whole.save_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        spread = OmniModel(whole.config, code2wav=Echo())
    places = {"": "cpu", "code2wav": "disk", "thinker.norm": "disk"}
    load_weights(
        spread, tmp_path / "saved", table=whole.key_table, device_map=places, offload_folder=tmp_path / "offload"
    )
    spread.processor = whole.processor
    for model in (whole, spread):
        model.eval()
    inputs = whole.processor(chat("hi"))
    streaming = StreamingConfig(silence_s=None, chunk_frames=(1,))
    sound = [
        torch.cat([e.samples for e in m.stream(inputs, streaming=streaming, **LIMITS) if isinstance(e, AudioChunk)])
        for m in (whole, spread)
    ]
    assert sound[0].numel() > 8 and torch.equal(*sound)


def test_what_the_files_lack_is_drawn_on_disk_too(folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folders("first").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    del tensors["thinker.lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = OmniModel.from_pretrained(
            copy, device_map={"": "cpu", "thinker": "disk"}, offload_folder=tmp_path / "offload", strict=False
        )
    assert model.thinker.lm_head.weight.std() > 0.001


def parts_alone(name: str) -> str | None:
    return name.partition(".")[0]


def every_layer_alone(name: str) -> str | None:
    """Parts that are stepped layer by layer lie on as many devices, the others on one each."""
    first, *rest = name.split(".")
    if first not in ("thinker", "talker"):
        return first
    return None if not rest or rest == ["layers"] else ".".join([first, *rest[: 2 if rest[0] == "layers" else 1]])


@pytest.mark.parametrize("place_of", [parts_alone, every_layer_alone])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_calls_across_devices_copy_tensors_and_nothing_else(family, place_of, folders, expected, monkeypatch) -> None:
    """Here a device is a label, and what comes from another one arrives as a copy."""
    model = OmniModel.from_pretrained(folders(family), device="cpu")
    crossed = []

    def copied(value: Any, place: Any) -> Any:
        if isinstance(value, Tensor):
            crossed.append(place)
            return value.clone()
        return original(value, place) if isinstance(value, (tuple, list)) else value

    original = placement._moved
    monkeypatch.setattr(placement, "_moved", copied)
    for name, module in model.named_modules():
        if name and (place := place_of(name)) is not None:
            for method in placement._public_methods(type(module)):
                setattr(module, method, placement._aligned(getattr(module, method), place, "home"))
    assert_same(said(model), expected(family))
    assert len(set(crossed)) >= (4 if place_of is parts_alone else 8)


class Elsewhere(nn.Module):
    """A part on another device (meta stands for it) with a method beside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device="meta")
        self.seen: list[torch.device] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def step(self, x: tuple[Tensor, ...], state: list[Any], *, flag: bool = True) -> tuple[Tensor, list[Any]]:
        self.seen += [t.device for t in x]
        state.append(flag)
        return self.linear(x[0]), state


def test_every_method_brings_tensors_and_leaves_states() -> None:
    model = nn.ModuleDict({"home": nn.Linear(4, 4), "part": Elsewhere()})
    model["home"].to("cpu")
    results: list[torch.device] = []
    original = torch.Tensor.to

    dispatch(model)
    state: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:  # nothing comes back from meta: note where results are asked to go
        patch.setattr(torch.Tensor, "to", lambda t, d: results.append(d) or (t if t.is_meta else original(t, d)))
        _, same = model["part"].step((torch.ones(1, 4), torch.ones(1)), state, flag=False)
        model["part"].linear(torch.ones(1, 4))
    assert same is state and state == [False]
    assert model["part"].seen == [torch.device("meta")] * 2
    assert results.count(torch.device("cpu")) == 2  # one for each call from outside
