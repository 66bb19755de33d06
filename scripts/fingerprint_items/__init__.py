"""The items of `scripts/fingerprint.py`: `ITEMS`, functions by name that take nothing and return plain values.

What is imported from inside the library stands at the top of each file.
"""

from . import configs, inputs, parts, replies, sessions, training  # noqa: F401 - they register their items
from .registry import ITEMS

__all__ = ["ITEMS"]
