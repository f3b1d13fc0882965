"""Typed reads from a GGUF file's key/value metadata.

Each reader names the key, what was wanted and what was there, and raises `ModelFileError`.
The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from raygraft.graph.errors import ModelFileError

Metadata = Mapping[str, object]
Item = TypeVar("Item", str, int, float)


def read_string(metadata: Metadata, key: str) -> str | None:
    """The string at `key`, or None where the file has none."""
    value = metadata.get(key)
    if value is None or isinstance(value, str):
        return value
    raise _wrong_type(key, "a string", value)


def read_flag(metadata: Metadata, key: str, default: bool) -> bool:
    """The boolean at `key`, or `default` where the file has none."""
    value = metadata.get(key, default)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _wrong_type(key, "a boolean", value)


def read_token_id(metadata: Metadata, key: str, vocabulary_size: int) -> int | None:
    """The token id at `key`, or None where the file has none, or one outside its vocabulary.

    An id outside the vocabulary is skipped, not refused, because llama.cpp loads such files too.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise _wrong_type(key, "a token id", value)
    return int(value) if 0 <= int(value) < vocabulary_size else None


def read_strings(metadata: Metadata, key: str) -> list[str] | None:
    """The array of strings at `key` (a list or a NumPy array), or None where there is none."""
    return _read_array(metadata, key, str, "an array of strings")


def read_integers(metadata: Metadata, key: str) -> list[int] | None:
    """The array of integers at `key` (a list or a NumPy array), or None where there is none."""
    return _read_array(metadata, key, int, "an array of integers")


def read_scores(metadata: Metadata, key: str) -> list[float] | None:
    """The array of numbers at `key` (a list or a NumPy array), or None where there is none."""
    values = metadata.get(key)
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = np.asarray(values, dtype=np.float64)
    if isinstance(values, np.ndarray):
        return [float(value) for value in values.tolist()]
    if values is None:
        return None
    raise _wrong_type(key, "an array of numbers", values)


def _read_array(
    metadata: Metadata, key: str, item_type: type[Item], wanted: str
) -> list[Item] | None:
    values: Any = metadata.get(key)
    if values is None:
        return None
    if isinstance(values, np.ndarray):
        values = values.tolist()  # Python's own items, not NumPy's
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise _wrong_type(key, wanted, values)
    plain = list(values)
    if set(map(type, plain)) <= {item_type}:  # the common case, quickly: 150,000 strings and more
        return plain
    plain = [item.item() if isinstance(item, np.generic) else item for item in plain]
    for position, item in enumerate(plain):
        if not isinstance(item, item_type):
            raise ModelFileError(f"{key}[{position}] is {item!r}, wanted {wanted}")
    return plain


def _wrong_type(key: str, wanted: str, value: object) -> ModelFileError:
    return ModelFileError(f"{key} holds a {type(value).__name__}, wanted {wanted}")
