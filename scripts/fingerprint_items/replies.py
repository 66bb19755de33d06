"""Items on replies without a session: `generate`, `stream`, `speak`, and how two models agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omni import AudioChunk, OmniModel, OmniOutput, OmniSession, SamplingConfig, StreamingConfig, TextDelta, TurnEnd
from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.code2wav.ode_sampler import ODEConfig
from omni.generation.graphs import GraphPool
from omni.metrics.agreement import agreement
from omni.packaged.nano import QUESTIONS

from .inputs import conversations
from .models import build, chat, fill, nano, processor_of, tiny
from .registry import complaint, each_family, item

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
FAST = ODEConfig(num_steps=3, solver="euler")
SCHEDULE = ChunkSchedule(chunk_codes=4, left_codes=2, lookahead_codes=2, vocoder_lookahead_frames=2)
# Greedy text and speech, few of both; the seed is that of Token2Wav's noise.
PLAIN: dict[str, Any] = {
    "max_new_tokens": 6,
    "max_frames": 12,
    "audio_sampling": {"temperature": 0.0, "repetition_penalty": 1.3},
    "residual_sampling": GREEDY,
    "seed": 3,
}
BATCH = [chat("hi"), chat("a much longer question than the first", system="be brief"), chat("three")]
SPEAKERS = {"qwen3": ["Ethan", "aiden", None], "qwen2_5": ["ann", "BOB", None]}


def told(events: Iterable[Any]) -> list[Any]:
    """Events as plain values, without the timings."""
    out: list[Any] = []
    for event in events:
        if isinstance(event, TextDelta):
            out.append(("text", event.row, event.text, event.token_ids, event.reasoning))
        elif isinstance(event, AudioChunk):
            out.append(("sound", event.row, event.samples, event.sample_rate, event.start_sample))
        else:
            assert isinstance(event, TurnEnd)
            out.append(("end", event.row, event.reason, event.text, event.usage))
    return out


def whole(out: OmniOutput) -> Any:
    """An output as plain values, without the timings."""
    return (
        (out.sequences, out.replies, out.text, out.reasoning, out.codes, out.audio, out.sample_rate, out.reason),
        sorted(out.timing),
    )


def windows(**changes: Any) -> StreamingConfig:
    """Streaming with small windows and a short ODE for the second family's codec."""
    return StreamingConfig(**{"codec_schedule": SCHEDULE, "codec_ode": FAST, **changes})


@each_family("generate.greedy")
def greedy(family: str) -> Any:
    model = tiny(family)
    return whole(model.generate(model.processor(chat("hello there")), text_sampling=GREEDY, **PLAIN))


@each_family("generate.sampled")
def sampled(family: str) -> Any:
    """The release's way, other ways, and the global generator in place of a seed."""
    model, out = tiny(family), []
    inputs = model.processor(chat("hello there"))
    warm = SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
    for arguments in (
        {"seed": 11},
        {"seed": 12, "text_sampling": warm, "audio_sampling": warm, "residual_sampling": {"temperature": 1.3}},
        {},
    ):
        torch.manual_seed(5)
        out.append(whole(model.generate(inputs, 8, max_frames=10, **arguments)))
    return out


@each_family("generate.batch")
def batch(family: str) -> Any:
    """Unequal prompts, a speaker, a seed and a sampling each."""
    model = tiny(family)
    out = model.generate(
        model.processor(BATCH),
        7,
        max_frames=9,
        speaker=SPEAKERS[family],
        seed=[1, 2, 3],
        text_sampling=[None, GREEDY, SamplingConfig(temperature=1.2, top_k=5)],
        audio_sampling=[SamplingConfig(top_k=3), None, GREEDY],
    )
    return whole(out)


@each_family("generate.media")
def with_media(family: str) -> Any:
    """Pictures, sound, videos with and without sound, in one batch and alone."""
    model, given = tiny(family), conversations()
    out = []
    for name in ("picture", "audio", "audio_causal", "video", "video_sound", "batch"):
        messages, options = given[name]
        out.append(whole(model.generate(model.processor(messages, **options), **{**PLAIN, "max_frames": 5})))
    return out


