"""Text as it is generated: token by token, never half a character."""

from __future__ import annotations

import codecs
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni.processing.processor import OmniProcessor


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: most as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TextStream:
    """Decodes ids one at a time; what it returns, joined, is `processor.decode` of all of them.

    Bytes of an unfinished character are held back until it is complete; bytes that can never become one are U+FFFD.
    """

    def __init__(self, processor: OmniProcessor) -> None:
        self.processor = processor
        self.names = {index: token for token, index in processor.chat.added_ids.items()}
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        name = self.names.get(token)
        if name is not None:  # added tokens are text by themselves, control tokens are none
            return "" if name in self.processor.chat.special else self.finish() + name
        characters = self.processor.tokenizer.convert_ids_to_tokens(token) or ""
        table = _byte_of_character()
        return self.bytes.decode(bytes(table[c] for c in characters if c in table))

    @property
    def whole(self) -> bool:
        """Whether no character is unfinished."""
        return not self.bytes.getstate()[0]

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        text = self.bytes.decode(b"", final=True)
        self.bytes.reset()
        return text
