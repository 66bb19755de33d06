"""How tensors are named: one table per family, between this library's modules and the Hub's files, both directions.

Shapes: E experts, I expert width, D model width. A file holds three matrices an expert, the model two stacked
parameters a layer: gate_up_proj [E, 2I, D] (gate rows first) and down_proj [E, D, I].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Piece = Literal["whole", "gate", "up", "down"]
_EXPERT_KEY = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Slot:
    """Where a file's tensor belongs: all of the parameter `name`, or one expert's piece of a stacked parameter."""

    name: str
    expert: int = 0
    piece: Piece = "whole"

    def of(self, stacked: Tensor) -> Tensor:
        """The view of the parameter that this slot covers; IndexError if there is no such expert."""
        if self.piece == "whole":
            return stacked
        matrix = stacked[self.expert]
        if self.piece == "down":
            return matrix
        half = matrix.shape[0] // 2
        return matrix[:half] if self.piece == "gate" else matrix[half:]


@dataclass(frozen=True)
class KeyTable:
    """The names of one model family.

    `renames` pairs a prefix of ours with the Hub's; the longest match wins, in either direction. `also_read` pairs ours
    with prefixes that other writers use. Keys that end in `derived` are tables some writers store and the model
    computes. `parts` are the Hub's first name components in the order of the released files.
    """

    renames: tuple[tuple[str, str], ...]
    also_read: tuple[tuple[str, str], ...]
    derived: tuple[str, ...]
    parts: tuple[str, ...]

    def from_hub(self, key: str) -> str | None:
        """Our name of a file's key (an expert's matrix keeps its index), None for a key of no known prefix."""
        match = max(
            (pair for pair in (*self.renames, *self.also_read) if key.startswith(pair[1])),
            key=lambda pair: len(pair[1]),
            default=None,
        )
        return match[0] + key[len(match[1]) :] if match else None

    def to_hub(self, name: str) -> str:
        """The file's key for one of our names; a name without a rename (a swapped-in module) stays as it is."""
        match = max(
            (pair for pair in self.renames if name.startswith(pair[0])), key=lambda pair: len(pair[0]), default=None
        )
        return match[1] + name[len(match[0]) :] if match else name

    def slot(self, key: str) -> Slot | None:
        """The place in the model for a file's key, None for a key of no known prefix."""
        name = self.from_hub(key)
        if name is None:
            return None
        expert = _EXPERT_KEY.fullmatch(name)
        if expert is None:
            return Slot(name)
        piece: Piece = expert[3]  # type: ignore[assignment]
        stacked = "down_proj" if piece == "down" else "gate_up_proj"
        return Slot(f"{expert[1]}.{stacked}", int(expert[2]), piece)

    def separate(self, name: str, experts: int) -> Iterator[tuple[str, Slot]]:
        """The per-expert keys and slots of a stacked parameter, expert by expert."""
        module, stacked = name.rsplit(".", 1)
        pieces: tuple[Piece, ...] = ("down",) if stacked == "down_proj" else ("gate", "up")
        for expert in range(experts):
            for piece in pieces:
                yield self.to_hub(f"{module}.{expert}.{piece}_proj.weight"), Slot(name, expert, piece)

    def is_derived(self, key: str) -> bool:
        """Whether a key names a table that the model computes for itself."""
        return key.endswith(self.derived)


def is_stacked(name: str) -> bool:
    """Whether one of our names is a parameter that stacks experts."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


QWEN3_OMNI = KeyTable(
    renames=(
        ("audio_encoder.", "thinker.audio_tower."),
        ("vision_encoder.", "thinker.visual."),
        ("thinker.lm_head.", "thinker.lm_head."),
        ("thinker.", "thinker.model."),
        ("talker.text_projection.", "talker.text_projection."),
        ("talker.hidden_projection.", "talker.hidden_projection."),
        ("talker.codec_head.", "talker.codec_head."),
        ("talker.mtp.lm_head.", "talker.code_predictor.lm_head."),
        ("talker.mtp.", "talker.code_predictor.model."),
        ("talker.", "talker.model."),
        ("code2wav.", "code2wav."),
    ),
    # the names that transformers 5 uses in memory, and writes with save_original_format=False
    also_read=(
        ("audio_encoder.", "thinker.model.audio_tower."),
        ("vision_encoder.", "thinker.model.visual."),
        ("thinker.", "thinker.model.language_model."),
    ),
    derived=(".inv_freq", ".positional_embedding.positional_embedding"),
    parts=("thinker", "talker", "code2wav"),
)

_DIT, _BIGVGAN = "token2wav.code2wav_dit_model.", "token2wav.code2wav_bigvgan_model."
QWEN2_5_OMNI = KeyTable(
    renames=(
        ("audio_encoder.", "thinker.audio_tower."),
        ("vision_encoder.", "thinker.visual."),
        ("thinker.lm_head.", "thinker.lm_head."),
        ("thinker.", "thinker.model."),
        ("talker.input_projection.", "talker.thinker_to_talker_proj."),
        ("talker.codec_head.", "talker.codec_head."),
        ("talker.codec_embedding.", "talker.model.embed_tokens."),
        ("talker.", "talker.model."),
        ("code2wav.dit.code_embed.", f"{_DIT}text_embed.codec_embed."),
        ("code2wav.dit.input_proj.", f"{_DIT}input_embed.proj."),
        ("code2wav.dit.speaker_encoder.", f"{_DIT}input_embed.spk_encoder."),
        ("code2wav.dit.blocks.", f"{_DIT}transformer_blocks."),
        ("code2wav.dit.", _DIT),
        ("code2wav.bigvgan.", _BIGVGAN),
    ),
    also_read=QWEN3_OMNI.also_read,
    derived=(*QWEN3_OMNI.derived, ".upsample.filter", ".downsample.filter"),
    parts=("thinker", "talker", "token2wav"),
)

KEY_TABLES = {"qwen3_omni_moe": QWEN3_OMNI, "qwen2_5_omni": QWEN2_5_OMNI}  # by model_type
