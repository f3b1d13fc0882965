"""What a backend on a CPU says about its machine."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

from raygraft.kernels.base import Description


def describe_host(
    backend: str, threads: int, versions: tuple[tuple[str, str], ...], kind: str = "cpu"
) -> Description:
    """The machine's processor and memory, as they are now."""
    memory = psutil.virtual_memory()
    return Description(
        backend=backend,
        type=kind,
        hardware=processor_name(),
        memory_total=memory.total,
        memory_free=memory.available,
        threads=threads,
        versions=versions,
    )


def free_memory() -> int:
    """Bytes of this machine's memory that are free now."""
    return int(psutil.virtual_memory().available)


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
