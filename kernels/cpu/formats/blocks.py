"""Blocks of 32 columns: a scale, an offset in some, and numbers of 4, 5 or 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from raygraft.kernels.cpu.formats.base import BlockFormat, Bytes, Fields
from raygraft.kernels.cpu.lanes import Address, Lanes


def halves(blocks: Bytes, first: int) -> NDArray[np.float16]:
    """The float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)[:, 0]


def nibbles(packed: Bytes, run: int) -> Bytes:
    """Numbers of 4 bits: of each `run` bytes the lower ones, then the upper ones."""
    parted = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([parted & 15, parted >> 4], axis=2).reshape(len(packed), -1)


def single_bits(packed: Bytes) -> NDArray[np.uint8]:
    """Bits, the lowest of each byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


class _Scaled(BlockFormat):
    """weight = d * (number - centre)."""

    columns = 32

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["d"]


class _Shifted(_Scaled):
    """weight = d * number + m."""

    has_offset = True
    halves = ("d", "m")

    def offset(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["m"]


class Q8_0(_Scaled):
    """Signed bytes, kept as numbers from 0 on."""

    name, file_bytes, bits, centre = "Q8_0", 34, 8, 128

    def unpack(self, blocks: Bytes) -> Fields:
        return {"d": halves(blocks, 0), "numbers": blocks[:, 2:] ^ 128}


class Q4_0(_Scaled):
    name, file_bytes, bits, centre = "Q4_0", 18, 4, 8

    def unpack(self, blocks: Bytes) -> Fields:
        return {"d": halves(blocks, 0), "numbers": nibbles(blocks[:, 2:], 16)}


class Q4_1(_Shifted):
    name, file_bytes, bits = "Q4_1", 20, 4

    def unpack(self, blocks: Bytes) -> Fields:
        numbers = nibbles(blocks[:, 4:], 16)
        return {"d": halves(blocks, 0), "m": halves(blocks, 2), "numbers": numbers}


class Q5_0(_Scaled):
    name, file_bytes, bits, centre = "Q5_0", 22, 5, 16

    def unpack(self, blocks: Bytes) -> Fields:
        numbers = nibbles(blocks[:, 6:], 16) | single_bits(blocks[:, 2:6]) << 4
        return {"d": halves(blocks, 0), "numbers": numbers}


class Q5_1(_Shifted):
    name, file_bytes, bits = "Q5_1", 24, 5

    def unpack(self, blocks: Bytes) -> Fields:
        numbers = nibbles(blocks[:, 8:], 16) | single_bits(blocks[:, 4:8]) << 4
        return {"d": halves(blocks, 0), "m": halves(blocks, 2), "numbers": numbers}


class IQ4_NL(_Scaled):
    """Numbers of 4 bits stand for 16 levels, closer together near zero."""

    name, file_bytes, bits = "IQ4_NL", 18, 4
    levels = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

    def unpack(self, blocks: Bytes) -> Fields:
        return {"d": halves(blocks, 0), "numbers": nibbles(blocks[:, 2:], 16)}


class MXFP4(BlockFormat):
    """Floats of 4 bits with a shared power of two: the OCP's microscaling format."""

    name, columns, file_bytes, bits = "MXFP4", 32, 17, 4
    halves, scales = (), ("exponent",)
    levels = tuple(sign * level for sign in (1, -1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6))

    def unpack(self, blocks: Bytes) -> Fields:
        return {"exponent": blocks[:, :1], "numbers": nibbles(blocks[:, 1:], 16)}

    def read_scale(self, at: Address) -> Lanes:
        return (at.unsigned() << 23).as_floats()  # 2 ** (exponent - 127)

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["exponent"]
