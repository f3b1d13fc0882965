"""The backend seam: what a device must be able to say and do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from numpy.typing import NDArray

from raygraft.graph.capability import NO_CLAIM, Limits, Pattern, RegionSignature, Verdict, no
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Signature, Value
from raygraft.graph.step import Step
from raygraft.graph.tensors import WeightForm, WeightSource, row_bytes

Array = NDArray[Any]
Values = Mapping[str, Array]
_Thing = TypeVar("_Thing")


class Commons:
    """What the backends of one actor have together: one thread runs all of them, in turns."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def get(self, key: Hashable, make: Callable[[], _Thing]) -> _Thing:
        """The thing of this name, made when nobody holds one."""
        found: _Thing | None = self._held.get(key)
        if found is None:
            found = self._held[key] = make()
        return found


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a device's owner decides for its backend, and whom it lives with."""

    threads: int = 1
    gpu: int = 0
    """Number of the GPU, for a backend that runs on one."""
    commons: Commons = field(default_factory=Commons, compare=False)


@dataclass(frozen=True, slots=True)
class Description:
    """What a backend says about the hardware it found. Memory is in bytes."""

    backend: str
    type: str
    """ "cpu", "gpu" or "accelerator"."""
    hardware: str
    memory_total: int
    memory_free: int
    threads: int
    versions: tuple[tuple[str, str], ...]
    """Libraries that compute, with their versions."""
    link: str = ""
    """Name of the link by which others of its kind on this machine may write to its memory."""
    far_link: str = ""
    """The same of others on other machines."""


@dataclass(frozen=True, slots=True)
class NativeRun:
    """A way to compute steps without Python: a C function `void(int64 job, int64 step)`.

    Values are float32 `[rows, width]` at fixed addresses; inputs are put there before a call.
    """

    function: int
    job: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    samples: tuple[str, ...] = ()
    """Outputs that have no address: see `Runner.sampled`."""
    go_on: int = 0
    """A C function `void(int64 step)` that makes a step the one that follows it."""


class Started(ABC):
    """A step that is being computed."""

    draws = False
    """Whether the next step may be started meanwhile, with tokens that this one has yet to draw."""

    @abstractmethod
    def done(self) -> bool:
        """Whether nothing is left to wait for."""

    @abstractmethod
    def finish(self) -> dict[str, Array]:
        """Wait for it, and yield what `Runner.run` yields."""


