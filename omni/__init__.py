"""omni: Thinker-Talker omni-modal models. Public names, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.config.model import OmniConfig
    from omni.generation.events import AudioChunk, TextDelta, TokenLogprob, TurnEnd
    from omni.generation.output import OmniOutput
    from omni.generation.sampling import SamplingConfig
    from omni.generation.streaming_config import StreamingConfig
    from omni.model import OmniModel
    from omni.processing.inputs import OmniInputs
    from omni.processing.processor import OmniProcessor
    from omni.session.engine import EngineFullError, OmniEngine
    from omni.session.items import Item
    from omni.session.session import OmniSession

    __version__: str

_HOMES = {
    "AudioChunk": "omni.generation.events",
    "EngineFullError": "omni.session.engine",
    "Item": "omni.session.items",
    "OmniConfig": "omni.config.model",
    "OmniEngine": "omni.session.engine",
    "OmniInputs": "omni.processing.inputs",
    "OmniModel": "omni.model",
    "OmniOutput": "omni.generation.output",
    "OmniProcessor": "omni.processing.processor",
    "OmniSession": "omni.session.session",
    "SamplingConfig": "omni.generation.sampling",
    "StreamingConfig": "omni.generation.streaming_config",
    "TextDelta": "omni.generation.events",
    "TokenLogprob": "omni.generation.events",
    "TurnEnd": "omni.generation.events",
}

__all__ = [
    "AudioChunk",
    "EngineFullError",
    "Item",
    "OmniConfig",
    "OmniEngine",
    "OmniInputs",
    "OmniModel",
    "OmniOutput",
    "OmniProcessor",
    "OmniSession",
    "SamplingConfig",
    "StreamingConfig",
    "TextDelta",
    "TokenLogprob",
    "TurnEnd",
]


def _version() -> str:
    """The version of the installed distribution, or that of the source tree around this package."""
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("thinker-talker")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
        return next((line.split('"')[1] for line in lines if line.startswith('version = "')), "unknown")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return globals().setdefault(name, _version())
    if name not in _HOMES:
        raise AttributeError(f"module 'omni' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
