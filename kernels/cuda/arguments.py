"""Arguments of kernels, laid out as the structures in `source/` that have the same names."""

from __future__ import annotations

import ctypes

NONE, FRAGMENTS_SPLIT, FRAGMENTS, ROWS = range(4)
"""Forms of a packed value, as in `common.cuh`."""

_pointer = ctypes.c_uint64
_int = ctypes.c_int32
_float = ctypes.c_float


def pointer(address: int) -> ctypes.c_uint64:
    """An address as an argument; 0 for none."""
    return ctypes.c_uint64(address)


def integer(value: int) -> ctypes.c_int32:
    """An int argument."""
    return ctypes.c_int32(value)


def long_integer(value: int) -> ctypes.c_int64:
    """A 64-bit integer argument."""
    return ctypes.c_int64(value)


def number(value: float) -> ctypes.c_float:
    """A float argument."""
    return ctypes.c_float(value)


class Packed(ctypes.Structure):
    """Where a value is stored for products, and in which form."""

    _fields_ = (("data", _pointer), ("form", _int), ("tiles", _int), ("stride", _int))


class Segment(ctypes.Structure):
    """One matrix of a product."""

    _fields_ = (
        ("weights", _pointer),
        ("out", _pointer),
        ("bias", _pointer),
        ("residual", _pointer),
        ("scale", _float),
        ("rows", _int),
        ("tiles", _int),
        ("format", _int),
    )


class Norm(ctypes.Structure):
    """A norm that products take in; all zero: none."""

    _fields_ = (
        ("weight", _pointer),
        ("sums", _pointer),
        ("previous", _pointer),
        ("factor", _pointer),
        ("count", _int),
        ("width", _int),
        ("epsilon", _float),
    )


class Product(ctypes.Structure):
    """Up to three matrices times the same rows."""

    _fields_ = (
        ("segments", Segment * 3),
        ("x", Packed),
        ("y", Packed),
        ("before", Norm),
        ("after", Norm),
        ("count", _int),
        ("chunks", _int),
        ("columns", _int),
        ("rows", _int),
    )


class Ring(ctypes.Structure):
    """One end of a ring of records."""

    _fields_ = (
        ("memory", _pointer),
        ("own", _pointer),
        ("stop", _pointer),
        ("stride", ctypes.c_int64),
        ("small", ctypes.c_int64),
        ("slots", _int),
        ("early", _int),
    )


class Rotation(ctypes.Structure):
    """Rotary positions; no table: none."""

    _fields_ = (("table", _pointer), ("size", _int), ("neox", _int))


_CACHE = (
    ("stride", _int),
    ("heads", _int),
    ("kv_heads", _int),
    ("key_size", _int),
    ("value_size", _int),
    ("key_room", _int),
    ("value_room", _int),
    ("block_size", _int),
    ("scale", _float),
)


class Attention(ctypes.Structure):
    """Attention of few rows."""

    _fields_ = (
        ("q", _pointer),
        ("k", _pointer),
        ("v", _pointer),
        ("out", _pointer),
        ("packed", Packed),
        ("keys", _pointer),
        ("values", _pointer),
        ("partial", _pointer),
        ("arrived", _pointer),
        ("positions", _pointer),
        ("sequence", _pointer),
        ("tables", _pointer),
        ("q_turn", Rotation),
        ("k_turn", Rotation),
        *_CACHE,
    )


class PromptAttention(ctypes.Structure):
    """Attention of many rows."""

    _fields_ = (
        ("q", _pointer),
        ("out", _pointer),
        ("packed", Packed),
        ("keys", _pointer),
        ("values", _pointer),
        ("tiles", _pointer),
        ("positions", _pointer),
        ("tables", _pointer),
        *_CACHE,
    )
