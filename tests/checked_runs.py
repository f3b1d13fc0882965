"""Running subgraphs on a GPU: plainly, captured and replayed, with all that they write poisoned."""

import numpy as np
from single_operators import Given, step_of, subgraph_of

from raygraft.graph.capability import Limits
from raygraft.graph.step import Step

HALVES = 2e-3
"""How far results may be off where halves are multiplied: norm of the difference over the norm."""
FLOATS = 2e-5
"""The same where arithmetic is as good as float32."""


def poison(backend):
    """Fill what kernels write with NaN. Packed values keep their filling, counters their zero."""
    for key, room in backend.shared.arena._slots.items():
        if key != "attention's counters" and not (isinstance(key, tuple) and key[0] == "packed"):
            room.fill(0xFF)
    backend._gpu.cupy.cuda.runtime.deviceSynchronize()


def runs(backend, runner, step, inputs):
    """Plainly, captured, and replayed, each with a fresh step and poisoned memory."""
    found = []
    for _ in range(3):
        copy = Step(*[getattr(step, name) for name in Step.__dataclass_fields__])
        found.append(runner.run(copy, {name: x.copy() for name, x in inputs.items()}))
        poison(backend)
    return found


def load(backend, operators, widths, weights, cache_type="f32", logits=()):
    limits = Limits(max_rows=128, context=128, cache_type=cache_type, max_sequences=4)
    subgraph = subgraph_of(operators, widths, logits)
    runner = backend.load(subgraph, Given(**weights), limits)
    if subgraph.states:
        runner.allocate_state(40, 16)
    return runner


def rows_step(rows, wanted=None):
    return step_of([list(range(rows))], [list(range(8))], wanted)


def inputs_of(random, rows, widths):
    return {
        name: (random.standard_normal((rows, width)) * 3).astype(np.float32)
        for name, width in widths.items()
    }
