"""Verifying the devices of a fleet, and keeping what fails out of its plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raygraft.actors.part import Questions
from raygraft.graph.capability import RegionSignature, Verdict, no
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.operators import Signature
from raygraft.kernels.host import free_memory
from raygraft.kernels.verification.checks import Check, CheckResult, Outcome, What, list_checks
from raygraft.kernels.verification.trial import Trial, make_trial, obstacle
from raygraft.placement.costs import size
from raygraft.placement.devices import DeviceProfile

DEADLINE = 60.0
"""Seconds that a device has for one check: to load it, to compile what it needs, and to run it."""
REFERENCE_SHARE = 0.5
"""Share of the machine's free memory that the reference may fill with weights."""

Results = dict[str, tuple[CheckResult, ...]]
"""By device."""
Progress = Callable[[str], None]
Attempt = Callable[[Trial, Sequence[str]], Mapping[str, CheckResult]]
"""Runs one trial on some devices. Whatever they do, there is a result for each."""


@dataclass(slots=True)
class Withdrawals:
    """What has failed its check, by device. It stays withdrawn while the fleet lives."""

    _found: dict[str, dict[What, Verdict]] = field(default_factory=dict)

    def add(self, device: str, what: What, result: CheckResult) -> None:
        """Withdraw one claim or operator of a device."""
        self._found.setdefault(device, {})[what] = no(f"withdrawn: {result.detail}")

    def applied(self, profile: DeviceProfile) -> DeviceProfile:
        """The profile without what is withdrawn, whoever in the device gave the answers."""
        own = self._found.get(profile.name, {})
        verdicts = {what: verdict for what, verdict in own.items() if isinstance(what, Signature)}
        claims = {what: v for what, v in own.items() if isinstance(what, RegionSignature)}
        return replace(
            profile,
            verdicts={**profile.verdicts, **verdicts},
            claims={**profile.claims, **claims},
        )


def verify_devices(
    profiles: Sequence[DeviceProfile],
    questions: Questions,
    model: ModelFile,
    attempt: Attempt,
    withdrawals: Withdrawals,
    progress: Progress,
) -> Results:
    """Check all that the devices claim and support; what fails is withdrawn.

    The reference runs once for each check, here; then the devices that are concerned run it side
    by side, each on its own machine.
    """
    graph, limits = questions.graph, questions.limits
    weights = MappedWeights(model.files, model.tensors)
    own: dict[str, dict[What, Check]] = {}
    for device in profiles:
        checks = list_checks(graph, device.verdicts, device.claims, device.found, limits)
        own[device.name] = {check.what: check for check in checks}
    every = {what: check for checks in own.values() for what, check in checks.items()}
    found: dict[str, dict[What, CheckResult]] = {device.name: {} for device in profiles}
    for number, (what, check) in enumerate(every.items(), 1):
        concerned = [device for device in profiles if what in own[device.name]]
        kind = "claim" if check.claim else "operator"
        progress(f"checking {number} of {len(every)}: {kind} {check.where}")
        for name, result in _run(check, concerned, weights, attempt).items():
            found[name][what] = result
            if not result.ok:
                withdrawals.add(name, what, result)
    return {name: tuple(found[name][what] for what in own[name]) for name in own}


def _run(
    check: Check, devices: Sequence[DeviceProfile], weights: MappedWeights, attempt: Attempt
) -> dict[str, CheckResult]:
    """One check on the devices that it concerns."""
    hindrances = {device.name: _hindrance(check, device) for device in devices}
    results = {
        name: check.result(Outcome.UNCHECKED, detail=why) for name, why in hindrances.items() if why
    }
    able = [name for name, why in hindrances.items() if not why]
    if not able:
        return results
    if why := obstacle(check, int(free_memory() * REFERENCE_SHARE)):
        return results | {name: check.result(Outcome.UNCHECKED, detail=why) for name in able}
    trial = make_trial(check, weights, threads=os.cpu_count() or 1)
    return results | dict(attempt(trial, able))


def _hindrance(check: Check, device: DeviceProfile) -> str:
    """Why a device cannot be asked to run a check that no plan would ask it to run either."""
    forms = [
        (check.tensors[weight.tensor].type, weight.shape(check.tensors[weight.tensor]))
        for weight in check.subgraph.weights
    ]
    needed = sum(device.weight_bytes[form] for form in forms)
    if needed <= device.memory:
        return ""
    return f"its weights take {size(needed)}, the device has {size(device.memory)}"