@each_family("generate.silent")
def silent(family: str) -> Any:
    model = tiny(family)
    inputs = model.processor(BATCH)
    return whole(model.generate(inputs, 9, return_audio=False)), whole(model.generate(inputs, 1, max_frames=1, seed=0))


@each_family("generate.errors")
def errors(family: str) -> Any:
    """What impossible requests are told."""
    model = tiny(family)
    inputs = model.processor(chat("x"))
    wrong: list[dict[str, Any]] = [
        {"speaker": "eve"},
        {"speaker": ["a", "b"]},
        {"max_new_tokens": 0},
        {"max_frames": 0},
        {"text_sampling": {"temperatur": 1}},
        {"audio_sampling": {"top_p": 2.0}},
        {"seed": "x"},
        {"sed": 1},
    ]
    said = [complaint(lambda wrong=given: model.generate(inputs, **wrong)) for given in wrong]
    calls: list[Callable[[], Any]] = [
        lambda: model.speak(""),
        lambda: model.speak(5),
        lambda: model.code2wav(torch.full((1, 9, 2), 3)),
        lambda: model.generate("text"),
        lambda: OmniModel(model.config, parts=["ear"]),
        lambda: StreamingConfig(chunk_frames=()),
        lambda: SamplingConfig(temperature=-1),
        lambda: model.compile("fast"),
    ]
    return said, [complaint(call) for call in calls]


@each_family("stream.plain")
def stream(family: str) -> Any:
    model = tiny(family)
    return told(model.stream(model.processor(BATCH), speaker=SPEAKERS[family], **PLAIN))


@each_family("stream.configs")
def stream_configs(family: str) -> Any:
    """Chunk sizes, text ahead, windows of Token2Wav, and the watch for runaway speech."""
    model, out = tiny(family), []
    inputs = model.processor(BATCH[:2])
    early = ChunkSchedule(chunk_codes=2, left_codes=2, lookahead_codes=0, vocoder_lookahead_frames=1)
    for streaming in (
        windows(chunk_frames=(1,)),
        windows(chunk_frames=(5, 2), text_ahead=4),
        windows(codec_schedule=early, prefill_tokens=3),
        windows(codec_schedule="whole", chunk_frames=(1, 1, 2, 4, 8)),
    ):
        out.append(told(model.stream(inputs, streaming=streaming, **PLAIN)))
    exact = windows(codec_schedule=ChunkSchedule(4, 2, 2))
    out.append(told(model.stream(inputs, streaming=exact, **{**PLAIN, "max_frames": 60})))
    sampled = model.stream(inputs, 12, max_frames=4, seed=[8, 9], streaming=windows())
    return out, told(sampled), told(model.stream(inputs, 5, return_audio=False))


def force(head: nn.Module, ids: Sequence[int], after: int) -> None:
    """Make a head choose these ids, one a call, and another one ever after."""
    left = iter(ids)

    def chosen(_: Any, __: Any, logits: Tensor) -> Tensor:
        token = torch.tensor([next(left, after)])
        return torch.full_like(logits, -1e4).index_fill(-1, token, 1e4)

    head.register_forward_hook(chosen)


@each_family("generate.reasoning")
def reasoning(family: str) -> Any:
    """A reply that thinks before it answers and stops by itself: generated, streamed, in a session."""
    out: list[Any] = []
    for how in ("generate", "stream", "session"):
        model = build(family)
        think = model.processor.think_token_ids
        assert think is not None
        encode = model.processor.encode_text
        reply = [think[0], *encode("let me see"), think[1], *encode("\n\nthe answer, in short")]
        force(model.thinker.lm_head, reply, model.config.im_end_token_id)
        arguments = {**PLAIN, "max_new_tokens": 80, "max_frames": 70}
        if how == "generate":
            out.append(whole(model.generate(model.processor(chat("hi")), **arguments)))
        elif how == "stream":
            out.append(told(model.stream(model.processor(chat("hi")), streaming=windows(), **arguments)))
        else:
            session = OmniSession(model, streaming=windows())
            session.push_text("hi")
            out.append((told(session.respond(**arguments)), session.ids))
    return out


