"""Random bits as a function of counters (splitmix64: Steele, Lea and Flood, 2014), the same on every device.

Unsigned 64-bit integers are kept in int64 tensors of any shape.
"""

from __future__ import annotations

from torch import Tensor


def signed(value: int) -> int:
    """The int64 with the same bits as an integer modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)  # what the generator's counter goes up by
_ROUNDS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)))


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser: a bijection of int64 whose output bits look independent."""
    for bits, factor in _ROUNDS:
        x = (x ^ shift_right(x, bits)) * factor
    return x ^ shift_right(x, 31)
