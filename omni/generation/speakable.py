"""Which words a model has learnt to say, where these are few."""

from __future__ import annotations

import re
import unicodedata

from omni.parts import ModelParts

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def speakable_words(model: ModelParts) -> list[str] | None:
    """The words that a model can say; None for a model that says any text.

    A model that learnt to say only some words lists them as `speakable_words` in its generation_config.json.
    """
    return model.generation_config.get("speakable_words")


def unspeakable_words(model: ModelParts, text: str) -> list[str]:
    """The words of a text that a model has not learnt to say, in small letters, each once, in the order of the text."""
    listed = speakable_words(model)
    if listed is None:
        return []
    known = {word.lower() for word in listed}
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    return [word for word in dict.fromkeys(words) if word not in known]
