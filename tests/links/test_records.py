"""Records come out of their bytes as they went in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from raygraft.actors.records import Record, RecordKind, decode, encode_into, encoded_size
from raygraft.graph.errors import LinkError

TENSORS = st.sampled_from(["float32", "float16", "int32", "int64", "uint8"]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0))
)
NUMBERS = st.integers(0, 2**31 - 1)
RECORDS = st.builds(
    Record,
    st.sampled_from(RecordKind),
    st.integers(0, 2**62),
    st.integers(0, 2**62),
    NUMBERS,
    NUMBERS,
    st.lists(TENSORS, max_size=4).map(tuple),
)


def fields(record: Record) -> tuple[int, ...]:
    return (record.kind, record.epoch, record.step, record.half_batch, record.transfer)


def same(left: Record, right: Record) -> bool:
    """Equal in every bit, also where a float is not a number."""
    pairs = list(zip(left.tensors, right.tensors, strict=True))
    return fields(left) == fields(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


@given(RECORDS)
def test_round_trip(record: Record) -> None:
    buffer = np.full(record.nbytes(), 0xFF, np.uint8)
    assert encode_into(record, buffer) == buffer.nbytes
    decoded = decode(buffer)
    assert same(decoded, record)
    buffer[:] = 0
    assert same(decoded, record), "the decoded tensors are copies"
    assert all(tensor.flags.writeable for tensor in decoded.tensors)


@given(RECORDS)
def test_encoded_size_is_known_from_shapes(record: Record) -> None:
    assert encoded_size([(t.shape, t.dtype) for t in record.tensors]) == record.nbytes()


def test_payloads_are_aligned() -> None:
    tensors = (np.full(3, 7, np.uint8), np.full((2, 5), 8, np.int64))
    buffer = np.zeros(1024, np.uint8)
    encode_into(Record(RecordKind.DATA, 0, 0, 0, 0, tensors), buffer)
    assert bytes(buffer).index(b"\x07\x07\x07") % 64 == 0
    assert bytes(buffer).index(np.int64(8).tobytes() * 2) % 64 == 0


def test_too_large_for_the_buffer() -> None:
    record = Record(RecordKind.DATA, 1, 2, 0, 9, (np.zeros((4, 576), np.float32),))
    with pytest.raises(LinkError, match=rf"transfer 9 needs {record.nbytes()} bytes.* has 100"):
        encode_into(record, np.zeros(100, np.uint8))


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (np.zeros((2, 3), np.float64), "C-contiguous float64"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        (np.zeros((2, 3), np.float32).T, "strided float32"),
        (np.zeros((), np.int32), r"shape \(\)"),
    ],
)
def test_what_cannot_travel(tensor: np.ndarray, fault: str) -> None:
    with pytest.raises(LinkError, match=fault):
        encode_into(Record(RecordKind.DATA, 0, 0, 0, 0, (tensor,)), np.zeros(4096, np.uint8))


def test_bytes_that_are_no_record() -> None:
    buffer = np.zeros(4096, np.uint8)
    with pytest.raises(LinkError, match="expected a record"):
        decode(buffer)
    with pytest.raises(LinkError, match="at least 40 bytes, there are 8"):
        decode(buffer[:8])
    size = encode_into(Record(RecordKind.STEP, 0, 0, 0, 0, (np.zeros(99, np.int32),)), buffer)
    with pytest.raises(LinkError, match=f"{size} bytes in a buffer of 128"):
        decode(buffer[:128])
