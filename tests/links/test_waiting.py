"""Waits end when they should, hold no GIL and cost next to nothing."""

import threading
import time

import numpy as np
import pytest

from raygraft.actors.links import RingReceiver, format_ring, ring_bytes
from raygraft.kernels.waiting import (
    HAS_FUTEX,
    SPIN_NS,
    YIELD_NS,
    load,
    prepare,
    publish,
    wait_for_change,
)

LONG_NS = 10**10
BUDGETS = {"spin": (LONG_NS, 0), "yield": (0, LONG_NS), "sleep": (0, 0), "all": (SPIN_NS, YIELD_NS)}


@pytest.fixture
def addresses() -> tuple[int, int, np.ndarray]:
    prepare()
    words = np.zeros(32, np.int64)
    return words.ctypes.data, words.ctypes.data + 128, words


@pytest.mark.parametrize("phase", BUDGETS)
def test_a_change_ends_the_wait(addresses, phase: str) -> None:
    counter, sleeping, words = addresses
    found: list[bool] = []
    wait = (counter, 0, sleeping, LONG_NS, *BUDGETS[phase])
    thread = threading.Thread(target=lambda: found.append(wait_for_change(*wait)))
    thread.start()
    time.sleep(0.1)
    assert not found
    publish(counter, 2**40, sleeping)
    thread.join(5)
    assert found == [True]
    assert load(counter) == 2**40
    assert words[16] == 0, "the sleeping flag is lowered again"


@pytest.mark.parametrize("phase", BUDGETS)
def test_timeout(addresses, phase: str) -> None:
    counter, sleeping, _ = addresses
    begin = time.perf_counter()
    assert not wait_for_change(counter, 0, sleeping, 50_000_000, *BUDGETS[phase])
    assert 0.045 < time.perf_counter() - begin < 2


def test_no_wait_when_already_changed(addresses) -> None:
    counter, sleeping, _ = addresses
    assert wait_for_change(counter, 5, sleeping, LONG_NS, *BUDGETS["sleep"])
    assert not wait_for_change(counter, 0, sleeping, 0, *BUDGETS["spin"])


@pytest.mark.parametrize("phase", BUDGETS)
def test_the_gil_is_free_during_a_wait(addresses, phase: str) -> None:
    counter, sleeping, _ = addresses
    wait = (counter, 0, sleeping, LONG_NS, *BUDGETS[phase])
    thread = threading.Thread(target=wait_for_change, args=wait)
    thread.start()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.2:
        steps += 1
    still_waiting = thread.is_alive()
    publish(counter, 1, sleeping)
    thread.join(5)
    assert still_waiting, "with the GIL held, the loop above would have run after the wait"
    assert steps > 1000


def test_an_idle_receiver_uses_no_core() -> None:
    """As a resident loop waits: in slices, which begin with spinning only while there is work."""
    buffer = np.zeros(ring_bytes(2, 64), np.uint8)
    format_ring(buffer, 2, 64)
    receiver = RingReceiver(buffer, 2, 64, "idle")
    begin, cpu = time.perf_counter(), time.thread_time()
    for _ in range(10):
        assert receiver.receive(0.1) is None
    share = (time.thread_time() - cpu) / (time.perf_counter() - begin)
    print(f"an idle receiver uses {share:.4%} of a core")
    assert share < (0.01 if HAS_FUTEX else 0.05)
