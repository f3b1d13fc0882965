"""Blocks of 256 columns, whose groups of 16 or 32 have small integers as scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from raygraft.kernels.cpu.formats.base import BlockFormat, Bytes, Fields
from raygraft.kernels.cpu.formats.blocks import IQ4_NL, halves, nibbles, single_bits
from raygraft.kernels.cpu.lanes import Address, Lanes


def _pairs(packed: Bytes) -> Bytes:
    """Numbers of 2 bits: of each 32 bytes the lowest ones first."""
    parted = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    numbers: Bytes = (parted >> shifts) & np.uint8(3)
    return numbers.reshape(len(packed), -1)


def _planes(packed: Bytes) -> Bytes:
    """Numbers of 1 bit: the lowest of all 32 bytes first."""
    return single_bits(packed).reshape(len(packed), 32, 8).swapaxes(1, 2).reshape(len(packed), -1)


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Two times eight numbers of 6 bits in 12 bytes."""
    d, m, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, rest & 15 | d >> 2 & 48], axis=1)
    minima = np.concatenate([m & 63, rest >> 4 | m >> 2 & 48], axis=1)
    return scales, minima


class _WithMinima(BlockFormat):
    """weight = d * scale * number - dmin * min."""

    columns, has_offset, halves = 256, True, ("d", "dmin")
    scales: ClassVar[Sequence[str]] = ("scale", "min")

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["d"] * fields["scale"]

    def offset(self, fields: Mapping[str, Lanes]) -> Lanes:
        return -(fields["dmin"] * fields["min"])


class Q4_K(_WithMinima):
    name, file_bytes, bits = "Q4_K", 144, 4

    def unpack(self, blocks: Bytes) -> Fields:
        scales, minima = _scales_and_minima(blocks[:, 4:16])
        return {
            "d": halves(blocks, 0),
            "dmin": halves(blocks, 2),
            "scale": scales,
            "min": minima,
            "numbers": nibbles(blocks[:, 16:], 32),
        }


class Q5_K(_WithMinima):
    name, file_bytes, bits = "Q5_K", 176, 5

    def unpack(self, blocks: Bytes) -> Fields:
        scales, minima = _scales_and_minima(blocks[:, 4:16])
        return {
            "d": halves(blocks, 0),
            "dmin": halves(blocks, 2),
            "scale": scales,
            "min": minima,
            "numbers": nibbles(blocks[:, 48:], 32) | _planes(blocks[:, 16:48]) << 4,
        }


class Q2_K(_WithMinima):
    """Scale and minimum have four bits each of one byte."""

    name, file_bytes, per_group, bits = "Q2_K", 84, 16, 2
    scales = ("both",)

    def unpack(self, blocks: Bytes) -> Fields:
        return {
            "d": halves(blocks, 80),
            "dmin": halves(blocks, 82),
            "both": blocks[:, :16],
            "numbers": _pairs(blocks[:, 16:80]),
        }

    def read_scale(self, at: Address) -> Lanes:
        return at.unsigned()

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["d"] * (fields["both"] & 15).floats()

    def offset(self, fields: Mapping[str, Lanes]) -> Lanes:
        return -(fields["dmin"] * (fields["both"] >> 4).floats())


class _Centred(BlockFormat):
    """weight = d * scale * (number - centre)."""

    columns, per_group, scales = 256, 16, ("scale",)

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["d"] * fields["scale"]


class Q6_K(_Centred):
    name, file_bytes, bits, centre = "Q6_K", 210, 6, 32

    def unpack(self, blocks: Bytes) -> Fields:
        return {
            "d": halves(blocks, 208),
            "scale": blocks[:, 192:208],
            "numbers": nibbles(blocks[:, :128], 64) | _pairs(blocks[:, 128:192]) << 4,
        }


class Q3_K(_Centred):
    name, file_bytes, bits, centre = "Q3_K", 110, 3, 4

    def unpack(self, blocks: Bytes) -> Fields:
        low = nibbles(blocks[:, 96:104], 8)
        high = (blocks[:, None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
        scales = (low | high.reshape(-1, 16) << 4).astype(np.int8) - np.int8(32)
        numbers = _pairs(blocks[:, 32:96]) | _planes(blocks[:, :32]) << 2
        return {"d": halves(blocks, 108), "scale": scales, "numbers": numbers}


class IQ4_XS(BlockFormat):
    """The levels of IQ4_NL, with a scale of 6 bits for each 32 columns."""

    name, columns, file_bytes, bits = "IQ4_XS", 256, 136, 4
    scales, levels = ("scale",), IQ4_NL.levels

    def unpack(self, blocks: Bytes) -> Fields:
        high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2)
        low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
        scales = (low | (high & 3) << 4).astype(np.int8) - np.int8(32)
        return {
            "d": halves(blocks, 0),
            "scale": scales,
            "numbers": nibbles(blocks[:, 8:], 16),
        }

    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        return fields["d"] * fields["scale"]
