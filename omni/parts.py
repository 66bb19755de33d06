"""The parts of a model, what they are built from, and where they are: all that generation, sessions and training need.

`OmniModel` (`omni.model`) adds loading, answering and saving. How decoding steps are run belongs to generation, which
is above this file; here it is a protocol.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from omni.code2wav.contract import CodecDecoder
from omni.code2wav.voices import Voice
from omni.config.keywords import names_keywords
from omni.config.model import OmniConfig
from omni.config.reading import USUAL_STD
from omni.encoders.contract import (
    AudioEncoderContract,
    EncoderOutput,
    VisionEncoderContract,
    check_output,
    count_tokens,
    joined_cuts,
)
from omni.layers.decoder_state import DecoderState
from omni.layers.init import initialise
from omni.layers.threads import threads_for, using_threads
from omni.processing.processor import OmniProcessor
from omni.talker.contract import TalkerContract
from omni.thinker.contract import ThinkerContract

PARTS = ("thinker", "talker", "code2wav")
CHILDREN = ("audio_encoder", "vision_encoder", *PARTS)  # the encoders come and go with the Thinker
CONTRACTS: dict[str, type[nn.Module]] = {
    "audio_encoder": AudioEncoderContract,
    "vision_encoder": VisionEncoderContract,
    "thinker": ThinkerContract,
    "talker": TalkerContract,
    "code2wav": CodecDecoder,
}
_CLIPS = (*range(1, 401), 3000, 30000)  # mel frames: by the tokens of these two ways of counting are told apart
_SENSES = {"audio_encoder": "listen", "vision_encoder": "see"}


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
    def thinker(
        self, thinker: ThinkerContract, ids: Tensor, state: DecoderState, span: int | None
    ) -> tuple[Tensor, Tensor]: ...
    def talker(
        self, talker: TalkerContract, embeds: Tensor, state: DecoderState, span: int | None
    ) -> tuple[Tensor, Tensor]: ...
    def begin_turn(self) -> None: ...


class RunnerPool(Protocol):
    """Runners whose steps are captured, kept for their next user (`omni.generation.graphs.GraphPool`)."""

    def take(self, user: object, model: Any, rows: int, capacity: int) -> Any: ...


class ModelParts(nn.Module):
    """The parts of a model, each None where the variant or `parts` leaves it out.

    Attributes beside the parts: `config`; `processor`; `generation_config`, the values of generation_config.json;
    `voices`, the recordings by name that some codec decoders need; `steps` and `graphs`, how decoding is run;
    `decode_threads`, how many CPU threads it takes (None: one for a small model, else as many as torch has).

    A part may be replaced at any time; it is checked, and one that does not derive from its contract is given the
    contract's defaults. The processor counts the tokens of a sound as the audio encoder does, if need be in a copy.
    """

    audio_encoder: AudioEncoderContract | None
    vision_encoder: VisionEncoderContract | None
    thinker: ThinkerContract | None
    talker: TalkerContract | None
    code2wav: CodecDecoder | None
    steps: StepRunner
    graphs: RunnerPool | None = None  # captured steps, if any
    decode_threads: int | None = None

    @names_keywords
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
        """Where the model's inputs go: the device of the Thinker, without one of the first part.

        Where the Thinker's first parameter is kept on disk, it is that of the first one that is not.
        """
        first = next((self.thinker or self).parameters()).device
        if first.type == "meta":
            first = next((p.device for p in self.parameters() if p.device.type != "meta"), first)
        return first

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the Thinker's first parameter, without one of the model's."""
        return next((self.thinker or self).parameters()).dtype

    def input_dtype(self, part: str) -> torch.dtype:
        """The floating type in which a part computes: that of its first parameter, without one the model's."""
        return next((p.dtype for p in self.require(part).parameters() if p.is_floating_point()), self.dtype)

    def decoding_threads(self) -> AbstractContextManager[None]:
        """Inside, this OS thread has as many CPU threads as decoding takes; see `omni.layers.threads`."""
        if self.device.type != "cpu":
            return using_threads(None)
        width = self.config.thinker.text_config.hidden_size
        return using_threads(threads_for(width) if self.decode_threads is None else self.decode_threads)

    def reading_threads(self, tokens: int) -> AbstractContextManager[None]:
        """Likewise for reading so many tokens of prompts at once: a small model reads a short piece in one thread.

        Training, seen as gradients that are kept, and a model with `decode_threads` read with as many as torch has.
        """
        if self.device.type != "cpu" or self.decode_threads is not None or torch.is_grad_enabled():
            return using_threads(None)
        return using_threads(threads_for(self.config.thinker.text_config.hidden_size, tokens))

    def encode_audio(
        self, features: Tensor, lengths: Tensor, cuts: Sequence[Mapping[str, int]] | None = None
    ) -> EncoderOutput:
        """Log-mel features [C, M, F] of clips of `lengths` frames -> embeddings as wide as the Thinker's.

        cuts: chunk and attention window of each clip, `chosen_cuts` of the encoder (None: its own). Raises ValueError
        or TypeError if the encoder gives something else, or is not there.
        """
        encoder = self.require("audio_encoder")
        frames, cuts = lengths.tolist(), [{}] * len(lengths) if cuts is None else cuts
        counted = [count_tokens(encoder, n, own) for n, own in zip(frames, cuts)]
        with self.reading_threads(sum(counted)):
            out = encoder(features.to(self.device, self.input_dtype("audio_encoder")), lengths, **joined_cuts(cuts))
        out = check_output(encoder, out, self.config.thinker.text_config)
        if counted != out.lengths:
            raise ValueError(
                f"{type(encoder).__name__} gives {out.lengths} tokens for clips of {frames} mel frames; its num_tokens "
                f"says {counted}"
            )
        return out

    def encode_vision(self, pixels: Tensor, grids: Tensor) -> EncoderOutput:
        """Patches [N, values] of pictures and videos on grids int64 [items, 3] -> embeddings and taps, likewise."""
        encoder = self.require("vision_encoder")
        with self.reading_threads(len(pixels) // 4):  # 2 x 2 patches a token in every release
            out = encoder(pixels.to(self.device, self.input_dtype("vision_encoder")), grids)
        out = check_output(encoder, out, self.config.thinker.text_config)
        config = self.config.thinker.vision_config
        wanted = out.lengths if config is None else (grids.prod(1) // config.spatial_merge_size**2).tolist()
        if out.lengths != wanted:
            raise ValueError(f"{type(encoder).__name__} gives {out.lengths} tokens for pictures that have {wanted}")
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CONTRACTS and value is not None:
            check_part(value, name)
            _give_defaults(value, CONTRACTS[name])
        if name == "decode_threads" and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"decode_threads must be a whole number of at least 1 or None, got {value!r}")
        super().__setattr__(name, value)
        if name in ("audio_encoder", "processor"):
            self._count_audio_tokens()

    def _count_audio_tokens(self) -> None:
        """Have a processor that writes as many placeholders for a sound as the audio encoder gives embeddings."""
        if "audio_encoder" not in self._modules or self.audio_encoder is None or self.processor is None:
            return
        count, written = self.audio_encoder.num_tokens, self.processor.audio_tokens
        if any(count(frames) != written(frames) for frames in _CLIPS):
            own = copy.copy(self.processor)  # another model may share the one that was given
            own.audio_tokens, own.chunk_frames = count, self.audio_encoder.chunk_frames
            vars(self)["processor"] = own

    @overload
    def require(self, part: Literal["audio_encoder"]) -> AudioEncoderContract: ...
    @overload
    def require(self, part: Literal["vision_encoder"]) -> VisionEncoderContract: ...
    @overload
    def require(self, part: Literal["thinker"]) -> ThinkerContract: ...
    @overload
    def require(self, part: Literal["talker"]) -> TalkerContract: ...
    @overload
    def require(self, part: Literal["code2wav"]) -> CodecDecoder: ...
    @overload
    def require(self, part: str) -> nn.Module: ...
    def require(self, part: str) -> nn.Module:
        """A part of the model. Raises ValueError, with the remedy, if it is not there."""
        found: nn.Module | None = getattr(self, part)
        if found is not None:
            return found
        if part in _SENSES:
            raise ValueError(f"this model has no {part.replace('_', ' ')}; it cannot {_SENSES[part]}")
        parts = self.config.parts
        if part in parts:
            raise ValueError(f"the {part} was not loaded; add {part!r} to parts=")
        if "thinker" not in parts:
            raise ValueError(f"this model has no {part}: its config describes {' and '.join(parts)} alone")
        raise ValueError(f"this variant has no {part}: it answers in text only; pass return_audio=False")


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts as a tuple; ValueError for an unknown or empty choice."""
    chosen = (parts,) if isinstance(parts, str) else () if parts is None else tuple(parts)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise ValueError(f"parts must name some of {', '.join(PARTS)}, got {list(chosen)}")
    return chosen


def check_part(module: Any, part: str | None = None) -> None:
    """Raise ValueError with all that a module lacks to be a part of a model, TypeError for what is no module.

    part: a keyword of `OmniModel` such as "audio_encoder" (its contract is `CONTRACTS[part]`); None: the part whose
    contract the class derives from, or the only one whose contract it keeps.
    """
    if not isinstance(module, nn.Module):
        what = f"the class {module.__name__}, which is still to be called" if inspect.isclass(module) else repr(module)
        raise TypeError(f"{part or 'a part'} must be a torch.nn.Module, got {what}")
    part = _part_of(module) if part is None else part
    if not isinstance(part, str) or part not in CONTRACTS:
        raise ValueError(f"part must be one of {', '.join(CONTRACTS)}, got {part!r}")
    contract = CONTRACTS[part]
    if lacking := _lacking(module, contract):
        raise ValueError(
            f"{type(module).__name__} cannot be the {part}, it lacks {', '.join(lacking)}; write what is missing as "
            f"{contract.__module__}.{contract.__name__} describes it"
        )
    for name, least in getattr(contract, "least", {}).items():
        value = getattr(module, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not value >= least or value % 1:
            raise ValueError(
                f"{type(module).__name__}.{name} must be a whole number of at least {least}, got {value!r}"
            )


def _part_of(module: nn.Module) -> str:
    """The part that a module is made for. Raises ValueError where that cannot be told."""
    made_for = [part for part, contract in CONTRACTS.items() if isinstance(module, contract)]
    kept = [part for part, contract in CONTRACTS.items() if len(_required(contract)) > 1]
    found = made_for or [part for part in kept if not _lacking(module, CONTRACTS[part])]
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} derives from no contract and keeps none, so it cannot be told what it is to be; "
            f"name the part: {', '.join(CONTRACTS)}"
        )
    return found[0]


def _required(contract: type[nn.Module]) -> list[str]:
    """The members that a contract has no default for."""
    values = [name for name in inspect.get_annotations(contract) if not hasattr(contract, name)]
    methods = [name for name, value in vars(contract).items() if getattr(value, "__isabstractmethod__", False)]
    return values + methods


def _lacking(module: nn.Module, contract: type[nn.Module]) -> list[str]:
    """The members of a contract that a module has to have and has not."""
    as_one = getattr(contract, "as_one", ())
    needed = _required(contract) + [name for name in as_one if any(_has_own(module, contract, n) for n in as_one)]
    return [name for name in needed if not _has_own(module, contract, name)]


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has a member that is more than what torch gives every module (a `forward` that only raises)."""
    bare = vars(nn.Module).get(name)
    return hasattr(module, name) and (bare is None or inspect.getattr_static(module, name, None) is not bare)


def _has_own(module: nn.Module, contract: type[nn.Module], name: str) -> bool:
    """Whether a member of a contract is there and is not the contract's."""
    inherited = vars(contract).get(name, module)  # no member is the module itself
    return _has(module, name) and inspect.getattr_static(module, name, None) is not inherited


def _give_defaults(module: nn.Module, contract: type[nn.Module]) -> None:
    """Let a module whose class does not derive from its contract have the contract's defaults for what it lacks."""
    own = type(module)
    defaults = {name: value for name, value in vars(contract).items() if name[0] != "_" and not _has(module, name)}
    if defaults and not isinstance(module, contract):
        module.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, **defaults})
