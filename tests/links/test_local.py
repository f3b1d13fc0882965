"""The in-process link behaves as one across processes does."""

import numpy as np
import pytest

from raygraft.actors.links import local_link
from raygraft.actors.records import Record, RecordKind
from raygraft.graph.errors import LinkError, LinkFullError


def test_tensors_are_copied() -> None:
    sender, receiver = local_link(2)
    tensor = np.arange(3, dtype=np.int32)
    sender.send(Record(RecordKind.DATA, 1, 2, 0, 4, (tensor,)), 1)
    tensor[:] = 9
    record = receiver.receive(1)
    assert record is not None
    assert (record.epoch, record.step, record.transfer) == (1, 2, 4)
    np.testing.assert_array_equal(record.tensors[0], [0, 1, 2])


def test_full_empty_and_closed() -> None:
    sender, receiver = local_link(1, "a to b")
    assert receiver.receive(0.01) is None
    record = Record(RecordKind.STEP, 0, 0, 0)
    sender.send(record, 1)
    with pytest.raises(LinkFullError, match=r"a to b: no room .*all 1 slots"):
        sender.send(record, 0.01)
    sender.close()
    receiver.close()
    with pytest.raises(LinkError, match="a to b is closed"):
        sender.send(record, 1)
    with pytest.raises(LinkError, match="a to b is closed"):
        receiver.receive(1)
