"""The parts of a model, what they are built from, and where they are: all that generation, sessions and training need.

`OmniModel` (`omni.model`) adds loading, answering and saving. How decoding steps are run belongs to generation, which
is above this file; here it is a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.token2wav import Token2Wav
from omni.code2wav.voices import Voice
from omni.config.qwen2_5_encoders import WhisperAudioEncoderConfig, WindowVisionEncoderConfig
from omni.config.qwen2_5_omni import DenseTalkerConfig
from omni.config.qwen3_omni import AudioEncoderConfig, Code2WavConfig, OmniConfig, TalkerConfig, VisionEncoderConfig
from omni.config.token2wav import Token2WavConfig
from omni.encoders.audio import AudioEncoder
from omni.encoders.vision import VisionEncoder
from omni.encoders.whisper_audio import WhisperAudioEncoder
from omni.encoders.window_vision import WindowVisionEncoder
from omni.layers.decoder_state import DecoderState
from omni.layers.init import initialise
from omni.processing.processor import OmniProcessor
from omni.talker.single_codebook import SingleCodebookTalker
from omni.talker.talker import Talker
from omni.thinker.thinker import Thinker

PARTS = ("thinker", "talker", "code2wav")
CHILDREN = ("audio_encoder", "vision_encoder", *PARTS)  # the encoders come and go with the Thinker
_USUAL_STD = 0.02  # where a part's config names none
BUILDERS: dict[type, Callable[[Any], nn.Module]] = {  # what a part's config makes
    AudioEncoderConfig: AudioEncoder,
    VisionEncoderConfig: VisionEncoder,
    TalkerConfig: Talker,
    Code2WavConfig: Code2Wav,
    WhisperAudioEncoderConfig: WhisperAudioEncoder,
    WindowVisionEncoderConfig: WindowVisionEncoder,
    DenseTalkerConfig: SingleCodebookTalker,
    Token2WavConfig: Token2Wav,
}


class StepRunner(Protocol):
    """How the steps of decoding are run: as written or compiled (`omni.generation.steps.Steps`).

    static: each shape costs a compilation, so there should be few.
    """

    @property
    def static(self) -> bool: ...
    @property
    def layer(self) -> Callable[..., Tensor]: ...
    @property
    def residual(self) -> Callable[..., Tensor] | None: ...
    @property
    def draw(self) -> Callable[..., Tensor]: ...
    @property
    def codec(self) -> Callable[..., Tensor]: ...
    def thinker(self, thinker: Any, ids: Tensor, state: DecoderState, span: int | None) -> tuple[Tensor, Tensor]: ...
    def talker(self, talker: Any, embeds: Tensor, state: DecoderState, span: int | None) -> tuple[Tensor, Tensor]: ...
    def begin_turn(self) -> None: ...


class RunnerPool(Protocol):
    """Runners whose steps are captured, kept for their next user (`omni.generation.graphs.GraphPool`)."""

    def take(self, user: object, model: Any, rows: int, capacity: int) -> Any: ...


class ModelParts(nn.Module):
    """The parts of a model, each None where the variant or `parts` leaves it out.

    Attributes beside the parts: `config`; `processor`; `generation_config`, the values of generation_config.json;
    `voices`, the recordings by name that some codec decoders need; `steps` and `graphs`, how decoding is run.
    """

    # Each part is any module that keeps its contract, or None; a type would only name the released one.
    audio_encoder: Any
    vision_encoder: Any
    thinker: Any
    talker: Any
    code2wav: Any
    steps: StepRunner
    graphs: RunnerPool | None = None  # captured steps, if any

    def __init__(
        self,
        config: OmniConfig,
        parts: Sequence[str] = PARTS,
        *,
        audio_encoder: nn.Module | None = None,
        vision_encoder: nn.Module | None = None,
        thinker: nn.Module | None = None,
        talker: nn.Module | None = None,
        code2wav: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, OmniConfig):
            raise TypeError(
                f"OmniModel takes an OmniConfig, got {type(config).__name__}; read one with "
                "OmniConfig.from_pretrained, or load a checkpoint with OmniModel.from_pretrained"
            )
        parts = check_parts(parts)
        self.config = config
        self.processor: OmniProcessor | None = None
        self.generation_config: dict[str, Any] = {}
        self.voices: dict[str, Voice] = {}
        own = (audio_encoder, vision_encoder, thinker, talker, code2wav)
        given = {name for name, part in zip(CHILDREN, own) if part is not None}
        thinks, speaks = "thinker" in parts, config.has_talker
        c, t = config.thinker_config, config.talker_config
        accept = t.accept_hidden_layer if t is not None and speaks else None
        if audio_encoder is None and thinks and c.audio_config is not None:
            audio_encoder = _build(c.audio_config)
        if vision_encoder is None and thinks and c.vision_config is not None:
            vision_encoder = _build(c.vision_config)
        if thinker is None and thinks:
            thinker = Thinker(c, accept)
        if talker is None and speaks and "talker" in parts and t is not None:
            talker = _build(t)
        if code2wav is None and speaks and "code2wav" in parts and config.code2wav_config is not None:
            code2wav = _build(config.code2wav_config)
        self.audio_encoder, self.vision_encoder = audio_encoder, vision_encoder
        self.thinker, self.talker, self.code2wav = thinker, talker, code2wav
        for name, part in self.named_children():
            if name not in given:
                initialise(part, self._std_of(name))
        self.eval()

    def _std_of(self, part: str) -> Any:
        """`initializer_range` of the config that governs a module, by its name within `part`."""
        c = self.config
        configs: dict[str, Any] = {
            "audio_encoder": c.thinker_config.audio_config,
            "vision_encoder": c.thinker_config.vision_config,
            "thinker": c.thinker_config.text_config,
            "talker": c.talker_config and c.talker_config.text_config,
            "code2wav": c.code2wav_config,
        }
        return lambda name: getattr(configs[part], "initializer_range", _USUAL_STD)

    def _initialise_only(self, names: set[str]) -> None:
        """Draw the named parameters at random, as a new model would."""
        for part, module in self.named_children():
            own = {name[len(part) + 1 :] for name in names if name.startswith(part + ".")}
            if own:
                initialise(module, self._std_of(part), own)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go: the device of its first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the model's first parameter."""
        return next(self.parameters()).dtype

    def require(self, part: str) -> None:
        """Raise ValueError, with the remedy, if a part of the model is not there."""
        if getattr(self, part) is not None:
            return
        if part in ("talker", "code2wav") and not self.config.has_talker:
            raise ValueError(f"this variant has no {part}: it answers in text only; pass return_audio=False")
        raise ValueError(f"the {part} was not loaded; add {part!r} to parts=")


def _build(config: Any) -> nn.Module:
    return BUILDERS[type(config)](config)


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts as a tuple; ValueError for an unknown or empty choice."""
    chosen = (parts,) if isinstance(parts, str) else tuple(parts or ())
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise ValueError(f"parts must name some of {', '.join(PARTS)}, got {list(chosen)}")
    return chosen
