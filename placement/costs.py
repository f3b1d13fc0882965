"""What the planner weighs: nominal times of computing and of sending.

Decoding reads every weight once per token, so a region costs its bytes over the bandwidth. The
figures are nominal; only their order matters to a plan, and rules override them.
"""

from __future__ import annotations

from raygraft.placement.devices import DeviceProfile, Place

BANDWIDTH = {"cpu": 5e9, "gpu": 1e12, "accelerator": 1e11}
"""Bytes per second: of one thread for a CPU, of the whole device for the others."""
MEMORY_THREADS = 8
"""Threads beyond this many share a CPU's memory bandwidth."""
REGION_SECONDS = 5e-6
"""Least time of any region: the call itself."""
TURN_SECONDS = 3e-4
"""From the actor that draws a token to another one that looks it up, by way of the engine, which
stands not in between where one actor does both."""
SHARED = "shared"
"""Name of the link that is none: from device to device inside of an actor."""
DIRECT = "cuda_ipc"
"""Name of the link from GPU to GPU of one node: the sender writes to the receiver's memory, and
nobody waits for the host."""
PINNED = "cuda_host"
"""The same through memory of the host that both GPUs have mapped, for those that cannot reach each
other's."""
NCCL = "nccl"
"""From GPU to GPU of two nodes."""
BY_DEVICES = (DIRECT, PINNED, NCCL)
"""Links whose records devices put and take themselves."""
# See docs/benchmarks.md; for tcp, as long again for the network as the link itself takes.
HOP_SECONDS = {
    SHARED: 5e-6,
    DIRECT: 5e-6,
    PINNED: 1e-5,
    NCCL: 5e-5,
    "ring": 3e-5,
    "tcp": 1e-4,
    "object": 2e-3,
}
LINK_BANDWIDTH = {
    SHARED: 1e12,
    DIRECT: 2e11,
    PINNED: 2e10,
    NCCL: 2e9,
    "ring": 5e9,
    "tcp": 1e9,
    "object": 1e9,
}


def bandwidth(device: DeviceProfile) -> float:
    """Nominal bytes per second that a device reads weights with."""
    threads = min(device.threads, MEMORY_THREADS) if device.type == "cpu" else 1
    return BANDWIDTH.get(device.type, BANDWIDTH["cpu"]) * max(1, threads)


def link_between(source: Place, target: Place) -> str:
    """The link that values take."""
    if source.actor == target.actor:
        return SHARED
    if source.node != target.node:
        return source.far_link if source.far_link and source.far_link == target.far_link else "tcp"
    direct = source.link and source.link == target.link and source.gpu != target.gpu
    return source.link if direct else "ring"


def hop_seconds(link: str, nbytes: int) -> float:
    """One record over a link."""
    return HOP_SECONDS[link] + nbytes / LINK_BANDWIDTH[link]


def size(nbytes: int) -> str:
    """Bytes for a person: 5.1 MiB, 513 MiB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    amount, unit = nbytes / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if amount >= 1024:
            amount, unit = amount / 1024, larger
    return f"{amount:.{0 if amount >= 100 else 1}f} {unit}"