@each_family("generate.text_only")
def text_only(family: str) -> Any:
    """A model without Talker and codec."""
    model = fill(OmniModel(tiny(family).config, parts=["thinker"]))
    model.processor = processor_of(family)
    session = OmniSession(model)
    session.push_text("hi")
    reply = told(session.respond(max_new_tokens=6, return_audio=False)), session.ids
    inputs = model.processor(BATCH)
    out = whole(model.generate(inputs, 6, return_audio=False, text_sampling={"temperature": 0.9}, seed=[1, 2, 3]))
    return (
        out,
        reply,
        complaint(lambda: model.generate(inputs, 4, return_audio=True)),
        complaint(lambda: model.speak("a")),
    )


@each_family("stream.runaway")
def runaway(family: str) -> Any:
    """Speech that repeats itself, and speech that is silent, are ended where that is watched."""
    out = []
    for streaming in (windows(loop_frames=4), windows(silence_s=5e-3)):
        model = build(family)
        force(model.talker.codec_head, range(3, 9), 9)
        for weight in model.code2wav.parameters():
            weight.zero_()
        out.append(told(model.stream(model.processor(chat("hi")), streaming=streaming, **{**PLAIN, "max_frames": 60})))
    return out


class Replayed:
    """Stands in for the capture of a CUDA graph on a CPU: results lie in the same memory at each call."""

    def __call__(self, step: Callable[[], Any]) -> Callable[[], Any]:
        step()
        fixed = tuple(value.clone() for value in step())

        def replay() -> Any:
            for place, value in zip(fixed, step()):
                place.copy_(value)
            return fixed

        return replay


@each_family("stream.captured")
def captured(family: str) -> Any:
    """The steps that a GPU captures, run on the CPU."""
    model = build(family)
    model.graphs = GraphPool(capture=Replayed())
    inputs = model.processor(BATCH[:2])
    first = told(model.stream(inputs, streaming=windows(), **PLAIN))
    return first, whole(model.generate(inputs, 5, max_frames=5, seed=[1, 2]))


@each_family("speak")
def speak(family: str) -> Any:
    model = tiny(family)
    arguments = {name: PLAIN[name] for name in ("audio_sampling", "residual_sampling")}
    several = model.speak(["a given text", "another"], speaker=SPEAKERS[family][:2], max_frames=9, seed=[4, 5])
    return model.speak("a given text", max_frames=12, seed=3, **arguments), several


@each_family("agreement")
def agreements(family: str) -> Any:
    """A model beside itself and beside a perturbed copy."""
    model, other = tiny(family), build(family, noise=0.05)
    inputs = processor_of(family)(BATCH)
    found = [
        agreement(changed, model, inputs, max_new_tokens=6, max_frames=8, seed=2, **options)
        for changed in (model, other)
        for options in ({}, {"speaker": SPEAKERS[family]}, {"return_audio": False})
    ]
    return [(vars(a), a.table()) for a in found]


@item("nano.generate")
def nano_generate() -> Any:
    """Texts in one batch, and a spoken question that is answered aloud."""
    model = nano()
    questions = ["What is seven plus five?", "say the small dog sees a tree", "what is the capital of france?"]
    written = model.generate(model.processor([chat(question) for question in questions]), return_audio=False)
    spoken = model.generate(model.processor(QUESTIONS[1].messages()), max_frames=30)
    return whole(written), whole(spoken)


@item("nano.stream")
def nano_stream() -> Any:
    model = nano()
    inputs = model.processor(QUESTIONS[2].messages())
    return told(model.stream(inputs, max_frames=30, streaming=StreamingConfig(chunk_frames=(1, 3))))


@item("nano.speak")
def nano_speak() -> Any:
    return nano().speak("to the right", max_frames=40, seed=1)
