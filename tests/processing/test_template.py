"""Chat templates that fail, and text that is no text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from build import TOY_DATA, chat

from omni.processing.processor import OmniProcessor
from omni.processing.template import ChatTokenizer

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)
TOKENIZER = PROCESSOR.tokenizer
PICTURE = np.zeros((32, 32, 3), np.uint8)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR(chat("a\ud800"))
    with pytest.raises(ValueError, match="surrogate"):
        PROCESSOR.encode_text("\ud800")


def test_a_template_that_fails_or_drops_media() -> None:
    other = OmniProcessor.from_pretrained(TOY_DATA)
    other.chat = ChatTokenizer(TOKENIZER, "{{ raise_exception('no such turn') }}")
    with pytest.raises(ValueError, match="no such turn"):
        other(chat("a"))
    other.chat = ChatTokenizer(TOKENIZER, "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match="0 image placeholder"):
        other(chat([{"image": PICTURE}]))


ITEMS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% for i in m.content %}{% if i.type == 'text' %}{{ i.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("content", ["one two", [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]])
@pytest.mark.parametrize("more", ["", "{% if messages[0].role == 'system' %}{% endif %}"])
def test_a_template_that_reads_items_alone_loses_no_text(role: str, content: Any, more: str) -> None:
    other = OmniProcessor.from_pretrained(TOY_DATA)
    other.chat = ChatTokenizer(other.tokenizer, more + ITEMS_ONLY)
    ids = other([{"role": role, "content": content}], add_generation_prompt=False).input_ids[0]
    assert other.decode(ids, skip_special_tokens=False) == f"<|im_start|>{role}\none two<|im_end|>\n"


@pytest.mark.parametrize("value", ["no", 1, None, [False]])
def test_control_tokens_is_true_or_false(value: Any) -> None:
    other = OmniProcessor.from_pretrained(TOY_DATA)
    calls = (lambda: other(chat("a"), control_tokens=value), lambda: other.encode_text("a", value))
    for call in (*calls, lambda: other.chat.pieces("a", value)):
        with pytest.raises(TypeError, match="control_tokens must be True or False"):
            call()
    with pytest.raises(TypeError, match="a text must be a string"):
        other.encode_text(value if not isinstance(value, str) else b"a")  # type: ignore[arg-type]
