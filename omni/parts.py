"""The parts of a model, what they are built from, and where they are: all that generation, sessions and training need.

`OmniModel` (`omni.model`) adds loading, answering and saving. How decoding steps are run belongs to generation, which
is above this file; here it is a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni.code2wav.voices import Voice
from omni.config.model import OmniConfig
from omni.config.reading import USUAL_STD
from omni.layers.decoder_state import DecoderState
from omni.layers.init import initialise
from omni.processing.processor import OmniProcessor

PARTS = ("thinker", "talker", "code2wav")
CHILDREN = ("audio_encoder", "vision_encoder", *PARTS)  # the encoders come and go with the Thinker


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
        given = (audio_encoder, vision_encoder, thinker, talker, code2wav)
        wanted = {*parts, *(CHILDREN[:2] if "thinker" in parts else ())} & config.parts.keys()
        if config.thinker_config is None and not wanted and not any(given):
            raise ValueError(f"this checkpoint has {' and '.join(config.parts)} alone; name some of it in parts=")
        for name, part in zip(CHILDREN, given):
            setattr(self, name, self._build(name) if part is None and name in wanted else part)
        for name, part in zip(CHILDREN, given):
            if part is None and name in wanted:
                initialise(getattr(self, name), self._std_of(name))
        self.eval()

    def _build(self, name: str) -> nn.Module:
        """A new part by its config, as the family says."""
        talker = self.config.parts.get("talker")
        reads = [getattr(talker, "accept_hidden_layer", None)] if name == "thinker" else []
        return self.config.family.builder(name)(self.config.parts[name], *reads)

    def _std_of(self, part: str) -> Callable[[str], float]:
        """What initialises a part: the deviation of its random weights."""
        own = self.config.parts.get(part)
        return lambda _: USUAL_STD if own is None else own.weights_std

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
        parts = self.config.parts
        if part in parts:
            raise ValueError(f"the {part} was not loaded; add {part!r} to parts=")
        if "thinker" not in parts:
            raise ValueError(f"this model has no {part}: its config describes {' and '.join(parts)} alone")
        raise ValueError(f"this variant has no {part}: it answers in text only; pass return_audio=False")


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts as a tuple; ValueError for an unknown or empty choice."""
    chosen = (parts,) if isinstance(parts, str) else tuple(parts or ())
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise ValueError(f"parts must name some of {', '.join(PARTS)}, got {list(chosen)}")
    return chosen
