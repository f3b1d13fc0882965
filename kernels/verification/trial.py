"""A check with its inputs and right answers: made where the reference runs, sent to the device."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from raygraft.graph.capability import RegionSignature
from raygraft.graph.operators import Value
from raygraft.graph.step import Step, step_from_arrays, step_to_arrays
from raygraft.graph.tensors import WeightSource
from raygraft.kernels.base import Array, Backend, BackendOptions, Runner
from raygraft.kernels.reference.backend import ReferenceBackend
from raygraft.kernels.reference.sampling import log_total, sample
from raygraft.kernels.verification.checks import Check, CheckResult, Outcome
from raygraft.kernels.verification.compare import (
    Expected,
    Sampled,
    complaint,
    missing_outputs,
)
from raygraft.kernels.verification.steps import BLOCK_SIZE, random_steps

NEAR_TIES = 4
"""How often ids are sampled from logits that are off by the bound."""


@dataclass(frozen=True, slots=True)
class TrialStep:
    """One step with its inputs and what must come out."""

    title: str
    step: Step
    inputs: dict[str, Array]
    expected: Expected


@dataclass(frozen=True, slots=True)
class Trial:
    """A check, ready for any device."""

    check: Check
    blocks: int
    """Pages of the cache."""
    steps: tuple[TrialStep, ...]


def obstacle(check: Check, memory: int) -> str:
    """Why the reference cannot run a check within `memory` bytes; empty when it can."""
    reference = ReferenceBackend(BackendOptions())
    what = check.what
    for signature in what.operators if isinstance(what, RegionSignature) else (what,):
        verdict = reference.supports_op(signature, check.limits)
        if not verdict:
            return f"the reference cannot run it: {verdict.reason} ({signature.kind})"
    shapes = [weight.shape(check.tensors[weight.tensor]) for weight in check.subgraph.weights]
    needed = sum(reference.weight_bytes(("F32", shape)) for shape in shapes)
    if needed > memory:
        return (
            f"the reference needs {needed / 2**30:.1f} GiB for its weights, "
            f"{memory / 2**30:.1f} GiB are free"
        )
    return ""


def make_trial(check: Check, weights: WeightSource, *, seed: int = 0, threads: int = 1) -> Trial:
    """Draw inputs, and let the reference compute the answers with the model's own weights."""
    rng = np.random.default_rng([seed, zlib.crc32(str(check.what).encode())])
    steps, blocks = random_steps(
        rng, check.limits, check.vocabulary, stateless=not check.subgraph.states
    )
    samples = [op for op in check.subgraph.operators if op.kind == "sample"]
    logits = tuple(op.inputs[0] for op in samples)
    # Logits are asked for as well, where they are computed inside.
    inside = tuple(name for name in logits if name not in check.subgraph.inputs)
    subgraph = replace(check.subgraph, outputs=(*check.subgraph.outputs, *inside))
    runner = ReferenceBackend(BackendOptions(threads)).load(subgraph, weights, check.limits)
    runner.allocate_state(blocks, BLOCK_SIZE)
    found = []
    for named in steps:
        inputs = {
            name: random_input(rng, check.values[name], named.step)
            for name in check.subgraph.inputs
        }
        outputs = runner.run(named.step, inputs)
        sampled = _sampled(rng, check, {**inputs, **outputs}, named.step)
        for name in inside:
            del outputs[name]
        found.append(TrialStep(named.title, named.step, inputs, Expected(outputs, sampled)))
    return Trial(check, blocks, tuple(found))


