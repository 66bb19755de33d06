"""The two sides of a comparison: the same question answered by this library and by transformers, with the clock read
at every token and every frame."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.checkpoint.keys import QWEN3_OMNI
from omni.config import OmniConfig
from omni.generation.events import AudioChunk, TextDelta, TurnEnd
from omni.generation.sampling import SamplingConfig
from omni.generation.streaming_config import StreamingConfig
from omni.model import OmniModel
from omni.processing.inputs import OmniInputs

GREEDY = SamplingConfig(temperature=0)
GREEDY_CODES = SamplingConfig(temperature=0, repetition_penalty=1.05)  # transformers keeps its penalty
EXPERTS = ("grouped_mm", "batched_mm", "eager")
FRAME_BY_FRAME = StreamingConfig(chunk_frames=(1,), silence_s=None, loop_frames=None)
STREAMED = StreamingConfig(silence_s=None, loop_frames=None)


@dataclass
class Answer:
    """One timed answer. Times are seconds since its start, one a token, and one a frame (or sound chunk)."""

    ids: list[int] = field(default_factory=list)
    codes: Tensor | None = None
    samples: int = 0
    token_times: list[float] = field(default_factory=list)
    frame_times: list[float] = field(default_factory=list)
    total_s: float = 0.0
    codec_s: float = 0.0  # of the whole sound, where it is decoded at the end
    rtf_step: float | None = None

    @property
    def first_s(self) -> float:
        """Seconds to the first sound."""
        return self.total_s if self.codec_s or not self.frame_times else self.frame_times[0]

    def token_gaps(self, skip: int = 2) -> list[float]:
        """Seconds between tokens once decoding is steady."""
        return _gaps(self.token_times, skip)

    def frame_gaps(self, skip: int) -> list[float]:
        """Seconds a frame once speech is steady; a codec that runs at the end is shared out evenly."""
        each = self.codec_s / max(1, len(self.frame_times))
        return [gap + each for gap in _gaps(self.frame_times, skip)]


def _gaps(times: Sequence[float], skip: int) -> list[float]:
    kept = times[skip:]
    return [b - a for a, b in pairwise(kept)]


def answer(
    model: OmniModel,
    inputs: OmniInputs,
    tokens: int,
    frames: int = 0,
    *,
    greedy: bool = True,
    streaming: StreamingConfig = FRAME_BY_FRAME,
) -> Answer:
    """Stream one answer of this library: `tokens` of text and `frames` of speech (0: text alone)."""
    arguments: dict[str, Any] = {"max_new_tokens": tokens, "text_sampling": GREEDY, "return_audio": frames > 0}
    if frames:
        arguments |= {"max_frames": frames, "seed": 0}
        if greedy:
            arguments |= {"audio_sampling": GREEDY_CODES, "residual_sampling": GREEDY}
    out, start = Answer(), time.perf_counter()
    for event in model.stream(inputs, streaming=streaming, **arguments):
        now = time.perf_counter() - start
        if isinstance(event, TextDelta):
            out.ids += event.token_ids
            out.token_times.append(now)
        elif isinstance(event, AudioChunk):
            out.samples += event.samples.numel()
            out.frame_times.append(now)
        elif isinstance(event, TurnEnd):
            out.rtf_step = event.timing.get("rtf_step")
    out.total_s = time.perf_counter() - start
    return out


class _Ticks:
    """Notes when transformers' generation hands out a token; the prompt, which it hands out first, is left out."""

    def __init__(self, start: float) -> None:
        self.start, self.times, self.ids = start, list[float](), list[int]()
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter() - self.start)
            self.ids += value.flatten().tolist()
        self.prompt = False

    def end(self) -> None:
        pass


