"""Devices that claim attention and get it wrong, each in its own way.

Loaded by path, as anybody's backend is: `liars.py:Scaled`.
"""

import os
import sys
import time
from dataclasses import replace

import numpy as np

from raygraft.graph.capability import YES, Limits, RegionSignature, Verdict, no
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Signature
from raygraft.graph.step import Step
from raygraft.graph.tensors import WeightSource
from raygraft.kernels.base import Array, Runner, Values
from raygraft.kernels.reference.backend import ReferenceBackend


class AttentionOnly(ReferenceBackend):
    """An honest one: it claims attention, and nothing else."""

    def supports_op(self, signature: Signature, limits: Limits) -> Verdict:
        return no("it supports no operators")

    def claims(self, region: RegionSignature, limits: Limits) -> Verdict:
        return YES if region.kind == "attention" else no("it only does attention")


class LyingRunner(Runner):
    """The reference's runner, between a lie about the step and one about the outputs."""

    def __init__(self, liar: "Liar", runner: Runner) -> None:
        self.liar = liar
        self.runner = runner

    def allocate_state(self, blocks: int, block_size: int) -> None:
        self.size = blocks, block_size
        self.runner.allocate_state(blocks, block_size)

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        self.liar.before(self, step, inputs)
        return self.liar.after(step, self.runner.run(step, inputs))


class Liar(AttentionOnly):
    """What the others have in common."""

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        return LyingRunner(self, super().load(subgraph, weights, limits))

    def before(self, runner: LyingRunner, step: Step, inputs: Values) -> None:
        pass

    def after(self, step: Step, outputs: dict[str, Array]) -> dict[str, Array]:
        return {name: self.lie(step, output) for name, output in outputs.items()}

    def lie(self, step: Step, output: Array) -> Array:
        return output


class Scaled(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        return output * np.float32(1.01)


class OneElement(Liar):
    """A single number of the largest step."""

    def lie(self, step: Step, output: Array) -> Array:
        if step.rows > 30:
            output[-1, -1] += 1
        return output


class WrongShape(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        return output[:, : output.shape[1] // 2]


class WrongType(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        return output.astype(np.float64)


class NoArray(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        return output.tolist()


class NotANumber(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        output[0, :12] = np.nan
        return output


class Infinite(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        output[0, 0] = np.inf
        return output


class NoOutput(Liar):
    def after(self, step: Step, outputs: dict[str, Array]) -> dict[str, Array]:
        return {}


class Raises(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        raise ValueError("no such page")


class RaisesWhenLoading(Liar):
    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        raise MemoryError("no room")


class IgnoresTheCache(Liar):
    """Right for every prompt that comes in one piece."""

    def before(self, runner: LyingRunner, step: Step, inputs: Values) -> None:
        runner.allocate_state(*runner.size)


class OneSequence(Liar):
    """Right for every step of one sequence."""

    def lie(self, step: Step, output: Array) -> Array:
        return output if len(step.block_tables) == 1 else output[::-1]


class PagesInARow(Liar):
    """Reads the first page's number, and takes the others to follow it."""

    def before(self, runner: LyingRunner, step: Step, inputs: Values) -> None:
        columns = np.arange(step.block_tables.shape[1], dtype=np.int32)
        step.block_tables[:] = (step.block_tables[:, :1] + columns) % runner.size[0]


class OverwritesItsInput(Liar):
    """Right in itself, and wrong for whoever reads the same values after it."""

    def before(self, runner: LyingRunner, step: Step, inputs: Values) -> None:
        self.inputs = inputs

    def lie(self, step: Step, output: Array) -> Array:
        for values in self.inputs.values():
            np.divide(values, 2, out=values)
        return output


class KeepsItsInput(Liar):
    """Its cache refers to values that are the caller's again."""

    def before(self, runner: LyingRunner, step: Step, inputs: Values) -> None:
        self.kept = getattr(self, "kept", [])
        self.kept += inputs.values()

    def lie(self, step: Step, output: Array) -> Array:
        return output * np.float32(1 if np.any(self.kept[0]) else 2)


class Exits(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        sys.exit("I leave")


class Hangs(Liar):
    def lie(self, step: Step, output: Array) -> Array:
        time.sleep(1e6)
        return output


class Crashes(Liar):
    """Ends its process, as a segmentation fault does."""

    def lie(self, step: Step, output: Array) -> Array:
        os._exit(1)


class CrashesAndHangs(Liar):
    """Crashes on attention, hangs on feed-forward, and is honest about the rest."""

    def claims(self, region: RegionSignature, limits: Limits) -> Verdict:
        return YES if region.kind in ("attention", "ffn", "embed") else no("not that")

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        if subgraph.claim == "attention":
            os._exit(1)
        if subgraph.claim == "ffn":
            time.sleep(1e6)
        return super().load(subgraph, weights, limits)


class WrongOperator(ReferenceBackend):
    """Supports every operator, and takes the wrong half of one for the gate."""

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        swapped = tuple(
            replace(op, inputs=op.inputs[::-1]) if op.kind == "swiglu" else op
            for op in subgraph.operators
        )
        return super().load(replace(subgraph, operators=swapped), weights, limits)


class AlwaysTheFirst(ReferenceBackend):
    """Takes the first token for the best."""

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        return FirstToken(super().load(subgraph, weights, limits))


class FirstToken(Runner):
    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def allocate_state(self, blocks: int, block_size: int) -> None:
        self.runner.allocate_state(blocks, block_size)

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        outputs = self.runner.run(step, inputs)
        if "sample.id" in outputs:
            outputs["sample.id"][:] = 0
        return outputs


class ClaimsAll(ReferenceBackend):
    """An honest one that claims every region, and rounds a little."""

    def claims(self, region: RegionSignature, limits: Limits) -> Verdict:
        return YES

    def load(self, subgraph: Subgraph, weights: WeightSource, limits: Limits) -> Runner:
        runner = super().load(subgraph, weights, limits)
        rng = np.random.default_rng(1)
        for weight, values in runner._weights.items():
            noise = 1 + 1e-5 * rng.standard_normal(values.shape, np.float32)
            runner._weights[weight] = values * noise
        return runner
