"""What would end a run after hundreds of steps is looked for before its model is loaded.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni.parts import PARTS
from omni.training.run.train_config import TrainConfig

_NEEDS: dict[str, tuple[str, ...]] = {  # parts of the model, by objective
    "thinker": ("thinker",),
    "talker": ("thinker", "talker"),
    "joint": ("thinker", "talker"),
    "dpo": ("thinker",),
    "distillation": ("thinker",),
    "gspo": ("thinker",),
    "codec": ("code2wav",),
    "flow_matching": ("code2wav",),
    "transcription": ("thinker",),
}
_HOLDS = {"audio_encoder": "thinker", "vision_encoder": "thinker"}  # modules of the model that come with a part


def check_parts(config: TrainConfig, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an objective, or a pattern of what learns, whose part `model.parts` leaves out."""
    parts, why = config.model.parts, f"train.objective = {config.train.objective!r}"
    needed = {part: why for part in _NEEDS.get(config.train.objective, ())}
    needed |= {"talker": why} if options.get("speech") else {}
    needed |= {"code2wav": why} if options.get("audio") else {}
    needed |= {"talker": "[speaker]"} if config.speaker is not None else {}
    for pattern in (*config.train.parameters, *(config.lora.patterns if config.lora is not None else ())):
        part = _HOLDS.get(pattern.split(".")[0], pattern.split(".")[0])
        needed |= {part: f"the pattern {pattern!r}"} if part in PARTS else {}
    for part, reason in needed.items():
        if part not in parts:
            raise ValueError(
                f"{reason} needs the {part}, which model.parts = {list(parts)} leaves out; add {part!r} to it"
            )


def check_writable(config: TrainConfig, options: Mapping[str, Any]) -> None:
    """Raises OSError, which names the setting, for a folder of the run that cannot be made or written."""
    folders = {
        "log.folder": config.log.folder,
        "save.folder": config.save.folder,
        "save.export": config.save.export,
        "data.codec.cache": config.data.codec.cache,
        "objective.encoder_folder": options.get("encoder_folder"),
    }
    for name, folder in folders.items():
        if folder is not None:
            _probe(name, Path(folder).expanduser().absolute())


def _probe(name: str, folder: Path) -> None:
    """Make a folder and delete it again where the run will write: permissions alone do not tell."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise OSError(f"{name} = {str(folder)!r}: {there} is a file; choose a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".omni-", dir=there):
            pass
    except OSError as error:
        raise OSError(
            f"{name} = {str(folder)!r} cannot be written: {error.strerror or error}; choose another folder"
        ) from error