class Runner(ABC):
    """A loaded subgraph, ready to run steps."""

    @abstractmethod
    def allocate_state(self, blocks: int, block_size: int) -> None:
        """Make room for a paged cache of `blocks` pages of `block_size` tokens each.

        How pages lie in memory is the backend's choice; steps name them by number.
        """

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...] | None:
        """What these pages of an attention operator's cache hold, `[pages, ...]` each.

        The operator has this name. None where the cache cannot be taken out; it is then filled
        anew elsewhere.
        """
        return None

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """Fill these pages with what a runner of the same backend class has exported."""
        raise NotImplementedError

    def hand_on_state(self, name: str) -> object | None:
        """An attention operator's cache itself, for `take_state` of a runner that follows this one.

        That is of the same device. It may be made and take the cache while this one still runs,
        but does not run before this one has ended. None where pages must be copied.
        """
        return None

    def take_state(self, name: str, state: object) -> bool:
        """Have a cache that was handed on in the place of the own; False when it does not fit.

        After `allocate_state`. What was taken before may be given once more.
        """
        return False

    @abstractmethod
    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step.

        `inputs` holds the subgraph's inputs, `[rows, width]`, C-contiguous; the result its
        outputs, in the same form. Arrays handed in are only read, and may be overwritten by the
        caller after the call returns.
        """

    def run_several(self, step: Step, steps: int) -> list[dict[str, Array]] | None:
        """A step, and those that follow it: each row goes on with the token that it draws.

        Every row wants logits, and there are no inputs. What each of the steps yields; None where
        they have to be run one by one.
        """
        return None

    def start(self, step: Step, inputs: Values) -> Started | None:
        """Begin what `run` does, where the caller need not wait for it.

        At most one more step may be started before it is finished. None where a step is run whole.
        """
        return None

    def leads_to(self, following: Runner) -> bool:
        """Whether a runner that comes next in the same actor can be chained to this one."""
        return False

    def chain(self, following: Sequence[Runner], outputs: Collection[str]) -> Runner:
        """One runner for this one and all that follow, of which each leads to the next.

        Its run yields these outputs; what else the runners give each other need not leave the
        hardware they are on.
        """
        raise NotImplementedError

    def native(self) -> NativeRun | None:
        """How to run it without Python, where that is possible. After `allocate_state`."""
        return None

    def describe_step(self, step: Step, steps: int = 1) -> int:
        """The address that a native run takes as its step, for all runners of this class.

        There may be `steps` that follow each other: see `NativeRun.go_on`. What it points to lives
        until eight more steps are described.
        """
        raise NotImplementedError

    def sampled(self, step: Step, number: int) -> dict[str, Array]:
        """What native runs have sampled in one of the steps that were described by this runner."""
        raise NotImplementedError


class DeviceRing(ABC):
    """One end of a ring of records in a device's memory, which another device writes to.

    Nothing of a record goes through the host: it is put and taken by runners, in chains with
    those that make and use it, and who has to wait waits on the device.
    """

    @abstractmethod
    def runner(self, values: Sequence[Value]) -> Runner:
        """One that takes the next record, or puts it, at its place in a chain.

        A taken record's values are the runner's outputs, those of one to be put its inputs.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it, when no step runs. Closing twice is allowed."""


class Backend(ABC):
    """One way to compute regions. A device makes one instance, in the process that runs it.

    When devices are verified, each check is followed by a new one; the old one is let go before.
    """

    loads_beside = False
    """Whether another instance may load its part while this one still runs, as for a move."""

    @classmethod  # noqa: B027  # most have nothing of the kind
    def warm_up(cls) -> None:
        """Load kernels that every instance needs, in a process that will have one at some time."""

    def __init__(self, options: BackendOptions) -> None:
        self.options = options

    @abstractmethod
    def describe(self) -> Description:
        """The hardware as it is now; nothing is assumed."""

    def supports_op(self, signature: Signature, limits: Limits) -> Verdict:
        """Whether it can run such an operator, on its own or among others."""
        return no("it supports no operators by themselves")

    def claims(self, region: RegionSignature, limits: Limits) -> Verdict:
        """Whether it runs such a region as one fused unit."""
        return NO_CLAIM

    def patterns(self) -> Sequence[Pattern]:
        """Runs of operators that it wants to be asked about as regions of its own kinds."""
        return ()

    def weight_bytes(self, form: WeightForm) -> int:
        """Memory that a weight takes once loaded; as in the file unless overridden."""
        kind, shape = form
        return prod(shape[:-1]) * row_bytes(kind, shape[-1])

    def open_ring(self, slots: int, slot_bytes: int, link: str) -> tuple[DeviceRing, Any]:
        """A ring in this device's memory: the end that takes, and what another joins it with.

        `link` is what its description names; or, where devices have found that they cannot reach
        each other's memory by "cuda_ipc", "cuda_host", which goes through memory of the host.
        Only of a backend whose description names a link. What is returned second can be pickled.
        Raises CapacityError, LinkError.
        """
        raise NotImplementedError

    def join_ring(self, opened: Any) -> DeviceRing:
        """The end that puts, of a ring that another device has opened. Raises LinkError."""
        raise NotImplementedError

    def interrupt(self, wanted: bool) -> None:  # noqa: B027  # most never wait for others
        """Whether runs that wait for another device shall end at once, with nothing to show.

        Called from a thread beside the one that runs.
        """

    @abstractmethod
    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        """Read the subgraph's weights, and make it ready to run steps within the limits.

        `subgraph.claim` is the kind of the region when the backend claimed it; else it holds
        operators that the backend supports.
        """
