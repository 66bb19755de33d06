"""The two sides of a comparison: the same question answered by this library and by transformers, with the clock read
at every token and every frame."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni.checkpoint.keys import KeyTable
from omni.config.model import OmniConfig
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


@dataclass(frozen=True)
class PeerFamily:
    """What differs between transformers' models of the families.

    release: its name in messages; class_name: of the model; codec: the part that decodes all codes, and its method;
    spoken, silent: arguments of `generate` with and without speech; extra_codes: Talker tokens beyond the frames that
    are wanted; padded: it reads the prompt of one row rightly only beside padding, so it gets one slot of it; experts:
    whether it has any; told_stops: the codec ids that end speech are an argument, not the config's; shares: built
    without a folder, as it reads no voice file.
    """

    release: str
    class_name: str
    codec: tuple[str, str]
    spoken: Mapping[str, Any]
    silent: Mapping[str, Any]
    extra_codes: int = 0
    padded: bool = False
    experts: bool = True
    told_stops: bool = False
    shares: bool = True


PEERS = {
    "qwen3_omni_moe": PeerFamily(
        "Qwen3-Omni",
        "Qwen3OmniMoeForConditionalGeneration",
        codec=("code2wav", "chunked_decode"),
        spoken={"return_audio": True},
        silent={"return_audio": False},
        extra_codes=1,
    ),
    "qwen2_5_omni": PeerFamily(
        "Qwen2.5-Omni",
        "Qwen2_5OmniForConditionalGeneration",
        codec=("token2wav", "forward"),
        spoken={"generation_mode": "audio"},
        silent={"generation_mode": "text"},
        padded=True,
        experts=False,
        told_stops=True,
        shares=False,
    ),
}


def peer_of(model_type: str) -> PeerFamily:
    """What transformers has for a family. Raises ValueError where it has no such model."""
    if model_type not in PEERS:
        raise ValueError(f"transformers has no model beside {model_type!r} to measure against")
    return PEERS[model_type]


class Peer:
    """transformers' model with the same weights. `setting` holds what was changed from its defaults."""

    def __init__(self, model: Any, config: OmniConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model.eval(), config, device
        self.setting: dict[str, Any] = {}
        self.family = peer_of(config.model_type)
        self._shipped = self.model.get_experts_implementation() if self.family.experts else None

    @classmethod
    def load(cls, folder: Path, config: OmniConfig, device: torch.device, dtype: torch.dtype) -> Peer:
        """From a checkpoint folder."""
        return cls(peer_class(config.model_type).from_pretrained(folder, dtype=dtype).to(device), config, device)

    @classmethod
    def sharing(cls, ours: OmniModel) -> Peer:
        """On the tensors of our model, for what is too large to be held twice. Raises ValueError if one is copied."""
        if not peer_of(ours.config.model_type).shares:
            raise ValueError(f"{ours.config.model_type} is compared by way of a folder; leave --share-weights out")
        found, table = peer_class(ours.config.model_type), ours.key_table
        tensors = {_name_in_memory(table, name): p.detach() for name, p in ours.named_parameters()}
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
        if self.family.experts:
            self.model.set_experts_implementation(setting.get("experts") or self._shipped)

    def answer(self, inputs: OmniInputs, tokens: int, frames: int = 0, *, greedy: bool = True) -> Answer:
        """One answer: `tokens` of text and `frames` of speech (0: text alone)."""
        ids = inputs.input_ids.to(self.device)
        mask = torch.ones_like(ids)
        if self.family.padded:
            ids, mask = F.pad(ids, (1, 0), value=self.config.im_end_token_id), F.pad(mask, (1, 0))
        out, start = Answer(), time.perf_counter()
        text, speech = _Ticks(start), _Ticks(start)
        talker = self.config.talker_config
        assert talker is not None
        arguments: dict[str, Any] = {
            "thinker_max_new_tokens": tokens,
            "thinker_do_sample": False,
            "thinker_eos_token_id": self.config.im_end_token_id,
            "thinker_streamer": text,
            "speaker": default_voice(talker.speaker_id or {}),
            **(self.family.spoken if frames else self.family.silent),
        }
        if self.setting.get("cache"):
            arguments["thinker_cache_implementation"] = self.setting["cache"]
        if frames:
            arguments |= {
                "talker_max_new_tokens": frames + self.family.extra_codes,
                "talker_streamer": speech,
            }
            if self.family.told_stops:
                arguments["talker_eos_token_id"] = sorted(talker.codec_stop_ids)
            if greedy:
                arguments["talker_do_sample"] = False
            if self.setting.get("cache"):
                arguments["talker_cache_implementation"] = self.setting["cache"]
        with _CodecWatch(self.model, self.family, out, self.device):
            result = self.model.generate(input_ids=ids, attention_mask=mask, **arguments)
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

    def __init__(self, model: Any, family: PeerFamily, out: Answer, device: torch.device) -> None:
        self.out, self.device = out, device
        part, self.method = family.codec
        self.codec = getattr(model, part)

    def __enter__(self) -> None:
        decode = getattr(self.codec, self.method)

        def watched(codes: Tensor, *more: Any, **rest: Any) -> Tensor:
            start = time.perf_counter()
            wave = decode(codes, *more, **rest)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.out.codec_s = time.perf_counter() - start
            self.out.codes = codes[0] if codes.dim() > 2 else codes[:1]
            return wave

        setattr(self.codec, self.method, watched)

    def __exit__(self, *_: Any) -> None:
        delattr(self.codec, self.method)


def _name_in_memory(table: KeyTable, name: str) -> str:
    """transformers' name of one of our parameters while it is loaded; files have others."""
    loaded = [pair for pair in table.also_read if name.startswith(pair[0])]
    if not loaded or name.startswith("thinker.lm_head."):
        return table.to_hub(name)
    ours, theirs = loaded[0]
    return theirs + name[len(ours) :]


def default_voice(voices: dict[str, int]) -> str:
    """The voice that both sides take by default: Ethan, else the first."""
    return next((name for name in voices if name.lower() == "ethan"), next(iter(voices)))


def peer_class(model_type: str) -> Any:
    """transformers' class of a family. Raises ValueError, with the remedy, where it is too old to have one."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family = peer_of(model_type)
    found = getattr(transformers, family.class_name, None)
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {family.release} to compare with; "
            "install transformers>=5.17"
        )
    return found
