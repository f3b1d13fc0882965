"""What devices share: an actor, a GPU's memory, a machine's memory and its cores.

Two processes on one GPU take turns by time slice, which costs several times what the work does. So
devices on one GPU live in one actor, where one loop takes all their turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from raygraft.actors.part import Answers
from raygraft.graph.errors import ConfigurationError
from raygraft.kernels import GPU_BACKENDS
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.plan import DeviceUse

MEMORY_SHARE = 0.8
"""Share of free memory, of a machine or of a GPU, that its devices divide among themselves."""


def gpu_of(spec: DeviceSpec) -> int | None:
    """The number of the GPU that a device is on, if it is on any."""
    return 0 if spec.gpu is None and spec.backend in GPU_BACKENDS else spec.gpu


def actors_of(specs: Sequence[DeviceSpec], nodes: Mapping[str, str]) -> dict[str, str]:
    """Device -> the actor it lives in.

    Devices that name an actor share it; of the others those on one GPU of a node do. An actor has
    the name that was given, else that of its first device. `nodes` holds the node of each device.
    Raises ConfigurationError for an actor that would be on two nodes, or whose name misleads.
    """
    found: dict[str, str] = {}
    on_gpu: dict[tuple[str, int], str] = {}
    for spec in specs:
        gpu = gpu_of(spec)
        if spec.actor is not None:
            found[spec.name] = spec.actor
        elif gpu is not None:
            found[spec.name] = on_gpu.setdefault((nodes[spec.name], gpu), spec.name)
        else:
            found[spec.name] = spec.name
    first: dict[str, str] = {}
    for spec in specs:
        other = first.setdefault(found[spec.name], spec.name)
        if nodes[other] != nodes[spec.name]:
            raise ConfigurationError(
                f"device {spec.name}: actor={found[spec.name]} is on node {nodes[other]} with "
                f"device {other}, this one is on {nodes[spec.name]}; an actor has one node"
            )
        if spec.actor is not None and found.get(spec.actor, spec.actor) != spec.actor:
            raise ConfigurationError(
                f"device {spec.name}: actor={spec.actor} is the name of a device that lives in "
                "another actor; choose another name"
            )
    return found


def threads_of(
    specs: Sequence[DeviceSpec], actors: Mapping[str, str], cores: int
) -> dict[str, int]:
    """Threads of each device of one machine: as given, or an equal share of what is left.

    Devices of one actor never compute at the same time: they have the share of one.
    """
    most = dict.fromkeys((actors[spec.name] for spec in specs), 0)
    for spec in specs:
        most[actors[spec.name]] = max(most[actors[spec.name]], spec.threads or 0)
    sharing = {actors[spec.name] for spec in specs if spec.threads is None}
    taken = sum(threads for actor, threads in most.items() if actor not in sharing)
    share = max(1, (cores - taken) // max(1, len(sharing)))
    return {spec.name: share if spec.threads is None else spec.threads for spec in specs}


def core_left(uses: Sequence[DeviceUse], threads: Mapping[str, int], cores: int) -> bool:
    """Whether a machine has a core that none of the devices used on it computes with.

    `threads` are those of each device. One that is no processor needs a thread that waits for it.
    """
    busy: dict[str, int] = {}
    for use in uses:
        own = threads[use.device] if use.type == "cpu" else 1
        busy[use.actor] = max(own, busy.get(use.actor, 0))
    return sum(busy.values()) < cores


def profiles_of(
    specs: Sequence[DeviceSpec],
    answers: Mapping[str, Answers],
    nodes: Mapping[str, str],
    actors: Mapping[str, str],
    *,
    asked: bool = True,
) -> tuple[DeviceProfile, ...]:
    """The planner's view of devices, each with its share of the memory that it is on."""
    pools = {
        spec.name: _pool_of(spec, nodes[spec.name], answers[spec.name].description.type)
        for spec in specs
    }
    return tuple(
        DeviceProfile(
            name=spec.name,
            type=own.description.type,
            memory=_memory_of(spec, own, [s for s in specs if pools[s.name] == pools[spec.name]]),
            threads=own.description.threads,
            verdicts=own.verdicts,
            claims=own.claims,
            found=own.found,
            weight_bytes=own.weight_bytes,
            regions=spec.regions,
            node=nodes[spec.name],
            actor=actors[spec.name],
            gpu=gpu_of(spec),
            link=link,
            far_link=far_link,
            asked=asked,
        )
        for spec in specs
        for own in [answers[spec.name]]
        for link, far_link in [_links_of(actors[spec.name], specs, answers, actors)]
    )


def _links_of(
    actor: str,
    specs: Sequence[DeviceSpec],
    answers: Mapping[str, Answers],
    actors: Mapping[str, str],
) -> tuple[str, str]:
    """The links to an actor's memory, when all its devices are on one GPU and know the same."""
    own = [spec for spec in specs if actors[spec.name] == actor]
    gpus = {gpu_of(spec) for spec in own}
    said = [answers[spec.name].description for spec in own]
    links = {(description.link, description.far_link) for description in said}
    return links.pop() if len(links) == len(gpus) == 1 and None not in gpus else ("", "")


def _pool_of(spec: DeviceSpec, node: str, kind: str) -> Hashable:
    """What a device takes its memory from: the machine, a GPU, or something of its own."""
    if kind == "cpu":
        return ("machine", node)
    gpu = gpu_of(spec)
    return spec.name if gpu is None else ("gpu", node, gpu)


def _memory_of(spec: DeviceSpec, answers: Answers, sharers: Sequence[DeviceSpec]) -> int:
    """As its owner says; else an equal part of what the others on the same memory leave."""
    if spec.memory is not None:
        return spec.memory
    free = int(answers.description.memory_free * MEMORY_SHARE)
    if answers.description.type != "cpu":  # a machine's memory may be promised more than once
        free -= sum(other.memory or 0 for other in sharers)
    return max(0, free) // sum(other.memory is None for other in sharers)


def named(devices: Sequence[str]) -> str:
    """Devices for messages: device a, devices a and b."""
    *others, last = devices
    return f"devices {', '.join(others)} and {last}" if others else f"device {last}"
