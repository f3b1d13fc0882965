"""A backend that computes step after step in a thread of its own, as a GPU's stream does."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from raygraft.kernels.base import Runner, Started
from raygraft.kernels.reference.backend import ReferenceBackend


class Stream:
    """The thread, what it drew last, and what was asked of it."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.drawn = None
        self.seconds = 0.004
        self.fails_at = None
        self.under_way = self.most_under_way = self.started = self.unknown = 0


class Run(Started):
    draws = True

    def __init__(self, stream, future):
        self.stream, self.future = stream, future

    def done(self):
        return self.future.done()

    def finish(self):
        try:
            return self.future.result()
        finally:
            self.stream.under_way -= 1


class Unit(Runner):
    def __init__(self, stream, subgraph, runner):
        self.stream, self.subgraph, self.runner = stream, subgraph, runner
        self.ids = [op.outputs[0] for op in subgraph.operators if op.kind == "sample"]

    def allocate_state(self, blocks, block_size):
        self.runner.allocate_state(blocks, block_size)

    def run(self, step, inputs):
        return self.start(step, inputs).finish()

    def start(self, step, inputs):
        stream = self.stream
        stream.started += 1
        stream.unknown += int((step.tokens < 0).sum())
        stream.under_way += 1
        stream.most_under_way = max(stream.most_under_way, stream.under_way)
        return Run(stream, stream.pool.submit(self._compute, step, inputs, stream.started))

    def _compute(self, step, inputs, number):
        time.sleep(self.stream.seconds)
        if number == self.stream.fails_at:
            raise RuntimeError("the stream is broken")
        tokens = step.tokens.copy()
        for row in np.flatnonzero(tokens < 0):
            tokens[row] = self.stream.drawn[-1 - tokens[row], 0]
        found = self.runner.run(replace(step, tokens=tokens), inputs)
        if self.ids:
            self.stream.drawn = found[self.ids[0]].copy()
        return found


class Streaming(ReferenceBackend):
    """One stream for all: tests run one device of it at a time."""

    stream = Stream()

    def load(self, subgraph, weights, limits):
        return Unit(self.stream, subgraph, super().load(subgraph, weights, limits))
