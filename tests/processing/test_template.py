"""Chat templates that fail, and text that is no text."""

from __future__ import annotations

import numpy as np
import pytest
from build import TOY_DATA, chat

from omni.processing.processor import OmniProcessor

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)
TOKENIZER = PROCESSOR.tokenizer
PICTURE = np.zeros((32, 32, 3), np.uint8)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR(chat("a\ud800"))
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR.encode_text("\ud800")


def test_a_template_that_fails_or_drops_media() -> None:
    from omni.processing.template import ChatTokenizer

    other = OmniProcessor.from_pretrained(TOY_DATA)
    other.chat = ChatTokenizer(TOKENIZER, "{{ raise_exception('no such turn') }}")
    with pytest.raises(ValueError, match="no such turn"):
        other(chat("a"))
    other.chat = ChatTokenizer(TOKENIZER, "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match="0 image placeholder"):
        other(chat([{"image": PICTURE}]))
