"""Verifying devices before a plan: what `LLM` and the command line share."""

from __future__ import annotations

import sys
import warnings

from raygraft.actors.fleet import Fleet
from raygraft.actors.part import Questions
from raygraft.actors.verification import DEADLINE, Progress, Results
from raygraft.graph.capability import Limits
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.verification.checks import CheckResult, Outcome


class WithdrawnWarning(UserWarning):
    """A device has failed a check: what it claimed there is left out of the plan."""


def verify_on(
    fleet: Fleet,
    graph: Graph,
    *,
    limits: Limits,
    model: ModelFile,
    deadline: float = DEADLINE,
    progress: Progress = lambda _: None,
) -> Results:
    """Verify all devices, and warn of each claim and operator that is withdrawn."""
    results = fleet.verify(Questions(graph, limits), model, deadline, progress)
    for device, checks in results.items():
        for check in checks:
            if not check.ok:
                text = f"device {device}: {name_of(check)} {verdict_of(check)}"
                warnings.warn(text, WithdrawnWarning, stacklevel=3)
    return results


def name_of(check: CheckResult) -> str:
    """What was checked, in few words: `claim of blk.0.attn and 29 alike`."""
    others = f" and {check.count - 1} alike" if check.count > 1 else ""
    return f"{'claim of' if check.claim else 'operator'} {check.where}{others}"


def verdict_of(check: CheckResult) -> str:
    """What is wrong with a check, in words."""
    kind = "withdrawn" if check.outcome is Outcome.FAILED else "not checked"
    return f"{kind}: {check.detail}"


def print_warnings_as_lines() -> None:
    """On a command line a warning is one line, without the source that it was raised from.

    To be called within `warnings.catch_warnings`.
    """
    warnings.simplefilter("always", WithdrawnWarning)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, WithdrawnWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            shown(message, category, *place)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]
