"""The options of each objective, [objective], read as strictly as the other tables and before anything is loaded.

An option that is not given is None here: its default stands where it is used. An objective of one's own that has no
entry in `OPTIONS` checks its options itself.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni.training.objectives.gspo import make_reward
from omni.training.run.train_config import TrainConfig, read_table
from omni.training.run.train_config import _number as number
from omni.training.run.train_config import _path as path


@dataclass(frozen=True)
class SupervisedOptions:
    """Of `Supervised`."""

    detach: bool | None = None
    residual_weight: float | None = number(None, low=0)
    residual_share: float | None = number(None, above=0, high=1)


@dataclass(frozen=True)
class DPOOptions:
    """Of `DPO`."""

    text: bool | None = None
    speech: bool | None = None
    beta: float | None = number(None, above=0)
    label_smoothing: float | None = number(None, low=0, below=0.5)
    residual_weight: float | None = number(None, low=0)
    detach: bool | None = None
    reference: str | None = path()


@dataclass(frozen=True)
class DistillationOptions:
    """Of `Distillation`."""

    teacher: str | None = path()
    on_policy: bool | None = None
    top_k: int | None = number(None, low=0)
    temperature: float | None = number(None, above=0)
    direction: Literal["forward", "reverse"] | None = None
    max_new_tokens: int | None = number(None, low=1)
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True)
class GSPOOptions:
    """Of `GSPO`. rewards: what `make_reward` takes, one or a list."""

    rewards: Any = None
    group_size: int | None = number(None, low=2)
    clip_low: float | None = number(None, low=0)
    clip_high: float | None = number(None, low=0)
    kl_weight: float | None = number(None, low=0)
    max_new_tokens: int | None = number(None, low=1)
    sampling: dict[str, Any] | None = None
    audio: bool | None = None

    def __post_init__(self) -> None:
        if self.rewards is None:
            return
        one = isinstance(self.rewards, (str, Mapping))
        if not one and not isinstance(self.rewards, (list, tuple)):
            raise ValueError(
                f"objective.rewards must be a list of names, 'module:function' or tables, got {self.rewards!r}; for "
                "example ['exact_answer']"
            )
        for reward in [self.rewards] if one else self.rewards:
            if not isinstance(reward, (str, Mapping)):
                raise ValueError(f"objective.rewards holds {reward!r}, which is neither a name nor a table")
            weight = reward.get("weight", 1.0) if isinstance(reward, Mapping) else 1.0
            if type(weight) not in (int, float):
                raise ValueError(f"objective.rewards: the weight of a reward must be a number, got {weight!r}")
            try:
                make_reward(reward)
            except (ValueError, TypeError) as error:
                raise ValueError(f"objective.rewards: {error}") from error


@dataclass(frozen=True)
class CodecOptions:
    """Of `CodecObjective` and `DecoderObjective`, their crops and discriminators."""

    decoder_only: bool | None = None
    fresh: bool | None = None
    encoder: str | None = None
    width: int | None = number(None, low=1)
    convolutions: bool | None = None
    crop_s: float | None = number(None, above=0)
    batch_size: int | None = number(None, low=1)
    encoder_folder: str | None = path()
    judge_width: int | None = number(None, low=4)
    judge_periods: tuple[int, ...] | None = number(None, low=1)
    judge_scales: tuple[int, ...] | None = number(None, low=1)
    judge_windows: tuple[int, ...] | None = number(None, low=8)
    judge_levels: tuple[int, ...] | None = number(None, low=8)
    judge_lr: float | None = number(None, above=0)
    start_adversarial_step: int | None = number(None, low=0)
    mel_scales: tuple[tuple[int, int], ...] | None = number(None, low=1)
    floor_db: float | None = number(None, high=0)
    initialise: bool | None = None
    quantise_from: int | None = number(None, low=0)
    restart_every: int | None = number(None, low=0)
    restart_below: float | None = number(None, low=0)
    usage_decay: float | None = number(None, low=0, high=1)


@dataclass(frozen=True)
class FlowOptions:
    """Of `FlowObjective` and `FlowMaker`."""

    batch_size: int | None = number(None, low=1)
    crop_s: float | None = number(None, above=0)
    reference_s: float | None = number(None, above=0)
    n_fft: int | None = number(None, low=1)
    drop_rate: float | None = number(None, low=0, high=1)


@dataclass(frozen=True)
class TranscriptionOptions:
    """Of `Transcriber`, its clips, labels and heads, and of `SpeechAugmentation` and `Surroundings`; noises: manifests
    or folders of what is mixed in."""

    head: Literal["ctc", "attention", "embeddings"] | None = None
    labels: Literal["characters", "tokens"] | None = None
    alphabet: str | None = None
    language: str | None = None
    blank: str | None = None
    max_s: float | None = number(None, above=0)
    batch_size: int | None = number(None, low=1)
    dim: int | None = number(None, low=1)
    layers: int | None = number(None, low=1)
    heads: int | None = number(None, low=1)
    spelling: int | None = number(None, low=0)
    scale: float | None = number(None, above=0)
    speeds: tuple[float, ...] | None = number(None, low=0.5, high=2)
    frequency_masks: int | None = number(None, low=0)
    time_masks: int | None = number(None, low=0)
    noise: float | None = number(None, low=0, high=1)
    noises: tuple[str, ...] | None = None
    noise_db: tuple[float, float] | None = None
    room: float | None = number(None, low=0, high=1)
    room_s: tuple[float, float] | None = None
    telephone: float | None = number(None, low=0, high=1)
    overload: float | None = number(None, low=0, high=1)
    equaliser: float | None = number(None, low=0, high=1)
    gain_db: tuple[float, float] | None = None
    silence_s: tuple[float, float] | None = None


OPTIONS: dict[str, type] = {
    "thinker": SupervisedOptions,
    "talker": SupervisedOptions,
    "joint": SupervisedOptions,
    "dpo": DPOOptions,
    "distillation": DistillationOptions,
    "gspo": GSPOOptions,
    "codec": CodecOptions,
    "flow_matching": FlowOptions,
    "transcription": TranscriptionOptions,
}


def objective_options(config: TrainConfig) -> dict[str, Any]:
    """The options that [objective] gives, checked. Raises ValueError that names the option, its value and the limit."""
    kind = OPTIONS.get(config.train.objective)
    if kind is None:
        return dict(config.objective)
    read: Any = read_table(kind, config.objective, "objective")
    pairs = ((field.name, getattr(read, field.name)) for field in dataclasses.fields(kind))
    return {name: value for name, value in pairs if value is not None}
