"""What the processors of the model families do differently beyond what their files say.

A checkpoint's files name its family: config.json by `model_type`, the preprocessor files by `processor_class`.
No shapes: nothing here is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omni.config.positions import PositionRule
from omni.config.qwen2_5_encoders import WhisperAudioEncoderConfig
from omni.config.qwen3_omni import AudioEncoderConfig
from omni.encoders.audio import num_audio_tokens
from omni.encoders.whisper_audio import num_whisper_tokens
from omni.processing.vision import VIDEO_MAX_PIXELS, VIDEO_MIN_PIXELS

RELEASED = Path(__file__).parent / "released"  # preprocessor values and the built-in chat template


@dataclass(frozen=True)
class ProcessorFamily:
    """One family.

    tokens: attribute of the tokenizer -> the token's usual spelling. rule: positions, with the released rate. n_window:
    half the mel frames of a chunk of the audio encoder. clip_end: what the mel front end hears behind a clip's last
    sample (`omni.encoders.mel.ENDS`). audio_tokens: (mel frames, frames of a chunk) -> tokens. frame_pixels: fewest and
    most of a video frame. preprocessor: released values, for folders without preprocessor files. speech_system: the
    system text without which speech is out of what the model was trained on (None: any will do).
    """

    processor_class: str
    tokens: Mapping[str, str]
    rule: PositionRule
    n_window: int
    clip_end: str
    audio_tokens: Callable[..., int]
    frame_pixels: tuple[int, int]
    preprocessor: Path
    speech_system: str | None = None

    def token_counter(self, chunk_frames: int) -> Callable[[int], int]:
        """What counts the audio tokens of a clip of so many mel frames."""
        return partial(self.audio_tokens, chunk_frames=chunk_frames)


QWEN3 = ProcessorFamily(
    processor_class="Qwen3OmniMoeProcessor",
    tokens={
        "audio_token": "<|audio_pad|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    rule=PositionRule(13.0),
    n_window=50,
    clip_end="mirror",
    audio_tokens=num_audio_tokens,
    frame_pixels=(VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS),
    preprocessor=RELEASED / "qwen3_omni_moe.json",
)
QWEN2_5 = ProcessorFamily(
    processor_class="Qwen2_5OmniProcessor",
    tokens={
        "audio_token": "<|AUDIO|>",
        "image_token": "<|IMAGE|>",
        "video_token": "<|VIDEO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
    },
    rule=PositionRule(25.0, whole=True, chunk_s=2.0, joint_marks=True),
    n_window=100,
    clip_end="silence",  # the release fills every clip up to 300 s before it looks at the spectrum
    audio_tokens=lambda frames, chunk_frames: num_whisper_tokens(frames),
    frame_pixels=(128 * 28 * 28, 768 * 28 * 28),
    preprocessor=RELEASED / "qwen2_5_omni.json",
    speech_system="You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving "
    "auditory and visual inputs, as well as generating text and speech.",  # the model card's
)
FAMILIES = {"qwen3_omni_moe": QWEN3, "qwen2_5_omni": QWEN2_5}  # by config.json's model_type
_BY_CLASS = {family.processor_class: family for family in FAMILIES.values()}
_BY_ENCODER: dict[type, ProcessorFamily] = {AudioEncoderConfig: QWEN3, WhisperAudioEncoderConfig: QWEN2_5}


def find_family(model_type: Any, processor_classes: list[Any]) -> ProcessorFamily:
    """The family of a checkpoint's files: by the model's type, else by the first processor class that is known, else
    the first family."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    return next((_BY_CLASS[name] for name in processor_classes if name in _BY_CLASS), QWEN3)


def audio_counter(config: AudioEncoderConfig | WhisperAudioEncoderConfig) -> Callable[[int], int]:
    """What counts the tokens of a clip of so many mel frames for an encoder's config."""
    return _BY_ENCODER[type(config)].token_counter(config.chunk_frames)