def _sampled(
    rng: np.random.Generator, check: Check, values: Mapping[str, Array], step: Step
) -> dict[str, Sampled]:
    """For each output of `sample` what else is right, by the logits of the reference."""
    found: dict[str, Sampled] = {}
    for op in check.subgraph.operators:
        if op.kind != "sample":
            continue
        logits = values[op.inputs[0]].astype(np.float64)
        tolerance = check.bound * np.sqrt(np.mean(np.square(logits), axis=-1, keepdims=True))
        near = [
            sample(
                (logits + tolerance * rng.standard_normal(logits.shape)).astype(np.float32),
                step.sampling,
            )
            for _ in range(NEAR_TIES)
        ]
        logprobs = np.array([row - log_total(row) for row in logits], np.float32)
        for number, name in enumerate(op.outputs):
            found[name] = Sampled(
                ids=op.outputs[number - number % 2],  # ids stand before their log probabilities
                logprobs=logprobs.reshape(logits.shape),
                tolerance=tolerance.astype(np.float32),
                also_right=[outputs[number] for outputs in near],
            )
    return found


def random_input(rng: np.random.Generator, value: Value, step: Step) -> Array:
    """Normal numbers, in rows of unlike size; of whole numbers each row holds the first ones."""
    rows = step.rows if value.rows == "tokens" else len(step.logit_rows)
    if np.dtype(value.dtype).kind != "f":
        first = np.tile(np.arange(value.width), (rows, 1))
        return rng.permuted(first, axis=1).astype(value.dtype)
    sizes = np.exp(0.5 * rng.standard_normal((rows, 1)))
    return (sizes * rng.standard_normal((rows, value.width))).astype(value.dtype)


def run_trial(backend: Backend, trial: Trial, weights: WeightSource) -> CheckResult:
    """Run a check on a device's backend. Whatever the backend raises is a failed check."""
    check = trial.check
    try:
        runner = backend.load(check.subgraph, weights, check.limits)
        if check.subgraph.states:
            runner.allocate_state(trial.blocks, BLOCK_SIZE)
    except Exception as error:  # noqa: BLE001  # any failure of a backend is a result here
        return check.result(Outcome.FAILED, detail=f"{_said(error)}, while loading")
    findings: list[_Finding] = []
    for step in trial.steps:
        try:
            findings += _run_step(runner, check, step)
        except Exception as error:  # noqa: BLE001  # as above
            findings.append(_Finding(None, _said(error), step.title))
        if findings[-1].error is None:
            break
    wrong = [finding for finding in findings if finding.detail]
    if not wrong:
        return check.result(Outcome.OK, max(finding.error or 0.0 for finding in findings))
    worst = max(wrong, key=lambda finding: (finding.error is None, finding.error or 0.0))
    return check.result(Outcome.FAILED, worst.error, f"{worst.detail}, in a step of {worst.title}")


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one output of one step shows. No error: there was nothing to measure."""

    error: float | None
    detail: str
    """What is wrong; empty when all is well."""
    title: str


def _run_step(runner: Runner, check: Check, step: TrialStep) -> list[_Finding]:
    """The findings of a step; one without an error comes last, and ends the trial."""
    inputs = {name: values.copy() for name, values in step.inputs.items()}
    own = step_from_arrays(tuple(array.copy() for array in step_to_arrays(step.step)))
    found = runner.run(own, inputs)
    findings = [_Finding(0.0, "", step.title)]
    if missing := missing_outputs(found, check.subgraph):
        return [_Finding(None, missing, step.title)]
    for name in check.subgraph.outputs:
        expected = step.expected.outputs[name]
        if wrong := complaint(name, found[name], expected, check.values[name]):
            return [*findings, _Finding(None, wrong, step.title)]
        error = step.expected.error(name, found)
        findings.append(_Finding(error, _judge(check, name, error), step.title))
    for name, values in inputs.items():
        if not np.array_equal(values, step.inputs[name]):
            return [*findings, _Finding(None, f"it overwrote its input {name}", step.title)]
        values.fill(0)  # they are the caller's again: a cache that still refers to them shows it
    return findings


def _judge(check: Check, name: str, error: float) -> str:
    """Words for an error that is too large; empty when it is not."""
    if check.values[name].dtype == "int32":
        return f"{error:.0%} of the ids in output {name} are wrong" if error else ""
    if error <= check.bound:
        return ""
    return f"error {error:.2g}, bound {check.bound:g}, in output {name}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
