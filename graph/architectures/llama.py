"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama (https://arxiv.org/abs/2302.13971).

Each block adds two residuals: grouped-query attention with rotary positions, then a gated
feed-forward; both read a root-mean-square norm of the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raygraft.graph.builder import GraphBuilder
from raygraft.graph.errors import ModelFileError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Dimensions, Graph
from raygraft.graph.operators import KeyValueState
from raygraft.graph.rotary import RotaryEmbedding, read_rotary


@dataclass(frozen=True, slots=True)
class LlamaParameters:
    """The metadata that shape the graph."""

    blocks: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    epsilon: float
    vocabulary: int
    context: int
    rotary: RotaryEmbedding

    @classmethod
    def read(cls, model: ModelFile) -> LlamaParameters:
        """Read and check them. Raises ModelFileError."""
        if model.get("llama.expert_count", int, 0):
            raise ModelFileError(f"{model.path}: mixtures of experts are not supported yet")
        width = model.get("llama.embedding_length", int)
        heads = model.get("llama.attention.head_count", int)
        kv_heads = model.get("llama.attention.head_count_kv", int, heads)
        if min(width, heads, kv_heads) < 1 or heads % kv_heads:
            raise ModelFileError(
                f"{model.path}: {heads} heads cannot share {kv_heads} key-value heads "
                f"at width {width}"
            )
        key_size = model.get("llama.attention.key_length", int, width // heads)
        embedding = model.tensors.get("token_embd.weight")
        return cls(
            blocks=model.get("llama.block_count", int),
            width=width,
            feed_forward=model.get("llama.feed_forward_length", int),
            heads=heads,
            kv_heads=kv_heads,
            key_size=key_size,
            value_size=model.get("llama.attention.value_length", int, width // heads),
            epsilon=model.get("llama.attention.layer_norm_rms_epsilon", float),
            vocabulary=embedding.rows if embedding else model.get("llama.vocab_size", int),
            context=model.get("llama.context_length", int),
            rotary=read_rotary(model, heads=heads, head_size=key_size, style="interleaved"),
        )


def build(model: ModelFile) -> Graph:
    """The graph of a Llama. Raises ModelFileError when tensors are missing or misshapen."""
    p = LlamaParameters.read(model)
    g = GraphBuilder(model)
    with g.region("embed", "embed"):
        x = g.get_rows("tokens", "token_embd.weight", p.vocabulary, p.width)
    for n in range(p.blocks):
        with g.region(f"blk.{n}", "block"):
            x = _attention(g, p, x, n)
            x = _feed_forward(g, p, x, n)
    with g.region("head", "head"):
        x = g.select_rows("rows", x)
        x = g.rms_norm("norm", x, "output_norm.weight", p.epsilon)
        output = "output" if g.has("output.weight") else "token_embd"  # tied when not of its own
        logits = g.matmul("logits", x, output, p.vocabulary)
    with g.region("sample", "sample"):
        results = g.sample(logits)
    return g.build(Dimensions(p.blocks, p.width, p.vocabulary, p.context), results)


def _attention(g: GraphBuilder, p: LlamaParameters, x: str, n: int) -> str:
    key_rotary = replace(p.rotary, heads=p.kv_heads).attributes()
    with g.region("attn", "attention"):
        with g.region("qkv", "qkv"):
            factors = None
            if g.has("rope_freqs.weight"):
                factors = g.weight("rope_freqs.weight", (p.rotary.size // 2,))
            h = g.rms_norm("norm", x, f"blk.{n}.attn_norm.weight", p.epsilon)
            q = g.matmul("q", h, f"blk.{n}.attn_q", p.heads * p.key_size)
            k = g.matmul("k", h, f"blk.{n}.attn_k", p.kv_heads * p.key_size)
            v = g.matmul("v", h, f"blk.{n}.attn_v", p.kv_heads * p.value_size)
            q = g.rope("q_rope", q, p.rotary.attributes(), factors)
            k = g.rope("k_rope", k, key_rotary, factors)
        with g.region("core", "core"):
            state = KeyValueState(f"blk.{n}.attn.core", p.kv_heads, p.key_size, p.value_size)
            a = g.attention("attention", q, k, v, state, p.heads, 1 / math.sqrt(p.key_size))
        with g.region("out", "out"):
            a = g.matmul("o", a, f"blk.{n}.attn_output", p.width)
            return g.add("residual", x, a)


def _feed_forward(g: GraphBuilder, p: LlamaParameters, x: str, n: int) -> str:
    with g.region("ffn", "ffn"):
        with g.region("gate_up", "gate_up"):
            h = g.rms_norm("norm", x, f"blk.{n}.ffn_norm.weight", p.epsilon)
            gate = g.matmul("gate", h, f"blk.{n}.ffn_gate", p.feed_forward)
            up = g.matmul("up", h, f"blk.{n}.ffn_up", p.feed_forward)
            h = g.swiglu("swiglu", gate, up)
        with g.region("down", "down"):
            h = g.matmul("down", h, f"blk.{n}.ffn_down", p.width)
            return g.add("residual", x, h)
