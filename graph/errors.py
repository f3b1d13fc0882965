"""The errors of Raygraft, one tree.

    RaygraftError
    ├── UsageError              the caller can mend it: exit code 2
    │   ├── ModelFileError          not a GGUF file, truncated, a tensor missing or misshapen
    │   ├── UnknownArchitectureError
    │   ├── ConfigurationError      a device, rule or option that makes no sense
    │   │   └── SelectorError           a selector that cannot be read or names no region
    │   ├── PlanError               no plan can satisfy what was asked
    │   │   ├── UnsupportedRegionError  a region that no device can run
    │   │   └── CapacityError           weights or cache that fit nowhere
    │   └── RequestError            a prompt or a sampling parameter that cannot be served
    │       └── QueueFullError          too many requests wait already: try again later
    └── RunError                the machine's side failed: exit code 1
        ├── DeviceLostError         an actor or its node died
        ├── DeviceFailedError       a backend raised an error
        ├── LinkError               a record was late, or out of order
        │   └── LinkFullError           there was no room in time: the one error to try again after
        └── ClusterError            Ray could not be started or joined, or a node is missing

Every message says what was wanted, what was there, and which file, region or device it is about.
"""


class RaygraftError(Exception):
    """Base of all errors that Raygraft raises on purpose."""

    exit_code = 1


class UsageError(RaygraftError):
    """The caller asked for something that cannot be; nothing was lost."""

    exit_code = 2


class ModelFileError(UsageError):
    """A model file cannot be read, or does not hold what its architecture needs."""


class UnknownArchitectureError(UsageError):
    """The file's `general.architecture` has no description here."""


class ConfigurationError(UsageError):
    """A device, a rule or an option is wrong."""


class SelectorError(ConfigurationError):
    """A selector cannot be parsed, or matches no region of the model."""


class PlanError(UsageError):
    """No plan can satisfy the rules with these devices.

    `conflict` holds rules, answers and limits that are impossible together, and possible when any
    one of them goes; it is empty when the message says it all.
    """

    def __init__(self, message: str, conflict: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.conflict = conflict


class UnsupportedRegionError(PlanError):
    """No allowed device can run a region."""


class CapacityError(PlanError):
    """Weights or cache do not fit the memory of the devices."""


class RequestError(UsageError):
    """A prompt or a sampling parameter cannot be served."""


class QueueFullError(RequestError):
    """As many requests wait as may; the same request can be served later."""


class RunError(RaygraftError):
    """Something failed while running."""


class DeviceLostError(RunError):
    """A device's actor, or the node it lived on, died."""


class DeviceFailedError(RunError):
    """A device's backend raised an error while loading or running."""


class LinkError(RunError):
    """A record did not arrive in time, or was not the one the schedule expects."""


class LinkFullError(LinkError):
    """There was no room in time. The record was not sent, and can be sent again."""


class ClusterError(RunError):
    """Ray could not be started or joined, or a wanted node is not there."""
