"""Generation: batches, limits, seeds, speakers, and the corners of a turn, on the tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import build
import numpy as np
import pytest
import torch
from build import GREEDY, TOY_DATA, chat, noise, speckle, tiny_config

from omni import OmniConfig, OmniInputs, OmniModel, OmniProcessor, SamplingConfig
from omni.generation.reply import ANSWER, REASONING, ReplyReader, assistant_head
from omni.layers.init import MetaBuild

ROOT = Path(__file__).parents[2]


def mixed() -> list[list[dict[str, Any]]]:
    picture, clip, sound = speckle(40, 72), speckle(4, 32, 32), noise(9000).numpy()
    return [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]}],
        chat("hi"),
        [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "audio", "audio": sound}, {"type": "video", "video": clip, "fps": 2}],
            },
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "and now?"},
        ],
        chat("tell me more about it", "no", "please"),
    ]


def test_a_batch_of_four_unequal_conversations_equals_four_single_runs(model: OmniModel) -> None:
    conversations = mixed()
    arguments: dict[str, Any] = {
        "max_new_tokens": 7,
        "max_frames": 9,
        "audio_sampling": {"temperature": 0, "repetition_penalty": 1.3},
    }
    arguments["residual_sampling"] = GREEDY
    together = model.generate(model.processor(conversations), **arguments)
    assert len({len(a) for a in together.audio}) >= 1
    for row, conversation in enumerate(conversations):
        alone = model.generate(model.processor(conversation), **arguments)
        assert alone.replies[0] == together.replies[row]
        assert torch.equal(alone.codes[0], together.codes[row])
        torch.testing.assert_close(alone.audio[0], together.audio[row], atol=1e-5, rtol=1e-5)
        assert alone.text[0] == together.text[row] and alone.reason[0] == together.reason[row]


def test_logits_of_a_batch_equal_those_of_its_rows(model: OmniModel) -> None:
    conversations = mixed()
    batch = model.processor(conversations)
    with torch.no_grad():
        together = model.forward(batch)
        for row, conversation in enumerate(conversations):
            alone = model.forward(model.processor(conversation))
            n = alone.logits.shape[1]
            torch.testing.assert_close(together.logits[row, -n:], alone.logits[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.hidden[row, -n:], alone.hidden[0], atol=1e-5, rtol=1e-5)


def test_right_padded_inputs_mean_the_same(model: OmniModel) -> None:
    inputs = model.processor([chat("hi"), chat("hello there, how are you?")])
    flipped = OmniInputs(
        input_ids=torch.stack(
            [torch.cat((r[m.bool()], r[~m.bool()])) for r, m in zip(inputs.input_ids, inputs.attention_mask)]
        ),
        attention_mask=inputs.attention_mask.sort(dim=1, descending=True).values,
    )
    a = model.generate(inputs, max_new_tokens=5, return_audio=False)
    b = model.generate(flipped, max_new_tokens=5, return_audio=False)
    assert a.replies == b.replies


def test_seeded_sampling_does_not_depend_on_who_shares_the_batch(model: OmniModel) -> None:
    warm = SamplingConfig(temperature=1.5, top_k=30)
    arguments: dict[str, Any] = {"max_new_tokens": 6, "max_frames": 6}
    together = model.generate(
        model.processor([chat("one"), chat("two, a longer one"), chat("three")]),
        seed=[5, 6, 5],
        text_sampling=[warm, GREEDY, warm],
        speaker=["Ethan", "chelsie", "AIDEN"],
        **arguments,
    )
    alone = model.generate(model.processor(chat("three")), seed=5, text_sampling=warm, speaker="aiden", **arguments)
    assert alone.replies[0] == together.replies[2]
    assert torch.equal(alone.codes[0], together.codes[2])
    again = model.generate(model.processor(chat("three")), seed=5, text_sampling=warm, speaker="aiden", **arguments)
    assert torch.equal(again.audio[0], alone.audio[0])
    other = model.generate(model.processor(chat("three")), seed=6, text_sampling=warm, speaker="aiden", **arguments)
    assert other.replies != again.replies or not torch.equal(other.codes[0], again.codes[0])


def test_without_a_seed_the_global_generator_decides(model: OmniModel) -> None:
    warm = SamplingConfig(temperature=1.5)
    outs = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        outs.append(
            model.generate(model.processor(chat("x")), text_sampling=warm, max_new_tokens=8, return_audio=False)
        )
    assert outs[0].replies == outs[1].replies != outs[2].replies


def test_text_streams_are_untouched_by_speech(model: OmniModel) -> None:
    warm = SamplingConfig(temperature=1.5)
    inputs = model.processor(chat("x"))
    silent = model.generate(inputs, text_sampling=warm, seed=3, max_new_tokens=8, return_audio=False)
    spoken = model.generate(inputs, text_sampling=warm, seed=3, max_new_tokens=8, max_frames=3)
    assert silent.replies == spoken.replies
    assert silent.audio is None and silent.codes is None


def test_return_audio_false_never_touches_the_talker(model: OmniModel) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("the Talker ran")

    hooks = [part.register_forward_pre_hook(forbidden) for part in model.talker.modules()]
    try:
        out = model.generate(model.processor(chat("x")), max_new_tokens=2, return_audio=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert out.audio is None


def test_lengths_of_codes_and_audio(model: OmniModel) -> None:
    out = model.generate(model.processor(chat("x")), max_new_tokens=3, max_frames=5, seed=0)
    assert out.codes[0].shape == (4, 5) and out.reason == ["max_new_tokens"]
    assert out.audio[0].shape == (5 * 1920 - 555,) and out.audio[0].dtype == torch.float32
    assert out.sample_rate == 24000 and out.audio[0].device.type == "cpu"
    none = model.generate(model.processor(chat("x")), max_new_tokens=3, max_frames=0)
    assert none.codes[0].shape == (4, 0) and none.audio[0].numel() == 0


def with_reply(model: OmniModel, ids: list[int]) -> Any:
    """A hook that makes the Thinker say exactly these ids."""
    said = iter(ids)

    def force(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e4)
        forced[..., next(said)] = 1e4
        return forced

    return model.thinker.lm_head.register_forward_hook(force)


@pytest.mark.parametrize(
    ("ids", "frames"), [([258], 0), ([72, 258], 4), ([72], 4), ([275, 257, 266, 258], 4), ([72, 73], 4)]
)
def test_replies_of_every_small_length(model: OmniModel, ids: list[int], frames: int) -> None:
    """No text: no speech. One word, a reply cut by the limit, media and control ids as text: all spoken."""
    hook = with_reply(model, ids)
    try:
        out = model.generate(model.processor(chat("x")), max_new_tokens=len(ids), max_frames=4, seed=1)
    finally:
        hook.remove()
    assert out.replies == [ids] and out.sequences[0, -len(ids) :].tolist() == ids
    assert out.reason == [("max_frames" if frames else "stop") if ids[-1] == 258 else "max_new_tokens"]
    assert out.codes[0].shape[1] <= frames and (frames == 0 or out.codes[0].shape[1] > 0)


def test_reasoning_is_told_apart_and_never_spoken(model: OmniModel) -> None:
    start, end = model.processor.think_token_ids
    encode = model.processor.encode_text
    outs = []
    for ids in ([start, *encode("hmm"), end, *encode("\n\nyes"), 258], [*encode("yes"), 258]):
        hook = with_reply(model, ids)
        try:
            outs.append(model.generate(model.processor(chat("x")), max_new_tokens=20, max_frames=4, seed=1))
        finally:
            hook.remove()
    assert outs[0].reasoning == ["hmm"] and outs[1].reasoning == [None]
    assert outs[0].text[0].strip() == outs[1].text[0] == "yes"
    assert torch.equal(outs[0].codes[0], outs[1].codes[0])


def test_empty_user_turn_and_prompts_without_one(model: OmniModel) -> None:
    for messages in (chat(""), [{"role": "system", "content": "speak"}]):
        out = model.generate(model.processor(messages), max_new_tokens=2, max_frames=2, seed=0)
        assert out.codes[0].shape[1] > 0
    raw = OmniInputs(input_ids=torch.tensor([model.processor.encode_text("no chat at all")]))
    assert model.generate(raw, max_new_tokens=2, max_frames=2, seed=0).codes[0].shape[1] > 0


def read_apart(ids: list[int], think: tuple[int, int] | None, opened: bool = False) -> tuple[list[int], list[int]]:
    reader = ReplyReader(think, opened=opened, decode=lambda ids: " " if ids == [7] else "x")
    kinds = [(reader.feed(token), token) for token in ids]
    return [t for kind, t in kinds if kind == REASONING], [t for kind, t in kinds if kind == ANSWER]


def test_reasoning_and_answer() -> None:
    think = (1, 2)
    assert read_apart([5, 6], think) == ([], [5, 6])
    assert read_apart([1, 5, 2, 7, 6, 7], think) == ([5], [6, 7])  # the gap belongs to neither
    assert read_apart([5, 2, 6], think, opened=True) == ([5], [6])
    assert read_apart([1, 5, 2, 6], think, opened=True) == ([5], [6])
    assert read_apart([1, 5], think) == ([5], [])
    assert read_apart([5, 1, 6, 2], think) == ([], [5, 1, 6, 2])
    assert read_apart([1, 5], None) == ([], [1, 5])


def test_assistant_head() -> None:
    think = (1, 2)
    assert assistant_head([9, 7, 3, 4, 9, 8, 3], 9, 8, think) == ([9, 8, 3], [], False)
    assert assistant_head([9, 8, 3, 4, 5], 9, 8, think).prefill == [4, 5]
    assert assistant_head([9, 8, 3, 1, 3, 2], 9, 8, think) == ([9, 8, 3], [], False)
    assert assistant_head([9, 8, 3, 1, 3], 9, 8, think).opened
    assert assistant_head([9, 8, 3, 4, 9, 7, 3, 6], 9, 8, think) == ([9, 8, 3], [], False)
    assert assistant_head([9, 7, 3, 6], 9, 8, think).header == [9, 8, 3]
    assert assistant_head([4, 5], 9, 8, think).header is None


def test_speak(model: OmniModel) -> None:
    a = model.speak("hello there", speaker="Ethan", max_frames=4, seed=1)
    assert a.dtype == torch.float32 and a.dim() == 1 and 0 < a.numel() <= 4 * 1920 - 555
    assert torch.equal(a, model.speak("hello there", speaker="ethan", max_frames=4, seed=1))
    assert not torch.equal(a, model.speak("hello there", speaker="aiden", max_frames=4, seed=1))
    several = model.speak(["hello there", "<|im_end|> is text here"], speaker="ethan", max_frames=4, seed=1)
    torch.testing.assert_close(several[0], a, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="empty"):
        model.speak("")
    with pytest.raises(TypeError, match="int"):
        model.speak([3])


def test_speak_equals_generate_for_the_same_words_without_a_user(model: OmniModel) -> None:
    ids = model.processor.encode_text("hello")
    hook = with_reply(model, [*ids, 258])
    try:
        inputs = model.processor([{"role": "system", "content": "x"}])
        out = model.generate(inputs, max_new_tokens=40, max_frames=5, seed=4)
    finally:
        hook.remove()
    assert torch.equal(out.audio[0], model.speak("hello", max_frames=5, seed=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speaker": "bob"}, "unknown speaker 'bob'.*aiden, chelsie, ethan"),
        ({"speaker": ["ethan", "ethan"]}, "list of 2 for a batch of 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_frames": -1}, "max_frames"),
        ({"seed": "x"}, "seed"),
        ({"text_sampling": {"temprature": 1}}, "temperature"),
    ],
)
def test_impossible_requests(model: OmniModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(model.processor(chat("x")), **arguments)


def test_prompts_that_the_model_cannot_read(model: OmniModel) -> None:
    with pytest.raises(ValueError, match=r"token id 9999.*640"):
        model.forward(OmniInputs(input_ids=torch.tensor([[9999]])))
    with pytest.raises(ValueError, match=r"8193 tokens.*8192"):
        model.generate(OmniInputs(input_ids=torch.zeros(1, 8193, dtype=torch.int64)))


def test_text_only_variants() -> None:
    values = tiny_config().to_dict()
    values = {**values, "enable_audio_output": False}
    values["thinker_config"] = {**values["thinker_config"], "vision_config": None}
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_dict(values))
    model.processor = OmniProcessor.from_pretrained(TOY_DATA)
    assert not any(name.startswith(("talker", "code2wav", "vision")) for name, _ in model.named_parameters())
    assert model.generate(model.processor(chat("x")), max_new_tokens=2).audio is None
    with pytest.raises(ValueError, match="answers in text only"):
        model.generate(model.processor(chat("x")), return_audio=True)
    with pytest.raises(ValueError, match="no vision encoder"):
        model.generate(model.processor(mixed()[0]))


def test_text_penalty_covers_the_prompt(model: OmniModel) -> None:
    inputs = model.processor(chat("abc"))
    seen = set(inputs.input_ids[0].tolist())
    strong = SamplingConfig(temperature=0, repetition_penalty=1e6)
    reply = model.generate(inputs, text_sampling=strong, max_new_tokens=12, return_audio=False).replies[0]
    assert len(set(reply)) == len(reply) and not seen & set(reply)


def test_bfloat16_stays_near_fp32() -> None:
    """Documented tolerance: relative error of the logits below 5 %, for one drawing of weights and a picture.

    Rounded scores choose other experts where two are nearly equal, which moves the error of a model this small.
    """
    import copy

    with build.fixed():
        model = build.tiny_model()
    picture = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    inputs = model.processor([{"role": "user", "content": content}])
    with torch.no_grad():
        wide = model.forward(inputs)
        narrow_model = copy.deepcopy(model).to(torch.bfloat16)
        narrow = narrow_model.forward(inputs)
    error = (narrow.logits.float() - wide.logits).norm() / wide.logits.norm()
    assert narrow.logits.dtype == torch.bfloat16 and error < 0.05
    out = narrow_model.generate(inputs, max_new_tokens=3, max_frames=3, seed=0)
    assert torch.isfinite(out.audio[0]).all() and out.audio[0].dtype == torch.float32


def test_released_size() -> None:
    with MetaBuild():
        model = OmniModel(OmniConfig.from_pretrained(ROOT / "configs" / "qwen3_omni_30b_a3b.json"))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(count.values()) == 35_259_818_545
    assert count["audio_encoder"] == 647_927_168
    assert count["vision_encoder"] == 538_631_408
    assert sum(p.numel() for p in model.thinker.lm_head.parameters()) == 311_427_072
    assert count["thinker"] == 30_221_219_840 + 311_427_072
    assert count["talker"] == 3_324_596_480
    assert sum(p.numel() for p in model.talker.mtp.parameters()) == 141_570_304
    assert count["code2wav"] == 216_016_577


def test_every_parameter_is_initialised_on_purpose() -> None:
    config = tiny_config()
    torch.use_deterministic_algorithms(True)  # uninitialised memory reads as NaN
    try:
        torch.manual_seed(3)
        first = OmniModel(config)
        torch.manual_seed(3)
        second = OmniModel(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.isfinite(a).all() and torch.equal(a, b), name
        assert a.abs().max() < 5, name


def test_an_encoder_with_a_token_rate_of_its_own(model: OmniModel) -> None:
    from omni.encoders.contract import EncoderOutput

    class OneTokenPerTenFrames(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(128, 32)

        def num_tokens(self, length: int) -> int:
            return -(-length // 10)

        def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> EncoderOutput:
            counts = [self.num_tokens(int(n)) for n in lengths]
            return EncoderOutput(torch.cat([self.proj(f[:, ::10].T)[:n] for f, n in zip(features, counts)]), counts, [])

    mine = OmniModel(model.config, audio_encoder=OneTokenPerTenFrames())
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    mine.processor = processor  # which counts as the encoder does from now on
    sound = noise(16000).numpy()
    inputs = mine.processor([{"role": "user", "content": [{"type": "audio", "audio": sound}]}])
    assert (inputs.input_ids == 275).sum() == 10
    assert mine.generate(inputs, max_new_tokens=2, max_frames=2, seed=0).codes[0].shape[1] > 0


def test_router_logits_stand_in_the_columns_of_the_inputs(model: OmniModel) -> None:
    from omni.layers.moe import load_balancing_loss

    batch = model.processor([chat("hi"), chat("a longer question")])
    with torch.no_grad():
        together = model.forward(batch, with_router_logits=True)
        alone = [model.forward(model.processor(chat(t)), with_router_logits=True) for t in ("hi", "a longer question")]
    mask = batch.attention_mask.bool().flatten()
    expected = [torch.cat(layers) for layers in zip(*(out.router_logits for out in alone))]
    for got, want in zip(together.router_logits, expected):
        torch.testing.assert_close(got[mask], want, atol=1e-5, rtol=1e-5)
    loss = load_balancing_loss(together.router_logits, 2, mask)
    torch.testing.assert_close(loss, load_balancing_loss(expected, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-300])
def test_tiny_temperatures_are_greedy(model: OmniModel, temperature: float) -> None:
    inputs = model.processor(chat("abc"))
    cold = model.generate(inputs, text_sampling={"temperature": temperature}, max_new_tokens=6, return_audio=False)
    assert cold.replies == model.generate(inputs, max_new_tokens=6, return_audio=False).replies


def test_misspelt_arguments_name_the_right_one(model: OmniModel) -> None:
    inputs = model.processor(chat("abc"))
    for call, right in (
        (lambda: model.generate(inputs, max_tokens=3), "max_new_tokens"),
        (lambda: model.stream(inputs, speakr="x"), "speaker"),
        (lambda: model.speak("a", spaeker="x"), "speaker"),
        (lambda: OmniModel.from_pretrained(TOY_DATA, device_mp="auto"), "device_map"),
    ):
        with pytest.raises(TypeError, match=right):
            call()
    for wrong in ("a path", {"thinker_config": {}}):
        with pytest.raises(TypeError, match="OmniConfig"):
            OmniModel(wrong)
    assert model.speak([]) == []


def test_null_values_in_generation_config_mean_the_release(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = model.processor(chat("abc"))
    plain = model.generate(inputs, max_new_tokens=3, max_frames=4, seed=2)
    nulls = {"talker_temperature": None, "talker_top_k": None, "talker_top_p": None}
    monkeypatch.setattr(model, "generation_config", nulls)
    nulls = model.generate(inputs, max_new_tokens=3, max_frames=4, seed=2)
    assert torch.equal(plain.codes[0], nulls.codes[0])


def test_generation_config_says_how_residual_codes_are_drawn(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sampling, two seeds speak alike; with the release's hard-coded sampling they do not."""
    inputs = model.processor(chat("abc"))

    def codes(seed: int, **given: Any) -> torch.Tensor:
        values = {"talker_do_sample": False, "talker_repetition_penalty": 1.0, **given}
        monkeypatch.setattr(model, "generation_config", values)
        return model.generate(inputs, max_new_tokens=3, max_frames=6, seed=seed).codes[0]

    assert torch.equal(codes(1, code_predictor_do_sample=False), codes(2, code_predictor_do_sample=False))
    assert torch.equal(codes(1, code_predictor_top_k=1), codes(2, code_predictor_top_k=1))
    assert not torch.equal(codes(1), codes(2))


def test_speech_ids_outside_the_vocabulary() -> None:
    config = tiny_config().replace(tts_bos_token_id=151672)
    lost = OmniModel(config)
    lost.processor = OmniProcessor.from_pretrained(TOY_DATA)
    inputs = lost.processor(chat("x"))
    with pytest.raises(ValueError, match="tts_bos_token_id 151672"):
        lost.generate(inputs, max_new_tokens=2)
    assert lost.generate(inputs, max_new_tokens=2, return_audio=False).replies


def test_a_seed_leaves_the_global_generator_alone(model: OmniModel) -> None:
    torch.manual_seed(0)
    expected = torch.randint(1000, (3,))
    torch.manual_seed(0)
    model.generate(model.processor(chat("x")), max_new_tokens=2, max_frames=2, seed=5)
    assert torch.equal(torch.randint(1000, (3,)), expected)


def test_autocast(model: OmniModel) -> None:
    inputs = model.processor(chat("x"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.generate(inputs, max_new_tokens=3, max_frames=3, seed=0)
    assert torch.isfinite(out.audio[0]).all()
