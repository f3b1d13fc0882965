"""Random weights of every type, also of those that the `gguf` package cannot make."""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from raygraft.graph.tensors import QuantizedTensor

HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_XS": (0,), "TQ2_0": (64,),
}  # fmt: skip
"""Where the float16 fields of a block stand; all other bits may be any."""


def block_size(kind: str) -> int:
    """Columns of a block."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def random_weight(
    kind: str, rows: int, columns: int, random: np.random.Generator
) -> QuantizedTensor:
    """A matrix whose blocks are random bits; floats are drawn from a normal distribution."""
    if kind in ("F32", "F16", "BF16"):
        values = random.standard_normal((rows, columns), np.float32)
        raw = quants.quantize(values, GGMLQuantizationType[kind])
        return QuantizedTensor(kind, (rows, columns), raw.view(np.uint8).reshape(rows, -1))
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, columns // block, size), np.uint8)
    for place in HALVES.get(kind, ()):
        scales = random.uniform(0.5, 1.5, (rows, columns // block, 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = random.integers(120, 134, (rows, columns // block))
    return QuantizedTensor(kind, (rows, columns), blocks.reshape(rows, -1))
