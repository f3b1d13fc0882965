"""A board that exists only in its limits: small memory, 4-bit weights, attention alone.

    raygraft plan --device board:backend=examples/simulated_accelerator.py:SmallBoard --device cpu

The plan gives it as many attention blocks as fit, and says why the others are elsewhere.
"""

from dataclasses import replace

from raygraft.graph.capability import YES, no
from raygraft.kernels.base import Backend
from raygraft.kernels.host import describe_host
from raygraft.kernels.reference.backend import ReferenceBackend

FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4"}


class SmallBoard(Backend):
    """What it claims it computes on the host, as the reference does."""

    memory = 64 * 2**20
    widest_head = 128

    def __init__(self, options):
        super().__init__(options)
        self._simulated = ReferenceBackend(options)

    def describe(self):
        host = describe_host("small-board", self.options.threads, (), kind="accelerator")
        return replace(
            host, hardware="simulated board", memory_total=self.memory, memory_free=self.memory
        )

    def claims(self, region, limits):
        if region.kind != "attention":
            return no("it runs whole attention blocks and nothing else")
        if region.head_size > self.widest_head:
            return no(f"its heads are at most {self.widest_head} wide, not {region.head_size}")
        if wider := region.weight_types - FOUR_BITS:
            return no(f"its weights have 4 bits, not {', '.join(sorted(wider))}")
        return YES

    def load(self, subgraph, weights, limits):
        return self._simulated.load(subgraph, weights, limits)
