"""Chat templates that fail, and text that is no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.processing.processor import OmniProcessor

DEMO = Path(__file__).parents[2] / "omni" / "packaged" / "toy_data"
PROCESSOR = OmniProcessor.from_pretrained(DEMO)
TOKENIZER = PROCESSOR.tokenizer
PICTURE = np.zeros((32, 32, 3), np.uint8)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR(user("a\ud800"))
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR.encode_text("\ud800")


def test_a_template_that_fails_or_drops_media() -> None:
    from omni.processing.template import ChatTokenizer

    other = OmniProcessor.from_pretrained(DEMO)
    other.chat = ChatTokenizer(TOKENIZER, "{{ raise_exception('no such turn') }}")
    with pytest.raises(ValueError, match="no such turn"):
        other(user("a"))
    other.chat = ChatTokenizer(TOKENIZER, "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match="0 image placeholder"):
        other(user([{"image": PICTURE}]))