class Peer:
    """transformers' model with the same weights. `setting` holds what was changed from its defaults."""

    def __init__(self, model: Any, config: OmniConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model.eval(), config, device
        self.setting: dict[str, Any] = {}
        self._shipped = self.model.get_experts_implementation()

    @classmethod
    def load(cls, folder: Path, config: OmniConfig, device: torch.device, dtype: torch.dtype) -> Peer:
        """From a checkpoint folder."""
        return cls(peer_class().from_pretrained(folder, dtype=dtype).to(device), config, device)

    @classmethod
    def sharing(cls, ours: OmniModel) -> Peer:
        """On the tensors of our model, for what is too large to be held twice. Raises ValueError if one is copied."""
        found = peer_class()
        tensors = {_name_in_memory(name): p.detach() for name, p in ours.named_parameters()}
        config = found.config_class.from_dict(ours.config.to_dict())
        place = {"": ours.device}
        model = found.from_pretrained(None, config=config, state_dict=tensors, dtype=ours.dtype, device_map=place)
        own = dict(model.named_parameters())
        copied = [name for name, p in tensors.items() if name not in own or own[name].data_ptr() != p.data_ptr()]
        if copied or len(own) != len(tensors):
            raise ValueError(f"this transformers does not share weights: {len(copied)} tensors were copied")
        return cls(model, ours.config, ours.device)

    def use(self, **setting: Any) -> None:
        """Set `experts` (one of `EXPERTS`) and `cache` ("static"); what is absent goes back to the default.

        Raises what transformers raises for a setting that it refuses.
        """
        self.setting = setting
        experts = setting.get("experts")
        self.model.set_experts_implementation(self._shipped if experts is None else experts)

    def answer(self, inputs: OmniInputs, tokens: int, frames: int = 0, *, greedy: bool = True) -> Answer:
        """One answer: `tokens` of text and `frames` of speech (0: text alone)."""
        ids = inputs.input_ids.to(self.device)
        out, start = Answer(), time.perf_counter()
        text, speech = _Ticks(start), _Ticks(start)
        arguments: dict[str, Any] = {
            "thinker_max_new_tokens": tokens,
            "thinker_do_sample": False,
            "thinker_eos_token_id": self.config.im_end_token_id,
            "thinker_streamer": text,
            "return_audio": frames > 0,
        }
        if self.setting.get("cache"):
            arguments["thinker_cache_implementation"] = self.setting["cache"]
        if frames:
            assert self.config.talker_config is not None
            voices = self.config.talker_config.speaker_id or {}
            arguments |= {
                "talker_max_new_tokens": frames + 1,
                "talker_streamer": speech,
                "speaker": default_voice(voices),
            }
            if greedy:
                arguments["talker_do_sample"] = False
            if self.setting.get("cache"):
                arguments["talker_cache_implementation"] = self.setting["cache"]
        with _CodecWatch(self.model, out, self.device):
            result = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        out.total_s = time.perf_counter() - start
        sequences = result[0] if frames else result
        sequences = getattr(sequences, "sequences", sequences)
        out.ids = sequences[0, ids.shape[1] :].tolist()
        out.token_times, out.frame_times = text.times, speech.times[1:]  # a frame is complete when the next one begins
        out.samples = result[1].numel() if frames else 0
        return out


class _CodecWatch:
    """Times the codec of one answer and keeps its codes; the answer itself goes as always."""

    def __init__(self, model: Any, out: Answer, device: torch.device) -> None:
        self.model, self.out, self.device = model, out, device

    def __enter__(self) -> None:
        decode = self.model.code2wav.chunked_decode

        def watched(codes: Tensor, **rest: Any) -> Tensor:
            start = time.perf_counter()
            wave = decode(codes, **rest)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.out.codec_s = time.perf_counter() - start
            self.out.codes = codes[0]
            return wave

        self.model.code2wav.chunked_decode = watched

    def __exit__(self, *_: Any) -> None:
        del self.model.code2wav.chunked_decode


def _name_in_memory(name: str) -> str:
    """transformers' name of one of our parameters while it is loaded; files have others."""
    loaded = [pair for pair in QWEN3_OMNI.also_read if name.startswith(pair[0])]
    if not loaded or name.startswith("thinker.lm_head."):
        return QWEN3_OMNI.to_hub(name)
    ours, theirs = loaded[0]
    return theirs + name[len(ours) :]


def default_voice(voices: dict[str, int]) -> str:
    """The voice that both sides take by default: Ethan, else the first."""
    return next((name for name in voices if name.lower() == "ethan"), next(iter(voices)))


def peer_class() -> Any:
    """transformers' class. Raises ValueError, with the remedy, where it is too old to have one."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = getattr(transformers, "Qwen3OmniMoeForConditionalGeneration", None)
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no Qwen3-Omni to compare with; install transformers>=5.17"
        )
    return found
