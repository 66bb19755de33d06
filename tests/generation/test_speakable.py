"""Words that a model has not learnt to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni.generation.generation_config import read_generation_config
from omni.generation.speakable import speakable_words, unspeakable_words
from omni.packaged.toy import toy_model

MODEL = toy_model()
TEXT = "Don't say the Cat's caf\u00e9 twice: the cat, 12 x-rays, e\u0301 and don\u2019t. CAT!"


def test_a_model_that_says_any_text_has_no_unknown_words() -> None:
    assert speakable_words(MODEL) is None
    for text in (TEXT, "", "zxqv 12 \u4f60\u597d \U0001f600"):
        assert unspeakable_words(MODEL, text) == []


def test_words_outside_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, in order; case and marks do not matter."""
    monkeypatch.setitem(MODEL.generation_config, "speakable_words", ["don't", "the", "Cat", "and", "\u00e9"])
    unknown = ["say", "cat's", "caf\u00e9", "twice", "12", "x", "rays", "don\u2019t"]
    assert unspeakable_words(MODEL, TEXT) == unknown
    for text in ("", "?! ...", "the CAT, and the cat"):
        assert unspeakable_words(MODEL, text) == []
    monkeypatch.setitem(MODEL.generation_config, "speakable_words", [])
    assert unspeakable_words(MODEL, "the cat") == ["the", "cat"]


@pytest.mark.parametrize("words", ["the cat", ["the", 3], {"the": 1}])
def test_a_list_that_is_none_is_refused(words: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"speakable_words": words}))
    with pytest.raises(ValueError, match="speakable_words must be a list of words"):
        read_generation_config(tmp_path)
