"""omni-nano, the small trained model that is part of the package, and `omni demo`: three questions put to it.

The model has the released architecture at small width and knows a small world (`recipes/nano`, which trained it):
repeating, arithmetic, drawn shapes and short clips, asked by text or by voice. `nano_data/README.md` is its card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omni.config.locate import PACKAGED

if TYPE_CHECKING:
    from omni.model import OmniModel

NANO = "omni-nano"
NANO_DATA = PACKAGED[NANO]
DEMO = NANO_DATA / "demo"  # questions by voice, a picture and a clip
NOTICE = (
    "omni-nano answers: a small trained model that is part of omni. It repeats sentences, does sums up to twenty and "
    "looks at drawn shapes; anything else it does not know. Others: --model DIR."
)


@dataclass(frozen=True)
class Question:
    """One question of the demo: what it shows, its media in `DEMO`, and what is asked in them."""

    title: str
    items: tuple[tuple[str, str], ...]
    asked: str

    def messages(self) -> list[dict[str, Any]]:
        """As the processor takes them; videos are heard too."""
        items: list[dict[str, Any]] = [{"type": kind, kind: str(DEMO / name)} for kind, name in self.items]
        for item in items:
            if item["type"] == "video":
                item["use_audio_in_video"] = True
        return [{"role": "user", "content": items}]


QUESTIONS = (
    Question("a spoken request", (("audio", "request.wav"),), "repeat after me the old king follows your blue fish"),
    Question(
        "a picture and a spoken question",
        (("image", "picture.png"), ("audio", "question.wav")),
        "what color is the star",
    ),
    Question("a clip that asks in its sound", (("video", "clip.mp4"),), "which way does it move"),
)


def nano_model() -> OmniModel:
    """The packaged model with its processor, fp32 on the CPU."""
    from omni.model import OmniModel

    return OmniModel.from_pretrained(NANO, dtype="float32", device="cpu")
