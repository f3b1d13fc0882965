"""A backend that implements attention and nothing else, in one class.

    raygraft run --device board:backend=examples/attention_only.py:AttentionOnly --device cpu -p Hi

It claims whole attention blocks, from the norm to the residual addition, with their caches.
"""

import numpy as np

from raygraft.graph.capability import YES, no
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.kernels.base import Backend, Runner
from raygraft.kernels.host import describe_host


class AttentionOnly(Backend):
    widest_head = 128

    def describe(self):
        return describe_host("attention-only", self.options.threads, (), kind="accelerator")

    def claims(self, region, limits):
        if region.kind != "attention":
            return no("it runs whole attention blocks and nothing else")
        if region.head_size > self.widest_head:
            return no(f"its heads are at most {self.widest_head} wide, not {region.head_size}")
        style = region.attribute("rope", "style")
        return YES if style == "interleaved" else no(f"it has no {style} rotary embedding")

    def load(self, subgraph, weights, limits):
        return AttentionBlock(subgraph, weights)


class AttentionBlock(Runner):
    def __init__(self, subgraph, weights):
        self.op = {op.name.rpartition(".")[2]: op for op in subgraph.operators}
        (self.output,) = subgraph.outputs
        read = [(name, role, w) for name, op in self.op.items() for role, w in op.weights]
        self.w = {(name, role): weights.read(w).dequantise() for name, role, w in read}

    def allocate_state(self, blocks, block_size):
        state = self.op["attention"].state
        self.keys = np.zeros((blocks, block_size, state.kv_heads, state.key_size), np.float32)
        self.values = np.zeros((blocks, block_size, state.kv_heads, state.value_size), np.float32)

    def run(self, step, inputs):
        (x,) = inputs.values()
        epsilon = dict(self.op["norm"].attributes)["epsilon"]
        h = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + epsilon) * self.w["norm", "weight"]
        q, k, v = (self.linear(name, h) for name in ("q", "k", "v"))
        q, k = self.rotate("q_rope", q, step.positions), self.rotate("k_rope", k, step.positions)
        mixed = self.attend(step, q, k, v.reshape(len(x), *self.values.shape[2:]))
        return {self.output: (x + self.linear("o", mixed)).astype(np.float32)}

    def linear(self, name, x):
        return x @ self.w[name, "weight"].T + self.w.get((name, "bias"), 0)

    def rotate(self, name, x, positions):
        rotary = RotaryEmbedding.from_attributes(self.op[name].attributes)
        angles = positions[:, None] * rotary.frequencies(self.w.get((name, "factors")))
        turn = (np.exp(1j * angles) * rotary.magnitude)[:, None]  # a pair is a complex number
        heads = x.reshape(len(x), rotary.heads, -1)
        pairs = heads[..., : rotary.size : 2] + 1j * heads[..., 1 : rotary.size : 2]
        both = np.stack([(pairs * turn).real, (pairs * turn).imag], axis=-1)
        return np.concatenate([both.reshape(*heads.shape[:2], -1), heads[..., rotary.size :]], -1)

    def attend(self, step, q, k, v):
        out = np.empty((len(q), q.shape[1], v.shape[2]))
        size, group = self.keys.shape[1], q.shape[1] // k.shape[1]
        for row, (position, owner) in enumerate(zip(step.positions, step.sequence, strict=True)):
            pages = step.block_tables[owner][: position // size + 1]
            own = pages[-1], position % size
            self.keys[own], self.values[own] = k[row], v[row]
            keys = np.concatenate(self.keys[pages])[: position + 1].repeat(group, axis=1)
            values = np.concatenate(self.values[pages])[: position + 1].repeat(group, axis=1)
            scores = np.einsum("hd,phd->hp", q[row] / np.sqrt(q.shape[2]), keys)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row] = np.einsum("hp,phd->hd", weights / weights.sum(axis=1, keepdims=True), values)
        return out.reshape(len(q), -1)
