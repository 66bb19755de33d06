"""docs/swapping.md: its blocks run as printed, and every swapped part works wherever the released one does."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni import AudioChunk, OmniConfig, OmniEngine, OmniModel, OmniSession, StreamingConfig, TextDelta
from omni.encoders.contract import EncoderOutput
from omni.layers import attention_backends, experts_backends, moe
from omni.parts import CONTRACTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "swapping.md").read_text()
RELEASED = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PLAIN: dict[str, Any] = {
    "audio_sampling": {"temperature": 0, "repetition_penalty": 1.3},
    "residual_sampling": {"temperature": 0},
    "max_new_tokens": 4,
    "max_frames": 5,
}


def run(folder: Path, *numbers: int) -> dict[str, Any]:
    """The names that some blocks define, after the first one."""
    names: dict[str, Any] = {"__name__": "swapping"}
    for number in (0, *numbers):
        code = BLOCKS[number].replace(RELEASED, str(folder))
        exec(compile(code, f"swapping block {number + 1}", "exec", dont_inherit=True), names)
    return names


class BareEncoder(nn.Module):
    """An audio encoder that derives from no contract."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(128, width)

    def num_tokens(self, length: int) -> int:
        return -(-length // 10)

    def forward(self, features: Tensor, lengths: Tensor) -> EncoderOutput:
        counts = [self.num_tokens(int(n)) for n in lengths]
        return EncoderOutput(torch.cat([self.proj(f[:, ::10].T)[:n] for f, n in zip(features, counts)]), counts, [])


class BareTones(nn.Module):
    """A codec decoder that derives from no contract and has a state of its own."""

    sample_rate, frame_rate, lookahead = 24000, 12.5, 0

    def __init__(self) -> None:
        super().__init__()
        self.hop_length, self.num_codebooks = 1920, 16

    def init_state(self, batch_size: int) -> dict[str, int]:
        return {"frames": 0}

    def step(self, codes: Tensor, state: dict[str, int]) -> Tensor:
        state["frames"] += codes.shape[2]
        return (codes.float().mean(1) / 4096).repeat_interleave(self.hop_length, dim=1)


def bare(folder: Path, part: str) -> OmniModel:
    """A part without a contract, given to the constructor beside loaded ones."""
    loaded = OmniModel.from_pretrained(folder)
    parts = {name: getattr(loaded, name) for name in CONTRACTS}
    parts[part] = {"audio_encoder": partial(BareEncoder, 32), "code2wav": BareTones}[part]()
    model = OmniModel(loaded.config, **parts)
    model.processor = loaded.processor
    return model


SWAPS = (*CONTRACTS, "bare audio_encoder", "bare code2wav")


@pytest.fixture(scope="module", params=SWAPS)
def swapped(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> OmniModel:
    """The tiny model with one of its parts replaced."""
    torch.manual_seed(0)
    kind, _, part = request.param.rpartition(" ")
    if kind:
        return bare(tiny_checkpoint, part)
    return run(tiny_checkpoint, 1 + list(CONTRACTS).index(part))["model"].eval()


def content() -> list[Any]:
    sound = 0.1 * torch.randn(13000, generator=torch.Generator().manual_seed(3)).numpy()
    picture = torch.randint(0, 255, (64, 96, 3), generator=torch.Generator().manual_seed(4)).numpy().astype("uint8")
    return [{"type": "image", "image": picture}, {"type": "audio", "audio": sound}, {"type": "text", "text": "What?"}]


def ids_and_sound(events: list[Any]) -> tuple[list[int], Tensor]:
    ids = [i for e in events if isinstance(e, TextDelta) for i in e.token_ids]
    chunks = [e.samples for e in events if isinstance(e, AudioChunk)]
    return ids, torch.cat(chunks) if chunks else torch.zeros(0)


def pushed(session: OmniSession, *, pieces: bool) -> OmniSession:
    """The same content as one conversation, its sound in pieces of 0.1 s."""
    picture, sound, text = content()
    session.push_image(picture["image"])
    wave = torch.from_numpy(sound["audio"])
    for piece in wave.split(1600) if pieces else [wave]:
        session.push_audio(piece)
    session.push_text(text["text"])
    return session


def assert_same(got: tuple[list[int], Tensor], expected: tuple[list[int], Tensor]) -> None:
    assert got[0] == expected[0] and got[1].numel() == expected[1].numel() > 0
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)


def test_it_generates_and_streams_and_talks_in_sessions_and_in_an_engine(swapped: OmniModel, tmp_path: Path) -> None:
    """All four say the same: the session's mel is the causal one, so that is what the others get too."""
    assert swapped.processor is not None
    inputs = swapped.processor([{"role": "user", "content": content()}], mel_level="causal")
    out = swapped.generate(inputs, **PLAIN)
    assert out.codes is not None and out.codes[0].shape[1] > 0
    whole = (out.replies[0], out.audio[0])
    for frames in (1, 3):
        streaming = StreamingConfig(chunk_frames=(frames,), silence_s=None)
        assert_same(ids_and_sound(list(swapped.stream(inputs, streaming=streaming, **PLAIN))), whole)
    for pieces in (False, True):
        session = pushed(OmniSession(swapped), pieces=pieces)
        assert session.ids == inputs.input_ids[0, : len(session.ids)].tolist()
        assert_same(ids_and_sound(list(session.respond(**PLAIN))), whole)

    open_clip = OmniSession(swapped)
    picture, sound, text = content()
    open_clip.push_image(picture["image"])
    open_clip.push_audio(torch.from_numpy(sound["audio"])[:5000])
    twin = open_clip.fork()
    open_clip.save(tmp_path / "session")
    for session in (open_clip, twin, OmniSession.load(tmp_path / "session", swapped)):
        session.push_audio(torch.from_numpy(sound["audio"])[5000:])
        session.push_text(text["text"])
        assert_same(ids_and_sound(list(session.respond(**PLAIN))), whole)
        kept = session.interrupt(played_ms=80 * 2)
        assert len(kept.token_ids) <= len(whole[0])

    with OmniEngine(swapped, max_sessions=3) as engine:
        sessions = [pushed(engine.session(), pieces=True) for _ in range(3)]
        replies = [session.respond(**PLAIN) for session in sessions]
        for reply in replies:
            assert_same(ids_and_sound(list(reply)), whole)


def test_a_video_is_heard_by_a_swapped_encoder(tiny_checkpoint: Path) -> None:
    """Sound that belongs to a video is read at the clip's end, frames as they come."""
    model = run(tiny_checkpoint, 1)["model"]
    session = OmniSession(model, use_audio_in_video=True)
    for second in range(4):
        session.push_video_frame(torch.full((3, 64, 64), 60 * second, dtype=torch.uint8).numpy(), second / 2)
        session.push_audio(torch.randn(8000, generator=torch.Generator().manual_seed(second)) * 0.1)
    assert ids_and_sound(list(session.respond(**PLAIN)))[0]
    assert session.ids.count(275) == model.audio_encoder.num_tokens(200)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that forget at the end what a test has entered."""
    for module, table in ((moe, "ROUTERS"), (attention_backends, "ATTENTION"), (experts_backends, "EXPERTS")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    monkeypatch.setattr(moe, "EXPERTS", experts_backends.EXPERTS)


def test_the_kernels_on_the_page_compute_what_the_others_do(tiny_checkpoint: Path, tables: None) -> None:
    names = run(tiny_checkpoint, 7)
    assert names["answer"].replies[0]
    ids, weights = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 6]]), torch.rand(5, 2, dtype=torch.float64)
    x, gate_up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 32), (8, 48, 32), (8, 32, 24)))
    inputs = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)
    for mine, plain, leaves in (
        (names["all_experts"], experts_backends.loop_experts, inputs),
        (names["in_double"], attention_backends.plain_attention, [q, k]),
    ):
        arguments = (x, ids, weights, gate_up, down) if leaves is inputs else (q, k, k, None, True)
        outs = [kernel(*arguments) for kernel in (mine, plain)]
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
        for got, expected in zip((outs[0], *grads[0]), (outs[1], *grads[1])):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_model_with_another_router_answers_and_is_saved(tiny_checkpoint: Path, tables: None, tmp_path: Path) -> None:
    names = run(tiny_checkpoint, 6)
    routed, inputs = names["routed"], names["model"].processor([{"role": "user", "content": "Name a river."}])
    assert routed.thinker.layers[0].mlp.gate.select is names["topk_sigmoid"]
    assert routed.talker.layers[0].mlp.gate.select is moe.topk_softmax
    routed.load_state_dict(names["model"].state_dict())
    other = names["model"].forward(inputs).logits
    assert not torch.equal(routed.forward(inputs).logits, other), "the router has no effect"
    routed.save_pretrained(tmp_path / "routed")
    again = OmniModel.from_pretrained(tmp_path / "routed")
    assert again.config.thinker_config.text_config.router == "topk_sigmoid"
    assert again.generate(inputs, **PLAIN).replies == routed.generate(inputs, **PLAIN).replies
    del moe.ROUTERS["topk_sigmoid"]
    with pytest.raises(ValueError, match="router 'topk_sigmoid' is not one of topk_softmax; add it to"):
        OmniModel.from_pretrained(tmp_path / "routed")


def test_the_page_names_what_there_is() -> None:
    for path in re.findall(r"`((?:omni|configs|docs)/[\w./]+\w)`", PAGE):
        assert (ROOT / path).exists(), path
    for part, contract in CONTRACTS.items():
        assert f"| `{part}` | `{contract.__module__}.{contract.__name__}` |" in PAGE
    assert len(BLOCKS) == 8


def test_the_processor_counts_as_the_encoder_does(tiny_checkpoint: Path) -> None:
    model = OmniModel.from_pretrained(tiny_checkpoint)
    given = model.processor
    assert given is not None
    model.processor = given
    assert model.processor is given, "the released encoder counts as its processor does"
    model.audio_encoder = BareEncoder(32)
    assert model.processor is not given and model.processor.audio_tokens(95) == 10 and given.audio_tokens(95) == 12
    other = OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "tiny.json"), audio_encoder=BareEncoder(32))
    other.processor = given
    assert other.processor is not None and other.processor.audio_tokens(95) == 10


def with_encoder(encoder: nn.Module, dtype: torch.dtype = torch.float32) -> OmniModel:
    """The toy in a floating type, with an audio encoder whose weights stay as they are."""
    from omni.packaged.toy import toy_model

    model = toy_model().to(dtype)
    model.audio_encoder = encoder
    return model


def a_clip() -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio", "audio": 0.1 * torch.ones(8000).numpy()}]}]


@pytest.mark.parametrize("width", [1, 31, 33, 64])
def test_embeddings_of_another_width_are_refused(width: int) -> None:
    """Whole and in pieces: a width that divides the Thinker's would otherwise be scattered in the wrong order."""
    model = with_encoder(BareEncoder(width))
    with pytest.raises(ValueError, match="32 values"):
        model.generate(model.processor(a_clip()), max_new_tokens=1, return_audio=False)
    session = OmniSession(model)
    session.push_audio(0.1 * torch.ones(8000))
    with pytest.raises(ValueError, match="32 values"):
        list(session.respond(max_new_tokens=1, return_audio=False))


def test_an_encoder_that_returns_something_else_is_named() -> None:
    class Plain(BareEncoder):
        def forward(self, features: Tensor, lengths: Tensor) -> Any:
            return super().forward(features, lengths).embeds

    model = with_encoder(Plain(32))
    with pytest.raises(TypeError, match="Plain must return an EncoderOutput, got Tensor"):
        model.generate(model.processor(a_clip()), max_new_tokens=1, return_audio=False)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_an_encoder_computes_in_its_own_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    model = with_encoder(BareEncoder(32).to(dtypes[1]), dtypes[0])
    assert model.dtype == dtypes[0], "the Thinker's"
    answer = model.generate(model.processor(a_clip()), **{**PLAIN, "return_audio": False, "max_frames": 0})
    session = OmniSession(model)
    for piece in (0.1 * torch.ones(8000)).split(3000):
        session.push_audio(piece)
    events = list(session.respond(max_new_tokens=4, return_audio=False))
    assert len([e for e in events if isinstance(e, TextDelta)]) == len(answer.replies[0]) == 4


def test_an_encoder_without_tokens_is_named() -> None:
    class Silent(BareEncoder):
        def num_tokens(self, length: int) -> int:
            return 0

    model = with_encoder(Silent(32))
    with pytest.raises(ValueError, match="num_tokens gives no token"):
        model.processor(a_clip())
