"""Waiting for a counter in shared memory, or a socket, without the GIL or burning a core.

A wait goes through three phases: it spins (the answer is a microsecond away), gives its core to
whoever else wants it (`sched_yield`), then sleeps in the kernel until the other side wakes it (a
futex on Linux, short naps elsewhere). The other side makes the wake call only when the waiter says
that it sleeps, so that a busy link costs no system calls.

The order of memory accesses is explicit, for processors that reorder more than x86 does: a
counter is stored with release and loaded with acquire semantics, and the two sides' "I sleep" and
"I have published" are separated by sequentially consistent fences, so that at least one of them
sees the other.

Counters are 64 bits at 8-byte-aligned addresses; a futex compares the low 32 of them.
"""

from __future__ import annotations

import functools
import platform
import sys
import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from raygraft.kernels.compiled import compiled

# Budgets of the first two phases. See `bench/hops.py`: longer spins win nothing once there are more
# waiting processes than cores. Yielding outlasts a neighbour's stage, and costs nobody a core; who
# sleeps instead pays the kernel's wake-up on every hop.
SPIN_NS = 20_000
YIELD_NS = 1_000_000

_LINE_BYTES = 128  # pairs of 64-byte lines are fetched together, and Arm servers have 128
_SPINS_PER_CHECK = 16  # looks at the counter between two looks at the clock

_MACHINE = platform.machine().lower()
_FUTEX_CALL = {"x86_64": 202, "amd64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98}.get(
    _MACHINE, -1
)
HAS_FUTEX = sys.platform == "linux" and sys.byteorder == "little" and _FUTEX_CALL >= 0
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERY_WAITER = 0x7FFFFFFF
_NAP_US = 50  # without a futex: the first nap, doubled up to the longest
_LONGEST_NAP_US = 1_000
_CLOCK_MONOTONIC = getattr(time, "CLOCK_MONOTONIC", 1)
# LLVM's name for the waiting-loop hint, and its argument: 15 is the full ISB, which pauses longer
# on Arm than its own YIELD does.
_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.isb", [15]),
    "arm64": ("llvm.aarch64.isb", [15]),
}.get(_MACHINE)

_WORD = ir.IntType(64)
yield_core = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_poll = types.ExternalFunction("poll", types.int32(types.intp, types.uint64, types.int32))


# The intrinsics take addresses as int64; numba gives them (typing context, argument types) and
# (context, builder, signature, arguments), all untyped.


