"""Rotary position embedding and its scalings (https://arxiv.org/abs/2104.09864).

Every scaling that GGUF files name (linear, YaRN, Llama 3's frequency factors) only changes the
frequencies and a common magnitude, so a backend needs those alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.errors import ModelFileError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.operators import Attributes

SCALINGS = ("none", "linear", "yarn")


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """The attributes of a `rope` operator.

    `style` is "interleaved" (pairs of neighbours, as GGUF stores Llama's heads) or "neox" (first
    half with second half). `size` elements of each head are rotated, the rest stay.
    """

    heads: int
    size: int
    base: float
    style: str
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def attributes(self) -> Attributes:
        """As attributes of an operator."""
        return tuple(asdict(self).items())

    @classmethod
    def from_attributes(cls, attributes: Attributes) -> RotaryEmbedding:
        """The inverse of `attributes`."""
        return cls(**dict(attributes))  # type: ignore[arg-type]

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied with."""
        scale = 0.1 * math.log(self.factor) if self.scaling == "yarn" else 0.0
        return self.attention_factor * (1.0 + scale)

    def frequencies(self, factors: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """Radians per position, float64 `[size / 2]`.

        `factors` divide the frequencies (Llama 3's `rope_freqs.weight`, `[size / 2]`).
        """
        exponents = np.arange(0, self.size, 2, dtype=np.float64) / self.size
        plain = self.base**-exponents
        if factors is not None:
            plain = plain / factors
        if self.scaling == "none":
            return plain
        interpolated = plain / self.factor
        if self.scaling == "linear":
            return interpolated
        keep = self._yarn_ramp()
        return np.asarray(interpolated * (1.0 - keep) + plain * keep)

    def _yarn_ramp(self) -> NDArray[np.float64]:
        """Share of the unscaled frequency in each pair (https://arxiv.org/abs/2309.00071)."""

        def pair(rotations: float) -> float:
            turns = self.original_context / (rotations * 2 * math.pi)
            return self.size * math.log(turns) / (2 * math.log(self.base))

        low = max(0.0, math.floor(pair(self.beta_fast)))
        high = min(self.size - 1.0, math.ceil(pair(self.beta_slow)))
        ramp = (np.arange(self.size // 2) - low) / max(0.001, high - low)
        return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0))


def read_rotary(model: ModelFile, *, heads: int, head_size: int, style: str) -> RotaryEmbedding:
    """The rotary embedding that a file's metadata describe, for `heads` heads."""
    prefix = f"{model.get('general.architecture', str)}.rope"
    size = model.get(f"{prefix}.dimension_count", int, head_size)
    factor = model.get(f"{prefix}.scaling.factor", float, 0.0)
    factor = factor or model.get(f"{prefix}.scale_linear", float, 0.0) or 1.0
    scaling = model.get(f"{prefix}.scaling.type", str, "linear" if factor != 1.0 else "none")
    if scaling not in SCALINGS:
        raise ModelFileError(
            f"{model.path}: {prefix}.scaling.type is {scaling!r}; known are {', '.join(SCALINGS)}"
        )
    if not 0 < size <= head_size or size % 2:
        raise ModelFileError(
            f"{model.path}: {prefix}.dimension_count is {size}, heads have {head_size}"
        )
    context = model.get(f"{model.get('general.architecture', str)}.context_length", int)
    return RotaryEmbedding(
        heads=heads,
        size=size,
        base=model.get(f"{prefix}.freq_base", float, 10000.0),
        style=style,
        scaling=scaling,
        factor=factor if scaling != "none" else 1.0,
        original_context=model.get(f"{prefix}.scaling.original_context_length", int, context),
        beta_fast=model.get(f"{prefix}.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=model.get(f"{prefix}.scaling.yarn_beta_slow", float, 1.0),
        attention_factor=model.get(f"{prefix}.scaling.attn_factor", float, 1.0),
    )
