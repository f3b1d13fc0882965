"""One GPU: its stream, its compiled kernels, launches, and what goes wrong with it.

CuPy compiles and owns memory. Kernels are launched by the driver's own call, because CuPy's knows
no launch attributes: with them a kernel may start, and fetch weights, before the one ahead of it
has ended (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raygraft.graph.errors import CapacityError, ConfigurationError, DeviceLostError
from raygraft.kernels.cuda import sources

OLDEST = (8, 0)
"""Compute capability that the kernels need: tensor cores for halves, and asynchronous copies."""
HOPPER = (9, 0)
_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_OUT_OF_MEMORY = 2

Kernel = int
"""The address of a compiled function."""


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def import_cupy() -> Any:
    """The module. Raises ConfigurationError where it is not installed or there is no GPU."""
    try:
        import cupy  # noqa: PLC0415  # only this backend needs it
    except ImportError as error:
        raise ConfigurationError(
            f"backend 'cuda' needs CuPy, as `pip install raygraft[cuda]` brings it: {error}"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ConfigurationError(f"backend 'cuda' finds no usable NVIDIA GPU: {error}") from error
    if not count:
        raise ConfigurationError("backend 'cuda' finds no NVIDIA GPU on this machine")
    return cupy


class Gpu:
    """The GPU that a device runs on."""

    def __init__(self, number: int = 0) -> None:
        """Raises ConfigurationError when there is none that can be used."""
        self.cupy = import_cupy()
        self.number = number
        runtime = self.cupy.cuda.runtime
        count = runtime.getDeviceCount()
        if number >= count:
            raise ConfigurationError(
                f"backend 'cuda' finds no GPU {number}: this machine has "
                f"{'GPU 0' if count == 1 else f'GPUs 0 to {count - 1}'}"
            )
        self.device = self.cupy.cuda.Device(number)
        properties = runtime.getDeviceProperties(number)
        self.name: str = properties["name"].decode()
        self.capability: tuple[int, int] = (properties["major"], properties["minor"])
        self.processors: int = properties["multiProcessorCount"]
        self.shared_memory = sources.SharedMemory(
            properties["sharedMemPerBlockOptin"], properties["sharedMemPerMultiprocessor"]
        )
        if self.capability < OLDEST:
            raise ConfigurationError(
                f"backend 'cuda' needs compute capability {OLDEST[0]}.{OLDEST[1]} or later; "
                f"{self.name} has {self.capability[0]}.{self.capability[1]}"
            )
        with self.device:
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Kernel] = {}
        self._functions: list[Any] = []
        overlap = _Attribute(_OVERLAP, 0, 1)
        self._overlap = (_Attribute * 1)(overlap)
        self._attributes = int(self.capability >= HOPPER)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Work on this GPU and its stream. A GPU that fails is a DeviceLostError."""
        errors = (
            self.cupy.cuda.runtime.CUDARuntimeError,
            self.cupy.cuda.driver.CUDADriverError,
        )
        try:
            with self.device, self.stream:
                yield
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            raise CapacityError(self._room(f"out of memory: {error}")) from error
        except errors as error:
            if error.status == _OUT_OF_MEMORY:  # of what is allocated beside arrays
                raise CapacityError(self._room(f"out of memory: {error}")) from error
            raise DeviceLostError(f"GPU {self.number} ({self.name}) failed: {error}") from error

    def mark(self, event: Any = None) -> Any:
        """An event, or this one again: done when all that is on the stream now is done."""
        event = event or self.cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def memory(self) -> tuple[int, int]:
        """Bytes in all, and bytes that are free: CuPy's pool gives back what nobody holds."""
        with self.device:
            free, total = self.cupy.cuda.runtime.memGetInfo()
            return total, free + self.cupy.get_default_memory_pool().free_bytes()

    def allocate(self, what: str, shape: tuple[int, ...], dtype: str) -> Any:
        """Zeros. Raises CapacityError, which says what was needed and what was free."""
        try:
            return self.cupy.zeros(shape, dtype)
        except self.cupy.cuda.memory.OutOfMemoryError:
            self.cupy.get_default_memory_pool().free_all_blocks()
        try:
            return self.cupy.zeros(shape, dtype)
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            size = self.cupy.dtype(dtype).itemsize
            for extent in shape:
                size *= extent
            raise CapacityError(self._room(f"{what} needs {size / 2**30:.2f} GiB")) from error

    def _room(self, needed: str) -> str:
        total, free = self.memory()
        return (
            f"GPU {self.number} ({self.name}): {needed}; "
            f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"
        )

    def kernel(
        self, source: str, name: str, make: Callable[[], str], shared: bool = False
    ) -> Kernel:
        """A compiled function of a source; `make` gives its text when it is first needed.

        `shared` says whether it will be launched with shared memory.
        """
        key = (source, name)
        if key not in self._kernels:
            if source not in self._modules:
                self._modules[source] = self.cupy.RawModule(code=make(), options=sources.OPTIONS)
            function = self._modules[source].get_function(name)
            if shared:
                room = self.shared_memory.block - function.shared_size_bytes
                function.max_dynamic_shared_size_bytes = room
            self._functions.append(function)
            self._kernels[key] = int(function.kernel.ptr)
        return self._kernels[key]

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        arguments: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        """Launch on the stream. Arguments are ctypes values."""
        count = len(arguments)
        addresses = (ctypes.c_void_p * count)(*[ctypes.addressof(a) for a in arguments])
        config = _Launch(
            grid, (threads, 1, 1), shared, self.stream.ptr, self._overlap, self._attributes
        )
        code = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(kernel), addresses, None
        )
        if code:
            raise self.cupy.cuda.driver.CUDADriverError(code)
