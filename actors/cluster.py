"""Starting a local Ray, or joining a running one, and finding nodes in it."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygraft.graph.errors import ClusterError, ConfigurationError

# Workers started through `uv` would not see the packages of this environment.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Devices ask Ray for no GPU and choose theirs by number: Ray must leave the choice alone.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

KNOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster."""

    id: str
    name: str
    """What a person knows it by: its address, with a part of its id where several share one."""
    address: str
    port: int
    """Where its raylet listens."""
    host: str
    cores: int
    labels: Mapping[str, str]

    def answers_to(self, name: str) -> bool:
        """Whether a device's `node` means this one: an id, address, host, label or `key=value`."""
        pairs = {f"{key}={value}" for key, value in self.labels.items()}
        return name in {self.id, self.address, self.host, *self.labels.values(), *pairs}

    def own_labels(self) -> str:
        """Its labels, less those that Ray gives to every node."""
        own = [f"{k}={v}" for k, v in sorted(self.labels.items()) if not k.startswith("ray.io/")]
        return ", ".join(own) or "no labels"


def connect(address: str | None) -> bool:
    """Join the cluster at `address` (or RAY_ADDRESS), else start a local one.

    Returns whether the connection was made here, and is ours to end (with it a local Ray ends). A
    process that is connected already stays so. Raises ClusterError.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        _knock(address)
    _keep_standard_output_clean()
    try:
        if address is not None:
            ray.init(address=address, **quiet)
            return True
        ray.init(address="local", include_dashboard=False, **quiet)
    except Exception as error:
        where = f"join the Ray cluster at {address}" if address else "start a local Ray"
        hint = "; are RAY_AUTH_MODE and the token those of the cluster?" if address else ""
        raise ClusterError(f"cannot {where}: {error}{hint}") from error
    return True


def _keep_standard_output_clean() -> None:
    """Ray prints its notices of dead processes among our answers, and has no option against it.

    What there is to say of them is said by errors, and by what the engine reports.
    """
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _knock(address: str) -> None:
    """Raise ClusterError when nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "://" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {error}") from error


def nodes() -> list[Node]:
    """The living nodes of the cluster."""
    living = [node for node in ray.nodes() if node["Alive"]]
    sharers = Counter(node["NodeManagerAddress"] for node in living)
    return [
        Node(
            id=node["NodeID"],
            name=node["NodeManagerAddress"]
            + (f" ({node['NodeID'][:6]})" if sharers[node["NodeManagerAddress"]] > 1 else ""),
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            host=node["NodeManagerHostname"],
            cores=int(node["Resources"].get("CPU", 1)),
            labels=node.get("Labels", {}),
        )
        for node in living
    ]


def own_node() -> str:
    """The id of the node that this process is on."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def find_node(name: str | None, device: str, living: list[Node]) -> Node:
    """The node that a device asks for; the own one when it asks for none.

    Raises ConfigurationError, which lists the living nodes.
    """
    wanted = own_node() if name is None else name
    found = [node for node in living if node.answers_to(wanted)]
    if len(found) == 1:
        return found[0]
    there = "; ".join(f"{node.address} ({node.own_labels()})" for node in living)
    problem = "several nodes match" if found else "no living node matches"
    raise ConfigurationError(f"device {device}: {problem} node={name}; the cluster has {there}")


def is_there(node: Node) -> bool:
    """Whether somebody answers there: a dead node is noted as such only after a while."""
    try:
        _knock(f"{node.address}:{node.port}")
    except ClusterError:
        return False
    return True


def pinned_to(node: Node) -> NodeAffinitySchedulingStrategy:
    """Only on this node: fails rather than waits when it is gone."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)
