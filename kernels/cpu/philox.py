"""Philox 4x64 random numbers in compiled code, those that NumPy's generator yields.

Salmon and others, "Parallel random numbers: as easy as 1, 2, 3":
https://www.thesalmons.org/john/random123/papers/random123sc11.pdf
"""

from __future__ import annotations

from raygraft.kernels.compiled import compiled
from raygraft.kernels.raw import high_product


def _signed(number: int) -> int:
    """The int64 of the same bits: compiled code has no other."""
    return number - (1 << 64) if number >> 63 else number


_ROUNDS = 10
_FIRST, _SECOND = _signed(0xD2E7470EE14C6C93), _signed(0xCA5A826395121157)
_FIRST_STEP, _SECOND_STEP = _signed(0x9E3779B97F4A7C15), _signed(0xBB67AE8584CAA73B)
_DIGITS = (1 << 53) - 1


@compiled(nogil=True)
def uniform_number(key: int, other_key: int, counter: int) -> float:
    """A number in [0, 1): the first that `np.random.Philox` yields for such keys and counter."""
    a, b, c, d = counter + 1, 0, 0, 0
    for _ in range(_ROUNDS):
        a, b, c, d = (
            high_product(c, _SECOND) ^ b ^ key,
            c * _SECOND,
            high_product(a, _FIRST) ^ d ^ other_key,
            a * _FIRST,
        )
        key += _FIRST_STEP
        other_key += _SECOND_STEP
    return float((a >> 11) & _DIGITS) / (1 << 53)