@intrinsic  # type: ignore[untyped-decorator]
def load_acquire(typing_context: Any, address: Any) -> Any:
    """The int64 at an address; nothing after it is read before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_release(typing_context: Any, address: Any, value: Any) -> Any:
    """Store an int64 at an address; everything written before is seen before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def full_fence(typing_context: Any) -> Any:
    """Everything before is seen before anything after is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _PAUSE is not None:
            name, values = _PAUSE
            constants = [ir.IntType(32)(value) for value in values]
            shape = ir.FunctionType(ir.VoidType(), [constant.type for constant in constants])
            builder.call(cgutils.get_or_insert_function(builder.module, shape, name), constants)
        return context.get_dummy_value()

    return types.void(), generate


def _seconds_and_nanoseconds(builder: Any, seconds: Any, nanoseconds: Any) -> Any:
    """A `struct timespec` on the stack, of a 64-bit machine."""
    timespec = cgutils.alloca_once(builder, ir.LiteralStructType([_WORD, _WORD]))
    builder.store(seconds, cgutils.gep_inbounds(builder, timespec, 0, 0))
    builder.store(nanoseconds, cgutils.gep_inbounds(builder, timespec, 0, 1))
    return timespec


@intrinsic  # type: ignore[untyped-decorator]
def now_ns(typing_context: Any) -> Any:
    """The monotonic clock in nanoseconds, by libc's `clock_gettime`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        timespec = _seconds_and_nanoseconds(builder, _WORD(0), _WORD(0))
        shape = ir.FunctionType(ir.IntType(32), [ir.IntType(32), timespec.type])
        function = cgutils.get_or_insert_function(builder.module, shape, "clock_gettime")
        builder.call(function, [ir.IntType(32)(_CLOCK_MONOTONIC), timespec])
        seconds = builder.load(cgutils.gep_inbounds(builder, timespec, 0, 0))
        nanoseconds = builder.load(cgutils.gep_inbounds(builder, timespec, 0, 1))
        return builder.add(builder.mul(seconds, _WORD(1_000_000_000)), nanoseconds)

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _futex(
    typing_context: Any, address: Any, operation: Any, value: Any, seconds: Any, nanoseconds: Any
) -> Any:
    """The system call `futex`, between processes (not the private kind); see futex(2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, operation, value, seconds, nanoseconds = arguments
        timespec = _seconds_and_nanoseconds(builder, seconds, nanoseconds)
        shape = ir.FunctionType(_WORD, [_WORD], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, shape, "syscall")
        timeout = builder.ptrtoint(timespec, _WORD)
        call = [_WORD(_FUTEX_CALL), address, operation, value, timeout, _WORD(0), _WORD(0)]
        return builder.call(function, call)

    return types.int64(*[types.int64] * 5), generate


@compiled(nogil=True)
def wait_for_change(
    counter: int, seen: int, sleeping: int, timeout_ns: int, spin_ns: int, yield_ns: int
) -> bool:
    """Wait until the counter at an address is no longer `seen`; False after `timeout_ns`.

    `sleeping` is the address of this side's flag, which only this side writes; the side that
    changes the counter calls `publish` with it. The GIL is not held.
    """
    if load_acquire(counter) != seen:
        return True
    if timeout_ns <= 0:
        return False
    begin = now_ns()
    spin_end = begin + min(spin_ns, timeout_ns)
    while now_ns() < spin_end:
        for _ in range(_SPINS_PER_CHECK):
            if load_acquire(counter) != seen:
                return True
            pause()
    yield_end = begin + min(spin_ns + yield_ns, timeout_ns)
    while now_ns() < yield_end:
        yield_core()
        if load_acquire(counter) != seen:
            return True
    return _sleep_until_changed(counter, seen, sleeping, begin + timeout_ns)


@compiled(nogil=True)
def _sleep_until_changed(counter: int, seen: int, sleeping: int, end: int) -> bool:
    nap = _NAP_US
    left = end - now_ns()
    while left > 0:
        store_release(sleeping, 1)
        full_fence()  # say "I sleep" before the last look, as `publish` stores before it looks
        if load_acquire(counter) != seen:
            break
        if HAS_FUTEX:
            _futex(counter, _FUTEX_WAIT, seen & 0xFFFFFFFF, left // 10**9, left % 10**9)
        else:
            _usleep(min(nap, left // 1000 + 1))
            nap = min(2 * nap, _LONGEST_NAP_US)
        if load_acquire(counter) != seen:
            break
        left = end - now_ns()
    store_release(sleeping, 0)
    changed: bool = load_acquire(counter) != seen
    return changed


@compiled(nogil=True)
def publish(counter: int, value: int, sleeping: int) -> None:
    """Store a counter's new value after all that was written before, and wake who sleeps for it."""
    store_release(counter, value)
    full_fence()
    if HAS_FUTEX and load_acquire(sleeping) != 0:
        _futex(counter, _FUTEX_WAKE, _EVERY_WAITER, 0, 0)


@compiled(nogil=True)
def wait_until_ready(polled: int, timeout_ns: int, yield_ns: int) -> bool:
    """Wait for a socket: until `poll` has something to say about the `struct pollfd` at an address.

    False after `timeout_ns`; a signal may end the wait earlier, with True. The GIL is not held.
    """
    if _poll(polled, 1, 0) != 0:
        return True
    begin = now_ns()
    yield_end = begin + min(yield_ns, timeout_ns)
    while now_ns() < yield_end:
        yield_core()
        if _poll(polled, 1, 0) != 0:
            return True
    left = begin + timeout_ns - now_ns()
    ready: bool = left > 0 and _poll(polled, 1, left // 1_000_000 + 1) != 0
    return ready


@compiled(nogil=True)
def load(counter: int) -> int:
    """The counter's value; nothing after is read before it."""
    value: int = load_acquire(counter)
    return value


@functools.cache
def prepare() -> None:
    """Compile everything here, or load it from the cache, so that no first wait pays for it."""
    words = np.zeros(2, np.int64)
    counter, sleeping = words.ctypes.data, words.ctypes.data + 8
    publish(counter, 1, sleeping)
    wait_for_change(counter, load(counter), sleeping, 1_000, 0, 0)


@functools.cache
def prepare_sockets() -> None:
    """As `prepare`, for `wait_until_ready`."""
    # A negative file descriptor is passed over: there is nothing to say about it.
    polled = np.array([-1, 0], np.int32)
    wait_until_ready(polled.ctypes.data, 1_000, 500)
