"""Items on what the processor makes of messages, and on positions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from omni.encoders.resample import StreamingResampler
from omni.generation.prompt import encode_prompt
from omni.rope.positions import (
    Audio,
    AudioVideo,
    Image,
    Text,
    Video,
    placeholder_ids,
    prompt_positions,
    reply_position,
    slice_segments,
)

from .models import DEMO, chat, picture, processor_of, sound, tiny, tiny_config
from .registry import complaint, cut, each_family, item

ODD_PIECES = (1, 7, 160, 401, 3, 12000, 999)

# ---- what the processor makes of messages


def conversations() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Messages and options of calls of the processor, by name."""
    clip, question = str(DEMO / "clip.mp4"), str(DEMO / "question.wav")
    small = {"type": "image", "image": picture(70, 101), "max_pixels": 20000}
    stereo = torch.stack((sound(0.7, 1, 44100), sound(0.7, 2, 44100)), dim=1).numpy()
    frames = [picture(60, 80, i) for i in range(5)]
    heard = {"type": "video", "video": clip, "use_audio_in_video": True}
    turns = [*chat("Name a river."), {"role": "assistant", "content": "The Elbe."}, {"role": "user", "content": "And?"}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    mixed = chat("First", small, {"audio": question}, "then", heard, "and <|im_start|> is text.", system="Be brief.")
    return {
        "text": (chat("hello there, ünïcode 日本"), {}),
        "system": (chat("hello", system="be brief"), {"add_generation_prompt": False}),
        "turns": (turns, {"enable_thinking": False}),
        "tools": (chat("look at it"), {"tools": [tool]}),
        "picture": (chat(small, {"type": "image", "image": str(DEMO / "picture.png")}, "what?"), {}),
        "audio": (chat({"audio": question}, {"audio": stereo, "sampling_rate": 44100}), {}),
        "audio_causal": (chat({"audio": sound(2.6).numpy(), "sampling_rate": 16000}), {"mel_level": "causal"}),
        "video": (chat({"type": "video", "video": clip}, "what?"), {"max_pixels": 120 * 120}),
        "video_sound": (chat({"type": "video", "video": clip}), {"use_audio_in_video": True, "fps": 3.0}),
        "video_frames": (chat({"type": "video", "video": frames, "fps": 4}), {"max_frames": 4}),
        "batch": ([chat("a"), mixed, turns, chat({"audio": question}, "a longer question")], {}),
    }


@each_family("processor.inputs")
def processed(family: str) -> Any:
    processor = processor_of(family)
    return {name: processor(given, **options).to_dict() for name, (given, options) in conversations().items()}


@each_family("processor.words")
def words(family: str) -> Any:
    """Tokens and texts, and what is refused."""
    processor = processor_of(family)
    ids = processor.encode_text("a text with <|im_end|> and 𝄞")
    bad: list[Any] = [[], "text", chat({"type": "audio"}), chat({"type": "picture", "picture": 1}), [{"role": "user"}]]
    said = [complaint(lambda given=given: processor(given)) for given in bad]
    said += [complaint(lambda: processor(chat("a"), mel_level="loud"))]
    counts = [processor.audio_tokens(frames) for frames in range(1, 900, 7)]
    marks = [*processor.tokens, processor.audio_end_id, processor.vision_end_id]
    return ids, processor.decode(ids), marks, processor.speech_system, counts, said


@each_family("processor.mel")
def mel(family: str) -> Any:
    """Log-mel features at both levels, and streamed in odd pieces."""
    log_mel, clip = processor_of(family).log_mel, sound(3.3, 5)
    state = log_mel.init_state()
    streamed = [log_mel.step(piece, state) for piece in cut(clip, ODD_PIECES)]
    streamed.append(log_mel.finish(state))
    return [log_mel(clip, level) for level in ("clip", "causal")], log_mel(clip[:170]), streamed


@item("processor.resampler")
def resampled() -> Any:
    out = []
    for rate_hz in (8000, 16000, 24000, 44100, 48000):
        clip = sound(0.6, 3, rate_hz)
        resampler = StreamingResampler(rate_hz, 16000)
        state = resampler.init_state()
        pieces = [resampler.step(piece, state) for piece in cut(clip, ODD_PIECES)]
        out.append((resampler(clip), pieces, resampler.finish(state)))
    return out


# ---- positions


@each_family("positions.prompts")
def prompts(family: str) -> Any:
    """Segments' lengths and positions of all conversations, and as the model lays them out."""
    model, out = tiny(family), {}
    thinker = model.config.thinker_config
    for name, (given, options) in conversations().items():
        inputs = processor_of(family)(given, **options)
        rows = inputs.segments(thinker)
        laid_out = [prompt_positions(row, thinker.position_rule) for row in rows]
        prompt = encode_prompt(model, inputs)
        whole = (prompt.ids, prompt.lengths, prompt.embeds, prompt.positions, prompt.next_position, prompt.media)
        out[name] = ([[s.length for s in row] for row in rows], laid_out, whole, prompt.taps, prompt.columns)
    return out


def random_segments(rng: random.Random) -> list[Any]:
    """A prompt of text and media; videos with regular, dense and broken times, with and without sound."""

    def video() -> Video:
        count, step = rng.randint(1, 14), rng.choice((0.1, 0.25, 0.5, 1.0, 1.3))
        gaps = [rng.choice((0.0, 0.0, 0.0, 2.3, 6.1)) if rng.random() < 0.4 else 0.0 for _ in range(count)]
        times = tuple(sum(gaps[: i + 1]) + i * step for i in range(count))
        return Video(times, rng.randint(1, 6), rng.randint(1, 6))

    makers: list[Callable[[], Any]] = [
        lambda: Text(rng.randint(1, 20)),
        lambda: Audio(rng.randint(1, 150)),
        lambda: Image(rng.randint(1, 12), rng.randint(1, 12)),
        video,
        lambda: AudioVideo(video(), Audio(rng.choice((0, 1, 25, 49, 50, 51, 120, 301)))),
    ]
    return [rng.choice(makers)() for _ in range(rng.randint(1, 8))]


@each_family("positions.random")
def random_positions(family: str) -> Any:
    """Positions of many random prompts from several starts, their placeholders, and slices of them."""
    rng, rule, out = random.Random(11), tiny_config(family).thinker_config.position_rule, []
    tokens = processor_of(family).tokens
    for _ in range(150):
        segments = random_segments(rng)
        positions, following = prompt_positions(segments, rule, rng.choice((0.0, 0.0, 17.0, 100.5)))
        ids = [placeholder_ids(s, tokens, rule) for s in segments if not isinstance(s, Text)]
        edges = [sum(s.length for s in segments[:i]) for i in range(len(segments) + 1)]
        start, stop = sorted((rng.choice(edges), rng.choice(edges)))
        kept = [s.length for s in slice_segments(segments, start, stop)]
        out.append((positions, following, reply_position(positions), ids, kept))
    return out
